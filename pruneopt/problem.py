"""A pruning problem: data, with no algorithm in it."""

from __future__ import annotations

import math
from dataclasses import KW_ONLY, dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from pruneopt import _tree
from pruneopt.constraints.ball import Ball
from pruneopt.constraints.base import Constraint
from pruneopt.objectives.base import Objective, QuadraticObjective
from pruneopt.penalties.base import Penalty

Tree = Any


@dataclass(frozen=True, eq=False)
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
            self.subject_to.check(self.objective.variable())
        if self.penalty is not None:
            self.penalty.check(self.objective.variable())

    def value(self, w: Tree) -> float:
        """objective(w) + penalty(w)."""
        return self.objective.value(w) + (self.penalty.value(w) if self.penalty else 0.0)

    def dual_value(self, point: Tree) -> float:
        """A lower bound on f + P from any point z, in float64: f quadratic, convex, without a gradient at w0; P convex.

        With d = z - w0, G = (H + lambda I) d and any number t, min over w of f(w) - t <G, w> is at w0 + t d, so

            f + P  >=  constant - t <G, w0> - t^2 / 2 <d, G> - P*(-t G),

        tight at the optimum with t = 1. The best of t = 1, of the largest t at which P* is finite for a norm P, and of
        the best t up to that. Without a penalty, a ball as constraint takes its
        place, with t = 1. -inf where f or P is not of that kind; that H is semidefinite is not checked.
        Source: Fenchel's duality, with the scaling of El Ghaoui, Viallon and Rabbani 2012.
        """
        f, penalty, ball = self.objective, self.penalty, self.subject_to
        if not isinstance(f, QuadraticObjective) or f.gradient is not None or f.curvature is None:
            return -math.inf
        if penalty is None and not isinstance(ball, Ball):
            return -math.inf
        if penalty is not None and not penalty.is_convex:
            return -math.inf
        gradient = f.slope(point)
        along, bend = 0.0, 0.0
        for g, z, c in zip(*map(jax.tree.leaves, (gradient, point, f.center)), strict=True):
            along += float(np.vdot(g, np.asarray(c, np.float64)))
            bend += float(np.vdot(g, np.asarray(z, np.float64) - np.asarray(c, np.float64)))
        if penalty is None:  # a ball's indicator, whose conjugate is radius times the dual norm
            assert isinstance(ball, Ball)
            return f.constant - along - bend / 2 - ball.radius * ball.dual_norm(gradient)
        dual_norm = penalty.weight_max(gradient)
        most = float(penalty.weight) / dual_norm if dual_norm > 0 else 1.0
        best = min(max(-along / bend, -most), most) if bend > 0 else 0.0

        def bound(t: float) -> float:
            return (
                f.constant - t * along - t * t / 2 * bend - penalty.conjugate(jax.tree.map(lambda g: -t * g, gradient))
            )

        return max(bound(t) for t in (1.0, most, best))

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
