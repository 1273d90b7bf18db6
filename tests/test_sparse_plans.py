"""Plans around training: lottery tickets, a penalty and then a cut, distillation."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from cases import tiny_batches, tiny_loss, tree

import pruneopt as po
from pruneopt import training
from pruneopt.constraints import Cardinality
from pruneopt.penalties import L1

pytestmark = pytest.mark.default_flags  # optax does not run under strict dtype promotion
SHAPES = {"a": (2, 16), "b": (16, 1)}
QUARTER = Cardinality(sparsity=0.75, floor=1)


@pytest.mark.parametrize("early", [None, lambda p: jax.tree.map(lambda x: 2 * x, p)])
@pytest.mark.slow
def test_lottery_is_pruning_and_rewinding_by_hand(early):
    calls = []

    def train(params, support):
        calls.append(params)
        moved = jax.tree.map(lambda x: x + 0.3 * jnp.sin(7 * x), params)
        return moved if support is None else po.apply(moved, support)

    found = po.plans.lottery(
        tree(1, SHAPES), train, QUARTER, rounds=2, early=early, evaluate=lambda p: p, progress=False
    )
    start = tree(1, SHAPES) if early is None else early(tree(1, SHAPES))
    w, support = train(start, None), None
    for cut in (s.cut for s in po.plans.Iterative(2).stages(0.25)):
        scores = w if support is None else po.apply(w, support)
        support = QUARTER.relaxed(cut).select(jax.tree.map(jnp.abs, scores))
        w = train(po.apply(start, support), support)
    assert found.kept == 12
    jax.tree.map(np.testing.assert_array_equal, found.support, support)
    jax.tree.map(np.testing.assert_array_equal, found.params, w)
    jax.tree.map(np.testing.assert_array_equal, calls[2], po.apply(start, support))  # the last ticket before training
    assert [len(jax.tree.leaves(h["tuned"])) for h in found.history] == [2, 2]


@pytest.mark.slow
def test_a_penalty_then_a_cut_beats_the_cut_alone():
    data = tiny_batches((5, 5))
    start = po.plans.retrain(tiny_loss, data, optax.sgd(0.1), epochs=100)(tree(1, SHAPES), None)
    tune = po.plans.retrain(tiny_loss, data, optax.adam(0.02), epochs=100)
    shrink = po.plans.retrain(
        tiny_loss, data, training.proximal(optax.adam(0.01), L1(0.02), 0.01, metric=training.adam_metric()), epochs=200
    )
    small = shrink(start, None)
    zeros = sum(int(np.sum(np.asarray(x) == 0)) for x in jax.tree.leaves(small))
    assert zeros >= 12, "the penalty makes exact zeros"
    found = po.plans.penalised(start, shrink, QUARTER, tune, progress=False)
    alone = po.prune(None, start, None, QUARTER, fine_tune=tune, progress=False)
    assert found.kept == alone.kept == 12
    value = lambda p: np.mean([float(tiny_loss(p, b)) for b in data])  # noqa: E731
    before = po.prune(None, small, None, QUARTER, progress=False)
    assert value(found.params) < value(before.params)
    assert value(before.params) < value(po.prune(None, start, None, QUARTER, progress=False).params)


@pytest.mark.slow
def test_distillation_is_its_formula():
    rng = np.random.default_rng(0)
    x, teacher, w = (jnp.asarray(rng.standard_normal(s)) for s in ((6, 3), (3, 4), (3, 4)))
    labels = lambda p, b: jnp.mean((b @ p["w"]) ** 2)  # noqa: E731
    forward = lambda p, b: b @ p["w"]  # noqa: E731
    t, s = (np.exp(z) / np.exp(z).sum(1, keepdims=True) for z in (np.asarray(x @ teacher) / 3, np.asarray(x @ w) / 3))
    kl = (t * np.log(t / s)).sum(1).mean()
    got = po.plans.distil(forward, {"w": teacher}, labels, temperature=3.0, share=0.7)({"w": w}, x)
    assert float(got) == pytest.approx(0.7 * 9 * kl + 0.3 * float(labels({"w": w}, x)), rel=1e-5)
    pure = po.plans.distil(forward, {"w": teacher}, temperature=3.0, share=1.0)
    assert float(pure({"w": w}, x)) == pytest.approx(9 * kl, rel=1e-5)
    assert float(pure({"w": teacher}, x)) == pytest.approx(0, abs=1e-6)
    gradient = jax.grad(pure)({"w": w}, x)["w"]
    np.testing.assert_allclose(gradient, 3 * np.asarray(x).T @ (s - t) / 6, rtol=1e-4, atol=1e-6)


@pytest.mark.slow
def test_distillation_retrains_towards_the_dense_network():
    data = [jnp.asarray(np.random.default_rng(i).standard_normal((20, 6))) for i in range(3)]
    forward = lambda p, b: jnp.tanh(b @ p["a"]) @ p["b"]  # noqa: E731
    dense = tree(3, {"a": (6, 16), "b": (16, 4)})
    loss = po.plans.distil(forward, dense, share=1.0)
    tune = po.plans.retrain(loss, data, optax.adam(0.02), epochs=40)
    pruned = po.prune(None, dense, None, Cardinality(sparsity=0.5), fine_tune=tune, progress=False)
    cut = po.apply(dense, pruned.support)
    assert pruned.kept == 80
    assert loss(pruned.params, data[0]) < 0.3 * loss(cut, data[0])


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda f: po.plans.distil(f, {}, f, temperature=0), ("temperature=0", "positive")),
        (lambda f: po.plans.distil(f, {}, f, share=1.5), ("share=1.5", "[0, 1]")),
        (lambda f: po.plans.distil(f, {}, share=0.5), ("share=0.5", "share=1 where loss is None")),
        (lambda f: po.plans.lottery(tree(1, SHAPES), lambda p, s: p, QUARTER, rounds=0), ("steps=0",)),
    ],
)
def test_is_refused(call, words):
    with pytest.raises(ValueError, match=r"\w") as caught:
        call(lambda p, b: b)
    for word in words:
        assert word in str(caught.value)


@pytest.mark.parametrize(("call", "says"), [
    (lambda p: po.plans.distil(3, p), "forward is 3; pass a function"),
    (lambda p: po.plans.distil(len, p, 3), "loss is 3; pass a function"),
    (lambda p: po.plans.penalised(p, L1(0.1), Cardinality(count=3), len), r"shrink is L1\(.*; pass a function"),
    (lambda p: po.plans.lottery(p, None, Cardinality(count=3)), "train is None; pass a function"),
    (lambda p: po.plans.lottery(p, len, Cardinality(count=3), early=3), "early is 3; pass a function"),
], ids=["forward", "loss", "shrink", "train", "early"])  # fmt: skip
def test_what_is_no_function_is_a_type_error(call, says):
    with pytest.raises(TypeError, match=says):
        call({"a": jnp.ones((2, 3))})


def test_training_that_returns_nothing_and_a_temperature_in_words_are_refused():
    p = {"a": jnp.ones((2, 3))}
    with pytest.raises(ValueError, match="train's result has structure"):
        po.plans.lottery(p, lambda p, s: None, Cardinality(count=3), progress=False)
    with pytest.raises(ValueError, match="temperature='a' is not a positive number"):
        po.plans.distil(lambda p, b: b, p, lambda p, b: 0.0, temperature="a")
