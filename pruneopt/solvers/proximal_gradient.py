"""Proximal gradient: any penalty with a proximal map, on a quadratic or on the true loss."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float

from pruneopt.bounds.duality import Duality, dual_value
from pruneopt.constraints import parts
from pruneopt.constraints.base import Constraint
from pruneopt.curvature.base import Curvature
from pruneopt.curvature.shrunk import Shrunk
from pruneopt.curvature.streamed import Streamed
from pruneopt.objectives.base import QuadraticObjective
from pruneopt.objectives.loss import Loss
from pruneopt.problem import Problem
from pruneopt.solvers.base import Outcome, Solver, Start, check_not_negative, check_whole

Tree = Any
_CHECKED = 20  # iterations between two looks at the gap
_HALVINGS = 60  # of one step, on the true loss
_NOISE = 1e-6  # of a loss in float32: 8 of its roundings
# Power iterations, and what is added to their estimate; a step that is too long for all that is halved. On five of the
# real layers 6 reach the largest eigenvalue to 1e-4 already; 6, 12 and 24 lead to the same iterations and no halving.
_POWERS, _MARGIN = 12, 1.05
_ROUNDING = 1e-9  # of a squared length in float64: what may fail the test of a step that is exactly 1 / curvature


@dataclass(frozen=True)
class ProximalGradient(Solver):
    """minimise f(w) + P(w), or f(w) over w in a ball, by w+ = prox_{t P}(y - t grad f(y)), Nesterov's momentum in y.

    For a ball, also within fixed supports or for each path, the prox is the projection. Where P is not convex y = w,
    else y = w + (k - 1) / (k + 2) (w - w_before), k counted from the last restart: momentum starts again where
    <y - w+, w+ - w> > 0. A step t that fails f(w+) <= f(y) + <grad f(y), w+ - y> + ||w+ - y||^2 / (2 t) is halved and
    taken again, which also catches one that diverges; stats["halvings"] says how often.

    On a quadratic in float64, one product an iteration, until the duality gap is `tolerance` of the objective (status
    optimal) or, where P is not convex or f has a gradient at w0, until ||w+ - y|| <= tolerance ||w+||. On a Loss in the
    network's own precision, two passes over the batches an iteration, until the latter.

    step: the first t; None takes 1 / the largest eigenvalue of H, and 1 for a Loss. iterations: at most; beyond is the
    status limit. Plain gradients are slow on ill-conditioned Grams: for L1 and elastic nets there `ActiveSet` is exact.
    stats: iterations, halvings, step, and the gap for a convex quadratic.
    Source: Beck and Teboulle 2009 (FISTA with backtracking), O'Donoghue and Candes 2015 (gradient restart).
    """

    iterations: int = 2000
    tolerance: float = 1e-6
    step: float | None = None

    def __post_init__(self) -> None:
        check_whole(self, 1, "iterations")
        check_not_negative(self, "tolerance")
        if self.step is not None and not 0 < self.step < math.inf:
            raise ValueError(f"step={self.step!r} is not a finite number > 0; pass a step, or None for 1 / curvature")

    @property
    def projects(self) -> bool:
        """True: the projection on a ball takes the place of the prox."""
        return True

    def refuses(self, problem: Problem) -> str | None:
        """Neither a penalty nor a ball, or both; an objective that is no Loss and no quadratic with a curvature."""
        f, ball = problem.objective, problem.subject_to
        if problem.penalty is None and ball is None:
            return "ProximalGradient needs a penalty; pass penalty= such as L1(0.01), or use Descent or Polish"
        if ball is not None and (problem.penalty is not None or not ball.bounds_values):
            return f"ProximalGradient takes a penalty or a ball (L1Ball, GroupBall); drop subject_to={ball!r}"
        if parts.of(ball).choices:
            return (
                f"ProximalGradient projects on a ball within fixed supports, and {ball!r} chooses among supports too; "
                "select one first, then pass Intersection((Support(mask), ball))"
            )
        if isinstance(f, Loss) and f.has_updates:
            return "ProximalGradient needs a loss without running statistics; pass a loss that holds them fixed"
        if not isinstance(f, Loss) and (not isinstance(f, QuadraticObjective) or f.curvature is None):
            return f"ProximalGradient needs a Loss, or a quadratic with a curvature, not {type(f).__name__} without one"
        return None

    def run(self, problem: Problem, init: Start | None, key: jax.Array) -> Outcome:
        """On the quadratic or the loss."""
        start = problem.objective.center if init is None else init.value
        if problem.subject_to is not None:
            start = problem.subject_to.project(start)
        if isinstance(problem.objective, Loss):
            return self._on_loss(problem, problem.objective, start)
        with jax.enable_x64(True):
            return self._on_quadratic(problem, start, jax.random.key(0))

    def _on_quadratic(self, problem: Problem, start: Tree, key: jax.Array) -> Outcome:
        f: Any = problem.objective
        model = _Model(_float64(f.curvature), _float64(f.center), _float64(f.gradient), jnp.float64(f.exact_ridge()))
        penalty, w = _float64(_proximal(problem)), _float64(start)
        streamed = _is_streamed(f.curvature)
        step = self.step or 1 / float(_streamed_curvature(model, key) if streamed else _curvature(model, key))
        iterated = _streamed if streamed else _iterated
        slope, zero = _slope(model, w), jnp.zeros((), jnp.float64)
        state = _State(w, w, slope, slope, zero + step, zero, jnp.zeros((), jnp.int32), zero + 1)
        proven = penalty.is_convex and f.gradient is None and f.is_convex and _is_bounded(problem)
        done, gap, settled = 0, math.inf, False
        while done < self.iterations and not settled:
            some = min(_CHECKED, self.iterations - done)
            state = iterated(model, penalty, state, some)
            done += some
            if proven:
                value = problem.value(state.w) - f.constant
                gap = value - (dual_value(problem, state.w) - f.constant)
                settled = not gap > self.tolerance * abs(value)
            else:
                settled = not float(state.moved) > self.tolerance
        point = jax.tree.map(np.asarray, state.w)
        value = jax.tree.map(lambda x, like: np.asarray(x).astype(like.dtype), point, f.center)
        stats = {"iterations": done, "halvings": int(state.halvings), "step": float(state.step)}
        if proven:
            stats["gap"] = gap
        return Outcome(
            value,
            jax.tree.map(lambda x: x != 0, value),
            hit_limit=not settled,
            evidence=Duality(point) if proven else None,
            stats=stats,
        )

    def _on_loss(self, problem: Problem, f: Loss, start: Tree) -> Outcome:
        penalty = _proximal(problem)
        w = before = jax.tree.map(jnp.asarray, start)
        f.finite_value(w)
        step, halvings, count, settled, done = self.step or 1.0, 0, 0, False, 0
        while done < self.iterations and not settled:
            y = _ahead(w, before, count / (count + 3) if penalty.is_convex else 0.0)
            height = f.value(y)
            if not math.isfinite(height):
                y, height = w, f.value(w)
            gradient = f.gradient(y)
            for _ in range(_HALVINGS):
                moved = _moved(penalty, y, gradient, step)
                model, change, size, turned = (float(x) for x in _compared(moved, y, w, gradient, step))
                if f.value(moved) <= height + model + _NOISE * abs(height):
                    break
                step, halvings = step / 2, halvings + 1
            else:
                return Outcome(
                    w, _nonzero(w), hit_limit=True, stats={"iterations": done, "halvings": halvings, "step": step}
                )
            count = 0 if turned > 0 else count + 1
            w, before, done = moved, w, done + 1
            settled = change <= self.tolerance * size
        stats = {"iterations": done, "halvings": halvings, "step": step}
        return Outcome(w, _nonzero(w), hit_limit=not settled, stats=stats)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class _Indicator:
    """A convex set as a penalty: zero inside, infinite outside."""

    values: Constraint = field(metadata={"static": True})

    is_convex = True

    def prox(self, w: Tree, step: Any) -> Tree:
        return self.values.project(w)


def _proximal(problem: Problem) -> Any:
    """What has the prox: the penalty, or the ball."""
    if problem.penalty is not None:
        return problem.penalty
    assert problem.subject_to is not None
    return _Indicator(problem.subject_to)


def _is_bounded(problem: Problem) -> bool:
    """Whether there is a penalty, or no leaf is free, whose slope would have to vanish for a bound."""
    every = jax.tree.map(lambda x: np.ones(x.shape), problem.objective.center)
    return problem.subject_to is None or math.isfinite(problem.subject_to.largest_product(every))


class _Model(NamedTuple):
    """A quadratic in float64."""

    curvature: Any
    center: Tree
    gradient: Tree | None
    ridge: Float[Array, ""]


class _State(NamedTuple):
    """w, the one before, both gradients, the step, iterations since a restart, halvings, ||w+ - y|| / ||w+||."""

    w: Tree
    before: Tree
    slope: Tree
    slope_before: Tree
    step: Float[Array, ""]
    since: Float[Array, ""]
    halvings: Array
    moved: Float[Array, ""]


def _float64(tree: Any) -> Any:
    def wide(x: Any) -> Any:
        return jnp.asarray(x, jnp.float64) if jnp.issubdtype(jnp.asarray(x).dtype, jnp.floating) else jnp.asarray(x)

    return jax.tree.map(wide, tree)


def _slope(model: _Model, w: Tree) -> Tree:
    d = jax.tree.map(jnp.subtract, w, model.center)
    slope = jax.tree.map(lambda hd, x: hd + model.ridge * x, model.curvature.mv(d), d)
    return slope if model.gradient is None else jax.tree.map(jnp.add, slope, model.gradient)


@jax.jit
def _curvature(model: _Model, key: jax.Array) -> Float[Array, ""]:
    """The largest eigenvalue of H + ridge I, from below by power iterations, plus a margin."""
    flat, start = _flat(model), _random(model.center, key)
    return _raised(lax.fori_loop(0, _POWERS, lambda _, v: _slope(flat, _unit(v)), start))


def _is_streamed(curvature: Curvature) -> bool:
    return isinstance(curvature, Streamed) or (isinstance(curvature, Shrunk) and _is_streamed(curvature.curvature))


def _streamed_curvature(model: _Model, key: jax.Array) -> Float[Array, ""]:
    """`_curvature` of products over the data, which no trace can hold."""
    flat, v = _flat(model), _random(model.center, key)
    for _ in range(_POWERS):
        v = _slope(flat, _unit(v))
    return _raised(v)


def _flat(model: _Model) -> _Model:
    """The model whose slope at v is (H + ridge I) v."""
    return model._replace(center=jax.tree.map(jnp.zeros_like, model.center), gradient=None)


def _random(like: Tree, key: jax.Array) -> Tree:
    leaves, structure = jax.tree.flatten(like)
    keys = jax.random.split(key, len(leaves))
    start = [jax.random.normal(k, x.shape, x.dtype) for k, x in zip(keys, leaves, strict=True)]
    return jax.tree.unflatten(structure, start)


def _unit(v: Tree) -> Tree:
    size = jnp.sqrt(_dot(v, v))
    return jax.tree.map(lambda x: x / jnp.where(size > 0, size, 1.0), v)


def _raised(v: Tree) -> Float[Array, ""]:
    largest = jnp.sqrt(_dot(v, v))
    return jnp.where(largest > 0, _MARGIN * largest, 1.0)


def _dot(a: Tree, b: Tree) -> Array:
    products = [jnp.sum(x * y) for x, y in zip(*map(jax.tree.leaves, (a, b)), strict=True)]
    return jnp.sum(jnp.stack(products))


@jax.jit
def _iterated(model: _Model, penalty: Any, state: _State, iterations: int) -> _State:
    """Slopes of affine combinations are combinations of slopes: one product an iteration."""

    def iteration(_, s: _State) -> _State:
        y, slope, moved = _tried(penalty, s)
        return _judged(s, y, slope, moved, _slope(model, moved))

    return lax.fori_loop(0, iterations, iteration, state)


def _streamed(model: _Model, penalty: Any, state: _State, iterations: int) -> _State:
    """`_iterated` for products over the data, which no trace can hold."""
    for _ in range(iterations):
        y, slope, moved = _tried(penalty, state)
        state = _judged(state, y, slope, moved, _slope(model, moved))
    return state


@jax.jit
def _tried(penalty: Any, s: _State) -> tuple[Tree, Tree, Tree]:
    """y, the slope there, and the prox of the step from y."""
    beta = s.since / (s.since + 3) if penalty.is_convex else jnp.zeros_like(s.since)
    y, slope = (
        jax.tree.map(lambda new, old: new + beta * (new - old), *pair)
        for pair in ((s.w, s.before), (s.slope, s.slope_before))
    )
    return y, slope, penalty.prox(jax.tree.map(lambda a, g: a - s.step * g, y, slope), s.step)


@jax.jit
def _judged(s: _State, y: Tree, slope: Tree, moved: Tree, slope_moved: Tree) -> _State:
    """The state at `moved` where the step was short enough, else where it was with half the step."""
    change, bend = (jax.tree.map(jnp.subtract, a, b) for a, b in ((moved, y), (slope_moved, slope)))
    square = _dot(change, change)
    fits = _dot(change, bend) * s.step <= square * (1 + _ROUNDING)
    turned = _dot(change, jax.tree.map(jnp.subtract, moved, s.w)) < 0
    size = jnp.sqrt(_dot(moved, moved))
    taken = _State(
        moved,
        s.w,
        slope_moved,
        s.slope,
        s.step,
        jnp.where(turned, 0.0, s.since + 1),
        s.halvings,
        jnp.sqrt(square) / jnp.where(size > 0, size, 1.0),
    )
    halved = _State(s.w, s.w, s.slope, s.slope, s.step / 2, 0.0 * s.since, s.halvings + 1, jnp.ones_like(s.moved))
    return jax.tree.map(lambda a, b: jnp.where(fits, a, b), taken, halved)


@jax.jit
def _ahead(w: Tree, before: Tree, beta: float) -> Tree:
    return jax.tree.map(lambda new, old: new + jnp.asarray(beta, new.dtype) * (new - old), w, before)


@jax.jit
def _moved(penalty: Any, y: Tree, gradient: Tree, step: float) -> Tree:
    forward = jax.tree.map(lambda a, g: a - jnp.asarray(step, a.dtype) * g.astype(a.dtype), y, gradient)
    return penalty.prox(forward, step)


@jax.jit
def _compared(moved: Tree, y: Tree, w: Tree, gradient: Tree, step: float) -> tuple[Array, Array, Array, Array]:
    """What the model of f adds to f(y), ||moved - y||, ||moved||, and <y - moved, moved - w>."""
    change = jax.tree.map(jnp.subtract, moved, y)
    square, forth = _dot(change, change), jax.tree.map(jnp.subtract, moved, w)
    along = _dot(jax.tree.map(lambda g, c: g.astype(c.dtype), gradient, change), change)
    half = square / (2 * jnp.asarray(step, square.dtype))
    return along + half, jnp.sqrt(square), jnp.sqrt(_dot(moved, moved)), -_dot(change, forth)


def _nonzero(w: Tree) -> Tree:
    return jax.tree.map(lambda x: x != 0, w)
