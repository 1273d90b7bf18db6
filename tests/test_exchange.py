"""Exchanges of one output's support, against brute force in float64."""

import itertools

import numpy as np
import pytest

from pruneopt.objectives.exchange import Fit, forward

N, K = 10, 4


def problem(seed, samples):
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(samples, N))
    return x.T @ x / samples + 1e-8 * np.eye(N), rng.normal(size=N), rng.choice(N, K, replace=False)


def error(gram, w0, support):
    """The least error on a support, by its normal equations."""
    b, s = gram @ w0, list(support)
    d = -w0.copy()
    d[s] += np.linalg.solve(gram[np.ix_(s, s)], b[s])
    return d @ gram @ d


def exchanged(support, j, c):
    return [*support[:c], j, *support[c + 1 :]]


@pytest.mark.parametrize("samples", [40, 6])  # 6: a singular Gram but for its ridge
@pytest.mark.parametrize("seed", range(3))
class TestFit:
    def test_gains_are_what_an_exchange_and_its_refit_bring(self, samples, seed):
        gram, w0, support = problem(seed, samples)
        fit = Fit(gram, w0, support)
        gains, before = fit.gains(), error(gram, w0, support)
        for j, c in itertools.product(set(range(N)) - set(support), range(K)):
            assert np.isclose(gains[j, c], before - error(gram, w0, exchanged(support, j, c)), rtol=1e-5, atol=1e-7)

    def test_many_updates_stay_exact(self, samples, seed):
        gram, w0, support = problem(seed, samples)
        fit, rng = Fit(gram, w0, support), np.random.default_rng(seed)
        for _ in range(15):
            j = rng.choice(np.setdiff1d(np.arange(N), fit.support))
            fit.exchange(int(j), int(rng.integers(K)))
        again = Fit(gram, w0, fit.support)
        np.testing.assert_allclose(fit.weights, again.weights, rtol=1e-5, atol=1e-6)
        assert np.isclose(fit.error, error(gram, w0, fit.support), rtol=1e-5, atol=1e-9)

    def test_no_single_exchange_helps_in_the_end(self, samples, seed):
        gram, w0, support = problem(seed, samples)
        fit = Fit(gram, w0, support)
        made, left = fit.improved(np.ones(N, bool), np.zeros(N, int), 100)
        assert made > 0
        assert left == 0.0
        least, kept = error(gram, w0, fit.support), list(fit.support)
        for j, c in itertools.product(set(range(N)) - set(kept), range(K)):
            assert error(gram, w0, exchanged(kept, j, c)) >= least * (1 - 1e-6)

    def test_exchanges_stay_inside_a_run_and_among_free_inputs(self, samples, seed):
        gram, w0, _ = problem(seed, samples)
        runs, free = np.arange(N) // 5, np.arange(N) != 3
        fit = Fit(gram, w0, np.array([0, 4, 5, 9]))
        fit.improved(free, runs, 100)
        assert np.bincount(runs[fit.support]).tolist() == [2, 2]
        assert 3 not in fit.support


def test_stops_at_the_limit_and_says_what_is_left():
    gram, w0, support = problem(0, 40)
    fit = Fit(gram, w0, support)
    assert fit.improved(np.ones(N, bool), np.zeros(N, int), 0) == (
        0,
        fit.gains().max(where=outside(support), initial=0),
    )
    assert sorted(fit.support) == sorted(support)


def outside(support):
    mask = np.ones((N, K), bool)
    mask[support] = False
    return mask


@pytest.mark.parametrize("seed", range(3))
def test_forward_lets_in_what_lowers_the_refitted_error_most(seed):
    gram, w0, _ = problem(seed, 40)
    free, runs, counts = np.arange(N) != 2, np.arange(N) // 5, np.array([3, 1])
    support = []
    for _ in range(4):
        room = counts - np.bincount(runs[support], minlength=2) if support else counts
        choice = [j for j in range(N) if free[j] and j not in support and room[runs[j]] > 0]
        support.append(min(choice, key=lambda j: error(gram, w0, [*support, j])))
    assert forward(gram, w0, free, runs, counts).tolist() == support


def test_inputs_that_are_noise_or_copies_gain_nothing():
    """The second input is noise whose row is not semidefinite to rounding; the third copies the first."""
    gram = np.diag([1.0, 1e-310, 1.0, 0.25])
    gram[0, 2] = gram[2, 0] = 1.0
    gram[3, 1] = gram[1, 3] = 1e-100
    free, runs = np.ones(4, bool), np.zeros(4, int)
    assert forward(gram, np.ones(4), free, runs, np.array([2])).tolist() == [0, 3]


def test_an_exchange_that_rounding_spoils_is_taken_back(monkeypatch):
    gram, w0, support = problem(0, 40)
    fit, free, runs = Fit(gram, w0, support), np.ones(N, bool), np.zeros(N, int)

    def spoiled():
        raise np.linalg.LinAlgError("singular to rounding")

    monkeypatch.setattr(fit, "_refit", spoiled)
    before = fit.support.copy(), fit.error, fit.gains().copy()
    assert fit.improved(free, runs, 5) == (0, 0.0)
    for then, now in zip(before, (fit.support, fit.error, fit.gains()), strict=True):
        np.testing.assert_array_equal(then, now)
