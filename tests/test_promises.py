"""What solvers promise, judged in float64 by NumPy on the problem as it was stated."""

from dataclasses import replace

import jax.numpy as jnp
import numpy as np
import pytest
from cases import CONSTRAINTS, MATRIX_CONSTRAINTS, MATRIX_PENALTIES, PENALTIES

import pruneopt as po
from pruneopt import solvers as s
from pruneopt.constraints import NM, Cardinality, Intersection, L1Ball, Slices, Support
from pruneopt.curvature import Gram, LowRank
from pruneopt.objectives import Quadratic, Reconstruction

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


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.slow) if "2:4" in name or "inputs" in name else name for name in DEAD]
)
@pytest.mark.slow
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


# ------------------------------------------------------------------------------------------------ baselines


def spectrum(rank, n=16, seed=3):
    """A Gram of that rank, or of full rank and well conditioned, or of falling eigenvalues down to 1e-8."""
    rng = np.random.default_rng(seed)
    if rank == "falling":
        q, _ = np.linalg.qr(rng.standard_normal((n, n)))
        return q * 10.0 ** -np.linspace(0, 8, n) @ q.T
    x = rng.standard_normal((4 * n, rank or n)) @ (rng.standard_normal((rank, n)) if rank else np.eye(n))
    return x.T @ x / len(x)


WIDE = np.random.default_rng(4).standard_normal((16, 4))


def exact_refit(task, support):
    """The least objective on the support, in NumPy, one output after the other."""
    f = task.objective
    h, w0 = np.asarray(f.curvature.matrix, np.float64), np.asarray(f.center, np.float64)
    h = h + f.damping * np.trace(h) / len(h) * np.eye(len(h))
    value = np.zeros_like(w0)
    for j, kept in enumerate(np.asarray(support).T):
        k = np.flatnonzero(kept)
        if k.size:
            value[k, j] = np.linalg.lstsq(h[np.ix_(k, k)], h[k] @ w0[:, j], rcond=1e-12)[0]
    return objective(task, value)


@pytest.mark.parametrize(
    "dtype", [np.float64, pytest.param(np.float32, marks=[pytest.mark.default_flags, pytest.mark.slow])]
)
@pytest.mark.parametrize("rank", [None, "falling", 12, 5])
@pytest.mark.slow
def test_never_worse_than_what_each_solver_promises(rank, dtype):
    for constraint in (Cardinality(sparsity=0.8, per="leaf", floor=0), NM(2, 4)):
        task = problem(spectrum(rank), constraint, WIDE, dtype)
        poor = po.solve(task, s.Score("random"), key=3)
        good = po.solve(task, s.Then(s.ADMM(), s.Polish()))
        zero = objective(task, 0 * WIDE)
        rounding = (1e-9 if dtype == np.float64 else 1e-5) * zero
        for name, solver in LAYER_SOLVERS.items():
            for init in (poor, good):
                found = po.solve(task, solver, init=init)
                value, promised = objective(task, found.value), solver.never_worse_than
                case = (name, constraint, found.stats)
                start, mask = (np.asarray(x, np.float64) for x in (init.value, init.support))
                baselines = {
                    "init": objective(task, start),
                    "mask": objective(task, mask * np.asarray(task.objective.center, np.float64)),
                    "zero": zero,
                }
                for baseline in promised & set(baselines):
                    assert value <= baselines[baseline] + 1e-14 * zero, (*case, baseline)
                if "refit" in promised:
                    assert value <= exact_refit(task, found.support) * (1 + 1e-6) + rounding, case


@pytest.mark.parametrize(
    "dtype", [np.float64, pytest.param(np.float32, marks=[pytest.mark.default_flags, pytest.mark.slow])]
)
@pytest.mark.slow
def test_global_admm_is_never_worse_than_the_refit_of_its_support_or_zero(dtype):
    """Few rows and a small ridge: conjugate gradients end far from the refit, and a large gradient makes zero good."""
    rng = np.random.default_rng(5)
    w0 = {"a": rng.standard_normal((6, 5)), "b": rng.standard_normal((10, 1))}
    rows = rng.standard_normal((8, 40)) * 10.0 ** -np.linspace(0, 3, 40)
    for slope, ridge in ((0.0, 1e-5), (1.0, 1e-3)):
        center = {k: jnp.asarray(v, dtype) for k, v in w0.items()}
        h = LowRank.checked(jnp.asarray(rows, dtype), center, ridge)
        gradient = None if not slope else {k: slope * v for k, v in center.items()}
        task = po.Problem(Quadratic(center, h, gradient), subject_to=Cardinality(sparsity=0.5, floor=1))
        found = po.solve(task, s.GlobalADMM(levels=2, iterations=2, inner=2, refit=3))
        flat = lambda tree: np.concatenate([np.asarray(tree[k], np.float64).ravel() for k in "ab"])  # noqa: E731
        wide = np.asarray(h.gradients, np.float64)
        dense, c = wide.T @ wide / 8 + ridge * np.eye(40), flat(center)
        g = np.zeros(40) if gradient is None else flat(gradient)

        def value(w, dense=dense, c=c, g=g):
            return g @ (w - c) + 0.5 * (w - c) @ dense @ (w - c)

        k, best = np.flatnonzero(flat(found.support)), np.zeros(40)
        best[k] = np.linalg.solve(dense[np.ix_(k, k)], dense[k] @ c - g[k])
        slack = (1e-9 if dtype == np.float64 else 1e-4) * (abs(value(best)) + value(0 * c) - value(best))
        assert value(flat(found.value)) <= value(best) + slack
        assert value(flat(found.value)) <= value(0 * c) + slack


@pytest.mark.slow
def test_a_result_that_is_worse_than_init_is_replaced_and_said():
    task = problem(spectrum(5), Cardinality(sparsity=0.8), WIDE)
    good = po.solve(task, s.Then(s.ADMM(), s.Then(s.Polish(), s.Swap())))
    found = po.solve(task, s.HardThresholding(1), init=good)
    assert found.objective <= good.objective
    poor = s.Then(s.Score("random"), s.Polish())
    assert po.solve(task, poor, init=good).objective > good.objective
    assert "init" not in poor.never_worse_than
    assert s.Then(s.ADMM(), s.Polish()).never_worse_than == {"init", "refit", "zero"}


INFEASIBLE = {
    "weights": (Cardinality(sparsity=0.5), WIDE, "init breaks subject_to=.* by 32 units"),
    "mask": (Support(WIDE > 0), np.ones((16, 4), bool), rf"by {int((WIDE <= 0).sum())} units; pass a feasible one"),
    "floor": (Cardinality(count=20, floor=10), np.zeros((16, 4), bool), "by 10 units"),
    "values": (L1Ball(1.0), WIDE, r"init breaks subject_to=.* by [0-9.]+; pass a feasible one"),
}


@pytest.mark.parametrize("name", INFEASIBLE)
def test_an_infeasible_init_is_refused_with_its_units(name):
    constraint, init, sentence = INFEASIBLE[name]
    solver = s.ProximalGradient() if name == "values" else s.ADMM()
    with pytest.raises(ValueError, match=sentence) as error:
        po.solve(problem(spectrum(None), constraint, WIDE), solver, init=jnp.asarray(init))
    assert "[[" not in str(error.value)
    assert len(str(error.value)) < 300


@pytest.mark.parametrize("rank", [None, "falling", 5, 1])
@pytest.mark.parametrize(
    "dtype", [np.float64, pytest.param(np.float32, marks=[pytest.mark.default_flags, pytest.mark.slow])]
)
@pytest.mark.slow
def test_active_set_is_optimal_exactly_where_the_gap_proves_it(rank, dtype):
    """A Gram of rank 1 that float32 has made indefinite sent it to infinity."""
    h = np.asarray(spectrum(rank), dtype)
    least = np.linalg.eigvalsh(h.astype(np.float64))[0]
    for damping in (0.0, 1e-4):
        f = Reconstruction(jnp.asarray(WIDE, dtype), Gram.checked(jnp.asarray(h)), damping=damping)
        for weight in (1e-8, 1e-3, 0.1):
            task = po.Problem(f, penalty=po.penalties.L1(weight))
            found = po.solve(task, s.ActiveSet())
            value = objective(task, found.value) + weight * float(np.abs(np.asarray(found.value, np.float64)).sum())
            assert found.objective == pytest.approx(value, rel=1e-9 if dtype == np.float64 else 1e-6, abs=1e-15)
            assert value <= objective(task, 0 * WIDE)
            bent = least + damping * np.trace(h) / len(h) < -1e-12
            assert (found.stats.get("lift", 0) > 0) == bent
            if bent:
                assert found.status is po.Status.FEASIBLE
                assert found.bound == -np.inf
            elif weight > 1e-6 or dtype == np.float64:  # rounding the weights to float32 costs more than 1e-8 of them
                assert found.status is po.Status.OPTIMAL
            best = po.solve(task, s.ProximalGradient(iterations=2000, tolerance=1e-9), throw=False).objective
            assert bent or value <= best * (1 + 1e-6) + 1e-7 * weight


def test_refusals_print_no_arrays():
    """What a sentence may name: every set and every penalty, in one line."""
    named = [row[0] for table in (CONSTRAINTS, MATRIX_CONSTRAINTS, PENALTIES) for row in table.values()]
    named += list(MATRIX_PENALTIES.values())
    for thing in named:
        assert "rray(" not in repr(thing)
        assert "\n" not in repr(thing)
    weighted = po.Problem(problem(spectrum(None), None, WIDE).objective, penalty=po.penalties.L1(0.1, np.ones((16, 4))))
    within = Intersection((Support(WIDE > 0), Slices(-2, Cardinality(count=4))))
    for task in (weighted, problem(spectrum(None), within, WIDE)):
        refusal = s.Swap().refuses(task)
        assert refusal
        assert len(refusal) < 400
        assert "[" not in refusal
