"""Save a pruned network and load it again, as safetensors: arrays and JSON, nothing is ever unpickled.

A pruned leaf is stored as the values of its support and one bit a weight; other arrays as they are. Leaves that are not
arrays (functions, flags) are not stored: loading takes a tree `like` the saved one and fills in its arrays.
"""

from __future__ import annotations

import json
import math
import operator
import os
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from pruneopt import _store, _tree
from pruneopt.solution import Pruned

Tree = Any
_VALUES, _MASK, _ARRAY = "values:", "mask:", "array:"
_HAS_SHAPE = (jax.Array, np.ndarray, jax.ShapeDtypeStruct)


@_tree.on_host
def save(pruned: Pruned, file: str | os.PathLike[str]) -> None:
    """Write values, masks, history and scope of `pruned` to `file` (safetensors), all or nothing.

    Raises TypeError for a Pruned of another type or an array that the format cannot hold, ValueError for what `load`
    could not give back (two leaves of one path, weights off the support), OSError where the file cannot be written.
    """
    if not isinstance(pruned, Pruned):
        raise TypeError(f"pruned is a {type(pruned).__name__}; pass what prune returned")
    tensors, leaves = _tensors(pruned)
    history = json.dumps(pruned.history, default=_plain)
    _store.write_tensors(file, tensors, {"leaves": json.dumps(leaves), "history": history, "scope": pruned.scope})


def load(file: str | os.PathLike[str], like: Tree) -> Pruned:
    """The Pruned in `file`, in the structure of `like`: the network's parameters, pruned or not, or `jax.eval_shape` of
    what makes them.

    Kept weights are bit-identical to the saved ones, pruned ones exactly zero, each leaf on the sharding that its leaf
    in `like` has; leaves that are not arrays come from `like`. `solutions` is empty: problems are not stored.
    Raises ValueError for a damaged file, one that `save` did not write, or one that does not fit `like`;
    FileNotFoundError where there is none.
    """
    _tree.check_here(None, "load")
    try:
        tensors, texts = _store.read_tensors(file)
        history = _store.read_json(texts.get("history", ""), list)
        described = _store.read_json(texts.get("leaves", ""), dict)
        arrays, masks = _restored(tensors, described)
    except _store.Foreign as error:
        raise ValueError(
            f"file '{file}' was not written by pruneopt.save; load masks of other tools with load_masks"
        ) from error
    except _store.Damaged as error:
        raise ValueError(f"file '{file}' is damaged: {error}; save it again") from error
    kinds = {path: None if about["numpy"] else about.get("key", "") for path, about in described.items()}
    params = _filled(like, arrays, kinds, file)
    masks = {path: jnp.asarray(mask) for path, mask in masks.items()}
    support = _tree.map_named(lambda path, leaf: _tree.placed(masks[path], leaf) if path in masks else None, like)
    return Pruned(params, support, history=history, scope=texts.get("scope", ""))


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
    return sum(t.nbytes for t in _tensors(pruned)[0].values())


def _tensors(pruned: Pruned) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """What is written of each array, and what tells how to read it. Raises where that would not lead back to it."""
    _tree.check_paths(pruned.params, "params")
    _tree.check_paths(pruned.support, "support")
    masks = dict(_tree.named_leaves(pruned.support))
    tensors: dict[str, np.ndarray] = {}
    leaves: dict[str, Any] = {}
    for path, leaf in _tree.named_leaves(pruned.params):
        if not isinstance(leaf, (jax.Array, np.ndarray)):
            continue
        about: dict[str, Any] = {"numpy": isinstance(leaf, np.ndarray)}
        if isinstance(leaf, jax.Array) and jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            about["key"] = str(jax.random.key_impl(leaf))
            leaf = jax.random.key_data(leaf)
        array = np.asarray(leaf)
        about |= {"dtype": _dtype_name(path, array.dtype), "shape": list(array.shape)}
        if path in masks:
            mask = _checked(path, masks.pop(path), array)
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


def _filled(like: Tree, arrays: dict[str, np.ndarray], kinds: dict[str, str | None], file: Any) -> Tree:
    """`like` with these arrays. kinds: None where one stays NumPy's, a name where it is a random key's data."""
    _tree.check_paths(like, "like")
    wanted = {p: leaf for p, leaf in _tree.named_leaves(like) if isinstance(leaf, _HAS_SHAPE)}
    if missing := sorted(wanted.keys() ^ arrays.keys()):
        where = "like" if missing[0] in arrays else f"file '{file}'"
        raise ValueError(f"{where} lacks the array '{missing[0]}'; pass like= the tree that was pruned")
    found = {path: _as_leaf(path, array, kinds[path], file) for path, array in arrays.items()}
    for path, leaf in wanted.items():
        if found[path].shape != leaf.shape:
            raise ValueError(f"like: '{path}' has shape {leaf.shape}, the file has {found[path].shape}")
    return _tree.map_named(lambda path, leaf: _tree.placed(found[path], leaf) if path in found else leaf, like)


def _as_leaf(path: str, array: np.ndarray, kind: str | None, file: Any) -> Any:
    """An array as the leaf that was saved."""
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
