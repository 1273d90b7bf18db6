"""Checking a solution from its problem and its evidence alone; no solver is imported here."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

from pruneopt import _tree
from pruneopt.bounds.base import Evidence
from pruneopt.bounds.exchange import largest_gain
from pruneopt.network.leaves import check_like
from pruneopt.problem import Problem
from pruneopt.solution import Solution, Status

Tree = Any
OPTIMAL_GAP = 1e-6


@dataclass(frozen=True)
class Certificate:
    """What a check found: violation in units, nonzeros outside the support, objective, bound, gap and status.

    largest_gain: of one exchange in an output, as a part of its error (`bounds.largest_gain`), where it was asked for.
    """

    violation: int
    outside: int
    objective: float
    bound: float
    gap: float
    status: Status
    largest_gain: float | None = None


@_tree.on_host
def certify(problem: Problem, solution: Solution, *, exchange: bool = False) -> Certificate:
    """Re-derive feasibility, objective and bound of `solution`, in float64 for quadratics.

    exchange: also by how much the best exchange of a kept for a cut weight would still lower an output's error; 0: the
        support is 1-swap optimal. |S|^3 + n |S|^2 for each output of a layer.
    Raises ValueError for a value or a support of another structure than the problem's variable; with `exchange`, where
    weights of an output cannot change places (`bounds.largest_gain`).
    """
    for name, part, kind in (("problem", problem, Problem), ("solution", solution, Solution)):
        if not isinstance(part, kind):
            raise TypeError(f"{name} is a {type(part).__name__}; pass a pruneopt {kind.__name__}")
    found = verify(problem, solution.value, solution.support, solution.evidence)
    return replace(found, largest_gain=largest_gain(problem, solution.support)) if exchange else found


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
    gap = relative_gap(objective - constant, bound - constant)
    if not math.isfinite(objective):
        status = Status.NONFINITE
    elif violation or outside or problem.value_violation(value) > 0:
        status = Status.INFEASIBLE
    else:
        status = Status.OPTIMAL if gap <= OPTIMAL_GAP else Status.FEASIBLE
    return Certificate(violation, outside, objective, bound, gap, status)


def relative_gap(objective: float, bound: float) -> float:
    """(objective - bound) / max(|objective|, |bound|), 0 when equal, inf where either is not finite."""
    if not (math.isfinite(objective) and math.isfinite(bound)):
        return math.inf
    scale = max(abs(objective), abs(bound))
    return max(objective - bound, 0.0) / scale if scale else 0.0
