"""What each level of each group costs and loses: the data of an allocation."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from jaxtyping import Float


@dataclass(frozen=True, eq=False)
class Tables:
    """Levels of groups, one of which is chosen for each group.

    errors: {group: what is lost at each level}. costs: {resource, such as "flops": {group: cost of each level}}; a
        group that a resource does not name costs nothing there. levels: {group: what its levels are called, such as
        widths or sparsities}; 0, 1, ... by default.
    fixed: {resource: what is spent besides}. coupled: {resource: {(group, next group): costs (levels, levels of the
        next)}}, such as those of a product between two widths; the groups must form chains in the order of `errors`.

    Costs need not fall with the level. Raises ValueError, at once, for a hole, a NaN, a negative cost, a group without
    levels, and tables of groups that do not fit each other.
    """

    errors: Mapping[str, Sequence[float]]
    costs: Mapping[str, Mapping[str, Sequence[float]]]
    levels: Mapping[str, Sequence[Any]] = field(default_factory=dict)
    fixed: Mapping[str, float] = field(default_factory=dict)
    coupled: Mapping[str, Mapping[tuple[str, str], Any]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not self.errors:
            raise ValueError("errors is empty; give each group what it loses at each level")
        sizes = {}
        for group, row in self.errors.items():
            sizes[group] = len(_numbers(row, f"errors of '{group}'"))
            if not sizes[group]:
                raise ValueError(f"errors of '{group}' has no level; give it one at least, what it is now")
        if not self.costs:
            raise ValueError("costs is empty; name a resource, such as {'flops': {group: costs}}")
        for name, table in self.costs.items():
            for group, row in table.items():
                _known(group, sizes, f"costs['{name}']")
                self._check(_numbers(row, f"costs['{name}'] of '{group}'", least=0.0), (sizes[group],), name, group)
        for group, row in self.levels.items():
            _known(group, sizes, "levels")
            if len(row) != sizes[group]:
                raise ValueError(f"levels of '{group}' names {len(row)} levels, its errors have {sizes[group]}")
        for name, spent in self.fixed.items():
            _known(name, self.costs, "fixed", "resource")
            _numbers([spent], f"fixed['{name}']", least=0.0)
        after = dict(zip(self.groups, self.groups[1:], strict=False))
        for name, pairs in self.coupled.items():
            _known(name, self.costs, "coupled", "resource")
            for (one, other), matrix in pairs.items():
                _known(one, sizes, f"coupled['{name}']")
                _known(other, sizes, f"coupled['{name}']")
                if after.get(one) != other:
                    raise ValueError(
                        f"coupled['{name}'] ties '{one}' to '{other}', which does not follow it in errors; order the "
                        "groups so that those that are coupled are neighbours: costs over other pairs are not supported"
                    )
                found = _numbers(matrix, f"coupled['{name}'] of '{one}' and '{other}'", least=0.0)
                self._check(found, (sizes[one], sizes[other]), name, f"{one} x {other}")

    def __repr__(self) -> str:
        sizes = [len(row) for row in self.errors.values()]
        many = f"{min(sizes)}" if min(sizes) == max(sizes) else f"{min(sizes)} to {max(sizes)}"
        return f"Tables({len(sizes)} groups of {many} levels; {', '.join(self.costs)})"

    @staticmethod
    def _check(found: np.ndarray, shape: tuple[int, ...], name: str, group: str) -> None:
        if found.shape != shape:
            raise ValueError(f"costs['{name}'] of '{group}' has shape {found.shape}, its errors ask for {shape}")

    @property
    def groups(self) -> list[str]:
        """In order."""
        return list(self.errors)

    def label(self, group: str, level: int) -> Any:
        """What a level of a group is called."""
        return self.levels[group][level] if group in self.levels else level

    def spent(self, choice: Mapping[str, int]) -> dict[str, float]:
        """What levels cost, of every resource."""
        return {name: self._spent(name, choice) for name in self.costs}

    def lost(self, choice: Mapping[str, int]) -> float:
        """The sum of errors of these levels."""
        return math.fsum(float(self.errors[group][level]) for group, level in choice.items())

    def largest(self, name: str) -> float:
        """What is spent of a resource where every group is at its most expensive level."""
        _known(name, self.costs, "tables", "resource")
        rows = [np.max(row) for row in self.costs[name].values()]
        pairs = [np.max(matrix) for matrix in self.coupled.get(name, {}).values()]
        return float(math.fsum([*rows, *pairs]) + self.fixed.get(name, 0.0))

    def _spent(self, name: str, choice: Mapping[str, int]) -> float:
        rows = [float(row[choice[group]]) for group, row in self.costs[name].items()]
        pairs = [
            float(np.asarray(matrix)[choice[a], choice[b]]) for (a, b), matrix in self.coupled.get(name, {}).items()
        ]
        return math.fsum([*rows, *pairs, self.fixed.get(name, 0.0)])


def _known(name: str, among: Mapping[str, Any], what: str, kind: str = "group") -> None:
    if name not in among:
        raise ValueError(f"{what} names the {kind} '{name}', which is none of {', '.join(list(among)[:8])}")


def _numbers(row: Any, what: str, least: float = -math.inf) -> Float[np.ndarray, "*shape"]:
    found = np.asarray(row, float)
    bad = ~np.isfinite(found)
    if bad.any():
        at = ", ".join(str(k) for k in np.argwhere(bad)[0])
        raise ValueError(f"{what}: level {at} is {found[bad][0]}; measure it, or leave the level out of all tables")
    if np.any(found < least):
        raise ValueError(f"{what}: a cost of {found.min():g} is negative")
    return found
