"""Operator splitting for a quadratic model of the whole network that is known by its products alone."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from pruneopt import _tree
from pruneopt.objectives.base import QuadraticObjective
from pruneopt.problem import Problem
from pruneopt.solvers.base import Outcome, Solver, Start, check_bends, check_whole, network_only
from pruneopt.solvers.polish import Polish

Tree = Any
Product = Callable[[Tree], Tree]
_FLOOR = 1e-6  # of the mean diagonal; twice and half give the same objective to 7 digits on MLPNet at 80 %


@dataclass(frozen=True)
class GlobalADMM(Solver):
    """minimise <g, d> + 1/2 <d, (H + lambda I) d>, d = w - w0, w in the constraint, by splitting B = T, T feasible.

    With s = diag(H) + lambda, B = sqrt(s) w and A = (H + lambda I) / sqrt(s s^T), removing b alone costs about b^2, so
    the projection that ADMM needs is the constraint's selection by b^2. In Douglas-Rachford form, with B0 the trained
    weights, M the mask of the projection of T and r the relaxation, each iteration is

        B = B0 + E,  (A + rho I) E = rho ((2 M - 1) T - B0) - g / sqrt(s),    T <- T + r (B - M T),

    where E is moved by `inner` conjugate gradients from the E before. rho rises geometrically over `levels`. Then the
    refit of the support: exact where `Polish` knows it, else `refit` conjugate gradients; 0: none.

    H is asked for its diagonal and for products: levels * iterations * (inner + 1) + refit + 1 of them, which is all
    that costs; memory: 9 vectors of the weights' size. From `init` it starts where its weights would be a fixed point;
    the result is never worse than a feasible init, than that refit or than zero. Raises ValueError where a Hessian
    has negative curvature on its diagonal or along the result.
    Source: the layer solver `ADMM` (after ALPS, Meng et al. 2024, algorithm 1) with diag(H) as its metric and inexact
    steps (Eckstein and Bertsekas 1992, theorem 8); the problem is that of Benbaki et al. 2023, equation 5.
    """

    rho: tuple[float, float] = (0.3, 10.0)
    levels: int = 6
    iterations: int = 8
    inner: int = 6
    relaxation: float = 1.2
    refit: int = 40

    def __post_init__(self) -> None:
        first, last = self.rho
        if not 0 < first <= last < float("inf"):
            raise ValueError(f"rho={self.rho!r}: pass the first and the last, 0 < first <= last, such as (0.3, 10.0)")
        check_whole(self, 1, "levels", "iterations", "inner")
        check_whole(self, 0, "refit")
        if not 0 < self.relaxation < 2:
            raise ValueError(f"relaxation={self.relaxation!r} is outside (0, 2), where ADMM converges; pass about 1.2")

    @property
    def never_worse_than(self) -> frozenset[str]:
        """A feasible init, the refit of its own support, and zero."""
        return frozenset({"init", "zero", *(["refit"] if self.refit else [])})

    def refuses(self, problem: Problem) -> str | None:
        """An objective that is not a quadratic with a curvature of the whole network, no constraint, a penalty."""
        return network_only(problem, self, twin="ADMM")

    def run(self, problem: Problem, init: Start | None, key: jax.Array) -> Outcome:
        """Scale, iterate, select, refit."""
        f, constraint = problem.objective, problem.subject_to
        assert isinstance(f, QuadraticObjective)
        assert constraint is not None
        scaled = _Scaled(f)
        check_bends(self, f, scaled.diagonal)
        zero = jax.tree.map(jnp.zeros_like, scaled.dense)
        rhos = np.geomspace(*self.rho, self.levels).tolist()
        t = scaled.dense if init is None else _fixed_point(scaled, init, rhos[0])
        mask = constraint.select(_squared(t))
        change, before = zero, rhos[0]
        for rho in rhos:
            t = _at_new_rho(t, mask, before / rho)
            before = rho
            for _ in range(self.iterations):
                side = _side(t, mask, scaled.dense, scaled.slope, rho)
                change = _conjugate_gradients(scaled.product(rho), side, change, self.inner)
                t = _stepped(t, mask, scaled.dense, change, self.relaxation)
                mask = constraint.select(_squared(t))
        outcomes = [self._refitted(problem, scaled, _minus(t, scaled.dense), mask)]
        if init is not None:
            start = jax.tree.map(lambda b, w, s: (w.astype(b.dtype) * s) - b, scaled.dense, init.value, scaled.scale)
            outcomes.append(self._refitted(problem, scaled, start, init.support))
            outcomes.append((f.value(init.value), init.value, init.support))
        _, value, support = min(outcomes, key=lambda found: found[0])
        check_bends(self, f, scaled.diagonal, value)
        return Outcome(value, support)

    def _refitted(self, problem: Problem, scaled: _Scaled, change: Tree, mask: Tree) -> tuple[float, Tree, Tree]:
        """The best of the masked weights, their refit and zero: (objective, value, support)."""
        f: Any = problem.objective
        found = [_masked_change(scaled.dense, change, mask)]
        exact = _exactly_refitted(problem, mask) if self.refit else None
        if self.refit and exact is None:
            side = _masked(_minus(jax.tree.map(jnp.negative, scaled.slope), scaled.product(0.0)(found[0])), mask)
            step = _conjugate_gradients(scaled.product(0.0, mask), side, jax.tree.map(jnp.zeros_like, side), self.refit)
            found.append(jax.tree.map(jnp.add, found[0], step))
        values = [_tree.masked(scaled.weights(change, f.center), mask) for change in found]
        values += [jax.tree.map(jnp.zeros_like, f.center), *([] if exact is None else [exact])]
        return min(((f.value(w), w, mask) for w in values), key=lambda row: row[0])


def _exactly_refitted(problem: Problem, mask: Tree) -> Tree | None:
    """The best weights on the mask, where `Polish` knows them."""
    if Polish().refuses(problem):
        return None
    start = Start(_tree.masked(problem.objective.center, mask), mask)
    try:
        return Polish().run(problem, start, jax.random.key(0)).value
    except ValueError:  # a ridge below the rounding of the products: no factor
        return None


class _Scaled:
    """The problem in B = sqrt(s) w: dense B0, slope g / sqrt(s), products with A."""

    def __init__(self, f: QuadraticObjective):
        assert f.curvature is not None
        self._h, self._ridge = f.curvature, f.ridge()
        diagonal: Any = f.curvature.diagonal(f.center)
        self.diagonal = np.concatenate([np.ravel(h) for h in jax.tree.leaves(diagonal)]) + float(self._ridge)
        self.dense, self.scale, self.slope = _scaled(f.center, diagonal, f.gradient, self._ridge)

    def product(self, rho: float, mask: Tree | None = None) -> Product:
        """u -> (A + rho I) u, on the mask."""

        def of(u: Tree) -> Tree:
            curved = self._h.mv(_unscaled(u, self.scale))
            return _curved(u, curved, self.scale, self._ridge, rho, mask)

        return of

    def weights(self, change: Tree, like: Tree) -> Tree:
        """w of B0 + change."""
        return _weights(change, self.scale, like)


def _conjugate_gradients(product: Product, side: Tree, start: Tree, steps: int) -> Tree:
    """`steps` of them for product(x) = side from `start`."""
    x, residual = start, _minus(side, product(start))
    direction, size = residual, _square(residual)
    for _ in range(steps):
        x, residual, direction, size = _cg_step(x, residual, direction, size, product(direction))
    return x


def _fixed_point(scaled: _Scaled, init: Start, rho: float) -> Tree:
    """T whose projection and E-step would both give init's weights if they were optimal."""
    value = jax.tree.map(lambda w, s: w.astype(s.dtype) * s, init.value, scaled.scale)
    force = scaled.product(0.0)(_minus(value, scaled.dense))
    return jax.tree.map(lambda b, q, g: b - (q + g) / jnp.asarray(rho, b.dtype), value, force, scaled.slope)


@jax.jit
def _scaled(center: Tree, diagonal: Tree, gradient: Tree | None, ridge: Array) -> tuple[Tree, Tree, Tree]:
    """(B0, sqrt(s), g / sqrt(s)); where s vanishes it is a millionth of its mean, so that B stays defined."""
    wide = _tree.widened(center)
    s = jax.tree.map(lambda w, h: jnp.broadcast_to(h.astype(w.dtype) + ridge.astype(w.dtype), w.shape), wide, diagonal)
    leaves = jax.tree.leaves(s)
    mean = sum(jnp.sum(x) for x in leaves) / jnp.asarray(sum(x.size for x in leaves), leaves[0].dtype)
    mean = jnp.where(mean > 0, mean, jnp.ones_like(mean))
    scale = jax.tree.map(lambda x: jnp.sqrt(jnp.maximum(x, jnp.asarray(_FLOOR, x.dtype) * mean.astype(x.dtype))), s)
    slope = (
        jax.tree.map(jnp.zeros_like, wide)
        if gradient is None
        else jax.tree.map(lambda g, x: g.astype(x.dtype) / x, gradient, scale)
    )
    return jax.tree.map(jnp.multiply, wide, scale), scale, slope


@jax.jit
def _unscaled(u: Tree, scale: Tree) -> Tree:
    return jax.tree.map(jnp.divide, u, scale)


@jax.jit
def _curved(u: Tree, curved: Tree, scale: Tree, ridge: Array, rho: float, mask: Tree | None) -> Tree:
    def one(u: Array, c: Array, s: Array, *m: Array) -> Array:
        out = (c.astype(u.dtype) + ridge.astype(u.dtype) * u / s) / s + jnp.asarray(rho).astype(u.dtype) * u
        return jnp.where(m[0], out, jnp.zeros_like(out)) if m else out

    return jax.tree.map(one, u, curved, scale, *([] if mask is None else [mask]))


@jax.jit
def _weights(change: Tree, scale: Tree, like: Tree) -> Tree:
    """Formed as a difference, so that weights that did not move keep their digits."""
    return jax.tree.map(lambda e, s, w: (w.astype(e.dtype) + e / s).astype(w.dtype), change, scale, like)


@jax.jit
def _masked_change(dense: Tree, change: Tree, mask: Tree) -> Tree:
    """The change that leaves nothing outside the mask."""
    return jax.tree.map(lambda b, e, m: jnp.where(m, e, -b), dense, change, mask)


@jax.jit
def _masked(tree: Tree, mask: Tree) -> Tree:
    return jax.tree.map(lambda x, m: jnp.where(m, x, jnp.zeros_like(x)), tree, mask)


@jax.jit
def _minus(a: Tree, b: Tree) -> Tree:
    return jax.tree.map(jnp.subtract, a, b)


@jax.jit
def _squared(t: Tree) -> Tree:
    return jax.tree.map(jnp.square, t)


@jax.jit
def _square(tree: Tree) -> Float[Array, ""]:
    return sum((jnp.sum(jnp.square(x)) for x in jax.tree.leaves(tree)), jnp.zeros((), jax.tree.leaves(tree)[0].dtype))


@jax.jit
def _at_new_rho(t: Tree, mask: Tree, ratio: float) -> Tree:
    """Off the support stands the dual over rho."""
    return jax.tree.map(lambda x, m: jnp.where(m, x, x * jnp.asarray(ratio).astype(x.dtype)), t, mask)


@jax.jit
def _side(t: Tree, mask: Tree, dense: Tree, slope: Tree, rho: float) -> Tree:
    return jax.tree.map(
        lambda t, m, b, g: jnp.asarray(rho).astype(t.dtype) * (jnp.where(m, t, -t) - b) - g, t, mask, dense, slope
    )


@jax.jit
def _stepped(t: Tree, mask: Tree, dense: Tree, change: Tree, relaxation: float) -> Tree:
    def one(t: Array, m: Array, b: Array, e: Array) -> Array:
        return t + jnp.asarray(relaxation).astype(t.dtype) * (b + e - jnp.where(m, t, jnp.zeros_like(t)))

    return jax.tree.map(one, t, mask, dense, change)


@jax.jit
def _cg_step(x: Tree, residual: Tree, direction: Tree, size: Array, curved: Tree) -> tuple[Tree, Tree, Tree, Array]:
    along = sum(jnp.sum(q * c) for q, c in zip(jax.tree.leaves(direction), jax.tree.leaves(curved), strict=True))
    length = jnp.where(along > 0, size / jnp.where(along > 0, along, jnp.ones_like(along)), jnp.zeros_like(size))
    x = jax.tree.map(lambda x, q: x + length * q, x, direction)
    residual = jax.tree.map(lambda r, c: r - length * c, residual, curved)
    new = _square(residual)
    turn = jnp.where(size > 0, new / jnp.where(size > 0, size, jnp.ones_like(size)), jnp.zeros_like(size))
    return x, residual, jax.tree.map(lambda r, q: r + turn * q, residual, direction), new
