"""What pruning changed: counts by hand, FLOPs against XLA's own, redundancy against networks made redundant."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import pruneopt as po
from pruneopt.constraints import Cardinality
from pruneopt.structure.cost import flops

pytestmark = pytest.mark.default_flags
RNG = np.random.default_rng(0)


def normal(*shape):
    return jnp.asarray(RNG.standard_normal(shape), jnp.float32)


def xla_flops(fn, params, batch):
    return jax.jit(fn).lower(params, batch).compile().cost_analysis()["flops"]


def dense(p, x):
    return (x @ p["w1"]) @ p["w2"]


def convolution(p, x):
    x = jax.lax.conv_general_dilated(x, p["k"], (2, 1), "VALID", dimension_numbers=("NHWC", "HWIO", "NHWC"))
    return x.reshape(x.shape[0], -1) @ p["w"]


def grouped(p, x):
    return jax.lax.conv_general_dilated(
        x, p["k"], (1, 1), "VALID", dimension_numbers=("NHWC", "HWIO", "NHWC"), feature_group_count=2
    )


def attention(p, x):
    q, k, v = (jnp.einsum("btd,dhe->bthe", x, p[n]) for n in "qkv")
    mixed = jnp.einsum("bhst,bthe->bshe", jnp.einsum("bshe,bthe->bhst", q, k), v)
    return jnp.einsum("bshe,hed->bsd", mixed, p["o"])


NETWORKS = {
    "dense": (dense, {"w1": normal(8, 16), "w2": normal(16, 4)}, normal(5, 8)),
    "strided convolution": (convolution, {"k": normal(3, 3, 4, 6), "w": normal(144, 3)}, normal(2, 10, 8, 4)),
    "grouped convolution": (grouped, {"k": normal(3, 3, 2, 6)}, normal(2, 9, 9, 4)),
    "attention": (attention, {"q": normal(8, 2, 4), "k": normal(8, 2, 4), "v": normal(8, 2, 4), "o": normal(2, 4, 8)},
                  normal(3, 5, 8)),
}  # fmt: skip


@pytest.mark.parametrize("name", NETWORKS)
def test_flops_equal_xla_on_dots_and_valid_convolutions(name):
    fn, params, batch = NETWORKS[name]
    counted = flops(fn, params, batch)
    assert sum(counted.values()) == pytest.approx(xla_flops(fn, params, batch), rel=1e-6)
    assert set(counted) - {""} == set(params)


def test_flops_are_charged_through_calls_layouts_and_scans():
    layers = normal(3, 6, 6)
    mask = jnp.ones((6, 6))

    @jax.checkpoint
    def block(w, x):
        return jax.nn.gelu(x @ (w * mask).T)

    def fn(p, x):
        x, _ = jax.lax.scan(lambda h, w: (jax.jit(block)(w, h), None), x, p["stack"])
        return jax.lax.cond(x.sum() > 0, lambda h: h @ p["out"].astype(jnp.float32), lambda h: h[:, :2], x)

    counted = flops(fn, {"stack": layers, "out": normal(6, 2).astype(jnp.bfloat16)}, normal(5, 6))
    assert counted == {"stack": 3 * 2 * 5 * 6 * 6, "out": 2 * 5 * 6 * 2}


def test_report_counts_by_hand():
    fn, params, batch = NETWORKS["dense"]
    pruned = po.prune(None, params, None, Cardinality(sparsity=0.75, per="leaf"), progress=False)
    r = po.report(fn, params, pruned, batch, repeats=3)
    assert (r.parameters, r.kept) == (192, 48)
    assert r.sparsity == 0.75
    assert (r.flops_dense, r.flops_kept) == (2 * 5 * 192, 2 * 5 * 48)
    assert (r.bytes_dense, r.bytes_stored) == (768, 48 * 4 + 192 // 8)
    assert r.seconds_dense > 0 < r.seconds_pruned
    text = str(r)
    assert "75.00%" in text
    assert "zeros are multiplied" in text
    assert po.report(None, params, pruned).flops_dense is None


def loss(p, batch):
    x, y = batch
    return jnp.mean((jax.nn.relu(x @ p["w1"]) @ p["w2"] - y) ** 2)


def test_redundancy_finds_what_was_planted():
    w1, w2 = np.array(normal(10, 8)), np.array(normal(8, 3))
    w1[:, 1] = 0  # a zero output
    w1[:, 2] = -3 * w1[:, 0]  # a twin
    w1[4] = 0  # an input that nobody reads
    w1[:, 5] = -np.abs(w1[:, 5])  # silent on positive inputs
    x = jnp.abs(normal(40, 10))
    layers = po.redundancy(
        loss,
        {"w1": jnp.asarray(w1), "w2": jnp.asarray(w2)},
        [(x[:25], normal(25, 3)), (x[25:], normal(15, 3))],
        tolerance=0.0,
    ).layers
    first, second = layers
    assert (first.zero_inputs, first.zero_outputs, first.duplicate_outputs) == (1, 1, 1)
    assert first.silent_outputs == 2 + (np.asarray(x @ w1[:, [0, 2]]) <= 0).all(0).sum()
    assert first.free >= 10 + 10 + 6  # the zero output, the silent one, the unread input
    assert first.rank == np.linalg.matrix_rank(w1)
    s = np.linalg.svd(w1, compute_uv=False)
    s = s[s > 0] / s.sum()
    assert first.effective_rank == pytest.approx(np.exp(-np.sum(s * np.log(s))), rel=1e-5)
    assert second.free >= 2 * 3  # what the zero and the silent unit feed
    assert "w1" in str(po.redundancy(None, {"w1": jnp.asarray(w1)}))
    for bad in ({"tolerance": -1.0}, {"similarity": 0.0}):
        with pytest.raises(ValueError, match=next(iter(bad))):
            po.redundancy(None, {"w1": jnp.asarray(w1)}, **bad)
