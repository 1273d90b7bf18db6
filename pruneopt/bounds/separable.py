"""The bound of a separable problem: the cheapest weights to drop, one by one."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from pruneopt import _linalg, _tree
from pruneopt.bounds.base import Evidence
from pruneopt.constraints import parts
from pruneopt.objectives.base import QuadraticObjective
from pruneopt.objectives.scores import Scores
from pruneopt.objectives.unit_scores import UnitScores
from pruneopt.problem import Problem

Tree = Any


@dataclass(frozen=True)
class Separable(Evidence):
    """Evidence that the objective is a sum of one term a weight, smallest at w0, and `select` is exact.

    Then the cheapest support by saliency is optimal: the bound is f(w0) plus the saliency of what it drops.
    """

    def bound(self, problem: Problem, value: Tree, support: Tree) -> float:
        """f(w0) and the least that any feasible support drops."""
        f, constraint = problem.objective, problem.subject_to
        if isinstance(f, UnitScores):
            return -math.inf if constraint is None or problem.penalty is not None else f.least(constraint)
        if not isinstance(f, QuadraticObjective | Scores) or not f.is_separable or problem.penalty is not None:
            return -math.inf
        if constraint is None:
            return f.constant
        if not constraint.exact:
            return -math.inf
        if isinstance(f, Scores):
            costs = f.saliency()
            return _tree.dropped(costs, constraint.select(costs))
        found = parts.of(constraint)
        one = found.one
        if one is not None and one.across and one.kept_of is not None and not (one.floor or found.masks):
            return f.constant + _priced(f, one.kept_of(_tree.size(f.center)), support)
        costs = f.saliency()
        return f.constant + _tree.dropped(costs, constraint.select(costs))


def _priced(f: QuadraticObjective, budget: int, support: Tree) -> float:
    """Weak duality, without a second selection or a copy of the weights.

    With a price mu >= 0 on each kept weight, whatever `budget` weights are kept drops at least
    sum_i min(cost_i, mu) - mu * budget; mu = the dearest weight that `support` drops makes this tight if it is best.
    """
    assert f.curvature is not None
    diagonal, center = jax.tree.leaves(f.curvature.diagonal(f.center)), jax.tree.leaves(f.center)
    with jax.enable_x64(True):
        ridge = f.exact_ridge()
        price = max(float(x) for x in _dearest_dropped(diagonal, center, jax.tree.leaves(support), ridge))
        return sum(float(x) for x in _capped_costs(diagonal, center, ridge, price)) - price * budget


def _cost(h: jax.Array, w: jax.Array, ridge: float) -> jax.Array:
    w = w.astype(jnp.float64)
    return 0.5 * (h.astype(jnp.float64) + ridge) * w * w


@jax.jit
def _dearest_dropped(diagonal: list, center: list, support: list, ridge: float) -> list[jax.Array]:
    return [
        _linalg.blocked_max(lambda w, m, *h, d=d: jnp.where(m, 0.0, _cost(h[0] if h else d, w, ridge)), w, m, *_full(d))
        for d, w, m in zip(diagonal, center, support, strict=True)
    ]


@jax.jit
def _capped_costs(diagonal: list, center: list, ridge: float, price: float) -> list[jax.Array]:
    return [
        _linalg.blocked_sum(lambda w, *h, d=d: jnp.minimum(_cost(h[0] if h else d, w, ridge), price), w, *_full(d))
        for d, w in zip(diagonal, center, strict=True)
    ]


def _full(diagonal: jax.Array) -> list[jax.Array]:
    """The diagonal as an array to block along with the weights, or nothing where it is one number."""
    return [diagonal] if diagonal.ndim else []
