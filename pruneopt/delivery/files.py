"""Save a pruned or a smaller network and load it again, as safetensors: arrays and JSON, nothing is ever unpickled.

A pruned leaf is stored as the values of its support and one bit a weight; other arrays as they are. Leaves that are not
arrays (functions, flags) are not stored: loading takes a tree `like` the saved one and fills in its arrays. Nor is the
program of a smaller network: loading reads the user's function anew, on whatever JAX runs there.
"""

from __future__ import annotations

import contextlib
import json
import math
import operator
import os
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from pruneopt import _store, _tree
from pruneopt.delivery.shrink import SmallerNetwork, rebuilt
from pruneopt.delivery.smaller import State
from pruneopt.solution import Pruned

Tree = Any
_VALUES, _MASK, _ARRAY, _LOST = "values:", "mask:", "array:", "lost:"
_PRUNED, _SMALLER = "Pruned", "SmallerNetwork"
_LOADS = {_PRUNED: "load", _SMALLER: "load_smaller"}
_HAS_SHAPE = (jax.Array, np.ndarray, jax.ShapeDtypeStruct)


@_tree.on_host
def save(network: Pruned | SmallerNetwork, file: str | os.PathLike[str]) -> None:
    """Write what `prune` or `shrink` returned to `file` (safetensors), all or nothing: of a Pruned the values, masks,
    history and scope, of a SmallerNetwork the smaller leaves, which entries were cut, what the check found and which
    constant units stayed.

    Raises TypeError for anything else or an array that the format cannot hold, ValueError for what `load` could not
    give back (two leaves of one path, weights off the support), OSError where the file cannot be written.
    """
    if isinstance(network, SmallerNetwork):
        tensors, leaves = _tensors(network.params, None)
        for path, axes in network.lost.items():
            tensors |= {f"{_LOST}{k}:{path}": np.packbits(one) for k, one in enumerate(axes) if one.any()}
        shapes, texts = {path: list(shape) for path, shape in network.shapes.items()}, {"kind": _SMALLER}
        texts |= {"dense": json.dumps(shapes), "check": json.dumps([network.error, network.flipped])}
        texts |= {"constant": json.dumps({f"{k}:{path}": x.tolist() for (path, k), x in network.constant.items()})}
        texts |= {"state": json.dumps(network.state.text())}
    elif isinstance(network, Pruned):
        tensors, leaves = _tensors(network.params, network.support)
        history = json.dumps(network.history, default=_plain)
        texts = {"kind": _PRUNED, "history": history, "scope": network.scope}
    else:
        raise TypeError(
            f"network is a {type(network).__name__}; pass what prune returned, or shrink; save_weights writes a tree"
        )
    _store.write_tensors(file, tensors, {"leaves": json.dumps(leaves), **texts})


def load(file: str | os.PathLike[str], like: Tree) -> Pruned:
    """The Pruned in `file`, in the structure of `like`: the network's parameters, pruned or not, or `jax.eval_shape` of
    what makes them.

    Kept weights are bit-identical to the saved ones, pruned ones exactly zero, each leaf on the sharding that its leaf
    in `like` has; leaves that are not arrays come from `like`. `solutions` is empty: problems are not stored.
    Raises ValueError for a damaged file, one that `save` did not write, or one that does not fit `like`;
    FileNotFoundError where there is none.
    """
    _tree.check_here(None, "load")
    with _said_of(file):
        tensors, texts = _read(file, _PRUNED)
        history = _store.read_json(texts.get("history", ""), list)
        described = _store.read_json(texts.get("leaves", ""), dict)
        arrays, masks = _restored(tensors, described)
    params = _filled(like, arrays, _kinds(described), file)
    masks = {path: jnp.asarray(mask) for path, mask in masks.items()}
    support = _tree.map_named(lambda path, leaf: _tree.placed(masks[path], leaf) if path in masks else None, like)
    return Pruned(params, support, history=history, scope=texts.get("scope", ""))


def load_smaller(file: str | os.PathLike[str], fn: Callable[[Tree, Any], Any], like: Tree) -> SmallerNetwork:
    """The SmallerNetwork in `file` of the function that was shrunk, which is read and cut anew.

    like: the dense parameters, or `jax.eval_shape` of what makes them. Leaves are bit-identical to the saved ones, and
        lie on the sharding of theirs in `like` where nothing was cut from them.
    Raises as `load`. A function whose leaves have those shapes and tie what was cut otherwise is refused, with the
        reason, when the network is called.
    """
    _tree.check_here(None, "load_smaller")
    with _said_of(file):
        tensors, texts = _read(file, _SMALLER)
        described = _store.read_json(texts.get("leaves", ""), dict)
        check = _store.read_json(texts.get("check", ""), list)
        dense = _store.read_json(texts.get("dense", ""), dict)
        lost = _cut(tensors, dense)
        try:
            state = State.of_text(_store.read_json(texts.get("state", ""), dict))
        except (AttributeError, IndexError, KeyError, TypeError, ValueError) as wrong:
            raise _store.Damaged("what it says of the state is not what was written") from wrong
        constant = _constant(_store.read_json(texts.get("constant", ""), dict), dense)
        arrays, _ = _restored(tensors, described)
        if [type(fact) for fact in check] != [float, int] or dense.keys() != {
            p for p, a in described.items() if "key" not in a
        }:
            raise _store.Damaged("what it says of the check or of the dense network is not what was written")
        for path, every in lost.items():
            if arrays[path].shape != tuple(int(np.sum(~one)) for one in every):
                raise _store.Damaged(f"its array '{path}' is not what was left of it")
    shapes = {path: tuple(shape) for path, shape in dense.items()}
    params = _filled(like, arrays, _kinds(described), file, shapes)
    return rebuilt(fn, params, lost, shapes, (check[0], check[1]), constant, state)


def _constant(texts: dict[str, Any], dense: dict[str, Any]) -> dict[tuple[str, int], np.ndarray]:
    """{(path, axis): entries} of what was written for them. Raises Damaged for anything else."""
    found = {}
    for text, entries in texts.items():
        axis, _, path = text.partition(":")
        if not axis.isdecimal() or not isinstance(entries, list) or {type(k) for k in entries} - {int}:
            raise _store.Damaged("what it says of constant units is not what was written")
        shape = dense.get(path, ())
        if int(axis) >= len(shape) or not all(0 <= k < shape[int(axis)] for k in entries):
            raise _store.Damaged(f"it says that units of '{path}' are constant which that leaf does not have")
        found[path, int(axis)] = np.asarray(entries, int)
    return found


def load_masks(file: str | os.PathLike[str]) -> dict[str, np.ndarray]:
    """{name: boolean mask} from a safetensors or npz file of any tool; nonzero means kept.

    Pass the result to `pruneopt.from_masks(params, masks)`, renamed to the paths of `params` where they differ.
    Raises ValueError for a damaged file, one with pickled objects, and a mask that holds a NaN or an infinity.
    """
    if str(file).endswith(".npz"):
        try:
            with np.load(file, allow_pickle=False) as archive:
                arrays = {name: archive[name] for name in archive.files}
        except OSError:
            raise
        except Exception as error:
            raise ValueError(f"file '{file}' is not a readable npz of plain arrays: {error}") from error
    else:
        try:
            arrays = _store.read_any(file)[0]
        except _store.Damaged as error:
            raise ValueError(f"file '{file}' is damaged or not a safetensors file: {error}") from error
    for name, array in arrays.items():
        if array.dtype.kind not in "bui" and not np.all(np.isfinite(array)):
            raise ValueError(
                f"file '{file}': mask '{name}' holds a NaN or an infinity, which says neither kept nor pruned; store "
                "booleans, or numbers of which zero means pruned"
            )
    return {name: array != 0 for name, array in arrays.items()}


def stored_bytes(pruned: Pruned) -> int:
    """Bytes of the arrays that `save` writes."""
    return sum(t.nbytes for t in _tensors(pruned.params, pruned.support)[0].values())


@contextlib.contextmanager
def _said_of(file: Any) -> Iterator[None]:
    """Raise what is wrong with a file's content as one sentence about that file."""
    try:
        yield
    except _store.Foreign as error:
        raise ValueError(
            f"file '{file}' was not written by pruneopt.save; load masks of other tools with load_masks, and weights "
            "with load_weights"
        ) from error
    except _store.Damaged as error:
        raise ValueError(f"file '{file}' is damaged: {error}; save it again") from error


def _read(file: str | os.PathLike[str], kind: str) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    """(arrays, texts) of a file that holds that kind of network."""
    tensors, texts = _store.read_tensors(file)
    found = texts.get("kind", _PRUNED)
    if found != kind and found in _LOADS:
        raise ValueError(f"file '{file}' holds a {found}, not a {kind}; read it with {_LOADS[found]}")
    return tensors, texts


def _cut(tensors: dict[str, np.ndarray], dense: Mapping[str, Any]) -> dict[str, tuple[np.ndarray, ...]]:
    """{path: for each axis, which entries were cut}; takes what says so out of `tensors`. Raises Damaged."""
    lost: dict[str, list[np.ndarray]] = {}
    for name in [name for name in tensors if name.startswith(_LOST)]:
        axis, _, path = name.removeprefix(_LOST).partition(":")
        try:
            shape = [operator.index(n) for n in dense[path]]
            bits, every = tensors.pop(name), lost.setdefault(path, [np.zeros(n, bool) for n in shape])
            if bits.dtype != np.uint8 or bits.shape != (-(-shape[int(axis)] // 8),):
                raise ValueError(f"{bits.nbytes} bytes for {shape[int(axis)]} entries")
            every[int(axis)] = np.unpackbits(bits, count=shape[int(axis)]).astype(bool)
        except (KeyError, IndexError, TypeError, ValueError) as error:
            raise _store.Damaged(f"its array '{name}' says of no axis what was cut ({error})") from error
    return {path: tuple(every) for path, every in lost.items()}


def _kinds(described: Mapping[str, Any]) -> dict[str, str | None]:
    """None for what stays NumPy's, a name for a random key's data."""
    return {path: None if about["numpy"] else about.get("key", "") for path, about in described.items()}


def _tensors(params: Tree, support: Tree | None) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """What is written of each array, and what tells how to read it. Raises where that would not lead back to it.

    support: what is stored of a leaf by its values and one bit a weight; None stores those by it that get smaller.
    """
    _tree.check_paths(params, "params")
    _tree.check_paths(support, "support")
    masks = dict(_tree.named_leaves(support))
    tensors: dict[str, np.ndarray] = {}
    leaves: dict[str, Any] = {}
    for path, leaf in _tree.named_leaves(params):
        if not isinstance(leaf, (jax.Array, np.ndarray)):
            continue
        about: dict[str, Any] = {"numpy": isinstance(leaf, np.ndarray)}
        if isinstance(leaf, jax.Array) and jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            about["key"] = str(jax.random.key_impl(leaf))
            leaf = jax.random.key_data(leaf)
        array = np.asarray(leaf)
        about |= {"dtype": _dtype_name(path, array.dtype), "shape": list(array.shape)}
        mask = _checked(path, masks.pop(path), array) if path in masks else None
        if support is None:
            nonzero = is_set(array)
            mask = nonzero if (array.size + 7) // 8 < (array.size - int(nonzero.sum())) * array.itemsize else None
        if mask is not None:
            tensors[_VALUES + path] = _bits(array[mask])
            tensors[_MASK + path] = np.packbits(mask.reshape(-1))
        else:
            tensors[_ARRAY + path] = _bits(array)
        leaves[path] = about
    if masks:
        raise ValueError(f"support has a mask '{next(iter(masks))}' where params has no array; drop it")
    return tensors, leaves


def _checked(path: str, mask: Any, array: np.ndarray) -> np.ndarray:
    """A mask that fits its leaf, off which the leaf is zero."""
    found = np.asarray(mask)
    if found.dtype != bool or found.shape != array.shape:
        raise ValueError(
            f"support: '{path}' is {found.dtype} {found.shape}; pass booleans of its leaf's shape {array.shape}"
        )
    if np.any(array[~found] != np.zeros((), array.dtype)):
        raise ValueError(f"params: '{path}' is not zero off its support; pass Pruned(apply(params, support), support)")
    return found


def is_set(array: np.ndarray) -> np.ndarray:
    """Whether any bit of an entry is set: -0.0 counts."""
    size = array.dtype.itemsize
    return np.any(np.ascontiguousarray(array).reshape(-1, 1).view(np.uint8).reshape(-1, size), axis=1).reshape(
        array.shape
    )


def _dtype_name(path: str, dtype: np.dtype) -> str:
    """The name that leads back to a dtype. Raises TypeError where none does: objects, records."""
    for name in (str(dtype), dtype.str):
        try:
            if not dtype.hasobject and jnp.dtype(name) == dtype:
                return name
        except TypeError:
            pass
    raise TypeError(f"params: '{path}' has dtype {dtype}, which cannot be stored; leave it out, or store numbers")


def _bits(array: np.ndarray) -> np.ndarray:
    """An array as the file holds it: as it is where the format has its dtype, else the same bits as whole numbers."""
    if array.dtype.kind in "biuf" and array.dtype.isnative and array.dtype.itemsize <= 8:
        return np.ascontiguousarray(array)
    size = array.dtype.itemsize
    return np.ascontiguousarray(array).reshape(-1).view(f"u{size}" if size in (1, 2, 4, 8) else np.uint8)


def _restored(tensors: Mapping[str, np.ndarray], described: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """({path: array}, {path: mask}). Raises Damaged where arrays and their description do not fit."""
    arrays, masks, left = {}, {}, dict(tensors)
    for path, about in described.items():
        try:
            if not isinstance(about["numpy"], bool) or not isinstance(about.get("key", ""), str):
                raise ValueError("its kind is unknown")
            dtype, shape = jnp.dtype(about["dtype"]), tuple(operator.index(n) for n in about["shape"])
            if any(n < 0 for n in shape):
                raise ValueError(f"its shape is {shape}")
            if _ARRAY + path in left:
                arrays[path] = _of_bits(left.pop(_ARRAY + path), dtype, math.prod(shape)).reshape(shape)
            else:
                arrays[path], masks[path] = _of_support(left.pop(_VALUES + path), left.pop(_MASK + path), dtype, shape)
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise _store.Damaged(f"its array '{path}' is not what its description says ({error})") from error
    if left:
        raise _store.Damaged(f"its array '{next(iter(left))}' has no description")
    return arrays, masks


def _of_bits(stored: np.ndarray, dtype: np.dtype, count: int) -> np.ndarray:
    """`count` numbers from what `_bits` made of them."""
    expected = _bits(np.zeros(0, dtype)).dtype
    if stored.dtype != expected or stored.nbytes != count * dtype.itemsize:
        raise ValueError(f"{stored.nbytes} bytes of {stored.dtype} for {count} entries of {dtype}")
    return np.ascontiguousarray(stored).reshape(-1).view(dtype)


def _of_support(
    values: np.ndarray, packed: np.ndarray, dtype: np.dtype, shape: tuple[int, ...]
) -> tuple[np.ndarray, np.ndarray]:
    """A leaf and its mask, from the values of its support and its mask's bits."""
    count = math.prod(shape)
    if packed.dtype != np.uint8 or packed.shape != (-(-count // 8),):
        raise ValueError(f"a mask of {packed.nbytes} bytes for {count} weights")
    mask = np.unpackbits(packed, count=count).astype(bool).reshape(shape)
    array = np.zeros(shape, dtype)
    array[mask] = _of_bits(values, dtype, int(mask.sum()))
    return array, mask


def _filled(
    like: Tree,
    arrays: dict[str, np.ndarray],
    kinds: dict[str, str | None],
    file: Any,
    dense: Mapping[str, tuple[int, ...]] | None = None,
) -> Tree:
    """`like` with these arrays. kinds: None where one stays NumPy's, a name where it is a random key's data.

    dense: the shapes of those of which parts were cut; they lie where JAX puts them.
    """
    _tree.check_paths(like, "like")
    wanted = {p: leaf for p, leaf in _tree.named_leaves(like) if isinstance(leaf, _HAS_SHAPE)}
    if missing := sorted(wanted.keys() ^ arrays.keys()):
        where = "like" if missing[0] in arrays else f"file '{file}'"
        raise ValueError(f"{where} lacks the array '{missing[0]}'; pass like= the tree that was pruned")
    found = {path: as_leaf(path, array, kinds[path], file) for path, array in arrays.items()}
    for path, leaf in wanted.items():
        shape = (dense or {}).get(path, found[path].shape)
        if shape != leaf.shape:
            raise ValueError(f"like: '{path}' has shape {leaf.shape}, the file has {shape}")

    def one(path: str, leaf: Any) -> Any:
        if path not in found:
            return leaf
        return _tree.placed(found[path], leaf) if found[path].shape == leaf.shape else found[path]

    return _tree.map_named(one, like)


def as_leaf(path: str, array: np.ndarray, kind: str | None, file: Any) -> Any:
    """An array as the leaf that was saved. kind: None for NumPy's, "" for JAX's, a name for a random key's data."""
    if kind is None:
        return array
    found = jnp.asarray(array)
    if found.dtype != array.dtype:
        raise ValueError(
            f"file '{file}': '{path}' is {array.dtype} but JAX is in 32-bit mode and would round it; enable 64 bits in "
            "JAX, or save the network in 32 bits"
        )
    try:
        return jax.random.wrap_key_data(found, impl=kind) if kind else found
    except (TypeError, ValueError) as error:
        raise ValueError(f"file '{file}' is damaged: '{path}' is no random key ({error}); save it again") from error


def _plain(value: Any) -> Any:
    """What JSON cannot say of a history: NumPy and JAX numbers as numbers, arrays as lists, anything else as text."""
    return value.tolist() if _tree.is_array(value) or isinstance(value, np.generic) else str(value)
