"""Checking a solution from its problem and its evidence alone; no solver is imported here."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from pruneopt import _tree
from pruneopt.bounds.base import Evidence
from pruneopt.network.leaves import check_like
from pruneopt.problem import Problem
from pruneopt.solution import Solution, Status

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


@_tree.on_host
def certify(problem: Problem, solution: Solution) -> Certificate:
    """Re-derive feasibility, objective and bound of `solution`, in float64 for quadratics.

    Raises ValueError for a value or a support of another structure than the problem's variable.
    """
    for name, part, kind in (("problem", problem, Problem), ("solution", solution, Solution)):
        if not isinstance(part, kind):
            raise TypeError(f"{name} is a {type(part).__name__}; pass a pruneopt {kind.__name__}")
    return verify(problem, solution.value, solution.support, solution.evidence)


def verify(problem: Problem, value: Tree, support: Tree, evidence: Evidence | None) -> Certificate:
    """The one check behind `solve` and `certify`."""
    if not isinstance(evidence, Evidence | None):
        raise TypeError(f"evidence is a {type(evidence).__name__}; pass one of pruneopt.bounds, or None")
    check_like(value, problem.objective.center, "value")
    check_like(support, problem.objective.center, "support")
    violation, outside = problem.violation(support), _tree.outside(value, support)
    finite = _tree.first_nonfinite(value) is None
    objective = problem.value(value) if finite else math.nan
    bound = evidence.bound(problem, value, support) if finite and evidence is not None else -math.inf
    constant = getattr(problem.objective, "constant", 0.0)  # no part of how good a point is
    gap = _gap(objective - constant, bound - constant)
    if not math.isfinite(objective):
        status = Status.NONFINITE
    elif violation or outside or problem.value_violation(value) > 0:
        status = Status.INFEASIBLE
    else:
        status = Status.OPTIMAL if gap <= _OPTIMAL_GAP else Status.FEASIBLE
    return Certificate(violation, outside, objective, bound, gap, status)


def _gap(objective: float, bound: float) -> float:
    if not (math.isfinite(objective) and math.isfinite(bound)):
        return math.inf
    scale = max(abs(objective), abs(bound))
    return max(objective - bound, 0.0) / scale if scale else 0.0
