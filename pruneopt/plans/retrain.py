"""Retraining between cuts, as a function to pass to `prune(fine_tune=...)`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import optax

from pruneopt import _tree
from pruneopt.constraints.support import Support
from pruneopt.network import calls
from pruneopt.network.batches import Batches, Source
from pruneopt.network.leaves import Choice, combine, is_trainable
from pruneopt.objectives.loss import Loss
from pruneopt.problem import Problem
from pruneopt.solve import solve
from pruneopt.solvers.descent import Descent

Tree = Any


def retrain(
    fn: Callable[[Tree, Any], Any],
    batches: Source,
    optimizer: optax.GradientTransformation,
    *,
    epochs: int = 1,
    trained: Choice = None,
    has_updates: bool = False,
) -> Callable[[Tree, Tree], Tree]:
    """A function (params, support) -> params that lowers the loss with pruned weights held at zero.

    fn: loss(params, batch) -> scalar, or (scalar, updates) with has_updates=True: the network in training mode.
    trained: which leaves move (default: all floating arrays, biases and scales too, but those that `updates` replaces
        and running statistics by name).
    Each call starts a new optimiser state and makes `epochs` passes; it compiles once for each `fn` and `optimizer`
    object. Raises what `Loss` and `Descent` raise.
    """
    solver = Descent(optimizer, epochs)

    def fine_tune(params: Tree, support: Tree) -> Tree:
        choice = trained if trained is not None else _default(fn, params, batches, has_updates)
        loss = Loss(fn, params, batches, choice, has_updates)
        moving = {path for path, _ in _tree.named_leaves(loss.center)}
        masks = {path: mask for path, mask in _tree.named_leaves(support) if path in moving}
        problem = Problem(loss, subject_to=Support(masks))
        solution = solve(problem, solver)
        return combine(solution.value, solution.stats["rest"])

    return fine_tune


def _default(fn: Callable[[Tree, Any], Any], params: Tree, batches: Source, has_updates: bool) -> Choice:
    replaced: set[str] = set()
    if has_updates:
        out = calls.outputs(fn, params, next(iter(Batches(batches))))
        if isinstance(out, tuple) and len(out) == 2:  # else Loss says what is wrong
            replaced = {path for path, _ in _tree.named_leaves(out[1])}
    return lambda path, leaf: is_trainable(path, leaf) and path not in replaced
