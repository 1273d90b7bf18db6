"""Stages with a safeguard: the loss is modelled anew at each, and one that raises it too far is shortened."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from numbers import Real
from typing import Any

import jax
import numpy as np
from tqdm import tqdm

from pruneopt import _tree
from pruneopt.constraints.base import Constraint
from pruneopt.constraints.intersection import Intersection
from pruneopt.constraints.support import Support
from pruneopt.network.batches import Batches, Source
from pruneopt.network.leaves import Choice, check_finite, combine, partition
from pruneopt.objectives.loss import Loss
from pruneopt.plans.judged import FACTS, as_dampings, judged
from pruneopt.plans.methods import Method
from pruneopt.plans.methods import method as row_of
from pruneopt.plans.schedules import Iterative, Schedule, stages_of
from pruneopt.solution import Pruned

Tree = Any
_HALVINGS = 3  # of one stage, at most: an eighth of it is taken then, whatever it does


def staged(
    fn: Callable[[Tree, Any], Any],
    params: Tree,
    batches: Callable[[int], Source],
    constraint: Constraint,
    held_out: Source,
    *,
    method: str | Method = "chita_steps",
    schedule: Schedule | None = None,
    rise: float = 2.0,
    dampings: Sequence[float] = (),
    leaves: Choice = None,
    progress: bool = True,
) -> Pruned:
    """For each stage of `schedule`, minimise model(w) subject to `constraint` relaxed to the stage's cut.

    The model is built anew at the weights of the stage before.

    The loss on `held_out` is measured after every stage. A stage after which it is more than `rise` times what it was
    (for one below zero: higher by more than rise - 1 times its size) is taken back and made half as long, with the same
    model, up to three times; what is still to be cut follows in further stages. The eighth of a stage, or the shortest
    that cuts a weight, is taken whatever it does, and `history` says so.

    fn: loss(params, batch) -> scalar, a mean over examples. batches: stage -> the examples that its model reads.
    held_out: examples that no stage reads; the trained network's loss on them is the first to compare with.
    method: a row whose model has the gradient ("chita_steps", "global_steps": away from a minimum it is not zero).
    schedule: Iterative(15) by default; its stages' own methods are not used.
    dampings: relative ridges (lambda / mean diag H) of which each stage keeps the one with the least loss on
        `held_out`, at one solve each; empty for the row's own.

    Returns a Pruned. history: for each step sparsity, kept, predicted and measured (the change of the loss that the
    model foresaw, and on `held_out`), damping, loss, shortened (how often this step was halved), over (it was taken
    although it raised the loss too far), seconds. Supports are nested.
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
    row = row_of(method)
    chosen, rest = partition(params, leaves)
    check_finite(chosen, "params")
    constraint.check(chosen)
    judge = Loss(fn, params, Batches(held_out, "held_out"), leaves)
    before = judge.finite_value(chosen)
    waiting = [stage.cut for stage in stages_of(schedule or Iterative(15), constraint, chosen)]
    tried = as_dampings("dampings", dampings) if np.size(dampings) else ()

    cut, index, live, support, solution = 0.0, 0, _tree.size(chosen), None, None
    history: list[dict[str, Any]] = []
    bar = tqdm(total=1.0, desc="staged", unit="cut", disable=not progress)
    while waiting:
        clock, key = time.perf_counter(), jax.random.fold_in(jax.random.key(0), index)
        objective = row.model(fn, combine(chosen, rest), batches(index), leaves, key)
        halved, goal, longer = 0, waiting[0], None
        while True:
            allowed = constraint if goal == 1 else constraint.relaxed(goal)
            allowed = allowed if support is None else Intersection((Support(support), allowed))
            solution, loss = judged(objective, allowed, row.solver, judge, before, key, tried)
            if longer is not None and _tree.kept(solution.support) == live:  # so short that it cuts nothing
                over, halved, (goal, solution, loss) = True, halved - 1, longer
                break
            over = not loss <= before + (rise - 1) * abs(before)
            if not over or halved == _HALVINGS:
                break
            longer = goal, solution, loss
            halved, goal = halved + 1, cut + (goal - cut) / 2
        waiting = waiting[1:] if goal == waiting[0] else waiting
        bar.update(goal - cut)
        kept = live = _tree.kept(solution.support)
        history.append(
            {"stage": index, "cut": goal, "sparsity": 1 - kept / _tree.size(chosen), "kept": kept}
            | {name: solution.stats[name] for name in FACTS if name in solution.stats}
            | {"loss": loss}
            | {"shortened": halved, "over": over, "seconds": time.perf_counter() - clock}
        )
        chosen, support = solution.value, solution.support
        before, cut, index = loss, goal, index + 1
    bar.close()
    assert solution is not None
    return Pruned(combine(chosen, rest), support, {"*": solution}, history)
