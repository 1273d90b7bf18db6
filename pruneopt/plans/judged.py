"""Solves judged by the true loss: what was foreseen and measured, and the damping that other examples choose."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from pruneopt.constraints.base import Constraint
from pruneopt.objectives.base import Objective, QuadraticObjective
from pruneopt.objectives.loss import Loss
from pruneopt.objectives.quadratic import Quadratic
from pruneopt.problem import Problem
from pruneopt.solution import Solution
from pruneopt.solve import SolveError, solve
from pruneopt.solvers.base import Solver

DAMPINGS = (0.001, 0.003, 0.01, 0.03, 0.1)  # tried where there are examples to choose on
FACTS = ("predicted", "measured", "damping")  # what a judged solution's stats say besides


def judged(
    objective: Objective,
    allowed: Constraint,
    solver: Solver,
    judge: Loss,
    before: float,
    key: jax.Array,
    dampings: Sequence[float] = (),
) -> tuple[Solution, float]:
    """The solution with the least `judge` among `dampings` of a damped quadratic model, and the loss there.

    objective: its center is where the loss is `before`. dampings: empty for the objective's own; none is tried where
    the model has no damping. The solution's stats get measured, the change of `judge`, and for a quadratic model
    predicted, the change that it foresaw (its damping aside), and damping. What a damping makes unsolvable is skipped;
    where all do, the first one's error is raised.
    """
    models = [objective]
    if isinstance(objective, Quadratic) and objective.damping and dampings:
        models = [dataclasses.replace(objective, damping=d) for d in dampings]
    tried, errors = [], []
    for model in models:
        try:
            solution = solve(Problem(model, subject_to=allowed), solver, key=key)
        except (ValueError, SolveError) as error:
            errors.append(error)
            continue
        loss = judge.value(solution.value)
        facts = {"measured": loss - before}
        if isinstance(model, QuadraticObjective):
            facts |= {"predicted": model.change(solution.value), "damping": model.damping}
        tried.append((dataclasses.replace(solution, stats=solution.stats | facts), loss))
    if not tried:
        raise errors[0]
    return min(tried, key=lambda row: (row[1] != row[1], row[1]))  # a NaN is the last resort


def as_dampings(name: str, given: Any) -> tuple[float, ...]:
    """One damping or several, as numbers. Raises ValueError for none, for what is no number or negative."""
    try:
        values = tuple(float(d) for d in np.atleast_1d(np.asarray(given, np.float64)))
    except (TypeError, ValueError):
        values = ()
    if not values or not all(0 <= d < math.inf for d in values):
        raise ValueError(f"{name}={given!r} is no number >= 0 and no sequence of them; pass one, such as 0.01")
    return values
