"""What of a batch JAX can hold: numbers; tensors of other libraries become arrays, all else goes along unread."""

from __future__ import annotations

from typing import Any, NoReturn

import jax
import numpy as np

from pruneopt import _tree

_NO_ARRAY = (TypeError, ValueError, RuntimeError, OverflowError)  # text, objects, tensors on another device


@jax.tree_util.register_pytree_node_class
class Unread:
    """In place of text or objects in a batch: no leaf to JAX, the same in every batch. Reading it is a TypeError."""

    def __init__(self, path: str, kind: str):
        self._path, self._kind = path, kind

    def tree_flatten(self) -> tuple[tuple[()], tuple[str, str]]:
        """For JAX."""
        return (), (self._path, self._kind)

    @classmethod
    def tree_unflatten(cls, static: tuple[str, str], children: tuple[()]) -> Unread:
        """For JAX."""
        return cls(*static)

    def _refuse(self, *_: Any) -> NoReturn:
        raise TypeError(
            f"fn reads leaf '{self._path}' of a batch, a {self._kind} that is no array of numbers; pass it as numbers, "
            "or close fn over it"
        )

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        self._refuse()

    __hash__ = object.__hash__
    __eq__ = __ne__ = __lt__ = __gt__ = __le__ = __ge__ = _refuse  # type: ignore[assignment]
    __getitem__ = __iter__ = __len__ = __bool__ = __call__ = __contains__ = __jax_array__ = __array__ = _refuse
    __add__ = __radd__ = __sub__ = __rsub__ = __mul__ = __rmul__ = __matmul__ = __rmatmul__ = __neg__ = _refuse
    __truediv__ = __rtruediv__ = __index__ = __float__ = __int__ = _refuse


def readable(batch: Any) -> Any:
    """`batch` as JAX takes it: what has `__array__` as a NumPy array, what holds no number as one `Unread`."""
    if all(isinstance(x, jax.Array) or _is_plain(x) for x in jax.tree.leaves(batch)):
        return batch

    def one(path: Any, part: Any) -> Any:
        found = None if _holds_no_number(part) else _as_array(part)
        return Unread(_tree.name(path), type(part).__name__) if found is None else found

    return jax.tree_util.tree_map_with_path(one, batch, is_leaf=_holds_no_number)


def _is_plain(leaf: Any) -> bool:
    return isinstance(leaf, np.ndarray) and leaf.dtype.kind in "biufc"


def _holds_no_number(part: Any) -> bool:
    """Whether a leaf or a subtree has something in it, and nothing that is a number."""
    leaves = jax.tree.leaves(part)
    return bool(leaves) and all(_as_array(leaf) is None for leaf in leaves)


def _as_array(leaf: Any) -> Any:
    """`leaf`, as NumPy's where it is another library's, or None for what JAX cannot take."""
    if isinstance(leaf, jax.ShapeDtypeStruct):
        return leaf
    try:
        if hasattr(leaf, "__array__") and not isinstance(leaf, (jax.Array, np.ndarray, np.generic)):
            leaf = np.asarray(leaf)
        jax.typeof(leaf)
    except _NO_ARRAY:
        return None
    return leaf
