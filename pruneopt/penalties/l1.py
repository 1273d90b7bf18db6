"""The L1 norm, weighted and adaptive, and the elastic net."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from pruneopt import _tree
from pruneopt.penalties.base import Penalty, absolute, check_factors, check_share, check_weight, entry_by_entry

Tree = Any
_ROUNDING = 1e-12  # by which a scaled dual point may leave its box


@jax.tree_util.register_dataclass
@dataclass(frozen=True, eq=False)
class L1(Penalty):
    """P(w) = weight * sum_i factors_i |w_i|.

    factors: >= 0, a tree like w whose leaves broadcast, so that (1, m) holds one factor an output; None for ones.

    Its prox is soft thresholding. Source: Tibshirani 1996; with factors Zou 2006 (see `adaptive`).
    """

    weight: float
    factors: Tree | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        check_weight(self.weight)

    @staticmethod
    def adaptive(weight: float, reference: Tree, power: float = 1.0) -> L1:
        """Factors |reference|^-power, for large weights to be shrunk less (the adaptive lasso).

        reference: trained or least-squares weights. An entry of zero counts as the smallest that is not.
        Source: Zou 2006, equation 4.
        """
        if isinstance(power, bool) or not isinstance(power, int | float | np.floating) or not 0 < power < math.inf:
            raise ValueError(f"power={power!r} is not a number > 0; pass the exponent, such as 1.0")

        for path, x in _tree.named_leaves(reference):
            if not _tree.is_array(x):
                raise TypeError(f"reference holds {x!r} in leaf '{path}'; pass a tree of arrays like the weights")

        def factor(x: Any) -> np.ndarray:
            size = np.abs(np.asarray(x, np.float64))
            if not np.any(size):
                raise ValueError("reference has a leaf of zeros alone; pass trained weights")
            return np.maximum(size, np.min(size[size > 0])) ** -power

        factors = jax.tree.map(lambda x: jnp.asarray(factor(x), x.dtype), reference)
        return L1(weight, factors)

    def check(self, variable: Tree) -> None:
        """Raise ValueError unless weight and factors are finite, >= 0 and fit."""
        check_weight(self.weight)
        check_factors(self.factors, variable)

    def value(self, w: Tree) -> float:
        """weight * sum_i factors_i |w_i|."""
        return float(self.weight) * _sum(self.factors, absolute(w))

    def prox(self, w: Tree, step: Any) -> Tree:
        """sign(w) max(|w| - step * weight * factors, 0)."""
        return entry_by_entry(lambda x, t, f: soft(x, t * self.weight * f), w, step, _full(self.factors, w))

    def weight_max(self, gradient: Tree, step: float = 1.0) -> float:
        """max |gradient| / factors; infinite where an entry without a factor has a gradient."""
        return _largest_ratio(self.factors, absolute(gradient))

    def conjugate(self, u: Tree) -> float:
        """0 where |u| <= weight * factors everywhere, else infinite."""
        return 0.0 if _largest_ratio(self.factors, absolute(u)) <= self.weight * (1 + _ROUNDING) else math.inf


@jax.tree_util.register_dataclass
@dataclass(frozen=True, eq=False)
class ElasticNet(Penalty):
    """P(w) = weight * sum_i factors_i (ratio |w_i| + (1 - ratio) / 2 w_i^2).

    ratio: in (0, 1]; 1 is the L1 norm. factors: as for `L1`. Source: Zou and Hastie 2005, in the form of glmnet.
    """

    weight: float
    ratio: float = field(default=0.5, metadata={"static": True})
    factors: Tree | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        check_weight(self.weight)
        check_share("ratio", self.ratio)

    def check(self, variable: Tree) -> None:
        """Raise ValueError unless weight and factors are finite, >= 0 and fit."""
        check_weight(self.weight)
        check_factors(self.factors, variable)

    def value(self, w: Tree) -> float:
        """weight * sum_i factors_i (ratio |w_i| + (1 - ratio) / 2 w_i^2)."""
        sizes = absolute(w)
        squares = [x * x for x in sizes]
        return float(self.weight) * (
            self.ratio * _sum(self.factors, sizes) + 0.5 * (1 - self.ratio) * _sum(self.factors, squares)
        )

    def prox(self, w: Tree, step: Any) -> Tree:
        """soft(w, t ratio) / (1 + t (1 - ratio)), t = step * weight * factors."""

        def one(x: jax.Array, t: jax.Array, f: Any) -> jax.Array:
            scale = t * self.weight * f
            return soft(x, scale * self.ratio) / (1 + scale * (1 - self.ratio))

        return entry_by_entry(one, w, step, _full(self.factors, w))

    def weight_max(self, gradient: Tree, step: float = 1.0) -> float:
        """max |gradient| / (ratio * factors)."""
        return _largest_ratio(self.factors, absolute(gradient)) / self.ratio

    def conjugate(self, u: Tree) -> float:
        """Sum of max(|u| - a, 0)^2 / (2 b), a = weight * factors * ratio, b = weight * factors * (1 - ratio)."""
        total = 0.0
        for x, f in zip(absolute(u), _as_float64(self.factors, u), strict=True):
            a, b = self.weight * self.ratio * f, self.weight * (1 - self.ratio) * f
            over = np.maximum(x - a * (1 + _ROUNDING), 0.0)
            if np.any((over > 0) & (b == 0)):
                return math.inf
            total += float(np.sum(over * over / np.where(b > 0, 2 * b, 1.0)))
        return total


def soft(x: jax.Array, threshold: Any) -> jax.Array:
    """sign(x) max(|x| - threshold, 0)."""
    return jnp.sign(x) * jnp.maximum(jnp.abs(x) - threshold, 0)


def _full(factors: Tree | None, w: Tree) -> Tree:
    return (
        jax.tree.map(lambda _: 1, w)
        if factors is None
        else jax.tree.map(lambda x, f: jnp.asarray(f, x.dtype), w, factors)
    )


def _as_float64(factors: Tree | None, like: Tree) -> list[Any]:
    if factors is None:
        return [np.float64(1.0)] * len(jax.tree.leaves(like))
    return [np.asarray(f, np.float64) for f in jax.tree.leaves(factors)]


def _sum(factors: Tree | None, sizes: list[np.ndarray]) -> float:
    return sum(float(np.sum(x * f)) for x, f in zip(sizes, _as_float64(factors, sizes), strict=True))


def _largest_ratio(factors: Tree | None, sizes: list[np.ndarray]) -> float:
    """max sizes / factors, 0 / 0 = 0."""
    largest = 0.0
    for x, f in zip(sizes, _as_float64(factors, sizes), strict=True):
        ratio = np.where(x > 0, x / np.where(f > 0, f, 1.0), 0.0)
        largest = max(largest, math.inf if np.any((x > 0) & (f == 0)) else float(np.max(ratio, initial=0.0)))
    return largest
