"""The Gram matrix of a layer's inputs: one n_in x n_in curvature shared by all outputs."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from pruneopt import _tree
from pruneopt.curvature.base import Curvature, is_semidefinite

Tree = Any


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Gram(Curvature):
    """H = X^T X / N acting on every column of a matrix W (n_in, n_out).

    matrix: H, (n_in, n_in), symmetric, finite; singular and slightly indefinite by rounding are normal.
    """

    matrix: Float[Array, "n_in n_in"]

    @staticmethod
    def checked(matrix: Float[Array, "n_in n_in"]) -> Gram:
        """A Gram from a matrix that is verified to be square, floating, finite and symmetric to 1e-3 of its scale.

        It is symmetrised. Raises ValueError or TypeError, naming `gram`.
        """
        if not hasattr(matrix, "ndim"):
            raise TypeError(f"gram is a {type(matrix).__name__}; pass an array, X^T X / N")
        _tree.check_here(matrix, "gram")
        if matrix.ndim != 2 or matrix.shape[0] != matrix.shape[1]:
            raise ValueError(f"gram has shape {np.shape(matrix)}; pass the square matrix X^T X / N, (n_in, n_in)")
        if not jnp.issubdtype(matrix.dtype, jnp.floating):
            raise TypeError(f"gram has dtype {matrix.dtype}; pass floating-point numbers")
        symmetric, finite, skew, negative = _symmetrised(jnp.asarray(matrix))
        if not bool(finite):
            raise ValueError("gram holds a NaN or an infinity; check the inputs, or accumulate in float32 or wider")
        if bool(skew):
            raise ValueError("gram is not symmetric; pass X^T X / N")
        if bool(negative):
            raise ValueError("gram has a negative diagonal entry; pass X^T X / N")
        return Gram(symmetric)

    @staticmethod
    def from_inputs(inputs: Float[Array, "N n_in"]) -> Gram:
        """H = X^T X / N of inputs X, accumulated at the highest matmul precision in float32 or wider."""
        x = jnp.asarray(inputs)
        x = x.astype(_tree.wide(x.dtype))
        return Gram.checked(jnp.matmul(x.T, x, precision=jax.lax.Precision.HIGHEST) / jnp.asarray(x.shape[0], x.dtype))

    @cached_property
    def semidefinite(self) -> bool:
        """Whether the matrix is, checked."""
        return is_semidefinite(np.asarray(self.matrix))

    @cached_property
    def kept(self) -> dict[Any, Any]:
        """What a solver made of this matrix and finds again at its next call on it; it goes with the Gram."""
        return {}

    def mv(self, direction: Float[Array, "n_in n_out"]) -> Float[Array, "n_in n_out"]:
        """H D."""
        return jnp.matmul(self.matrix, direction, precision=jax.lax.Precision.HIGHEST)

    def diagonal(self, like: Tree) -> Float[Array, "n_in 1"]:
        """diag(H) as a column."""
        return jnp.diagonal(self.matrix)[:, None]

    def form(self, w: Float[Array, "n_in n_out"], center: Float[Array, "n_in n_out"], ridge: float) -> float:
        """tr(D^T (H + ridge I) D), D = w - center."""
        h, a, b = (np.asarray(x, np.float64) for x in (self.matrix, w, center))
        d = a - b
        return float(np.vdot(d, h @ d) + (ridge * np.vdot(d, d) if ridge else 0.0))


@jax.jit
def _symmetrised(matrix: Float[Array, "n n"]) -> tuple[Array, Array, Array, Array]:
    """(H + H^T) / 2, whether H is finite, whether it is further than 1e-3 of its scale from that, and whether its
    diagonal has a negative entry.
    """
    scale, skew = jnp.max(jnp.abs(matrix)), jnp.max(jnp.abs(matrix - matrix.T))
    symmetric = (matrix + matrix.T) * jnp.asarray(0.5, matrix.dtype)
    # The largest size is infinite or NaN if any entry is.
    return symmetric, jnp.isfinite(scale), skew > 1e-3 * scale, jnp.min(jnp.diagonal(matrix)) < 0
