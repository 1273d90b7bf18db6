"""CHITA: iterative hard thresholding on a quadratic model of the network, with a line search past the support."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array

from pruneopt import _tree
from pruneopt.constraints.base import Constraint
from pruneopt.objectives.base import QuadraticObjective
from pruneopt.problem import Problem
from pruneopt.solvers.base import Outcome, Solver, Start, check_not_negative, check_whole, indefinite, network_only

Tree = Any


@dataclass(frozen=True)
class CHITA(Solver):
    """minimise f(w) = <g, d> + 1/2 <d, (H + lambda I) d>, d = w - w0, by w <- P(w - tau grad f(w)).

    P keeps what the constraint selects for w^2. tau starts at the exact step on the support S,
    |grad_S|^2 / <grad_S, (H + lambda I) grad_S>, and doubles while f falls; if the first trial does not lower f it is
    halved, up to 20 times. Ends when nothing lowers f by more than `tolerance` of it, else with the status limit after
    `iterations`. Starts at `init`, else at P(w0), and is never worse than that. Follow with `Polish` for the refit.

    Any curvature with products; one product a trial and one more an iteration. Memory: 6 vectors of the weights' size.
    Raises ValueError where a Hessian shows a direction of negative curvature beyond rounding.
    stats: iterations, products.
    Source: Benbaki et al. 2023 (CHITA), sections 3.2 and A.2: hard thresholding whose step may change the support.
    """

    iterations: int = 50
    tolerance: float = 1e-6

    def __post_init__(self) -> None:
        check_whole(self, 1, "iterations")
        check_not_negative(self, "tolerance")

    @property
    def never_worse_than(self) -> frozenset[str]:
        """A feasible init."""
        return frozenset({"init"})

    def refuses(self, problem: Problem) -> str | None:
        """An objective that is not a quadratic with a curvature of the whole network, no constraint, a penalty."""
        return network_only(problem, self, twin="HardThresholding")

    def run(self, problem: Problem, init: Start | None, key: jax.Array) -> Outcome:
        """Step while the model falls."""
        f, constraint = problem.objective, problem.subject_to
        assert isinstance(f, QuadraticObjective)
        assert constraint is not None
        products, largest = 0, 0.0

        def product(x: Tree) -> Tree:
            nonlocal products, largest
            products += 1
            curved = f.curvature.mv(x)  # type: ignore[union-attr]
            if not f.is_convex:
                bend, size = (float(value) for value in _bend(x, curved, f.ridge()))
                largest = max(largest, size)
                if bend < -math.sqrt(_tree.coarsest(x)) * largest:
                    raise indefinite(self, f, bend)
            return curved

        center = _tree.widened(f.center)

        def at(w: Tree, support: Tree) -> _Point:
            change = _minus(w, center)
            value, slope = _judged(change, product(change), f.gradient, f.ridge())
            return _Point(w, support, slope, float(value))

        def stepped(point: _Point, length: float) -> _Point:
            return at(*_projected(constraint, _step(point.w, point.slope, length)))

        start = _projected(constraint, f.center) if init is None else (init.value, init.support)
        point = at(_tree.widened(start[0]), start[1])
        settled, done = False, 0
        while not settled and done < self.iterations:
            done += 1
            inside = _tree.masked(point.slope, point.support)
            length = _length(inside, product(inside), f.ridge())
            best = _searched(point, float(length), stepped)
            settled = point.value - best.value <= self.tolerance * abs(point.value)
            point = best
        found = (_like(point.w, f.center), point.support)
        value, support = min(found, start, key=lambda pair: f.value(pair[0]))  # rounded to the weights' dtype
        return Outcome(value, support, not settled, stats={"iterations": done, "products": products})


class _Point(NamedTuple):
    """Weights, their support, the slope of f and f - f(w0) there."""

    w: Tree
    support: Tree
    slope: Tree
    value: float


def _searched(point: _Point, length: float, stepped: Any) -> _Point:
    """The best of the line search; `point` itself where nothing is lower."""
    best, trial = point, stepped(point, length)
    if trial.value < best.value:
        while trial.value < best.value:
            best, length = trial, 2 * length
            trial = stepped(point, length)
        return best
    for _ in range(20):
        length = length / 2
        trial = stepped(point, length)
        if trial.value < best.value:
            return trial
    return best


def _projected(constraint: Constraint, w: Tree) -> tuple[Tree, Tree]:
    support = constraint.select(_squared(w))
    return _tree.masked(w, support), support


@jax.jit
def _squared(w: Tree) -> Tree:
    return jax.tree.map(lambda x: jnp.square(x.astype(_tree.wide(x.dtype))), w)


@jax.jit
def _like(w: Tree, like: Tree) -> Tree:
    return jax.tree.map(lambda x, y: x.astype(y.dtype), w, like)


@jax.jit
def _minus(a: Tree, b: Tree) -> Tree:
    return jax.tree.map(jnp.subtract, a, b)


@jax.jit
def _judged(change: Tree, curved: Tree, gradient: Tree | None, ridge: Array) -> tuple[Array, Tree]:
    """f - f(w0) and its slope at a change, from H times it."""
    full = jax.tree.map(lambda c, d: c.astype(d.dtype) + ridge.astype(d.dtype) * d, curved, change)
    linear = jax.tree.map(jnp.zeros_like, change) if gradient is None else gradient
    value = sum(
        jnp.sum(d * (jnp.asarray(0.5, d.dtype) * h + g.astype(d.dtype)))
        for d, h, g in zip(*map(jax.tree.leaves, (change, full, linear)), strict=True)
    )
    return value, jax.tree.map(lambda h, g: h + g.astype(h.dtype), full, linear)  # type: ignore[return-value]


@jax.jit
def _step(w: Tree, slope: Tree, length: float) -> Tree:
    return jax.tree.map(lambda x, s: x - jnp.asarray(length).astype(x.dtype) * s, w, slope)


@jax.jit
def _bend(x: Tree, curved: Tree, ridge: Array) -> tuple[Array, Array]:
    """<x, (H + ridge I) x> / <x, x> and ||H x|| / ||x||; 0 for x = 0."""
    pairs = [(x.astype(_tree.wide(x.dtype)), c) for x, c in zip(*map(jax.tree.leaves, (x, curved)), strict=True)]
    size = sum(jnp.sum(x * x) for x, _ in pairs)
    along = sum(jnp.sum(x * c.astype(x.dtype)) for x, c in pairs)
    reach = sum(jnp.sum(jnp.square(c.astype(x.dtype))) for x, c in pairs)
    some = jnp.where(size > 0, size, jnp.ones_like(size))  # type: ignore
    return along / some + jnp.where(size > 0, ridge, jnp.zeros_like(ridge)), jnp.sqrt(reach / some)  # type: ignore


@jax.jit
def _length(inside: Tree, curved: Tree, ridge: Array) -> Array:
    """|x|^2 / <x, (H + ridge I) x>; 1 where that is not defined: on a solved support others may still enter."""
    pairs = list(zip(jax.tree.leaves(inside), jax.tree.leaves(curved), strict=True))
    size = sum(jnp.sum(x * x) for x, _ in pairs)
    along = sum(jnp.sum(x * (c.astype(x.dtype) + ridge.astype(x.dtype) * x)) for x, c in pairs)
    good = (along > 0) & (size > 0)
    return jnp.where(good, size / jnp.where(good, along, jnp.ones_like(along)), jnp.ones_like(size))  # type: ignore
