"""Scores of whole units as an objective: the sum of the scores of the units that are removed."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Bool, Float

from pruneopt.constraints import parts
from pruneopt.constraints.base import Constraint
from pruneopt.constraints.coupled import Coupled
from pruneopt.constraints.members import Members
from pruneopt.objectives.base import Objective, check_center

Tree = Any


@dataclass(frozen=True, eq=False, repr=False)
class UnitScores(Objective):
    """f(w) = sum of s_gu over the units u of each group g that w removes: nothing is left of what w0 has of them.

    scores: s, {group: a number a unit} (larger = keep). groups: those of a Coupled set. center: w0.

    No score is shared out to weights, so that a weight that two groups own counts for neither. Under a Coupled set of
    these groups, also within fixed supports, `Score` is optimal, and proven so, where no score is negative.
    `Problem` raises ValueError for groups without scores, for scores of another shape, a NaN or an infinity.
    """

    scores: Mapping[str, Float[np.ndarray, " units"]]
    groups: tuple[Members, ...]
    center: Tree

    constant = 0.0

    def check(self) -> None:
        """Raise unless each group has a finite number a unit."""
        check_center(self.center)
        for group in self.groups:
            if group.name not in self.scores:
                raise ValueError(
                    f"scores: there are none for group '{group.name}'; those given: {list(self.scores)[:8]}"
                )
            shape = np.shape(self.scores[group.name])
            if shape != (group.size,):
                raise ValueError(
                    f"scores of '{group.name}' have shape {shape}; pass one for each of {group.size} units"
                )
            if not np.all(np.isfinite(self.scores[group.name])):
                raise ValueError(f"scores of '{group.name}' hold a NaN or an infinity; check the data and the network")

    def value(self, w: Tree) -> float:
        """f(w), in float64."""
        alive = self._alive(w)
        return math.fsum(float(np.sum(cost[~alive[name]])) for name, cost in self.costs().items())

    @property
    def is_separable(self) -> bool:
        """Whether no unit costs less than nothing: more kept is then never worse."""
        return all(bool(np.all(cost >= 0)) for cost in self.costs().values())

    def costs(self) -> dict[str, Float[np.ndarray, " units"]]:
        """What removing each unit costs: its score, nothing where it is zero already."""
        alive = self._alive(self.center)
        return {name: np.where(live, np.asarray(self.scores[name], np.float64), 0.0) for name, live in alive.items()}

    def ranking(self) -> dict[str, Float[np.ndarray, " units"]]:
        """The place of each unit's score among those of all groups, equal ones alike: whole numbers."""
        return _places({group.name: np.asarray(self.scores[group.name], np.float64) for group in self.groups})

    def least(self, constraint: Constraint) -> float:
        """The least that any support of `constraint` drops; -inf where it is no set of whole units of these groups."""
        found = parts.of(constraint)
        if found.groups != self.groups or not self.is_separable or not found.chooses_single_units:
            return -math.inf
        costs = self.costs()
        kept = found.units(_places(costs), self.center)
        return math.fsum(float(np.sum(cost[~np.asarray(kept[name])])) for name, cost in costs.items())

    def _alive(self, w: Tree) -> dict[str, Bool[np.ndarray, " units"]]:
        """Whether anything of each unit is not zero."""
        alive = Coupled(self.groups, {}).alive(jax.tree.map(lambda x: jnp.asarray(x) != 0, w))
        return {name: np.asarray(live) for name, live in alive.items()}


def _places(scores: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Scores by their places among all, which float32 holds as they are."""
    _, place = np.unique(np.concatenate(list(scores.values())), return_inverse=True)
    ends = np.cumsum([len(one) for one in scores.values()])[:-1]
    return {name: one.astype(np.float32) for name, one in zip(scores, np.split(place.ravel(), ends), strict=True)}
