"""ADMM while training: the weights are pulled to their projection in the optimiser's metric."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import lax

from pruneopt.constraints.base import Constraint
from pruneopt.network.leaves import Choice
from pruneopt.solution import Pruned
from pruneopt.structure.layout import Layout
from pruneopt.training.base import (
    SparseOptimizer,
    as_optimizer,
    checked,
    checked_constraint,
    chosen,
    everywhere,
    held_from,
    is_hole,
    on_masks,
    own_state,
    step_on,
)
from pruneopt.training.metric import Metric
from pruneopt.training.schedule import Interval

Tree = Any


class ADMMState(NamedTuple):
    """step: updates made. pulled_to: z - u. masks: the support of z. inner: the optimiser's state.

    z is zero off its support and the scaled dual u, what the projection took away, is zero on it: z - u is both.
    """

    step: jax.Array
    pulled_to: Tree
    masks: Tree
    inner: Any


def admm(
    optimizer: optax.GradientTransformation,
    constraint: Constraint,
    *,
    end: int,
    begin: int = 0,
    every: int = 50,
    pull: float = 0.02,
    metric: Metric | None = None,
    leaves: Choice = None,
    layout: Layout | None = None,
) -> SparseOptimizer:
    """minimise f(w) subject to w = z, z in C: f is seen only by the optimiser, C only by a projection.

    With D = diag(d) the optimiser's metric (d = 1 without one) and rho the penalty's weight,

        w: one optimiser step on f + rho/2 |w - z + u|^2_{D^-1}, whose second part moves it by -p (w - z + u),
        every `every` steps:  z <- P_C(w + u), keeping what costs most in the metric, (w + u)^2 / d;  u <- w + u - z.

    p, the pull of a step, rises by stages to `pull` (u is rescaled with it). From step `end` on the support of z is
    held and the rest of training retrains it: the count is met to the unit.

    pull: in (0, 1). metric: as in `proximal`, `adam_metric()` after Adam: its second moments are the curvature in which
        a weight's removal is judged; None judges by |w + u|.
    layout: the matrices of leaves that are no plain (n_in, n_out), `structure.layout(fn, params, batch)`; needed where
        the constraint speaks of inputs and outputs, `axis="in"`, `per="out"`.
    Source: Lee et al. 2025 (ELSA: surrogate-free ADMM, projection in Adam's second moments); Boyd et al. 2011,
    section 9.1. There the pull is part of Adam's gradient, here it stays out of its moments.
    """
    constraint = checked_constraint(constraint, layout)
    inner, when = as_optimizer(optimizer, "admm"), Interval(begin, end, every)
    if not 0 < pull < 1:
        raise ValueError(f"pull={pull!r} is outside (0, 1); pass the share of the way to z - u that a step goes")

    def init(params: Tree) -> ADMMState:
        picked = chosen(params, leaves, constraint)
        return ADMMState(
            jnp.zeros((), jnp.int32), jax.tree.map(jnp.array, picked), everywhere(picked), inner.init(params)
        )

    def update(gradient: Tree, state: ADMMState, params: Tree | None = None, **extra: Any) -> tuple[Tree, ADMMState]:
        params, step = checked(params, gradient, state.masks), state.step
        stage = when.stage(step)

        def projected(goal: Tree, masks: Tree) -> tuple[Tree, Tree]:
            shrink = jnp.maximum(stage, 1) / (stage + 1)  # rho of the stage before over that of this one
            v = on_masks(lambda m, w, x: jnp.where(m, w, w - x), masks, params, goal)  # w + u
            scores = jax.tree.map(jnp.square, v)
            if metric is not None:
                scores = on_masks(lambda m, s, d: s.astype(d.dtype) / d, masks, scores, metric(state.inner))
            masks = constraint.select(scores)
            return jax.tree.map(lambda m, x: jnp.where(m, x, -x * shrink.astype(x.dtype)), masks, v), masks

        goal, masks = lax.cond(when.is_due(step), projected, lambda *same: same, state.pulled_to, state.masks)
        p = jnp.where(step < begin, 0.0, pull * (stage + 1) / when.stages)

        held = step >= end
        support = on_masks(lambda m: m | ~held, masks)
        updates, new = step_on(inner, gradient, state.inner, params, support, extra)

        def pulled(x: Any, update: Any, w: Any) -> Any:
            if x is None:
                return update
            return jnp.where(held, update, update - p.astype(update.dtype) * (w - x).astype(update.dtype))

        return jax.tree.map(pulled, goal, updates, params, is_leaf=is_hole), ADMMState(step + 1, goal, masks, new)

    def finish(params: Tree, state: Any) -> Pruned:
        return held_from(end, params, own_state(state, ADMMState, params), constraint, "admm")

    return SparseOptimizer(init, update, finish, constraint.scope())
