"""Iterative hard thresholding while training: dense and sparse phases in turn."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
import optax
from jax import lax

from pruneopt.constraints.base import Constraint
from pruneopt.network.leaves import Choice
from pruneopt.solution import Pruned
from pruneopt.structure.layout import Layout
from pruneopt.training.base import (
    MaskedState,
    SparseOptimizer,
    as_optimizer,
    checked,
    checked_constraint,
    chosen,
    everywhere,
    held_from,
    on_masks,
    own_state,
    step_on,
)
from pruneopt.training.schedule import Interval

Tree = Any


def hard_threshold(
    optimizer: optax.GradientTransformation,
    constraint: Constraint,
    *,
    end: int,
    begin: int = 0,
    every: int = 100,
    hold: int = 50,
    leaves: Choice = None,
    layout: Layout | None = None,
) -> SparseOptimizer:
    """minimise f(w) subject to w in C by w <- P_C(w) every `every` steps, P_C keeping the constraint's best by |w|.

    After each projection the support is held for `hold` steps (1: the projection alone), then all weights move again,
    from zero where they were cut; from step `end` on the support is held for good, so that the rest of training
    retrains it.
    layout: the matrices of leaves that are no plain (n_in, n_out), `structure.layout(fn, params, batch)`; needed where
        the constraint speaks of inputs and outputs, `axis="in"`, `per="out"`.

    Source: Jin et al. 2016, algorithm 1 (both phases); with hold=1 iterative hard thresholding, Blumensath and Davies
    2009. Raises ValueError for a hold outside [1, every].
    """
    constraint = checked_constraint(constraint, layout)
    inner, when = as_optimizer(optimizer, "hard_threshold"), Interval(begin, end, every)
    if isinstance(hold, bool) or not hasattr(hold, "__index__") or not 1 <= hold <= every:
        raise ValueError(f"hold={hold!r} is not a whole number in [1, every={every}]; pass steps to hold a support")

    def select(masks: Tree, params: Tree) -> Tree:
        return constraint.select(on_masks(lambda m, w: jnp.abs(w), masks, params))

    def init(params: Tree) -> MaskedState:
        picked = chosen(params, leaves, constraint)
        return MaskedState(jnp.zeros((), jnp.int32), everywhere(picked), inner.init(params))

    def update(
        gradient: Tree, state: MaskedState, params: Tree | None = None, **extra: Any
    ) -> tuple[Tree, MaskedState]:
        params, step = checked(params, gradient, state.masks), state.step
        masks = lax.cond(when.is_due(step), lambda m: select(m, params), lambda m: m, state.masks)
        held = (step >= end) | ((step >= begin) & ((step - begin) % every < hold))
        open_ = on_masks(lambda m: m | ~held, masks)
        updates, new = step_on(inner, gradient, state.inner, params, open_, extra)
        return updates, MaskedState(step + 1, masks, new)

    def finish(params: Tree, state: Any) -> Pruned:
        return held_from(end, params, own_state(state, MaskedState, params), constraint, "hard_threshold")

    return SparseOptimizer(init, update, finish, constraint.scope())
