"""Which units a support leaves without effect, after constants have moved into biases."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Bool

from pruneopt import _tree
from pruneopt.structure.constants import Constants
from pruneopt.structure.units import Group, Units

Tree = Any
Lost = dict[str, tuple[Bool[np.ndarray, " n"], ...]]  # {path: for each axis, the entries that are cut}


class Kind(NamedTuple):
    """Units of a group (its number) that are zero in the same members. zero: in which; units: which they are."""

    number: int
    group: Group
    zero: Bool[np.ndarray, " members"]
    units: Bool[np.ndarray, " units"]


class Dead(NamedTuple):
    """What goes: entries of leaves, the leaves' values once constants have moved, and the constants that stay.

    constant: {(path, axis): entries} of units whose value depends on nothing and could not move.
    """

    lost: Lost
    params: Tree
    constant: dict[tuple[str, int], np.ndarray]


def dead(units: Units, masked: Tree, masks: Mapping[str, Any], batch: Sequence[Any], multiple: int = 1) -> Dead:
    """The entries of the units that masking leaves without effect, and of those whose effect goes with them.

    A unit has none where at every product and sum over it one side is masked out or zero. One that is a constant, its
    weights masked and its bias alive, is first moved into what is added to the products that read it, where that is
    exact. batch: its arrays. multiple: of every group so many units stay that its axes' lengths are a multiple of it,
    or all.
    """
    values = {path: leaf for path, leaf in _tree.named_leaves(masked) if path in units.paths}
    chosen = {path for path in values if masks.get(path) is not None}
    live = {path: np.array(masks[path]) if path in chosen else _nonzero(leaf) for path, leaf in values.items()}
    free = [group for group in units.groups if not group.blocked]
    gone = [np.zeros(group.size, bool) for group in free]
    constants = Constants(units, batch)
    while True:
        kinds = [_kinds(units, i, group, live, chosen, gone[i]) for i, group in enumerate(free)]
        before = sum(map(np.sum, gone))
        stays: dict[tuple[str, int], np.ndarray] = {}
        for kind, products in _judged(units, kinds, live, constants):
            if products and not constants.move(values, live, kind.group, kind.units, products):
                path, axis = kind.group.members[0]
                stays[path, axis] = units.places(kind.group, path, axis)[kind.units].ravel()
                continue
            gone[kind.number] |= kind.units
            for path, axis in kind.group.members:
                np.moveaxis(live[path], axis, 0)[units.places(kind.group, path, axis)[kind.units].ravel()] = False
        if sum(map(np.sum, gone)) == before:
            break
    lost = nothing(masked)
    for group, which in zip(free, gone, strict=True):
        with_units(units, lost, group, _rounded(units, group, which, multiple))
    return Dead(lost, _tree.map_named(lambda path, leaf: values.get(path, leaf), masked), stays)


def _nonzero(leaf: Any) -> Bool[np.ndarray, "..."]:
    """Where a leaf holds something: everywhere where it is no array of numbers, such as random keys."""
    return np.array(leaf != 0) if _tree.is_array(leaf) else np.ones(np.shape(leaf), bool)


def nothing(params: Tree) -> Lost:
    """No entry of any array."""
    arrays = [(path, np.shape(leaf)) for path, leaf in _tree.named_leaves(params) if _tree.is_array(leaf)]
    return {path: tuple(np.zeros(n, bool) for n in shape) for path, shape in arrays}


def with_units(units: Units, lost: Lost, group: Group, gone: Bool[np.ndarray, " units"]) -> Lost:
    """`lost` and the entries of these units."""
    for path, axis in group.members:
        lost[path][axis][units.places(group, path, axis)[gone]] = True
    return lost


def _kinds(
    units: Units,
    number: int,
    group: Group,
    live: Mapping[str, np.ndarray],
    chosen: set[str],
    gone: Bool[np.ndarray, " units"],
) -> list[Kind]:
    """The units of a group that are not gone, by the members in which they are zero, those masked somewhere."""
    zero = np.stack([_zero_units(units, group, path, axis, live[path]) for path, axis in group.members], axis=1)
    masked = np.array([path in chosen for path, _ in group.members])
    patterns, which = np.unique(zero, axis=0, return_inverse=True)
    kinds = [Kind(number, group, one, (which.ravel() == i) & ~gone) for i, one in enumerate(patterns)]
    return [kind for kind in kinds if np.any(kind.zero & masked) and np.any(kind.units)]


def _judged(
    units: Units, kinds: Sequence[Sequence[Kind]], live: Mapping[str, np.ndarray], constants: Constants
) -> Iterator[tuple[Kind, list[int]]]:
    """(kind without effect, the products that it must first leave as a constant), one reading for a kind a group."""
    for turn in range(max(map(len, kinds), default=0)):
        now = [every[turn] for every in kinds if turn < len(every)]
        start = {path: [set() for _ in array.shape] for path, array in live.items()}
        for kind in now:
            for (path, axis), zero in zip(kind.group.members, kind.zero, strict=True):
                if zero:
                    start[path][axis].add(units.atom(kind.group))
        zeros = units.zeros({path: [frozenset(one) for one in every] for path, every in start.items()})
        left = [unit for unit, _ in zeros.left]
        for kind in now:
            atom = units.atom(kind.group)
            products = [i for i, found in enumerate(zeros.products) if atom in found]
            if left.count(atom) == len(products) and constants.are_steady(zeros, atom, products):
                yield kind, products


def _zero_units(units: Units, group: Group, path: str, axis: int, live: np.ndarray) -> Bool[np.ndarray, " units"]:
    """Whether nothing of a leaf is left in a unit's entries of an axis."""
    along = np.any(live, axis=tuple(k for k in range(live.ndim) if k != axis))
    return ~np.any(along[units.places(group, path, axis)], axis=1)


def _rounded(units: Units, group: Group, gone: Bool[np.ndarray, " units"], multiple: int) -> Bool[np.ndarray, " units"]:
    """`gone` with the first few left in, so that the length of each axis is a multiple, or none gone."""
    each = [units.places(group, path, axis).shape[1] for path, axis in group.members]
    kept = group.size - int(gone.sum())
    while gone.any() and any(kept * entries % multiple for entries in each):
        gone, kept = gone & (np.cumsum(gone) > 1), kept + 1
    return gone
