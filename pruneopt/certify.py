"""Checking a solution from its problem and its evidence alone; no solver is imported here."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from pruneopt import _linalg, _tree
from pruneopt.constraints.cardinality import Cardinality
from pruneopt.constraints.support import Support
from pruneopt.curvature.diagonal import Diagonal, Identity
from pruneopt.curvature.gram import Gram
from pruneopt.network.leaves import check_like
from pruneopt.objectives.base import QuadraticObjective
from pruneopt.problem import Problem
from pruneopt.solution import Duality, Evidence, Separable, Solution, Status, StrongConvexity

Tree = Any
_OPTIMAL_GAP = 1e-6


@dataclass(frozen=True)
class Certificate:
    """What a check found: violation in units, nonzeros outside the support, objective, bound, gap and status."""

    violation: int
    outside: int
    objective: float
    bound: float
    gap: float
    status: Status


def certify(problem: Problem, solution: Solution) -> Certificate:
    """Re-derive feasibility, objective and bound of `solution`, in float64 for quadratics.

    Raises ValueError for a value or a support of another structure than the problem's variable.
    """
    for name, part, kind in (("problem", problem, Problem), ("solution", solution, Solution)):
        if not isinstance(part, kind):
            raise TypeError(f"{name} is a {type(part).__name__}; pass a pruneopt {kind.__name__}")
    return verify(problem, solution.value, solution.support, solution.evidence)


def verify(problem: Problem, value: Tree, support: Tree, evidence: Evidence) -> Certificate:
    """The one check behind `solve` and `certify`."""
    check_like(value, problem.objective.center, "value")
    check_like(support, problem.objective.center, "support")
    violation, outside = problem.violation(support), _tree.outside(value, support)
    finite = _tree.first_nonfinite(value) is None
    objective = problem.value(value) if finite else math.nan
    bound = lower_bound(problem, value, support, evidence) if finite else -math.inf
    constant = getattr(problem.objective, "constant", 0.0)  # no part of how good a point is
    gap = _gap(objective - constant, bound - constant)
    if not math.isfinite(objective):
        status = Status.NONFINITE
    elif violation or outside or problem.value_violation(value) > 0:
        status = Status.INFEASIBLE
    else:
        status = Status.OPTIMAL if gap <= _OPTIMAL_GAP else Status.FEASIBLE
    return Certificate(violation, outside, objective, bound, gap, status)


def lower_bound(problem: Problem, value: Tree, support: Tree, evidence: Evidence) -> float:
    """A lower bound on the objective of every feasible point, or -inf where the evidence proves none."""
    f = problem.objective
    if evidence is None or not isinstance(f, QuadraticObjective):
        return -math.inf
    if isinstance(evidence, Duality):
        check_like(evidence.point, f.center, "evidence")
        return problem.dual_value(evidence.point) if f.is_convex else -math.inf
    if problem.penalty is not None or not isinstance(evidence, Separable | StrongConvexity):
        return -math.inf
    if isinstance(evidence, Separable):
        return _separable_bound(problem, f, support)
    return _convexity_bound(problem, f, value)


def _separable_bound(problem: Problem, f: QuadraticObjective, support: Tree) -> float:
    constraint = problem.subject_to
    if constraint is None:
        return f.constant if f.is_separable else -math.inf
    if not (f.is_separable and constraint.exact):
        return -math.inf
    if isinstance(constraint, Cardinality) and constraint.per == "tree" and not constraint.floor:
        return f.constant + _priced_bound(f, constraint.kept_of(_tree.size(f.center)), support)
    costs = f.saliency()
    return f.constant + _tree.dropped(costs, constraint.select(costs))


def _priced_bound(f: QuadraticObjective, budget: int, support: Tree) -> float:
    """Weak duality, without a second selection or a copy of the weights.

    With a price mu >= 0 on each kept weight, whatever `budget` weights are kept drops at least
    sum_i min(cost_i, mu) - mu * budget; mu = the dearest weight that `support` drops makes this tight if it is best.
    """
    assert f.curvature is not None
    diagonal, center = jax.tree.leaves(f.curvature.diagonal(f.center)), jax.tree.leaves(f.center)
    with jax.enable_x64(True):
        ridge = float(f.ridge())
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


def _convexity_bound(problem: Problem, f: QuadraticObjective, value: Tree) -> float:
    ridge = float(f.ridge())
    if not (isinstance(problem.subject_to, Support) and f.gradient is None):
        return -math.inf
    modulus = _modulus(f, ridge)
    if modulus <= 0:
        return -math.inf
    with jax.enable_x64(True):
        residual = f.slope(value)
        residual = _tree.masked(residual, problem.subject_to.select(jax.tree.map(np.zeros_like, residual)))
        square = sum(float(np.sum(np.square(r))) for r in jax.tree.leaves(residual))
    return f.value(value) - square / (2 * modulus)


def _modulus(f: QuadraticObjective, ridge: float) -> float:
    """A number c with H + ridge I >= c I, checked and not assumed; 0 where none is found."""
    if isinstance(f.curvature, Identity):
        return 1.0 + ridge
    if isinstance(f.curvature, Diagonal):
        return min(float(jnp.min(h)) for h in jax.tree.leaves(f.curvature.values)) + ridge
    if isinstance(f.curvature, Gram) and ridge > 0:
        h = np.asarray(f.curvature.matrix, np.float64)
        try:  # H + ridge/2 I is positive definite if and only if Cholesky succeeds
            np.linalg.cholesky(h + 0.5 * ridge * np.eye(len(h)))
        except np.linalg.LinAlgError:
            return 0.0
        return 0.5 * ridge
    return 0.0


def _gap(objective: float, bound: float) -> float:
    if not (math.isfinite(objective) and math.isfinite(bound)):
        return math.inf
    scale = max(abs(objective), abs(bound))
    return max(objective - bound, 0.0) / scale if scale else 0.0
