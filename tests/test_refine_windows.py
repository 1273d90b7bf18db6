"""Windows refitted one after the other: where a program is cut, what each fits, and what is never made worse."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import pruneopt as po
from pruneopt.constraints import Cardinality

pytestmark = pytest.mark.default_flags
RNG = np.random.default_rng(0)


def normal(*shape):
    return jnp.asarray(RNG.standard_normal(shape) / np.sqrt(shape[0]), jnp.float32)


def blocks(p, x):
    """Two residual blocks and a head."""
    h = x @ p["in"]
    for block in p["blocks"]:
        h = h + jnp.tanh(h @ block["up"]) @ block["down"]
    return h @ p["head"]


def made(sparsity=0.6):
    params = {
        "in": normal(5, 8),
        "blocks": [{"up": normal(8, 16), "down": normal(16, 8)} for _ in range(2)],
        "head": normal(8, 3),
    }
    pruned = po.prune(blocks, params, None, Cardinality(sparsity=sparsity), progress=False)
    data = lambda n: jnp.asarray(RNG.standard_normal((n, 5)), jnp.float32)  # noqa: E731
    return params, pruned, [data(16) for _ in range(8)], [data(40)]


def test_each_window_is_a_block_and_falls_on_held_out_data():
    params, pruned, batches, held_out = made()
    found = po.plans.refine_windows(blocks, params, pruned, batches, held_out, rates=(1e-2,), epochs=6)
    last = found.history[-1]
    leaves = [set(window[0]) for window in last["windows"] if window[0]]
    assert {"blocks/0/up", "blocks/0/down"} in leaves
    assert {"blocks/1/up", "blocks/1/down"} in leaves or {"blocks/1/up", "blocks/1/down", "head"} in leaves
    assert set.union(*leaves) == {"in", "head", *(f"blocks/{i}/{n}" for i in (0, 1) for n in ("up", "down"))}
    assert all(after <= before for _, before, after, _ in last["windows"])
    assert last["held_out"][1] < 0.7 * last["held_out"][0]
    lost = float(po.plans.kl(blocks(params, held_out[0]), blocks(found.params, held_out[0])))
    assert last["held_out"][1] == pytest.approx(lost, rel=1e-4)
    jax.tree.map(
        lambda x, mask: np.testing.assert_array_equal(np.asarray(x)[~np.asarray(mask)], 0), found.params, pruned.support
    )


def test_a_linear_window_ends_at_least_squares():
    params, x = {"w": normal(8, 3)}, normal(64, 8)
    linear = lambda p, x: x @ p["w"]  # noqa: E731
    pruned = po.prune(linear, params, None, Cardinality(sparsity=0.5), progress=False)
    words = {"measure": po.plans.squared, "rates": (0.03,), "epochs": 400}
    found = po.plans.refine_windows(linear, params, pruned, [x], [normal(9, 8)], **words)
    mask = np.asarray(pruned.support["w"])
    for o in range(3):
        kept = mask[:, o]
        best = np.linalg.lstsq(np.asarray(x)[:, kept], np.asarray(x @ params["w"])[:, o], rcond=None)[0]
        np.testing.assert_allclose(np.asarray(found.params["w"])[kept, o], best, atol=0.05)


def test_a_dense_network_is_left_as_it_is():
    params, _, batches, held_out = made()
    pruned = po.from_masks(params, jax.tree.map(lambda x: jnp.ones(x.shape, bool), params))
    found = po.plans.refine_windows(blocks, params, pruned, batches, held_out, epochs=1)
    jax.tree.map(np.testing.assert_array_equal, found.params, params)
    assert "nothing was changed" in found.history[-1]["notes"][0]


def test_leaves_that_several_windows_read_stay():
    """A tied embedding: the first window and the last."""
    params, _, _, _ = made()
    params = {**params, "in": normal(30, 8)}
    fn = lambda p, ids: blocks({**p, "in": jnp.eye(8), "head": p["in"].T}, p["in"][ids])  # noqa: E731
    pruned = po.prune(fn, params, None, Cardinality(sparsity=0.5), leaves="blocks/*", progress=False)
    draw = lambda n: jnp.asarray(RNG.integers(0, 30, n))  # noqa: E731
    found = po.plans.refine_windows(fn, params, pruned, [draw(12)], [jnp.arange(30)], rates=(1e-2,))
    np.testing.assert_array_equal(found.params["in"], params["in"])
    assert found.history[-1]["held_out"][1] < found.history[-1]["held_out"][0]
