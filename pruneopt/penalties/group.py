"""Norms of groups: whole units go to zero."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from pruneopt.penalties.base import Penalty, absolute, check_weight, one_step
from pruneopt.penalties.l1 import soft
from pruneopt.penalties.partition import Partition

Tree = Any
_ROUNDING = 1e-12


class GroupNorm(Penalty):
    """A norm of the groups of a `Partition`, times a weight."""

    groups: Partition

    @property
    def is_entrywise(self) -> bool:
        """False."""
        return False

    def check(self, variable: Tree) -> None:
        """Raise ValueError unless the groups are a partition of these leaves."""
        check_weight(self.weight)
        self.groups.check(variable)

    def conjugate(self, u: Tree) -> float:
        """0 where the dual norm of u, its `weight_max`, is at most the weight, else infinite."""
        return 0.0 if self.weight_max(u) <= self.weight * (1 + _ROUNDING) else math.inf


@jax.tree_util.register_dataclass
@dataclass(frozen=True, eq=False)
class GroupLasso(GroupNorm):
    """P(w) = weight * sum_g sqrt(p_g) ||w_g||_2, p_g the number of entries of group g.

    groups: a Partition: filters, rows, heads, coupled channels. Source: Yuan and Lin 2006, equation 2.1.
    """

    weight: float
    groups: Partition

    def __post_init__(self) -> None:
        check_weight(self.weight)
        check_partition(self.groups)

    def value(self, w: Tree) -> float:
        """weight * sum_g sqrt(p_g) ||w_g||."""
        return float(self.weight) * float(np.sum(np.sqrt(self.groups.sizes(w)) * _norms(self.groups, w)))

    def prox(self, w: Tree, step: Any) -> Tree:
        """w_g max(1 - step * weight * sqrt(p_g) / ||w_g||, 0)."""
        return _shrunk(self.groups, w, one_step(self, step) * self.weight)

    def weight_max(self, gradient: Tree, step: float = 1.0) -> float:
        """max over g of ||gradient_g|| / sqrt(p_g)."""
        return float(np.max(_norms(self.groups, gradient) / np.sqrt(self.groups.sizes(gradient))))


@jax.tree_util.register_dataclass
@dataclass(frozen=True, eq=False)
class SparseGroupLasso(GroupNorm):
    """P(w) = weight * (ratio ||w||_1 + (1 - ratio) sum_g sqrt(p_g) ||w_g||_2): zero units, and zeros inside the others.

    ratio: in [0, 1]; 0 is the group lasso, 1 the L1 norm. groups: a Partition.
    Source: Simon, Friedman, Hastie and Tibshirani 2013, equation 3.
    """

    weight: float
    groups: Partition
    ratio: float = field(default=0.5, metadata={"static": True})

    def __post_init__(self) -> None:
        check_weight(self.weight)
        check_partition(self.groups)
        if not (isinstance(self.ratio, int | float | np.floating) and 0 <= self.ratio <= 1):
            raise ValueError(f"ratio={self.ratio!r} is outside [0, 1]; pass the share of the L1 norm, such as 0.5")

    def value(self, w: Tree) -> float:
        """weight * (ratio ||w||_1 + (1 - ratio) sum_g sqrt(p_g) ||w_g||)."""
        norms = float(np.sum(np.sqrt(self.groups.sizes(w)) * _norms(self.groups, w)))
        return float(self.weight) * (self.ratio * sum(float(np.sum(x)) for x in absolute(w)) + (1 - self.ratio) * norms)

    def prox(self, w: Tree, step: Any) -> Tree:
        """Soft thresholding of the entries, then of the groups' norms."""
        t = one_step(self, step) * self.weight
        inside = jax.tree.map(lambda x: soft(x, jnp.asarray(t * self.ratio, x.dtype)), w)
        return _shrunk(self.groups, inside, t * (1 - self.ratio))

    def weight_max(self, gradient: Tree, step: float = 1.0) -> float:
        """The largest root over groups of ||soft(gradient_g, t ratio)|| = t (1 - ratio) sqrt(p_g), by bisection."""
        sizes, roots = absolute(gradient), np.sqrt(self.groups.sizes(gradient))
        low, high = 0.0, max(float(np.max(x)) for x in sizes) / max(self.ratio, 1 - self.ratio) * 2
        for _ in range(64):
            middle = (low + high) / 2
            over = [np.square(np.maximum(x - middle * self.ratio, 0.0)) for x in sizes]
            moves = np.any(np.sqrt(self.groups.sums(over)) > middle * (1 - self.ratio) * roots)
            low, high = (middle, high) if moves else (low, middle)
        return high


def check_partition(groups: Any) -> None:
    """Raise TypeError unless `groups` is a Partition; placeholders inside a transformation pass."""
    if not isinstance(groups, Partition) and type(groups) is not object:
        raise TypeError(f"groups is {groups!r}; pass a partition such as Partition.slices(params, axis=-1)")


def _norms(groups: Partition, w: Tree) -> np.ndarray:
    return np.sqrt(groups.sums([np.square(x) for x in absolute(w)]))


def _shrunk(groups: Partition, w: Tree, threshold: Any) -> Tree:
    """Each group towards zero by threshold * sqrt(p_g) of its norm."""
    norms = groups.norms(w)
    roots = jnp.sqrt(_sizes(groups, w, norms.dtype))
    floor = jnp.asarray(threshold, norms.dtype) * roots
    live = norms > floor
    scale = jnp.where(live, 1 - floor / jnp.where(live, norms, jnp.ones_like(norms)), jnp.zeros_like(norms))
    return jax.tree.map(jnp.multiply, w, groups.spread(scale, w))


def _sizes(groups: Partition, w: Tree, dtype: Any) -> jax.Array:
    """Entries of each group, by its labels alone."""
    total = jnp.zeros(groups.count, dtype)
    for x, label in zip(jax.tree.leaves(w), jax.tree.leaves(groups.labels), strict=True):
        places = jnp.asarray(label)
        share = jnp.full(places.size, x.size // places.size, dtype)
        total = total + jax.ops.segment_sum(share, places.reshape(-1), groups.count)
    return total
