"""The low-rank Fisher: gradients against vmap(grad), its algebra against dense float64, its refusals."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import tiny_batches, tiny_loss, tree
from jax.flatten_util import ravel_pytree

from pruneopt.curvature import LowRank, empirical_fisher, empirical_fisher_diagonal, fisher

BOTH = ["a", "b"]


def single_gradients(loss, params, batch):
    """G by plain autodiff, one example after another."""
    n = len(jax.tree.leaves(batch)[0])
    alone = [jax.tree.map(lambda x, i=i: x[i : i + 1], batch) for i in range(n)]
    gradient = jax.jit(jax.grad(loss))
    return np.stack([ravel_pytree(gradient(params, one))[0] for one in alone])


def dense(params, ridge=0.0):
    g = single_gradients(tiny_loss, params, tiny_batches()[0]).astype(np.float64)
    return g.T @ g / len(g) + ridge * np.eye(g.shape[1])


# ------------------------------------------------------------------------------------------- per-example gradients


def image_net(params, batch):
    """Strided, dilated, grouped and tied convolutions under jit, scan and remat, with biases, a scale and a mask."""
    x = batch["x"]
    conv = lambda x, w, **k: jax.lax.conv_general_dilated(  # noqa: E731
        x, w, dimension_numbers=("NHWC", "HWIO", "NHWC"), **{"window_strides": (1, 1), "padding": "SAME", **k}
    )
    x = jax.nn.relu(conv(x, params["stem"], window_strides=(2, 2), padding=((1, 1), (1, 1))) + params["bias"])
    x = jax.nn.gelu(conv(x, params["grouped"] * params["scale"], feature_group_count=2, rhs_dilation=(2, 1)))
    x, _ = jax.lax.scan(lambda h, w: (jax.checkpoint(lambda h: jnp.tanh(conv(h, w)))(h), None), x, params["stack"])
    x = x + jax.jit(conv)(x, params["tied"]) + 2 * conv(x, params["tied"])
    logits = x.reshape(x.shape[0], -1) @ params["head"]
    return -jnp.mean(jax.nn.log_softmax(logits)[jnp.arange(x.shape[0]), batch["y"]])


def image_params():
    shapes = {"stem": (3, 3, 2, 4), "grouped": (3, 2, 2, 4), "stack": (2, 3, 3, 4, 4), "tied": (1, 1, 4, 4)}
    shapes |= {"bias": (1, 1, 1, 4), "scale": (1, 1, 1, 4), "head": (36, 3)}
    return tree(3, shapes)


def image_batch(n=5):
    rng = np.random.default_rng(0)
    return {"x": rng.standard_normal((n, 6, 6, 2)), "y": rng.integers(0, 3, n)}


@pytest.mark.parametrize("leaves", [["*"], pytest.param(["stem", "bias"], marks=pytest.mark.slow)])
@pytest.mark.slow
def test_gradients_of_a_network_of_convolutions_are_those_of_autodiff(leaves):
    params, batch = image_params(), image_batch()
    h = empirical_fisher(image_net, params, [batch], leaves)
    chosen = dict.fromkeys(h.layout.paths)
    whole = lambda c, b: image_net({**params, **c}, b)  # noqa: E731
    expected = single_gradients(whole, {k: params[k] for k in chosen}, batch)
    np.testing.assert_allclose(h.gradients, expected, rtol=0, atol=1e-12 * np.abs(expected).max())


def test_a_derivative_of_the_users_own_around_a_product_is_kept():
    @jax.custom_vjp
    def through(x, w):
        return jax.lax.conv(x, jnp.round(w), (1, 1), "SAME")

    through.defvjp(lambda x, w: (through(x, w), (x, w)), lambda s, d: (jnp.zeros_like(s[0]), 3 * jnp.ones_like(s[1])))
    loss = lambda p, x: jnp.mean(through(x, p["w"]) + jax.lax.conv(x, p["w"], (1, 1), "SAME"))  # noqa: E731
    params, x = {"w": jnp.ones((1, 1, 3, 3))}, np.random.default_rng(0).standard_normal((3, 1, 4, 4))
    expected = single_gradients(loss, params, x)
    np.testing.assert_allclose(empirical_fisher(loss, params, [x]).gradients, expected, rtol=1e-12)


@pytest.mark.parametrize("sizes", [(4, 4, 2), (1,) * 10, (7, 3)])
def test_gradients_are_the_same_to_the_bit_however_the_data_is_cut(sizes, monkeypatch):
    monkeypatch.setattr(fisher, "_CHUNK", 3)
    one = empirical_fisher(tiny_loss, tree(1), tiny_batches(), BOTH)
    many = empirical_fisher(tiny_loss, tree(1), tiny_batches(sizes), BOTH)
    np.testing.assert_array_equal(one.gradients, many.gradients)
    np.testing.assert_allclose(one.gradients, single_gradients(tiny_loss, tree(1), tiny_batches()[0]), rtol=1e-12)
    diagonal = empirical_fisher_diagonal(tiny_loss, tree(1), tiny_batches(sizes), BOTH)
    np.testing.assert_allclose(ravel_pytree(diagonal.values)[0], np.diag(dense(tree(1))), rtol=1e-12)


@pytest.mark.slow
def test_each_example_may_have_a_key_of_its_own():
    def loss(params, batch):
        x, y, keys = batch
        kept = jax.vmap(lambda key: jax.random.bernoulli(key, 0.5, (2,)))(keys)
        return tiny_loss(params, (jnp.where(kept, x, jnp.zeros_like(x)), y))

    x, y = tiny_batches()[0]
    keys = jax.random.split(jax.random.key(0), 10)
    batches = [(x[:4], y[:4], keys[:4]), (x[4:], y[4:], keys[4:])]
    expected = single_gradients(loss, tree(1), (x, y, keys))
    np.testing.assert_allclose(empirical_fisher(loss, tree(1), batches, BOTH).gradients, expected, rtol=1e-12)


@pytest.mark.default_flags
@pytest.mark.slow
def test_single_precision_and_bfloat16():
    params = tree(1)
    h = empirical_fisher(tiny_loss, params, tiny_batches(), BOTH)
    assert h.gradients.dtype == jnp.float32
    half = empirical_fisher(tiny_loss, params, tiny_batches(), BOTH, dtype=jnp.bfloat16)
    assert half.gradients.dtype == jnp.bfloat16
    np.testing.assert_array_equal(half.gradients, h.gradients.astype(jnp.bfloat16))
    g = np.asarray(half.gradients, np.float64)
    d = np.random.default_rng(1).standard_normal(g.shape[1]).astype(np.float32)
    direction = half.layout.tree(jnp.asarray(d))
    product = g.T @ (g @ d) / len(g)
    np.testing.assert_allclose(ravel_pytree(half.mv(direction))[0], product, atol=1e-5 * np.abs(product).max())
    zero = jax.tree.map(jnp.zeros_like, direction)
    assert half.form(direction, zero, 0.5) == pytest.approx(d @ product + 0.5 * d.astype(float) @ d, rel=1e-12)
    np.testing.assert_allclose(ravel_pytree(half.diagonal(direction))[0], (g * g).mean(0), rtol=1e-5)
    np.testing.assert_allclose(half.gram, g @ g.T, atol=1e-6 * np.max(g @ g.T))


# ------------------------------------------------------------------------------------------------------- algebra


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize(("n", "p"), [(5, 40), (40, 12), (1, 8)])
@pytest.mark.parametrize("ridge", [1e-6, 0.1])
def test_solve_and_the_inverse_diagonal_are_those_of_the_dense_inverse(n, p, ridge, dtype):
    rng = np.random.default_rng(n)
    g = (rng.standard_normal((n, p)) * 10 ** rng.uniform(-3, 0, (n, 1))).astype(dtype)
    like = {"a": np.zeros((2, p // 4), dtype), "hole": None, "b": np.zeros(p - 2 * (p // 4), dtype)}
    h = LowRank.checked(jnp.asarray(g), like, ridge / 2)
    wide = g.astype(np.float64)
    inverse = np.linalg.inv(wide.T @ wide / n + ridge * np.eye(p))
    b = rng.standard_normal(p).astype(dtype)
    found = h.solve(h.layout.tree(b), ridge / 2)
    assert found["a"].dtype == dtype
    expected = inverse @ b.astype(np.float64)
    precision = 1e-7 if dtype == np.float32 else 1e-9  # of the result's rounding, of the inverse's
    np.testing.assert_allclose(ravel_pytree(found)[0], expected, atol=precision * np.abs(expected).max())
    precision = 1e-5 if dtype == np.float32 else 1e-9
    np.testing.assert_allclose(ravel_pytree(h.inverse_diagonal(ridge / 2))[0], np.diag(inverse), rtol=precision)


def test_solve_holds_where_the_rounding_of_the_gram_exceeds_the_ridge():
    g = np.random.default_rng(0).standard_normal((50, 800)).astype(np.float32)
    wide, b = g.astype(np.float64), np.random.default_rng(1).standard_normal(800)
    found = LowRank.checked(jnp.asarray(g), np.zeros(800)).solve(jnp.asarray(b), 1e-7)
    expected = np.linalg.solve(wide.T @ wide / 50 + 1e-7 * np.eye(800), b)
    np.testing.assert_allclose(found, expected, atol=1e-6 * np.abs(expected).max())


def test_inverse_diagonal_over_several_blocks_of_columns(monkeypatch):
    from pruneopt.curvature import low_rank

    h = empirical_fisher(tiny_loss, tree(1), tiny_batches(), BOTH, ridge=0.01)
    monkeypatch.setattr(low_rank, "_COLUMNS", 5)
    expected = np.diag(np.linalg.inv(dense(tree(1), 0.01)))
    np.testing.assert_allclose(ravel_pytree(h.inverse_diagonal())[0], expected, rtol=1e-9)


@pytest.mark.slow
def test_blocks_and_dense_are_the_matrix_by_autodiff():
    h = empirical_fisher(tiny_loss, tree(1), tiny_batches(), BOTH, ridge=0.3)
    matrix = dense(tree(1), 0.3)
    np.testing.assert_allclose(h.dense(), matrix, rtol=1e-12)
    np.testing.assert_allclose(h.block("b"), matrix[8:, 8:], rtol=1e-12)
    np.testing.assert_allclose(h.block(slice(2, 9)), matrix[2:9, 2:9], rtol=1e-12)
    np.testing.assert_allclose(h.block([3, 11, 0]), matrix[np.ix_([3, 11, 0], [3, 11, 0])], rtol=1e-12)


# ------------------------------------------------------------------------------------------------------ bad input


def bad_loss(params, batch):
    """Finite, its gradient is not."""
    return tiny_loss(params, batch) + jnp.sqrt(jnp.where(jnp.max(batch[0]) > 90, 0.0, 1.0) * jnp.sum(params["b"] ** 2))


def nan_loss(params, batch):
    return tiny_loss(params, batch) * jnp.where(jnp.max(batch[0]) > 90, jnp.nan, 1.0)


def poisoned():
    batches = tiny_batches((4, 4, 2))
    x, y = batches[1]
    batches[1] = (x.at[2].set(99.0), y)
    return batches


def weighted_loss(params, batch):
    return tiny_loss(params, (batch["x"], batch["y"])) * batch["shared"][0]


def shared_batch():
    x, y = tiny_batches()[0]
    return {"x": x, "y": y, "shared": np.ones(3)}


def low_rank(**k):
    return LowRank.checked(jnp.ones((2, 12)), tree(1), **k)


REFUSED = {
    "one example": (
        lambda: empirical_fisher(tiny_loss, tree(1), tiny_batches((1,)), BOTH),
        ("1 example", "at least 2"),
    ),
    "no example": (lambda: empirical_fisher(tiny_loss, tree(1), [], BOTH), ("empty", "pass")),
    "NaN in one batch": (
        lambda: empirical_fisher(bad_loss, tree(1), poisoned(), BOTH),
        ("batch 1", "gradient of fn", "'b'"),
    ),
    "a loss that is NaN in one batch": (
        lambda: empirical_fisher(nan_loss, tree(1), poisoned(), BOTH),
        ("batches: batch 1: fn returns nan",),
    ),
    "NaN, diagonal": (lambda: empirical_fisher_diagonal(bad_loss, tree(1), poisoned(), BOTH), ("batch 1",)),
    "too large": (
        lambda: empirical_fisher(tiny_loss, tree(1), tiny_batches(), BOTH, memory=100),
        ("960 bytes", "10 x 12", "bfloat16", "memory="),
    ),
    "an array that the examples share": (
        lambda: empirical_fisher(weighted_loss, tree(1), [shared_batch()], BOTH),
        ("batch 0", "'shared' (3,)", "close fn over"),
    ),
    "integer gradients": (
        lambda: empirical_fisher(tiny_loss, tree(1), tiny_batches(), BOTH, dtype=jnp.int32),
        ("dtype=", "bfloat16"),
    ),
    "negative ridge": (lambda: low_rank(ridge=-1.0), ("ridge=-1.0",)),
    "no ridge to solve": (lambda: low_rank().solve(tree(1)), ("ridge=0.0", "rank 2 on 12 entries", "pass")),
    "no ridge to invert": (lambda: low_rank().inverse_diagonal(), ("ridge=0.0",)),
    "other columns": (lambda: LowRank.checked(jnp.ones((2, 5)), tree(1)), ("(2, 5)", "(n, 12)")),
    "no rows": (lambda: LowRank.checked(jnp.ones((0, 12)), tree(1)), ("(0, 12)", "n >= 1")),
    "NaN rows": (lambda: LowRank.checked(jnp.full((2, 12), jnp.nan), tree(1)), ("gradients", "NaN")),
    "dense too large": (lambda: low_rank().dense(memory=1000), ("1,152 bytes", "mv")),
    "block too large": (lambda: low_rank().block("a", memory=100), ("512 bytes", "fewer entries")),
    "an index twice": (lambda: low_rank().block([1, 1]), ("[1, 1]", "twice")),
    "a product with another tree": (
        lambda: low_rank().mv({"a": jnp.ones((4, 2)), "b": jnp.ones((4, 1))}),
        ("(4, 2)", "'a' (2, 4)"),
    ),
    "a solve of another tree": (lambda: low_rank(ridge=1.0).solve({"a": jnp.ones((2, 4))}), ("[(2, 4)]", "'b' (4, 1)")),
    "no such leaf": (lambda: low_rank().block("c"), ("'c'", "'a'")),
    "no such entry": (lambda: low_rank().block([12]), ("indices", "12")),
}


@pytest.mark.parametrize("name", REFUSED)
def test_bad_input_gets_one_sentence(name):
    call, words = REFUSED[name]
    with pytest.raises((ValueError, TypeError)) as caught:
        call()
    for word in words:
        assert word in str(caught.value), str(caught.value)
