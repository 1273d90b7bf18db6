"""Exchange one kept for one cut weight of an output, all others refitted, while that lowers the error."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import numpy as np
from jaxtyping import Bool, Float, Int

from pruneopt.bounds.exchange import DAMPING
from pruneopt.constraints import parts
from pruneopt.objectives.exchange import Fit
from pruneopt.objectives.prepared import Layer, exact_layer
from pruneopt.objectives.reconstruction import Reconstruction
from pruneopt.problem import Problem
from pruneopt.solvers.base import (
    Outcome,
    Solver,
    Start,
    check_not_negative,
    check_whole,
    layer_only,
    no_exchange,
    outcome,
)
from pruneopt.solvers.polish import refit

Tree = Any


@dataclass(frozen=True)
class Swap(Solver):
    """minimise 1/2 tr((W - W0)^T (H + lambda I) (W - W0)) over W in the constraint, by the best exchanges with refits.

    Every output makes its best exchange, judged exactly by what it brings after a refit (`objectives.exchange`), until
    none helps: the support is then optimal against every single exchange. From the support of `init`, or all that a
    `Support` allows; never worse than its exact refit. Exchanges stay inside an output, a group of N:M along the
    inputs, or a run of inputs that shares a budget; other constraints are refused.

    steps: exchanges that an output may make. damping: relative, added to H for singular ones.
    Cost: n k^2 an output of k kept weights, and about 4 n k an exchange, in float64 on the host; memory: 3 n k numbers.
    stats: swaps, largest_gain (see `bounds.largest_gain`; at most 1e-9 unless the limit was met).
    Source: Hassibi and Stork 1993 (equation 5) for what goes, and its reverse for what comes.
    """

    steps: int = 1000
    damping: float = DAMPING

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
        f = problem.objective
        assert isinstance(f, Reconstruction)
        ready = exact_layer(f, problem.subject_to)
        start = problem.full_support() if init is None else init.support
        if found.fixed:
            start = start & found.allowed(start)
        swapped = exchanged(problem, ready, np.asarray(start), self.steps, self.damping)
        value, support = refitted(ready, [swapped.support, np.asarray(start) & ~np.asarray(ready.gone)[:, None]])
        stats = {"swaps": int(swapped.swaps.sum()), "largest_gain": float(np.max(swapped.gains, initial=0.0))}
        limit = bool(np.any((swapped.swaps >= self.steps) & (swapped.gains > 0)))
        with jax.enable_x64(True):
            return outcome(problem, ready, value, support, hit_limit=limit, stats=stats)


class Exchanged(NamedTuple):
    """A support after exchanges, how many each output made, and by which part of its error one more would lower it."""

    support: Bool[np.ndarray, "n m"]
    swaps: Int[np.ndarray, " m"]
    gains: Float[np.ndarray, " m"]


def exchanged(problem: Problem, ready: Layer, start: Bool[np.ndarray, "n m"], steps: int, damping: float) -> Exchanged:
    """The best exchanges of every output from `start`, at most `steps` an output; `ready` in float64."""
    groups = parts.exchanges(problem.subject_to, start.shape)
    assert groups is not None
    (n, m), (run, free) = start.shape, groups
    live = ~np.asarray(ready.gone)[:, None]
    gram = np.asarray(ready.gram) + damping * float(ready.mean) * np.eye(n)
    center = np.asarray(ready.center)
    kept, free = start & live, free & live
    support, runs, swaps, gains = kept.copy(), np.arange(n) // run, np.zeros(m, int), np.zeros(m)
    for o in range(m):
        fit = Fit.of(gram, center[:, o], kept[:, o])
        if fit is None:
            continue
        swaps[o], gain = fit.improved(free[:, o], runs, steps)
        gains[o] = gain / fit.error if gain else 0.0
        support[:, o] = False
        support[fit.support, o] = True
    return Exchanged(support, swaps, gains)


def refitted(
    ready: Layer, supports: list[Bool[np.ndarray, "n m"]]
) -> tuple[Float[np.ndarray, "n m"], Bool[np.ndarray, "n m"]]:
    """The exact refit of the support that has the least error with it, and that support; `ready` in float64."""
    found, (gram, center) = [], (np.asarray(ready.gram), np.asarray(ready.center))
    for support in supports:
        value, _ = refit(gram, center, support, 0.0)
        change = value - center
        found.append((float(np.sum(change * (gram @ change))), value, support))
    _, value, support = min(found, key=lambda row: row[0])
    return value, support
