"""Coupled units: what a trace found to live or die together, over all the leaves that hold a part of it."""

from __future__ import annotations

import glob
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float

from pruneopt import _tree
from pruneopt.constraints.base import Constraint
from pruneopt.constraints.by_path import ByPath
from pruneopt.constraints.cardinality import Cardinality
from pruneopt.constraints.members import Members, in_runs, pooled
from pruneopt.constraints.parts import Choice, Parts
from pruneopt.constraints.rows import Rows
from pruneopt.structure.layout import Slot
from pruneopt.structure.units import Units

Tree = Any


@dataclass(frozen=True, eq=False)
class Coupled(Constraint):
    """At most so many units of each group live; a unit is what it owns of every member, and lives or dies whole.

    groups: what `coupled` found: channels, neurons, heads, experts, the width of a residual stream.
    budget: how many units live: a Cardinality over units, per="leaf" (each group the same share) or per="tree" (all
        groups together), its floor in units; or {name of a group: how many}, for some groups or all.
    multiple: `select` keeps whole runs of so many units of a group, the best first, such as the 8 or 64 at which a
        machine is fast; the last run of a group may be shorter. Counts are rounded down, a floor up. A support with
        fewer units stays within the set.

    The score of a unit is the sum over its entries in all members, where one +inf keeps it; entries in two groups count
    for both, so that `select` is exact only where no leaf has two. Layer by layer the operators that consume a group
    choose its units, with all their rows, and what produces them goes along; each group needs one consumer then, and a
    budget of its own.
    """

    groups: tuple[Members, ...]
    budget: Cardinality | Mapping[str, int]
    multiple: int = 1

    def __post_init__(self) -> None:
        if isinstance(self.multiple, bool) or not hasattr(self.multiple, "__index__") or self.multiple < 1:
            raise ValueError(f"multiple={self.multiple!r} is not a whole number >= 1; pass the units of a run")
        if isinstance(self.budget, Mapping):
            names = [group.name for group in self.groups]
            for name, count in self.budget.items():
                if name not in names:
                    raise ValueError(f"budget names the group '{name}'; there are {', '.join(names[:8])}")
                size = next(group.size for group in self.groups if group.name == name)
                if isinstance(count, bool) or not hasattr(count, "__index__") or not 0 <= int(count) <= size:
                    raise ValueError(f"budget['{name}'] is {count!r}; pass a whole number from 0 to {size}")
        elif not isinstance(self.budget, Cardinality):
            raise TypeError(f"budget={self.budget!r}; pass how many units live: Cardinality(sparsity=0.5), or by name")
        elif self.budget.per not in ("tree", "leaf"):
            raise ValueError(f"budget per={self.budget.per!r}: units have no axes; pass per='leaf' or per='tree'")

    def __repr__(self) -> str:
        many = sum(group.size for group in self.groups)
        return f"Coupled({many} units in {len(self.groups)} groups, {self.budget!r})"

    @property
    def _on_units(self) -> Constraint:
        """The budget, on {name of a group: array of its units}."""
        if isinstance(self.budget, Cardinality):
            return self.budget
        counts = {group.name: self.budget.get(group.name, group.size) for group in self.groups}
        return ByPath({glob.escape(name): Cardinality(count=count, floor=0) for name, count in counts.items()})

    @property
    def exact(self) -> bool:
        """Whether no leaf has units of two groups, and units are chosen one by one."""
        if self.multiple > 1:
            return False
        owned = [path for group in self.groups for path in {path for path, _ in group.places}]
        return len(owned) == len(set(owned))

    @property
    def allows_empty(self) -> bool:
        """True: a leaf is as wide as its units."""
        return True

    def described(self, ndim: int | None = None) -> Parts:
        """A choice of its own."""
        return Parts(choices=(Choice(self, units=True, groups=self.groups, multiple=self.multiple),))

    def check(self, variable: Tree) -> None:
        """Raise ValueError for groups of another network, and budgets that no group can meet."""
        shapes = {path: tuple(leaf.shape) for path, leaf in _tree.named_leaves(variable)}
        for group in self.groups:
            for (path, axis), places in group.places.items():
                if path in shapes and (axis >= len(shapes[path]) or shapes[path][axis] != len(places)):
                    raise ValueError(
                        f"group '{group.name}' has {len(places)} entries along axis {axis} of '{path}', a leaf of "
                        f"shape {shapes[path]}: its groups are another network's"
                    )
            if not any(path in shapes for path, _ in group.places):
                raise ValueError(
                    f"group '{group.name}': none of its leaves is decided; its groups are another network's"
                )
        if isinstance(self.budget, Cardinality):
            units = {group.name: jax.ShapeDtypeStruct((group.size,), np.float32) for group in self.groups}
            self.budget.check(units)

    def select(self, scores: Tree) -> Tree:
        """Units by the sums of their scores; traceable by JAX."""
        named = dict(_tree.named_leaves(scores))
        alive = self._best({group.name: pooled(group, named) for group in self.groups})
        return self._spread(alive, scores)

    def units(self, scores: Mapping[str, Any], allowed: Tree) -> dict[str, Bool[Array, " units"]]:
        """Units by scores of their own, {group: a number a unit}, of those of which `allowed` leaves something."""
        some = self.alive(allowed)
        return self._best({name: jnp.where(some[name], scores[name], -jnp.inf) for name in some})

    def with_units(self, alive: Mapping[str, Bool[Array, " units"]], allowed: Tree) -> Tree:
        """`allowed` without the entries of other units."""
        return jax.tree.map(jnp.logical_and, allowed, self._spread(alive, allowed))

    def violation(self, support: Tree) -> int:
        """Units alive, with any entry of any member, beyond the budget."""
        return self._on_units.violation(self.alive(support))

    def alive(self, support: Tree) -> dict[str, Bool[Array, " units"]]:
        """{group: whether each unit lives in any member}."""
        named = {path: jnp.asarray(mask, jnp.float32) for path, mask in _tree.named_leaves(support)}
        return {group.name: pooled(group, named) > 0 for group in self.groups}

    def implied(self, support: Tree) -> Tree:
        """The support without the entries of units that any operator that consumes them has cut."""
        named = dict(_tree.named_leaves(support))
        dead = {}
        for group in self.groups:
            each = [
                pooled(group, {path: jnp.asarray(named[path], jnp.float32)}, axis)
                for path, axis in group.places
                if path in named
            ]
            dead[group.name] = jnp.all(jnp.stack(each) > 0, axis=0) if each else jnp.ones(group.size, bool)
        return jax.tree.map(jnp.logical_and, jax.tree.map(jnp.asarray, support), self._spread(dead, support))

    def density(self, variable: Tree) -> float:
        """The fraction of units."""
        if isinstance(self.budget, Cardinality):
            return self.budget.density({g.name: jax.ShapeDtypeStruct((g.size,), np.float32) for g in self.groups})
        kept = sum(int(self.budget.get(group.name, group.size)) for group in self.groups)
        return kept / sum(group.size for group in self.groups)

    def relaxed(self, cut: float) -> Coupled:
        """As its budget is."""
        if isinstance(self.budget, Cardinality):
            return replace(self, budget=self.budget.relaxed(cut))
        sizes = {group.name: group.size for group in self.groups}
        return replace(
            self, budget={n: sizes[n] - int((sizes[n] - int(k)) * cut + 1e-9) for n, k in self.budget.items()}
        )

    @property
    def shares(self) -> bool:
        """True: a unit lives in all members or in none."""
        return True

    def scope(self, by_layer: bool = False) -> str:
        """Its groups."""
        if isinstance(self.budget, Cardinality):
            return f"coupled units of {len(self.groups)} groups: {self.budget.scope(by_layer)}"
        return f"coupled units of {len(self.groups)} groups: a budget each"

    def restricted(self, slots: Sequence[Slot]) -> list[Constraint]:
        """Of each operator that consumes a group, its inputs by their units; everything of others."""
        counts = self.counts()
        cut = [group for group in self.groups if counts[group.name] < group.size]
        found: dict[str, Constraint] = {}
        for name, (slot, rows) in replace(self, groups=tuple(cut), budget={}).consumers(slots).items():
            if slot.name in found:
                raise ValueError(f"layer '{slot.name}' consumes units of several groups, one of which is '{name}'")
            found[slot.name] = Rows(tuple(int(u) for u in rows), counts[name])
        return [found.get(slot.name, Cardinality(sparsity=0.0)) for slot in slots]

    def consumers(self, slots: Sequence[Slot]) -> dict[str, tuple[Slot, np.ndarray]]:
        """{group: (the operator that consumes it, the unit of each of its inputs)}.

        Raises ValueError for a group that no operator consumes, or several do.
        """
        found = {}
        for group in self.groups:
            each = [(slot, rows) for slot in slots if (rows := _inputs(group, slot)) is not None]
            if len(each) != 1 or each[0][0].problems > 1:
                names = ", ".join(f"'{slot.name}'" for slot, _ in each[:4]) or "no operator"
                raise ValueError(
                    f"group '{group.name}' is consumed by {names}; layer by layer its units are chosen by the one "
                    "operator that consumes them: leave that group out of groups=, or rank its units by scores"
                )
            found[group.name] = each[0]
        return found

    def _best(self, scores: dict[str, Float[Array, " units"]]) -> dict[str, Bool[Array, " units"]]:
        """The units, in whole runs, with the largest sum of scores."""
        if self.multiple == 1:
            return self._on_units.select(scores)
        order = {name: jnp.argsort(-x, stable=True) for name, x in scores.items()}
        runs = {name: in_runs(x[order[name]], self.multiple) for name, x in scores.items()}
        chosen = self._on_runs.select(runs)
        return {
            name: jnp.zeros(len(x), bool).at[order[name]].set(jnp.repeat(chosen[name], self.multiple)[: len(x)])
            for name, x in scores.items()
        }

    @property
    def _on_runs(self) -> Constraint:
        """The budget in whole runs, on {name of a group: array of its runs}."""
        per, sizes = self.multiple, {group.name: group.size for group in self.groups}
        if isinstance(self.budget, Cardinality) and self.budget.per == "tree":
            count = self.budget.kept_of(sum(sizes.values())) // per
            most = sum(-(-size // per) for size in sizes.values())
            floor = None if self.budget.floor is None else -(-self.budget.floor // per)
            return Cardinality(count=min(count, most), floor=floor)
        kept = {name: self._kept(name, size) for name, size in sizes.items()}
        runs = {name: -(-size // per) if kept[name] == size else kept[name] // per for name, size in sizes.items()}
        return ByPath({glob.escape(name): Cardinality(count=count, floor=0) for name, count in runs.items()})

    def _kept(self, name: str, size: int) -> int:
        """How many units of a group its own budget allows."""
        if isinstance(self.budget, Mapping):
            return int(self.budget.get(name, size))
        return min(size, max(self.budget.kept_of(size), -(-(self.budget.floor or 0) // self.multiple) * self.multiple))

    def counts(self) -> dict[str, int]:
        """How many units of each group live, where each has a budget of its own."""
        if isinstance(self.budget, Mapping) and self.multiple == 1:
            return {group.name: int(self.budget.get(group.name, group.size)) for group in self.groups}
        if isinstance(self.budget, Cardinality) and self.budget.per == "tree":
            raise ValueError(
                f"budget={self.budget!r} ranks the units of all groups together, which layer by layer cannot be; pass "
                "per='leaf', or how many of each: {group: count}, such as an allocation gives"
            )
        each = self._best({group.name: jnp.ones(group.size) for group in self.groups})
        return {name: int(mask.sum()) for name, mask in each.items()}

    def _spread(self, alive: Mapping[str, Bool[Array, " units"]], like: Tree) -> Tree:
        """Masks of the leaves."""

        def one(path: str, leaf: Any) -> Any:
            mask = jnp.ones(leaf.shape, bool)
            for group in self.groups:
                for (member, axis), places in group.places.items():
                    if member == path:
                        lives = jnp.where(places >= 0, alive[group.name][np.maximum(places, 0)], True)
                        mask &= lives.reshape([-1 if k == axis else 1 for k in range(leaf.ndim)])
            return mask

        return _tree.map_named(one, like)


def coupled(
    units: Units, budget: Cardinality | Mapping[str, int], groups: Sequence[str] | None = None, multiple: int = 1
) -> Coupled:
    """The set of a network's coupled units: `coupled(po.structure.trace(fn, params, batch).units(), budget)`.

    groups: names, such as 'layers/0/up/kernel[1]' (a leaf and its axis), of those that may lose units; by default all
        that can be cut, of several along one axis (heads and their width) the first alone. multiple: see `Coupled`.
    Raises ValueError for a group that cannot be cut, with the reason, or that is not there.
    """
    if groups is None:
        free = [group for group in units.groups if not group.blocked and group.size > 1]
        chosen = [one for one in free if all(_comes_first(units, one, *at) for at in one.members)]
    else:
        chosen = [units.group(name) for name in groups]
    found = []
    for group in chosen:
        places = {}
        for path, axis in group.members:
            ids = np.full(units.type_of(path).shape[axis], -1)
            owned = units.places(group, path, axis)
            ids[owned] = np.arange(group.size)[:, None]
            places[path, axis] = ids
        found.append(Members(units.name(group), group.size, places))
    return Coupled(tuple(found), budget, multiple)


def _comes_first(units: Units, group: Any, path: str, axis: int) -> bool:
    """Whether no other group along this axis that can be cut holds the group's units inside its own."""
    free = [other for other in units.of(path, axis) if not other.blocked and other.size > 1]
    return free[0] is group


def _inputs(group: Members, slot: Slot) -> np.ndarray | None:
    """The unit of each input of a slot's matrices; None where its inputs are not this group's."""
    leaves, varies = {}, False
    for path, shape in zip(slot.paths, slot.leaf_shapes, strict=True):
        ids = np.full(shape, -1)
        for (member, axis), places in group.places.items():
            if member == path:
                ids = np.broadcast_to(places.reshape([-1 if k == axis else 1 for k in range(len(shape))]), shape)
                varies = True
        leaves[path] = ids
    if not varies:
        return None
    found = np.asarray(slot.stack(leaves))
    rows = found.reshape(-1, *found.shape[-2:])[0]
    return rows[:, 0] if np.all(rows == rows[:, :1]) and len(set(rows[:, 0])) > 1 else None
