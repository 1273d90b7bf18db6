"""Train with a penalty, prune what it made small, retrain without it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from pruneopt.constraints.base import Constraint
from pruneopt.constraints.laid import laid
from pruneopt.network.leaves import Choice
from pruneopt.plans.prune import FineTune, prune
from pruneopt.solution import Pruned
from pruneopt.structure.layout import Layout

Tree = Any


def penalised(
    params: Tree,
    shrink: FineTune,
    constraint: Constraint,
    fine_tune: FineTune,
    *,
    evaluate: Callable[[Tree], Any] | None = None,
    layout: Layout | None = None,
    leaves: Choice = None,
    progress: bool = True,
) -> Pruned:
    """w <- argmin f + penalty by `shrink`; the support of `constraint` with the largest |w|; w <- argmin f on it.

    The penalty moves the loss to few weights, the cut meets the count to the unit, and retraining without the penalty
    takes its bias away (debiasing).

    shrink: (params, None) -> params, such as
        retrain(loss, batches, training.proximal(optax.adam(a), L1(1e-4), a, metric=training.adam_metric())).
    fine_tune: (params, support) -> params, such as retrain(loss, batches, optax.adam(a)). layout: the matrices of
        leaves that are no plain (n_in, n_out), `structure.layout(fn, params, batch)`. The rest as in `prune`.
    Source: Liu et al. 2015 and 2017 (train with the penalty, prune, retrain). Raises as `prune`.
    """
    for name, call in (("shrink", shrink), ("fine_tune", fine_tune)):
        if not callable(call):
            raise TypeError(
                f"{name} is {call!r}; pass a function (params, support) -> params, such as plans.retrain(...)"
            )
    small = shrink(params, None)
    return prune(
        None,
        small,
        None,
        laid(constraint, layout),
        fine_tune=fine_tune,
        evaluate=evaluate,
        leaves=leaves,
        progress=progress,
    )
