"""Constrained sparsity: a Lagrange multiplier finds the price of a weight that meets the sparsity asked for."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import optax

from pruneopt import _tree
from pruneopt.constraints.base import Constraint
from pruneopt.network.leaves import Choice
from pruneopt.structure.layout import Layout
from pruneopt.training.base import SparseOptimizer, checked_constraint
from pruneopt.training.gates import Gating, Scope
from pruneopt.training.schedule import check_steps

Tree = Any


def lagrangian(
    optimizer: optax.GradientTransformation,
    constraint: Constraint,
    *,
    end: int,
    ascent: float = 1e-3,
    gate_optimizer: optax.GradientTransformation | None = None,
    per: Scope = "weight",
    open_: float = 0.9,
    leaves: Choice = None,
    layout: Layout | None = None,
    key: jax.Array | int = 0,
) -> SparseOptimizer:
    """minimise E_z f(theta z) subject to E |z|_0 / n <= the constraint's density, by descent-ascent on the Lagrangian

        E_z f(theta z) + mu (E |z|_0 / n - density),    mu <- max(0, mu + ascent (E |z|_0 / n - density)),

    with the gates of `l0`; mu restarts at 0 once the constraint holds. Nothing is tuned: mu is the weight that a
    penalty would need. At step `end` the gates are fixed, `constraint.select` on |theta z| settles what lives, to the
    unit, and the rest of training retrains it.

    ascent: the dual's step length. The other arguments are those of `l0`. `state.price` is mu / n.
    layout: the matrices of leaves that are no plain (n_in, n_out), `structure.layout(fn, params, batch)`; needed where
        the constraint speaks of inputs and outputs, `axis="in"`, `per="out"`.
    Source: Gallego-Posada et al. 2022, equations 3 to 6 and section 4.1 (dual restarts).
    """
    constraint = checked_constraint(constraint, layout)
    check_steps("end", end)
    if not 0 < ascent < float("inf"):
        raise ValueError(f"ascent={ascent!r} is not a positive number; pass the dual's step length")

    def priced(price: jax.Array, living: jax.Array, theta: Tree) -> jax.Array:
        size = _tree.size(theta)
        over = living / size - constraint.density(theta)
        return jnp.where(over > 0, price + ascent * over / size, jnp.zeros((), price.dtype))

    def select(estimate: Tree) -> Tree:
        return constraint.select(jax.tree.map(jnp.abs, estimate))

    name, price = "lagrangian", 0.0
    gate_inner = optimizer if gate_optimizer is None else gate_optimizer
    return Gating(
        name, optimizer, gate_inner, per, open_, end, leaves, key, constraint, price, priced, select
    ).optimizer()
