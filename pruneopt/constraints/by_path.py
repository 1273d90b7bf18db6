"""Different constraints for different leaves."""

from __future__ import annotations

import fnmatch
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax

from pruneopt import _tree
from pruneopt.constraints import parts
from pruneopt.constraints.base import Constraint, check_constraints
from pruneopt.structure.layout import Slot

Tree = Any
_FEW = 4  # patterns that a line of text holds


@dataclass(frozen=True, eq=False)
class ByPath(Constraint):
    """Each leaf under the constraint of the first pattern that its path matches.

    of: {glob pattern: constraint}, such as {"conv*/kernel": NM(2, 4), "*": Cardinality(sparsity=0.9)}. Leaves that
        share a pattern share its budget (per="tree" means over the leaves of that pattern).
    """

    of: Mapping[str, Constraint]

    def __post_init__(self) -> None:
        if not isinstance(self.of, Mapping):
            raise TypeError(f"of={self.of!r}: pass {{pattern: constraint}}")
        check_constraints("of", self.of.values())

    def __eq__(self, other: object) -> bool:
        return isinstance(other, ByPath) and tuple(self.of.items()) == tuple(other.of.items())

    def __hash__(self) -> int:
        return hash(tuple(self.of.items()))

    @property
    def exact(self) -> bool:
        """Whether every constraint is."""
        return all(c.exact for c in self.of.values())

    @property
    def allows_empty(self) -> bool:
        """Whether every constraint allows it."""
        return all(c.allows_empty for c in self.of.values())

    def described(self, ndim: int | None = None) -> parts.Parts:
        """The masks of all patterns; and itself where any of them chooses, or bounds values."""
        found = [parts.of(constraint, ndim) for constraint in self.of.values()]
        inside = [choice for one in found for choice in one.choices]
        choice = parts.Choice(
            self,
            units=any(c.units for c in inside),
            floor=max((c.floor for c in inside), default=0),
        )
        return parts.Parts(
            tuple(mask for one in found for mask in one.masks),
            (choice,) if inside else (),
            (self,) if any(one.values for one in found) else (),
            by_path=True,
        )

    def check(self, variable: Tree) -> None:
        """Raise ValueError for a leaf without a pattern or a pattern without a leaf, then check each group."""
        for pattern, group in self._split(variable).items():
            if not jax.tree.leaves(group):
                raise ValueError(f"of: pattern '{pattern}' is the first to match no leaf; drop it or reorder")
            self.of[pattern].check(group)

    def select(self, scores: Tree) -> Tree:
        """Pattern by pattern."""
        return self._join(scores, {p: self.of[p].select(group) for p, group in self._split(scores).items()})

    def select_stage(self, scores: Tree, cuts: Sequence[float], stage: Any) -> Tree:
        """Pattern by pattern."""
        groups = self._split(scores).items()
        return self._join(scores, {p: self.of[p].select_stage(group, cuts, stage) for p, group in groups})

    @property
    def bounds_values(self) -> bool:
        """Whether a constraint does."""
        return any(c.bounds_values for c in self.of.values())

    def project(self, values: Tree, support: Tree = None, metric: Tree = None) -> Tree:
        """Pattern by pattern, on the leaves of each."""
        supports, metrics = (None if x is None else self._split(x) for x in (support, metric))
        found = {
            p: self.of[p].project(group, supports and supports[p], metrics and metrics[p])
            for p, group in self._split(values).items()
        }
        return self._join(values, found)

    def value_violation(self, values: Tree) -> float:
        """Sum over the patterns."""
        return sum(self.of[p].value_violation(group) for p, group in self._split(values).items())

    def largest_product(self, u: Tree) -> float:
        """Sum over the patterns."""
        return sum(self.of[p].largest_product(group) for p, group in self._split(u).items())

    def violation(self, support: Tree) -> int:
        """Sum over the patterns."""
        return sum(self.of[p].violation(group) for p, group in self._split(support).items())

    def density(self, variable: Tree) -> float:
        """Average over the patterns, weighted by their leaves' sizes."""
        groups = self._split(variable)
        return sum(self.of[p].density(g) * _tree.size(g) for p, g in groups.items()) / _tree.size(variable)

    def relaxed(self, cut: float) -> ByPath:
        """Every constraint relaxed."""
        return ByPath({p: c.relaxed(cut) for p, c in self.of.items()})

    def scope(self, by_layer: bool = False) -> str:
        """By path; of every pattern where there are few."""
        if len(self.of) > _FEW:
            return f"by path: {len(self.of)} patterns"
        return "by path: " + ", ".join(f"'{pattern}' {part.scope(by_layer)}" for pattern, part in self.of.items())

    @property
    def is_oriented(self) -> bool:
        """Whether a part is."""
        return any(part.is_oriented for part in self.of.values())

    def mapped(self, fn: Callable[[Constraint], Constraint]) -> ByPath:
        """Pattern by pattern."""
        return ByPath({pattern: part.mapped(fn) for pattern, part in self.of.items()})

    def restricted(self, slots: Sequence[Slot]) -> list[Constraint]:
        """The constraints of the leaves' patterns, on their matrices."""
        groups: dict[str, list[int]] = {}
        for i, slot in enumerate(slots):
            patterns = {self._pattern(path) for path in slot.paths}
            if len(patterns) > 1:
                raise ValueError(
                    f"of: {list(slot.paths)} are one matrix but match {sorted(patterns)}; give them one pattern"
                )
            groups.setdefault(patterns.pop(), []).append(i)
        found: dict[int, Constraint] = {}
        for pattern, group in groups.items():
            found |= zip(group, self.of[pattern].restricted([slots[i] for i in group]), strict=True)
        return [found[i] for i in range(len(slots))]

    def _split(self, tree: Tree) -> dict[str, Tree]:
        owner = {path: self._pattern(path) for path, _ in _tree.named_leaves(tree)}
        return {
            pattern: _tree.map_named(lambda path, leaf, p=pattern: leaf if owner[path] == p else None, tree)
            for pattern in self.of
        }

    def _join(self, like: Tree, groups: dict[str, Tree]) -> Tree:
        found = {path: leaf for group in groups.values() for path, leaf in _tree.named_leaves(group)}
        return _tree.map_named(lambda path, _: found[path], like)

    def _pattern(self, path: str) -> str:
        for pattern in self.of:
            if fnmatch.fnmatchcase(path, pattern):
                return pattern
        raise ValueError(f"of: leaf '{path}' matches none of {list(self.of)}; add a pattern such as '*'")
