"""Arithmetic on pytrees. A `None` in a tree is a hole: a leaf that a problem does not decide."""

from __future__ import annotations

import dataclasses
import functools
import inspect
import math
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, ParamSpec, TypeVar

import jax
import jax.core
import jax.numpy as jnp
import numpy as np

from pruneopt import _linalg

Tree = Any
_Given = ParamSpec("_Given")
_Result = TypeVar("_Result")


def is_array(leaf: Any) -> bool:
    """Whether `leaf` is a NumPy or JAX array (not a Python scalar, key array or function)."""
    if isinstance(leaf, jax.Array):
        return not jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)
    return isinstance(leaf, np.ndarray) and leaf.dtype != object


def like(new: Any, old: Any) -> Any:
    """`new` as a NumPy array where `old` is one, else where `old` lies."""
    return np.asarray(new) if isinstance(old, np.ndarray) else placed(new, old)


def on_host(call: Callable[_Given, _Result]) -> Callable[_Given, _Result]:
    """`call`, which reads numbers, refused in one sentence inside `jit`, and on arrays that `vmap` or `grad` follow, or
    that were deleted: donated to a compiled function.
    """
    names = inspect.signature(call)

    @functools.wraps(call)
    def checked(*args: _Given.args, **words: _Given.kwargs) -> _Result:
        _check_outside_jit(call.__name__)
        try:
            given = names.bind(*args, **words).arguments
        except TypeError:  # Python says it better
            given = {}
        for name, value in given.items():
            if not isinstance(value, Iterator):  # a mistake that its reader explains
                check_here(value, name)
        return call(*args, **words)

    return checked


def _check_outside_jit(what: str) -> None:
    if isinstance(jnp.zeros((), bool), jax.core.Tracer):  # there even what is made of constants has no value
        raise TypeError(f"{what}: numbers are read here, and inside jit there are none yet; call it outside of jit")


def check_here(tree: Tree, what: str, *, may_be_traced: bool = False) -> None:
    """Raise TypeError inside jit and for an array that has no value yet, ValueError for one that was deleted."""
    if not may_be_traced:
        _check_outside_jit(what)
    for path, leaf in named_leaves(tree):
        where = f"{what}: leaf '{path}'" if path else what
        if isinstance(leaf, jax.core.Tracer):
            if not may_be_traced:
                raise TypeError(
                    f"{where} is traced by jit, vmap or grad and has no numbers yet; call this outside "
                    "of them, on arrays"
                )
        elif isinstance(leaf, jax.Array):
            if leaf.is_deleted():
                raise ValueError(
                    f"{where} was deleted, such as by donating it to a compiled function; pass the arrays "
                    "that this function returned"
                )
        elif dataclasses.is_dataclass(leaf) and not isinstance(leaf, type):
            for field in dataclasses.fields(leaf):
                check_here(getattr(leaf, field.name), f"{what}.{field.name}", may_be_traced=may_be_traced)


def placed(new: Any, old: Any) -> Any:
    """`new` on the sharding of `old`, an array or a shape, where one was chosen for it; NumPy arrays as they are."""
    traced = isinstance(new, jax.core.Tracer) or isinstance(old, jax.core.Tracer)
    sharding = None if traced else getattr(old, "sharding", None)
    if sharding is None or not isinstance(new, jax.Array) or (isinstance(old, jax.Array) and not old.committed):
        return new
    return new if new.sharding == sharding and new.committed else jax.device_put(new, sharding)


def wide(dtype: Any) -> Any:
    """The dtype to compute in: float64 for float64, else float32."""
    return np.dtype(np.float64) if dtype == np.float64 else np.dtype(np.float32)


def widest(tree: Tree) -> Any:
    """The dtype to compute a tree in: float64 if any leaf is, else float32."""
    return max((wide(x.dtype) for x in jax.tree.leaves(tree)), key=lambda dtype: dtype.itemsize)


def widened(tree: Tree) -> Tree:
    """The leaves in the dtypes to compute them in."""
    return jax.tree.map(lambda x: x.astype(wide(x.dtype)), tree)


def wide_shapes(tree: Tree) -> Tree:
    """The shapes of a tree, in the dtypes to compute its leaves in."""
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, wide(x.dtype)), tree)


def float64(tree: Tree) -> Tree:
    """Floating arrays in float64, where JAX has it; all else as it is."""
    is_floating = lambda x: is_array(x) and jnp.issubdtype(x.dtype, jnp.floating)  # noqa: E731
    return jax.tree.map(lambda x: jnp.asarray(x).astype(jnp.float64) if is_floating(x) else x, tree)


def coarsest(tree: Tree) -> float:
    """The largest relative rounding of the leaves' dtypes."""
    return max(float(jnp.finfo(x.dtype).eps) for x in jax.tree.leaves(tree))


def name(key_path: tuple) -> str:
    """The path of a leaf as text: `conv1/kernel`."""
    return jax.tree_util.keystr(key_path, simple=True, separator="/")


def called(path: str) -> str:
    """What a message calls the leaf of that path; a tree that is one array has none."""
    return f"leaf '{path}'" if path else "the matrix"


def shapes(tree: Tree, most: int = 3) -> str:
    """The shapes of a tree in words, those of the first leaves: `a (6, 8), b (8, 3), ... 4 leaves, 96 weights`."""
    named = named_leaves(tree)
    if len(named) == 1:
        return f"{named[0][0]} {tuple(named[0][1].shape)}".strip()
    listed = [f"{path} {tuple(leaf.shape)}" for path, leaf in named[:most]] + ["..."] * (len(named) > most)
    return f"{', '.join(listed)}; {len(named)} leaves, {size(tree):,} weights"


def named_leaves(tree: Tree) -> list[tuple[str, Any]]:
    """[(path, leaf)] in leaf order."""
    return [(name(path), leaf) for path, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]]


def check_paths(tree: Tree, what: str) -> None:
    """Raise ValueError, naming `what`, where two leaves have one path."""
    paths = [path for path, _ in named_leaves(tree)]
    if len(set(paths)) < len(paths):
        twice = next(path for path, n in Counter(paths).items() if n > 1)
        raise ValueError(f"{what} has two leaves whose path is '{twice}'; rename one")


def listed(paths: Sequence[str]) -> str:
    """Paths in a sentence: 'a', 'b', ...; eight at most."""
    return ", ".join(f"'{path}'" for path in paths[:8]) + (", ..." if len(paths) > 8 else "")


def map_named(fn: Callable[..., Any], tree: Tree, *rest: Tree) -> Tree:
    """`jax.tree.map` whose function also receives the leaf's path as its first argument."""
    return jax.tree_util.tree_map_with_path(lambda path, *leaves: fn(name(path), *leaves), tree, *rest)


def map_hosted(fn: Callable[[str, Any], Any], tree: Tree) -> Tree:
    """`map_named` of `fn(path, leaf)` where an array of one device is NumPy's: JAX would compile each shape anew.

    Tracers, arrays of several devices and random keys are as they are; what fn makes of an array is where it was.
    """

    def one(path: str, leaf: Any) -> Any:
        if not is_local(leaf):
            return fn(path, leaf)
        host = np.asarray(leaf)
        made = fn(path, host)
        return leaf if made is host else jax.device_put(made, leaf.sharding)

    return map_named(one, tree)


def is_local(leaf: Any) -> bool:
    """Whether a leaf is a concrete array of numbers on one device."""
    if not isinstance(leaf, jax.Array) or isinstance(leaf, jax.core.Tracer):
        return False
    return len(leaf.sharding.device_set) == 1 and not jnp.issubdtype(leaf.dtype, jax.dtypes.extended)


@dataclass(frozen=True)
class Layout:
    """A tree as one vector: its leaves in order, each flattened row by row; holes take no entries. Hashable."""

    structure: Any
    paths: tuple[str, ...]
    shapes: tuple[tuple[int, ...], ...]

    @classmethod
    def of(cls, tree: Tree) -> Layout:
        """The layout of trees like this one."""
        named = named_leaves(tree)
        return cls(jax.tree.structure(tree), tuple(p for p, _ in named), tuple(tuple(x.shape) for _, x in named))

    @property
    def size(self) -> int:
        """Entries of the vector."""
        return sum(map(math.prod, self.shapes))

    @property
    def places(self) -> dict[str, slice]:
        """{path: where its leaf lies in the vector}."""
        ends = np.cumsum([math.prod(shape) for shape in self.shapes]).tolist()
        return {p: slice(e - math.prod(s), e) for p, s, e in zip(self.paths, self.shapes, ends, strict=True)}

    def place(self, which: str | slice | Sequence[int]) -> Any:
        """Where some entries lie: of a leaf given by its path, or a slice or indices as they are.

        Raises ValueError for a path that is no leaf or an index twice, TypeError for what are not whole numbers.
        """
        if isinstance(which, slice):
            return which
        if isinstance(which, str):
            if which not in self.paths:
                raise ValueError(f"block: '{which}' is no leaf; the leaves are {list(self.paths[:8])}")
            return self.places[which]
        indices = np.asarray(which)
        if indices.ndim != 1 or indices.dtype.kind not in "iu" or np.any((indices < 0) | (indices >= self.size)):
            raise TypeError(f"block: {which!r} are no indices; pass whole numbers in [0, {self.size}) or a path")
        if len(np.unique(indices)) < len(indices):
            raise ValueError(f"block: {which!r} holds an index twice; pass each once")
        return indices

    def vector(self, tree: Tree, dtype: Any) -> jax.Array:
        """The entries of a tree of this layout."""
        return jnp.concatenate([jnp.asarray(x).reshape(-1).astype(dtype) for x in self._leaves(tree)])

    def host(self, tree: Tree) -> np.ndarray:
        """The entries of a tree of this layout as a float64 NumPy vector, whatever JAX's mode."""
        return np.concatenate([np.asarray(x).astype(np.float64).reshape(-1) for x in self._leaves(tree)])

    def _leaves(self, tree: Tree) -> list[Any]:
        """The leaves of a tree, or ValueError where their shapes are not those of this layout."""
        leaves = jax.tree.leaves(tree)
        shapes = tuple(np.shape(x) for x in leaves)
        if shapes != self.shapes:
            wanted = ", ".join(f"'{p}' {s}" for p, s in list(zip(self.paths, self.shapes, strict=True))[:8])
            raise ValueError(
                f"a tree with leaves of shapes {list(shapes[:8])} does not fit weights {wanted}; pass one that does"
            )
        return leaves

    def tree(self, vector: Any, like: Tree = None) -> Tree:
        """The tree of a vector, its leaves in the dtypes of `like`, or in the vector's own."""
        leaves = [vector[at].reshape(shape) for at, shape in zip(self.places.values(), self.shapes, strict=True)]
        if like is not None:
            leaves = [x.astype(y.dtype) for x, y in zip(leaves, jax.tree.leaves(like), strict=True)]
        return jax.tree.unflatten(self.structure, leaves)


def size(tree: Tree) -> int:
    """Number of entries over all leaves, a Python integer."""
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(tree))


def masked(tree: Tree, support: Tree) -> Tree:
    """`tree` with +0 wherever `support` is False; a `None` in `support` leaves its leaf as it is.

    Leaves keep their type: a NumPy leaf comes back as a NumPy array of the same dtype.
    """
    hole = lambda x: x is None  # noqa: E731
    masks, structure = jax.tree.flatten(support, is_leaf=hole)
    leaves = structure.flatten_up_to(tree)
    traced = [i for i, m in enumerate(masks) if m is not None and not isinstance(leaves[i], np.ndarray)]
    products = _where_kept([masks[i] for i in traced], [leaves[i] for i in traced])
    for i, mask in enumerate(masks):
        if mask is not None and i not in traced:
            leaves[i] = np.where(np.asarray(mask), leaves[i], np.zeros((), leaves[i].dtype))
    for i, product in zip(traced, products, strict=True):
        leaves[i] = product
    return jax.tree.unflatten(structure, leaves)


# One compiled program a tree, not a leaf: a network has many shapes and compiling costs more than running.
@jax.jit
def _where_kept(masks: list[jax.Array], leaves: list[jax.Array]) -> list[jax.Array]:
    return [jnp.where(m, x, jnp.zeros((), x.dtype)) for m, x in zip(masks, leaves, strict=True)]


@jax.jit
def _true(leaves: list[jax.Array]) -> list[jax.Array]:
    return [_linalg.blocked_sum(lambda x: x.astype(jnp.uint32), x) for x in leaves]


@jax.jit
def _outside(leaves: list[jax.Array], masks: list[jax.Array]) -> list[jax.Array]:
    def count(x: jax.Array, m: jax.Array) -> jax.Array:
        return (_linalg.is_nonzero(x) & ~m.astype(bool)).astype(jnp.uint32)

    return [_linalg.blocked_sum(count, x, m) for x, m in zip(leaves, masks, strict=True)]


_all_finite = jax.jit(lambda x: jnp.all(jnp.isfinite(x)))


def _is_finite(x: Any) -> bool:
    """Whether an array is finite; the host reads what stands there, so that no shape is compiled for it."""
    on_host = isinstance(x, np.ndarray) or (is_local(x) and next(iter(x.devices())).platform == "cpu")
    return bool(np.all(np.isfinite(np.asarray(x))) if on_host else _all_finite(x))


@jax.jit
def _dropped(leaves: list[jax.Array], masks: list[jax.Array]) -> list[jax.Array]:
    def cost(x: jax.Array, m: jax.Array) -> jax.Array:
        return jnp.where(m, 0.0, x.astype(jnp.float64))

    return [_linalg.blocked_sum(cost, x, m) for x, m in zip(leaves, masks, strict=True)]


def kept_by_leaf(support: Tree) -> list[int]:
    """Number of True entries of each leaf."""
    return [int(n) for n in _true(jax.tree.leaves(support))]


def kept(support: Tree) -> int:
    """Number of True entries over all leaves, summed in Python integers."""
    return sum(kept_by_leaf(support))


def outside(tree: Tree, support: Tree) -> int:
    """Number of nonzero entries of `tree` where `support` is False, summed in Python integers."""
    return sum(int(n) for n in _outside(jax.tree.leaves(tree), jax.tree.leaves(support)))


def dropped(tree: Tree, support: Tree) -> float:
    """Sum of the entries of `tree` where `support` is False, in float64 whatever JAX's mode."""
    with jax.enable_x64(True):
        return sum(float(x) for x in _dropped(jax.tree.leaves(tree), jax.tree.leaves(support)))


def first_nonfinite(tree: Tree) -> str | None:
    """Path of the first floating-point leaf that holds a NaN or an infinity, or None."""
    floating = [(p, x) for p, x in named_leaves(tree) if is_array(x) and jnp.issubdtype(x.dtype, jnp.inexact)]
    return next((path for path, x in floating if not _is_finite(x)), None)
