"""Solves judged by the true loss: what was foreseen and measured; other examples choose the model and the step."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from pruneopt import _tree
from pruneopt.certify import verify
from pruneopt.constraints.base import Constraint
from pruneopt.network.network import Network
from pruneopt.objectives.base import Objective, QuadraticObjective
from pruneopt.objectives.loss import Loss
from pruneopt.objectives.quadratic import Quadratic
from pruneopt.problem import Problem
from pruneopt.solution import Solution, Status
from pruneopt.solve import SolveError, solve
from pruneopt.solvers.base import Solver

Tree = Any
DAMPINGS = (0.001, 0.003, 0.01, 0.03, 0.1)  # tried where there are examples to choose on
FACTS = ("predicted", "measured", "damping")  # what a judged solution's stats say besides


def damped(objective: Objective, dampings: Sequence[float]) -> list[Objective]:
    """A quadratic model with each of `dampings` for its own; as it is where none are given or it has no damping."""
    if isinstance(objective, Quadratic) and objective.damping and dampings:
        return [dataclasses.replace(objective, damping=d) for d in dampings]
    return [objective]


def judged(
    models: Sequence[Objective],
    allowed: Constraint,
    solver: Solver,
    judge: Loss,
    before: float,
    key: jax.Array,
    steps: Sequence[float] = (1.0,),
) -> tuple[Solution, float]:
    """The solution of one of `models`, or a shorter step to it, by `judge`, and the loss there.

    models: their center is where the loss is `before`. steps: 1 is a model's solution v with its support S, 0 is the
    plain cut, the center's weights on S, and t in between is plain + t (v - plain); a shorter step that breaks a bound
    on values is left out. In the order given, what has less loss than all before it is taken, and no further step of
    that model is tried but after its plain cut: where the full step suffices a shorter one learns less.

    The solution's stats get measured, the change of `judge`, step, and for a quadratic model predicted, the change that
    it foresaw (its damping aside), damping, and gradient (whether it has one). A model that cannot be solved is
    skipped; where all are, the first one's error is raised.
    """
    best, errors = None, []
    for model in models:
        problem = Problem(model, subject_to=allowed)
        try:
            solution = solve(problem, solver, key=key)
        except (ValueError, SolveError) as error:
            errors.append(error)
            continue
        for step, value in _along(problem, solution, steps):
            loss = judge.value(value)
            rank = (loss != loss, loss)  # a NaN is the last resort
            if best is None or rank < best[0]:
                best = rank, problem, solution, step, value
                if step:
                    break
    if best is None:
        raise errors[0]
    (_, loss), problem, solution, step, value = best
    if step != 1:
        check = verify(problem, value, solution.support, solution.evidence)
        solution = dataclasses.replace(
            solution, value=value, status=check.status, objective=check.objective, bound=check.bound, gap=check.gap
        )
    facts = {"measured": loss - before, "step": step}
    if isinstance(model := problem.objective, QuadraticObjective):
        facts |= {"predicted": model.change(value), "damping": model.damping, "gradient": model.gradient is not None}
    return dataclasses.replace(solution, stats=solution.stats | facts), loss


def _along(problem: Problem, solution: Solution, steps: Sequence[float]) -> Iterator[tuple[float, Tree]]:
    """(t, plain + t (v - plain)) for each of `steps`; v alone where it is the plain cut."""
    plain, full = _tree.masked(problem.objective.center, solution.support), solution.value
    if all(np.array_equal(a, b) for a, b in zip(jax.tree.leaves(plain), jax.tree.leaves(full), strict=True)):
        steps = (1.0,)
    for step in steps:
        value = full if step == 1 else jax.tree.map(partial(_between, step), plain, full)
        if step == 1 or problem.value_violation(value) == 0:
            yield step, value


def _between(step: float, plain: Any, full: Any) -> Any:
    a, b = (jnp.asarray(x).astype(_tree.wide(x.dtype)) for x in (plain, full))
    return _tree.like((a + jnp.asarray(step, a.dtype) * (b - a)).astype(plain.dtype), plain)


def as_dampings(name: str, given: Any) -> tuple[float, ...]:
    """One damping or several, as numbers. Raises ValueError for none, for what is no number or negative."""
    try:
        values = tuple(float(d) for d in np.atleast_1d(np.asarray(given, np.float64)))
    except (TypeError, ValueError):
        values = ()
    if not values or not all(0 <= d < math.inf for d in values):
        raise ValueError(f"{name}={given!r} is no number >= 0 and no sequence of them; pass one, such as 0.01")
    return values


def left_out(network: Network) -> dict[str, Any]:
    """What a history says of leaves that look prunable and were not chosen by default."""
    return {"left_out": network.left_out} if network.left_out else {}


def standing(support: Any, solutions: Mapping[str, Solution]) -> dict[str, Any]:
    """What a history says of where a stage ends; the status is the least that is known of all solutions."""
    kept = _tree.kept(support)
    return {
        "sparsity": 1 - kept / _tree.size(support),
        "kept": kept,
        "objective": sum(s.objective for s in solutions.values()),
        "status": max((s.status for s in solutions.values()), key=list(Status).index).name.lower(),
    }
