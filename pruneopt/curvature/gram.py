"""The Gram matrix of a layer's inputs: one n_in x n_in curvature shared by all outputs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from pruneopt import _tree
from pruneopt.curvature.base import Curvature

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
        if matrix.ndim != 2 or matrix.shape[0] != matrix.shape[1]:
            raise ValueError(f"gram has shape {np.shape(matrix)}; pass the square matrix X^T X / N, (n_in, n_in)")
        if not jnp.issubdtype(matrix.dtype, jnp.floating):
            raise TypeError(f"gram has dtype {matrix.dtype}; pass floating-point numbers")
        matrix = jnp.asarray(matrix)
        if not bool(jnp.all(jnp.isfinite(matrix))):
            raise ValueError("gram holds a NaN or an infinity; check the inputs, or accumulate in float32 or wider")
        scale = jnp.max(jnp.abs(matrix))
        if bool(jnp.max(jnp.abs(matrix - matrix.T)) > 1e-3 * scale):
            raise ValueError("gram is not symmetric; pass X^T X / N")
        if bool(jnp.any(jnp.diagonal(matrix) < 0)):
            raise ValueError("gram has a negative diagonal entry; pass X^T X / N")
        half = jnp.asarray(0.5, matrix.dtype)
        return Gram((matrix + matrix.T) * half)

    @staticmethod
    def from_inputs(inputs: Float[Array, "N n_in"]) -> Gram:
        """H = X^T X / N of inputs X, accumulated at the highest matmul precision in float32 or wider."""
        x = jnp.asarray(inputs)
        x = x.astype(_tree.wide(x.dtype))
        return Gram.checked(jnp.matmul(x.T, x, precision=jax.lax.Precision.HIGHEST) / jnp.asarray(x.shape[0], x.dtype))

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
        return float(np.sum(d * (h @ d)) + ridge * np.sum(d * d))
