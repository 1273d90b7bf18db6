"""A short refit towards the dense outputs: where it ends, what it never does, and what is refused."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import pruneopt as po
from pruneopt.constraints import Cardinality

pytestmark = pytest.mark.default_flags
RNG = np.random.default_rng(0)


def normal(*shape):
    return jnp.asarray(RNG.standard_normal(shape), jnp.float32)


def linear(p, x):
    return x @ p["w"]


def mlp(p, x):
    return jnp.tanh(x @ p["a"] + p["b"]) @ p["c"]


def made():
    params = {"a": normal(6, 20), "b": normal(20), "c": normal(20, 4)}
    pruned = po.prune(mlp, params, None, Cardinality(sparsity=0.6), progress=False)
    return params, pruned, [normal(16, 6) for _ in range(6)], [normal(40, 6)]


def lost(params, dense, x):
    return float(po.plans.kl(mlp(dense, x), mlp(params, x)))


def test_a_linear_network_ends_at_the_least_squares_of_its_support():
    params, x = {"w": normal(8, 3)}, normal(64, 8)
    pruned = po.prune(linear, params, None, Cardinality(sparsity=0.5), progress=False)
    words = {"measure": po.plans.squared, "rates": (0.03,), "epochs": 400}
    found = po.plans.refine(linear, params, pruned, [x], [normal(9, 8)], **words)
    w0, mask, last = np.asarray(params["w"]), np.asarray(pruned.support["w"]), found.history[-1]
    for o in range(3):
        kept = mask[:, o]
        best = np.linalg.lstsq(np.asarray(x)[:, kept], np.asarray(x) @ w0[:, o], rcond=None)[0]
        np.testing.assert_allclose(np.asarray(found.params["w"])[kept, o], best, atol=0.05)
        assert not np.any(np.asarray(found.params["w"])[~kept, o])
    assert last["held_out"][1] < 0.9 * last["held_out"][0]


def test_the_best_point_on_held_out_data_comes_back():
    params, pruned, batches, held_out = made()
    found = po.plans.refine(mlp, params, pruned, batches, held_out, rates=(1e-3, 1e-2), epochs=5)
    last = found.history[-1]
    assert last["held_out"][0] == pytest.approx(lost(pruned.params, params, held_out[0]), rel=1e-5)
    assert last["held_out"][1] == pytest.approx(lost(found.params, params, held_out[0]), rel=1e-5)
    assert last["held_out"][1] == min(map(min, last["losses"].values())) < 0.8 * last["held_out"][0]
    assert sorted(map(len, last["losses"].values())) == [1, 5]
    first = {rate: losses[0] for rate, losses in last["losses"].items()}
    assert last["rate"] == min(first, key=first.get)
    jax.tree.map(np.testing.assert_array_equal, found.support, pruned.support)
    named = {"a": pruned.support["a"], "c": pruned.support["c"]}
    assert not any(np.any(np.asarray(found.params[n])[~np.asarray(mask)]) for n, mask in named.items())
    assert np.any(np.asarray(found.params["b"]) != np.asarray(params["b"]))


def test_what_diverges_changes_nothing_and_says_so():
    params, pruned, batches, held_out = made()
    words = {"rates": (1e30,), "optimizer": optax.sgd, "epochs": 3}
    found = po.plans.refine(mlp, params, pruned, batches, held_out, **words)
    jax.tree.map(np.testing.assert_array_equal, found.params, pruned.params)
    assert found.history[-1]["held_out"][0] == found.history[-1]["held_out"][1]
    assert "nothing was changed" in found.history[-1]["notes"][-1]


def test_one_rate_that_diverges_leaves_the_other():
    params, pruned, batches, held_out = made()
    found = po.plans.refine(mlp, params, pruned, batches, held_out, rates=(1e38, 1e-2), epochs=2)
    assert found.history[-1]["rate"] == 1e-2
    assert found.history[-1]["held_out"][1] < found.history[-1]["held_out"][0]


def test_half_precision_weights_move_in_float32_and_come_back():
    params, pruned, batches, held_out = made()
    half = lambda tree: jax.tree.map(lambda x: x.astype(jnp.bfloat16), tree)  # noqa: E731
    small = po.plans.refine(
        mlp, params, po.from_masks(half(pruned.params), pruned.support), batches, held_out, rates=(1e-2,), epochs=3
    )
    assert {x.dtype for x in jax.tree.leaves(small.params)} == {jnp.dtype(jnp.bfloat16)}
    assert small.history[-1]["held_out"][1] < small.history[-1]["held_out"][0]


def test_only_what_is_named_moves():
    params, pruned, batches, held_out = made()
    found = po.plans.refine(mlp, params, pruned, batches[:1], held_out, epochs=2, trained="c")
    assert np.array_equal(found.params["a"], pruned.params["a"])
    assert not np.array_equal(found.params["c"], pruned.params["c"])


@pytest.mark.parametrize(
    ("words", "match"),
    [
        ({"rates": ()}, "rates="),
        ({"rates": (0.0,)}, "rates="),
        ({"epochs": 0}, "epochs="),
        ({"measure": lambda a, b: jnp.nan}, "before any step"),
    ],
)
def test_what_cannot_be_refined_is_refused(words, match):
    params, pruned, batches, held_out = made()
    with pytest.raises(ValueError, match=match):
        po.plans.refine(mlp, params, pruned, batches, held_out, **words)


def test_held_out_examples_that_are_trained_on_are_refused():
    params, pruned, batches, held_out = made()
    with pytest.raises(ValueError, match="16 of the 16 examples of held_out are among batches"):
        po.plans.refine(mlp, params, pruned, batches, batches[2:3])
    mixed = [jnp.concatenate([held_out[0], batches[2][:3]])]
    found = po.plans.refine(mlp, params, pruned, batches, mixed)
    assert found.history[-1]["notes"] == ["3 of the 43 examples of held_out are among batches"]
