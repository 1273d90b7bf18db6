"""Every weight's own Optimal Brain Surgeon removal, ranked by its cost, and added up: WoodFisher and M-FAC."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from pruneopt import _tree
from pruneopt.objectives.base import QuadraticObjective
from pruneopt.problem import Problem
from pruneopt.solvers.base import Outcome, Solver, Start, without_penalty

Tree = Any


@dataclass(frozen=True)
class SummedOBS(Solver):
    """Keep what the constraint selects for w_i^2 / (2 C_ii), C = (H + lambda I)^-1, and move by all removals at once:

        d = - sum over the weights q that go of C_:q w_q / C_qq = -C u,  u_q = w_q / C_qq,

    then set what goes to zero. Each term is the exact answer to one removal; their interactions are left out, which is
    what distinguishes this from `OBS` and from a refit (`Polish`).

    Needs a curvature with `inverse_diagonal` and `solve`: a low-rank one with a ridge or damping (M-FAC: one product of
    the gradients with themselves, a Cholesky factor and a triangular solve), or blocks (WoodFisher). The gradient of
    the objective is refused: w0 is taken for a minimum. `init` is not used.
    Source: Singh and Alistarh 2020 (WoodFisher), equations 7 and 8; Frantar et al. 2021 (M-FAC), section 3.
    """

    def refuses(self, problem: Problem) -> str | None:
        """Another objective or curvature, a singular one, a gradient, no constraint, a penalty."""
        f = problem.objective
        if not isinstance(f, QuadraticObjective) or not hasattr(f.curvature, "inverse_diagonal"):
            return (
                "SummedOBS needs a Quadratic whose curvature has an inverse diagonal, such as empirical_fisher(...), "
                f"not {type(getattr(f, 'curvature', f)).__name__}"
            )
        if f.gradient is not None:
            return "SummedOBS takes the trained weights for a minimum; drop gradient=, or use GlobalADMM or OBS"
        if problem.subject_to is None:
            return "SummedOBS needs a constraint; pass subject_to="
        if getattr(f.curvature, "ridge", 0.0) + f.damping == 0:
            return "SummedOBS needs an invertible curvature; pass Quadratic(damping=0.01) or a ridge to the curvature"
        return without_penalty(problem, self)

    def run(self, problem: Problem, init: Start | None, key: jax.Array) -> Outcome:
        """Rank, select, move."""
        f: Any = problem.objective
        assert problem.subject_to is not None
        ridge = f.exact_ridge()
        inverse = f.curvature.inverse_diagonal(ridge)
        dtype = max((_tree.wide(x.dtype) for x in jax.tree.leaves(f.center)), key=lambda d: d.itemsize)
        single = jax.tree.map(lambda w, c: np.asarray(w, np.float64) / c, f.center, inverse)
        costs = jax.tree.map(lambda w, u: jnp.asarray(0.5 * np.asarray(w, np.float64) * u, dtype), f.center, single)
        support = problem.subject_to.select(costs)
        going = jax.tree.map(lambda u, m: np.where(np.asarray(m), 0.0, u), single, support)
        change = f.curvature.solve(going, ridge)
        moved = jax.tree.map(lambda w, d: (np.asarray(w, np.float64) - np.asarray(d)).astype(w.dtype), f.center, change)
        return Outcome(_tree.masked(jax.tree.map(jnp.asarray, moved), support), support)
