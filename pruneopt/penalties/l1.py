"""The L1 norm."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from pruneopt.penalties.base import Penalty

Tree = Any


@dataclass(frozen=True)
class L1(Penalty):
    """P(w) = weight * sum |w|. Source: Tibshirani 1996; its prox is soft thresholding (Donoho 1995)."""

    weight: float

    def __post_init__(self) -> None:
        if not 0 <= self.weight < float("inf"):
            raise ValueError(f"weight={self.weight!r} is not a finite number >= 0; pass the factor of the L1 norm")

    def value(self, w: Tree) -> float:
        """weight * sum |w|, in float64."""
        return self.weight * sum(float(np.abs(np.asarray(x, np.float64)).sum()) for x in jax.tree.leaves(w))

    def prox(self, w: Tree, step: float) -> Tree:
        """sign(w) max(|w| - step * weight, 0)."""
        t = step * self.weight
        return jax.tree.map(lambda x: jnp.sign(x) * jnp.maximum(jnp.abs(x) - t, 0), w)

    def weight_max(self, gradient: Tree) -> float:
        """max |gradient|."""
        return max(float(jnp.max(jnp.abs(g))) for g in jax.tree.leaves(gradient))
