"""The ordered L1 norm: the largest weights are penalised most, and equal ones stay equal."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from statistics import NormalDist
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float

from pruneopt import _tree
from pruneopt.penalties.base import Penalty, absolute, check_weight, one_step

Tree = Any
_ROUNDING = 1e-12


@jax.tree_util.register_dataclass
@dataclass(frozen=True, eq=False)
class OWL(Penalty):
    """P(w) = weight * sum_i factors_i |w|_(i), |w|_(1) >= |w|_(2) >= ... over all leaves together: OWL, or SLOPE.

    factors: one a weight, >= 0, not all zero and falling; equal ones are L1, a single one the largest |w|.

    Source: Bogdan et al. 2015 (SLOPE), Zeng and Figueiredo 2014 (OWL); the prox is their algorithm 3, an isotonic
    regression of the sorted |w| less the factors, here by merging all violating neighbours at once.
    """

    weight: float
    factors: Float[Array, " p"] = field(repr=False)

    def __post_init__(self) -> None:
        check_weight(self.weight)

    @staticmethod
    def oscar(weight: float, size: int, slope: float) -> OWL:
        """factors_i = 1 + slope (size - i), which ties weights of like size (Bondell and Reich 2008)."""
        check_weight(slope, "slope")
        _check_size(size)
        return OWL(weight, jnp.asarray(1 + slope * np.arange(size - 1, -1, -1)))

    @staticmethod
    def slope(weight: float, size: int, level: float = 0.1) -> OWL:
        """factors_i = quantile of the normal at 1 - level i / (2 size), for false discoveries at `level`.

        Source: Bogdan et al. 2015, equation 1.3.
        """
        if not isinstance(level, int | float | np.floating) or not 0 < level < 1:
            raise ValueError(f"level={level!r} is outside (0, 1); pass the rate of false discoveries, such as 0.1")
        _check_size(size)
        normal = NormalDist()
        return OWL(weight, jnp.asarray([normal.inv_cdf(1 - level * i / (2 * size)) for i in range(1, size + 1)]))

    @property
    def is_entrywise(self) -> bool:
        """False."""
        return False

    def check(self, variable: Tree) -> None:
        """Raise ValueError unless there is one factor for each entry, finite, falling and >= 0."""
        check_weight(self.weight)
        size, factors = _tree.size(variable), np.asarray(self.factors, np.float64)
        if factors.shape != (size,):
            raise ValueError(f"factors has shape {factors.shape}; pass one a weight, ({size},)")
        if not (np.all(np.isfinite(factors)) and np.all(np.diff(factors) <= 0) and factors[-1] >= 0 < factors[0]):
            raise ValueError("factors are not finite, falling and >= 0 with a positive first; sort them, largest first")

    def value(self, w: Tree) -> float:
        """weight * <factors, sorted |w|>."""
        return float(self.weight) * float(np.sum(np.asarray(self.factors, np.float64) * _sorted(w)))

    def prox(self, w: Tree, step: Any) -> Tree:
        """The falling sequence nearest to sorted |w| - step * weight * factors, at least 0, put back."""
        step = one_step(self, step)
        leaves, structure = jax.tree.flatten(w)
        dtype = jnp.result_type(*leaves)
        flat = jnp.concatenate([x.astype(dtype).reshape(-1) for x in leaves])
        order = jnp.argsort(-jnp.abs(flat), stable=True)
        shift = jnp.asarray(step, dtype) * self.weight * jnp.asarray(self.factors, dtype)
        level = jnp.maximum(falling(jnp.abs(flat)[order] - shift), 0)
        shrunk = jnp.sign(flat) * jnp.zeros_like(flat).at[order].set(level)
        ends = np.cumsum([x.size for x in leaves])
        parts = [shrunk[e - x.size : e].reshape(x.shape).astype(x.dtype) for x, e in zip(leaves, ends, strict=True)]
        return jax.tree.unflatten(structure, parts)

    def weight_max(self, gradient: Tree, step: float = 1.0) -> float:
        """max over k of (sum of the k largest |gradient|) / (sum of the first k factors): the dual norm."""
        return float(np.max(np.cumsum(_sorted(gradient)) / np.cumsum(np.asarray(self.factors, np.float64))))

    def conjugate(self, u: Tree) -> float:
        """0 where the dual norm of u is at most weight, else infinite."""
        return 0.0 if self.weight_max(u) <= self.weight * (1 + _ROUNDING) else math.inf


def _check_size(size: Any) -> None:
    if isinstance(size, bool) or not hasattr(size, "__index__") or size < 1:
        raise ValueError(f"size={size!r} is not a whole number >= 1; pass how many weights are penalised")


def _sorted(w: Tree) -> np.ndarray:
    return -np.sort(-np.concatenate([x.reshape(-1) for x in absolute(w)]))


def falling(x: Float[Array, " p"]) -> Float[Array, " p"]:
    """The falling sequence nearest to x in least squares: blocks of neighbours that rise are merged until none does.

    Neighbours out of order end in one block (Barlow et al. 1972), so all are merged at once, a few tens of rounds.
    """
    n = x.shape[0]

    def means(block: Array) -> Array:
        total = jax.ops.segment_sum(x, block, n, indices_are_sorted=True)
        count = jax.ops.segment_sum(jnp.ones_like(x), block, n, indices_are_sorted=True)
        return (total / jnp.maximum(count, 1))[block]

    def merged(state: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
        block, level, _ = state
        starts = jnp.diff(block, prepend=block[:1]) > 0
        rises = starts & (level > jnp.concatenate([level[:1], level[:-1]]))
        block = jnp.cumsum((starts & ~rises).astype(block.dtype), dtype=block.dtype)
        return block, means(block), jnp.any(rises)

    first = jnp.arange(n, dtype=jnp.int32)
    return lax.while_loop(lambda state: state[2], merged, (first, x, jnp.asarray(True)))[1]
