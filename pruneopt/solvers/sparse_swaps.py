"""SparseSwaps: exchange kept for cut weights while the mask improves, the weights as they are."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from pruneopt import _linalg
from pruneopt.constraints import parts
from pruneopt.objectives.prepared import Layer
from pruneopt.problem import Problem
from pruneopt.solvers.base import Outcome, Solver, Start, check_whole, layer_only, no_exchange, outcome, prepared
from pruneopt.solvers.threshold import selected

_PAIRS = 1 << 21  # of weights that are judged together, over several outputs


@dataclass(frozen=True)
class SparseSwaps(Solver):
    """minimise 1/2 tr(Q^T (H + lambda I) Q), Q = (1 - M) * W0, over masks M in the constraint, by the best exchanges.

    For an output with lost weights q and c = H q, cutting p and restoring j changes q^T H q by

        2 w_p c_p + w_p^2 H_pp - 2 w_j c_j + w_j^2 H_jj - 2 w_p w_j H_pj,

    so that all pairs are judged at once. Every output makes its best exchange until none helps, at most `swaps`. From
    the support of `init`, else Wanda's; never worse than that support with W0's values. Exchanges stay inside an
    output, a group of N:M along the inputs, or a run of inputs that shares a budget; other constraints are refused.

    Cost: n times the group's length a swap and output. Memory: 2^22 numbers for the outputs at work, and n^2.
    stats: swaps, of all outputs.
    Source: Zimmer et al. 2025 (SparseSwaps).
    """

    swaps: int = 100

    def __post_init__(self) -> None:
        check_whole(self, 1, "swaps")

    @property
    def never_worse_than(self) -> frozenset[str]:
        """W0 on the support of a feasible init."""
        return frozenset({"mask"})

    def refuses(self, problem: Problem) -> str | None:
        """Any objective but Reconstruction, a penalty, no constraint, or one that exchanges in an output can break."""
        return layer_only(problem, self) or no_exchange(problem, self)

    def run(self, problem: Problem, init: Start | None, key: jax.Array) -> Outcome:
        """Exchange."""
        constraint = problem.subject_to
        assert constraint is not None
        ready = prepared(problem)
        if init is not None:
            support = init.support
        else:
            support = selected(constraint, ready.scores(ready.center**2 * jnp.diagonal(ready.gram)[:, None]))
        found = parts.exchanges(constraint, ready.center.shape)
        assert found is not None
        group, allowed = found
        kept, swaps, helps = _exchanged(self.swaps, group, ready, support, jnp.asarray(allowed))
        stats = {"swaps": int(jnp.sum(swaps))}
        return outcome(problem, ready, ready.center, kept, hit_limit=bool(jnp.any(helps)), stats=stats)


class _State(NamedTuple):
    """One output: what it keeps, c = H q, the swaps made, and the pair to exchange if that helps."""

    kept: Bool[Array, " n"]
    pull: Float[Array, " n"]
    swaps: Int[Array, ""]
    pair: tuple[Int[Array, ""], Int[Array, ""]]
    helps: Bool[Array, ""]


@partial(jax.jit, static_argnums=(0, 1))
def _exchanged(
    limit: int, group: int, ready: Layer, start: Bool[Array, "n m"], allowed: Bool[Array, "n m"]
) -> tuple[Bool[Array, "n m"], Int[Array, " m"], Bool[Array, " m"]]:
    """The masks, how many swaps each output made, and whether one more would have helped."""
    gram, dtype = ready.gram, ready.gram.dtype
    n, m = start.shape
    missing = -n % group
    groups = (n + missing) // group
    every = jnp.arange(groups)
    blocks = jnp.pad(gram, (0, missing)).reshape(groups, group, groups, group)[every, :, every]
    diagonal, never, zero = jnp.diagonal(gram), jnp.asarray(jnp.inf, dtype), jnp.zeros((), dtype)

    def grouped(x: Array, fill: Array) -> Array:
        return jnp.pad(x, (0, missing), constant_values=fill).reshape(groups, group)

    def one_output(given: tuple[Array, Array, Array, Array]) -> tuple[Array, Array, Array]:
        w, kept, free, pull = given
        alone, weights = diagonal * w * w / 2, grouped(w, zero)

        def state(kept: Array, pull: Array, swaps: Array) -> _State:
            leaves = grouped(jnp.where(kept, alone + w * pull, never), never)
            enters = grouped(jnp.where(free & ~kept, alone - w * pull, never), never)
            pairs = leaves[:, :, None] - weights[:, :, None] * weights[:, None, :] * blocks + enters[:, None, :]
            enter = jnp.argmin(jnp.min(pairs, axis=1).reshape(-1))  # reduced before the argmin, which is the slow part
            row, column = enter // group, enter % group
            joint = weights[row] * weights[row, column] * blocks[row, :, column]
            gains = leaves[row] - joint + enters[row, column]
            place = jnp.argmin(gains)
            terms = jnp.abs(leaves[row, place]) + jnp.abs(joint[place]) + jnp.abs(enters[row, column])
            helps = gains[place] < -16 * jnp.finfo(dtype).eps * terms
            return _State(kept, pull, swaps, (row * group + place, enter), helps)

        def swap(now: _State) -> _State:
            leave, enter = now.pair
            kept = now.kept.at[leave].set(False).at[enter].set(True)
            return state(kept, now.pull + w[leave] * gram[leave] - w[enter] * gram[enter], now.swaps + 1)

        last = lax.while_loop(lambda s: s.helps & (s.swaps < limit), swap, state(kept, pull, jnp.asarray(0)))
        return last.kept, last.swaps, last.helps

    def pulls(mask: Array) -> tuple[Array, Array]:
        lost = jnp.where(mask, zero, ready.center)
        pull = _linalg.matmul(gram, lost)
        return pull, jnp.sum(lost * pull, axis=0)

    start = ready.counted(start)
    pull, before = pulls(start)
    rows = (ready.center.T, start.T, ready.counted(allowed).T, pull.T)
    kept, swaps, helps = lax.map(one_output, rows, batch_size=min(m, max(1, _PAIRS // (n * group))))
    worse = pulls(kept.T)[1] > before  # by rounding
    return jnp.where(worse[None, :], start, kept.T), swaps, helps
