"""Cut the units that a support leaves without effect out of arrays and program alike."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Bool

from pruneopt import _tree
from pruneopt.delivery.apply import apply
from pruneopt.network.batches import Batches
from pruneopt.network.leaves import combine, is_floating, partition
from pruneopt.program.program import flatten
from pruneopt.program.rewrite import Rewritten
from pruneopt.solution import Pruned, Solution
from pruneopt.structure.graph import Graph, read
from pruneopt.structure.units import Group, Units

Tree = Any
Lost = dict[str, tuple[Bool[np.ndarray, " n"], ...]]  # {path: for each axis, the entries that are cut}

_TOLERANCE = 1e-5  # of the largest output, in float32


@dataclass(frozen=True, eq=False)
class SmallerNetwork:
    """A smaller network: `fn(params, batch)` computes what the masked one does.

    fn: the rewritten program, for batches of any size; it may be jitted, differentiated and mapped. params: the same
        tree with smaller leaves. kept: {path: for each axis, the entries that are left}, of the leaves that were cut.
    error: the largest difference to the masked network's outputs on the batch, over the largest output.
    """

    fn: Callable[[Tree, Any], Any]
    params: Tree
    kept: dict[str, tuple[np.ndarray, ...]]
    error: float
    _lost: Lost = field(repr=False)
    _shapes: dict[str, tuple[int, ...]] = field(repr=False)

    def __repr__(self) -> str:
        before = sum(math.prod(shape) for shape in self._shapes.values())
        after = sum(leaf.size for leaf in jax.tree.leaves(self.params) if _tree.is_array(leaf))
        return (
            f"SmallerNetwork({len(self.kept)} leaves cut, parameters {before:,} -> {after:,}, error {self.error:.1e})"
        )

    @property
    def lost(self) -> Lost:
        """{path: for each axis, whether each of its entries was cut}, of the leaves that were cut."""
        return self._lost

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """{path: shape of the dense array}."""
        return self._shapes

    def expand(self, tree: Tree | None = None) -> Tree:
        """`params`, or a tree of that shape, with zeros where entries were cut."""

        def one(path: str, leaf: Any) -> Any:
            if path not in self.kept:
                return leaf
            full = jnp.zeros(self._shapes[path], leaf.dtype)
            return full.at[np.ix_(*self.kept[path])].set(leaf)

        return _tree.map_named(one, self.params if tree is None else tree)

    def of(self, fn: Callable[[Tree, Any], Any], batch: Any) -> Callable[[Tree, Any], Any]:
        """The same cut of another function of the same params, such as a loss, checked on `batch` in the same way.

        Raises ValueError where its program ties what was cut otherwise, or to its outputs, with the reason.
        """
        smaller = _Smaller(fn, self.expand(), self._lost)
        _checked(fn, self.expand(), smaller, self.params, next(iter(Batches([batch]))))
        return smaller

    def shrink_like(self, tree: Tree) -> Tree:
        """Any tree whose subtrees look like the dense params, such as an optimiser's state, cut along."""
        paths = sorted(self._lost, key=len, reverse=True)

        def one(path: str, leaf: Any) -> Any:
            for known in paths:
                if (path == known or path.endswith("/" + known)) and np.shape(leaf) == self._shapes[known]:
                    return _sliced(leaf, self._lost[known])
            return leaf

        return _tree.map_named(one, tree)


def shrink(
    fn: Callable[[Tree, Any], Any], params: Tree, batch: Any, support: Pruned | Solution | Tree
) -> SmallerNetwork:
    """The smaller network that computes what fn computes of `params` masked by `support`.

    A unit goes where nothing of it is left after masking: in every product and sum over it one side is masked out, or
    zero because what makes it is. Other masked weights stay as zeros. The result is compared with the masked network on
    `batch`, in float32 at least.

    support: what `prune` or `solve` returned, or a tree of masks. params may have been trained since; they are masked.
    Raises ValueError for a function that cannot be read, and where the smaller network differs from the masked one by
        more than 1e-5 of the largest output.
    """
    batch = next(iter(Batches([batch])))
    masked = apply(params, support)
    masks = support.support if isinstance(support, Pruned | Solution) else support
    units = Units(flatten(fn, masked, batch))
    return _shrunk(fn, masked, batch, _without_effect(units, masked, dict(_tree.named_leaves(masks))))


def shrink_units(
    fn: Callable[[Tree, Any], Any], params: Tree, batch: Any, kept: Mapping[tuple[str, int], Any]
) -> SmallerNetwork:
    """The smaller network that keeps these units alone.

    kept: {(path, axis): numbers of the entries to keep, or a boolean for each}; what is tied to them goes along.
    Raises ValueError for entries that cannot be cut, with what they are tied to and why; otherwise as `shrink`.
    """
    batch = next(iter(Batches([batch])))
    graph = read(flatten(fn, params, batch))
    units = graph.units()
    lost = _nothing(params)
    for (path, axis), entries in kept.items():
        lost = _with(units, lost, *_asked(graph, units, path, axis, entries))
    zeroed = _tree.map_named(lambda path, leaf: _zeroed(leaf, lost[path]) if path in lost else leaf, params)
    return _shrunk(fn, zeroed, batch, lost)


def rebuilt(
    fn: Callable[[Tree, Any], Any], params: Tree, lost: Lost, shapes: dict[str, tuple[int, ...]], error: float
) -> SmallerNetwork:
    """The SmallerNetwork of fn with these smaller leaves. lost, shapes: those of the one that was taken apart."""
    kept = {path: tuple(np.flatnonzero(~one) for one in every) for path, every in lost.items()}
    small = SmallerNetwork(fn, params, kept, error, lost, shapes)

    def dense(path: str, leaf: Any) -> Any:
        if path in lost and is_floating(path, leaf):
            return np.broadcast_to(np.zeros((), leaf.dtype), shapes[path])
        return small.expand({path: leaf})[path] if path in lost else leaf

    return replace(small, fn=_Smaller(fn, _tree.map_named(dense, params), lost))


class _Smaller:
    """fn with entries of params cut: the program of each signature of its batches, rewritten once."""

    def __init__(self, fn: Callable[[Tree, Any], Any], params: Tree, lost: Lost):
        self._fn, self._lost, self._known = fn, lost, {}
        self._dense = jax.tree.map(_abstract, params)

    def __call__(self, params: Tree, batch: Any) -> Any:
        leaves, structure = jax.tree.flatten(batch)
        key = structure, tuple((np.shape(x), str(jax.typeof(x).dtype)) for x in leaves)
        if key not in self._known:
            self._known[key] = self._rewritten(batch)
        program, outputs = self._known[key]
        arrays = {path: leaf for path, leaf in _tree.named_leaves(params) if _tree.is_array(leaf)}
        return outputs.unflatten(program(arrays, [x for x in leaves if _tree.is_array(x) or np.isscalar(x)]))

    def _rewritten(self, batch: Any) -> tuple[Rewritten, Any]:
        with jax.ensure_compile_time_eval():  # loop counters are numbers, also where the caller traces
            units = Units(flatten(self._fn, self._dense, batch))
        shapes = jax.eval_shape(lambda c, r, b: self._fn(combine(c, r), b), *partition(self._dense, is_floating), batch)
        outputs = jax.tree.structure(shapes)
        return units.rewritten(units.gone(self._lost)), outputs


def _shrunk(fn: Callable[[Tree, Any], Any], masked: Tree, batch: Any, lost: Lost) -> SmallerNetwork:
    smaller = _Smaller(fn, masked, lost)
    params = _tree.map_named(lambda path, leaf: _sliced(leaf, lost[path]) if path in lost else leaf, masked)
    error = _checked(fn, masked, smaller, params, batch)
    shapes = {path: np.shape(leaf) for path, leaf in _tree.named_leaves(masked) if _tree.is_array(leaf)}
    cut = {path: every for path, every in lost.items() if any(one.any() for one in every)}
    kept = {path: tuple(np.flatnonzero(~one) for one in every) for path, every in cut.items()}
    return SmallerNetwork(smaller, params, kept, error, cut, shapes)


def _checked(fn: Callable, masked: Tree, smaller: Callable, params: Tree, batch: Any) -> float:
    """By how much the smaller network's outputs differ from the masked one's, over the largest.

    Raises ValueError where that is too much.
    """
    masked, params, batch = (jax.tree.map(_widened, tree) for tree in (masked, params, batch))
    before, after = jax.tree.leaves(jax.jit(fn)(masked, batch)), jax.tree.leaves(jax.jit(smaller)(params, batch))
    error = _difference(before, after)
    if not error <= _TOLERANCE:
        raise ValueError(
            f"the smaller network differs from the masked one by {error:.2g} of the largest output, more than "
            f"{_TOLERANCE:g}; please report this network"
        )
    return error


def _widened(leaf: Any) -> Any:
    """Floating arrays in float32 at least, so that rounding hides no difference."""
    if _tree.is_array(leaf) and jnp.issubdtype(leaf.dtype, jnp.floating):
        return jnp.asarray(leaf).astype(_tree.wide(leaf.dtype))
    return leaf


def _difference(before: Sequence[Any], after: Sequence[Any]) -> float:
    """The largest |after - before| over the largest |before|, of arrays of numbers."""
    pairs = [
        (np.asarray(a, np.float64), np.asarray(b, np.float64))
        for a, b in zip(before, after, strict=True)
        if jnp.issubdtype(a.dtype, jnp.inexact)
    ]
    largest = max((float(np.max(np.abs(a), initial=0.0, where=np.isfinite(a))) for a, _ in pairs), default=0.0)
    apart = max(
        (float(np.max(np.abs(np.subtract(a, b, where=a != b, out=np.zeros_like(a))), initial=0.0)) for a, b in pairs),
        default=0.0,
    )
    return apart / largest if largest else apart


def _without_effect(units: Units, masked: Tree, masks: Mapping[str, Any]) -> Lost:
    """The entries of the units that masking leaves without effect, and of those whose effect goes with them."""
    lost, free = _nothing(masked), [group for group in units.groups if not group.blocked]
    chosen = {path for path in lost if masks.get(path) is not None}
    live = {
        path: np.array(masks[path]) if path in chosen else np.array(leaf != 0)
        for path, leaf in _tree.named_leaves(masked)
        if path in lost
    }
    while True:
        found = False
        for group, gone in _dead(units, free, live, chosen):
            for path, axis in group.members:
                entries = units.places(group, path, axis)[gone]
                fresh = ~lost[path][axis][entries]
                found |= bool(fresh.any())
                lost[path][axis][entries] = True
                np.moveaxis(live[path], axis, 0)[entries.ravel()] = False
        if not found:
            return lost


def _dead(
    units: Units, groups: Sequence[Group], live: Mapping[str, np.ndarray], chosen: set[str]
) -> list[tuple[Group, Bool[np.ndarray, " units"]]]:
    """(group, units without effect): at every product or sum over them one side is zero, by what is zero of them.

    Units of one group that are zero in the same members are alike, so that one reading judges one kind of every group.
    """
    kinds = []
    for group in groups:
        zero = np.stack([_zero_units(units, group, path, axis, live[path]) for path, axis in group.members], axis=1)
        masked = np.array([path in chosen for path, _ in group.members])
        patterns, which = np.unique(zero, axis=0, return_inverse=True)
        able = [i for i, pattern in enumerate(patterns) if np.any(pattern & masked)]
        kinds.append([(patterns[i], which.ravel() == i) for i in able])
    found = []
    for turn in range(max(map(len, kinds), default=0)):
        now = [(group, *every[turn]) for group, every in zip(groups, kinds, strict=True) if turn < len(every)]
        start = {path: [set() for _ in array.shape] for path, array in live.items()}
        for group, pattern, _ in now:
            for (path, axis), zero in zip(group.members, pattern, strict=True):
                if zero:
                    start[path][axis].add(units.atom(group))
        frozen = {path: [frozenset(one) for one in every] for path, every in start.items()}
        left = {unit for unit, _ in units.zeros(frozen).left}
        found += [(group, which) for group, _, which in now if units.atom(group) not in left]
    return found


def _zero_units(units: Units, group: Group, path: str, axis: int, live: np.ndarray) -> Bool[np.ndarray, " units"]:
    """Whether nothing of a leaf is left in a unit's entries of an axis."""
    along = np.any(live, axis=tuple(k for k in range(live.ndim) if k != axis))
    return ~np.any(along[units.places(group, path, axis)], axis=1)


def _asked(graph: Graph, units: Units, path: str, axis: int, entries: Any) -> tuple[Group, Bool[np.ndarray, " units"]]:
    """(group, units to cut) of entries to keep."""
    groups = units.of(path, axis)
    n = units.type_of(path).shape[axis]
    keep = np.asarray(entries)
    lost = ~keep if keep.dtype == bool else ~np.isin(np.arange(n), keep)
    if lost.shape != (n,) or (keep.dtype != bool and not np.all((keep >= 0) & (keep < n))):
        raise ValueError(
            f"kept: axis {axis} of '{path}' has entries 0 to {n - 1}; pass numbers of some, or {n} booleans"
        )
    for group in groups:
        gone = np.all(lost[units.places(group, path, axis)], axis=1)
        explained = np.zeros(n, bool)
        explained[units.places(group, path, axis)[gone]] = True
        if np.array_equal(explained, lost):
            if group.blocked:
                raise ValueError(f"kept: units of '{path}' cannot be cut.\n{graph.explain(path)}")
            return group, gone
    raise ValueError(f"kept: the entries cut from axis {axis} of '{path}' are no whole units.\n{graph.explain(path)}")


def _nothing(params: Tree) -> Lost:
    arrays = [(path, np.shape(leaf)) for path, leaf in _tree.named_leaves(params) if _tree.is_array(leaf)]
    return {path: tuple(np.zeros(n, bool) for n in shape) for path, shape in arrays}


def _with(units: Units, lost: Lost, group: Group, gone: Bool[np.ndarray, " units"]) -> Lost:
    """`lost` and the entries of these units."""
    for path, axis in group.members:
        lost[path][axis][units.places(group, path, axis)[gone]] = True
    return lost


def _sliced(leaf: Any, lost: Sequence[Bool[np.ndarray, " n"]]) -> Any:
    for k, one in enumerate(lost):
        leaf = leaf if not one.any() else leaf.take(np.flatnonzero(~one), axis=k)
    return leaf


def _zeroed(leaf: Any, lost: Sequence[Bool[np.ndarray, " n"]]) -> Any:
    for k, one in enumerate(lost):
        place = [1] * np.ndim(leaf)
        place[k] = -1
        leaf = jnp.where(one.reshape(place), jnp.zeros((), leaf.dtype), leaf) if one.any() else leaf
    return leaf


def _abstract(leaf: Any) -> Any:
    """An array of the same type without memory of its own; whole numbers and keys as they are."""
    if _tree.is_array(leaf) and jnp.issubdtype(leaf.dtype, jnp.floating):
        return np.broadcast_to(np.zeros((), leaf.dtype), leaf.shape)
    return leaf
