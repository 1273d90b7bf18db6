"""Dynamic sparse training: the weakest connections are dropped, others grown, the count never changes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax import lax

from pruneopt import _selection, _tree
from pruneopt.constraints import parts
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
    forgotten,
    magnitudes,
    on_masks,
    on_support,
    own_state,
    settled,
    step_on,
)
from pruneopt.training.schedule import Interval

Tree = Any
Growth = Callable[[Tree, jax.Array], Tree]


def rigl(
    optimizer: optax.GradientTransformation,
    constraint: Constraint,
    *,
    end: int,
    every: int = 100,
    drop: float = 0.3,
    leaves: Choice = None,
    key: jax.Array | int = 0,
    layout: Layout | None = None,
) -> SparseOptimizer:
    """minimise f(w) subject to w in C, sparse from the first step: the support follows the gradient.

    At steps every, 2 every, ..., `end` the share drop/2 (1 + cos(pi t/end)) of each leaf's living weights, the smallest
    |w|, is dropped, and the constraint's `select` fills up with the largest |gradient| among the others; what is new
    starts at zero, and the optimiser rests at that step. The start is a random support of C. A budget for each leaf is
    the method as published (`erdos_renyi` gives its budgets); one for the tree lets weights move between leaves.

    end: the last change, 3/4 of training in the paper. drop: in (0, 1). key: of the first support.
    layout: the matrices of leaves that are no plain (n_in, n_out), `structure.layout(fn, params, batch)`; needed where
        the constraint speaks of inputs and outputs, `axis="in"`, `per="out"`.
    Source: Evci et al. 2020, algorithm 1. Raises ValueError for blocks and slices, which single weights cannot fill.
    """
    constraint = checked_constraint(constraint, layout)
    return _drop_and_grow("rigl", optimizer, constraint, _by_gradient, (end, every, drop), leaves, key)


def sparse_evolution(
    optimizer: optax.GradientTransformation,
    constraint: Constraint,
    *,
    end: int,
    every: int = 100,
    drop: float = 0.3,
    leaves: Choice = None,
    key: jax.Array | int = 0,
    layout: Layout | None = None,
) -> SparseOptimizer:
    """SET: as `rigl`, but what grows is drawn at random.

    The paper drops a constant share at each epoch; here it decays as in Evci et al. 2020, section 4, which serves both
    methods there. Source: Mocanu et al. 2018, algorithm 2. Raises as `rigl`.
    """
    constraint = checked_constraint(constraint, layout)
    return _drop_and_grow("sparse_evolution", optimizer, constraint, _at_random, (end, every, drop), leaves, key)


def _by_gradient(gradient: Tree, key: jax.Array) -> Tree:
    return jax.tree.map(jnp.abs, gradient)


def _at_random(like: Tree, key: jax.Array) -> Tree:
    leaves, structure = jax.tree.flatten(like)
    keys = jax.random.split(key, len(leaves))
    drawn = [jax.random.uniform(k, x.shape, _tree.wide(x.dtype)) for k, x in zip(keys, leaves, strict=True)]
    return jax.tree.unflatten(structure, drawn)


def _drop_and_grow(
    name: str,
    optimizer: optax.GradientTransformation,
    constraint: Constraint,
    growth: Growth,
    knobs: tuple[int, int, float],
    leaves: Choice,
    key: jax.Array | int,
) -> SparseOptimizer:
    end, every, drop = knobs
    inner, when = as_optimizer(optimizer, name), Interval(min(every, end), end, every)
    if not 0 < drop < 1:
        raise ValueError(f"drop={drop!r} is outside (0, 1); pass the share of the connections to drop at first")
    if any(choice.units for choice in parts.of(constraint).choices):
        raise ValueError(
            f"constraint={constraint!r} selects whole blocks or slices, but {name} drops single weights; pass a "
            "Cardinality or NM"
        )

    def draw(step: Any) -> jax.Array:
        return jax.random.fold_in(jax.random.key(key) if isinstance(key, int) else key, step)

    def init(params: Tree) -> MaskedState:
        masks = constraint.select(_at_random(chosen(params, leaves, constraint), draw(0)))
        return MaskedState(jnp.zeros((), jnp.int32), masks, inner.init(params))

    def update(
        gradient: Tree, state: MaskedState, params: Tree | None = None, **extra: Any
    ) -> tuple[Tree, MaskedState]:
        params = checked(params, gradient, state.masks)

        def rewired(masks: Tree) -> Tree:
            share = drop / 2 * (1 + jnp.cos(jnp.pi * (state.step.astype(jnp.float32) / end)))

            def surviving(mask: jax.Array, size: jax.Array) -> jax.Array:
                living = jnp.sum(mask, dtype=jnp.uint32)
                dropped = jnp.floor(share * living.astype(jnp.float32) + 1e-3).astype(jnp.uint32)
                return _selection.keep_largest([size], living - dropped)[0]

            survivors = jax.tree.map(surviving, masks, magnitudes(masks, params))
            grown = growth(on_masks(lambda m, g: g, masks, gradient), draw(state.step))
            scores = jax.tree.map(lambda s, g: jnp.where(s, jnp.asarray(jnp.inf, g.dtype), g), survivors, grown)
            return constraint.select(scores)

        due = when.is_due(state.step)
        masks = lax.cond(due, rewired, lambda masks: masks, state.masks)
        updates, new = step_on(inner, gradient, state.inner, params, masks, extra)
        rest = settled(masks, params, jax.tree.map(jnp.zeros_like, updates))
        updates = jax.tree.map(lambda u, r: jnp.where(due, r, u), updates, rest)
        new = jax.tree.map(lambda n, o: jnp.where(due, o, n), new, forgotten(state.inner, masks))
        return updates, MaskedState(state.step + 1, masks, new)

    def finish(params: Tree, state: Any) -> Pruned:
        own = own_state(state, MaskedState, params)
        return check_alive(on_support(params, own.masks, own.step, name), constraint)

    return SparseOptimizer(init, update, finish, constraint.scope())
