"""Several constraints at once."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from pruneopt.constraints.base import Constraint, check_constraints
from pruneopt.constraints.support import Support

Tree = Any


@dataclass(frozen=True)
class Intersection(Constraint):
    """Every one of `parts` holds.

    `select` goes from part to part, each choosing among what the ones before it kept. It is exact where all but
    the last are fixed supports.
    """

    parts: tuple[Constraint, ...]

    def __post_init__(self) -> None:
        if not isinstance(self.parts, tuple) or not self.parts:
            raise ValueError(f"parts={self.parts!r}: pass a tuple of constraints, Intersection((a, b))")
        check_constraints("parts", self.parts)

    @property
    def exact(self) -> bool:
        """Whether all parts but the last are fixed supports and the last is exact."""
        return all(isinstance(part, Support) for part in self.parts[:-1]) and self.parts[-1].exact

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
        chosen = self.parts[0].select(scores)
        for part in self.parts[1:]:
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

    def restricted(self, paths: tuple[str, ...], laid: Callable[[dict[str, Any]], Any]) -> Intersection:
        """Every part on the matrix."""
        return Intersection(tuple(part.restricted(paths, laid) for part in self.parts))
