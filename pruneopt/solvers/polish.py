"""Polish: the exact best weights on a fixed support."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float

from pruneopt import _tree
from pruneopt.constraints.support import Support
from pruneopt.curvature.diagonal import Diagonal, Identity
from pruneopt.curvature.gram import Gram
from pruneopt.objectives.base import QuadraticObjective
from pruneopt.problem import Problem
from pruneopt.solution import StrongConvexity
from pruneopt.solvers.base import Outcome, Solver, Start, without_penalty

Tree = Any


@dataclass(frozen=True)
class Polish(Solver):
    """argmin over w on the support S of f(w), a quadratic with a Gram or a diagonal curvature.

    With a Gram, each output solves its own system (H + lambda I)_SS d_S = (H + lambda I)_S,cut w0_cut for the change
    d from w0 (this form loses no digits where w0 nearly fits), by Cholesky in float64, batched over outputs; an
    output whose matrix is singular takes the least-squares solution of least change, by eigendecomposition.

    The support is that of `init`, or the mask of a `Support` constraint. The result is never worse than w0 on it.
    Cost: sum over outputs of |S|^3 / 3; memory: `block_bytes` of matrices at a time.
    stats: singular_outputs. Source: the exact refit of OBS, Hassibi and Stork 1993, equation 5, for a set of weights.
    """

    block_bytes: int = 1 << 28

    def refuses(self, problem: Problem) -> str | None:
        """A penalty, or an objective that is not a quadratic with a Gram, diagonal or identity curvature."""
        f = problem.objective
        if not isinstance(f, QuadraticObjective):
            return f"Polish needs a quadratic objective, not {type(f).__name__}; use Descent for a loss"
        if not isinstance(f.curvature, (Gram, Diagonal, Identity)):
            return f"Polish needs a Gram or a diagonal curvature, not {type(f.curvature).__name__}"
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
        proof = StrongConvexity() if isinstance(problem.subject_to, Support) and f.damping > 0 else None
        if isinstance(f.curvature, Gram):
            w, singular = _refit_gram(f.curvature.matrix, f.center, support, float(f.ridge()), self.block_bytes)
            return Outcome(w, support, evidence=proof, stats={"singular_outputs": singular})
        value = _tree.masked(f.center if f.gradient is None else _newton(f), support)
        return Outcome(value, support, evidence=proof)


def _support(problem: Problem, init: Start | None) -> Tree:
    if init is not None:
        return init.support
    if isinstance(problem.subject_to, Support):
        return problem.subject_to.select(jax.tree.map(lambda x: jnp.zeros(x.shape), problem.objective.center))
    raise ValueError("init is None, but Polish works on a given support; pass init= or subject_to=Support(mask)")


@jax.jit
def _newton(f: QuadraticObjective) -> Tree:
    assert f.curvature is not None
    assert f.gradient is not None
    diagonal, ridge = f.curvature.diagonal(f.center), f.ridge()
    return jax.tree.map(lambda w, g, h: w - g / (h + ridge), f.center, f.gradient, diagonal)


def _refit_gram(
    gram: Float[Array, "n n"],
    center: Float[Array, "n m"],
    support: Bool[Array, "n m"],
    ridge: float,
    block_bytes: int,
) -> tuple[Float[Array, "n m"], int]:
    """The refit of every column, and how many of them had a singular matrix."""
    mask, w0 = np.asarray(support), np.asarray(center, np.float64)
    n = mask.shape[0]
    h = np.asarray(gram, np.float64) + ridge * np.eye(n)
    cut = np.where(mask, 0.0, w0)
    start = np.where(mask, w0, 0.0)
    refit, singular = start.copy(), 0
    wanted = h @ cut
    for columns, width in _blocks(mask.sum(axis=0), n, block_bytes):
        kept = [np.flatnonzero(mask[:, column]) for column in columns]
        matrices = np.tile(np.eye(width), (len(columns), 1, 1))  # padded by the identity
        sides = np.zeros((len(columns), width))
        for matrix, side, column, s in zip(matrices, sides, columns, kept, strict=True):
            matrix[: s.size, : s.size] = h[np.ix_(s, s)]
            side[: s.size] = wanted[s, column]
        with jax.enable_x64(True):
            steps = np.asarray(_solve(jnp.asarray(matrices), jnp.asarray(sides)))
        for step, column, s in zip(steps, columns, kept, strict=True):
            if np.all(np.isfinite(step)):
                refit[s, column] += step[: s.size]
            else:
                singular += 1
                refit[s, column] += _least_change(h[np.ix_(s, s)], wanted[s, column])
    refit = refit.astype(np.asarray(center).dtype)
    worse = _column_errors(h, refit - w0) > _column_errors(h, start - w0)  # by rounding, in singular columns
    return jnp.asarray(np.where(worse, start, refit), center.dtype), singular


def _blocks(sizes: np.ndarray, n: int, block_bytes: int) -> Iterator[tuple[np.ndarray, int]]:
    """Columns with like numbers of kept rows together, and the one of eight widths that they are padded to."""
    unit = -(-n // 8)
    widths = -(-sizes // unit) * unit
    for width in np.unique(widths[widths > 0]):
        members = np.flatnonzero(widths == width)
        batch = max(1, block_bytes // (8 * int(width) ** 2))
        for first in range(0, len(members), batch):
            yield members[first : first + batch], int(width)


@jax.jit
def _solve(matrices: Float[Array, "b n n"], sides: Float[Array, "b n"]) -> Float[Array, "b n"]:
    """Each system by Cholesky; NaN where its matrix is singular to working precision."""

    def one(matrix: Float[Array, "n n"], side: Float[Array, " n"]) -> Float[Array, " n"]:
        factor = jnp.linalg.cholesky(matrix)
        pivots = jnp.square(jnp.diagonal(factor))
        tolerance = side.shape[0] * jnp.finfo(side.dtype).eps * jnp.max(jnp.diagonal(matrix))
        step = jax.scipy.linalg.cho_solve((factor, True), side)
        return jnp.where(jnp.min(pivots) > tolerance, step, jnp.nan)

    return jax.vmap(one)(matrices, sides)


def _least_change(h: np.ndarray, wanted: np.ndarray) -> np.ndarray:
    values, vectors = np.linalg.eigh(h)
    live = values > len(values) * np.finfo(h.dtype).eps * max(values[-1], 0.0)
    return vectors[:, live] @ ((vectors[:, live].T @ wanted) / values[live])


def _column_errors(h: np.ndarray, d: np.ndarray) -> np.ndarray:
    return np.sum(d * (h @ d), axis=0)
