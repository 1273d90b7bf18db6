"""Weights as plain safetensors under other names and in other layouts, for tools that know nothing of JAX, and back."""

from __future__ import annotations

import math
import operator
import os
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from pruneopt import _store, _tree
from pruneopt.delivery.files import as_leaf
from pruneopt.network.leaves import nearest
from pruneopt.program.forms import Conv
from pruneopt.structure.graph import trace
from pruneopt.structure.operators import Operator

Tree = Any
Names = Mapping[str, str | None] | Callable[[str], str | None] | None
Axes = Sequence[int | Sequence[int]]  # the order of a leaf's axes as stored; those of an inner sequence become one

_READ_BY = {"format": "pt"}  # what transformers asks of a file before it reads it; others ignore it
_ARRAYS = (jax.Array, np.ndarray, jax.ShapeDtypeStruct)


@_tree.on_host
def save_weights(
    params: Tree, file: str | os.PathLike[str], names: Names = None, axes: Mapping[str, Axes] | None = None
) -> None:
    """Write the arrays of `params` to `file` as plain safetensors that any tool reads, bit for bit, all or nothing.

    names: {path: name in the file}, or a function that gives it; None leaves that leaf out. By default the paths.
    axes: {path: order of its axes in the file}, axes in an inner tuple as one: (1, 0) stores a matrix (in, out) as
        (out, in), (3, 2, 0, 1) an HWIO kernel as OIHW, ((1, 2), 0) a kernel (in, heads, width) as (heads x width, in).
        Leaves without an entry are stored as they lie; `torch_axes` gives PyTorch's.

    Leaves that are not arrays are not stored. A plain file has no checksum; `save` writes one that has.
    Raises ValueError for a name given twice, a path that is no array, a leaf without a name, axes that are no order of
        the leaf's, a NaN or an infinity; TypeError for a dtype that the format lacks.
    """
    named = _named(params, "params", names)
    check_axes(axes, {path: np.ndim(leaf) for path, leaf in _arrays(params).items()})
    tensors = {}
    for path, leaf in _arrays(params).items():
        if path not in named:
            continue
        if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key) or not _store.has_name(np.dtype(leaf.dtype)):
            raise TypeError(
                f"params: '{path}' has dtype {leaf.dtype}, which safetensors lacks; cast it, or leave it out by the "
                "name None"
            )
        array = np.asarray(leaf)
        if jnp.issubdtype(leaf.dtype, jnp.inexact) and not np.all(np.isfinite(array)):
            raise ValueError(f"params: '{path}' holds a NaN or an infinity; repair it before you hand it over")
        tensors[named[path]] = laid(array, (axes or {}).get(path))
    _store.write_plain(file, tensors, _READ_BY)


def load_weights(
    file: str | os.PathLike[str], like: Tree, names: Names = None, axes: Mapping[str, Axes] | None = None
) -> Tree:
    """`like` with the arrays that `save_weights`, or any other tool, wrote under these names and in these layouts.

    like: the network's parameters or `jax.eval_shape` of them, in the file's dtypes; leaves whose name is None, and
        those that are not arrays, come from it. Arrays lie on the sharding of theirs in `like`.
    Raises ValueError for a damaged file, a name that it lacks or that nothing stands for, another shape or dtype, and
        as `save_weights`; FileNotFoundError where there is none.
    """
    _tree.check_here(None, "load_weights")
    named, wanted = _named(like, "like", names), _arrays(like)
    check_axes(axes, {path: len(leaf.shape) for path, leaf in wanted.items()})
    try:
        stored = _store.read_any(file)[0]
    except _store.Damaged as error:
        raise ValueError(f"file '{file}' is damaged or not a safetensors file: {error}") from error
    if missing := [path for path, name in named.items() if name not in stored]:
        raise ValueError(
            f"file '{file}' has no array '{named[missing[0]]}' for '{missing[0]}'; there are "
            f"{nearest(named[missing[0]], list(stored)) if stored else 'no others'}; correct names="
        )
    found = {path: stored.pop(name) for path, name in named.items()}
    if stored:
        raise ValueError(
            f"file '{file}' holds '{next(iter(stored))}', for which like has no leaf; correct names= or like="
        )
    taken = {path: _taken(path, array, wanted[path], (axes or {}).get(path), file) for path, array in found.items()}
    if left := [p for p, leaf in wanted.items() if p not in taken and isinstance(leaf, jax.ShapeDtypeStruct)]:
        raise ValueError(f"like: '{left[0]}' is a shape and its name None, so that it has no numbers; give its array")
    return _tree.map_named(lambda path, leaf: _tree.placed(taken[path], leaf) if path in taken else leaf, like)


def torch_axes(fn: Callable[[Tree, Any], Any], params: Tree, batch: Any) -> dict[str, Axes]:
    """{path: order of its axes in PyTorch}, for `axes` of `save_weights`: (out, in), and (out, in, *window) of kernels
    of convolutions, 1-D and depthwise ones too; heads and their width are one axis, stacked layers stay in front.

    What is in and what is out is read from the program, whatever the leaf's name: tables of embeddings and matrices
    that fn transposes itself stay as they lie. Leaves without an entry do too: those that no product reads, that
    several read in different ways, or that a transposed convolution reads, whose window PyTorch stores mirrored.

    batch: one batch of any size; params may be dense or smaller. Raises ValueError as `structure.trace`.
    """
    shapes = {path: tuple(leaf.shape) for path, leaf in _tree.named_leaves(params) if _tree.is_array(leaf)}
    found: dict[str, set[tuple[Any, ...] | None]] = {}
    for one in trace(fn, params, batch).operators:
        for path in one.paths:
            found.setdefault(path, set()).add(_torch_order(one, shapes[path]))
    orders = {path: next(iter(every)) for path, every in found.items() if len(every) == 1}
    return {path: order for path, order in orders.items() if order is not None}


def laid(array: np.ndarray, axes: Axes | None) -> np.ndarray:
    """An array with its axes in this order, those of an inner sequence as one."""
    if axes is None:
        return array
    shape = array.shape
    return array.transpose(_flat(axes)).reshape([math.prod(shape[k] for k in _group(one)) for one in axes])


def laid_back(array: np.ndarray, axes: Axes | None, shape: tuple[int, ...]) -> np.ndarray | None:
    """The array of that shape which `laid` made this one of; None where their shapes do not fit."""
    groups = [_group(one) for one in axes] if axes is not None else [(k,) for k in range(len(shape))]
    if array.shape != tuple(math.prod(shape[k] for k in group) for group in groups):
        return None
    order = [k for group in groups for k in group]
    return array.reshape([shape[k] for k in order]).transpose(np.argsort(order).tolist())


def _group(one: int | Sequence[int]) -> tuple[int, ...]:
    return (operator.index(one),) if hasattr(one, "__index__") else tuple(map(operator.index, one))  # type: ignore[arg-type]


def _flat(axes: Axes) -> list[int]:
    return [k for one in axes for k in _group(one)]


def _arrays(tree: Tree) -> dict[str, Any]:
    return {path: leaf for path, leaf in _tree.named_leaves(tree) if isinstance(leaf, _ARRAYS)}


def _named(tree: Tree, what: str, names: Names) -> dict[str, str]:
    """{path: name in the file} of the arrays that are stored."""
    _tree.check_paths(tree, what)
    paths = list(_arrays(tree))
    if isinstance(names, Mapping):
        if unknown := [path for path in names if path not in paths]:
            raise ValueError(f"names: {what} has no array '{unknown[0]}'; there are {nearest(unknown[0], paths)}")
        if missing := [path for path in paths if path not in names]:
            raise ValueError(f"names has no name for '{missing[0]}'; add one, or None to leave it out")
        given = {path: names[path] for path in paths}
    else:
        given = {path: path if names is None else names(path) for path in paths}
    for path, name in given.items():
        if name is not None and (not isinstance(name, str) or name in ("", "__metadata__")):
            raise TypeError(f"names gives '{path}' the name {name!r}; give a text, or None to leave it out")
    named = {path: name for path, name in given.items() if name is not None}
    twice = next((name for name, n in Counter(named.values()).items() if n > 1), None)
    if twice is not None:
        same = _tree.listed([path for path, name in named.items() if name == twice])
        raise ValueError(f"names gives {same} the one name '{twice}'; give each leaf its own")
    return named


def check_axes(axes: Mapping[str, Axes] | None, ranks: Mapping[str, int]) -> None:
    """Raise ValueError for a path that is no array and an order that does not name each of its axes once."""
    for path, order in (axes or {}).items():
        if path not in ranks:
            raise ValueError(f"axes: there is no array '{path}'; there are {nearest(path, list(ranks))}")
        try:
            flat = _flat(order)
        except TypeError as error:
            raise TypeError(f"axes: '{path}' has {order!r}; pass whole numbers, such as (1, 0)") from error
        if sorted(flat) != list(range(ranks[path])):
            raise ValueError(
                f"axes: '{path}' has {order!r}, but the leaf's axes are 0 to {ranks[path] - 1}; name each once"
            )


def _taken(path: str, array: np.ndarray, leaf: Any, axes: Axes | None, file: Any) -> Any:
    """An array of the file as the leaf that it stands for."""
    back = laid_back(array, axes, tuple(leaf.shape))
    if back is None:
        order = "" if axes is None else f" with axes {axes!r}"
        raise ValueError(
            f"like: '{path}' has shape {tuple(leaf.shape)}{order}, and its array in file '{file}' {array.shape}; pass "
            "like= and axes= of that network"
        )
    if back.dtype != leaf.dtype:
        raise ValueError(
            f"like: '{path}' is {leaf.dtype}, and its array in file '{file}' {back.dtype}; cast like=, or the "
            "file's arrays"
        )
    return as_leaf(path, back.copy(), None if isinstance(leaf, np.ndarray) else "", file)


def _torch_order(one: Operator, shape: tuple[int, ...]) -> tuple[Any, ...] | None:
    """The order of a leaf's axes in PyTorch, as one operator reads it; None where that is not said."""
    form = one.uses[0].form
    if len(one.paths) > 1 or not math.prod(shape):
        return None
    if isinstance(form, Conv):
        as_it_lies = form.w_shape == shape and np.array_equal(
            form.to_matrix(jnp.arange(math.prod(shape), dtype=jnp.int32).reshape(shape)), one.places()
        )
        return tuple(form.w_spec) if as_it_lies and set(form.x_dilation) == {1} else None
    kinds: dict[int, str] = {}
    for k, at in enumerate(np.unravel_index(one.places(), shape)):
        along = [word for n, word in enumerate(("problem", "in", "out")) if np.any(np.diff(at, axis=n))]
        if len(along) > 1:
            return None
        kinds[k] = along[0] if along else "layer" if shape[k] > 1 else ""
    for word in ("out", "in"):  # an axis of one entry is what the others are not
        single = [k for k, kind in kinds.items() if not kind]
        if single and word not in kinds.values():
            kinds[single[-1 if word == "out" else 0]] = word
    named = {word: tuple(k for k, kind in kinds.items() if kind == word) for word in ("out", "in")}
    return (*(k for k in kinds if kinds[k] not in named), *(v[0] if len(v) == 1 else v for v in named.values()))
