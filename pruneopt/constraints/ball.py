"""Norm balls: the constrained form of the L1 and the group penalty, on the values and not on the support."""

from __future__ import annotations

import abc
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from pruneopt import _tree
from pruneopt.constraints.base import Constraint, check_cut, check_no_metric
from pruneopt.constraints.parts import Parts
from pruneopt.structure.layout import Slot

Tree = Any
_ROUNDING = 1e-6  # by which a norm may exceed its radius, relative, or by what the weights' dtype rounds


class Ball(Constraint):
    """{w: R(w) <= radius} for a norm R over all leaves; every support is allowed. A subclass says what R is.

    R does not grow where entries are put to zero, so that the nearest point of it that vanishes off a support is that
    of the weights on the support.
    """

    radius: float

    @property
    def bounds_values(self) -> bool:
        """True."""
        return True

    @property
    def exact(self) -> bool:
        """True."""
        return True

    @property
    def allows_empty(self) -> bool:
        """True: a small ball may ask for it."""
        return True

    def scope(self, by_layer: bool = False) -> str:
        """One radius."""
        return "one radius for each layer" if by_layer else "one radius for all weights"

    def described(self, ndim: int | None = None) -> Parts:
        """A set of values."""
        return Parts(values=(self,))

    def select(self, scores: Tree) -> Tree:
        """Everything that is not cut."""
        return jax.tree.map(lambda x: x > -jnp.inf, scores)

    def violation(self, support: Tree) -> int:
        """0."""
        return 0

    def density(self, variable: Tree) -> float:
        """1."""
        return 1.0

    def relaxed(self, cut: float) -> Constraint:
        """Itself: it removes no set fraction."""
        check_cut(cut)
        return self

    def project(self, values: Tree, support: Tree = None, metric: Tree = None) -> Tree:
        """The nearest point of the ball. Traceable by JAX."""
        check_no_metric(self, metric)
        return self._nearest(values if support is None else _tree.masked(values, support))

    def largest_product(self, u: Tree) -> float:
        """The radius times the dual norm."""
        return self.radius * self.dual_norm(u)

    @abc.abstractmethod
    def _nearest(self, values: Tree) -> Tree:
        """The nearest point of the ball."""

    @abc.abstractmethod
    def norm(self, w: Tree) -> float:
        """R(w), in float64."""

    @abc.abstractmethod
    def dual_norm(self, u: Tree) -> float:
        """max <u, w> over R(w) <= 1, in float64."""

    def value_violation(self, values: Tree) -> float:
        """By how much R is above the radius, beyond rounding."""
        return max(self.norm(values) - self.radius * (1 + max(_ROUNDING, _tree.coarsest(values))), 0.0)


@dataclass(frozen=True)
class L1Ball(Ball):
    """sum |w_i| <= radius. Source: Tibshirani 1996, equation 1; the projection is that of Duchi et al. 2008."""

    radius: float

    def __post_init__(self) -> None:
        _check_radius(self.radius)

    def check(self, variable: Tree) -> None:
        """Any leaves will do."""

    def _nearest(self, values: Tree) -> Tree:
        """Soft thresholding at the level that meets the radius."""
        wide = _tree.widened(values)
        level = _level(jnp.concatenate([jnp.abs(x).reshape(-1) for x in jax.tree.leaves(wide)]), self.radius)

        def shrunk(x: jax.Array, like: jax.Array) -> jax.Array:
            return (jnp.sign(x) * jnp.maximum(jnp.abs(x) - level.astype(x.dtype), 0)).astype(like.dtype)

        return jax.tree.map(shrunk, wide, values)

    def norm(self, w: Tree) -> float:
        """sum |w_i|."""
        return sum(float(np.sum(np.abs(np.asarray(x, np.float64)))) for x in jax.tree.leaves(w))

    def dual_norm(self, u: Tree) -> float:
        """max |u_i|."""
        return max(float(np.max(np.abs(np.asarray(x, np.float64)))) for x in jax.tree.leaves(u))


@dataclass(frozen=True)
class GroupBall(Ball):
    """sum of ||w_g||_2 <= radius over the slices g along `axis` of every leaf: filters and neurons (-1), inputs (-2).

    Source: Yuan and Lin 2006, in its constrained form; the projection shrinks the norms as the L1 ball does.
    """

    radius: float
    axis: int = -1

    def __post_init__(self) -> None:
        _check_radius(self.radius)

    def check(self, variable: Tree) -> None:
        """Raise ValueError unless every leaf has the axis."""
        for path, leaf in _tree.named_leaves(variable):
            if not -len(leaf.shape) <= self.axis < len(leaf.shape):
                raise ValueError(
                    f"axis={self.axis} does not exist in {_tree.called(path)} of shape {leaf.shape}; pass another"
                )

    def restricted(self, slots: Sequence[Slot]) -> list[Constraint]:
        """Groups of the matrices' inputs or outputs. Raises ValueError for an axis that is neither."""
        kinds = [slot.kind_of(self.axis) for slot in slots]
        for slot, kind in zip(slots, kinds, strict=True):
            if kind not in ("in", "out"):
                raise ValueError(
                    f"axis={self.axis}: that axis of leaf '{slot.name}' is neither the inputs nor the outputs of its "
                    f"matrices {slot.shape}; pass another axis, or leave that leaf out with leaves="
                )
        return [replace(self, axis=-2 if kind == "in" else -1) for kind in kinds]

    def _nearest(self, values: Tree) -> Tree:
        """Each slice shorter by the level that meets the radius."""
        wide = _tree.widened(values)
        norms = jax.tree.map(lambda x: jnp.sqrt(jnp.sum(x * x, axis=self._others(x), keepdims=True)), wide)
        level = _level(jnp.concatenate([x.reshape(-1) for x in jax.tree.leaves(norms)]), self.radius)

        def shrunk(x: jax.Array, size: jax.Array, like: jax.Array) -> jax.Array:
            left = jnp.maximum(size - level.astype(x.dtype), 0)
            return (x * (left / jnp.where(size > 0, size, jnp.ones((), x.dtype)))).astype(like.dtype)

        return jax.tree.map(shrunk, wide, norms, values)

    def norm(self, w: Tree) -> float:
        """sum ||w_g||."""
        return float(np.sum(self._sizes(w)))

    def dual_norm(self, u: Tree) -> float:
        """max ||u_g||."""
        return float(np.max(self._sizes(u)))

    def _others(self, x: Any) -> tuple[int, ...]:
        return tuple(i for i in range(x.ndim) if i != self.axis % x.ndim)

    def _sizes(self, w: Tree) -> np.ndarray:
        wide = [np.asarray(x, np.float64) for x in jax.tree.leaves(w)]
        return np.concatenate([np.sqrt(np.sum(x * x, axis=self._others(x))) for x in wide])


def _level(sizes: Float[Array, " p"], radius: float) -> Float[Array, ""]:
    """t >= 0 with sum max(sizes - t, 0) = radius; 0 where their sum is at most the radius."""
    falling = -jnp.sort(-sizes)
    over = jnp.cumsum(falling) - radius
    count = jnp.arange(1, sizes.size + 1, dtype=sizes.dtype)
    last = jnp.sum((falling * count > over).astype(jnp.int32)) - 1
    level = over[last] / count[last]
    return jnp.where(over[-1] > 0, jnp.maximum(level, 0), jnp.zeros((), sizes.dtype))


def _check_radius(radius: Any) -> None:
    if isinstance(radius, bool) or not isinstance(radius, int | float | np.floating) or not 0 < radius < math.inf:
        raise ValueError(f"radius={radius!r} is not a finite number > 0; pass the largest norm to allow")
