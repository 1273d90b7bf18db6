"""The reconstruction error of one layer."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from pruneopt import _linalg, _tree
from pruneopt.curvature.gram import Gram
from pruneopt.objectives.base import QuadraticObjective, check_center, check_damping


@jax.tree_util.register_dataclass
@dataclass(frozen=True, repr=False)
class Reconstruction(QuadraticObjective):
    """f(W) = 1/2 tr(D^T (H + lambda I) D), D = W - center: half the mean squared change of the layer's outputs.

    center: the trained matrix W0, (n_in, n_out), y = x W0. (PyTorch stores the transpose.)
    curvature: Gram of the inputs, H = X^T X / N, (n_in, n_in).
    damping: relative; lambda = damping * mean(diag H).

    `Problem` raises ValueError for shapes that do not agree or a NaN; TypeError for a matrix that is not floating.
    """

    center: Float[Array, "n_in n_out"]
    curvature: Gram  # pyright: ignore[reportIncompatibleVariableOverride]
    damping: float = field(default=0.0, metadata={"static": True})

    gradient = None
    constant = 0.0

    def check(self) -> None:
        """Raise unless the matrix and its Gram agree and are finite."""
        if np.ndim(self.center) != 2:
            raise ValueError(f"center has shape {np.shape(self.center)}; pass the layer's matrix (n_in, n_out)")
        check_center(self.center)
        check_damping(self.damping)
        if not isinstance(self.curvature, Gram):
            raise TypeError(f"curvature is a {type(self.curvature).__name__}; pass Gram.checked(X^T X / N)")
        Gram.checked(self.curvature.matrix)
        n = self.curvature.matrix.shape[0]
        if n != self.center.shape[0]:
            raise ValueError(
                f"curvature is a Gram of {n} inputs but center has {self.center.shape[0]} rows; pass W as "
                "(n_in, n_out), the transpose of PyTorch's weight"
            )

    def relative_error(self, w: Float[Array, "n_in n_out"], value: float | None = None) -> float:
        """tr(D^T H D) / tr(W0^T H W0), undamped; NaN where the layer's output is zero. value: f(w), where known."""
        return self.error(w, value) / self.energy if self.energy else float("nan")

    def error(self, w: Float[Array, "n_in n_out"], value: float | None = None) -> float:
        """tr(D^T H D), undamped, in float64. value: f(w), where it is known."""
        change = np.asarray(w, np.float64) - np.asarray(self.center, np.float64)
        damped = 2 * (self.value(w) if value is None else value)
        return max(damped - self.exact_ridge() * float(np.sum(change * change)), 0.0)

    @cached_property
    def energy(self) -> float:
        """tr(W0^T H W0): no difference of nearly equal weights, so in the layer's own precision."""
        total, gram_unit, unit = _scaled_energy(self.curvature.matrix, self.center)
        return float(total) * float(gram_unit) * float(unit) ** 2


@jax.jit
def _scaled_energy(gram: Float[Array, "n n"], center: Float[Array, "n m"]) -> tuple[Array, Array, Array]:
    """The energy of H and W0 divided by their largest entries, so that no square leaves float32, and those."""
    gram, center = (x.astype(_tree.wide(x.dtype)) for x in (gram, center))
    units = [jnp.maximum(jnp.max(jnp.abs(x)), jnp.finfo(x.dtype).tiny) for x in (gram, center)]
    dtype = jnp.promote_types(gram.dtype, center.dtype)
    gram, center = (x.astype(dtype) / unit.astype(dtype) for x, unit in zip((gram, center), units, strict=True))
    return jnp.sum(center * _linalg.matmul(gram, center)), units[0], units[1]
