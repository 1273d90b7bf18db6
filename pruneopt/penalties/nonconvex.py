"""Penalties that shrink large weights less than small ones: not convex, entry by entry."""

from __future__ import annotations

import abc
import math
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from pruneopt.penalties.base import Penalty, absolute, check_weight, entry_by_entry
from pruneopt.penalties.l1 import soft

Tree = Any


class Nonconvex(Penalty):
    """P(w) = sum_i p(|w_i|), p increasing and concave on [0, inf); a subclass says what p is."""

    @property
    def is_convex(self) -> bool:
        """False."""
        return False

    @abc.abstractmethod
    def entries(self, size: np.ndarray) -> np.ndarray:
        """p(size), size >= 0."""

    @abc.abstractmethod
    def shrunk(self, w: jax.Array, step: jax.Array) -> jax.Array:
        """argmin over v of p(|v|) + (v - w)^2 / (2 step), entry by entry."""

    def value(self, w: Tree) -> float:
        """Sum of p(|w_i|)."""
        return sum(float(np.sum(self.entries(x))) for x in absolute(w))

    def prox(self, w: Tree, step: Any) -> Tree:
        """`shrunk` for each leaf; the global minimum, zero at a tie."""
        return entry_by_entry(self.shrunk, w, step)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class L0(Nonconvex):
    """P(w) = weight * (number of nonzero entries). Its prox is hard thresholding (Donoho and Johnstone 1994)."""

    weight: float

    def __post_init__(self) -> None:
        check_weight(self.weight)

    def entries(self, size: np.ndarray) -> np.ndarray:
        """Weight where nonzero."""
        return self.weight * (size > 0)

    def shrunk(self, w: jax.Array, step: jax.Array) -> jax.Array:
        """W where |w| > sqrt(2 step weight)."""
        return jnp.where(jnp.abs(w) > jnp.sqrt(2 * step * self.weight), w, jnp.zeros((), w.dtype))

    def weight_max(self, gradient: Tree, step: float = 1.0) -> float:
        """step * max(gradient^2) / 2."""
        return 0.5 * step * _largest(gradient) ** 2


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class LHalf(Nonconvex):
    """P(w) = weight * sum |w_i|^(1/2).

    Source: Xu, Chang, Xu and Zhang 2012, theorem 1: half thresholding, in closed form.
    """

    weight: float

    def __post_init__(self) -> None:
        check_weight(self.weight)

    def entries(self, size: np.ndarray) -> np.ndarray:
        """Weight * sqrt(size)."""
        return self.weight * np.sqrt(size)

    def shrunk(self, w: jax.Array, step: jax.Array) -> jax.Array:
        """2/3 w (1 + cos(2/3 (pi - arccos(t / 4 (|w| / 3)^(-3/2))))) where |w| > 3/2 t^(2/3), t = step * weight."""
        t = step * self.weight
        kept = jnp.abs(w) > 1.5 * jnp.cbrt(t * t)
        third = jnp.where(kept, jnp.abs(w) / 3, jnp.ones((), w.dtype))
        angle = jnp.arccos(jnp.minimum(t / 4 / (third * jnp.sqrt(third)), 1))
        return jnp.where(kept, w * (1 + jnp.cos(2 * (math.pi - angle) / 3)) * 2 / 3, jnp.zeros((), w.dtype))

    def weight_max(self, gradient: Tree, step: float = 1.0) -> float:
        """(2/3 max |gradient|)^(3/2) sqrt(step)."""
        return (2 * _largest(gradient) / 3) ** 1.5 * step**0.5


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class MCP(Nonconvex):
    """p(x) = weight x - x^2 / (2 gamma) up to gamma * weight, constant from there on: the minimax concave penalty.

    gamma: > 0; large is near L1, small near L0. A step >= gamma gives hard thresholding.
    Source: Zhang 2010, equation 2.1; the prox is firm thresholding.
    """

    weight: float
    gamma: float = field(default=3.0, metadata={"static": True})

    def __post_init__(self) -> None:
        check_weight(self.weight)
        _check_above("gamma", self.gamma, 0, 3.0)

    def entries(self, size: np.ndarray) -> np.ndarray:
        """p(size)."""
        x = np.minimum(size, self.gamma * self.weight)
        return self.weight * x - x * x / (2 * self.gamma)

    def shrunk(self, w: jax.Array, step: jax.Array) -> jax.Array:
        """soft(w, step weight) / (1 - step / gamma), w itself from gamma * weight on."""
        firm = step < self.gamma
        slope = jnp.where(firm, 1 - step / self.gamma, jnp.ones((), w.dtype))
        inside = soft(w, step * self.weight) / slope
        bent = jnp.where(jnp.abs(w) > self.gamma * self.weight, w, inside)
        hard = jnp.where(jnp.abs(w) > self.weight * jnp.sqrt(self.gamma * step), w, jnp.zeros((), w.dtype))
        return jnp.where(firm, bent, hard)

    def weight_max(self, gradient: Tree, step: float = 1.0) -> float:
        """max |gradient|, times sqrt(step / gamma) for step > gamma."""
        return _largest(gradient) * max(1.0, step / self.gamma) ** 0.5


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class SCAD(Nonconvex):
    """p(x) = weight x up to weight, then bends to be constant from a * weight on: smoothly clipped absolute deviation.

    a: > 1; Fan and Li's choice is 3.7. Source: Fan and Li 2001, section 2 and equation 2.8 (for step 1).
    """

    weight: float
    a: float = field(default=3.7, metadata={"static": True})

    def __post_init__(self) -> None:
        check_weight(self.weight)
        _check_above("a", self.a, 1, 3.7)

    def entries(self, size: np.ndarray) -> np.ndarray:
        """p(size)."""
        lam, a = float(self.weight), self.a
        x = np.minimum(size, a * lam)
        bent = (2 * a * lam * x - x * x - lam * lam) / (2 * (a - 1))
        return np.where(x <= lam, lam * x, bent)

    def shrunk(self, w: jax.Array, step: jax.Array) -> jax.Array:
        """Soft up to weight (1 + step), then ((a - 1) w - a step weight sign w) / (a - 1 - step), w from a weight on.

        For step >= a - 1, soft up to weight (a + 1 + step) / 2 (weight sqrt(step (a + 1)) for step > a + 1), then w.
        """
        lam, a, size = self.weight, self.a, jnp.abs(w)
        low, firm = soft(w, step * lam), step < a - 1
        slope = jnp.where(firm, 1 - step / (a - 1), jnp.ones((), w.dtype))
        middle = soft(w, step * lam * (a / (a - 1))) / slope
        bent = jnp.where(size <= lam * (1 + step), low, jnp.where(size <= a * lam, middle, w))
        end = jnp.where(step <= a + 1, (a + 1 + step) / 2, jnp.sqrt(step * (a + 1)))
        return jnp.where(firm, bent, jnp.where(size <= lam * end, low, w))

    def weight_max(self, gradient: Tree, step: float = 1.0) -> float:
        """max |gradient|, times sqrt(step / (a + 1)) for step > a + 1."""
        return _largest(gradient) * max(1.0, step / (self.a + 1)) ** 0.5


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class LogSum(Nonconvex):
    """P(w) = weight * sum log(1 + |w_i| / eps).

    eps: > 0, in units of the weights; small is near L0. Source: Candes, Wakin and Boyd 2008, section 2.2.
    """

    weight: float
    eps: float = field(default=0.1, metadata={"static": True})

    def __post_init__(self) -> None:
        check_weight(self.weight)
        _check_above("eps", self.eps, 0, 0.1)

    def entries(self, size: np.ndarray) -> np.ndarray:
        """Weight * log(1 + size / eps)."""
        return self.weight * np.log1p(size / self.eps)

    def shrunk(self, w: jax.Array, step: jax.Array) -> jax.Array:
        """The larger root v of (v + eps) (v - |w|) + step weight = 0 where it is positive and better than zero."""
        t, size, eps = step * self.weight, jnp.abs(w), self.eps
        zero = jnp.zeros((), w.dtype)
        square = (size + eps) ** 2 - 4 * t
        v = jnp.maximum((size - eps + jnp.sqrt(jnp.maximum(square, 0))) / 2, zero)
        gain = v * (size - v / 2) - t * jnp.log1p(v / eps)  # step times how much lower v is than zero
        return jnp.where((square >= 0) & (gain > 0), jnp.sign(w) * v, zero)

    def weight_max(self, gradient: Tree, step: float = 1.0) -> float:
        """eps * max |gradient| where that is at most eps^2 / step, else by bisection on where zero ties."""
        largest = _largest(gradient)
        size = step * largest
        if size <= self.eps:
            return largest * self.eps

        def better_than_zero(weight: float) -> bool:
            square = (size + self.eps) ** 2 - 4 * step * weight
            v = (size - self.eps + math.sqrt(max(square, 0.0))) / 2
            return square >= 0 and v * (size - v / 2) > step * weight * math.log1p(v / self.eps)

        low, high = 0.0, (size + self.eps) ** 2 / (4 * step)
        for _ in range(60):
            middle = (low + high) / 2
            low, high = (middle, high) if better_than_zero(middle) else (low, middle)
        return high


def _largest(gradient: Tree) -> float:
    return max(float(np.max(g)) for g in absolute(gradient))


def _check_above(name: str, value: Any, least: float, usual: float) -> None:
    if not (isinstance(value, int | float | np.floating) and least < value < math.inf):
        raise ValueError(f"{name}={value!r} is not a finite number > {least}; pass one, such as {usual}")
