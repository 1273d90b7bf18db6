"""Block OBS (SparseGPT): one sweep over the inputs; those not yet swept make up for what goes."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float

from pruneopt._linalg import matmul
from pruneopt.constraints import parts
from pruneopt.objectives.prepared import Layer, regular_factor
from pruneopt.problem import Problem
from pruneopt.solvers.base import Outcome, Solver, Start, check_not_negative, check_whole, layer_only, outcome, prepared


@dataclass(frozen=True)
class BlockOBS(Solver):
    """min 1/2 tr(D^T (H + lambda I) D), D = W - W0, in one sweep over the inputs (SparseGPT).

    With the upper Cholesky factor U of the inverse, (H + lambda I)^-1 = U^T U: input j of every output in turn keeps
    its weight or loses it, and a weight w that goes moves the later ones by -(w / U_jj) U_j,later. What goes is chosen
    by w^2 / U_jj^2, the rise of the objective if all earlier inputs stay as they are, from the weights as they are when
    the sweep arrives. Earlier weights never move again; follow with Polish for the optimum on the support.

    block: inputs that share a choice, and between two products that update all later inputs.
    damping: relative, lambda = damping * mean(diag H); multiplied by ten until the matrix has a Cholesky factor.

    Choices: each group of N:M, and each run of `Cardinality(per="in", span=...)`, when the sweep reaches it (the
    published budgets; the second with span=block); `block` is rounded down to whole groups or runs. Any other
    constraint once a block, for the whole matrix: what is kept or cut stays so, and the inputs to come are ranked
    by the same formula with their weights of that moment, so that one budget is shared. Later weights have yet to grow
    by what earlier blocks lose: where inputs differ much and little is kept, runs can be the better budget.

    Cost: 2/3 n^3 and n^2 m multiply-adds, n dependent steps of `block` m; one selection over the layer a block where
    the budget is shared. Memory: four n x n and six n x m arrays. Errors are those of float32 (float64 for float64
    weights) times the condition of the damped H. `init` is not used.
    stats: damping (the one used). Source: Frantar and Alistarh 2023 (SparseGPT), algorithm 1, section 3.
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
        found = parts.of(problem.subject_to, ndim=2)
        choice = _choice(found, self.block, ready.center.shape[0])
        value, support = _sweep(choice, factor, ready, found.allowed(ready.center))
        return outcome(problem, ready, value, support, stats={"damping": float(damping)})


class _Choice(NamedTuple):
    """How weights are chosen: `run` inputs at a time, alone or with the whole matrix in view; `block` is whole runs."""

    by: tuple[parts.Choice, ...]
    block: int
    run: int
    alone: bool


def _choice(found: parts.Parts, block: int, inputs: int) -> _Choice:
    block = min(block, inputs)
    if found.run is None or found.run > block:
        return _Choice(found.choices, block, block, alone=False)
    block -= block % found.run
    return _Choice(found.choices, block, found.run if found.run > 1 else block, alone=True)


@functools.partial(jax.jit, static_argnums=0)
def _sweep(
    choice: _Choice, factor: Float[Array, "n n"], ready: Layer, allowed: Bool[Array, "n m"]
) -> tuple[Float[Array, "n m"], Bool[Array, "n m"]]:
    by, block, run, alone = choice
    select = parts.Parts(choices=by).select
    n = ready.center.shape[0]
    extra = -n % block  # neutral inputs that fill the last block: zero weights, cut, uncoupled
    factor = jnp.pad(factor, (0, extra)) + jnp.diag((jnp.arange(n + extra) >= n).astype(factor.dtype))
    weights = jnp.pad(ready.center, ((0, extra), (0, 0)))
    live = jnp.pad(allowed & ~ready.gone[:, None], ((0, extra), (0, 0)))
    price = (1 / jnp.diagonal(factor) ** 2)[:, None]
    zero, infinity = jnp.zeros((), weights.dtype), jnp.asarray(jnp.inf, weights.dtype)

    def chosen(start, now, weights, kept):
        """What lives of the run of inputs from `start`, whose weights are `now`."""
        if alone:
            costs = now**2 * lax.dynamic_slice_in_dim(price, start, run)
            costs = jnp.where(lax.dynamic_slice_in_dim(live, start, run), costs, -infinity)
            last = n % run
            if last == 0:
                return select(costs)
            # The last run is shorter and has a budget of its own, which the choices know after a full one.
            ended = jnp.concatenate([jnp.full_like(costs, -jnp.inf), costs[:last]])
            return lax.cond(
                start + run > n,
                lambda: jnp.pad(select(ended)[run:], ((0, run - last), (0, 0))),
                lambda: select(costs),
            )
        swept = jnp.arange(n)[:, None] < start
        costs = jnp.where(swept, jnp.where(kept[:n], infinity, -infinity), weights[:n] ** 2 * price[:n])
        support = select(jnp.where(live[:n], costs, -infinity))
        return lax.dynamic_slice_in_dim(jnp.pad(support, ((0, extra), (0, 0))), start, run)

    def one_block(b, state):
        weights, kept = state
        start = b * block
        later = lax.dynamic_slice_in_dim(factor, start, block)  # zero for earlier inputs
        head = lax.dynamic_slice_in_dim(later, start, block, axis=1)
        part = lax.dynamic_slice_in_dim(weights, start, block)

        def one_run(r, state):
            errors, lives = state
            at = r * run
            now = lax.dynamic_slice_in_dim(part, at, run)
            now = now - matmul(lax.dynamic_slice_in_dim(head, at, run, axis=1).T, errors)
            keep = chosen(start + at, now, weights, kept)
            new = _errors(lax.dynamic_slice(head, (at, at), (run, run)), now, keep)
            return _put(errors, new, at), _put(lives, keep, at)

        empty = (jnp.zeros_like(part), jnp.zeros(part.shape, bool))
        errors, lives = lax.fori_loop(0, block // run, one_run, empty)
        return weights - matmul(later.T, errors), _put(kept, lives, start)

    kept = jnp.zeros(weights.shape, bool)
    weights, kept = lax.fori_loop(0, (n + extra) // block, one_block, (weights, kept))
    return jnp.where(kept, weights, zero)[:n], kept[:n]


def _errors(factor: Float[Array, "k k"], now: Float[Array, "k m"], keep: Bool[Array, "k m"]) -> Float[Array, "k m"]:
    """Sweep inputs with weights `now` and a mask: w / U_jj for what goes, by which the later ones move; else 0."""

    def one_input(j, errors):
        w = lax.dynamic_slice_in_dim(now, j, 1) - matmul(lax.dynamic_slice_in_dim(factor, j, 1, axis=1).T, errors)
        error = w / lax.dynamic_slice(factor, (j, j), (1, 1))
        return _put(errors, jnp.where(lax.dynamic_slice_in_dim(keep, j, 1), jnp.zeros_like(w), error), j)

    return lax.fori_loop(0, now.shape[0], one_input, jnp.zeros_like(now))


def _put(array: Array, rows: Array, start: Array) -> Array:
    return lax.dynamic_update_slice_in_dim(array, rows, start, axis=0)
