"""Which parts of leaves and of operators are a unit's."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import numpy as np
from jaxtyping import Float

from pruneopt import _tree
from pruneopt.constraints.members import Members
from pruneopt.network.network import Network
from pruneopt.structure.layout import Slot, slots_of
from pruneopt.structure.traced import Traced

Of = Literal["all", "kernels", "makers"]


def pooled(group: Members, named: dict[str, np.ndarray]) -> Float[np.ndarray, " units"]:
    """Sums over what each unit owns of these leaves; an entry that it owns along two axes counts twice."""
    total = np.zeros(group.size)
    for (path, axis), places in group.places.items():
        if path in named:
            sums = named[path].sum(tuple(k for k in range(named[path].ndim) if k != axis))
            np.add.at(total, places[places >= 0], sums[places >= 0])
    return total


def counted(network: Network, group: Members, of: Of) -> Members:
    """The members whose weights count: all that is decided, kernels (leaves of two or more axes), or the kernels of the
    operators that make the units; all where there are no kernels.
    """
    chosen = dict(_tree.named_leaves(network.chosen))
    every = {at: places for at, places in group.places.items() if at[0] in chosen}
    if of == "makers":
        graph = Traced(network).of(network.batches.first)
        slots = slots_of(graph.operators, dict(_tree.named_leaves(network.params)))
        kept = {at: places for at, places in every.items() if any(_makes(group, at, slot) for slot in slots)}
    else:
        kept = {at: p for at, p in every.items() if of == "all" or sum(n > 1 for n in chosen[at[0]].shape) > 1}
    return Members(group.name, group.size, kept or every)


def owners_of(group: Members, at: tuple[str, int], path: str, shape: tuple[int, ...]) -> np.ndarray:
    """The unit of each entry of a leaf, as one member says; -1 for none."""
    if path != at[0]:
        return np.full(shape, -1, np.int32)
    along = [-1 if k == at[1] else 1 for k in range(len(shape))]
    return np.broadcast_to(group.places[at].astype(np.int32).reshape(along), shape)


def _of_matrix(group: Members, at: tuple[str, int], slot: Slot) -> np.ndarray:
    """The unit of each entry of a slot's matrices (problems, n_in, n_out)."""
    leaves = {p: owners_of(group, at, p, shape) for p, shape in zip(slot.paths, slot.leaf_shapes, strict=True)}
    return np.asarray(slot.stack(leaves)).reshape(slot.problems, *slot.shape[-2:])


def readers(group: Members, slots: Sequence[Slot]) -> list[tuple[Slot, np.ndarray]]:
    """The operators of which rows are a unit's, and the unit of each input (problems, n_in)."""
    found = []
    for slot in slots:
        for at in group.places:
            if at[0] in slot.paths:
                units = _of_matrix(group, at, slot)
                if np.any(units >= 0) and np.all(units == units[:, :, :1]):
                    found.append((slot, units[:, :, 0]))
    return found


def _makes(group: Members, at: tuple[str, int], slot: Slot) -> bool:
    """Whether columns of an operator are a unit's."""
    if at[0] not in slot.paths:
        return False
    units = _of_matrix(group, at, slot)
    return bool(np.any(units >= 0) and np.all(units == units[:, :1]))
