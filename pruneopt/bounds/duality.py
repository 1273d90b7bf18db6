"""The bound of a convex problem: Fenchel's dual at any point."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np

from pruneopt.bounds.base import Evidence
from pruneopt.network.leaves import check_like
from pruneopt.objectives.base import QuadraticObjective
from pruneopt.problem import Problem

Tree = Any


@dataclass(frozen=True, eq=False)
class Duality(Evidence):
    """Evidence for a convex penalty P (or a bounded set) and a convex quadratic f without a gradient at w0: a point.

    In float64. Its gradient, scaled to where P's conjugate is finite, is feasible for Fenchel's dual (`dual_value`).
    Any point proves something; one near the optimum proves much.
    """

    point: Tree

    def bound(self, problem: Problem, value: Tree, support: Tree) -> float:
        """`dual_value` at the point, where H + lambda I is semidefinite. Raises ValueError for another shape."""
        f = problem.objective
        check_like(self.point, f.center, "evidence")
        if not isinstance(f, QuadraticObjective) or not f.is_convex:
            return -math.inf
        found = dual_value(problem, self.point)
        return -math.inf if math.isnan(found) else found


def dual_value(problem: Problem, point: Tree) -> float:
    """A lower bound on f + P from any point z, in float64: f quadratic, convex, without a gradient at w0; P convex.

    With d = z - w0, G = (H + lambda I) d and any number t, min over w of f(w) - t <G, w> is at w0 + t d, so

        f + P  >=  constant - t <G, w0> - t^2 / 2 <d, G> - P*(-t G),

    tight at the optimum with t = 1. The best of t = 1, of the largest t at which P* is finite for a norm P, and of
    the best t up to that. Without a penalty, the constraint takes its place, with t = 1 and max <-G, w> over its
    values w for the conjugate. -inf where f or P is not of that kind; that H is semidefinite is not checked.
    Source: Fenchel's duality, with the scaling of El Ghaoui, Viallon and Rabbani 2012.
    """
    f, penalty, constraint = problem.objective, problem.penalty, problem.subject_to
    if not isinstance(f, QuadraticObjective) or f.gradient is not None or f.curvature is None:
        return -math.inf
    if penalty is None and constraint is None:
        return -math.inf
    if penalty is not None and not penalty.is_convex:
        return -math.inf
    gradient = f.slope(point)
    along, bend = 0.0, 0.0
    for g, z, c in zip(*map(jax.tree.leaves, (gradient, point, f.center)), strict=True):
        along += float(np.vdot(g, np.asarray(c, np.float64)))
        bend += float(np.vdot(g, np.asarray(z, np.float64) - np.asarray(c, np.float64)))
    if penalty is None:
        assert constraint is not None
        return f.constant - along - bend / 2 - constraint.largest_product(jax.tree.map(lambda g: -g, gradient))
    dual_norm = penalty.weight_max(gradient)
    most = float(penalty.weight) / dual_norm if dual_norm > 0 else 1.0
    best = min(max(-along / bend, -most), most) if bend > 0 else 0.0

    def bound(t: float) -> float:
        return f.constant - t * along - t * t / 2 * bend - penalty.conjugate(jax.tree.map(lambda g: -t * g, gradient))

    return max(bound(t) for t in (1.0, most, best))
