"""Cut the units that a support leaves without effect out of arrays and program alike."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Bool

from pruneopt import _tree
from pruneopt.delivery.apply import apply
from pruneopt.delivery.smaller import TOLERANCE, Smaller, State, checked, compiled, difference, sliced, zeroed
from pruneopt.network.batches import Batches, shared_length
from pruneopt.network.leaves import is_floating
from pruneopt.network.readable import readable
from pruneopt.program.flatten import flatten
from pruneopt.solution import Pruned, Solution
from pruneopt.structure.dead import Lost, dead, nothing, with_units
from pruneopt.structure.graph import trace
from pruneopt.structure.stopwatch import resized
from pruneopt.structure.units import Group, Units

Tree = Any


@dataclass(frozen=True, eq=False)
class SmallerNetwork:
    """A smaller network: `fn(params, batch)` computes what the masked one does.

    fn: the rewritten program, for batches of any size; it may be jitted, differentiated and mapped. params: the same
        tree with smaller leaves.
    error: the largest difference to the masked network's outputs on the batch, over the largest output. flipped: whole
        numbers and booleans among the outputs, such as the place of a maximum, that differ.
    lost: {path: for each axis, whether each of its entries was cut}, of the leaves that were cut. shapes: {path: shape
        of the dense array}.
    constant: {(path, axis): entries} of units that hold a number that depends on nothing and could not be added to a
        bias exactly: they stayed. dense_fn: the function that was given.
    state: the arrays of the batch that are cut along, and how.
    """

    fn: Callable[[Tree, Any], Any]
    params: Tree
    error: float
    flipped: int
    lost: Lost
    shapes: dict[str, tuple[int, ...]]
    constant: dict[tuple[str, int], np.ndarray]
    dense_fn: Callable[[Tree, Any], Any]
    state: State

    def __repr__(self) -> str:
        before = sum(math.prod(shape) for shape in self.shapes.values())
        after = sum(leaf.size for leaf in jax.tree.leaves(self.params) if _tree.is_array(leaf))
        flipped = f", {self.flipped} whole numbers of the outputs differ" if self.flipped else ""
        constant = sum(map(len, self.constant.values()))
        stay = f", {constant} constant units stay" if constant else ""
        return (
            f"SmallerNetwork({len(self.lost)} leaves cut, parameters {before:,} -> {after:,}, "
            f"error {self.error:.1e}{flipped}{stay})"
        )

    @property
    def kept(self) -> dict[str, tuple[np.ndarray, ...]]:
        """{path: for each axis, the entries that are left}, of the leaves that were cut."""
        return {path: tuple(np.flatnonzero(~one) for one in every) for path, every in self.lost.items()}

    def expand(self, tree: Tree | None = None) -> Tree:
        """`params`, or a tree of that shape, with zeros where entries were cut."""
        return _expanded(self.params if tree is None else tree, self.lost, self.shapes)

    def runs_as_is(self, batch: Any) -> bool:
        """Whether the user's own function on the smaller leaves passes the same check, on `batch` and on one of another
        size. Most need the rewritten `fn`: frameworks check shapes, a mean divides by the width that it finds.
        """
        for one in _sizes(next(iter(Batches([batch])))):
            one = self.shrink_batch(one)
            expected = compiled(self.fn, self.params, one)
            try:
                found = compiled(self.dense_fn, self.params, one)
            except Exception:  # whatever a function that was written for other shapes raises
                return False
            if [np.shape(x) for x in found] != [np.shape(x) for x in expected]:
                return False
            if not difference(expected, found) <= TOLERANCE:
                return False
        return True

    def of(self, fn: Callable[[Tree, Any], Any], batch: Any) -> Callable[[Tree, Any], Any]:
        """The same cut of another function of the same params, such as a loss, checked on `batch` in the same way.

        Its batch holds no state: of a network with state, what reads it is cut by a `shrink_units` of its own.
        Raises ValueError where its program ties what was cut otherwise, or to its outputs, with the reason.
        """
        smaller = Smaller(fn, self.expand(), self.lost)
        checked(fn, self.expand(), smaller, self.params, next(iter(Batches([batch]))))
        return smaller

    def shrink_batch(self, batch: Any) -> Any:
        """A batch whose state, such as the first cache of zeros, is cut along; `fn` takes and returns smaller state."""
        return self.state.cut(batch)

    def shrink_like(self, tree: Tree) -> Tree:
        """Any tree whose subtrees look like the dense params, such as an optimiser's state, cut along."""
        paths = sorted(self.lost, key=len, reverse=True)

        def one(path: str, leaf: Any) -> Any:
            for known in paths:
                if (path == known or path.endswith("/" + known)) and np.shape(leaf) == self.shapes[known]:
                    return sliced(leaf, self.lost[known])
            return leaf

        return _tree.map_hosted(one, tree)


def shrink(
    fn: Callable[[Tree, Any], Any],
    params: Tree,
    batch: Any,
    support: Pruned | Solution | Tree,
    *,
    multiple: int = 1,
    state: Mapping[str, str] = MappingProxyType({}),
) -> SmallerNetwork:
    """The smaller network that computes what fn computes of `params` masked by `support`.

    A unit goes where nothing of it is left after masking: in every product and sum over it one side is masked out, or
    zero because what makes it is. A unit that is a constant (its weights gone, its bias alive) goes where what it adds
    to each product can be added to a bias exactly; else it stays and is listed. Other masked weights stay as zeros. The
    result is compared with the masked network on `batch`, in float32 at least. Outputs that are new values of leaves of
    params, such as the statistics of batch norm in `(loss, statistics)`, are cut as the leaves are. Scanned layers keep
    one width; `structure.unstack` gives each of them one of its own first.

    support: what `prune` or `solve` returned, or a tree of masks. params may have been trained since; they are masked.
    multiple: leave so many units of each group that the lengths of its axes are multiples of it, such as 8 or 64, or
        the whole group; units that could go stay as zeros for that.
    state: {path in the batch: path in fn's outputs}, arrays or subtrees of the batch that a call renews and that start
        as zeros, such as {"cache": "1"} where fn returns (logits, cache): units go there too.
    Raises ValueError for a function that cannot be read, and where the smaller network differs from the masked one by
        more than 1e-5 of the largest output, with the operator where they part.
    """
    if not isinstance(multiple, int) or multiple < 1:
        raise ValueError(f"multiple={multiple!r} is not a whole number >= 1; pass 8, say, for widths in steps of 8")
    batch = next(iter(Batches([batch])))
    masked = apply(params, support)
    masks = support.support if isinstance(support, Pruned | Solution) else support
    _check_finite(masked)
    units = _units(fn, masked, batch, state)
    found = dead(units, masked, dict(_tree.named_leaves(masks)), jax.tree.leaves(readable(batch)), multiple)
    carried = State(state, _carried(units, batch, found.lost) if state else {})
    return _shrunk(fn, masked, found.params, batch, found.lost, found.constant, carried)


def shrink_units(
    fn: Callable[[Tree, Any], Any],
    params: Tree,
    batch: Any,
    kept: Mapping[tuple[str, int], Any],
    *,
    state: Mapping[str, str] = MappingProxyType({}),
) -> SmallerNetwork:
    """The smaller network that keeps these units alone.

    kept: {(path, axis): numbers of the entries to keep, or a boolean for each}; what is tied to them goes along. state:
        as of `shrink`.
    Raises ValueError for entries that cannot be cut, with what they are tied to and why; otherwise as `shrink`.
    """
    batch = next(iter(Batches([batch])))
    _check_finite(params)
    units, lost = _units(fn, params, batch, state), nothing(params)
    for (path, axis), entries in kept.items():
        try:
            with_units(units, lost, *_asked(units, path, axis, entries))
        except _Tied as error:
            raise ValueError(f"{error}\n{trace(fn, params, batch).explain(path)}") from None
    masked = _tree.map_hosted(lambda path, leaf: zeroed(leaf, lost[path]) if path in lost else leaf, params)
    return _shrunk(fn, masked, masked, batch, lost, {}, State(state, _carried(units, batch, lost) if state else {}))


def rebuilt(
    fn: Callable[[Tree, Any], Any],
    params: Tree,
    lost: Lost,
    shapes: dict[str, tuple[int, ...]],
    check: tuple[float, int],
    constant: dict[tuple[str, int], np.ndarray],
    state: State,
) -> SmallerNetwork:
    """The SmallerNetwork of fn with these smaller leaves; the rest as of the one that was taken apart."""

    def dense(path: str, leaf: Any) -> Any:
        if path in lost and is_floating(path, leaf):
            return np.broadcast_to(np.zeros((), leaf.dtype), shapes[path])
        return _expanded({path: leaf}, lost, shapes)[path] if path in lost else leaf

    smaller = Smaller(fn, _tree.map_named(dense, params), lost, state)
    return SmallerNetwork(smaller, params, *check, lost, shapes, constant, fn, state)


class _Tied(ValueError):
    """Entries that are no units that can be cut."""


def _shrunk(
    fn: Callable[[Tree, Any], Any],
    masked: Tree,
    moved: Tree,
    batch: Any,
    lost: Lost,
    constant: dict[tuple[str, int], np.ndarray],
    state: State,
) -> SmallerNetwork:
    """moved: the masked leaves once constants have moved into biases."""
    smaller = Smaller(fn, masked, lost, state)
    params = _tree.map_hosted(lambda path, leaf: sliced(leaf, lost[path]) if path in lost else leaf, moved)
    check = checked(fn, masked, smaller, params, batch, state)
    shapes = {path: np.shape(leaf) for path, leaf in _tree.named_leaves(masked) if _tree.is_array(leaf)}
    cut = {path: every for path, every in lost.items() if any(one.any() for one in every)}
    return SmallerNetwork(smaller, params, *check, cut, shapes, constant, fn, state)


def _units(fn: Callable[[Tree, Any], Any], params: Tree, batch: Any, state: Mapping[str, str]) -> Units:
    program = flatten(fn, params, batch, unroll=False)
    return Units(program, State(state).numbers(readable(batch), program.returned))


def _carried(units: Units, batch: Any, lost: Lost) -> Lost:
    """What goes of the batch's arrays, those of state alone, with these entries of the leaves."""
    left, reader = units.rewritten(units.gone(lost)).left, units.reader
    every = [tuple(~left.kept(axis) for axis in reader.of(var)) for var in reader.program.batch]
    paths = [path for path, _ in _tree.named_leaves(readable(batch))]
    return {path: one for path, one in zip(paths, every, strict=True) if any(axis.any() for axis in one)}


def _asked(units: Units, path: str, axis: int, entries: Any) -> tuple[Group, Bool[np.ndarray, " units"]]:
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
                raise _Tied(f"kept: units of '{path}' cannot be cut.")
            return group, gone
    raise _Tied(f"kept: the entries cut from axis {axis} of '{path}' are no whole units.")


def _check_finite(params: Tree) -> None:
    """Zeros cut from what is not finite prove nothing: 0 times infinity is no zero."""
    path = _tree.first_nonfinite(params)
    if path is not None:
        raise ValueError(f"params: leaf '{path}' holds a NaN or an infinity; mend the weights first")


def _sizes(batch: Any) -> list[Any]:
    """The batch, and one of another size where all its arrays count examples along their first axis."""
    n = shared_length(readable(batch))
    return [batch] if n is None else [batch, resized(batch, n // 2 if n > 1 else 2)]


def _expanded(tree: Tree, lost: Lost, shapes: Mapping[str, tuple[int, ...]]) -> Tree:
    """A tree of smaller leaves with zeros where entries were cut."""

    def one(path: str, leaf: Any) -> Any:
        if path not in lost:
            return leaf
        places = np.ix_(*(~which for which in lost[path]))
        if not isinstance(leaf, np.ndarray):
            return jnp.zeros(shapes[path], leaf.dtype).at[places].set(leaf)
        full = np.zeros(shapes[path], leaf.dtype)
        full[places] = leaf
        return full

    return _tree.map_hosted(one, tree)
