"""What solvers promise, judged in float64 by NumPy on the problem as it was stated."""

from dataclasses import replace

import jax.numpy as jnp
import numpy as np
import pytest

import pruneopt as po
from pruneopt import solvers as s
from pruneopt.constraints import NM, Cardinality, Intersection, Slices, Support
from pruneopt.curvature import Gram
from pruneopt.objectives import Reconstruction

N, M = 8, 3
RNG = np.random.default_rng(17)
W0 = RNG.standard_normal((N, M))

LAYER_SOLVERS = {
    "fast": s.FAST,
    "best": s.BEST,
    "bfloat16": replace(s.BEST, products="bfloat16"),
    "alps": s.ALPS(),
    "block obs": s.BlockOBS(block=4),
    "thanos": s.Thanos(block=4),
    "greedy obs": s.GreedyOBS(),
    "hard thresholding": s.HardThresholding(),
    "frank-wolfe": s.FrankWolfe(20),
    "sparse swaps": s.SparseSwaps(),
    "swap": s.Swap(),
    "conjugate gradients": s.ConjugateGradients(),
    "polish": s.Polish(),
}


def problem(h, constraint, w=W0, dtype=np.float64, damping=0.0):
    f = Reconstruction(jnp.asarray(w, dtype), Gram.checked(jnp.asarray(h, dtype)), damping=damping)
    return po.Problem(f, subject_to=constraint)


def objective(task, value):
    """1/2 tr(D^T (H + lambda I) D), in NumPy."""
    f = task.objective
    h, d = np.asarray(f.curvature.matrix, np.float64), np.asarray(value, np.float64) - np.asarray(f.center, np.float64)
    return 0.5 * float(np.vdot(d, h @ d) + f.damping * np.trace(h) / len(h) * np.vdot(d, d))


# ------------------------------------------------------------------------------------------------ dead inputs


ONE_LIVE = np.zeros((N, N))
ONE_LIVE[0, 0] = 1.0
THREE_DEAD = np.diag(np.where(np.arange(N) < 5, 1.0 + np.arange(N), 0.0))
ONLY_DEAD = np.repeat((np.arange(N) >= 5)[:, None], M, axis=1)
DEAD = {
    "a floor above what else may live": (ONE_LIVE, Cardinality(count=10, floor=7), 0.0),
    "a floor within a mask": (
        THREE_DEAD,
        Intersection((Support(ONLY_DEAD | (np.arange(N) == 0)[:, None]), Cardinality(count=8, floor=6))),
        0.0,
    ),
    "a mask that lets nothing else live": (THREE_DEAD, Support(ONLY_DEAD), 0.0),
    "damped, nothing to prune": (THREE_DEAD, Cardinality(sparsity=0.0), 0.01),
    "damped, half to prune": (THREE_DEAD, Cardinality(sparsity=0.5), 0.01),
    "damped, 2:4": (THREE_DEAD, NM(2, 4), 0.01),
    "plain": (THREE_DEAD, Cardinality(sparsity=0.5), 0.0),
    "plain, 2:4": (THREE_DEAD, NM(2, 4), 0.0),
    "plain, inputs": (THREE_DEAD, Slices(-2, Cardinality(count=4)), 0.0),
}


@pytest.mark.parametrize("name", DEAD)
def test_dead_inputs_are_free_only_where_the_problem_as_stated_says_so(name):
    h, constraint, damping = DEAD[name]
    task = problem(h, constraint, damping=damping)
    start = po.solve(task, s.Score())
    for solver_name, solver in LAYER_SOLVERS.items():
        if solver.refuses(task):
            continue
        found = po.solve(task, solver, init=start)
        assert found.status.is_usable
        assert constraint.violation(found.support) == 0
        assert found.objective == pytest.approx(objective(task, found.value), rel=1e-12)
        if solver_name not in ("alps", "block obs", "thanos") or not ("half" in name or "plain" in name):
            # H is diagonal: the best support by saliency is the optimum.
            assert found.objective <= start.objective * (1 + 1e-9) + 1e-24, solver_name
        if name.startswith("plain"):
            live = np.where(np.arange(N)[:, None] < 5, np.zeros((N, M)), -np.inf)
            assert np.asarray(found.support)[:5].sum() == np.asarray(constraint.select(jnp.asarray(live))).sum()


def test_dead_inputs_cost_no_budget_where_they_are_free():
    task = problem(THREE_DEAD, Cardinality(count=15, floor=0))
    for solver_name in ("fast", "alps", "block obs", "thanos", "greedy obs", "hard thresholding"):
        found = po.solve(task, LAYER_SOLVERS[solver_name])
        assert found.objective == pytest.approx(0, abs=1e-20), solver_name
        assert not np.asarray(found.support)[5:].any(), solver_name
