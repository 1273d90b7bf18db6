"""Retraining between cuts, as a function to pass to `prune(fine_tune=...)`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import optax

from pruneopt import _data
from pruneopt.constraints.support import Support
from pruneopt.objectives.loss import Loss
from pruneopt.problem import Problem
from pruneopt.solve import solve
from pruneopt.solvers.descent import Descent
from pruneopt.structure.leaves import Choice, combine, is_trainable

Tree = Any


def retrain(
    fn: Callable[[Tree, Any], Any],
    batches: _data.Source,
    optimizer: optax.GradientTransformation,
    *,
    epochs: int = 1,
    trained: Choice = is_trainable,
    has_updates: bool = False,
) -> Callable[[Tree, Tree], Tree]:
    """A function (params, support) -> params that lowers the loss with pruned weights held at zero.

    fn: loss(params, batch) -> scalar, or (scalar, updates) with has_updates=True: the network in training mode.
    trained: which leaves move (default: floating arrays but running statistics, so biases and scales too).
    Each call starts a new optimiser state and makes `epochs` passes. Raises what `Loss` and `Descent` raise.
    """
    solver = Descent(optimizer, epochs)

    def fine_tune(params: Tree, support: Tree) -> Tree:
        problem = Problem(Loss(fn, params, batches, trained, has_updates), subject_to=Support(support))
        solution = solve(problem, solver)
        return combine(solution.value, solution.stats["rest"])

    return fine_tune
