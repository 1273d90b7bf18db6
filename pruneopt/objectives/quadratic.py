"""A quadratic model of the loss about trained weights."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import jax

from pruneopt.curvature.base import Curvature
from pruneopt.curvature.diagonal import Diagonal
from pruneopt.network.leaves import check_finite, check_like
from pruneopt.objectives.base import QuadraticObjective, check_center, check_damping

Tree = Any


@jax.tree_util.register_dataclass
@dataclass(frozen=True, repr=False)
class Quadratic(QuadraticObjective):
    """f(w) = constant + <gradient, d> + 1/2 <d, (H + lambda I) d>, d = w - center.

    center: trained weights w0, a tree of floating arrays (None where nothing is decided).
    curvature: H of the mean loss, or None for a linear model. gradient: of the mean loss at w0, or None for zero.
    damping: relative; lambda = damping * mean(diag H).

    `Problem` raises ValueError for a gradient or diagonal of another structure than `center`, for a NaN or an
    infinity in any of them, for negative damping; TypeError for leaves that are not floating.
    """

    center: Tree
    curvature: Curvature | None = None
    gradient: Tree | None = None
    constant: float = field(default=0.0, metadata={"static": True})
    damping: float = field(default=0.0, metadata={"static": True})

    def check(self) -> None:
        """Raise unless center, gradient and curvature are finite and of one structure."""
        check_center(self.center)
        check_damping(self.damping)
        if not isinstance(self.curvature, Curvature | None):
            raise TypeError(
                f"curvature is a {type(self.curvature).__name__}; pass a Curvature such as Diagonal(values)"
            )
        if not math.isfinite(self.constant):
            raise ValueError(f"constant={self.constant!r} is not finite; pass f at the center")
        if self.gradient is not None:
            check_like(self.gradient, self.center, "gradient")
            check_finite(self.gradient, "gradient")
        if isinstance(self.curvature, Diagonal):
            check_like(self.curvature.values, self.center, "curvature")
            check_finite(self.curvature.values, "curvature")
