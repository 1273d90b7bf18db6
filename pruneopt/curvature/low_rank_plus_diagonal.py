"""Low rank plus a diagonal: what a few vectors miss, put on the diagonal."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from pruneopt import _tree
from pruneopt.curvature.base import Curvature
from pruneopt.curvature.diagonal import Diagonal
from pruneopt.curvature.low_rank import LowRank
from pruneopt.network.leaves import check_like

Tree = Any


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class LowRankPlusDiagonal(Curvature):
    """H = G^T G / n + ridge I + diag(values): a LowRank and a diagonal of non-negative values.

    `solve` and `inverse_diagonal` are those of the LowRank with columns g_j / sqrt(d_j) and ridge 1, d the whole
    diagonal beside G^T G / n, in float64; they take another matrix of G's size.
    """

    low_rank: LowRank
    values: Tree

    @staticmethod
    def checked(low_rank: LowRank, values: Tree) -> LowRankPlusDiagonal:
        """From a diagonal that is verified to fit and to be finite and >= 0. Raises ValueError, naming `values`."""
        check_like(values, low_rank.layout.tree(np.broadcast_to(np.float32(0), low_rank.layout.size)), "values")
        flat = low_rank.layout.host(values)
        if not np.all(np.isfinite(flat)) or np.any(flat < 0):
            raise ValueError("values hold a NaN, an infinity or a negative number; pass numbers >= 0")
        return LowRankPlusDiagonal(low_rank, values)

    @property
    def layout(self) -> _tree.Layout:
        """Where the leaves lie in a vector."""
        return self.low_rank.layout

    @cached_property
    def semidefinite(self) -> bool:
        """Whether both parts are."""
        return self.low_rank.semidefinite and Diagonal(self.values).semidefinite

    def mv(self, direction: Tree) -> Tree:
        """Both products added."""
        return jax.tree.map(
            lambda h, v, d: h + v.astype(d.dtype) * d, self.low_rank.mv(direction), self.values, direction
        )

    def diagonal(self, like: Tree) -> Tree:
        """Both diagonals added."""
        return jax.tree.map(lambda h, v: h + v.astype(h.dtype), self.low_rank.diagonal(like), self.values)

    def form(self, w: Tree, center: Tree, ridge: float) -> float:
        """Both forms added, in float64."""
        return self.low_rank.form(w, center, ridge) + Diagonal(self.values).form(w, center, 0.0)

    def block(self, which: str | slice | Sequence[int], memory: int = 1 << 31) -> Float[Array, "k k"]:
        """The square of H on some entries of the vector; as `LowRank.block`."""
        square = self.low_rank.block(which, memory)
        values = self.layout.host(self.values)[self.layout.place(which)]
        return square + jnp.diag(jnp.asarray(values, square.dtype))

    def dense(self, memory: int = 1 << 31) -> Float[Array, "p p"]:
        """H; as `LowRank.dense`."""
        return self.low_rank.dense(memory) + jnp.diag(self.layout.vector(self.values, _tree.widest(self.values)))

    def solve(self, b: Tree, ridge: float = 0.0) -> Tree:
        """(H + ridge I)^-1 b. Raises ValueError where the whole diagonal has a zero."""
        scaled, root = self._scaled(ridge)
        inner = scaled.solve(self.layout.tree(self.layout.host(b) / root))
        return jax.tree.map(jnp.asarray, self.layout.tree(self.layout.host(inner) / root, b))

    def inverse_diagonal(self, ridge: float = 0.0) -> Tree:
        """diag((H + ridge I)^-1), as float64 NumPy arrays. Raises ValueError where the whole diagonal has a zero."""
        scaled, root = self._scaled(ridge)
        return self.layout.tree(self.layout.host(scaled.inverse_diagonal()) / root**2)

    def _scaled(self, ridge: float) -> tuple[LowRank, np.ndarray]:
        """The LowRank of g_j / sqrt(d_j) with ridge 1, and sqrt(d)."""
        d = self.layout.host(self.values) + self.low_rank.ridge + ridge
        if not np.min(d) > 0:
            raise ValueError(
                f"ridge={ridge!r}, with which {np.sum(~(d > 0)):,} entries of the diagonal are zero; H has no inverse: "
                "pass ridge > 0, such as 1e-3 times the mean of its diagonal"
            )
        root = np.sqrt(d)
        wide = _tree.wide(self.low_rank.gradients.dtype)
        scaled: Any = np.asarray(self.low_rank.gradients) / root.astype(wide)
        return LowRank(scaled, self.layout, 1.0), root
