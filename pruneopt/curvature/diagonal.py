"""Curvatures without interactions: the identity and a given diagonal."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Shaped

from pruneopt import _linalg
from pruneopt.curvature.base import Curvature

Tree = Any


@jax.jit
def _form(h: Float[Array, "..."], w: Float[Array, "..."], center: Float[Array, "..."]) -> Shaped[Array, ""]:
    def term(h, w, c):
        d = w.astype(jnp.float64) - c.astype(jnp.float64)
        return h.astype(jnp.float64) * d * d

    if h.ndim == 0:
        return h.astype(jnp.float64) * _linalg.blocked_sum(lambda w, c: term(jnp.ones(()), w, c), w, center)
    return _linalg.blocked_sum(term, h, w, center)


def _sum_of_forms(diagonal: Tree, w: Tree, center: Tree, ridge: float) -> float:
    with jax.enable_x64(True):
        return sum(
            float(_form(h, x, c)) + (ridge * float(_form(jnp.ones(()), x, c)) if ridge else 0.0)
            for h, x, c in zip(*map(jax.tree.leaves, (diagonal, w, center)), strict=True)
        )


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Identity(Curvature):
    """H = I: the quadratic model under which magnitude pruning is optimal."""

    def mv(self, direction: Tree) -> Tree:
        """d."""
        return direction

    def diagonal(self, like: Tree) -> Tree:
        """Ones, as scalars."""
        return jax.tree.map(lambda x: jnp.ones((), x.dtype), like)

    def form(self, w: Tree, center: Tree, ridge: float) -> float:
        """(1 + ridge) ||w - center||^2."""
        return _sum_of_forms(self.diagonal(w), w, center, ridge)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Diagonal(Curvature):
    """H = diag(values).

    values: a tree of arrays in the shapes of the variable. Estimates of an indefinite Hessian's diagonal may hold
        negative entries; then H is not positive semidefinite and nothing is certified with it.
    """

    values: Tree

    def mv(self, direction: Tree) -> Tree:
        """values * d."""
        return jax.tree.map(lambda h, d: h * d, self.values, direction)

    def diagonal(self, like: Tree) -> Tree:
        """values."""
        return self.values

    def form(self, w: Tree, center: Tree, ridge: float) -> float:
        """Sum of (values + ridge) (w - center)^2."""
        return _sum_of_forms(self.values, w, center, ridge)
