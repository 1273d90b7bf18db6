"""What a model foresaw beside what the loss did, and damping chosen on examples that the method does not read."""

import dataclasses

import jax
import jax.flatten_util
import jax.numpy as jnp
import numpy as np
import pytest
from cases import tiny_batches, tiny_loss, tree

import pruneopt as po
from pruneopt.constraints import Cardinality, L1Ball
from pruneopt.curvature import Identity, sampled_fisher
from pruneopt.objectives import Quadratic
from pruneopt.plans import METHODS, Iterative, Method, SoftmaxGaussNewton
from pruneopt.plans.judged import DAMPINGS, judged
from pruneopt.solvers import FAST, ProximalGradient, Score
from pruneopt.structure import Network

SHAPES = {"a": (2, 8), "b": (8, 1)}
GOAL = Cardinality(sparsity=0.5, floor=1)


def train():
    return tiny_batches((6, 4))[0]


def other():
    return tiny_batches((6, 4))[1]


def logits(params, batch):
    return jnp.tanh(batch[0] @ params["a"]) @ params["b"]


def gradients(params, batch):
    w, back = jax.flatten_util.ravel_pytree(params)
    x, y = batch
    return np.stack(
        [jax.grad(lambda v, i=i: tiny_loss(back(v), (x[i : i + 1], y[i : i + 1])))(w) for i in range(len(x))]
    )


def pruned(method, held_out=None, batches=None, **given):
    batches = tiny_batches((6, 4)) if batches is None else batches
    return po.prune(
        tiny_loss, tree(1, SHAPES), batches, GOAL, method=method, held_out=held_out, progress=False, **given
    )


@pytest.mark.parametrize("held_out", [False, True])
@pytest.mark.parametrize("method", ["fisher", "taylor", "m_fac"])
@pytest.mark.slow
def test_predicted_is_the_model_s_and_measured_the_loss_s(method, held_out):
    got = pruned(method, [other()] if held_out else None)
    batch = other() if held_out else train()
    g = gradients(tree(1, SHAPES), tiny_batches()[0])
    d = jax.flatten_util.ravel_pytree(got.params)[0] - jax.flatten_util.ravel_pytree(tree(1, SHAPES))[0]
    model = {
        "fisher": lambda: 0.5 * np.sum(np.mean(g**2, 0) * d**2),
        "taylor": lambda: np.mean(g, 0) @ d,
        "m_fac": lambda: 0.5 * np.mean((g @ d) ** 2),
    }
    record = got.history[0]
    assert record["predicted"] == pytest.approx(float(model[method]()), rel=1e-9)
    assert record["measured"] == pytest.approx(
        float(tiny_loss(got.params, batch) - tiny_loss(tree(1, SHAPES), batch)), rel=1e-12
    )
    stats = got.solutions["*"].stats
    assert (stats["predicted"], stats["measured"]) == (record["predicted"], record["measured"])


@pytest.mark.slow
def test_each_stage_is_measured_from_where_it_started():
    got = pruned("fisher", [other()], schedule=Iterative(3))
    total = sum(h["measured"] for h in got.history)
    assert total == pytest.approx(float(tiny_loss(got.params, other()) - tiny_loss(tree(1, SHAPES), other())))


def test_a_model_that_is_not_of_the_loss_foresees_nothing():
    for method in ("magnitude", "grasp"):
        assert "predicted" not in pruned(method, [other()]).history[0]


def test_held_out_examples_choose_the_damping():
    row = METHODS["pursuit"]

    def loss_with(damping):
        def model(*given):
            found = row.model(*given)
            return Quadratic(found.center, found.curvature, damping=damping)

        alone = pruned(Method(model, row.solver, "pursuit"), batches=[train()])
        return float(tiny_loss(alone.params, other()))

    losses = [loss_with(d) for d in DAMPINGS]
    assert max(losses) > 1.001 * min(losses)
    got = pruned("pursuit", [other()], batches=[train()])
    assert got.history[0]["damping"] == DAMPINGS[int(np.argmin(losses))]
    assert float(tiny_loss(got.params, other())) == pytest.approx(min(losses))
    assert pruned("pursuit", batches=[train()]).history[0]["damping"] == 0.01
    staged = po.plans.staged(
        tiny_loss, tree(1, SHAPES), lambda stage: [train()], GOAL, [other()], method="pursuit", schedule=Iterative(1),
        rise=1e9, progress=False,
    )  # fmt: skip
    assert staged.history[0]["loss"] <= min(losses) * (1 + 1e-9)  # of the same models, and shorter steps to each


@pytest.mark.slow
def test_a_shorter_step_that_breaks_a_bound_on_values_is_left_out():
    w, g = {"w": jnp.full((2, 2), 2.0)}, {"w": jnp.full((2, 2), 1.0)}
    loss = po.objectives.Loss(lambda p, b: jnp.mean((p["w"] - b) ** 2), w, [jnp.full((2, 2), 2.0)], leaves="w")
    model = Quadratic(w, Identity(), g)  # its step is away from where the loss is least
    for ball, step in ((L1Ball(9.0), 0), (L1Ball(7.0), 1)):  # the weights as they are have norm 8
        got, value = judged([model], ball, ProximalGradient(), loss, 0.0, jax.random.key(0), (0.0, 1.0))
        assert got.stats["step"] == step
        assert got.status.is_usable
        assert value == pytest.approx(step, abs=1e-9)


@dataclasses.dataclass(frozen=True)
class Picky(Score):
    """A solver that small dampings are too little for."""

    least: float = 0.02

    def run(self, problem, init, key):
        if problem.objective.damping < self.least:
            raise ValueError(f"damping={problem.objective.damping}: leaf 'a' would collapse")
        return super().run(problem, init, key)


def test_a_damping_that_cannot_be_solved_is_skipped_unless_all_are():
    model = METHODS["pursuit"].model
    assert pruned(Method(model, Picky(), "test"), [other()]).history[0]["damping"] in (0.03, 0.1)
    with pytest.raises(ValueError, match=r"damping=0\.001: leaf 'a'"):
        pruned(Method(model, Picky(least=1.0), "test"), [other()])


@pytest.mark.slow
def test_held_out_examples_choose_the_damping_layer_by_layer():
    given = {"leaves": "a", "batches": [train()]}
    direct = po.plans.layerwise(
        tiny_loss, tree(1, SHAPES), [train()], GOAL, FAST, held_out=[other()], leaves="a", progress=False,
    )  # fmt: skip
    got = pruned("fast", [other()], **given)
    assert got.history[0]["layers"][0]["damping"] == direct.layers[0]["damping"]
    np.testing.assert_allclose(got.params["a"], direct.params["a"], rtol=1e-9, atol=1e-12)
    assert pruned("wanda", [other()], **given).history[0]["layers"][0]["damping"] == 0  # Wanda has none to choose


def test_rows_check_their_parts():
    model = METHODS["pursuit"].model
    with pytest.raises(ValueError, match=r"dampings=\(0.1, -1\) is no number >= 0 and no sequence"):
        Method(model, Score(), dampings=(0.1, -1))
    with pytest.raises(TypeError, match="solver is 'score'; pass a pruneopt Solver"):
        Method(model, "score")


def test_a_seed_may_be_a_numpy_integer():
    one, other_one = (pruned("random", key=key).params for key in (3, np.int64(3)))
    jax.tree.map(np.testing.assert_array_equal, one, other_one)


@pytest.mark.parametrize("method", ["fisher", "m_fac", "global"])
def test_numpy_weights_come_back_as_numpy(method):
    params = jax.tree.map(np.asarray, tree(1, SHAPES))
    got = po.prune(tiny_loss, params, tiny_batches(), GOAL, method=method, progress=False).params
    assert all(type(leaf) is np.ndarray for leaf in got.values())


@pytest.mark.slow
def test_the_softmax_gauss_newton_is_the_dense_one():
    params = {"a": tree(1)["a"][:2], "b": tree(2, {"b": (tree(1)["a"].shape[1], 3)})["b"]}
    w, back = jax.flatten_util.ravel_pytree(params)
    model = SoftmaxGaussNewton(logits, temperature=2.0, share=0.25, damping=0.1)
    key = jax.random.key(3)
    found = model(Network.of(None, params, tiny_batches((6, 4))), key)
    h = np.zeros((w.size, w.size))
    for x, y in tiny_batches((6, 4)):
        jacobian = jax.jacobian(lambda v, x=x, y=y: logits(back(v), (x, y)))(w)
        p = jax.nn.softmax(logits(params, (x, y)) / 2, axis=-1)
        bend = jnp.stack([jnp.diag(row) - jnp.outer(row, row) for row in p])  # T^2 and 1 / T^2 cancel
        h += np.einsum("nip,nij,njq->pq", jacobian, bend, jacobian) / 10
    cooled = lambda params, batch: logits(params, batch) / 2  # noqa: E731
    sampled = sampled_fisher(cooled, params, tiny_batches((6, 4)), ["a", "b"], key=key)
    diagonal = 4 * np.mean(np.asarray(sampled.gradients) ** 2, axis=0)
    dense = 0.75 * h + 0.25 * np.diag(diagonal)
    product = [jax.flatten_util.ravel_pytree(found.curvature.mv(back(v)))[0] for v in jnp.eye(w.size)]
    np.testing.assert_allclose(product, dense, rtol=1e-9, atol=1e-12)
    assert float(found.ridge()) == pytest.approx(0.1 * diagonal.mean())


@pytest.mark.slow
def test_the_gauss_newton_row_prunes_a_sequence_classifier():
    rng = np.random.default_rng(0)
    params = {"w": jnp.asarray(rng.standard_normal((6, 12))), "v": jnp.asarray(rng.standard_normal((12, 4)))}
    batch = (jnp.asarray(rng.standard_normal((8, 5, 6))), jnp.asarray(rng.integers(0, 4, (8, 5))))
    network = lambda p, b: jnp.tanh(b[0] @ p["w"]) @ p["v"]  # noqa: E731

    def loss(p, b):
        return -jnp.mean(jnp.take_along_axis(jax.nn.log_softmax(network(p, b)), b[1][..., None], axis=-1))

    goal = Cardinality(sparsity=0.5)
    teacher = (batch[0], jnp.argmax(network(params, batch), axis=-1))
    ours, magnitude = (
        po.prune(loss, params, [teacher], goal, method=method, progress=False).params
        for method in (po.plans.gauss_newton(network), "magnitude")
    )
    assert float(loss(ours, teacher)) < float(loss(magnitude, teacher))


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: po.plans.gauss_newton(3), TypeError, "logits is 3; pass the network"),
        (lambda: po.plans.gauss_newton(logits, temperature=0), ValueError, "temperature=0"),
        (lambda: pruned(po.plans.gauss_newton(tiny_loss)), ValueError, "logits returns .*pass the network"),
        (
            lambda: pruned(po.plans.gauss_newton(lambda p, b: 0 * logits(p, b))),
            ValueError,
            "outputs is zero everywhere",
        ),
        (lambda: pruned("fisher", [(jnp.full((2, 2), jnp.nan), jnp.zeros((2, 1)))]), ValueError, "held_out: batch 0"),
        (
            lambda: po.prune(
                lambda p, b: tiny_loss(p, b) * jnp.where(jnp.max(b[0]) > 90, jnp.nan, 1.0),
                tree(1, SHAPES),
                [train()],
                GOAL,
                method="fisher",
                held_out=[other(), (99 + other()[0], other()[1])],
                progress=False,
            ),
            ValueError,
            "held_out: batch 1: fn returns nan",
        ),
        (lambda: pruned("fisher", iter([other()])), TypeError, "held_out is a one-shot iterator"),
        (lambda: pruned("fisher", []), ValueError, "held_out is empty"),
        (lambda: pruned("grasp", iter([other()])), TypeError, "held_out is a one-shot iterator"),
        (lambda: pruned(["fisher"]), ValueError, "is unknown"),
        (lambda: pruned("fisher", key="a"), TypeError, "key is 'a'"),
        (lambda: pruned("fast", []), ValueError, "held_out is empty"),
    ],
)
def test_bad_input_is_refused(make, error, message):
    with pytest.raises(error, match=message):
        make()
