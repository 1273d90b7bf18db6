"""Stages with a safeguard: the loss is modelled anew at each, and other examples say how far to trust the model."""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Callable
from functools import partial
from numbers import Real
from typing import Any

import jax
from tqdm import tqdm

from pruneopt import _tree
from pruneopt.constraints.base import Constraint
from pruneopt.constraints.intersection import Intersection
from pruneopt.constraints.support import Support
from pruneopt.network.batches import Batches, Source
from pruneopt.network.leaves import Choice, combine
from pruneopt.network.network import Network
from pruneopt.objectives.base import Objective
from pruneopt.objectives.loss import Loss
from pruneopt.objectives.quadratic import Quadratic
from pruneopt.plans.judged import FACTS, damped, judged
from pruneopt.plans.methods import Method, loss_row
from pruneopt.plans.schedules import Iterative, Schedule, stages_of
from pruneopt.solution import Pruned, Solution

Tree = Any
_HALVINGS = 3  # of one stage, at most: an eighth of it is taken then, whatever it does
_STEPS = (0.0, 1.0, 0.5, 0.25, 0.125)  # of the way from the plain cut to the model's weights: itself, then halvings


@_tree.on_host
def staged(
    fn: Callable[[Tree, Any], Any],
    params: Tree,
    batches: Callable[[int], Source],
    constraint: Constraint,
    held_out: Source,
    *,
    method: str | Method = "pursuit_steps",
    schedule: Schedule | None = None,
    rise: float = 2.0,
    leaves: Choice = None,
    progress: bool = True,
) -> Pruned:
    """For each stage of `schedule`, minimise model(w) subject to `constraint` relaxed to the stage's cut, and trust
    the model as far as the loss on `held_out` says.

    At the weights w of the stage before, from the stage's own examples, without and then with the gradient g:

        (S, v) = argmin  <g, d> + 1/2 <d, (H + lambda I) d>,  d = v - w,  v = 0 outside S,  S allowed by the stage's cut
        w' = w_S + t (v - w_S),  t the first of 1, 1/2, 1/4, 1/8 with less loss on `held_out` than all before, w_S too

    so that no stage is taken that is worse there than the plain cut w_S of either model, or than the whole step of the
    model without the gradient. The gradient is the mean over a stage's examples; where these are few beside the
    weights, v fits them and no others, and only a short step, or none, is an improvement elsewhere. The longest step
    that improves is taken, not the best, which learns less: MLPNet, 16,000 images a stage, 95.4 % instead of 95.5.

    A stage after which the loss is more than `rise` times what it was (for one below zero: higher by more than rise - 1
    times its size) is taken back and made half as long, with the same models, up to three times; what is still to be
    cut follows in further stages. The eighth of a stage, or the shortest that cuts a weight, is taken whatever it does,
    and `history` says so.

    fn: loss(params, batch) -> scalar, a mean over examples. batches: stage -> the examples that its model reads.
    held_out: examples that no stage reads; the trained network's loss on them is the first to compare with.
    method: a row whose model has the gradient ("pursuit_steps", "global_steps": away from a minimum it is not zero).
        Of the row's `dampings` each, if it has some, at one solve and one more without the gradient.
    schedule: Iterative(15) by default; its stages' own methods are not used.

    Returns a Pruned. history: for each step sparsity, kept, predicted and measured (the change of the loss that the
    model taken foresaw, and on `held_out`), damping, gradient (whether that model has one), step (t), loss, shortened
    (how often this step was halved), over (it was taken although it raised the loss too far), seconds. Supports are
    nested.
    Raises ValueError for a rise below 1 or a loss on `held_out` that is not finite, and what `prune` raises.
    Source: the multi-stage CHITA++ of Benbaki et al. 2023, section 3.4, with a safeguard.
    """
    if not (isinstance(rise, Real) and 1 <= rise < math.inf):
        raise ValueError(
            f"rise={rise!r} is not a finite number >= 1; pass how many times higher a stage may leave the loss"
        )
    if not callable(batches):
        raise TypeError(
            "batches is no function; pass stage -> batches: lambda stage: [...] for the examples of a stage"
        )
    if not isinstance(constraint, Constraint):
        raise TypeError(f"constraint is {constraint!r}; pass a constraint such as Cardinality(sparsity=0.9)")
    row, judge = loss_row(method), Loss(fn, params, Batches(held_out, "held_out"), leaves)
    leaves, chosen, rest = judge.leaves, judge.center, judge.rest
    constraint = judge.on_matrices(constraint)
    constraint.check(chosen)
    before = judge.finite_value(chosen)
    waiting = [stage.cut for stage in stages_of(schedule or Iterative(15), constraint, chosen)]

    cut, index, live, support, solution = 0.0, 0, _tree.size(chosen), None, None
    history: list[dict[str, Any]] = []
    bar = tqdm(total=1.0, desc="staged", unit="cut", disable=not progress)
    while waiting:
        clock, key = time.perf_counter(), jax.random.fold_in(jax.random.key(0), index)
        objective = row.model(Network.of(fn, combine(chosen, rest), batches(index), leaves), key)
        models = [model for part in _without_and_with_gradient(objective) for model in damped(part, row.dampings)]
        solved = partial(judged, models, solver=row.solver, judge=judge, before=before, key=key, steps=_STEPS)
        limit = before + (rise - 1) * abs(before)
        goal, solution, loss, halved = _shortened(solved, constraint, support, (cut, waiting[0]), live, limit)
        waiting = waiting[1:] if goal == waiting[0] else waiting
        bar.update(goal - cut)
        kept = live = _tree.kept(solution.support)
        history.append(
            {"stage": index, "cut": goal, "sparsity": 1 - kept / _tree.size(chosen), "kept": kept}
            | {name: solution.stats[name] for name in (*FACTS, "gradient", "step") if name in solution.stats}
            | {"loss": loss, "shortened": halved, "over": not loss <= limit, "seconds": time.perf_counter() - clock}
        )
        chosen, support = solution.value, solution.support
        before, cut, index = loss, goal, index + 1
    bar.close()
    assert solution is not None
    return Pruned(combine(chosen, rest), support, {"*": solution}, history, constraint.scope())


def _shortened(
    solved: Callable[[Constraint], tuple[Solution, float]],
    constraint: Constraint,
    support: Tree | None,
    ends: tuple[float, float],
    live: int,
    limit: float,
) -> tuple[float, Solution, float, int]:
    """The stage between two cuts, halved while its loss is over `limit`: its end, solution, loss, and the halvings.

    The last is as it comes out; so is the shortest that leaves less than the `live` weights before it.
    """

    def taken(goal: float) -> tuple[float, Solution, float]:
        allowed = constraint if goal == 1 else constraint.relaxed(goal)
        return goal, *solved(allowed if support is None else Intersection((Support(support), allowed)))

    cut, goal = ends
    stage = taken(goal)
    for halved in range(_HALVINGS):
        goal, _, loss = stage
        if loss <= limit:
            return *stage, halved
        shorter = taken(cut + (goal - cut) / 2)
        if _tree.kept(shorter[1].support) == live:
            return *stage, halved
        stage = shorter
    return *stage, _HALVINGS


def _without_and_with_gradient(objective: Objective) -> list[Objective]:
    """The curvature of a quadratic model that has a gradient as well, then the whole; another as it is."""
    if isinstance(objective, Quadratic) and objective.gradient is not None and objective.curvature is not None:
        return [dataclasses.replace(objective, gradient=None), objective]
    return [objective]
