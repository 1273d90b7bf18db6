"""Curvature against plain autodiff on the dense matrix, and against other cuts of the data."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import tiny_batches, tiny_loss, tree
from jax.flatten_util import ravel_pytree

from pruneopt.curvature import Gram, empirical_fisher_diagonal, hessian_vector_product, hutchinson_diagonal
from pruneopt.network import calls, leaves

CUTS = [(10,), (4, 4, 2), (1,) * 10]
BOTH = ["a", "b"]


def whole():
    return tiny_batches((10,))[0]


def dense_hessian(params):
    flat, unravel = ravel_pytree(params)
    return np.asarray(jax.hessian(lambda w: tiny_loss(unravel(w), whole()))(flat))


def test_hessian_vector_product_is_the_dense_product():
    params, direction = tree(1), tree(2)
    product = hessian_vector_product(lambda w: tiny_loss(w, whole()), params, direction)
    expected = dense_hessian(params) @ np.asarray(ravel_pytree(direction)[0])
    np.testing.assert_allclose(ravel_pytree(product)[0], expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("sizes", CUTS)
def test_fisher_diagonal_is_the_mean_square_of_single_gradients(sizes):
    params = tree(1)
    x, y = whole()
    single = [jax.grad(tiny_loss)(params, (x[i : i + 1], y[i : i + 1])) for i in range(10)]
    expected = jax.tree.map(lambda *g: sum(jnp.square(v) for v in g) / 10, *single)
    got = empirical_fisher_diagonal(tiny_loss, params, tiny_batches(sizes), BOTH).values
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-12), got, expected)


def test_fisher_diagonal_in_chunks_is_the_same(monkeypatch):
    from pruneopt.curvature import fisher

    params = tree(1)
    expected = empirical_fisher_diagonal(tiny_loss, params, tiny_batches(), BOTH).values
    monkeypatch.setattr(fisher, "_CHUNK_BYTES", 4 * 12 * 3)  # three examples at a time
    got = empirical_fisher_diagonal(tiny_loss, params, tiny_batches(), BOTH).values
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-12), got, expected)


def test_hutchinson_converges_to_the_dense_diagonal_within_its_standard_error():
    params = tree(1)
    dense = dense_hessian(params)
    probes = 4000
    got = hutchinson_diagonal(tiny_loss, params, tiny_batches(), BOTH, probes=probes).values
    off = dense - np.diag(np.diag(dense))
    standard_error = np.sqrt((off**2).sum(1) / probes)
    assert np.all(np.abs(np.asarray(ravel_pytree(got)[0]) - np.diag(dense)) < 4.5 * standard_error + 1e-12)


def test_hutchinson_is_exact_for_a_diagonal_hessian_and_needs_one_probe():
    scale = tree(3)

    def separable(w, batch):
        return sum(jnp.sum(s**2 * w[k] ** 4) for k, s in scale.items())

    got = hutchinson_diagonal(separable, tree(1), tiny_batches(), BOTH, probes=1).values
    jax.tree.map(lambda h, s, w: np.testing.assert_allclose(h, 12 * s**2 * w**2, rtol=1e-12), got, scale, tree(1))


@pytest.mark.parametrize("sizes", CUTS[1:])
def test_batching_does_not_matter(sizes):
    params = tree(1)
    for estimate in (
        lambda data: hutchinson_diagonal(tiny_loss, params, data, BOTH, probes=3, key=jax.random.key(5)).values,
        lambda data: calls.mean_gradient(tiny_loss, *leaves.partition(params, BOTH), _batches(data)),
    ):
        one, many = estimate(tiny_batches()), estimate(tiny_batches(sizes))
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-11, atol=1e-13), one, many)


def _batches(data):
    from pruneopt.network.batches import Batches

    return Batches(data)


def test_only_the_chosen_leaves_are_differentiated():
    got = empirical_fisher_diagonal(tiny_loss, tree(1), tiny_batches(), "a").values
    assert got["b"] is None
    assert got["a"].shape == (2, 4)


@pytest.mark.default_flags
def test_gram_of_inputs_is_the_float64_product():
    x = np.random.default_rng(0).standard_normal((500, 30)).astype(np.float32)
    expected = x.astype(np.float64).T @ x.astype(np.float64) / 500
    np.testing.assert_allclose(Gram.from_inputs(x).matrix, expected, rtol=1e-4, atol=1e-6)
    half = Gram.from_inputs(jnp.asarray(x, jnp.bfloat16)).matrix
    assert half.dtype == jnp.float32
    np.testing.assert_allclose(half, expected, atol=2e-2)
