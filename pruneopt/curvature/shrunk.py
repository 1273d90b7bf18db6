"""Shrinkage: a curvature of few examples, drawn towards its own diagonal."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from pruneopt.curvature.base import Curvature
from pruneopt.curvature.diagonal import Diagonal
from pruneopt.network.leaves import check_finite, check_like

Tree = Any


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Shrunk(Curvature):
    """(1 - share) H + share diag(values), with values the diagonal of H or an estimate of it.

    What n examples say of p^2 >> n products of weights is mostly noise; what they say of p squares is not. Unlike a
    ridge, which charges for weights that no example sees, it keeps the scale of every weight.

    curvature: H. values: a tree shaped like the weights. share: in [0, 1].
    Its `diagonal` is `values`, so that one that costs p products is never asked for.
    Source: Schaefer and Strimmer 2005, table 2, target D (unequal variances); Ledoit and Wolf 2004.
    """

    curvature: Curvature
    values: Tree
    share: float

    @staticmethod
    def checked(curvature: Curvature, values: Tree, share: float) -> Shrunk:
        """Verified: a share in [0, 1], finite values that are nowhere negative."""
        if not isinstance(curvature, Curvature):
            raise TypeError(
                f"curvature is a {type(curvature).__name__}; pass a Curvature such as empirical_fisher(...)"
            )
        if not 0 <= share <= 1:
            raise ValueError(f"share={share!r} is outside [0, 1]; pass how far to shrink, such as 0.1")
        check_finite(values, "values")
        if any(bool(jnp.any(jnp.asarray(v) < 0)) for v in jax.tree.leaves(values)):
            raise ValueError("values holds a negative number, and they are to be the diagonal of H; pass its diagonal")
        return Shrunk(curvature, values, float(share))

    @cached_property
    def semidefinite(self) -> bool:
        """Whether what it mixes is: with a share below 1, H as well as diag(values)."""
        return Diagonal(self.values).semidefinite and (self.share == 1 or self.curvature.semidefinite)

    def mv(self, direction: Tree) -> Tree:
        """(1 - share) H d + share * values * d."""
        check_like(direction, self.values, "direction")
        return _mixed(self.curvature.mv(direction), self.values, direction, self.share)

    def diagonal(self, like: Tree) -> Tree:
        """values."""
        return self.values

    def form(self, w: Tree, center: Tree, ridge: float) -> float:
        """<d, ((1 - share) H + share diag(values) + ridge I) d>, d = w - center."""
        own, square = 0.0, 0.0
        for v, x, c in zip(*map(jax.tree.leaves, (self.values, w, center)), strict=True):
            d = np.asarray(x, np.float64) - np.asarray(c, np.float64)
            own += float(np.sum(np.asarray(v, np.float64) * d * d))
            square += float(np.sum(d * d))
        share = float(self.share)
        return (1 - share) * self.curvature.form(w, center, 0.0) + share * own + ridge * square


@jax.jit
def _mixed(curved: Tree, values: Tree, direction: Tree, share: Any) -> Tree:
    def one(c: jax.Array, v: jax.Array, d: jax.Array) -> jax.Array:
        s = jnp.asarray(share).astype(d.dtype)
        return (jnp.ones_like(s) - s) * c.astype(d.dtype) + s * v.astype(d.dtype) * d

    return jax.tree.map(one, curved, values, direction)
