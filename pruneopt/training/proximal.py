"""A proximal step after any optimiser: a penalty that makes exact zeros while training."""

from __future__ import annotations

from collections.abc import Callable
from numbers import Real
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
import optax

from pruneopt import _tree
from pruneopt.network.leaves import Choice, partition
from pruneopt.penalties.base import Penalty
from pruneopt.solution import Pruned
from pruneopt.training.base import (
    SparseOptimizer,
    as_optimizer,
    checked,
    chosen,
    is_hole,
    moved_by,
    own_state,
    towards,
)
from pruneopt.training.metric import Metric, adam_metric, rms_metric

Tree = Any
# Two first steps on gradients a decade apart tell a metric of the optimiser's own: their ratios to the gradient agree
# for SGD and differ by ten for Adam. Nesterov's first step is up to twice SGD's.
_GRADIENTS, _AGREEING, _STEPS = (0.01, 0.1), (0.9, 1.1), (0.5, 2.5)


class ProximalState(NamedTuple):
    """step: updates made. seen: the sums of each penalised leaf over all axes but the last, after the last one.
    inner: the optimiser's.

    By those `finish` knows its own params: a weight that something else has moved moves its sum.
    """

    step: jax.Array
    seen: Tree
    inner: Any


def proximal(
    optimizer: optax.GradientTransformation,
    penalty: Penalty,
    learning_rate: float | Callable[[Any], Any],
    *,
    metric: Metric | None = None,
    leaves: Choice = None,
) -> SparseOptimizer:
    """minimise f(w) + penalty(w): the optimiser's step, then the penalty's proximal map in the optimiser's own metric.

    With D = diag(d) the optimiser's preconditioner (d = 1 without one) and a its learning rate,

        v = w - a D m,    w <- argmin_u  penalty(u) + |u - v|^2_{D^-1} / (2 a),

    for L1 the soft threshold at a d_i weight. A fixed point has 0 in m + d penalty(w) whatever D is; with a plain prox
    after an adaptive step it has not, so that is refused.

    learning_rate: that of `optimizer`, a number or its schedule. metric: for adaptive optimisers the function from
        their state to d: `adam_metric()`, `rms_metric()`, or your own. With one, the penalty's prox must be entrywise.
    leaves: which leaves are penalised, as in `prune`.
    Heavy-ball momentum m sums gradients up to 1 / (1 - m) of themselves, so against it a penalty acts with (1 - m) of
    its weight; Adam's averages do not.

    Source: Yun, Lozano and Yang 2021 (ProxGen), algorithm 1. Raises ValueError at `init` for an adaptive optimiser
    without a metric, and where the first step is not learning_rate * d * gradient (to a factor of 2, for Nesterov);
    at `finish` where the params are not those of the last step, since something chained after this one moved them.
    """
    inner = as_optimizer(optimizer, "proximal")
    if not isinstance(penalty, Penalty):
        raise TypeError(f"penalty is {penalty!r}; pass a penalty such as L1(1e-4)")
    if metric is not None and (not callable(metric) or metric in (adam_metric, rms_metric)):
        raise TypeError(f"metric is {metric!r}; pass adam_metric(), rms_metric() or a function from the state to d")
    if metric is not None and not penalty.is_entrywise:
        raise ValueError(
            f"penalty is a {type(penalty).__name__}, whose prox in a metric is not known; pass an optimiser without a "
            "metric (SGD, momentum), or a penalty that is a sum over entries, such as L1"
        )
    rate = learning_rate if callable(learning_rate) else lambda step: learning_rate
    given: Any = learning_rate
    number = isinstance(given, Real) or (_tree.is_array(given) and jnp.ndim(given) == 0)
    if not callable(given) and not (number and 0 < cast(float, given) < float("inf")):
        raise ValueError(f"learning_rate={learning_rate!r} is not a positive number; pass that of the optimiser")

    def init(params: Tree) -> ProximalState:
        picked = chosen(params, leaves)
        penalty.check(picked)
        _check_step(inner, rate, metric, params)
        return ProximalState(jnp.zeros((), jnp.int32), jax.tree.map(_sums, picked), inner.init(params))

    def update(
        gradient: Tree, state: ProximalState, params: Tree | None = None, **extra: Any
    ) -> tuple[Tree, ProximalState]:
        picked, _ = partition(checked(params, gradient, state.seen), leaves)
        updates, new = inner.update(gradient, state.inner, params, **extra)
        moved = jax.tree.map(
            lambda w, u: None if w is None else w + u.astype(w.dtype), picked, updates, is_leaf=is_hole
        )
        a = rate(state.step)
        if metric is None:
            target = penalty.prox(moved, a)
        else:
            d = metric(new)
            steps = jax.tree.map(
                lambda v, d: None if v is None else jnp.asarray(a, v.dtype) * d.astype(v.dtype),
                moved,
                d,
                is_leaf=is_hole,
            )
            target = penalty.prox(moved, steps)
        updates = towards(target, params, updates)
        moves = jax.tree.map(lambda w, u: None if w is None else u.astype(w.dtype), picked, updates, is_leaf=is_hole)
        left = jax.tree.map(lambda w, u: _sums(w + u), picked, moves)
        return updates, ProximalState(state.step + 1, left, new)

    def finish(params: Tree, state: Any) -> Pruned:
        own = own_state(state, ProximalState, params)
        picked = jax.tree.map(lambda seen, w: None if seen is None else w, own.seen, params, is_leaf=is_hole)
        for (path, w), left in zip(_tree.named_leaves(picked), jax.tree.leaves(own.seen), strict=True):
            if int(own.step) > 0 and bool(jnp.any(jnp.abs(_sums(w) - left) > _rounding(w))):
                raise ValueError(
                    f"params holds weights in leaf '{path}' that are not those of the last step: {moved_by('proximal')}"
                )
        return Pruned(params, jax.tree.map(lambda w: w != 0, picked))

    return SparseOptimizer(init, update, finish)


def _sums(w: jax.Array) -> jax.Array:
    """Over all axes but the last, or over all there are; in float32 at least."""
    return jnp.sum(w, axis=tuple(range(w.ndim - 1)) or None, dtype=_tree.wide(w.dtype))


def _rounding(w: jax.Array) -> jax.Array:
    """How far two ways of compiling one step may take `_sums`: each weight off by a rounding of its own dtype, one of
    them by that of the step it made, and what the sum itself rounds.
    """
    own, wide = (float(jnp.finfo(dtype).eps) for dtype in (w.dtype, _tree.wide(w.dtype)))
    sizes = _sums(jnp.abs(w))
    return (own + 4 * (w.size / sizes.size) ** 0.5 * wide) * sizes + own**0.5 * jnp.max(jnp.abs(w))


def _check_step(
    optimizer: optax.GradientTransformationExtraArgs, rate: Callable[[Any], Any], metric: Metric | None, params: Tree
) -> None:
    """The first step from zero, on one entry a leaf, against learning_rate * d * gradient."""
    with jax.ensure_compile_time_eval():
        a = float(rate(jnp.zeros((), jnp.int32)))
        if a == 0:  # a warm-up starts here: nothing to compare
            return
        tiny = jax.tree.map(lambda x: jnp.zeros((1,) * x.ndim, x.dtype) if _tree.is_array(x) else x, params)
        ratios = []
        for size in _GRADIENTS:
            gradient = jax.tree.map(lambda x, size=size: jnp.full_like(x, size) if _tree.is_array(x) else x, tiny)
            updates, state = optimizer.update(gradient, optimizer.init(tiny), tiny)
            d = jax.tree.leaves(tiny if metric is None else metric(state))[0].reshape(-1)[0]
            step = abs(float(jax.tree.leaves(updates)[0].reshape(-1)[0]))
            ratios.append(step / (a * size * (1.0 if metric is None else float(d))))
    if metric is None and not _AGREEING[0] < ratios[1] / ratios[0] < _AGREEING[1]:
        raise ValueError(
            "optimizer steps in a metric of its own (its step is not proportional to the gradient), and a plain "
            "proximal step after it solves another problem: a weight's threshold would not be scaled as its step is; "
            "pass metric=adam_metric() (or rms_metric(), or your own) with the optimiser's constants"
        )
    if not all(_STEPS[0] < r < _STEPS[1] for r in ratios):
        raise ValueError(
            f"optimizer's first step is {ratios[0]:.3g} times learning_rate * metric * gradient, learning_rate={a}; "
            "pass the optimiser's own learning rate, and the metric of its own constants"
        )
