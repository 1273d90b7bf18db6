"""Descent: an optax optimiser on a fixed support, the retraining step."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from pruneopt import _tree
from pruneopt.constraints import parts
from pruneopt.network import calls
from pruneopt.network.leaves import Rest, updated
from pruneopt.objectives.loss import Loss
from pruneopt.problem import Problem
from pruneopt.solvers.base import Outcome, Solver, Start, without_penalty

Tree = Any


@dataclass(frozen=True)
class Descent(Solver):
    """Lower the true loss with `optimizer`, one step a batch for `epochs` passes, weights off the support at zero.

    The support is that of `init`, the mask of a `Support` constraint, or everything. Gradients are masked before the
    optimiser sees them and weights after its step, so no momentum leaks. A loss with state (has_updates) has its
    running statistics advanced at every step; stats["rest"] holds them.

    stats: losses, the mean training loss of each epoch; rest, the leaves that were not trained.
    """

    optimizer: optax.GradientTransformation
    epochs: int = 1

    def __post_init__(self) -> None:
        if not isinstance(self.epochs, int) or self.epochs < 1:
            raise ValueError(f"epochs={self.epochs!r} is not a whole number >= 1; pass the number of passes to make")

    def refuses(self, problem: Problem) -> str | None:
        """A penalty, an objective other than `Loss`, or a constraint other than `Support`."""
        if not isinstance(problem.objective, Loss):
            return (
                f"Descent needs the objective Loss, not {type(problem.objective).__name__}; use Polish for a quadratic"
            )
        if not parts.of(problem.subject_to).fixed:
            return (
                f"Descent keeps a given support, and {type(problem.subject_to).__name__} is not one; select a support "
                "first, then pass subject_to=Support(mask)"
            )
        return without_penalty(problem, self)

    def run(self, problem: Problem, init: Start | None, key: jax.Array) -> Outcome:
        """Train."""
        f = problem.objective
        assert isinstance(f, Loss)
        everything = problem.full_support()
        support = everything if problem.subject_to is None else problem.subject_to.select(_ones(everything))
        if init is not None:
            support = jax.tree.map(jnp.logical_and, support, init.support)
        w = _tree.masked(f.center if init is None else init.value, support)
        w = jax.tree.map(jnp.asarray, w)
        state, rest, losses = self.optimizer.init(w), f.rest, []
        for _ in range(self.epochs):
            trace, sizes = [], []
            for batch in f.stream:
                sizes.append(f.stream.weight(batch))
                w, state, rest, loss = _step(self.optimizer, f.fn, f.has_updates, w, state, rest, batch, support)
                trace.append(loss)
            losses.append(float(np.average(np.asarray(jnp.stack(trace), np.float64), weights=sizes)))
            if not math.isfinite(losses[-1]):
                f.finite_value(f.center)  # names a batch whose loss is not finite before any step
        return Outcome(w, support, stats={"losses": losses, "rest": rest})


def _ones(like: Tree) -> Tree:
    return jax.tree.map(lambda x: jnp.ones(x.shape), like)


@partial(jax.jit, static_argnums=(0, 1, 2))
def _step(
    optimizer: optax.GradientTransformation,
    fn: calls.Loss,
    has_updates: bool,
    w: Tree,
    state: Any,
    rest: Rest,
    batch: Any,
    support: Tree,
) -> tuple[Tree, Any, Rest, jax.Array]:
    (loss, updates), gradient = jax.value_and_grad(calls.with_updates(fn, rest, batch, has_updates), has_aux=True)(w)
    w, state = stepped(optimizer, gradient, w, state, support)
    return w, state, updated(rest, updates), loss


def stepped(
    optimizer: optax.GradientTransformation, gradient: Tree, w: Tree, state: Any, support: Tree
) -> tuple[Tree, Any]:
    """(w, state) a step on, with nothing off the support in the gradient that the optimiser sees nor in w."""
    step, state = optimizer.update(_tree.masked(gradient, support), state, w)
    return _tree.masked(optax.apply_updates(w, step), support), state
