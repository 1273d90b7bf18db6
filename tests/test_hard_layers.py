"""BALANCED and BEST where splitting methods go astray: a singular Gram, few weights kept, planted regressions."""

import jax.numpy as jnp
import numpy as np
import pytest
from sklearn.linear_model import OrthogonalMatchingPursuit

import pruneopt as po
from pruneopt import constraints as c
from pruneopt.solvers import BALANCED, BEST, GreedyOBS, Swap, Then

KINDS = {  # inputs, rows of data, weights kept in each output
    "singular": (48, 24, 12),
    "few kept": (64, 256, 3),
    "both": (64, 40, 4),
}


def layer(seed, n, rows, outputs=2):
    """(H, W0) of correlated inputs."""
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(rows, n)) @ (np.eye(n) + 0.5 * rng.normal(size=(n, n)) / np.sqrt(n))
    return x.T @ x / rows, rng.normal(size=(n, outputs))


def solved(solver, h, w0, count):
    objective = po.objectives.Reconstruction(jnp.asarray(w0), po.curvature.Gram.checked(jnp.asarray(h)))
    problem = po.Problem(objective, subject_to=c.Cardinality(sparsity=1 - count / len(w0), per="out"))
    return problem, po.solve(problem, solver)


def best_exchange(h, w0, kept):
    """(error, least error after any one exchange) of an output by least squares, on every exchange."""

    def error(support):
        d = -w0.copy()
        d[support] += np.linalg.lstsq(h[np.ix_(support, support)], (h @ w0)[support], rcond=1e-13)[0]
        return float(d @ h @ d)

    inside, outside = np.flatnonzero(kept), np.flatnonzero(~kept)
    return error(inside), min(error([j, *inside[inside != i]]) for i in inside for j in outside)


@pytest.mark.parametrize("solver", [BALANCED, BEST], ids=["balanced", "best"])
@pytest.mark.parametrize("kind", KINDS)
class TestNoExchangeHelps:
    @pytest.mark.slow
    def test_by_brute_force(self, kind, solver):
        n, rows, count = KINDS[kind]
        h, w0 = layer(0, n, rows)
        _, found = solved(solver, h, w0, count)
        for kept, column in zip(np.asarray(found.support).T, w0.T, strict=True):
            assert kept.sum() == count
            now, then = best_exchange(h, column, kept)
            assert then >= now * (1 - 1e-6)

    @pytest.mark.slow
    def test_by_certify(self, kind, solver):
        n, rows, count = KINDS[kind]
        for seed in range(20):
            problem, found = solved(solver, *layer(seed, n, rows), count)
            assert po.certify(problem, found, exchange=True).largest_gain <= 1e-9, seed


def planted(seed):
    """(x, y, count) of a regression on correlated inputs; few sizes, since each is compiled."""
    rng = np.random.default_rng([10, seed])
    p, count = (60, 150, 400, 1000)[seed % 4], int(rng.integers(5, 41))
    x = rng.normal(size=(500, p))
    for j in range(1, p):  # neighbours correlate by 0.7
        x[:, j] = 0.7 * x[:, j - 1] + np.sqrt(1 - 0.7**2) * x[:, j]
    beta = np.zeros(p)
    beta[rng.choice(p, count, replace=False)] = rng.choice([-1, 1], count) * rng.uniform(0.5, 2, count)
    y = x @ beta
    return x, y + rng.normal(size=500) * y.std() / 2, count


def residual(x, y, support):
    """|y - x w|^2 of least squares on a support."""
    return float(np.linalg.lstsq(x[:, support], y, rcond=None)[1][0])


@pytest.mark.slow
def test_best_subsets_of_planted_regressions(optimised):
    """Each is a layer of one output: W0 the least-norm fit of y, which reconstructing differs from by a constant."""
    for seed in range(20):
        x, y, count = planted(seed)
        w0 = np.linalg.lstsq(x, y, rcond=None)[0][:, None]
        ours, swapped = (
            residual(x, y, np.flatnonzero(solved(solver, x.T @ x / len(x), w0, count)[1].support))
            for solver in (BEST, Then(GreedyOBS(), Swap()))
        )
        pursuit = residual(x, y, OrthogonalMatchingPursuit(n_nonzero_coefs=count).fit(x, y).coef_.nonzero()[0])
        assert ours <= min(swapped, pursuit) * (1 + 1e-9), seed
