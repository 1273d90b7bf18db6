"""`finish` finds its state in whatever holds it: optax's wrappers, train states, NNX, restored checkpoints."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import pruneopt as po
from pruneopt import training
from pruneopt.constraints import Cardinality
from pruneopt.penalties import L1

pytestmark = pytest.mark.default_flags

RNG = np.random.default_rng(0)
HALF = Cardinality(sparsity=0.5)


def draw(*shape):
    return jnp.asarray(RNG.standard_normal(shape), jnp.float32)


PARAMS = {"body": {"kernel": draw(6, 8), "bias": draw(8)}, "head": [{"kernel": draw(8, 3)}]}
X, Y = draw(16, 6), draw(16, 3)
MASK = draw(6, 8) > 0
LABELS = {"body": "prune", "head": "plain"}


def loss(p):
    return jnp.mean((jnp.tanh(X @ p["body"]["kernel"] + p["body"]["bias"]) @ p["head"][0]["kernel"] - Y) ** 2)


ROWS = {
    "freeze": lambda inner: training.freeze(inner, {"body": {"kernel": MASK, "bias": None}, "head": None}),
    "gradual": lambda inner: training.gradual(inner, HALF, end=4, every=1),
    "hard_threshold": lambda inner: training.hard_threshold(inner, HALF, end=4, every=1, hold=1),
    "rigl": lambda inner: training.rigl(inner, HALF, end=4, every=1),
    "straight_through": lambda inner: training.straight_through(inner, HALF),
    "admm": lambda inner: training.admm(inner, HALF, end=4, every=1),
    "proximal": lambda inner: training.proximal(inner, L1(2.0), learning_rate=1e-2),
    "lagrangian": lambda inner: training.lagrangian(inner, HALF, end=4),
}


def train(tx, steps=7):
    params, state = PARAMS, tx.init(PARAMS)

    @jax.jit
    def step(params, state):
        updates, state = tx.update(jax.grad(loss)(params), state, params)
        return optax.apply_updates(params, updates), state

    for _ in range(steps):
        params, state = step(params, state)
    return params, state


def assert_done(done, params):
    """The body is half pruned, the rest is as it was trained."""
    kernel = np.asarray(done.params["body"]["kernel"])
    np.testing.assert_array_equal(kernel != 0, np.asarray(done.support["body"]["kernel"]))
    assert 0 < done.kept < 48
    assert done.support["head"][0]["kernel"] is None
    np.testing.assert_array_equal(done.params["head"][0]["kernel"], params["head"][0]["kernel"])
    assert jax.tree.structure(done.params) == jax.tree.structure(params)


@pytest.mark.parametrize("name", ROWS)
def test_inside_multi_transform(name):
    sparse = ROWS[name](optax.sgd(1e-2))
    params, state = train(optax.multi_transform({"prune": sparse, "plain": optax.sgd(1e-2)}, LABELS))
    done = sparse.finish(params, state)
    assert_done(done, params)


WRAPPED = {
    "masked": lambda tx: optax.masked(tx, {"body": True, "head": [{"kernel": False}]}),
    "chain": lambda tx: optax.chain(
        optax.clip_by_global_norm(1.0), optax.masked(tx, {"body": True, "head": [{"kernel": False}]})
    ),
    "MultiSteps": lambda tx: optax.MultiSteps(
        optax.multi_transform({"prune": tx, "plain": optax.sgd(1e-2)}, LABELS), every_k_schedule=2
    ),
    "apply_if_finite": lambda tx: optax.apply_if_finite(
        optax.multi_transform({"prune": tx, "plain": optax.set_to_zero()}, LABELS), 3
    ),
}


@pytest.mark.parametrize("name", WRAPPED)
def test_inside_other_wrappers(name):
    sparse = ROWS["gradual"](optax.adam(1e-2))
    params, state = train(WRAPPED[name](sparse), steps=13)
    assert_done(sparse.finish(params, state), params)


@pytest.mark.slow
def test_around_multi_steps():
    for inner in (optax.MultiSteps(optax.sgd(1e-2), 2), optax.flatten(optax.adam(1e-2))):
        sparse = training.gradual(inner, HALF, end=4, every=1, leaves="body/kernel")
        params, state = train(sparse)
        assert_done(sparse.finish(params, state), params)
        assert sparse.finish(params, state).kept == 24


def test_flatten_goes_inside():
    with pytest.raises(ValueError, match=r"params is one vector, .*; optax\.flatten goes inside this transformation"):
        optax.flatten(ROWS["gradual"](optax.sgd(1e-2))).init(PARAMS)


def as_restored(tree, lists=dict):
    """What a checkpoint without a target gives back: dictionaries and NumPy arrays."""
    if hasattr(tree, "_asdict"):
        tree = tree._asdict()
    if isinstance(tree, dict):
        return {name: as_restored(part, lists) for name, part in tree.items()}
    if isinstance(tree, (list, tuple)):
        parts = [as_restored(part, lists) for part in tree]
        return {str(i): part for i, part in enumerate(parts)} if lists is dict else parts
    return None if tree is None else np.asarray(tree)


@pytest.fixture(scope="module")
def trained():
    sparse = ROWS["gradual"](optax.adam(1e-2))
    tx = optax.chain(optax.clip(1.0), optax.multi_transform({"prune": sparse, "plain": optax.sgd(1e-2)}, LABELS))
    return sparse, *train(tx)


@pytest.mark.parametrize("lists", [dict, list])
def test_restored_checkpoints(trained, lists):
    sparse, params, state = trained
    expected = sparse.finish(params, state)
    for restored in (params, as_restored(params, list)):
        done = sparse.finish(restored, as_restored(state, lists))
        assert_done(done, params)
        np.testing.assert_array_equal(done.support["body"]["kernel"], expected.support["body"]["kernel"])


def test_a_state_restored_as_lists_of_fields_is_refused(trained):
    sparse, params, state = trained
    fields = jax.tree.leaves(state)
    with pytest.raises(ValueError, match=r"holds 0 states .*; pass .*restore a checkpoint into the structure of init"):
        sparse.finish(params, fields)


def test_two_groups_finish_each_by_itself():
    one, two = ROWS["gradual"](optax.sgd(1e-2)), ROWS["gradual"](optax.sgd(1e-2))
    params, state = train(optax.multi_transform({"prune": one, "plain": two}, LABELS))
    with pytest.raises(ValueError, match=r"holds 2 states .*; pass the one of its own group, such as state\.inner_sta"):
        one.finish(params, state)
    assert_done(one.finish(params, state.inner_states["prune"]), params)
    assert two.finish(params, state.inner_states["plain"]).kept == 12


def test_another_networks_params_are_refused(trained):
    sparse, params, state = trained
    with pytest.raises(ValueError, match=r"state has masks for 'body/kernel' of shape \(6, 8\), params has no leaf"):
        sparse.finish({"head": params["head"]}, state)
    other = {**params, "body": {**params["body"], "kernel": draw(5, 8)}}
    with pytest.raises(
        ValueError, match=r"params has 'body/kernel' of shape \(5, 8\); pass the params that this state"
    ):
        sparse.finish(other, state)


def test_averaged_weights_take_the_support_by_apply(trained):
    sparse, params, state = trained
    average = jax.tree.map(lambda p, q: 0.9 * p + 0.1 * q, params, PARAMS)
    with pytest.raises(ValueError, match=r"averaged \(EMA\) weights take the support by po\.apply\(ema, pruned\)"):
        sparse.finish(average, state)
    done = sparse.finish(params, state)
    applied = po.apply(average, done)
    np.testing.assert_array_equal(applied["body"]["kernel"] != 0, done.support["body"]["kernel"])


@pytest.mark.slow
def test_a_train_state_and_nnx():
    train_state = pytest.importorskip("flax.training.train_state")
    from flax import nnx

    sparse = training.gradual(optax.adam(1e-2), HALF, end=2, every=1)
    ts = train_state.TrainState.create(apply_fn=None, params=PARAMS, tx=optax.chain(optax.clip(1.0), sparse))
    for _ in range(4):
        ts = ts.apply_gradients(grads=jax.grad(loss)(ts.params))
    assert sparse.finish(ts.params, ts).kept == sparse.finish(ts.params, ts.opt_state).kept == 36

    class Net(nnx.Module):
        def __init__(self):
            self.first = nnx.Linear(6, 8, rngs=nnx.Rngs(0))

        def __call__(self, x):
            return self.first(x)

    net = Net()
    optimizer = nnx.Optimizer(net, sparse, wrt=nnx.Param)
    for _ in range(4):
        optimizer.update(net, nnx.grad(lambda net: jnp.mean(net(X) ** 2))(net))
    params = nnx.state(net, nnx.Param)
    for state in (optimizer, optimizer.opt_state, nnx.state(optimizer), nnx.to_pure_dict(nnx.state(optimizer))):
        done = sparse.finish(params, state)
        assert done.kept == 24
        assert jax.tree.structure(done.params) == jax.tree.structure(params)
    assert sparse.finish(nnx.to_pure_dict(params), optimizer.opt_state).kept == 24
