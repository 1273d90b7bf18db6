"""Low rank: the second moments of n vectors, H = G^T G / n + ridge I, never formed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float

from pruneopt import _linalg, _tree
from pruneopt.curvature.base import Curvature, check_memory, check_ridge
from pruneopt.network.leaves import check_finite

Tree = Any
_HIGHEST = lax.Precision.HIGHEST
_COLUMNS = 1 << 12  # columns of G that are held in float64 at a time
# Of `solve`. Measured on 200 float32 vectors of 3,000 unit normal entries: a refinement divides the residual by 40,000
# for a ridge of 0.1 and by 300 for 1e-3, where five leave 3e-12; for 1e-5 by 3, and for 1e-7 it grows.
_REFINEMENTS, _RESIDUAL, _DIVERGED = 5, 1e-12, 1e-9


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class LowRank(Curvature):
    """H = 1/n sum_i g_i g_i^T + ridge I, of rank n beside the ridge; a mean over the n vectors, whatever their batches.

    gradients: G, a row a vector, each a tree laid out as one vector by `layout`; float32, float64 or bfloat16.
    ridge: added to the diagonal; `solve` and `inverse_diagonal` need a positive one.

    Where n > p, the inverse is that of the p x p matrix. `form` and `solve` are exact to float64 whatever JAX's mode;
    `gram` and `inverse_diagonal` sum products of 4,096 columns in the dtype of G (float32 at least); the n x n numbers
    on the host are float64. Source: Woodbury's identity, as in Frantar, Kurtic and Alistarh 2021 (M-FAC), with
    one Gram matrix and its Cholesky factor in place of n rank-one updates.
    """

    gradients: Float[Array, "n p"]
    layout: _tree.Layout = field(metadata={"static": True})
    ridge: float = field(default=0.0, metadata={"static": True})

    @staticmethod
    def checked(gradients: Float[Array, "n p"], like: Tree, ridge: float = 0.0) -> LowRank:
        """From vectors laid out as `like` (leaves in order, each flattened row by row), verified to fit and be finite.

        Raises ValueError for another number of columns, no row, a NaN or an infinity, a negative ridge.
        """
        layout = _tree.Layout.of(like)
        if gradients.ndim != 2 or gradients.shape[0] == 0 or gradients.shape[1] != layout.size:
            raise ValueError(
                f"gradients has shape {tuple(gradients.shape)}; pass one row a vector, (n, {layout.size}) with n >= 1"
            )
        check_ridge(ridge)
        return LowRank(check_finite(jnp.asarray(gradients), "gradients"), layout, ridge)

    @property
    def n(self) -> int:
        """Number of vectors."""
        return self.gradients.shape[0]

    @cached_property
    def semidefinite(self) -> bool:
        """Whether the ridge is not negative: the rest is a sum of squares."""
        return self.ridge >= 0

    def mv(self, direction: Tree) -> Tree:
        """G^T (G d) / n + ridge d."""
        return _product(self, direction)

    def diagonal(self, like: Tree) -> Tree:
        """Mean square of each column, plus the ridge."""
        return _diagonal(self, like)

    def form(self, w: Tree, center: Tree, ridge: float) -> float:
        """||G d||^2 / n + (self.ridge + ridge) ||d||^2, d = w - center."""
        with jax.enable_x64(True):
            return float(_form(self.gradients, *map(jax.tree.leaves, (w, center)), self.ridge + ridge))

    @cached_property
    def gram(self) -> Float[np.ndarray, "n n"]:
        """G G^T, summed in float64 over blocks of columns. Made once; n^2 p / 2 multiply-adds."""
        return self._summed(_tree.wide(self.gradients.dtype))

    def _summed(self, dtype: Any) -> Float[np.ndarray, "n n"]:
        """G G^T from products of columns in `dtype`."""
        total = np.zeros((self.n, self.n))
        for _, block in self._columns(dtype):
            total += block @ block.T  # NumPy computes half of it
        return total

    def block(self, which: str | slice | Sequence[int], memory: int = 1 << 31) -> Float[Array, "k k"]:
        """The square of H on some entries of the vector: a leaf by its path, a slice, or indices.

        Raises ValueError where it would take more than `memory` bytes, or for a path that is no leaf.
        """
        at, wide = self.layout.place(which), _tree.wide(self.gradients.dtype)
        k = len(range(*at.indices(self.layout.size))) if isinstance(at, slice) else len(at)
        check_memory("block", (k, k), wide, memory, "ask for fewer entries, or use mv")
        g = self.gradients[:, at].astype(wide)
        h = jnp.matmul(g.T, g, precision=_HIGHEST) / jnp.asarray(self.n, wide)
        return h + jnp.asarray(self.ridge, wide) * jnp.eye(k, dtype=wide)

    def dense(self, memory: int = 1 << 31) -> Float[Array, "p p"]:
        """H. Raises ValueError where it would take more than `memory` bytes."""
        p = self.layout.size
        check_memory("dense()", (p, p), _tree.wide(self.gradients.dtype), memory, "use mv, block or solve")
        return self.block(slice(0, p), memory)

    def solve(self, b: Tree, ridge: float = 0.0) -> Tree:
        """(H + ridge I)^-1 b = (b - G^T (n r I + G G^T)^-1 G b) / r with r = self.ridge + ridge.

        Raises ValueError for r = 0, with which H is singular.
        """
        r = self._positive(ridge)
        flat = self.layout.host(b)
        if self._is_tall:
            found = _linalg.cholesky_solve(_linalg.cholesky(self._square(r)), flat)
        else:
            found = self._woodbury(flat, r)
        return jax.tree.map(jnp.asarray, self.layout.tree(found, b))

    def inverse_diagonal(self, ridge: float = 0.0) -> Tree:
        """diag((H + ridge I)^-1) = (1 - ||L^-1 g_j||^2) / r, g_j column j of G and L L^T = n r I + G G^T.

        As float64 NumPy arrays, to 1e-6 for float32 gradients. n^2 p / 2 multiply-adds beside the Gram's.
        Raises ValueError for r = self.ridge + ridge = 0.
        """
        r = self._positive(ridge)
        if self._is_tall:
            return self.layout.tree(np.diagonal(_linalg.inverse(self._square(r))))
        factor, out = self._factor(r).astype(_tree.wide(self.gradients.dtype)), np.empty(self.layout.size)
        for at, block in self._columns(factor.dtype):
            half = _linalg.triangular_solve(factor, block)
            out[at] = (1 - np.einsum("ij,ij->j", half, half, dtype=np.float64)) / r
        return self.layout.tree(out)

    def _positive(self, ridge: float) -> float:
        check_ridge(ridge)
        if self.ridge + ridge == 0:
            raise ValueError(
                f"ridge=0.0, with which a curvature of rank {self.n} on {self.layout.size} entries has no inverse; "
                "pass ridge > 0, such as 1e-3 times the mean of its diagonal"
            )
        return self.ridge + ridge

    @property
    def _is_tall(self) -> bool:
        """Whether H itself is smaller than the Gram matrix."""
        return self.n > self.layout.size

    def _square(self, r: float) -> Float[np.ndarray, "p p"]:
        """G^T G / n + r I, in float64."""
        gradients, total = np.asarray(self.gradients), self.n * r * np.eye(self.layout.size)
        for start in range(0, self.n, _COLUMNS):
            rows = gradients[start : start + _COLUMNS].astype(np.float64)
            total += rows.T @ rows
        return total / self.n

    def _woodbury(self, b: Float[np.ndarray, " p"], r: float) -> Float[np.ndarray, " p"]:
        """(H + r I)^-1 b by the factor of the Gram as it is, or of one made in float64 where refinement diverges."""
        found, left = self._refined(self._factor(r), b, r)
        if left > _DIVERGED:
            found, _ = self._refined(_linalg.cholesky(self._summed(np.float64) + self.n * r * np.eye(self.n)), b, r)
        return found

    def _refined(
        self, factor: Float[np.ndarray, "n n"], b: Float[np.ndarray, " p"], r: float
    ) -> tuple[Float[np.ndarray, " p"], float]:
        """(H + r I)^-1 b and its relative residual, refined in float64: that removes the rounding of the factor."""
        found, residual, left = np.zeros_like(b), b, 1.0
        with jax.enable_x64(True):
            for _ in range(_REFINEMENTS):
                short = _linalg.cholesky_solve(factor, np.asarray(_times(self.gradients, residual)))
                found += (residual - np.asarray(_transposed_times(self.gradients, short))) / r
                along = np.asarray(_times(self.gradients, found)) / self.n
                residual = b - np.asarray(_transposed_times(self.gradients, along)) - r * found
                left = float(np.linalg.norm(residual) / max(np.linalg.norm(b), np.finfo(float).tiny))
                if left <= _RESIDUAL:
                    break
        return found, left

    def _factor(self, r: float) -> Float[np.ndarray, "n n"]:
        return _linalg.cholesky(self.gram + self.n * r * np.eye(self.n))

    def _columns(self, dtype: Any) -> Any:
        """(where, the columns of G there in `dtype`), a view on a CPU where that is G's own."""
        gradients = np.asarray(self.gradients)
        for start in range(0, self.layout.size, _COLUMNS):
            at = slice(start, min(start + _COLUMNS, self.layout.size))
            yield at, gradients[:, at].astype(dtype, copy=False)


@jax.jit
def _product(h: LowRank, direction: Tree) -> Tree:
    g, wide = h.gradients, _tree.wide(h.gradients.dtype)
    d = h.layout.vector(direction, wide)
    if g.dtype == wide:
        product = jnp.matmul(jnp.matmul(g, d, precision=_HIGHEST), g, precision=_HIGHEST)
    else:  # a row widened at a time
        product = _over_rows(lambda row: jnp.dot(row, d, precision=_HIGHEST) * row, g, jnp.zeros_like(d))
    return h.layout.tree(product / jnp.asarray(h.n, wide) + jnp.asarray(h.ridge, wide) * d, direction)


@jax.jit
def _diagonal(h: LowRank, like: Tree) -> Tree:
    g, wide = h.gradients, _tree.wide(h.gradients.dtype)
    squares = _over_rows(jnp.square, g, jnp.zeros(g.shape[1], wide))
    return h.layout.tree(squares / jnp.asarray(h.n, wide) + jnp.asarray(h.ridge, wide), _tree.wide_shapes(like))


def _over_rows(fn: Any, g: Array, zero: Array) -> Array:
    """Sum of fn(row), each row widened to the dtype of `zero`."""
    return lax.scan(lambda total, row: (total + fn(row.astype(zero.dtype)), None), zero, g)[0]


@jax.jit
def _times(g: Array, d: Array) -> Array:
    return lax.map(lambda row: jnp.dot(row.astype(d.dtype), d, precision=_HIGHEST), g)


@jax.jit
def _transposed_times(g: Array, y: Array) -> Array:
    def add(total: Array, pair: tuple[Array, Array]) -> tuple[Array, None]:
        return total + pair[0].astype(y.dtype) * pair[1], None

    return lax.scan(add, jnp.zeros(g.shape[1], y.dtype), (g, y))[0]


@jax.jit
def _form(g: Array, w: list[Array], center: list[Array], ridge: float) -> Array:
    wide = [
        x.astype(jnp.float64).reshape(-1) - c.astype(jnp.float64).reshape(-1) for x, c in zip(w, center, strict=True)
    ]
    d = jnp.concatenate(wide)
    along = _times(g, d)
    return jnp.dot(along, along) / g.shape[0] + ridge * jnp.dot(d, d)
