"""What an objective is: what pruning loses."""

from __future__ import annotations

import abc
import math
from functools import cached_property
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from pruneopt import _linalg, _tree
from pruneopt.constraints.base import Constraint
from pruneopt.curvature.base import Curvature, is_semidefinite
from pruneopt.curvature.diagonal import Diagonal, Identity
from pruneopt.curvature.gram import Gram
from pruneopt.network.leaves import check_finite, check_leaf

Tree = Any


class Objective(abc.ABC):
    """f in `minimise f(w)`. Subclasses are final frozen dataclasses."""

    center: Tree
    """The trained weights w0: the point that pruning starts from."""

    def __repr__(self) -> str:
        return f"{type(self).__name__}({_tree.shapes(self.center)})"

    def variable(self) -> Tree:
        """The shapes and dtypes of what is decided; None where nothing is."""
        return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), self.center)

    @abc.abstractmethod
    def check(self) -> None:
        """Raise ValueError or TypeError for parts that do not fit together or are not finite. `Problem` calls it."""

    def on_matrices(self, constraint: Constraint) -> Constraint:
        """`constraint`, its inputs and outputs those of the matrices that a function multiplies, where there is one."""
        return constraint

    @abc.abstractmethod
    def value(self, w: Tree) -> float:
        """f(w): in float64 for quadratics, in the loss's own precision otherwise."""


class QuadraticObjective(Objective):
    """f(w) = constant + <g, d> + 1/2 <d, (H + lambda I) d>, d = w - w0.

    center: w0. gradient: g, or None for zero. curvature: H, or None for zero. constant: f(w0).
    damping: relative; lambda = damping * mean(diag H). It is part of the objective.
    """

    gradient: Tree | None
    curvature: Curvature | None
    constant: float
    damping: float

    def __repr__(self) -> str:
        parts = [] if self.curvature is None else [f"curvature {type(self.curvature).__name__}"]
        parts += [] if self.gradient is None else ["a gradient"]
        parts += [f"damping {self.damping:g}"] if self.damping else []
        return f"{type(self).__name__}({'; '.join([_tree.shapes(self.center), *parts])})"

    def value(self, w: Tree) -> float:
        """f(w), in float64."""
        return self.constant + self._difference(w, self.exact_ridge())

    def change(self, w: Tree) -> float:
        """<g, d> + 1/2 <d, H d>: what the model says of the loss, without the damping that keeps d small."""
        return self._difference(w, 0.0)

    def _difference(self, w: Tree, ridge: float) -> float:
        total = 0.0
        if self.curvature is not None:
            total += 0.5 * self.curvature.form(w, self.center, ridge)
        if self.gradient is not None:
            for g, x, c in zip(*map(jax.tree.leaves, (self.gradient, w, self.center)), strict=True):
                difference = np.asarray(x, np.float64) - np.asarray(c, np.float64)
                total += float(np.vdot(np.asarray(g, np.float64), difference))
        return total

    def slope(self, w: Tree) -> Tree:
        """The gradient of f at w, g + (H + lambda I) (w - w0), in float64 NumPy arrays whatever JAX's mode."""
        ridge = self.exact_ridge()
        with jax.enable_x64(True):
            wide = _tree.float64((self.curvature, w, self.center, self.gradient))
            curvature, w, center, gradient = wide
            slope = jax.tree.map(jnp.zeros_like, center) if gradient is None else gradient
            if curvature is not None:
                d = jax.tree.map(jnp.subtract, w, center)
                slope = jax.tree.map(lambda s, hd, d: s + hd + ridge * d, slope, curvature.mv(d), d)
            return jax.tree.map(lambda x: np.asarray(x, np.float64), slope)

    def exact_ridge(self) -> float:
        """lambda = damping * mean(diag H), the mean in float64 whatever the curvature's dtype and JAX's mode."""
        if self.curvature is None or self.damping == 0:
            return 0.0
        pairs = zip(*map(jax.tree.leaves, (self.curvature.diagonal(self.center), self.center)), strict=True)
        means = [(np.mean(np.asarray(h, np.float64)), w.size) for h, w in pairs]
        return float(self.damping * sum(mean * size for mean, size in means) / sum(size for _, size in means))

    def ridge(self) -> jax.Array:
        """lambda for a program: a scalar in float32, or float64 for a curvature in float64. Traceable by JAX."""
        leaves = jax.tree.leaves(self.center)
        if self.curvature is None or self.damping == 0:
            return jnp.zeros((), _tree.widest(leaves))
        diagonal = jax.tree.leaves(self.curvature.diagonal(self.center))
        dtype = _tree.widest(diagonal)
        total = sum(jnp.mean(h.astype(dtype)) * w.size for h, w in zip(diagonal, leaves, strict=True))
        return jnp.asarray(self.damping * total / sum(w.size for w in leaves), dtype)

    @property
    def is_separable(self) -> bool:
        """Whether f is a sum of one term a weight, smallest at w0: no gradient, a diagonal H without negatives."""
        if self.gradient is not None or not isinstance(self.curvature, Diagonal | Identity):
            return False
        return self.curvature.semidefinite

    @cached_property
    def is_convex(self) -> bool:
        """Whether H + lambda I is known to be semidefinite: `Curvature.semidefinite`, and what damping makes so."""
        if isinstance(self.curvature, Gram):
            h = np.asarray(self.curvature.matrix, np.float64)
            return is_semidefinite(h + self.exact_ridge() * np.eye(len(h)))
        if isinstance(self.curvature, Diagonal):
            ridge = self.ridge()
            return Diagonal(jax.tree.map(lambda h: h + ridge.astype(h.dtype), self.curvature.values)).semidefinite
        return self.curvature is None or self.curvature.semidefinite

    def saliency(self) -> Tree:
        """What removing each weight alone costs: s_i = -g_i w_i + 1/2 (H_ii + lambda) w_i^2. Traceable by JAX.

        In float32, or float64 for float64 weights. Source: LeCun, Denker, Solla 1990, equation 5 (without the gradient
        term); Molchanov et al. 2019.
        """
        diagonal = None if self.curvature is None else self.curvature.diagonal(self.center)
        return _saliency(self.center, self.gradient, diagonal, self.ridge(), 1.0)

    def ranking(self) -> Tree:
        """`saliency` times the power of four that brings the largest weight to [1, 2): no square of a weight then
        overflows, and none vanishes within 19 decades of the largest. For comparing weights only.
        """
        diagonal = None if self.curvature is None else self.curvature.diagonal(self.center)
        largest = max(float(_largest(leaf)) for leaf in jax.tree.leaves(self.center))
        scale = 2.0 ** -math.floor(math.log2(largest)) if largest > 0 else 1.0
        return _saliency(self.center, self.gradient, diagonal, self.ridge(), min(max(scale, 2.0**-126), 2.0**126))


@jax.jit
def _largest(leaf: jax.Array) -> jax.Array:
    return _linalg.blocked_max(lambda x: jnp.abs(x.astype(_tree.wide(x.dtype))), leaf)


@jax.jit
def _saliency(center: Tree, gradient: Tree | None, diagonal: Tree | None, ridge: jax.Array, scale: float) -> Tree:
    """scale^2 times the saliency, from weights scaled first."""

    def wide(x: jax.Array) -> jax.Array:
        x = x.astype(_tree.wide(x.dtype))
        return x * jnp.asarray(scale).astype(x.dtype)

    scores = jax.tree.map(lambda w: jnp.zeros_like(wide(w)), center)
    if diagonal is not None:

        def curved(w: jax.Array, h: jax.Array) -> jax.Array:
            w = wide(w)
            return jnp.asarray(0.5, w.dtype) * (h.astype(w.dtype) + ridge.astype(w.dtype)) * w * w

        scores = jax.tree.map(curved, center, diagonal)
    if gradient is not None:
        scores = jax.tree.map(lambda s, w, g: s - wide(g) * wide(w), scores, center, gradient)
    return scores


def check_center(center: Tree) -> None:
    """Raise unless `center` is a tree of finite floating-point arrays with at least one entry each."""
    if not jax.tree.leaves(center):
        raise ValueError("center is an empty tree; pass the trained weights")
    for path, leaf in _tree.named_leaves(center):
        check_leaf(path, leaf, "center")
    check_finite(center, "center")


def check_damping(damping: float) -> None:
    """Raise ValueError unless damping is a finite number >= 0."""
    if not 0 <= damping < float("inf"):
        raise ValueError(
            f"damping={damping!r} is not a finite number >= 0; pass a fraction of mean(diag H), such as 0.01"
        )
