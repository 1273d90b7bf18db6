"""What a penalty is: what pruning discourages without forbidding it."""

from __future__ import annotations

import abc
import math
from collections.abc import Callable
from numbers import Real
from typing import Any

import jax
import jax.core
import jax.numpy as jnp
import numpy as np

from pruneopt import _tree
from pruneopt.network.leaves import check_finite, check_like

Tree = Any


class Penalty(abc.ABC):
    """P(w) = weight * R(w) >= 0 with P(0) = 0 and a computable proximal map.

    Subclasses are final frozen dataclasses, registered as pytrees whose leaves are `weight` and their arrays, so that a
    compiled solver serves every weight.
    """

    weight: float

    @property
    def is_convex(self) -> bool:
        """Whether P is convex; only then has it a `conjugate`, and a stationary point of a convex loss is optimal."""
        return True

    @property
    def is_entrywise(self) -> bool:
        """Whether P is a sum of one term an entry; only then may the step of `prox` differ among entries."""
        return True

    def check(self, variable: Tree) -> None:
        """Raise ValueError unless the penalty fits these leaves. `Problem` calls it."""
        check_weight(self.weight)

    @abc.abstractmethod
    def value(self, w: Tree) -> float:
        """P(w), in float64."""

    @abc.abstractmethod
    def prox(self, w: Tree, step: Any) -> Tree:
        """argmin over v of P(v) + ||v - w||^2 / (2 step). Traceable by JAX.

        step: a number > 0, or for entrywise penalties a tree like `w` with one for each entry.
        """

    @abc.abstractmethod
    def weight_max(self, gradient: Tree, step: float = 1.0) -> float:
        """The least weight with prox(-step * gradient, step) = 0, `gradient` that of the loss at zero.

        From it on zero is optimal for a convex penalty, whatever `step`; for another one it is where a loss of
        curvature 1 / step at most has no better point than zero.
        """

    def conjugate(self, u: Tree) -> float:
        """sup over w of <u, w> - P(w), in float64; infinite where u is outside the subgradients of P.

        Raises ValueError for a penalty that is not convex.
        """
        raise ValueError(f"{type(self).__name__} is not convex and has no conjugate; only convex penalties have a gap")


def check_weight(weight: Any, name: str = "weight") -> None:
    """Raise ValueError unless `weight` is a finite number >= 0. Tracers pass."""
    if isinstance(weight, jax.core.Tracer) or type(weight) is object:  # inside a transformation
        return
    number = isinstance(weight, Real) or (_tree.is_array(weight) and np.ndim(weight) == 0)
    if isinstance(weight, bool) or not number or not 0 <= float(weight) < math.inf:
        raise ValueError(f"{name}={weight!r} is not a finite number >= 0; pass the factor of the penalty")


def check_share(name: str, value: Any) -> None:
    """Raise ValueError unless 0 < value <= 1."""
    if not (isinstance(value, int | float | np.floating) and 0 < value <= 1):
        raise ValueError(f"{name}={value!r} is outside (0, 1]; pass the share of the L1 norm, such as 0.5")


def check_factors(factors: Tree, variable: Tree) -> None:
    """Raise ValueError unless `factors` is None or a tree like `variable` whose leaves broadcast, finite and >= 0."""
    if factors is None:
        return
    if jax.tree.structure(factors) != jax.tree.structure(variable):
        check_like(factors, variable, "factors")
    check_finite(factors, "factors")
    for (path, f), leaf in zip(_tree.named_leaves(factors), jax.tree.leaves(variable), strict=True):
        if np.ndim(f) != len(leaf.shape) or any(a not in (1, b) for a, b in zip(np.shape(f), leaf.shape, strict=True)):
            raise ValueError(
                f"factors: leaf '{path}' has shape {np.shape(f)} and does not broadcast to {leaf.shape}; pass one "
                "factor an entry, with 1 for axes that share theirs"
            )
        if float(jnp.min(f)) < 0:
            raise ValueError(f"factors: leaf '{path}' has a negative entry; pass numbers >= 0")


def entry_by_entry(fn: Callable[..., Any], w: Tree, step: Any, *others: Tree) -> Tree:
    """fn(leaf, its step, ...) over the leaves, whether `step` is one number or a tree like `w`."""
    if jax.tree.structure(step) == jax.tree.structure(0) and np.ndim(step) == 0:
        step = jax.tree.map(lambda _: step, w)
    return jax.tree.map(lambda x, t, *rest: fn(x, jnp.asarray(t, x.dtype), *rest), w, step, *others)


def one_step(penalty: Penalty, step: Any) -> Any:
    """`step`, or ValueError where it differs among entries."""
    if jax.tree.structure(step) != jax.tree.structure(0) or np.ndim(step) != 0:
        raise ValueError(
            f"step differs among entries, and {type(penalty).__name__} ties them; pass one number, or L1 (entrywise)"
        )
    return step


def absolute(tree: Tree) -> list[np.ndarray]:
    """|leaf| for each leaf, in float64 on the host."""
    return [np.abs(np.asarray(leaf, np.float64)) for leaf in jax.tree.leaves(tree)]
