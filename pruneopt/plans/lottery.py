"""Lottery tickets: prune what training made, rewind what is left to where it came from, train again."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from pruneopt.constraints.base import Constraint
from pruneopt.delivery.apply import apply
from pruneopt.network.leaves import Choice, check_like
from pruneopt.plans.prune import FineTune, prune
from pruneopt.plans.schedules import Iterative
from pruneopt.solution import Pruned

Tree = Any


def lottery(
    params: Tree,
    train: FineTune,
    constraint: Constraint,
    *,
    rounds: int = 5,
    early: Callable[[Tree], Tree] | None = None,
    evaluate: Callable[[Tree], Any] | None = None,
    leaves: Choice = None,
    progress: bool = True,
) -> Pruned:
    """Find a support of `constraint` that trains well from the start: iterative magnitude pruning with rewinding.

        w <- train(start);  `rounds` times:  support <- the largest |w| within it;  w <- train(start on the support)

    Each round keeps the same fraction of what lives. `apply(start, result)` is the ticket, `result.params` the ticket
    trained, `history` has `evaluate` of every round's weights, pruned and tuned.

    params: the initial weights. train: (params, support) -> params, all of training with what is pruned held at zero;
        `plans.retrain` makes one. It is called with support None for the dense network.
    There is no method=: tickets are found by magnitude, and nothing here knows fn. For another criterion, `prune` with
    schedule=Iterative(rounds) and fine_tune=lambda w, support: train(apply(start, support), support).
    early: params -> params, the first steps of training: then `start` is early(params), rewinding to an early step
        (Frankle et al. 2020, section 4), else `params` themselves. constraint, leaves: as in `prune`.
    Source: Frankle and Carbin 2019, section 1, the iterative strategy with resetting. Raises as `prune`.
    """
    if not callable(train):
        raise TypeError(f"train is {train!r}; pass a function (params, support) -> params, such as plans.retrain(...)")
    if early is not None and not callable(early):
        raise TypeError(f"early is {early!r}; pass a function params -> params, the first steps of training, or None")
    start = params if early is None else early(params)

    check_like(start, params, "early's result")
    trained = train(start, None)
    check_like(trained, params, "train's result")

    def from_start(_: Tree, support: Tree) -> Tree:
        return train(apply(start, support), support)

    return prune(
        None,
        trained,
        None,
        constraint,
        schedule=Iterative(rounds),
        fine_tune=from_start,
        evaluate=evaluate,
        leaves=leaves,
        progress=progress,
    )
