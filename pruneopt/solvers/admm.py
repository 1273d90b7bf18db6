"""Operator splitting in the metric of the inverse diagonal, then a refit: the layer engine."""

from __future__ import annotations

import weakref
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Bool, Float

from pruneopt import _linalg
from pruneopt.objectives.reconstruction import Reconstruction
from pruneopt.problem import Problem
from pruneopt.solvers.base import Layer, Outcome, Solver, Start, check_not_negative, check_whole, layer, layer_only
from pruneopt.solvers.threshold import Rule, projection, selected

PROBE_ERROR = 0.05  # of a factor: |A A^-1 z - z| / |z|; the iterations stand more, the metric does not


@dataclass(frozen=True)
class ADMM(Solver):
    """minimise 1/2 tr((W - W0)^T (H + lambda I) (W - W0)) over W in the constraint, by splitting W = D, D feasible.

    With s_j = (1 / [H^-1]_jj)^p H_jj^(1-p), B = sqrt(s) W and A = H / sqrt(s s^T), removing b alone costs about b^2,
    so the projection that ADMM needs is the constraint's selection by b^2. In Douglas-Rachford form, with B0 the
    dense weights, M the mask of the projection of T and r the relaxation, each iteration is

        B = B0 + rho (A + rho I)^-1 ((2 M - 1) T - B0),    T <- T + r (B - M T).

    rho rises geometrically over `levels`. All large numbers stand as differences from B0, so that the product may be
    rounded to bfloat16. Then `refit` conjugate gradients on the support with the layer's own H.

    rho: first and last. levels, iterations: of rho, and at each. relaxation: r in (0, 2). metric: p.
    damping: relative, of A; refit_damping: relative, of the refit. Neither enters the objective.
    products: of the iterations; None takes bfloat16 where the device multiplies it fast, else float32. Float64
        weights are solved in float64.

    From `init` it starts where its weights would be a fixed point; the result is never worse than a feasible init.
    Cost: (levels * iterations + refit + 1) products of n^2 m, (levels + 1) inverses of about 1.5 n^3, on n inputs and m
    outputs; memory (levels + 4) n^2 + 8 n m numbers. Layers that share a Gram, solved in turn, share the inverses.
    stats: condition (estimated, of the damped H), dead_inputs, factors ("float32", "float64" where the probe of the
    first failed, with more damping where that failed too), factor_damping, products.
    Source: ALPS (Meng et al. 2024, algorithm 1), with the metric of OBS (Hassibi and Stork 1993) in place of diag(H),
    and a fixed schedule of rho.
    """

    rho: tuple[float, float] = (0.7, 2.5)
    levels: int = 3
    iterations: int = 8
    relaxation: float = 1.2
    metric: float = 0.85
    damping: float = 0.01
    refit: int = 8
    refit_damping: float = 0.001
    products: Literal["bfloat16", "float32"] | None = None

    def __post_init__(self) -> None:
        first, last = self.rho
        if not 0 < first <= last < float("inf"):
            raise ValueError(f"rho={self.rho!r}: pass the first and the last, 0 < first <= last, such as (0.7, 2.5)")
        check_whole(self, 1, "levels", "iterations")
        check_whole(self, 0, "refit")
        check_not_negative(self, "damping", "refit_damping")
        if not 0 < self.relaxation < 2:
            raise ValueError(f"relaxation={self.relaxation!r} is outside (0, 2), where ADMM converges; pass about 1.2")
        if not 0 <= self.metric <= 1:
            raise ValueError(f"metric={self.metric!r} is outside [0, 1]; 0 is diag(H), 1 the inverse diagonal")
        if self.products not in (None, "bfloat16", "float32"):
            raise ValueError(f"products={self.products!r}: pass 'bfloat16', 'float32' or None")

    def refuses(self, problem: Problem) -> str | None:
        """Any objective but Reconstruction, a penalty, or no constraint."""
        return layer_only(problem, self)

    def run(self, problem: Problem, init: Start | None, key: jax.Array) -> Outcome:
        """Prepare, factor, iterate, select, refit."""
        assert problem.subject_to is not None
        ready = layer(problem)
        dtype = ready.gram.dtype
        rule = projection(problem.subject_to, ready.center.shape, dtype)
        factors, facts = _factors(problem, ready, self)
        t = ready.center
        if not ready.blank:
            start = None if init is None else ready.started(init.value)
            state = _started(ready, factors.scale, factors.rhos[0], rule, start)
            relaxation = np.asarray(self.relaxation, dtype)
            for rho, inverse in zip(factors.rhos, factors.inverses, strict=True):
                state = _iterated(ready, factors.scale, inverse, rule, state, rho, relaxation, self.iterations)
            t = state.t
        support = selected(problem.subject_to, _scores(ready, t))
        products = factors.inverses[0].dtype
        refitted = partial(_refitted, ready, np.asarray(self.refit_damping, dtype), self.refit, products)
        value, cost = refitted(_unscaled(t, factors.scale), support)
        if init is not None and problem.violation(init.support) == 0:
            value, support = _better(ready, value, support, cost, ready.started(init.value), init.support, refitted)
        facts |= {"dead_inputs": int(np.sum(ready.dead)), "products": products.name}
        return ready.outcome(problem, value, support, stats=facts)


class Factors(NamedTuple):
    """scale: sqrt(s), (n, 1). rhos: (levels,). inverses: rho (A + rho I)^-1 for each, (n, n)."""

    scale: Float[Array, "n 1"]
    rhos: np.ndarray
    inverses: tuple[Float[Array, "n n"], ...]


class State(NamedTuple):
    """Between levels: T, its mask, the threshold's state, and the rho before."""

    t: Float[Array, "n m"]
    mask: Bool[Array, "n m"]
    threshold: Any
    rho: Float[Array, ""]


@jax.jit
def _started(
    ready: Layer, scale: Float[Array, "n 1"], rho: Float[Array, ""], rule: Rule, start: Float[Array, "n m"] | None
) -> State:
    """At the dense weights, or where `start` would be a fixed point if it were optimal."""
    t = scale * ready.center
    if start is not None:
        t = scale * start + _linalg.matmul(ready.gram, ready.center - start) / (scale * rho)
    return State(t, *rule.mask(t, rule.start(t)), rho)


@partial(jax.jit, static_argnums=7)
def _iterated(
    ready: Layer,
    scale: Float[Array, "n 1"],
    inverse: Float[Array, "n n"],
    rule: Rule,
    state: State,
    rho: Float[Array, ""],
    relaxation: Float[Array, ""],
    iterations: int,
) -> State:
    """The state after all iterations at one rho."""
    dense, zero = scale * ready.center, jnp.zeros((), ready.center.dtype)
    t = jnp.where(state.mask, state.t, state.t * (state.rho / rho))  # off the support stands the dual over rho

    def iteration(_, now):
        t, mask, threshold = now
        moved = dense + _linalg.rounded_matmul(inverse, jnp.where(mask, t, -t) - dense)
        t = t + relaxation * (moved - jnp.where(mask, t, zero))
        return t, *rule.mask(t, threshold)

    t, mask, threshold = lax.fori_loop(0, iterations, iteration, (t, state.mask, rule.turn(t, state.threshold)))
    return State(t, mask, threshold, rho)


@jax.jit
def _scores(ready: Layer, t: Float[Array, "n m"]) -> Float[Array, "n m"]:
    return ready.scores(t * t)


@jax.jit
def _unscaled(t: Float[Array, "n m"], scale: Float[Array, "n 1"]) -> Float[Array, "n m"]:
    return t / scale


@partial(jax.jit, static_argnums=(2, 3))
def _refitted(
    ready: Layer,
    damping: Float[Array, ""],
    steps: int,
    products: Any,
    start: Float[Array, "n m"],
    support: Bool[Array, "n m"],
) -> tuple[Float[Array, "n m"], Float[Array, ""]]:
    """The weights after conjugate gradients on the support, and their error without `damping`."""
    value, residual = _linalg.masked_cg(ready.damped(damping), ready.center, start, support, steps, products)
    change = ready.center - value
    return value, jnp.sum(change * residual) - damping * ready.mean * jnp.sum(change * change)


def _better(ready, value, support, cost, start, kept, refitted):
    """The best of what was found, the start's support refitted, and the start."""
    again, other = refitted(start, kept)
    own = jnp.where(kept, start, jnp.zeros((), start.dtype))
    change = ready.center - own
    plain = jnp.sum(change * _linalg.matmul(ready.gram, change))
    found = [(float(cost), value, support), (float(other), again, kept), (float(plain), own, kept)]
    return min(found, key=lambda row: row[0])[1:]


def _factors(problem: Problem, ready: Layer, solver: ADMM) -> tuple[Factors, dict[str, Any]]:
    """The inverses that the iterations need, in float32 or, where its probe fails, in float64; from the last call if it
    asked for the same of the same Gram.
    """
    f = problem.objective
    assert isinstance(f, Reconstruction)
    source = f.curvature.matrix
    wanted = (float(f.ridge()), solver.damping, solver.metric, solver.rho, solver.levels)
    wanted += (solver.products, ready.gram.dtype)
    if _last and _last[0]() is source and _last[1] == wanted:
        return _last[2], dict(_last[3])
    dtype = ready.gram.dtype
    products = dtype
    if dtype == jnp.float32 and solver.products != "float32" and (solver.products or _linalg.multiplies_bfloat16()):
        products = jnp.dtype(jnp.bfloat16)
    rhos = np.geomspace(*solver.rho, solver.levels).astype(dtype)
    scaled, scale, condition, error = _metric(ready, solver.damping, solver.metric)
    inverses, errors = zip(*(_level(scaled, rho, products) for rho in rhos), strict=True)
    factors = Factors(scale, rhos, inverses)
    condition, *errors = jax.device_get((condition, error, *errors))
    facts = {"condition": float(condition), "factors": dtype.name, "factor_damping": solver.damping}
    if not max(errors) <= PROBE_ERROR:
        factors, more = _factored_on_host(ready, rhos, solver.damping, solver.metric, products)
        facts |= more
    _last[:] = [weakref.ref(source), wanted, factors, facts]
    return factors, dict(facts)


_last: list[Any] = []  # one layer's inverses: what the next layer with the same inputs needs


# One program an inverse: XLA runs several of them in one program at half the speed.
@jax.jit
def _metric(ready: Layer, damping: float, metric: float) -> tuple[Array, Array, Array, Array]:
    """A without rho, sqrt(s), the condition number of the damped Gram, and the error of its inverse on a probe."""
    gram = ready.damped(damping)
    probe = _probe(gram)
    factor = _linalg.inverse_factor(gram)  # U with U^T U the inverse: more exact than the inverse at the same cost

    def inverse(x):
        return _linalg.matmul(_linalg.matmul(factor, x).T, factor).T  # no transposed copy of the factor

    power = jnp.asarray(metric, gram.dtype)
    s = (1 / jnp.sum(factor * factor, axis=0)) ** power * jnp.diagonal(gram) ** (1 - power)
    scale = jnp.sqrt(s)[:, None]
    largest = _linalg.largest_eigenvalue(partial(_linalg.matmul, gram), probe)
    error = jnp.linalg.norm(_linalg.matmul(gram, inverse(probe)) - probe) / jnp.linalg.norm(probe)
    return gram / (scale * scale.T), scale, largest * _linalg.largest_eigenvalue(inverse, probe), error


@partial(jax.jit, static_argnums=2)
def _level(scaled: Float[Array, "n n"], rho: Float[Array, ""], products: Any) -> tuple[Array, Array]:
    """rho (A + rho I)^-1, and the error of the inverse on a probe."""
    matrix = scaled + rho * jnp.eye(scaled.shape[0], dtype=scaled.dtype)
    inverse = _linalg.spd_inverse(matrix)
    probe = _probe(matrix)
    error = jnp.linalg.norm(_linalg.matmul(matrix, _linalg.matmul(inverse, probe)) - probe) / jnp.linalg.norm(probe)
    return (rho * inverse).astype(products), error


def _probe(matrix: Float[Array, "n n"]) -> Float[Array, "n 1"]:
    return jnp.where(jnp.arange(matrix.shape[0]) % 3 == 0, 1, -1).astype(matrix.dtype)[:, None]


def _factored_on_host(
    ready: Layer, rhos: np.ndarray, damping: float, metric: float, products: Any
) -> tuple[Factors, dict[str, Any]]:
    """The same in float64 by LAPACK, with ten times the damping, from 1e-6 on, until Cholesky succeeds."""
    gram, mean = np.asarray(ready.gram, np.float64), float(ready.mean)
    used = damping
    while (inverse := _linalg.inverse_on_host(gram + used * mean * np.eye(len(gram)))) is None:
        used = max(1e-6, 10 * used)
    gram = gram + used * mean * np.eye(len(gram))
    s = (1 / np.diagonal(inverse)) ** metric * np.diagonal(gram) ** (1 - metric)
    scaled = gram / np.sqrt(s[:, None] * s[None, :])
    inverses = []
    for rho in map(float, rhos):
        inverted = _linalg.inverse_on_host(scaled + rho * np.eye(len(gram)))
        assert inverted is not None  # `scaled` is positive definite already
        inverses.append(jnp.asarray(rho * inverted, ready.gram.dtype).astype(products))
    factors = Factors(jnp.asarray(np.sqrt(s)[:, None], ready.gram.dtype), rhos, tuple(inverses))
    facts = {"factors": "float64", "factor_damping": used, "condition": float(np.linalg.cond(gram, 1))}
    return factors, facts
