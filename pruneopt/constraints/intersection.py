"""Several constraints at once."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from pruneopt.constraints.base import Constraint, check_constraints
from pruneopt.constraints.block import Blocks, Slices, Units
from pruneopt.constraints.cardinality import Cardinality
from pruneopt.constraints.nm import NM
from pruneopt.constraints.support import Support
from pruneopt.constraints.transposable import TransposableNM
from pruneopt.structure.layout import Slot

Tree = Any


@dataclass(frozen=True)
class Intersection(Constraint):
    """Every one of `parts` holds.

    `select` goes from part to part, each choosing among what the ones before it kept: fixed supports first, then in
    the order given, parts with a floor last (no other may cut below it). So the result is always feasible if any
    support is, two floors aside. It is exact after fixed supports, and where each part's scopes lie in those of the
    next: give the finer part first, as in Intersection((NM(2, 4), Cardinality(sparsity=0.7))).
    """

    parts: tuple[Constraint, ...]

    def __post_init__(self) -> None:
        if not isinstance(self.parts, tuple) or not self.parts:
            raise ValueError(f"parts={self.parts!r}: pass a tuple of constraints, Intersection((a, b))")
        check_constraints("parts", self.parts)

    @property
    def exact(self) -> bool:
        """Whether every part is, and the scopes of each that chooses surely lie in those of the next."""
        choosing = [part for part in self._in_turn() if not isinstance(part, Support)]
        return all(part.exact for part in self.parts) and all(map(_lies_within, choosing, choosing[1:]))

    @property
    def allows_empty(self) -> bool:
        """Whether every part that is not a fixed support allows it."""
        choosing = [part for part in self.parts if not isinstance(part, Support)] or self.parts
        return all(part.allows_empty for part in choosing)

    def check(self, variable: Tree) -> None:
        """Check every part."""
        for part in self.parts:
            part.check(variable)

    def select(self, scores: Tree) -> Tree:
        """Part by part; traceable by JAX."""
        first, *rest = self._in_turn()
        chosen = first.select(scores)
        for part in rest:
            scores = jax.tree.map(lambda s, kept: jnp.where(kept, s, jnp.asarray(-jnp.inf, s.dtype)), scores, chosen)
            chosen = part.select(scores)
        return chosen

    def violation(self, support: Tree) -> int:
        """Sum over the parts."""
        return sum(part.violation(support) for part in self.parts)

    def density(self, variable: Tree) -> float:
        """The smallest density of a part."""
        return min(part.density(variable) for part in self.parts)

    def relaxed(self, cut: float) -> Intersection:
        """Every part relaxed."""
        return Intersection(tuple(part.relaxed(cut) for part in self.parts))

    def scope(self, by_layer: bool = False) -> str:
        """Of every part."""
        return "; ".join(part.scope(by_layer) for part in self.parts)

    @property
    def shares(self) -> bool:
        """Whether a part does."""
        return any(part.shares for part in self.parts)

    def mapped(self, fn: Callable[[Constraint], Constraint]) -> Intersection:
        """Part by part."""
        return Intersection(tuple(part.mapped(fn) for part in self.parts))

    def restricted(self, slots: Sequence[Slot]) -> list[Constraint]:
        """Every part on the matrices."""
        each = [part.restricted(slots) for part in self.parts]
        return [Intersection(tuple(parts)) for parts in zip(*each, strict=True)]

    def portion(self, support: Any, problem: int) -> Intersection:
        """Every part's."""
        return Intersection(tuple(part.portion(support, problem) for part in self.parts))

    def _in_turn(self) -> list[Constraint]:
        return sorted(self.parts, key=lambda part: 0 if isinstance(part, Support) else 2 if _floor(part) else 1)


def _floor(part: Constraint) -> int:
    budget = part.budget if isinstance(part, Units) else part
    return (budget.floor or 0) if isinstance(budget, Cardinality) else 0


def _lies_within(fine: Constraint, coarse: Constraint) -> bool:
    """Whether every scope of `fine` surely lies in one scope of `coarse`, so that choosing in turn is optimal.

    Groups and budgets are then a laminar matroid, where the greedy choice is best; a unit adds up the best of its own.
    """
    kinds = NM | TransposableNM if isinstance(coarse, Units) else NM | Cardinality
    if not isinstance(fine, kinds) or _floor(fine):
        return False
    if isinstance(fine, Cardinality) and fine.per == "tree":
        return isinstance(coarse, Cardinality) and coarse.per == "tree"
    small, large = _scope(fine), _scope(coarse)
    if small is None or large is None:
        return False
    return all(b == -1 or (a != -1 and b % a == 0) for a, b in zip(small, large, strict=True))


def _scope(part: Constraint) -> tuple[int, int] | None:
    """How many consecutive inputs and outputs a scope of `part` has, -1 for all; None where the leaf decides."""
    match part:
        case NM(axis="in" | -2):
            return part.m, 1
        case NM(axis="out" | -1):
            return 1, part.m
        case TransposableNM():
            return part.m, part.m
        case Cardinality(per="tree" | "leaf"):
            return -1, -1
        case Cardinality(per="in"):
            return part.span, -1
        case Cardinality(per="out"):
            return -1, part.span
        case Blocks():
            return (1, *part.shape)[-2], part.shape[-1]
        case Slices(axis=-2):
            return 1, -1
        case Slices(axis=-1):
            return -1, 1
    return None
