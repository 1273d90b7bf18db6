"""The exact exchange of one weight, against brute force."""

import itertools

import jax.numpy as jnp
import numpy as np
import pytest

import pruneopt as po
from pruneopt.bounds import largest_gain
from pruneopt.constraints import NM, Blocks, ByPath, Cardinality, Intersection, Support
from pruneopt.curvature import Gram, Identity
from pruneopt.objectives import Quadratic, Reconstruction
from pruneopt.penalties import L1
from pruneopt.solvers import ADMM, Polish, Score, Swap, Then

N, M = 8, 3
RNG = np.random.default_rng(11)
X = RNG.standard_normal((40, N)) @ RNG.standard_normal((N, N))
H, W0 = X.T @ X / len(X), RNG.standard_normal((N, M))
MASK = RNG.random((N, M)) < 0.8


def problem(constraint, h=H, w=W0, dtype=np.float64):
    return po.Problem(Reconstruction(jnp.asarray(w, dtype), Gram.checked(jnp.asarray(h, dtype))), subject_to=constraint)


def error(mask, j):
    """1/2 d^T H d of output j, its kept weights by least squares."""
    s, d = np.flatnonzero(mask), np.where(mask, 0, -W0[:, j])
    d[s] = -np.linalg.lstsq(H[np.ix_(s, s)], (H @ d)[s], rcond=None)[0] if len(s) else 0
    return 0.5 * d @ H @ d


def best_exchange(support, fits):
    """The largest fall of an output's error by an exchange that `fits`, and of its share, by trying them all."""
    support, gains = np.asarray(support), [(0.0, 0.0)]
    for j in range(M):
        mask = support[:, j]
        for i, k in itertools.product(np.flatnonzero(mask), np.flatnonzero(~mask)):
            if fits(i, k, j):
                other = mask.copy()
                other[i], other[k] = False, True
                gain = error(mask, j) - error(other, j)
                gains.append((gain, gain / error(mask, j)))
    return np.max(gains, axis=0)


CONSTRAINTS = {
    "layer": (Cardinality(sparsity=0.5), lambda i, k, j: True),
    "output": (Cardinality(sparsity=0.5, per="out"), lambda i, k, j: True),
    "2:4": (NM(2, 4), lambda i, k, j: i // 4 == k // 4),
    "runs of 4 inputs": (Cardinality(sparsity=0.5, per="in", span=4), lambda i, k, j: i // 4 == k // 4),
    "2:4 within a mask": (
        Intersection((Support(jnp.asarray(MASK)), NM(2, 4))),
        lambda i, k, j: i // 4 == k // 4 and MASK[k, j],
    ),
}


@pytest.mark.parametrize("name", CONSTRAINTS)
def test_the_end_is_optimal_against_every_exchange(name):
    constraint, fits = CONSTRAINTS[name]
    task = problem(constraint)
    start = po.solve(task, Then(Score(), Polish()))
    gain, share = best_exchange(start.support, fits)
    assert gain > 0
    assert largest_gain(task, start.support) == pytest.approx(share, rel=1e-5)
    assert "largest_gain" not in start.stats
    assert po.certify(task, start).largest_gain is None
    assert po.certify(task, start, exchange=True).largest_gain == largest_gain(task, start.support)
    found = po.solve(task, Swap(), init=start)
    assert found.status is po.Status.FEASIBLE
    assert found.stats["swaps"] > 0
    assert found.objective < start.objective
    assert best_exchange(found.support, fits)[0] <= 1e-7 * found.objective
    assert largest_gain(task, found.support) == found.stats["largest_gain"] == 0
    assert found.objective == pytest.approx(sum(error(np.asarray(found.support)[:, j], j) for j in range(M)), rel=1e-9)


def test_one_swap_is_the_best_one():
    task = problem(Cardinality(count=4, per="out"))
    start = po.solve(task, Then(Score(), Polish()))
    once = po.solve(task, Swap(steps=1), init=start)
    for j in range(M):
        mask = np.asarray(start.support)[:, j]
        options = [error(mask, j)]
        for i, k in itertools.product(np.flatnonzero(mask), np.flatnonzero(~mask)):
            other = mask.copy()
            other[i], other[k] = False, True
            options.append(error(other, j))
        assert error(np.asarray(once.support)[:, j], j) == pytest.approx(min(options), rel=1e-7)
    assert (once.status is po.Status.LIMIT) == (once.stats["largest_gain"] > 0)


def test_never_worse_than_the_refit_of_its_init():
    task = problem(Cardinality(sparsity=0.5))
    good = po.solve(task, Then(ADMM(levels=8, iterations=20), Swap()))
    again = po.solve(task, Swap(), init=good)
    assert again.objective <= good.objective * (1 + 1e-12)
    assert largest_gain(task, good.support, outputs=1) == 0


DEGENERATE = {
    "no input": (0 * H, W0, Cardinality(sparsity=0.5)),
    "no weight": (H, 0 * W0, Cardinality(sparsity=0.5)),
    "one output": (H, W0[:, :1], Cardinality(count=3)),
    "nothing kept": (H, W0, Cardinality(count=0, floor=0)),
    "everything kept": (H, W0, Cardinality(sparsity=0.0)),
    "duplicated inputs": (np.repeat(np.repeat(H[:4, :4], 2, 0), 2, 1), W0, Cardinality(sparsity=0.5)),
    "dead inputs": (H * np.outer(np.arange(N) > 1, np.arange(N) > 1), W0, Cardinality(sparsity=0.5)),
}


@pytest.mark.default_flags
@pytest.mark.parametrize("name", DEGENERATE)
@pytest.mark.slow
def test_degenerate_layers(name):
    h, w, constraint = DEGENERATE[name]
    task = problem(constraint, h, w, np.float32)
    start = po.solve(task, Then(Score(), Polish()))
    found = po.solve(task, Swap(), init=start)
    assert np.isfinite(np.asarray(found.value)).all()
    assert found.objective <= start.objective * (1 + 1e-5) + 1e-12


def test_bad_input():
    with pytest.raises(ValueError, match="init is None, but Swap"):
        po.solve(problem(Cardinality(sparsity=0.5)), Swap())
    with pytest.raises(ValueError, match="inside an output"):
        largest_gain(problem(Blocks((2, 1), Cardinality(sparsity=0.5))), W0 > 0)
    far = Quadratic(jnp.asarray(W0), Identity())
    for task, words in (
        (po.Problem(far, subject_to=Cardinality(count=3)), "needs a Reconstruction without a penalty, not Quadratic"),
        (po.Problem(problem(None).objective, penalty=L1(0.1)), r"without a penalty, not L1\(weight=0.1"),
        (problem(ByPath({"*": Cardinality(count=3)})), "largest_gain exchanges weights inside an output"),
    ):
        with pytest.raises(ValueError, match=words):
            largest_gain(task, W0 > 0)
    with pytest.raises(ValueError, match="steps=0"):
        Swap(0)
    with pytest.raises(ValueError, match="damping=-1"):
        Swap(damping=-1)
    fixed = problem(Support(jnp.asarray(MASK)))
    assert po.solve(fixed, Swap()).objective == pytest.approx(po.solve(fixed, Polish()).objective, rel=1e-9)
