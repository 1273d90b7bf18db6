"""Curvatures without interactions: the identity and a given diagonal."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Shaped

from pruneopt import _linalg, _tree
from pruneopt.curvature.base import Curvature

Tree = Any


@jax.jit
def _forms(diagonal: list[Shaped[Array, "..."]], w: list[Array], center: list[Array], ridge: float) -> list[Array]:
    def term(h: Array, w: Array, c: Array) -> Array:
        d = w.astype(jnp.float64) - c.astype(jnp.float64)
        return (h.astype(jnp.float64) + ridge) * d * d

    return [
        _linalg.blocked_sum(lambda w, c, h=h: term(h, w, c), w, c)
        if h.ndim == 0
        else _linalg.blocked_sum(term, h, w, c)
        for h, w, c in zip(diagonal, w, center, strict=True)
    ]


def _sum_of_forms(diagonal: Tree, w: Tree, center: Tree, ridge: float) -> float:
    with jax.enable_x64(True):
        return sum(float(x) for x in _forms(*map(jax.tree.leaves, (diagonal, w, center)), ridge))


@jax.jit
def _least(tree: Tree) -> jax.Array:
    return jnp.min(jnp.stack([jnp.min(x).astype(_tree.wide(x.dtype)) for x in jax.tree.leaves(tree)]))


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Identity(Curvature):
    """H = I: the quadratic model under which magnitude pruning is optimal."""

    @cached_property
    def semidefinite(self) -> bool:
        """True."""
        return True

    def mv(self, direction: Tree) -> Tree:
        """d."""
        return direction

    def diagonal(self, like: Tree) -> Tree:
        """Ones, as scalars."""
        return jax.tree.map(lambda x: jnp.ones((), _tree.wide(x.dtype)), like)

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

    @cached_property
    def semidefinite(self) -> bool:
        """Whether no value is negative."""
        return bool(_least(self.values) >= 0)

    def mv(self, direction: Tree) -> Tree:
        """values * d."""
        return jax.tree.map(lambda h, d: h * d, self.values, direction)

    def diagonal(self, like: Tree) -> Tree:
        """values."""
        return self.values

    def form(self, w: Tree, center: Tree, ridge: float) -> float:
        """Sum of (values + ridge) (w - center)^2."""
        return _sum_of_forms(self.values, w, center, ridge)
