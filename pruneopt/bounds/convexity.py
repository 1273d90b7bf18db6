"""The bound of a strongly convex problem on a fixed support: how far its gradient is from zero."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from pruneopt import _linalg, _tree
from pruneopt.bounds.base import Evidence
from pruneopt.constraints import parts
from pruneopt.curvature.diagonal import Diagonal, Identity
from pruneopt.curvature.gram import Gram
from pruneopt.objectives.base import QuadraticObjective
from pruneopt.problem import Problem

Tree = Any


@dataclass(frozen=True)
class StrongConvexity(Evidence):
    """Evidence for a quadratic on a fixed support: H + lambda I >= c I there, c > 0.

    With r the gradient at w on the support, f(w) - ||r||^2 / (2 c) is a lower bound for every w that is zero
    elsewhere: that of `value`, cut to the support. Premises: no penalty, no gradient at w0, a constraint that is a
    fixed support, and a c that is found and checked.
    """

    def bound(self, problem: Problem, value: Tree, support: Tree) -> float:
        """f(w) - ||r||^2 / (2 c)."""
        f, constraint = problem.objective, problem.subject_to
        if not isinstance(f, QuadraticObjective) or f.gradient is not None or problem.penalty is not None:
            return -math.inf
        fixed = parts.of(constraint)
        if constraint is None or not fixed.fixed:
            return -math.inf
        modulus = _modulus(f, f.exact_ridge())
        if modulus <= 0:
            return -math.inf
        with jax.enable_x64(True):
            allowed = fixed.allowed(f.center)
            value = _tree.masked(value, allowed)
            residual = _tree.masked(f.slope(value), allowed)
            square = sum(float(np.sum(np.square(r))) for r in jax.tree.leaves(residual))
        return f.value(value) - square / (2 * modulus)


def _modulus(f: QuadraticObjective, ridge: float) -> float:
    """A number c with H + ridge I >= c I, checked and not assumed; 0 where none is found."""
    if isinstance(f.curvature, Identity):
        return 1.0 + ridge
    if isinstance(f.curvature, Diagonal):
        return min(float(jnp.min(h)) for h in jax.tree.leaves(f.curvature.values)) + ridge
    if isinstance(f.curvature, Gram) and ridge > 0:
        h = np.asarray(f.curvature.matrix, np.float64)
        try:  # H + ridge/2 I is positive definite if and only if Cholesky succeeds
            _linalg.cholesky(h + 0.5 * ridge * np.eye(len(h)))
        except np.linalg.LinAlgError:
            return 0.0
        return 0.5 * ridge
    return 0.0
