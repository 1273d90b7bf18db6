"""Gradual magnitude pruning while training."""

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
    check_alive,
    checked,
    checked_constraint,
    chosen,
    everywhere,
    magnitudes,
    on_support,
    own_state,
    step_on,
)
from pruneopt.training.schedule import Interval

Tree = Any


def gradual(
    optimizer: optax.GradientTransformation,
    constraint: Constraint,
    *,
    end: int,
    begin: int = 0,
    every: int = 100,
    leaves: Choice = None,
    layout: Layout | None = None,
) -> SparseOptimizer:
    """minimise f(w) subject to w in C, by cutting the smallest |w| every `every` steps from `begin` to `end`.

    After stage t of n the fraction 1 - (1 - t/n)^3 of the removals is made (`constraint.relaxed`); what is cut stays
    cut, as in `freeze`, so that this is magnitude pruning with a masked optimiser, the baseline of every comparison.
    From step `end` on the support is `constraint.select`'s own: the count is met to the unit.
    layout: the matrices of leaves that are no plain (n_in, n_out), `structure.layout(fn, params, batch)`; needed where
        the constraint speaks of inputs and outputs, `axis="in"`, `per="out"`.

    Source: Zhu and Gupta 2017, section 3. Raises ValueError at `finish` before step `end`.
    """
    constraint = checked_constraint(constraint, layout)
    inner, when = as_optimizer(optimizer, "gradual"), Interval(begin, end, every)
    cuts = when.cubic()

    def init(params: Tree) -> MaskedState:
        picked = chosen(params, leaves, constraint)
        return MaskedState(jnp.zeros((), jnp.int32), everywhere(picked), inner.init(params))

    def update(
        gradient: Tree, state: MaskedState, params: Tree | None = None, **extra: Any
    ) -> tuple[Tree, MaskedState]:
        params = checked(params, gradient, state.masks)

        def cut(masks: Tree) -> Tree:
            return constraint.select_stage(magnitudes(masks, params), cuts, when.stage(state.step))

        masks = lax.cond(when.is_due(state.step), cut, lambda masks: masks, state.masks)
        updates, new = step_on(inner, gradient, state.inner, params, masks, extra)
        return updates, MaskedState(state.step + 1, masks, new)

    def finish(params: Tree, state: Any) -> Pruned:
        own = own_state(state, MaskedState, params)
        if int(own.step) <= end:
            raise ValueError(f"state is at step {int(own.step)}, but pruning ends with step end={end}; train on")
        return check_alive(on_support(params, own.masks, own.step, "gradual"), constraint)

    return SparseOptimizer(init, update, finish, constraint.scope())
