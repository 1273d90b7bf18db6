"""ADMM while training: the weights are pulled to their projection in the optimiser's metric."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import lax

from pruneopt import _tree
from pruneopt.constraints.base import Constraint
from pruneopt.solution import Pruned
from pruneopt.structure.leaves import Choice
from pruneopt.training.base import (
    SparseOptimizer,
    as_optimizer,
    check_constraint,
    chosen,
    everywhere,
    forgotten,
    is_hole,
    needed,
    on_masks,
    on_support,
    own_state,
    settled,
)
from pruneopt.training.metric import Metric
from pruneopt.training.schedule import Interval

Tree = Any


class ADMMState(NamedTuple):
    """step: updates made. target: z in C. dual: u, scaled. masks: the support of z. inner: the optimiser's state."""

    step: jax.Array
    target: Tree
    dual: Tree
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
) -> SparseOptimizer:
    """minimise f(w) subject to w = z, z in C: f is seen only by the optimiser, C only by a projection.

    With D = diag(d) the optimiser's metric (d = 1 without one) and rho the penalty's weight,

        w: one optimiser step on f + rho/2 |w - z + u|^2_{D^-1}, whose second part moves it by -p (w - z + u),
        every `every` steps:  z <- P_C(w + u), keeping what costs most in the metric, (w + u)^2 / d;  u <- w + u - z.

    p, the pull of a step, rises by stages to `pull` (u is rescaled with it). From step `end` on the support of z is
    held and the rest of training retrains it: the count is met to the unit.

    pull: in (0, 1). metric: as in `proximal`, `adam_metric()` after Adam: its second moments are the curvature in which
        a weight's removal is judged; None judges by |w + u|.
    Source: Lee et al. 2025 (ELSA: surrogate-free ADMM, projection in Adam's second moments); Boyd et al. 2011,
    section 9.1. There the pull is part of Adam's gradient, here it stays out of its moments.
    """
    check_constraint(constraint)
    inner, when = as_optimizer(optimizer, "admm"), Interval(begin, end, every)
    if not 0 < pull < 1:
        raise ValueError(f"pull={pull!r} is outside (0, 1); pass the share of the way to z - u that a step goes")

    def init(params: Tree) -> ADMMState:
        picked = chosen(params, leaves, constraint)
        copies, zeros = jax.tree.map(jnp.array, picked), jax.tree.map(jnp.zeros_like, picked)
        return ADMMState(jnp.zeros((), jnp.int32), copies, zeros, everywhere(picked), inner.init(params))

    def update(gradient: Tree, state: ADMMState, params: Tree | None = None, **extra: Any) -> tuple[Tree, ADMMState]:
        params, step = needed(params), state.step
        stage = when.stage(step)

        def projected(target: Tree, dual: Tree, masks: Tree) -> tuple[Tree, Tree, Tree]:
            shrink = jnp.maximum(stage, 1) / (stage + 1)  # rho of the stage before over that of this one
            v = on_masks(lambda m, w, u: w + u, masks, params, dual)
            scores = jax.tree.map(jnp.square, v)
            if metric is not None:
                scores = on_masks(lambda m, s, d: s.astype(d.dtype) / d, masks, scores, metric(state.inner))
            masks = constraint.select(scores)
            target = jax.tree.map(lambda m, x: jnp.where(m, x, jnp.zeros((), x.dtype)), masks, v)
            return target, jax.tree.map(lambda x, z: (x - z) * shrink.astype(x.dtype), v, target), masks

        kept = (state.target, state.dual, state.masks)
        target, dual, masks = lax.cond(when.is_due(step), projected, lambda *same: same, *kept)
        p = jnp.where(step < begin, 0.0, pull * (stage + 1) / when.stages)

        def pulled(z: Any, update: Any, w: Any, u: Any) -> Any:
            return update if z is None else update - p.astype(update.dtype) * (w - z + u).astype(update.dtype)

        held = step >= end
        support = on_masks(lambda m: m | ~held, masks)
        updates, new = inner.update(_tree.masked(gradient, support), state.inner, params, **extra)
        free = jax.tree.map(pulled, target, updates, params, dual, is_leaf=is_hole)
        updates = jax.tree.map(lambda f, u: jnp.where(held, u, f), free, updates)
        new = forgotten(new, support)
        return settled(support, params, updates), ADMMState(step + 1, target, dual, masks, new)

    def finish(params: Tree, state: Any) -> Pruned:
        own = own_state(state, ADMMState)
        if int(own.step) > end:
            return on_support(params, own.masks, "admm")
        masks = constraint.select(on_masks(lambda m, w: jnp.abs(w), own.masks, params))
        return Pruned(_tree.masked(params, masks), masks)

    return SparseOptimizer(init, update, finish)
