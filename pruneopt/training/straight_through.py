"""Straight-through training: the loss sees projected weights, the optimiser dense ones."""

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
    check_alive,
    check_trained,
    checked,
    checked_constraint,
    chosen,
    filled,
    is_hole,
    own_state,
    towards,
)
from pruneopt.training.schedule import check_steps

Tree = Any


class DenseState(NamedTuple):
    """step: updates made. dense: the dense weights. masks: their support in the params. inner: its optimiser."""

    step: jax.Array
    dense: Tree
    masks: Tree
    inner: Any


def straight_through(
    optimizer: optax.GradientTransformation,
    constraint: Constraint,
    *,
    decay: float = 2e-4,
    every: int = 1,
    end: int | None = None,
    leaves: Choice = None,
    layout: Layout | None = None,
) -> SparseOptimizer:
    """SR-STE: minimise f(P_C(w)) + decay/2 |w off the support|^2, the projection's derivative taken for the identity.

    The params in the user's loop are always P_C(w), feasible to the unit after the first update (N:M runs sparse);
    the dense w is in the state and follows  gradient at P_C(w) + decay (1 - mask) w  by the optimiser.

    constraint: NM(2, 4), or any other. every: steps between projections; the default, 1, is the paper's and what N:M's
        elementwise selection allows; give a cardinality over the tree more (100). end: the last step that changes it.
    layout: the matrices of leaves that are no plain (n_in, n_out), `structure.layout(fn, params, batch)`; needed where
        the constraint speaks of inputs and outputs, `axis="in"`, `per="out"`.
    Source: Zhou et al. 2021, equation 9 and algorithm 1. Raises ValueError for a decay < 0 or an interval < 1, and at
    `finish` where the params are not P_C(w), since something chained after this one moved them.
    """
    constraint = checked_constraint(constraint, layout)
    inner = as_optimizer(optimizer, "straight_through")
    if not 0 <= decay < float("inf"):
        raise ValueError(f"decay={decay!r} is not a finite number >= 0; pass the decay of what is off the support")
    check_steps("every", every, 1)
    if end is not None:
        check_steps("end", end)

    def select(dense: Tree) -> Tree:
        return constraint.select(jax.tree.map(jnp.abs, dense))

    def init(params: Tree) -> DenseState:
        dense = jax.tree.map(jnp.array, chosen(params, leaves, constraint))
        return DenseState(jnp.zeros((), jnp.int32), dense, select(dense), inner.init(params))

    def update(gradient: Tree, state: DenseState, params: Tree | None = None, **extra: Any) -> tuple[Tree, DenseState]:
        params, dense, masks = checked(params, gradient, state.masks), state.dense, state.masks

        def refined(m: Any, g: Any, w: Any) -> Any:
            return g if m is None else g + jnp.where(m, jnp.zeros((), g.dtype), decay * w.astype(g.dtype))

        gradient = jax.tree.map(refined, masks, gradient, dense, is_leaf=is_hole)
        updates, new = inner.update(gradient, state.inner, filled(dense, params), **extra)
        dense = jax.tree.map(lambda w, u: None if w is None else w + u.astype(w.dtype), dense, updates, is_leaf=is_hole)
        due = state.step % every == 0
        if end is not None:
            due = (due & (state.step < end)) | (state.step == end)
        masks = lax.cond(due, select, lambda _: masks, dense)
        sparse = jax.tree.map(lambda m, w: jnp.where(m, w, jnp.zeros((), w.dtype)), masks, dense)
        return towards(sparse, params, updates), DenseState(state.step + 1, dense, masks, new)

    def finish(params: Tree, state: Any) -> Pruned:
        own = own_state(state, DenseState, params)
        sparse = jax.tree.map(lambda m, w: jnp.where(m, w, jnp.zeros((), w.dtype)), own.masks, own.dense)
        check_trained(params, sparse, own.dense, own.step, "straight_through")
        return check_alive(Pruned(filled(sparse, params), own.masks), constraint)

    return SparseOptimizer(init, update, finish, constraint.scope())
