"""Optimal Brain Surgeon: remove the weight that costs least, move all others to make up for it, again and again."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import scipy.linalg
from jaxtyping import Bool, Float, Int

from pruneopt import _linalg, _tree
from pruneopt.constraints import parts
from pruneopt.constraints.base import Constraint
from pruneopt.curvature.base import Curvature
from pruneopt.objectives.base import QuadraticObjective
from pruneopt.problem import Problem
from pruneopt.solvers.base import Outcome, Solver, Start, check_whole, without_penalty


@dataclass(frozen=True)
class OBS(Solver):
    """minimise <g, d> + 1/2 <d, (H + lambda I) d>, d = w - w0, by exact greedy removal on the dense inverse Hessian.

    With C = (H + lambda I)^-1 and w the minimum on what is left (at first w0 - C g), remove the weight q with the least
    rise w_q^2 / (2 C_qq) of the objective, then

        w <- w - C_:q w_q / C_qq,    C <- C - C_:q C_q: / C_qq,

    until the constraint holds: Cardinality over the tree or per leaf, a Support, or both. What a Support cuts goes
    first. The result is the exact refit of its support.

    memory: bytes that H and C may take, 16 p^2 for p weights. In float64, H included; about 2 p^2 operations a removal.
    stats: removed, the weights in their order as indices into the leaves laid end to end; rises, of each removal.
    `init` is not used. Raises ValueError for an H + lambda I that is not positive definite.
    Source: Hassibi and Stork 1993, equation 5 and the box on page 3 (with H kept while weights go).
    """

    memory: int = 1 << 31

    def __post_init__(self) -> None:
        check_whole(self, 1, "memory")

    def refuses(self, problem: Problem) -> str | None:
        """A penalty, a curvature without a dense matrix or one that is too large, and constraints it cannot follow."""
        f = problem.objective
        if not isinstance(f, QuadraticObjective):
            return f"OBS needs a quadratic objective, not {type(f).__name__}; model the loss with Quadratic"
        if not hasattr(f.curvature, "dense"):
            return (
                f"OBS needs a curvature with a dense matrix, not {type(f.curvature).__name__}; pass a Fisher or a "
                "Hessian of the whole network, or use Score for a diagonal and GreedyOBS for a Reconstruction"
            )
        p = _tree.size(f.center)
        if 16 * p * p > self.memory:
            return (
                f"OBS needs {16 * p * p:,} bytes for H and its inverse, above memory={self.memory:,}; pass leaves= to "
                f"decide fewer than {p:,} weights, memory= to allow it, or a solver that needs no dense matrix"
            )
        if problem.subject_to is None or quota_of(problem.subject_to, f.center) is None:
            return (
                f"OBS cannot prune under {problem.subject_to!r}; pass Cardinality per 'tree' or 'leaf', a Support, or "
                "an Intersection of Supports with one of them"
            )
        return without_penalty(problem, self)

    def run(self, problem: Problem, init: Start | None, key: jax.Array) -> Outcome:
        """Invert, then remove."""
        f = problem.objective
        assert isinstance(f, QuadraticObjective)
        assert problem.subject_to is not None
        layout = _tree.Layout.of(f.center)
        quota = quota_of(problem.subject_to, f.center)
        assert quota is not None
        w = _flat(f.center)
        assert f.curvature is not None
        with jax.enable_x64(True):  # what a small ridge stands for is lost in a float32 matrix
            h = np.asarray(_tree.float64(f.curvature).dense(self.memory), np.float64)
        inverse = _inverse(h, f.exact_ridge(), f.curvature)
        if f.gradient is not None:
            w = w - inverse @ _flat(f.gradient)
        w, removed, rises = _removed(inverse, w, quota)
        alive = np.ones(w.size, bool)
        alive[removed] = False
        value = jax.tree.map(jnp.asarray, layout.tree(w, f.center))
        support = jax.tree.map(jnp.asarray, layout.tree(alive))
        return Outcome(value, support, stats={"removed": removed, "rises": rises})


class Quota(NamedTuple):
    """What must go: everything not `allowed`; then down to `most` in all, no leaf below its `least`."""

    allowed: Bool[np.ndarray, " p"]
    leaf: Int[np.ndarray, " p"]
    least: Int[np.ndarray, " l"]
    most: int


def _removed(
    inverse: Float[np.ndarray, "p p"], w: Float[np.ndarray, " p"], quota: Quota
) -> tuple[Float[np.ndarray, " p"], Int[np.ndarray, " k"], Float[np.ndarray, " k"]]:
    """The weights that are left and their values, what went in its order, and the rise of each removal."""
    c, w = np.asfortranarray(inverse), w.copy()
    (add_outer,) = scipy.linalg.get_blas_funcs(("ger",), (c,))
    alive, kept = np.ones(w.size, bool), np.bincount(quota.leaf, minlength=len(quota.least))
    removed, rises = [], []
    while True:
        barred = alive & ~quota.allowed
        if barred.any():
            free = barred
        elif kept.sum() > quota.most:
            free = alive & (kept > quota.least)[quota.leaf]
        else:
            return w, np.asarray(removed, int), np.asarray(rises)
        diagonal = np.where(free, np.diagonal(c), 1.0)
        rise = np.where(free, w**2 / (2 * np.maximum(diagonal, np.finfo(float).tiny)), np.inf)
        q = int(np.argmin(rise))
        column, pivot = c[:, q].copy(), c[q, q]
        w -= column * (w[q] / pivot)
        c = add_outer(-1 / pivot, column, column, a=c, overwrite_a=True)  # in place
        c[:, q] = c[q] = w[q] = 0.0
        alive[q] = False
        kept[quota.leaf[q]] -= 1
        removed.append(q)
        rises.append(rise[q])


def _inverse(h: Float[np.ndarray, "p p"], ridge: float, curvature: Curvature) -> Float[np.ndarray, "p p"]:
    """(H + ridge I)^-1. Raises ValueError where that is not positive definite."""
    matrix = h + ridge * np.eye(len(h))
    try:
        factor = _linalg.cholesky(matrix)
    except np.linalg.LinAlgError:
        least = float(_linalg.eigvalsh(matrix)[0])
        mean = float(np.mean(np.diagonal(h)))
        advice = [] if curvature.semidefinite else ["a Fisher curvature, or the Gauss-Newton of a convex loss"]
        if mean > 0:
            enough = max((ridge - least) / mean, 1e-6)
            advice.append(f"Quadratic(damping=) above {enough:.3g}, in units of mean(diag H) = {mean:.3g}")
        raise ValueError(
            f"curvature is not positive definite (least eigenvalue of H + lambda I {least:.3g}), which OBS needs; pass "
            f"{', or '.join(advice) or 'a curvature that is not zero'}"
        ) from None
    return _linalg.cholesky_solve(factor, np.eye(len(h)))


def _flat(tree: Any) -> Float[np.ndarray, " p"]:
    return np.concatenate([np.asarray(x, np.float64).reshape(-1) for x in jax.tree.leaves(tree)])


def quota_of(constraint: Constraint, center: Any) -> Quota | None:
    """The constraint as a quota, None where it is none."""
    found = parts.of(constraint)
    sizes = [x.size for x in jax.tree.leaves(center)]
    leaf, free = np.repeat(np.arange(len(sizes)), sizes), found.allowed_flat(center)
    live = np.bincount(leaf[free], minlength=len(sizes))
    if found.fixed:
        return Quota(free, leaf, live, int(live.sum()))
    one = found.one
    if one is None or one.kept_of is None or one.box != (-1, -1):
        return None
    floors = np.asarray([min(one.floor, size) for size in sizes])
    if one.across:
        return Quota(free, leaf, np.minimum(floors, live), one.kept_of(sum(sizes)))
    least = np.minimum(np.maximum([one.kept_of(size) for size in sizes], floors), live)
    return Quota(free, leaf, least, int(least.sum()))
