"""The k largest, everywhere and exactly: against NumPy's stable sort."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pruneopt import _linalg, _selection

RNG = np.random.default_rng(0)


def by_sorting(parts, count):
    """The same choice by a stable sort of everything."""
    s = np.concatenate([np.asarray(p, np.float64).ravel() for p in parts])
    s = np.where(np.isnan(s), -np.inf, s)
    chosen = np.zeros(s.size, bool)
    chosen[np.argsort(-s, kind="stable")[:count]] = True
    return chosen & (s > -np.inf)


def nasty(size, dtype, ties):
    x = (RNG.integers(-3, 3, size) if ties else RNG.standard_normal(size)).astype(dtype)
    for value in (-np.inf, np.inf, -0.0, 0.0, 1e-41, np.nan):
        x[RNG.random(size) < 0.06] = value
    return x


@pytest.mark.parametrize("dtype", [np.float32, np.float64, jnp.bfloat16, np.float16])
@pytest.mark.parametrize("ties", [True, False])
def test_everywhere(dtype, ties):
    for sizes in ((1,), (7,), (5, 1, 12), (300,)):
        parts = [nasty(n, dtype, ties) for n in sizes]
        for count in {0, 1, sum(sizes) // 2, sum(sizes)}:
            masks = _selection.keep_largest([jnp.asarray(p) for p in parts], count)
            np.testing.assert_array_equal(np.concatenate(masks), by_sorting(parts, count))


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("ties", [True, False])
def test_long_rows_on_the_host_and_traced(dtype, ties, monkeypatch):
    monkeypatch.setattr(_selection, "BLOCK", 64)  # several blocks, and a host path for small arrays
    for sizes in ((500,), (100, 3, 400)):
        parts = [nasty(n, dtype, ties) for n in sizes]
        traced = jax.jit(_selection._keep_largest_of_all)
        for count in {0, 1, 17, sum(sizes) // 2, sum(sizes) - 1, sum(sizes)}:
            expected = by_sorting(parts, count)
            np.testing.assert_array_equal(np.concatenate(_selection._keep_largest_on_host(parts, count)), expected)
            got = traced([jnp.asarray(p) for p in parts], jnp.asarray(count, jnp.uint32))
            np.testing.assert_array_equal(np.concatenate(got), expected)
        inside = jax.jit(lambda p, k=count: _selection.keep_largest(p, k))([jnp.asarray(p) for p in parts])
        np.testing.assert_array_equal(np.concatenate(inside), expected)


def test_a_misleading_sample_costs_time_not_correctness(monkeypatch):
    monkeypatch.setattr(_selection, "_bracket", lambda rows, count, n: (0.9, 0.9))
    x = RNG.random(1000)
    np.testing.assert_array_equal(_selection._keep_largest_on_host([x], 300)[0], by_sorting([x], 300))


@pytest.mark.default_flags
def test_two_million_weights_over_two_leaves():
    parts = [RNG.standard_normal((1000, 1500)).astype(np.float32), RNG.standard_normal(600_000).astype(np.float32)]
    masks = _selection.keep_largest([jnp.asarray(p) for p in parts], 210_000)
    np.testing.assert_array_equal(np.concatenate([np.ravel(m) for m in masks]), by_sorting(parts, 210_000))


def test_blocked_sum_is_the_sum(monkeypatch):
    monkeypatch.setattr(_selection, "BLOCK", 16)
    for n in (1, 15, 16, 17, 100):
        x, y = RNG.standard_normal(n), RNG.standard_normal(n)
        got = _linalg.blocked_sum(lambda a, b: a * b, jnp.asarray(x), jnp.asarray(y))
        assert float(got) == pytest.approx(x @ y, rel=1e-12)
