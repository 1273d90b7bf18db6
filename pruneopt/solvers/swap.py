"""Exchange one kept for one cut weight of an output, all others refitted, while that lowers the error."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from pruneopt import _linalg, _tree
from pruneopt.constraints import parts
from pruneopt.objectives.exchange import Fit
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

    Every output makes its best exchange, judged exactly by what it brings after a refit (`objectives.exchange`), until
    none helps: the support is then optimal against every single exchange. From the support of `init`, or all that a
    `Support` allows; never worse than its exact refit. Exchanges stay inside an output, a group of N:M along the
    inputs, or a run of inputs that shares a budget; other constraints are refused.

    steps: exchanges that an output may make. damping: relative, added to H for singular ones.
    Cost: n k^2 an output of k kept weights, and about 4 n k an exchange, in float64 on the host; memory: 3 n k numbers.
    stats: swaps, largest_gain (see the function of that name; at most 1e-9 unless the limit was met).
    Source: Hassibi and Stork 1993 (equation 5) for what goes, and its reverse for what comes.
    """

    steps: int = 1000
    damping: float = 1e-8

    def __post_init__(self) -> None:
        check_whole(self, 1, "steps")
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
        swapped = exchanged(problem, ready, np.asarray(start), self.steps, self.damping)
        value, support = refitted(ready, [swapped.support, np.asarray(start) & ~np.asarray(ready.gone)[:, None]])
        stats = {"swaps": int(swapped.swaps.sum()), "largest_gain": float(np.max(swapped.gains, initial=0.0))}
        limit = bool(np.any((swapped.swaps >= self.steps) & (swapped.gains > 0)))
        return outcome(problem, ready, value, support, hit_limit=limit, stats=stats)


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


class Exchanged(NamedTuple):
    """A support after exchanges, how many each output made, and by which part of its error one more would lower it."""

    support: Bool[np.ndarray, "n m"]
    swaps: Int[np.ndarray, " m"]
    gains: Float[np.ndarray, " m"]


def exchanged(problem: Problem, ready: Layer, start: Bool[np.ndarray, "n m"], steps: int, damping: float) -> Exchanged:
    """The best exchanges of every output from `start`, at most `steps` an output."""
    groups = swap_groups(problem.subject_to, start.shape)
    assert groups is not None
    (n, m), (run, free) = start.shape, groups
    live = ~np.asarray(ready.gone)[:, None]
    gram = np.asarray(ready.gram, np.float64) + damping * float(ready.mean) * np.eye(n)
    center, kept, free = np.asarray(ready.center, np.float64), start & live, free & live
    support, runs, swaps, gains = kept.copy(), np.arange(n) // run, np.zeros(m, int), np.zeros(m)
    for o in np.flatnonzero(kept.any(axis=0)):
        fit = Fit(gram, center[:, o], np.flatnonzero(kept[:, o]))
        swaps[o], gain = fit.improved(free[:, o], runs, steps)
        gains[o] = gain / fit.error if gain else 0.0
        support[:, o] = False
        support[fit.support, o] = True
    return Exchanged(support, swaps, gains)


def refitted(ready: Layer, supports: list[Bool[np.ndarray, "n m"]]) -> tuple[Float[Array, "n m"], Bool[Array, "n m"]]:
    """The exact refit of the support that has the least error with it, and that support."""
    gram, center = np.asarray(ready.gram, np.float64), np.asarray(ready.center, np.float64)
    found = []
    for support in supports:
        value, _ = refit(gram, center, support, 0.0)
        change = value - center
        found.append((float(np.sum(change * (gram @ change))), value, support))
    _, value, support = min(found, key=lambda row: row[0])
    return jnp.asarray(value, ready.center.dtype), jnp.asarray(support)
