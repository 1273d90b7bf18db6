"""Operator splitting in the metric of the inverse diagonal, then a refit: the layer engine."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Bool, Float, Integer

from pruneopt import _linalg
from pruneopt.constraints.base import Constraint
from pruneopt.objectives.prepared import Layer
from pruneopt.problem import Problem
from pruneopt.solvers.base import Outcome, Solver, Start, check_not_negative, check_whole, layer_only, outcome, prepared
from pruneopt.solvers.factors import Wanted, factored
from pruneopt.solvers.refine import is_hard, is_small, is_tiny, refined
from pruneopt.solvers.threshold import Masking, projection, selected


@dataclass(frozen=True)
class ADMM(Solver):
    """minimise 1/2 tr((W - W0)^T (H + lambda I) (W - W0)) over W in the constraint, by splitting W = D, D feasible.

    Removing w_j costs s_j w_j^2 / 2 where the others are refitted: s_j = 1 / [H^-1]_jj if all others are kept, H_jj if
    none is. Of a density d, with D = diag(H) and g = (1 - d) / sqrt(d), s_j = 1 / [(H + g D)^-1]_jj - g D_j, at least
    `floor` D_j: OBS's metric at d = 1, magnitude's in diag(H) at d = 0. With B = sqrt(s) W and A = H / sqrt(s s^T),
    the projection that ADMM needs is then the constraint's selection by b^2. In Douglas-Rachford form, with B0 the
    dense weights, M the mask of the projection of T and r the relaxation, each iteration is

        B = B0 + rho (A + rho I)^-1 ((2 M - 1) T - B0),    T <- T + r (B - M T).

    rho rises geometrically over `levels`. All large numbers stand as differences from B0, so that the product may be
    rounded to bfloat16. Then `refit` conjugate gradients on the support with the layer's own H.

    rho: first and last. levels, iterations: of rho, and at each; on n > 4 m inputs, m outputs, where products cost
        little beside the inverses, sqrt(n / 4m) times as many iterations, up to 4 times. relaxation: r in (0, 2).
    density: d; None: what the constraint keeps of the weights of live inputs. metric_block: takes the inverse's
        diagonal from those of H's diagonal blocks of at most so many inputs, at a fraction of the cost of the whole
        inverse (None); the metric alone depends on it.
    damping: relative, of A; refit_damping: relative, of the refit. Neither enters the objective.
    products: of the iterations; None takes bfloat16 where the device multiplies it fast, else float32. Float64
        weights are solved in float64.
    refine: exchanges of single weights with exact refits until none helps, on problems of at most 1,024 inputs and 16
        outputs, or of 64 inputs and 16,384 weights, whose constraint lets them: "hard" on the latter and where at most
        a 16th of the inputs is kept or H is singular, "always" on all of them, and also from the supports of forward
        selection and `GreedyOBS`, the best of the three.

    From `init` it starts where its weights would be a fixed point; the result is never worse than a feasible init.
    Cost: (levels * iterations + refit + 1) products of n^2 m, (levels + 1) inverses of about 0.7 n^3, on n inputs and m
    outputs; memory 4 n^2 + 8 n m numbers. Where levels n <= 2 (n + m) the inverses, levels n^2 numbers (half the bytes
    in bfloat16), stay with the Gram until it goes or is solved with other settings: layers that share a Gram, solved in
    turn, share them. Others are made one at a time.
    stats: condition (of H + g D, damped, estimated from below), dead_inputs, factors ("float32", "float64" where the
    probe of the first failed, with more damping where that failed too), factor_damping, products.
    Source: ALPS (Meng et al. 2024, algorithm 1), with the metric of OBS (Hassibi and Stork 1993) for the density that
    is kept in place of diag(H), and a fixed schedule of rho. g and the constants: head_to_head/presets.py.
    """

    rho: tuple[float, float] = (0.5, 1.1)
    levels: int = 3
    iterations: int = 4
    relaxation: float = 1.2
    density: float | None = None
    floor: float = 0.1
    metric_block: int | None = None
    damping: float = 0.001
    refit: int = 4
    refit_damping: float = 0.001
    products: Literal["bfloat16", "float32"] | None = None
    refine: Literal["never", "hard", "always"] = "never"

    def __post_init__(self) -> None:
        first, last = self.rho
        if not 0 < first <= last < float("inf"):
            raise ValueError(f"rho={self.rho!r}: pass the first and the last, 0 < first <= last, such as (0.5, 1.1)")
        check_whole(self, 1, "levels", "iterations")
        check_whole(self, 0, "refit")
        if self.metric_block is not None:
            check_whole(self, 1, "metric_block")
        check_not_negative(self, "damping", "refit_damping", "floor")
        if not 0 < self.relaxation < 2:
            raise ValueError(f"relaxation={self.relaxation!r} is outside (0, 2), where ADMM converges; pass about 1.2")
        if self.density is not None and not 0 < self.density <= 1:
            raise ValueError(f"density={self.density!r} is outside (0, 1]; pass the part of the weights that is kept")
        if self.products not in (None, "bfloat16", "float32"):
            raise ValueError(f"products={self.products!r}: pass 'bfloat16', 'float32' or None")
        if self.refine not in ("never", "hard", "always"):
            raise ValueError(f"refine={self.refine!r}: pass 'never', 'hard' or 'always'")

    @property
    def never_worse_than(self) -> frozenset[str]:
        """A feasible init."""
        return frozenset({"init"})

    def refuses(self, problem: Problem) -> str | None:
        """Any objective but Reconstruction, a penalty, or no constraint."""
        return layer_only(problem, self)

    def iterations_at(self, n: int, m: int) -> int:
        """At each level, on n inputs and m outputs."""
        return round(self.iterations * min(max(1.0, n / (4 * m)) ** 0.5, 4.0))

    def _refines(self, problem: Problem, ready: Layer, support: Bool[np.ndarray, "n m"]) -> bool:
        if self.refine == "never" or ready.blank or not is_small(problem, support.shape):
            return False
        return self.refine == "always" or is_tiny(support.shape) or is_hard(ready, support)

    def run(self, problem: Problem, init: Start | None, key: jax.Array) -> Outcome:
        """Prepare, factor, iterate, select, refit."""
        assert problem.subject_to is not None
        ready = prepared(problem)
        dtype = ready.gram.dtype
        masking = projection(problem.subject_to, ready.center.shape, dtype)
        density = kept_density(problem.subject_to, ready) if self.density is None else self.density
        wanted = Wanted(self.damping, density, self.floor, self.metric_block, self.rho, self.levels, self.products)
        factors, facts = factored(problem, ready, wanted)
        t = ready.center
        if not ready.blank:
            start = None if init is None else ready.started(init.value)
            state = _started(ready, factors.scale, factors.rhos[0], masking, start)
            relaxation, iterations = np.asarray(self.relaxation, dtype), np.int32(self.iterations_at(*t.shape))
            for rho, inverse in zip(factors.rhos, factors.inverses, strict=True):
                state = _iterated(ready, factors.scale, inverse, masking, state, rho, relaxation, iterations)
            t = state.t
            del state
        scores, weights = _judged(ready, t, factors.scale)
        del t
        support = selected(problem.subject_to, scores)
        del scores
        refit_damping, refit = np.asarray(self.refit_damping, dtype), np.int32(self.refit)
        refitted = partial(_refitted, ready, refit_damping, refit, factors.products)
        value = refitted(weights, support)
        del weights
        if init is not None:
            start = ready.started(init.value)
            found = [(value, support), (refitted(start, init.support), init.support), (start, init.support)]
            value, support = min(found, key=lambda pair: float(_error(ready, *pair)))
        if self._refines(problem, ready, np.asarray(support)):
            value, support, more = refined(problem, ready, np.asarray(support), key, starts=self.refine == "always")
            facts |= more
        facts |= {"dead_inputs": int(np.count_nonzero(np.asarray(ready.dead))), "products": factors.products.name}
        return outcome(problem, ready, value, support, stats=facts)


def kept_density(constraint: Constraint, ready: Layer) -> float:
    """The part of the weights of live inputs that a constraint keeps, a hundredth of one input at least."""
    n, live = len(ready.gone), len(ready.gone) - int(np.count_nonzero(np.asarray(ready.gone)))
    return float(np.clip(constraint.density(ready.center) * n / max(live, 1), 0.01 / n, 1.0))


class State(NamedTuple):
    """Between levels: T, its mask, the threshold's state, and the rho before."""

    t: Float[Array, "n m"]
    mask: Bool[Array, "n m"]
    threshold: Any
    rho: Float[Array, ""]


@jax.jit
def _started(
    ready: Layer, scale: Float[Array, "n 1"], rho: Float[Array, ""], masking: Masking, start: Float[Array, "n m"] | None
) -> State:
    """At the dense weights, or where `start` would be a fixed point if it were optimal."""
    t = scale * ready.center
    if start is not None:
        t = scale * start + _linalg.matmul(ready.gram, ready.center - start) / (scale * rho)
    return State(t, *masking.mask(t, masking.start(t)), rho)


@jax.jit
def _iterated(
    ready: Layer,
    scale: Float[Array, "n 1"],
    inverse: Float[Array, "n n"],
    masking: Masking,
    state: State,
    rho: Float[Array, ""],
    relaxation: Float[Array, ""],
    iterations: Integer[Array, ""],
) -> State:
    """The state after all iterations at one rho."""
    dense, zero = scale * ready.center, jnp.zeros((), ready.center.dtype)
    t = jnp.where(state.mask, state.t, state.t * (state.rho / rho))  # off the support stands the dual over rho

    def iteration(_, now):
        t, mask, threshold = now
        moved = dense + _linalg.rounded_matmul(inverse, jnp.where(mask, t, -t) - dense)
        t = t + relaxation * (moved - jnp.where(mask, t, zero))
        return t, *masking.mask(t, threshold)

    t, mask, threshold = lax.fori_loop(0, iterations, iteration, (t, state.mask, masking.turn(t, state.threshold)))
    return State(t, mask, threshold, rho)


@jax.jit
def _judged(ready: Layer, t: Float[Array, "n m"], scale: Float[Array, "n 1"]) -> tuple[Array, Array]:
    """Scores to select by, and the weights before they are masked."""
    return ready.scores(t * t), t / scale


@partial(jax.jit, static_argnums=3)
def _refitted(
    ready: Layer,
    damping: Float[Array, ""],
    steps: Integer[Array, ""],
    products: Any,
    start: Float[Array, "n m"],
    support: Bool[Array, "n m"],
) -> Float[Array, "n m"]:
    """The weights after conjugate gradients on the support."""
    ridge = damping * ready.mean
    return _linalg.masked_cg(ready.gram, ready.center, start, support, steps, products, ridge)[0]


@jax.jit
def _error(ready: Layer, value: Float[Array, "n m"], support: Bool[Array, "n m"]) -> Float[Array, ""]:
    """Twice the objective of `value` on the support."""
    change = ready.center - jnp.where(support, value, jnp.zeros((), value.dtype))
    return jnp.sum(change * _linalg.matmul(ready.gram, change))
