"""Thanos: block by block, all weights that an output loses in a block go jointly."""

from __future__ import annotations

import functools
from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float

from pruneopt._linalg import matmul
from pruneopt.constraints import parts
from pruneopt.objectives.prepared import Layer, regular_factor
from pruneopt.problem import Problem
from pruneopt.solvers.base import Outcome, Solver, Start, check_not_negative, check_whole, layer_only, outcome, prepared

# Outputs whose systems are solved together: enough to fill a device, few enough to keep their matrices small.
_OUTPUTS = 256


@dataclass(frozen=True)
class Thanos(Solver):
    """min 1/2 tr(D^T (H + lambda I) D), D = W - W0, block by block of inputs (Thanos).

    At each block the constraint selects among all inputs not yet swept by |w| ||x||_2 with their weights of that
    moment (what earlier blocks kept or cut stays so, and counts); the block's share of it is applied. The weights q
    that an output loses in the block go jointly: with C the inverse of H + lambda I on the inputs not yet swept,
    those move by -C_:q (C_qq)^-1 w_q, the exact optimum with w_q = 0 and the earlier blocks as they are. The kept
    weights of the block then stay. Follow with Polish for the optimum on the support.

    block: inputs a step, rounded down to whole groups for N:M, which a block chooses alone.
    damping: relative, lambda = damping * mean(diag H); multiplied by ten until the matrix has a Cholesky factor.

    Cost: n^3 and n^2 m and n m block^2 / 3 multiply-adds, the last in one Cholesky factor an output and block; one
    selection over the layer a block. Memory: four n x n and six n x m arrays, 4 block^2 for each of 256 outputs. Errors
    are those of float32 (float64 for float64 weights) times the condition of the damped H. `init` is not used.
    stats: damping (the one used). Where one budget is shared and inputs differ much, late
    weights have yet to grow when early blocks take theirs. Source: Ilin and Richtarik 2025 (Thanos), without its
    outlier rows.
    """

    block: int = 128
    damping: float = 0.01

    def __post_init__(self) -> None:
        check_whole(self, 1, "block")
        check_not_negative(self, "damping")

    def refuses(self, problem: Problem) -> str | None:
        """Other objectives than Reconstruction, a penalty, no constraint."""
        return layer_only(problem, self)

    def run(self, problem: Problem, init: Start | None, key: jax.Array) -> Outcome:
        """Factor, sweep."""
        assert problem.subject_to is not None
        ready = prepared(problem)
        factor, damping = regular_factor(ready, self.damping)
        found, block = parts.of(problem.subject_to, ndim=2), min(self.block, ready.center.shape[0])
        alone = found.run is not None and found.run <= block and all(choice.group for choice in found.choices)
        if alone:
            block -= block % (found.run or 1)
        value, support = _sweep(found.choices, block, alone, factor, ready, found.allowed(ready.center))
        return outcome(problem, ready, value, support, stats={"damping": float(damping)})


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _sweep(
    choices: tuple[parts.Choice, ...],
    block: int,
    alone: bool,
    factor: Float[Array, "n n"],
    ready: Layer,
    allowed: Bool[Array, "n m"],
) -> tuple[Float[Array, "n m"], Bool[Array, "n m"]]:
    n = ready.center.shape[0]
    extra = -n % block  # neutral inputs that fill the last block: zero weights, cut, uncoupled
    factor = jnp.pad(factor, (0, extra)) + jnp.diag((jnp.arange(n + extra) >= n).astype(factor.dtype))
    weights = jnp.pad(ready.center, ((0, extra), (0, 0)))
    live = jnp.pad(allowed & ~ready.gone[:, None], ((0, extra), (0, 0)))
    select = parts.Parts(choices=choices).select
    norm = jnp.pad(jnp.sqrt(jnp.diagonal(ready.gram)), (0, extra))[:, None]
    infinity = jnp.asarray(jnp.inf, weights.dtype)

    def chosen(start, weights, kept):
        """What lives of the block of inputs from `start`; the swept inputs stay as they are."""
        here = functools.partial(lax.dynamic_slice_in_dim, start_index=start, slice_size=block)
        costs = jnp.where(live, jnp.abs(weights) * norm, -infinity)
        if alone:
            return select(here(costs))
        swept = jnp.arange(n)[:, None] < start
        support = select(jnp.where(swept, jnp.where(kept[:n], infinity, -infinity), costs[:n]))
        return here(jnp.pad(support, ((0, extra), (0, 0))))

    def one_block(b, state):
        weights, kept, lives = state
        start = b * block
        here = functools.partial(lax.dynamic_slice_in_dim, start_index=start, slice_size=block)
        later = here(factor)  # zero for earlier inputs
        head = here(later, axis=1)
        multipliers = _multipliers(head, here(weights), ~lives)
        weights = weights - matmul(later.T, matmul(head, multipliers))
        kept = lax.dynamic_update_slice_in_dim(kept, lives, start, axis=0)
        swept = jnp.arange(n + extra)[:, None] < start + block
        weights = jnp.where(swept & ~kept, jnp.zeros((), weights.dtype), weights)
        return weights, kept, chosen(start + block, weights, kept)

    # Each block's choice is carried into its turn: within it, XLA would select again for every entry of every system.
    kept = jnp.zeros(weights.shape, bool)
    state = (weights, kept, chosen(0, weights, kept))
    weights, kept, _ = lax.fori_loop(0, (n + extra) // block, one_block, state)
    return weights[:n], kept[:n]


def _multipliers(head: Float[Array, "k k"], part: Float[Array, "k m"], gone: Bool[Array, "k m"]) -> Float[Array, "k m"]:
    """For each output (C_qq)^-1 w_q at its own q = gone and 0 elsewhere, C = head^T head."""
    inverse = matmul(head.T, head)
    scale = 1 / jnp.sqrt(jnp.diagonal(inverse))
    inverse = inverse * scale[:, None] * scale[None, :]
    ridge = 10 * jnp.finfo(part.dtype).eps  # rounding alone can make C_qq indefinite

    def one_output(output):
        w, q = output
        matrix = jnp.where(q[:, None] & q[None, :], inverse, jnp.zeros((), part.dtype))
        matrix = matrix + jnp.diag(jnp.where(q, jnp.asarray(ridge, part.dtype), jnp.ones((), part.dtype)))
        root = lax.linalg.cholesky(matrix, symmetrize_input=False)
        side = jnp.where(q, scale * w, jnp.zeros((), part.dtype))[:, None]
        solve = functools.partial(lax.linalg.triangular_solve, root, left_side=True, lower=True)
        return scale * solve(solve(side), transpose_a=True)[:, 0]

    found = lax.map(one_output, (part.T, gone.T), batch_size=min(_OUTPUTS, part.shape[1])).T
    return jnp.where(jnp.isfinite(found) & gone, found, jnp.zeros((), part.dtype))
