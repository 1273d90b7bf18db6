"""Polish: the exact best weights on a fixed support."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from pruneopt import _linalg, _tree
from pruneopt.bounds.convexity import StrongConvexity
from pruneopt.constraints import parts
from pruneopt.curvature.diagonal import Diagonal, Identity
from pruneopt.curvature.gram import Gram
from pruneopt.curvature.low_rank import LowRank
from pruneopt.objectives.base import QuadraticObjective
from pruneopt.problem import Problem
from pruneopt.solvers.base import Outcome, Solver, Start, without_penalty

Tree = Any
_COLUMNS = 1 << 12  # of a low-rank curvature's vectors, in work at a time


@dataclass(frozen=True)
class Polish(Solver):
    """argmin over w on the support S of f(w), a quadratic with a Gram, a low-rank or a diagonal curvature.

    With a Gram, each output solves its own system (H + lambda I)_SS d_S = (H + lambda I)_S,cut w0_cut for the change
    d from w0 (this form loses no digits where w0 nearly fits), by Cholesky in float64, one factor for the outputs
    that share a support; an output whose matrix is singular takes the least-squares solution of least change, by
    eigendecomposition.

    With H = G^T G / n + r I of low rank, d_S = -G_S^T (n r I + G_S G_S^T)^-1 G_cut d_cut with d_cut = -w0_cut, which
    loses no digits in float32 (the refit of Benbaki et al. 2023 for the change); a gradient adds -(H_SS)^-1 g_S.
    n^2 |S| multiply-adds in the dtype of G, n x n numbers in float64.

    The support is that of `init`, or the mask of a `Support` constraint. The result is never worse than w0 on it.
    Cost: sum over distinct supports of |S|^3 / 3 on the host; memory: one matrix at a time.
    stats: singular_outputs. Source: the exact refit of OBS, Hassibi and Stork 1993, equation 5, for a set of weights.
    """

    @property
    def never_worse_than(self) -> frozenset[str]:
        """A feasible init, its refit, and zero."""
        return frozenset({"init", "refit", "zero"})

    def refuses(self, problem: Problem) -> str | None:
        """A penalty, or an objective that is not a quadratic with a Gram, low-rank, diagonal or identity curvature."""
        f = problem.objective
        if not isinstance(f, QuadraticObjective):
            return f"Polish needs a quadratic objective, not {type(f).__name__}; use Descent for a loss"
        if not isinstance(f.curvature, (Gram, LowRank, Diagonal, Identity)):
            return f"Polish needs a Gram, a low-rank or a diagonal curvature, not {type(f.curvature).__name__}"
        if isinstance(f.curvature, LowRank) and f.curvature.ridge + f.damping == 0:
            return "Polish needs a low-rank curvature with a ridge, or Quadratic(damping=): it is singular without"
        if isinstance(f.curvature, Diagonal) and not all(
            bool(jnp.all(h > 0)) for h in jax.tree.leaves(f.curvature.values)
        ):
            return "Polish needs a positive diagonal curvature: the minimum is not defined otherwise; damp or clip it"
        return without_penalty(problem, self)

    def run(self, problem: Problem, init: Start | None, key: jax.Array) -> Outcome:
        """Solve on the support."""
        f = problem.objective
        assert isinstance(f, QuadraticObjective)
        support = _support(problem, init)
        proof = StrongConvexity() if _is_fixed(problem) and f.damping > 0 else None
        if isinstance(f.curvature, Gram):
            w, singular = refit(f.curvature.matrix, f.center, support, f.exact_ridge())
            return Outcome(
                jnp.asarray(w, f.center.dtype), support, evidence=proof, stats={"singular_outputs": singular}
            )
        if isinstance(f.curvature, LowRank):
            return Outcome(_low_rank_refit(f, f.curvature, support), support)
        value = _tree.masked(f.center if f.gradient is None else _newton(f), support)
        return Outcome(value, support, evidence=proof)


def _support(problem: Problem, init: Start | None) -> Tree:
    if init is not None:
        return init.support
    if _is_fixed(problem):
        return parts.of(problem.subject_to).allowed(problem.objective.center)
    raise ValueError("init is None, but Polish works on a given support; pass init= or subject_to=Support(mask)")


def _is_fixed(problem: Problem) -> bool:
    return problem.subject_to is not None and parts.of(problem.subject_to).fixed


@jax.jit
def _newton(f: QuadraticObjective) -> Tree:
    assert f.curvature is not None
    assert f.gradient is not None
    diagonal, ridge = f.curvature.diagonal(f.center), f.ridge()

    def one(w: Array, g: Array, h: Array) -> Array:
        wide = _tree.wide(w.dtype)
        return (w.astype(wide) - g.astype(wide) / (h.astype(wide) + ridge.astype(wide))).astype(w.dtype)

    return jax.tree.map(one, f.center, f.gradient, diagonal)


def _low_rank_refit(f: QuadraticObjective, h: LowRank, support: Tree) -> Tree:
    """The refit on the support, never worse than the trained weights on it; in the weights' dtypes."""
    layout, r = h.layout, h.ridge + f.exact_ridge()
    flat = lambda tree, dtype: np.concatenate([np.asarray(x, dtype).reshape(-1) for x in jax.tree.leaves(tree)])  # noqa: E731
    mask, w0 = flat(support, bool), flat(f.center, np.float64)
    slope = np.zeros_like(w0) if f.gradient is None else np.where(mask, flat(f.gradient, np.float64), 0.0)
    change = np.where(mask, 0.0, -w0)
    inner, reach, sloped = np.zeros((h.n, h.n)), np.zeros(h.n), np.zeros(h.n)
    for at, block in _columns(h):
        reach += block @ change[at].astype(block.dtype)
        sloped += block @ slope[at].astype(block.dtype)
        kept = block[:, mask[at]]
        inner += kept @ kept.T
    short = _linalg.cholesky_solve(factor(inner, r, h.gradients.dtype), np.stack([reach, sloped], axis=1))
    for at, block in _columns(h):
        along = np.where(mask[at], short[:, 0].astype(block.dtype) @ block, 0.0)
        turned = np.where(mask[at], short[:, 1].astype(block.dtype) @ block, 0.0)
        change[at] -= along + (slope[at] - turned) / r
    fitted, plain = layout.tree(w0 + change, f.center), _tree.masked(f.center, support)
    return jax.tree.map(jnp.asarray, fitted if f.value(fitted) <= f.value(plain) else plain)


def factor(inner: np.ndarray, ridge: float, dtype: Any) -> Any:
    """The Cholesky factor of n ridge I + `inner`, n x n products of gradients in `dtype`, for `cho_solve`.

    Raises ValueError where rounding has made it indefinite.
    """
    matrix = inner + len(inner) * ridge * np.eye(len(inner))
    try:
        return _linalg.cholesky(matrix)
    except np.linalg.LinAlgError:
        raise ValueError(
            f"curvature has a ridge of {ridge:.3g} in all, below the rounding of products of gradients in {dtype}; "
            "pass a larger ridge or Quadratic(damping=), such as 0.01"
        ) from None


def _columns(h: LowRank) -> Iterator[tuple[slice, np.ndarray]]:
    """(where, G's columns there), float32 or wider."""
    g, wide = np.asarray(h.gradients), _tree.wide(h.gradients.dtype)
    for start in range(0, g.shape[1], _COLUMNS):
        at = slice(start, min(start + _COLUMNS, g.shape[1]))
        yield at, g[:, at].astype(wide)


def refit(gram: Any, center: Any, support: Any, ridge: float) -> tuple[np.ndarray, int]:
    """The refit of every column of (n, m) in the dtype of `center`, and how many of them had a singular matrix."""
    mask, w0 = np.asarray(support), np.asarray(center, np.float64)
    h = np.asarray(gram, np.float64) + ridge * np.eye(mask.shape[0])
    start = np.where(mask, w0, 0.0)
    fitted, singular = start.copy(), 0
    wanted = h @ (w0 - start)
    supports, owner = np.unique(mask, axis=1, return_inverse=True)
    for i, alike in enumerate(supports.T):
        s, columns = np.flatnonzero(alike), np.flatnonzero(owner.reshape(-1) == i)
        if not s.size:
            continue
        at, matrix = np.ix_(s, columns), h[np.ix_(s, s)]
        step = _solved(matrix, wanted[at])
        if step is None:
            singular += columns.size
            step = _least_change(matrix, wanted[at])
        fitted[at] += step
    fitted = fitted.astype(np.asarray(center).dtype)
    worse = _column_errors(h, fitted - w0) > _column_errors(h, start - w0)  # by rounding, in singular columns
    return np.where(worse, start, fitted), singular


def _solved(matrix: np.ndarray, sides: np.ndarray) -> np.ndarray | None:
    """By Cholesky; None where the matrix is singular to working precision."""
    factorise, solve = _linalg.lapack(("potrf", "potrs"), matrix)
    factor, failed = factorise(matrix, lower=True)
    tolerance = len(matrix) * np.finfo(matrix.dtype).eps * np.max(np.diagonal(matrix))
    if failed or np.min(np.diagonal(factor)) ** 2 <= tolerance:
        return None
    return solve(factor, sides, lower=True)[0]


def _least_change(h: np.ndarray, wanted: np.ndarray) -> np.ndarray:
    values, vectors = _linalg.eigh(h)
    live = values > len(values) * np.finfo(h.dtype).eps * max(values[-1], 0.0)
    return vectors[:, live] @ ((vectors[:, live].T @ wanted) / values[live, None])


def _column_errors(h: np.ndarray, d: np.ndarray) -> np.ndarray:
    return np.sum(d * (h @ d), axis=0)
