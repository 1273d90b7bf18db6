"""Stages: modelled anew at each, never worse on other examples than the plain cut, shortened where they rise far."""

from itertools import pairwise

import jax
import jax.flatten_util
import jax.numpy as jnp
import numpy as np
import pytest
from cases import tiny_batches, tiny_loss, tree

import pruneopt as po
from pruneopt.constraints import Cardinality
from pruneopt.curvature import Identity
from pruneopt.objectives import Quadratic
from pruneopt.plans import METHODS, Iterative, Method
from pruneopt.solvers import Pursuit, Score

STEPS = (0.0, 1.0, 0.5, 0.25, 0.125)
SHAPES = {"a": (2, 8), "b": (8, 1)}
GOAL = Cardinality(sparsity=0.75, floor=1)


def test_models_are_built_at_the_stage_s_weights_on_the_stage_s_examples():
    seen = []

    def model(network, key):
        seen.append((network.params, len(list(network.batches))))
        return Quadratic(network.chosen, Identity())

    data = tiny_batches((4, 6))
    got = po.plans.staged(
        tiny_loss, tree(1, SHAPES), lambda stage: data[: 1 + stage % 2], GOAL, data,
        method=Method(model, Score(), "magnitude"), schedule=Iterative(4), rise=1e9, progress=False,
    )  # fmt: skip
    assert [n for _, n in seen] == [1, 2, 1, 2]
    assert [h["kept"] for h in got.history] == [int(np.count_nonzero(np.concatenate([np.ravel(x) for x in p.values()])))
                                                for p, _ in seen[1:]] + [got.kept]  # fmt: skip
    assert got.kept == 6
    loss = float(tiny_loss(tree(1, SHAPES), tiny_batches()[0]))
    for stage in got.history:
        assert stage["measured"] == pytest.approx(stage["loss"] - loss)
        assert (stage["shortened"], stage["over"]) == (0, False)
        loss = stage["loss"]
    assert loss == pytest.approx(float(tiny_loss(got.params, tiny_batches()[0])))
    assert got.solutions["*"].stats["measured"] == got.history[-1]["measured"]


@pytest.mark.parametrize("method", ["pursuit_steps", pytest.param("global_steps", marks=pytest.mark.slow)])
def test_a_stage_that_raises_the_loss_too_far_is_shortened_and_the_goal_is_met(method):
    goal = Cardinality(count=3, floor=1)
    data = tiny_batches((5, 5))
    free, careful = (
        po.plans.staged(tiny_loss, tree(1, SHAPES), lambda stage: data, goal, data, method=method,
                        schedule=Iterative(2), rise=rise, progress=False)
        for rise in (1e9, 1.0)
    )  # fmt: skip
    assert len(free.history) == 2
    assert len(careful.history) > 2
    assert any(stage["shortened"] for stage in careful.history)
    kept = 24
    for stage in careful.history:
        assert stage["over"] == (stage["measured"] > 0)
        assert not stage["over"] or stage["shortened"] == 3 or stage["kept"] == kept - 1  # half of one cuts nothing
        kept = stage["kept"]
    assert careful.kept == free.kept == 3
    assert [h["cut"] for h in careful.history] == sorted(h["cut"] for h in careful.history)
    assert all(a["kept"] >= b["kept"] for a, b in pairwise(careful.history))


def test_a_weight_that_costs_too_much_goes_in_one_stage_and_not_in_ever_shorter_ones():
    seen = []

    def model(network, key):
        seen.append(network.params)
        return Quadratic(network.chosen, Identity())

    def loss(params, batch):  # each weight that goes raises it
        return jnp.mean(batch[0]) * 0 + sum(jnp.sum(jnp.where(x == 0, 1.0, 0.0)) for x in params.values())

    data = tiny_batches((5, 5))
    got = po.plans.staged(
        loss, tree(1, SHAPES), lambda stage: data, Cardinality(count=20, floor=1), data,
        method=Method(model, Score(), "magnitude"), schedule=Iterative(2), rise=1.0, progress=False,
    )  # fmt: skip
    assert [h["kept"] for h in got.history] == [23, 22, 21, 20]
    assert all(h["over"] for h in got.history)
    assert len(seen) == 4


@pytest.mark.slow
def test_a_first_step_is_as_much_of_the_model_s_as_other_examples_allow():
    data, others = tiny_batches((8, 2))[0], tiny_batches()[0]
    got = po.plans.staged(tiny_loss, tree(1, SHAPES), lambda stage: [data], Cardinality(sparsity=0.0), [others],
                          method="pursuit_steps", schedule=Iterative(1), rise=1e9, progress=False)  # fmt: skip
    w, unflat = jax.flatten_util.ravel_pytree(tree(1, SHAPES))
    x, y = data
    g = np.stack([jax.grad(lambda v, i=i: tiny_loss(unflat(v), (x[i : i + 1], y[i : i + 1])))(w) for i in range(8)])
    h = g.T @ g / 8
    h += 0.1 * np.trace(h) / len(h) * np.eye(len(h))
    newton = -np.linalg.solve(h, g.mean(0))
    losses = [float(tiny_loss(unflat(w + t * newton), others)) for t in STEPS]
    i = next(i for i in range(1, 5) if losses[i] < losses[0])
    record, t = got.history[0], STEPS[i]
    assert (record["gradient"], record["step"]) == (True, t)
    assert record["loss"] == pytest.approx(losses[i], rel=1e-9)
    step = t * newton
    np.testing.assert_allclose(jax.flatten_util.ravel_pytree(got.params)[0], w + step, rtol=1e-6, atol=1e-8)
    assert record["predicted"] == pytest.approx(g.mean(0) @ step + 0.5 * step @ (g.T @ g / 8) @ step, rel=1e-6)


def few_examples(seed):
    """A linear regression of 24 weights, trained: three noisy examples say little of it. Stages, and 200 others."""
    rng = np.random.default_rng(seed)
    truth = rng.standard_normal(24)

    def examples(n):
        x = rng.standard_normal((n, 24))
        return jnp.asarray(x), jnp.asarray(x @ truth + rng.standard_normal(n))

    def loss(params, batch):
        return jnp.mean((batch[0] @ params["w"].reshape(-1) - batch[1]) ** 2)

    return {"w": jnp.asarray(truth.reshape(4, 6))}, loss, [examples(3) for _ in range(4)], examples(200)


def longest_that_improves(tried):
    """Without the gradient: the first of 1, 1/2, ... below the plain cut; with it: below that and its plain cut."""
    best = (False, 0.0)
    for gradient in (False, True):
        plain = (gradient, 0.0)
        best = plain if tried[plain] < tried[best] else best
        better = [(gradient, t) for t in STEPS[1:] if tried[gradient, t] < tried[best]]
        best = better[0] if better else best
    return best


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.slow
def test_no_stage_is_worse_on_other_examples_than_the_plain_cut_where_the_model_overfits(seed):
    params, loss, stages, others = few_examples(seed)
    at = lambda w: float(loss({"w": w}, others))  # noqa: E731
    solved, starts = [], []

    class Watched(Pursuit):
        def run(self, problem, init, key):
            outcome = super().run(problem, init, key)
            solved.append((len(starts), problem.objective, outcome))
            return outcome

    def model(network, key):
        starts.append(network.params["w"])
        return METHODS["pursuit_steps"].model(network, key)

    got = po.plans.staged(
        loss, params, lambda stage: [stages[stage]], Cardinality(sparsity=0.75, floor=1), [others],
        method=Method(model, Watched(8, 1e-3), "test", dampings=()), schedule=Iterative(4), rise=1e9, leaves="w",
        progress=False,
    )  # fmt: skip
    ends, overfitted = [*starts[1:], got.params["w"]], 0
    for stage, (start, end, record) in enumerate(zip(starts, ends, got.history, strict=True), 1):
        both = [(f.gradient is not None, out) for number, f, out in solved if number == stage]
        assert [gradient for gradient, _ in both] == [False, True]
        tried = {}
        for gradient, out in both:
            plain = np.where(out.support["w"], start, 0.0)
            tried |= {(gradient, t): at(plain + t * (np.asarray(out.value["w"]) - plain)) for t in STEPS}
        overfitted += tried[True, 1.0] > 1.2 * max(tried[True, 0.0], tried[False, 0.0])
        assert record["loss"] == pytest.approx(at(end))
        assert record["loss"] <= min(tried[True, 0.0], tried[False, 0.0]) * (1 + 1e-12)
        assert record["loss"] <= tried[False, 1.0] * (1 + 1e-12)
        assert (record["gradient"], record["step"]) == longest_that_improves(tried)
        assert tried[record["gradient"], record["step"]] == pytest.approx(record["loss"], rel=1e-9)
    assert overfitted > 0  # the case that this is for
    assert got.kept == 6
    last = solved[-1 if got.history[-1]["gradient"] else -2][1]
    assert got.solutions["*"].objective == pytest.approx(last.value(got.params))


def test_a_loss_below_zero_that_falls_is_no_rise():
    data = tiny_batches((5, 5))
    shifted = lambda p, b: tiny_loss(p, b) - jnp.asarray(1e3, b[0].dtype)  # noqa: E731
    got = po.plans.staged(
        shifted, tree(1, SHAPES), lambda stage: data, GOAL, data, method="fisher", schedule=Iterative(3), progress=False
    )
    assert [(h["shortened"], h["over"]) for h in got.history] == 3 * [(0, False)]


def test_bad_input_is_refused():
    data = tiny_batches((5, 5))
    for change, error, message in (
        ({"rise": 0.5}, ValueError, "rise="),
        ({"batches": data}, TypeError, "stage -> batches"),
        ({"constraint": 3}, TypeError, "constraint is 3"),
        ({"method": "wanda"}, ValueError, "goes layer by layer, and this plan needs a model of the loss"),
        ({"method": Score()}, ValueError, r"Method\(model, solver\)"),
        ({"method": ["fisher"]}, ValueError, "is unknown; pass one of random"),
        ({"rise": "2"}, ValueError, "rise='2'"),
        ({"schedule": 15}, TypeError, "schedule is 15"),
        ({"schedule": Iterative}, TypeError, "pass an instance"),
        ({"held_out": [(jnp.full((2, 2), jnp.inf), jnp.zeros((2, 1)))]}, ValueError, "NaN or an infinity"),
    ):
        given = {"batches": lambda stage: data, "constraint": GOAL, "held_out": data, "progress": False} | change
        with pytest.raises(error, match=message):
            po.plans.staged(tiny_loss, tree(1, SHAPES), **given)
