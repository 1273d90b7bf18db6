"""Exchange one kept for one cut weight of an output, all others refitted, while that lowers the error."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Bool, Float

from pruneopt import _linalg, _tree
from pruneopt.constraints import parts
from pruneopt.objectives.prepared import Layer
from pruneopt.problem import Problem
from pruneopt.solvers.base import Outcome, Solver, Start, check_not_negative, check_whole, layer_only, outcome, prepared
from pruneopt.solvers.polish import refit
from pruneopt.solvers.threshold import no_exchange, swap_groups

Tree = Any
_SAMPLE = 5e7  # multiply-adds that a solution's own measure may take
_LEAST = 1e-9  # gain of a swap, of its output's error: below it rounding decides


@dataclass(frozen=True)
class Swap(Solver):
    """minimise 1/2 tr((W - W0)^T (H + lambda I) (W - W0)) over W in the constraint, by the best exchanges with refits.

    For an output with support S, P = (H_SS)^-1, T = H P, residual g = H (w0 - w) and s_j = H_jj - H_jS P H_Sj, putting
    j in the place of i and refitting all that is kept lowers twice the error by exactly

        (g_j + T_ji w_i / P_ii)^2 / (s_j + T_ji^2 / P_ii) - w_i^2 / P_ii.

    All pairs are judged at once, every output makes its best exchange, and P, T, g and w follow by two rank-one
    updates, until none helps: the support is then optimal against every single exchange. From the support of `init`,
    or all that a `Support` allows; never worse than its exact refit. Exchanges stay inside an output, a group of N:M
    along the inputs, or a run of inputs that shares a budget; other constraints are refused.

    steps: exchanges that an output may make. damping: relative, added to H for singular ones. memory: bytes.
    Cost: 2 n^3 an output, and 6 n^2 a swap, in float64. Memory: 48 n^2 bytes for each output at work, `memory` in all.
    stats: swaps, largest_gain (see the function of that name; at most 1e-9 unless the limit was met).
    Source: Hassibi and Stork 1993 (equation 5) for what goes, and its reverse for what comes.
    """

    steps: int = 50
    damping: float = 1e-8
    memory: int = 1 << 29

    def __post_init__(self) -> None:
        check_whole(self, 1, "steps", "memory")
        check_not_negative(self, "damping")

    @property
    def never_worse_than(self) -> frozenset[str]:
        """A feasible init and its refit: the result is the refit of its own support."""
        return frozenset({"init", "refit", "zero"})

    def refuses(self, problem: Problem) -> str | None:
        """Any objective but Reconstruction, a penalty, no constraint, or one that exchanges in an output can break."""
        return layer_only(problem, self) or no_exchange(problem, self)

    def run(self, problem: Problem, init: Start | None, key: jax.Array) -> Outcome:
        """Refit, exchange, refit."""
        found = parts.of(problem.subject_to)
        if init is None and not found.fixed:
            raise ValueError("init is None, but Swap improves a given support; pass init=, or Then(another, Swap())")
        ready = prepared(problem)
        start = problem.full_support() if init is None else init.support
        if found.fixed:
            start = start & found.allowed(start)
        swapped = _swapped(problem, ready, np.asarray(start), self.steps, self.damping, self.memory)
        gram, center = np.asarray(ready.gram, np.float64), np.asarray(ready.center, np.float64)
        candidates = []
        for support in (swapped.support, np.asarray(start) & ~np.asarray(ready.gone)[:, None]):
            value, _ = refit(gram, center, support, 0.0)
            change = value - center
            candidates.append((np.sum(change * (gram @ change), axis=0), value, support))
        errors = candidates[0][0]
        _, value, support = min(candidates, key=lambda row: float(np.sum(row[0])))
        shares = swapped.gains / np.where(errors > 0, errors, np.inf)
        stats = {"swaps": int(swapped.swaps.sum()), "largest_gain": float(np.max(shares, initial=0.0))}
        limit = bool(np.any((swapped.swaps >= self.steps) & (swapped.gains > 0)))
        dtype = ready.center.dtype
        return outcome(problem, ready, jnp.asarray(value, dtype), jnp.asarray(support), hit_limit=limit, stats=stats)


@_tree.on_host
def largest_gain(problem: Problem, support: Tree, outputs: int | None = None) -> float:
    """By which part of its error the best single exchange in an output would lower that, all kept weights refitted.

    0: no exchange helps, the support is 1-swap optimal. The largest over all outputs, or over `outputs` of them evenly
    spaced: then it is a lower bound. Exact for the refitted support, in float64 on the host; |S|^3 + n |S|^2 an output.
    Raises ValueError where the constraint does not let weights of an output change places.
    """
    if reason := Swap().refuses(problem):
        raise ValueError(reason)
    ready, mask = prepared(problem), np.asarray(support)
    (n, m), allowed = mask.shape, swap_groups(problem.subject_to, mask.shape)
    assert allowed is not None
    run, free = allowed
    live, runs = ~np.asarray(ready.gone)[:, None], np.arange(n) // run
    gram, center = np.asarray(ready.gram), np.asarray(ready.center)
    ridge = Swap.damping * float(ready.mean)
    some = np.unique(np.linspace(0, m - 1, m if outputs is None else min(outputs, m)).round().astype(int))
    kept, free = mask & live, free & live
    return max(_gain(gram, ridge, center[:, o].astype(np.float64), kept[:, o], free[:, o], runs) for o in some)


def sampled_gain(problem: Problem, support: Tree) -> dict[str, Any]:
    """`largest_gain` over so many outputs as cost little, for a solution's stats; empty where it is not defined."""
    if Swap().refuses(problem):
        return {}
    n, m = support.shape
    outputs = min(m, max(1, int(_SAMPLE // n**3)))
    return {"largest_gain": largest_gain(problem, support, outputs), "gain_outputs": outputs}


def _gain(
    gram: np.ndarray, ridge: float, w0: np.ndarray, kept: np.ndarray, free: np.ndarray, runs: np.ndarray
) -> float:
    """The gain of one output's best exchange, over its error."""
    s, cut, rest = np.flatnonzero(kept), np.flatnonzero(~kept), np.flatnonzero((free & ~kept)[~kept])
    if not (s.size and rest.size):
        return 0.0
    own, across_cut, below = (gram[np.ix_(i, j)].astype(np.float64) for i, j in ((s, s), (cut, s), (cut, cut)))
    for square in (own, below):
        np.einsum("ii->i", square)[:] += ridge
    inverse = _linalg.inverse_on_host(own)
    if inverse is None:  # more singular than its damping mends
        return 0.0
    moved = inverse @ (w0[cut] @ across_cut)  # w - w0 on the support
    w, residual = w0[s] + moved, below @ w0[cut] - across_cut @ moved
    error = float(w0[cut] @ residual)
    if not error > 0:
        return 0.0
    gram_across = across_cut[rest]
    across, pivot, diagonal = gram_across @ inverse, np.diagonal(inverse), np.diagonal(below)[rest]
    schur = np.maximum(diagonal - np.einsum("ij,ij->i", across, gram_across), 1e-12 * diagonal)
    top = residual[rest, None] + across * (w / pivot)
    gain = top**2 / (schur[:, None] + across**2 / pivot) - w**2 / pivot
    best = float(np.max(gain, where=runs[cut[rest], None] == runs[s], initial=0.0)) / error
    return best if best > _LEAST else 0.0


class _Found(NamedTuple):
    support: Bool[np.ndarray, "n m"]
    swaps: np.ndarray
    gains: np.ndarray  # twice the fall of the error by each output's best further exchange, 0 if none helps


def _swapped(problem: Problem, ready: Layer, start: Any, steps: int, damping: float, memory: int) -> _Found:
    allowed = swap_groups(problem.subject_to, start.shape)
    assert allowed is not None
    run, free = allowed
    n, m = start.shape
    live = ~np.asarray(ready.gone)[:, None]
    gram = np.asarray(ready.gram, np.float64) + damping * float(ready.mean) * np.eye(n)
    runs = np.arange(n) // run
    at_once = int(max(1, min(m, memory // (48 * n * n))))
    with jax.enable_x64(True), _linalg.factoring(n):
        given = [x.T for x in (np.asarray(ready.center, np.float64), start & live, free & live)]
        support, swaps, gains = jax.device_get(_exchanged(at_once, gram, runs, steps, *given))
    return _Found(support.T, swaps, gains)


class _State(NamedTuple):
    """One output: w, its support, P, T = H P, g, and the best exchange (i, j, gain)."""

    w: Float[Array, " n"]
    kept: Bool[Array, " n"]
    inverse: Float[Array, "n n"]
    across: Float[Array, "n n"]
    residual: Float[Array, " n"]
    best: tuple[Array, Array, Array]
    swaps: Array


@partial(jax.jit, static_argnums=0)
def _exchanged(
    at_once: int, gram: Array, runs: Array, steps: Array, center: Array, start: Array, free: Array
) -> tuple[Array, Array, Array]:
    """(support, swaps, gain of the best further exchange) of each output."""
    n = gram.shape[0]
    same, eye = runs[:, None] == runs[None, :], jnp.eye(n, dtype=gram.dtype)

    def one_output(given: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
        w0, kept, free = given

        def best(w, kept, inverse, across, residual):
            pivot = jnp.where(kept, jnp.diagonal(inverse), 1.0)
            schur = jnp.maximum(jnp.diagonal(gram) - jnp.sum(across * gram, axis=1), 1e-12 * jnp.diagonal(gram))
            top = residual[:, None] + across * (w / pivot)[None, :]  # (j, i)
            gain = top**2 / (schur[:, None] + across**2 / pivot[None, :]) - (w**2 / pivot)[None, :]
            fits = (free & ~kept)[:, None] & kept[None, :] & same
            gain = jnp.where(fits, gain, -jnp.inf)
            place = jnp.argmax(gain)
            j, i = place // n, place % n
            least = _LEAST * jnp.abs(jnp.sum((w0 - w) * residual))
            return i, j, jnp.where(gain[j, i] > least, gain[j, i], 0.0)

        def swap(now: _State) -> _State:
            i, j, _ = now.best
            out, pivot = now.inverse[:, i], now.inverse[i, i]
            inverse = now.inverse - out[:, None] * out[None, :] / pivot
            across = now.across - now.across[:, i][:, None] * out[None, :] / pivot
            w, residual = now.w - out * (now.w[i] / pivot), now.residual + now.across[:, i] * (now.w[i] / pivot)
            kept = now.kept.at[i].set(False)
            inverse = jnp.where(kept[:, None] & kept[None, :], inverse, 0.0)
            across = jnp.where(kept[None, :], across, 0.0)
            toward = inverse @ gram[:, j] - eye[:, j]
            pull = across @ gram[:, j] - gram[:, j]
            schur = gram[j, j] - jnp.sum(across[j] * gram[:, j])
            inverse = inverse + toward[:, None] * toward[None, :] / schur
            across = across + pull[:, None] * toward[None, :] / schur
            length = residual[j] / schur
            w, residual = w - toward * length, residual + pull * length
            kept = kept.at[j].set(True)
            w, residual = jnp.where(kept, w, 0.0), jnp.where(kept, 0.0, residual)
            return _State(w, kept, inverse, across, residual, best(w, kept, inverse, across, residual), now.swaps + 1)

        both = kept[:, None] & kept[None, :]
        inverse = jnp.where(both, jnp.linalg.inv(jnp.where(both, gram, eye)), 0.0)
        across = gram @ inverse
        lost = jnp.where(kept, 0.0, w0)
        w = jnp.where(kept, w0, 0.0) + across.T @ lost
        residual = jnp.where(kept, 0.0, gram @ (w0 - w))
        first = _State(w, kept, inverse, across, residual, best(w, kept, inverse, across, residual), jnp.asarray(0))
        last = lax.while_loop(lambda s: (s.best[2] > 0) & (s.swaps < steps), swap, first)
        return last.kept, last.swaps, last.best[2]

    return lax.map(one_output, (center, start, free), batch_size=at_once)
