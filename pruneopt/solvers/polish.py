"""Polish: the exact best weights on a fixed support."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float

from pruneopt import _linalg, _tree
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
    assert f.curvature is not None and f.gradient is not None
    diagonal, ridge = f.curvature.diagonal(f.center), f.ridge()
    return jax.tree.map(lambda w, g, h: w - g / (h + ridge), f.center, f.gradient, diagonal)


def _refit_gram(
    gram: Float[Array, "n n"],
    center: Float[Array, "n m"],
    support: Bool[Array, "n m"],
    ridge: float,
    block_bytes: int,
) -> tuple[Float[Array, "n m"], int]:
    """The refit of every column, and how many columns were singular."""
    mask = np.asarray(support)
    n, m = mask.shape
    sizes = mask.sum(axis=0)
    order = np.argsort(sizes, kind="stable")  # columns of like size share a padded block
    w0 = np.asarray(center, np.float64)
    out = np.where(mask, w0, 0.0)
    singular = 0
    with jax.enable_x64(True):
        h = jnp.asarray(gram, jnp.float64) + ridge * jnp.eye(n)
        done = 0
        while done < m:
            largest = sizes[order[min(m, done + 1) - 1]]
            if largest == 0:
                done += 1
                continue
            width = _padded(int(sizes[order[-1]]), n) if done == 0 else width
            batch = max(1, min(m, block_bytes // (8 * width * width)))
            columns = order[done : done + batch]
            done += batch
            index = np.full((batch, width), n, np.int64)  # n marks padding
            for row, column in enumerate(columns):
                index[row, : sizes[column]] = np.flatnonzero(mask[:, column])
            cut = np.zeros((batch, n))
            cut[: len(columns)] = np.where(mask, 0.0, w0).T[columns]
            change, failed = map(np.asarray, _refit_columns(h, jnp.asarray(index), jnp.asarray(cut)))
            for row, column in enumerate(columns):
                keep = index[row, : sizes[column]]
                step = change[row, : sizes[column]]
                if failed[row]:
                    singular += 1
                    step = _least_change(np.asarray(h)[np.ix_(keep, keep)], np.asarray(h)[keep] @ cut[row])
                out[keep, column] += step
    return jnp.asarray(out, center.dtype), singular
