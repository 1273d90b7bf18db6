"""A pruning problem: data, with no algorithm in it."""

from __future__ import annotations

from dataclasses import KW_ONLY, dataclass
from typing import Any

import jax
import jax.numpy as jnp

from pruneopt import _tree
from pruneopt.constraints.base import Constraint
from pruneopt.objectives.base import Objective
from pruneopt.penalties.base import Penalty

Tree = Any


@dataclass(frozen=True, eq=False, repr=False)
class Problem:
    """minimise objective(w) + penalty(w) subject to w's support in `subject_to`.

    Raises, before any work, ValueError or TypeError for parts that do not fit together.
    """

    objective: Objective
    _: KW_ONLY
    subject_to: Constraint | None = None
    penalty: Penalty | None = None

    def __post_init__(self) -> None:
        for name, part, kind in (
            ("objective", self.objective, Objective),
            ("subject_to", self.subject_to, Constraint),
            ("penalty", self.penalty, Penalty),
        ):
            if part is not None and not isinstance(part, kind):
                raise TypeError(f"{name} is a {type(part).__name__}; pass a pruneopt {kind.__name__}")
        self.objective.check()
        if self.subject_to is not None:
            object.__setattr__(self, "subject_to", self.objective.on_matrices(self.subject_to))
            self.subject_to.check(self.objective.variable())
        if self.penalty is not None:
            self.penalty.check(self.objective.variable())

    def __repr__(self) -> str:
        weight = getattr(self.penalty, "weight", None)
        strength = f"(weight={float(weight):g})" if weight is not None and jnp.ndim(weight) == 0 else ""
        penalty = "" if self.penalty is None else f" + {type(self.penalty).__name__}{strength}"
        return f"minimise {self.objective!r}{penalty}\nsubject to {self.subject_to or 'nothing'}"

    def value(self, w: Tree) -> float:
        """objective(w) + penalty(w)."""
        return self.objective.value(w) + (self.penalty.value(w) if self.penalty else 0.0)

    def value_violation(self, w: Tree) -> float:
        """By how much the values of w break the constraint; 0 where it is on supports alone."""
        return 0.0 if self.subject_to is None else self.subject_to.value_violation(w)

    def violation(self, support: Tree) -> int:
        """By how many units `support` breaks the constraint."""
        return 0 if self.subject_to is None else self.subject_to.violation(support)

    def full_support(self) -> Tree:
        """Everything lives."""
        return jax.tree.map(lambda x: jnp.ones(x.shape, bool), self.objective.center)

    def emptied(self, support: Tree) -> str | None:
        """Path of the first leaf that loses all its weights although the constraint does not allow it.

        Without a constraint an empty leaf is an answer: a heavy penalty asks for it.
        """
        if self.subject_to is None or self.subject_to.allows_empty:
            return None
        kept = zip(_tree.named_leaves(support), _tree.kept_by_leaf(support), strict=True)
        return next((path for (path, _), n in kept if n == 0), None)
