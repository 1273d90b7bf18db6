"""SparseSwaps: exchange kept for cut weights while the mask improves, the weights as they are."""

from __future__ import annotations

from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from pruneopt import _linalg
from pruneopt.problem import Problem
from pruneopt.solvers.base import Layer, Outcome, Solver, Start, layer, layer_only
from pruneopt.solvers.threshold import selected, swap_groups


@dataclass(frozen=True)
class SparseSwaps(Solver):
    """minimise 1/2 tr(Q^T (H + lambda I) Q), Q = (1 - M) * W0, over masks M in the constraint, by the best exchanges.

    For an output with lost weights q and c = H q, cutting p and restoring j changes q^T H q by

        2 w_p c_p + w_p^2 H_pp - 2 w_j c_j + w_j^2 H_jj - 2 w_p w_j H_pj,

    so that all pairs are judged at once. Every output makes its best exchange until none helps, at most `swaps`. From
    the support of `init`, else Wanda's; never worse than that support with W0's values. Exchanges stay inside an
    output, a group of N:M along the inputs, or a run of inputs that shares a budget; other constraints are refused.

    Cost: n^2 a swap and output. Memory: 3 n^2 numbers for each of the outputs at work. stats: swaps, of all outputs.
    Source: Zimmer et al. 2025 (SparseSwaps).
    """

    swaps: int = 100

    def __post_init__(self) -> None:
        if not isinstance(self.swaps, int) or self.swaps < 1:
            raise ValueError(f"swaps={self.swaps!r} is not a whole number >= 1; pass how many an output may make")

    def refuses(self, problem: Problem) -> str | None:
        """Any objective but Reconstruction, a penalty, no constraint, or one that exchanges in an output can break."""
        reason = layer_only(problem, self)
        if reason is None and swap_groups(problem.subject_to, problem.objective.center.shape) is None:
            return (
                f"SparseSwaps exchanges weights inside an output, which {problem.subject_to!r} does not allow; pass a "
                "Cardinality per 'tree', 'leaf', 'out' or run of inputs, NM along the inputs, or those within a Support"
            )
        return reason

    def run(self, problem: Problem, init: Start | None, key: jax.Array) -> Outcome:
        """Exchange."""
        constraint = problem.subject_to
        assert constraint is not None
        ready = layer(problem)
        if init is not None and problem.violation(init.support) == 0:
            support = init.support
        else:
            support = selected(constraint, ready.scores(ready.center**2 * jnp.diagonal(ready.gram)[:, None]))
        found = swap_groups(constraint, ready.center.shape)
        assert found is not None
        groups, allowed = found
        kept, swaps = _exchanged(ready, support, allowed, groups, self.swaps)
        swaps = np.asarray(swaps)
        limit = bool(np.any(swaps >= self.swaps))
        return ready.outcome(problem, ready.center, kept, hit_limit=limit, stats={"swaps": int(swaps.sum())})


@jax.jit
def _exchanged(
    ready: Layer,
    support: Bool[Array, "n m"],
    allowed: Bool[Array, "n m"],
    groups: Int[Array, " n"],
    limit: int,
) -> tuple[Bool[Array, "n m"], Int[Array, " m"]]:
    gram, infinity = ready.gram, jnp.asarray(jnp.inf, ready.gram.dtype)
    diagonal, apart = jnp.diagonal(gram), groups[:, None] != groups[None, :]
    n = gram.shape[0]

    def one_output(output: tuple[Float[Array, " n"], Bool[Array, " n"], Bool[Array, " n"]]):
        w, kept, free = output
        free = free & ~ready.dead
        lost = jnp.where(kept, jnp.zeros((), w.dtype), w)
        pull = _linalg.matmul(gram, lost[:, None])[:, 0]

        def best(kept, pull):
            cut = jnp.where(kept & ~ready.dead, 2 * w * pull + w * w * diagonal, infinity)
            grow = jnp.where(~kept & free, w * w * diagonal - 2 * w * pull, infinity)
            change = cut[:, None] + grow[None, :] - 2 * (w[:, None] * w[None, :]) * gram
            change = jnp.where(apart, infinity, change)
            place = jnp.argmin(change)
            return place // n, place % n, change.reshape(-1)[place]

        def step(state):
            kept, pull, (p, j, _), swaps = state
            kept = kept.at[p].set(False).at[j].set(True)
            pull = pull + w[p] * gram[:, p] - w[j] * gram[:, j]
            return kept, pull, best(kept, pull), swaps + 1

        tolerance = 1e-6 * jnp.abs(jnp.sum(lost * pull)) / n
        state = (kept, pull, best(kept, pull), jnp.asarray(0))
        kept, _, _, swaps = lax.while_loop(lambda s: (s[2][2] < -tolerance) & (s[3] < limit), step, state)
        return kept, swaps

    kept, swaps = lax.map(one_output, (ready.center.T, support.T, allowed.T))
    return kept.T, swaps
