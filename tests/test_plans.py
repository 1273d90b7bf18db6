"""Plans: schedules by their formulas, nested supports, fine-tuning, sensitivity, recalibration, the loss-free mode."""

from itertools import pairwise

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from cases import tiny_batches, tiny_loss, tree

import pruneopt as po
from pruneopt.constraints import NM, Cardinality
from pruneopt.plans import METHODS, CoarseThenFine, Cubic, Iterative, OneShot

SHAPES = {"a": (2, 16), "b": (16, 1)}  # 48 weights, for tiny_loss
SCHEDULES = {"one-shot": OneShot(), "iterative": Iterative(4), "cubic": Cubic(5), "coarse-then-fine": CoarseThenFine()}


def test_schedules_are_their_formulas():
    density = 0.1
    assert [s.cut for s in OneShot().stages(density)] == [1.0]
    np.testing.assert_allclose(
        [1 - 0.9 * s.cut for s in Iterative(4).stages(density)], density ** np.array([0.25, 0.5, 0.75, 1])
    )
    t = np.arange(1, 6) / 5
    np.testing.assert_allclose([0.9 * s.cut for s in Cubic(5).stages(density)], 0.9 - 0.9 * (1 - t) ** 3)
    coarse, *fine = CoarseThenFine(share=0.7, steps=3).stages(density)
    assert coarse.method == "magnitude"
    kept = [1 - 0.9 * s.cut for s in (coarse, *fine)]
    np.testing.assert_allclose(np.diff(np.log(kept)), np.log(density / kept[0]) / 3)
    assert fine[-1].cut == pytest.approx(1)
    assert fine[-1].method is None


def tiny_outputs(params, batch):
    return jnp.tanh(batch[0] @ params["a"]) @ params["b"]


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize(
    "method", [m if m in ("magnitude", "fisher") else pytest.param(m, marks=pytest.mark.slow) for m in METHODS]
)
def test_every_schedule_ends_at_the_count_with_nested_supports(method, schedule):
    supports = []

    def tune(params, support):
        supports.append(support)
        return jax.tree.map(lambda x: x + 1e-3, params)  # puts something where weights were cut

    pruned = po.prune(
        tiny_outputs if method == "synflow" else tiny_loss, tree(1, SHAPES), tiny_batches(),
        Cardinality(sparsity=0.75, floor=1), method=method, schedule=SCHEDULES[schedule], fine_tune=tune,
        progress=False,
    )  # fmt: skip
    assert pruned.kept == 12
    assert sum(int(np.count_nonzero(x)) for x in jax.tree.leaves(pruned.params)) == 12
    assert pruned.history[-1]["sparsity"] == 0.75
    for early, late in pairwise(supports):
        jax.tree.map(lambda e, l: np.testing.assert_array_equal(np.asarray(l) & ~np.asarray(e), False), early, late)


def test_proportional_and_global_budgets_differ_as_they_should():
    params = {"a": tree(1, SHAPES)["a"] * 10, "b": tree(1, SHAPES)["b"]}
    by_leaf = po.prune(None, params, None, Cardinality(sparsity=0.5, per="leaf"), progress=False)
    overall = po.prune(None, params, None, Cardinality(sparsity=0.5, floor=1), progress=False)
    assert [int(m.sum()) for m in jax.tree.leaves(by_leaf.support)] == [16, 8]
    assert int(overall.support["a"].sum()) > 16
    assert overall.kept == by_leaf.kept == 24


def test_magnitude_is_numpy_sorting_and_other_leaves_are_the_same_objects():
    params = {**tree(1, SHAPES), "bias": jnp.ones(3), "f": jnp.tanh, "n": 3}
    pruned = po.prune(None, params, None, Cardinality(count=20, floor=1), progress=False)
    flat = np.concatenate([np.abs(np.ravel(params[k])) for k in "ab"])
    expected = np.zeros(48, bool)
    expected[np.argsort(-flat, kind="stable")[:20]] = True
    np.testing.assert_array_equal(np.concatenate([np.ravel(pruned.support[k]) for k in "ab"]), expected)
    assert all(pruned.params[k] is params[k] for k in ("bias", "f", "n"))
    assert pruned.support["bias"] is None


def test_nm_is_relaxed_step_by_step():
    pruned = po.prune(None, tree(1, SHAPES), None, NM(2, 4, axis=0), leaves="b", schedule=Cubic(3), progress=False)
    assert [h["kept"] for h in pruned.history] == [12, 12, 8]


def test_retrain_between_cuts_lowers_the_loss_and_is_recorded():
    data = tiny_batches((5, 5))
    mean = lambda p: po.objectives.Loss(tiny_loss, p, data, ["a", "b"]).value(p)  # noqa: E731
    pruned = po.prune(
        tiny_loss, tree(1, SHAPES), data, Cardinality(sparsity=0.75, floor=1), method="fisher", schedule=Iterative(2),
        fine_tune=po.plans.retrain(tiny_loss, data, optax.sgd(0.05), epochs=20), evaluate=mean, progress=False,
    )  # fmt: skip
    for stage in pruned.history:
        assert stage["tuned"] < stage["pruned"]
    assert pruned.history[-1]["tuned"] == pytest.approx(mean(pruned.params))


@pytest.mark.slow
def test_sensitivity_is_the_loss_of_each_leaf_pruned_alone():
    params, data = tree(1, SHAPES), tiny_batches((4, 6))
    levels = (0.25, 0.75)
    got = po.plans.sensitivity(tiny_loss, params, data, levels, progress=False)
    assert got.dense == pytest.approx(float(tiny_loss(params, tiny_batches()[0])))
    for name, leaf in params.items():
        for level, value in zip(levels, got.losses[name], strict=True):
            keep = int(np.floor((1 - level) * leaf.size + 1e-9))
            order = np.argsort(-np.abs(np.ravel(leaf)), kind="stable")[:keep]
            alone = np.zeros(leaf.size)
            alone[order] = np.ravel(leaf)[order]
            expected = tiny_loss({**params, name: jnp.asarray(alone.reshape(leaf.shape))}, tiny_batches()[0])
            assert value == pytest.approx(float(expected), rel=1e-12)
    assert "75%" in str(got)
    assert len(got.plot().get_lines()) == 3


@pytest.mark.slow
def test_sensitivity_to_a_leaf_does_not_see_what_a_method_moved_elsewhere():
    params, data = tree(1, SHAPES), tiny_batches((4, 6))
    got = po.plans.sensitivity(tiny_loss, params, data, (0.5,), method="m_fac", progress=False)
    for name in params:
        constraint = Cardinality(sparsity=0.5)
        alone = po.prune(tiny_loss, params, data, constraint, method="m_fac", leaves=[name], progress=False)
        assert got.losses[name][0] == pytest.approx(float(tiny_loss(alone.params, tiny_batches()[0])), rel=1e-9)


def test_recalibration_finds_the_mean_whatever_the_momentum_and_the_old_value():
    params = {"w": jnp.ones((2, 2)), "bn": {"mean": jnp.full(2, 7.0), "var": jnp.full(2, 9.0), "scale": jnp.ones(2)}}
    data = [jnp.asarray(x) for x in np.split(np.random.default_rng(0).standard_normal((10, 2)), [4, 7])]
    for momentum in (0.0, 0.5, 0.99):

        def updates(p, x, m=momentum):
            h = x @ p["w"]
            new = {"mean": m * p["bn"]["mean"] + (1 - m) * h.mean(0), "var": m * p["bn"]["var"] + (1 - m) * h.var(0)}
            return {"w": None, "bn": {**new, "scale": None}}

        got = po.plans.recalibrate(updates, params, data)
        weights = np.array([4, 3, 3]) / 10
        means = np.array([np.mean(x @ np.ones((2, 2)), 0) for x in data])
        variances = np.array([np.var(x @ np.ones((2, 2)), 0) for x in data])
        np.testing.assert_allclose(got["bn"]["mean"], weights @ means, rtol=1e-9)
        np.testing.assert_allclose(got["bn"]["var"], weights @ variances, rtol=1e-9)
        assert got["w"] is params["w"]
        assert got["bn"]["scale"] is params["bn"]["scale"]


def test_lossless_removes_the_free_weights_and_keeps_the_tolerance():
    rng = np.random.default_rng(2)
    params = {"a": jnp.asarray(rng.standard_normal((2, 16))), "b": jnp.asarray(rng.standard_normal((16, 1)))}
    params["b"] = params["b"].at[:10].set(0.0)  # ten units that feed nothing: 10 + 20 weights are free
    data = tiny_batches((5, 5))
    free = po.plans.lossless(tiny_loss, params, data, progress=False)
    loss = po.objectives.Loss(tiny_loss, params, data, ["a", "b"])
    assert loss.value(free.params) <= loss.value(params)
    assert free.kept <= 18
    loose = po.plans.lossless(tiny_loss, params, data, tolerance=0.5, progress=False)
    assert loose.kept < free.kept
    assert loss.value(loose.params) <= loss.value(params) + 0.5
    assert loose.history[0]["count"] == 24


@pytest.mark.slow
def test_lossless_gives_back_the_trained_weights_where_a_method_only_raises_the_loss():
    def rising(params, batch):
        return jnp.mean(batch[0][:, 0] ** 2) * jnp.sum(jnp.abs(params["a"] - trained["a"]))

    def wrong(network, key):  # a model whose minimum is elsewhere, even with nothing removed
        return po.objectives.Quadratic(network.chosen, po.curvature.Identity(), {"a": jnp.ones((2, 16)), "b": None})

    trained = tree(1, SHAPES)
    row = po.plans.Method(wrong, po.solvers.GlobalADMM(), "a test")
    got = po.plans.lossless(rising, trained, tiny_batches(), method=row, leaves="a", progress=False)
    assert (got.kept, got.history[-1]["rise"] > 0) == (32, True)
    np.testing.assert_array_equal(got.params["a"], trained["a"])


def test_the_bar_is_off_by_a_keyword(capsys):
    for progress in (True, False):
        po.prune(None, tree(1, SHAPES), None, Cardinality(sparsity=0.5, floor=1), progress=progress)
        text = capsys.readouterr()
        assert ("prune" in text.err) is progress
        assert text.out == ""
