"""ALPS, OBC, hard thresholding, Frank-Wolfe, SparseSwaps: published solvers, against brute force and peers."""

import itertools

import jax.numpy as jnp
import numpy as np
import pytest

import pruneopt as po
from pruneopt.constraints import NM, Blocks, Cardinality, Intersection, Support
from pruneopt.curvature import Gram
from pruneopt.objectives import Reconstruction
from pruneopt.solvers import ALPS, FrankWolfe, GreedyOBS, HardThresholding, Polish, Score, SparseSwaps

N, M = 8, 3
RNG = np.random.default_rng(7)
X = RNG.standard_normal((40, N)) @ RNG.standard_normal((N, N))
H, W0 = X.T @ X / len(X), RNG.standard_normal((N, M))
ROWS = [ALPS(), GreedyOBS(), HardThresholding(), FrankWolfe(), SparseSwaps()]


def problem(constraint, h=H, w=W0, dtype=np.float64):
    return po.Problem(Reconstruction(jnp.asarray(w, dtype), Gram.checked(jnp.asarray(h, dtype))), subject_to=constraint)


def mask_error(mask, h=H, w=W0):
    q = np.where(mask, 0, w)
    return 0.5 * np.sum(q * (h @ q))


def refit_error(mask, h=H, w=W0):
    total = 0.0
    for j in range(w.shape[1]):
        s = np.flatnonzero(mask[:, j])
        d = np.where(mask[:, j], 0, -w[:, j])
        d[s] = -np.linalg.lstsq(h[np.ix_(s, s)], (h @ d)[s], rcond=None)[0] if len(s) else 0
        total += 0.5 * d @ h @ d
    return total


# ---------------------------------------------------------------------------------------------------- greedy OBS


def removals_by_hand(h, w, allowed=lambda alive, p: True):
    """Remove the weight whose removal, all others refitted, costs the least, one after the other."""
    alive, order, losses = np.ones(len(w), bool), [], []
    while True:
        options = []
        for p in np.flatnonzero(alive):
            if allowed(alive, p):
                mask = alive.copy()
                mask[p] = False
                options.append((refit_error(mask[:, None], h, w[:, None]), p))
        if not options:
            return order, losses
        loss, p = min(options)
        losses.append(loss - sum(losses))
        order.append(p)
        alive[p] = False


def test_the_trace_is_greedy_removal_with_refits():
    trace = GreedyOBS().trace(problem(Cardinality(sparsity=0.5)))
    for j in range(M):
        order, losses = removals_by_hand(H, W0[:, j])
        np.testing.assert_array_equal(trace.order[:, j], order)
        ratio = trace.losses[:, j] / np.asarray(losses)
        np.testing.assert_allclose(ratio, 0.25, rtol=1e-4)  # in the units of the prepared layer


@pytest.mark.parametrize("count", [4, 12, 20])
def test_one_trace_serves_every_budget(count):
    task = problem(Cardinality(count=count))
    found = po.solve(task, GreedyOBS())
    assert found.kept == count
    assert found.objective == pytest.approx(refit_error(np.asarray(found.support)), rel=1e-9)
    # The merge of the paper: the next removal is the cheapest next removal of any output.
    traces, next_at = [removals_by_hand(H, W0[:, j]) for j in range(M)], [0] * M
    mask = np.ones((N, M), bool)
    for _ in range(N * M - count):
        j = min((j for j in range(M) if next_at[j] < N), key=lambda j: traces[j][1][next_at[j]])
        mask[traces[j][0][next_at[j]], j] = False
        next_at[j] += 1
    np.testing.assert_array_equal(found.support, mask)


def test_greedy_under_two_of_four():
    found = po.solve(problem(NM(2, 4)), GreedyOBS())
    for j in range(M):
        order, _ = removals_by_hand(H, W0[:, j], lambda alive, p: alive[p // 4 * 4 : p // 4 * 4 + 4].sum() > 2)
        np.testing.assert_array_equal(np.flatnonzero(~np.asarray(found.support)[:, j]), sorted(order))
    mask = RNG.random((N, M)) < 0.8
    both = po.solve(problem(Intersection((Support(jnp.asarray(mask)), NM(2, 4)))), GreedyOBS())
    assert not np.any(np.asarray(both.support) & ~mask)


# ---------------------------------------------------------------------------------------------------- masks alone


def masks_of(count):
    for kept in itertools.combinations(range(N), count):
        mask = np.zeros(N, bool)
        mask[list(kept)] = True
        yield mask


def test_frank_wolfe_bounds_the_best_mask():
    best = sum(min(mask_error(m[:, None], H, W0[:, j : j + 1]) for m in masks_of(4)) for j in range(M))
    task = problem(Cardinality(count=4, per="out"))
    found = po.solve(task, FrankWolfe(300))
    assert found.objective == pytest.approx(mask_error(np.asarray(found.support)), rel=1e-9)
    bound = found.objective * (1 - found.stats["mask_gap"])
    assert 0.3 * best < bound <= best * (1 + 1e-9)
    assert best * (1 - 1e-9) <= found.objective <= po.solve(task, Score()).objective
    np.testing.assert_array_equal(found.value, np.where(found.support, W0, 0))


@pytest.mark.slow
def test_sparse_swaps_end_where_no_exchange_helps():
    task = problem(Cardinality(sparsity=0.5))
    start = po.solve(task, Score())
    for found in (po.solve(task, SparseSwaps()), po.solve(task, SparseSwaps(), init=start)):
        mask = np.asarray(found.support)
        np.testing.assert_array_equal(mask.sum(0), np.asarray(start.support).sum(0))
        assert found.objective < start.objective
        for j in range(M):
            for p, q in itertools.product(np.flatnonzero(mask[:, j]), np.flatnonzero(~mask[:, j])):
                other = mask.copy()
                other[p, j], other[q, j] = False, True
                assert mask_error(other) >= mask_error(mask) * (1 - 1e-9)
    worst = jnp.asarray(~np.asarray(start.support))
    assert po.solve(task, SparseSwaps(1), init=worst).status is po.Status.LIMIT
    assert po.solve(task, SparseSwaps(), init=worst).status is po.Status.FEASIBLE
    grouped = np.asarray(po.solve(problem(NM(2, 4)), SparseSwaps()).support)
    assert (grouped.reshape(2, 4, M).sum(1) == 2).all()


# ---------------------------------------------------------------------------------------------------- the others


def test_hard_thresholding_never_rises_and_ends_at_a_fixed_point():
    task = problem(Cardinality(sparsity=0.5))
    start = po.solve(task, Score())
    objectives = [po.solve(task, HardThresholding(k), init=start).objective for k in (1, 2, 4, 8, 100)]
    assert start.objective > objectives[0]
    assert objectives == sorted(objectives, reverse=True)
    end = po.solve(task, HardThresholding(10000), init=start)
    assert end.status is po.Status.FEASIBLE
    assert end.objective <= 1.2 * po.solve(task, Polish(), init=end).objective
    whole = po.solve(problem(Cardinality(sparsity=0.0)), HardThresholding())
    np.testing.assert_allclose(whole.value, W0)


def test_alps_ends_near_the_best_support():
    each = [(H, W0[:, j : j + 1]) for j in range(M)]
    best = sum(min(refit_error(mask[:, None], *one) for mask in masks_of(4)) for one in each)
    task = problem(Cardinality(count=4, per="out"))
    found = po.solve(task, ALPS(damping=1e-6))
    assert best * (1 - 1e-9) <= found.objective <= 1.5 * best
    assert found.objective == pytest.approx(po.solve(task, Polish(), init=found).objective, rel=1e-3)
    assert found.stats["iterations"] < 300
    assert po.solve(task, ALPS(iterations=3)).status is po.Status.LIMIT


DEGENERATE = {
    "no input": (0 * H, W0, Cardinality(sparsity=0.5)),
    "no weight": (H, 0 * W0, Cardinality(sparsity=0.5)),
    "one input": (H[:1, :1], W0[:1], Cardinality(count=2)),
    "one output": (H, W0[:, :1], Cardinality(count=3)),
    "nothing kept": (H, W0, Cardinality(count=0, floor=0)),
    "duplicated inputs": (np.repeat(np.repeat(H[:4, :4], 2, 0), 2, 1), W0, Cardinality(sparsity=0.5)),
    "dead inputs": (H * np.outer(np.arange(N) > 1, np.arange(N) > 1), W0, Cardinality(sparsity=0.5)),
}


@pytest.mark.parametrize("solver", ROWS, ids=lambda s: type(s).__name__)
@pytest.mark.slow
@pytest.mark.default_flags
def test_degenerate_layers(solver):
    for name, (h, w, constraint) in DEGENERATE.items():
        found = po.solve(problem(constraint, h, w, np.float32), solver)
        assert np.isfinite(np.asarray(found.value)).all(), name
        if name == "dead inputs":
            assert not np.asarray(found.support)[:2].any()


@pytest.mark.parametrize(
    ("solver", "constraint", "message"),
    [
        (SparseSwaps(), Blocks((2, 1), Cardinality(sparsity=0.5)), "inside an output"),
        (SparseSwaps(), NM(1, 3, axis="out"), "inside an output"),
        (GreedyOBS(), Cardinality(count=1, per="in"), "cannot prune under"),
        (FrankWolfe(), Intersection((Cardinality(sparsity=0.3), NM(2, 4))), "exact selection"),
    ],
)
def test_constraints_that_do_not_fit(solver, constraint, message):
    with pytest.raises(ValueError, match=message):
        po.solve(problem(constraint), solver)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: ALPS(rho=0), "rho=0"),
        (lambda: ALPS(damping=float("nan")), "damping=nan"),
        (lambda: ALPS(update=0), "update=0"),
        (lambda: HardThresholding(0), "iterations=0"),
        (lambda: FrankWolfe(1.5), r"iterations=1\.5"),
        (lambda: SparseSwaps(0), "swaps=0"),
        (lambda: GreedyOBS(damping=-1), "damping=-1"),
        (lambda: GreedyOBS(memory=0), "memory=0"),
    ],
)
def test_bad_knobs(make, message):
    with pytest.raises(ValueError, match=message):
        make()


# Relative errors of the peers' own code on the real layers, three or four digits.
@pytest.mark.default_flags
@pytest.mark.usefixtures("optimised")
@pytest.mark.parametrize(
    ("layer", "spec", "solver", "expected"),
    [
        ("resnet20_l3_conv", 0.7, ALPS(), 2.855e-02),
        pytest.param("mlpnet_fc1", "2:4", ALPS(), 1.221e-03, marks=pytest.mark.slow),
        pytest.param("resnet20_l3_conv", "2:4", GreedyOBS(), 1.920e-02, marks=pytest.mark.slow),
        pytest.param("resnet20_l3_conv", 0.9, GreedyOBS(), 1.225e-01, marks=pytest.mark.slow),
    ],
)
@pytest.mark.slow
def test_errors_are_the_peers(folder, layer, spec, solver, expected):
    with np.load(folder / "layers" / f"{layer}.npz", allow_pickle=False) as archive:
        h, w0 = archive["H"] / archive["n_samples"].astype(np.float32), archive["W0"].T
    task = problem(NM(2, 4) if spec == "2:4" else Cardinality(sparsity=spec), h, w0, np.float32)
    assert po.solve(task, solver).stats["relative_error"] == pytest.approx(expected, rel=0.01)
