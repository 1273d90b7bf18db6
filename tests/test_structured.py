"""Blocks, Kronecker factors and low rank plus diagonal against dense matrices built by hand in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import tiny_batches, tiny_loss, tree
from jax.flatten_util import ravel_pytree

from pruneopt.curvature import BlockDiagonal, Hessian, Kronecker, LowRank, LowRankPlusDiagonal, empirical_fisher

BOTH = ["a", "b"]
A, B = np.arange(8).reshape(2, 4), np.arange(8, 12)  # where the entries of tiny_loss's leaves lie
PARTITIONS = {
    "leaf": [A.reshape(-1), B],
    "out": [*A.T, B],
    "in": [*A, *B[:, None]],
    3: [*np.split(A.reshape(-1), [3, 6]), B[:3], B[3:]],
    100: [A.reshape(-1), B],
}


def flat(t):
    return np.asarray(ravel_pytree(t)[0], np.float64)


def check(h, expected, ridge=0.2):
    """All that h offers against its dense matrix."""
    p, close = len(expected), {"rtol": 1e-9, "atol": 1e-12}
    d = h.layout.tree(jnp.asarray(np.random.default_rng(5).standard_normal(p)))
    np.testing.assert_allclose(flat(h.mv(d)), expected @ flat(d), **close)
    np.testing.assert_allclose(flat(h.diagonal(d)), np.diag(expected), **close)
    np.testing.assert_allclose(h.block(slice(0, p)), expected, **close)
    np.testing.assert_allclose(h.block([p - 1, 2]), expected[np.ix_([p - 1, 2], [p - 1, 2])], **close)
    zero = jax.tree.map(jnp.zeros_like, d)
    assert h.form(d, zero, 0.5) == pytest.approx(flat(d) @ expected @ flat(d) + 0.5 * flat(d) @ flat(d))
    inverse = np.linalg.inv(expected + ridge * np.eye(p))
    np.testing.assert_allclose(flat(h.solve(d, ridge)), inverse @ flat(d), rtol=1e-8, atol=1e-10)
    np.testing.assert_allclose(flat(h.inverse_diagonal(ridge)), np.diag(inverse), rtol=1e-9)


def fisher(**k):
    return empirical_fisher(tiny_loss, tree(1), tiny_batches((4, 6)), BOTH, **k)


@pytest.mark.parametrize("by", PARTITIONS)
def test_blocks_of_the_fisher(by):
    h = fisher(ridge=0.1)
    expected = 0.1 * np.eye(12)
    for at in PARTITIONS[by]:
        expected[np.ix_(at, at)] = np.asarray(h.dense())[np.ix_(at, at)]
    check(BlockDiagonal.of(h, by), expected)


@pytest.mark.slow
def test_blocks_of_the_hessian():
    h = Hessian.of(tiny_loss, tree(1), tiny_batches((4, 6)), BOTH)
    expected = np.zeros((12, 12))
    for at in PARTITIONS["out"]:
        expected[np.ix_(at, at)] = h.dense()[np.ix_(at, at)]
    check(BlockDiagonal.of(h, "out"), expected, ridge=5.0)


@pytest.mark.default_flags
def test_the_inverse_of_single_precision_gradients_is_exact_with_a_small_ridge():
    g = np.random.default_rng(0).standard_normal((30, 64)).astype(np.float32)
    h = LowRank.checked(jnp.asarray(g), {"w": np.zeros((8, 8), np.float32)}, 1e-7)
    wide = g.astype(np.float64)
    expected = np.zeros((64, 64))
    for at in np.split(np.arange(64), 2):
        expected[np.ix_(at, at)] = wide[:, at].T @ wide[:, at] / 30 + 1e-7 * np.eye(32)
    found = BlockDiagonal.of(h, by=32)
    np.testing.assert_allclose(found.inverse_diagonal()["w"].reshape(-1), np.diag(np.linalg.inv(expected)), rtol=1e-6)
    b = np.random.default_rng(1).standard_normal(64).astype(np.float32)
    exact = np.linalg.solve(expected, b)
    assert np.max(np.abs(flat(found.solve({"w": b.reshape(8, 8)})) - exact)) < 1e-6 * np.abs(exact).max()


# ----------------------------------------------------------------------------------------------------- Kronecker


@pytest.mark.slow
def test_one_position_an_example_is_the_product_of_the_two_second_moments():
    h = Kronecker.of(tiny_loss, tree(1), tiny_batches((4, 6)), BOTH, ridge=0.1)
    x, y = tiny_batches()[0]
    params = tree(1)
    hidden = jnp.tanh(x @ params["a"])
    out = hidden @ params["b"]
    g2 = np.asarray(2 * (out - y))  # of one example's loss in the outputs
    g1 = np.asarray((g2 @ params["b"].T) * (1 - hidden**2))
    expected = 0.1 * np.eye(12)
    for at, x_, g in ((slice(0, 8), x, g1), (slice(8, 12), hidden, g2)):
        expected[at, at] += np.kron(np.asarray(x_.T @ x_) / 10, g.T @ g / 10)
    check(h, expected)
    np.testing.assert_allclose(h.dense(), expected, rtol=1e-10, atol=1e-13)


@pytest.mark.slow
def test_it_is_the_fisher_where_inputs_and_gradients_are_independent():
    """One linear layer whose loss is linear in its outputs with signs that do not depend on the input."""
    rng = np.random.default_rng(0)
    x, s = rng.standard_normal((6, 3)), rng.standard_normal((5, 2))
    batch = (np.repeat(x, 5, axis=0), np.tile(s, (6, 1)))  # every input with every gradient
    loss = lambda p, b: jnp.mean(jnp.sum((b[0] @ p["w"]) * b[1], axis=1))  # noqa: E731
    params = {"w": jnp.asarray(rng.standard_normal((3, 2)))}
    exact = np.asarray(empirical_fisher(loss, params, [batch]).dense())
    np.testing.assert_allclose(Kronecker.of(loss, params, [batch]).dense(), exact, rtol=1e-10)


@pytest.mark.slow
def test_a_convolution_sums_its_positions_and_every_cut_of_the_data_is_the_same():
    rng = np.random.default_rng(1)
    x, params = rng.standard_normal((6, 2, 4, 4)), {"k": jnp.asarray(rng.standard_normal((3, 2, 2, 2)))}

    def loss(p, x):
        return jnp.mean(jnp.sum(jax.lax.conv(x, p["k"], (1, 1), "VALID") ** 2, axis=(1, 2, 3)))

    patches = np.stack([x[:, :, i : i + 2, j : j + 2] for i in range(3) for j in range(3)], 1).reshape(6, 9, 8)
    w = np.asarray(params["k"]).reshape(3, 8).T
    g = 2 * patches @ w
    a = np.einsum("nti,ntj->ij", patches, patches) / 6
    s = np.einsum("nti,ntj->ij", g, g) / 54
    expected = np.kron(s, a)  # OIHW: outputs first
    for batches in ([x], [x[:2], x[2:]]):
        np.testing.assert_allclose(Kronecker.of(loss, params, batches).dense(), expected, rtol=1e-9, atol=1e-12)


@pytest.mark.slow
def test_fused_and_stacked_leaves_are_one_operator_each():
    rng = np.random.default_rng(2)
    x = rng.standard_normal((8, 3))
    params = {"q": rng.standard_normal((3, 2)), "k": rng.standard_normal((3, 2)), "s": rng.standard_normal((2, 4, 4))}
    params = jax.tree.map(jnp.asarray, params)

    def loss(p, x):
        h = x @ jnp.concatenate([p["q"], p["k"]], axis=1)
        h, _ = jax.lax.scan(lambda h, w: (jnp.tanh(h @ w), None), h, p["s"])
        return jnp.mean(jnp.sum(h**2, axis=1))

    h = Kronecker.of(loss, params, [x])
    assert sorted(e.shape for e in h.entries) == [(1, 3, 4), (1, 4, 4), (1, 4, 4)]
    check(h, h.dense())
    fused = np.asarray(x.T @ x) / 8
    first = next(i for i, e in enumerate(h.entries) if e.shape == (1, 3, 4))
    np.testing.assert_allclose(h.inputs[first][0], fused, rtol=1e-12)
    assert not h.dense()[:6, 12:].any()


# ------------------------------------------------------------------------------------------- low rank + diagonal


def test_low_rank_plus_diagonal():
    h, extra = fisher(ridge=0.1), jax.tree.map(jnp.square, tree(2))
    expected = np.asarray(h.dense()) + np.diag(flat(extra))
    found = LowRankPlusDiagonal.checked(h, extra)
    check(found, expected)
    np.testing.assert_allclose(found.dense(), expected, rtol=1e-12)


# ------------------------------------------------------------------------------------------------------ bad input


def scaled(params, batch):
    return tiny_loss({"a": params["a"] * params["scale"], "b": params["b"]}, batch)


def biased(params, batch):
    return tiny_loss({"a": params["a"], "b": params["b"] + params["c"]}, batch)


def tied(params, tokens):
    table = params["table"]
    return jnp.mean(jnp.square(jnp.tanh(table[tokens]) @ table.T))


REFUSED = {
    "tied embedding": (
        lambda: Kronecker.of(tied, tree(1, {"table": (5, 3)}), [jnp.arange(4)], ["table"]),
        ("'table'", "looked up by index", "leaves="),
    ),
    "repeated entry of blocks": (lambda: BlockDiagonal.of(fisher(), 5).block([0, 0, 1]), ("[0, 0, 1]", "twice")),
    "unknown blocks": (lambda: BlockDiagonal.of(fisher(), "rows"), ("by='rows'", '"out"')),
    "blocks of nothing": (lambda: BlockDiagonal.of(fisher(), 0), ("by=0", "size >= 1")),
    "blocks too large": (lambda: BlockDiagonal.of(fisher(), memory=100), ("640 bytes", "by=512")),
    "singular block": (
        lambda: BlockDiagonal.of(empirical_fisher(tiny_loss, tree(1), tiny_batches((2,)), BOTH)).solve(tree(1)),
        ("entries 0 to 7", "larger ridge"),
    ),
    "indefinite block": (
        lambda: BlockDiagonal.of(Hessian.of(tiny_loss, tree(1), tiny_batches(), BOTH)).inverse_diagonal(),
        ("not positive definite", "least eigenvalue is -"),
    ),
    "scaled operator": (
        lambda: Kronecker.of(scaled, {**tree(1), "scale": jnp.full((1, 4), 2.0)}, tiny_batches(), BOTH),
        ("'a'", "scaled", "leaves="),
    ),
    "no operator": (
        lambda: Kronecker.of(biased, {**tree(1), "c": jnp.ones((4, 1))}, tiny_batches(), ["a", "b", "c"]),
        ("no operator can be captured",),
    ),
    "singular factors": (
        lambda: Kronecker.of(tiny_loss, tree(1), tiny_batches((3,)), BOTH).solve(tree(1)),
        ("ridge=0.0", "no inverse"),
    ),
    "Kronecker too large": (
        lambda: Kronecker.of(tiny_loss, tree(1), tiny_batches(), BOTH).dense(memory=9),
        ("1,152 bytes", "solve"),
    ),
    "negative diagonal": (
        lambda: LowRankPlusDiagonal.checked(fisher(), jax.tree.map(lambda x: -jnp.ones_like(x), tree(1))),
        ("values", "negative"),
    ),
    "zero diagonal": (
        lambda: LowRankPlusDiagonal.checked(fisher(), jax.tree.map(jnp.zeros_like, tree(1))).solve(tree(1)),
        ("12 entries", "ridge > 0"),
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_bad_input_gets_one_sentence(name):
    call, words = REFUSED[name]
    with pytest.raises((ValueError, TypeError)) as caught:
        call()
    for word in words:
        assert word in str(caught.value), str(caught.value)
