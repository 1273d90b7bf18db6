"""Frank-Wolfe on the relaxation of the mask, the weights as they are."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float

from pruneopt import _linalg
from pruneopt.constraints.base import Constraint
from pruneopt.objectives.prepared import Layer
from pruneopt.problem import Problem
from pruneopt.solvers.base import Outcome, Solver, Start, check_whole, layer_only, outcome, prepared


@dataclass(frozen=True)
class FrankWolfe(Solver):
    """minimise f(M) = 1/2 tr(Q^T (H + lambda I) Q), Q = (1 - M) * W0, over masks M in the constraint.

    The mask alone: what is kept has the value it had.

    Over the convex hull of the constraint's masks, from the mask of Wanda's score or of `init`: with the gradient
    -W0 * (H Q), step towards the mask that the constraint selects for W0 * (H Q), by the exact length. Each point is
    rounded by selection, and the best mask is kept. The constraint's selection must be exact.

    stats: iterations; mask_gap, (f(mask) - bound) / f(mask) with bound = f(M) - <gradient, M - step>, the largest seen:
    how far the mask can be from the best one for weights that stay as they are. Refitted weights can lie below that
    bound, so it is not the solution's. In the arithmetic of the weights: below 1e-5 it means nothing in float32.
    Cost: 2 products of n^2 m an iteration. Memory: n^2 + 8 n m numbers.
    Source: Roux, Zimmer and Pokutta 2025 (pruning by Frank-Wolfe); Jaggi 2013 for the gap.
    """

    iterations: int = 100

    def __post_init__(self) -> None:
        check_whole(self, 1, "iterations")

    @property
    def never_worse_than(self) -> frozenset[str]:
        """W0 on the support of a feasible init."""
        return frozenset({"mask"})

    def refuses(self, problem: Problem) -> str | None:
        """Any objective but Reconstruction, a penalty, no constraint, or one whose selection is not exact."""
        reason = layer_only(problem, self)
        if reason is None and problem.subject_to is not None and not problem.subject_to.exact:
            return f"FrankWolfe needs a constraint with an exact selection, and that of {problem.subject_to!r} is not"
        return reason

    def run(self, problem: Problem, init: Start | None, key: jax.Array) -> Outcome:
        """Step, round, keep the best."""
        assert problem.subject_to is not None
        ready = prepared(problem)
        support = None if init is None else init.support
        found = _searched(problem.subject_to, ready, support, self.iterations)
        error, bound = float(found.error), float(found.bound)
        gap = (error - bound) / error if error > 0 else 0.0
        return outcome(
            problem, ready, ready.center, found.best, stats={"iterations": self.iterations, "mask_gap": max(gap, 0.0)}
        )


class _State(NamedTuple):
    mask: Float[Array, "n m"]
    pull: Float[Array, "n m"]  # H Q
    best: Bool[Array, "n m"]
    error: Float[Array, ""]  # f(best)
    bound: Float[Array, ""]


@partial(jax.jit, static_argnums=0)
def _searched(constraint: Constraint, ready: Layer, support: Bool[Array, "n m"] | None, iterations: int) -> _State:
    w0, zero = ready.center, jnp.zeros((), ready.center.dtype)
    half = jnp.asarray(0.5, w0.dtype)
    product = partial(_linalg.matmul, ready.gram)

    def step(_, state):
        score = w0 * state.pull
        # What would raise the error is left out: every set here is closed downwards.
        corner = constraint.select(ready.scores(jnp.where(score > 0, score, -jnp.inf)))
        toward = jnp.where(corner, 1 - state.mask, -state.mask)
        gain = jnp.sum(score * toward)
        moved = product(w0 * toward)
        curved = jnp.sum(w0 * toward * moved)
        bound = half * jnp.sum((1 - state.mask) * score) - gain
        length = jnp.where(curved > 0, jnp.clip(gain / jnp.where(curved > 0, curved, 1), 0, 1), zero)
        mask = state.mask + length * toward
        rounded = constraint.select(ready.scores(mask))
        lost = jnp.where(rounded, zero, w0)
        error = half * jnp.sum(lost * product(lost))
        better = error < state.error
        return _State(
            mask,
            state.pull - length * moved,
            jnp.where(better, rounded, state.best),
            jnp.minimum(error, state.error),
            jnp.maximum(state.bound, bound),
        )

    if support is None:
        support = constraint.select(ready.scores(w0 * w0 * jnp.diagonal(ready.gram)[:, None]))
    kept = ready.counted(jnp.asarray(support))
    lost = jnp.where(kept, zero, w0)
    pull = product(lost)
    first = _State(kept.astype(w0.dtype), pull, kept, half * jnp.sum(lost * pull), zero)
    return lax.fori_loop(0, iterations, step, first)
