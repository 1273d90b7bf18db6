"""Hard thresholding pursuit on a low-rank model: thresholded steps from the refit of each support."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Bool, Float

from pruneopt import _linalg, _tree
from pruneopt.constraints import parts
from pruneopt.curvature.low_rank import LowRank
from pruneopt.objectives.base import QuadraticObjective
from pruneopt.problem import Problem
from pruneopt.solvers.base import Outcome, Solver, Start, check_not_negative, check_whole, network_only
from pruneopt.solvers.polish import factor

Tree = Any
Flat = Float[np.ndarray, " p"]
_TRIALS = 16  # steps that one search may try
# Ours, like `_TRIALS`. On MLPNet (300 examples, 80 and 95 %) their roots and squares move phi by 0.2 % at most; no
# growth (1.0) adds 0.4 and 1 %; twice or half the trials change nothing.
_LONGER, _SHORTER = 1.2, 1.5


@dataclass(frozen=True)
class Pursuit(Solver):
    """minimise <g, d> + 1/2 <d, (H + lambda I) d>, d = w - w0, w in the constraint, H = G^T G / n + ridge I.

    phi(S) is the minimum on the support S. With r = ridge + lambda and b = w0 - g / r the refit, and a gradient step
    of length 1 / r from it, are all in one vector of n numbers y:

        (n r I + G_S G_S^T) y = G (b_S - w0),    z = b - G^T y,    w_S = z_S,    w - grad f(w) / r = z.

    A trial selects S' for z_S^2 and (t z)^2 elsewhere, so t = r times the length of the step decides how many weights
    change places. It is taken if phi(S') < phi(S); t then grows by 1.2, else it shrinks by 1.5. Ends when no step
    lowers phi by `tolerance` of it, else with the status limit after `iterations` steps. Starts at the support of
    `init`, else at what the constraint selects for b^2; never worse than the refit of that.

    Where G is of rank n << p the inverse of H + lambda I is nearly I / r, and 1 / r is the step on which a weight that
    would pay for its place takes it; plain hard thresholding (`CHITA`), whose steps the largest eigenvalue bounds, is
    then orders of magnitude too short for any weight to enter. Raises ValueError for a ridge that rounding swallows.

    Cost: n^2 |S| multiply-adds at first; a trial that exchanges m weights 2 n^2 m, n^3 / 3 and n p. Weights that are
    zero and that a `Support` cuts take no part. Memory: G, two n x n. Products in G's precision (float32 at least),
    systems in float64. stats: iterations, trials, entered (weights of the support that the first one did not have).
    Source: Foucart 2011 (hard thresholding pursuit), with the line search past the support and the refit of Benbaki et
    al. 2023 (CHITA), sections 3.2 and 3.3.
    """

    iterations: int = 30
    tolerance: float = 1e-4

    def __post_init__(self) -> None:
        check_whole(self, 1, "iterations")
        check_not_negative(self, "tolerance")

    @property
    def never_worse_than(self) -> frozenset[str]:
        """A feasible init: the result is the refit of its own support."""
        return frozenset({"init", "refit", "zero"})

    def refuses(self, problem: Problem) -> str | None:
        """An objective without a low-rank curvature, a singular one, no constraint, a penalty."""
        reason = network_only(problem, self, twin="HardThresholding")
        if reason:
            return reason
        f: Any = problem.objective
        if not isinstance(f.curvature, LowRank):
            return (
                "Pursuit needs a low-rank curvature such as empirical_fisher(...), not "
                f"{type(f.curvature).__name__}; use CHITA or GlobalADMM, which know products alone"
            )
        if f.curvature.ridge + f.damping == 0:
            return "Pursuit needs a curvature with a ridge, or Quadratic(damping=0.01): it is singular without"
        return None

    def run(self, problem: Problem, init: Start | None, key: jax.Array) -> Outcome:
        """Step from refit to refit."""
        f, constraint = problem.objective, problem.subject_to
        assert isinstance(f, QuadraticObjective)
        assert isinstance(f.curvature, LowRank)
        assert constraint is not None
        layout, dtype = f.curvature.layout, _tree.widest(f.center)
        moves = parts.of(constraint).allowed_flat(f.center)
        free = moves | (layout.host(f.center) != 0)  # what may move, or falls to zero
        model = _Model.of(f, f.curvature, free)

        def selected(z: Flat) -> Bool[np.ndarray, " p"]:
            whole = np.zeros(free.size)
            whole[free] = z * z
            return (layout.host(constraint.select(layout.tree(jnp.asarray(whole, dtype)))) > 0)[free]

        start = selected(model.target) if init is None else layout.host(init.support)[free] > 0
        point, t, trials, done = model.at(start, None), 1.0, 0, 0
        settled = False
        while not settled and done < self.iterations:
            done += 1
            found, t, tried = _searched(model, point, t, selected)
            trials += tried
            settled = point.value - found.value <= self.tolerance * abs(point.value)
            point = found
        value, support = np.zeros(free.size), np.zeros(free.size, bool)
        value[free], support[free] = np.where(point.support, point.reached, 0.0), point.support
        stats = {"iterations": done, "trials": trials, "entered": int(np.sum(point.support & ~start))}
        arrays = jax.tree.map(jnp.asarray, (layout.tree(value, f.center), layout.tree(support)))
        return Outcome(*arrays, hit_limit=not settled, stats=stats)


class _Point(NamedTuple):
    """A support, G_S G_S^T, phi there, and z."""

    support: Bool[np.ndarray, " p"]
    inner: Float[np.ndarray, "n n"]
    value: float
    reached: Flat


class _Model(NamedTuple):
    """The objective on the host: G, w0, g, r, and b = w0 - g / r."""

    rows: Float[np.ndarray, "n p"]
    center: Flat
    gradient: Flat
    ridge: float
    target: Flat

    @staticmethod
    def of(f: QuadraticObjective, h: LowRank, free: Bool[np.ndarray, " q"]) -> _Model:
        """The parts of f for the weights that are `free`."""
        rows = np.asarray(h.gradients)
        rows = (rows if free.all() else rows[:, free]).astype(_tree.wide(rows.dtype), copy=False)
        center, ridge = h.layout.host(f.center)[free], h.ridge + f.exact_ridge()
        gradient = np.zeros_like(center) if f.gradient is None else h.layout.host(f.gradient)[free]
        return _Model(rows, center, gradient, ridge, center - gradient / ridge)

    def at(self, support: Bool[np.ndarray, " p"], near: _Point | None) -> _Point:
        """The refit on a support; G_S G_S^T from that of a point nearby where little changes."""
        g, n = self.rows, len(self.rows)
        if near is None:
            inner = _square(g[:, support])
        else:
            inner = near.inner + _square(g[:, support & ~near.support]) - _square(g[:, near.support & ~support])
        gap = np.where(support, self.target, 0.0) - self.center
        reach = (g @ gap.astype(g.dtype)).astype(np.float64)
        y = _linalg.cholesky_solve(factor(inner, self.ridge, g.dtype), reach)
        z = self.target - (y.astype(g.dtype) @ g).astype(np.float64)
        d = np.where(support, z, 0.0) - self.center
        value = self.gradient @ d + 0.5 * self.ridge * (n * self.ridge * (y @ y) + d @ d)  # G d = n r y
        return _Point(support, inner, float(value), z)


def _searched(model: _Model, point: _Point, t: float, selected: Callable[[Flat], Any]) -> tuple[_Point, float, int]:
    """The first shorter step that lowers phi, the length to begin with next, and the trials; else the same point."""
    for tried in range(1, _TRIALS + 1):
        support = selected(np.where(point.support, point.reached, t * point.reached))
        if np.array_equal(support, point.support):
            return point, t, tried
        trial = model.at(support, point)
        if trial.value < point.value:
            return trial, min(1.0, _LONGER * t), tried
        t /= _SHORTER
    return point, t, _TRIALS


def _square(columns: Float[np.ndarray, "n k"]) -> Float[np.ndarray, "n n"]:
    return (columns @ columns.T).astype(np.float64)
