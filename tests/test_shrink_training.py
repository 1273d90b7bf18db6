"""Predict, loss and train step are cut alike: new values of leaves shrink with them, and training goes on."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import pruneopt as po
from pruneopt.delivery.smaller import difference

RNG = np.random.default_rng(0)
MOMENTUM, EPSILON = 0.9, 1e-5
SHAPES = {"w1": (5, 8), "scale": (8,), "shift": (8,), "w2": (8, 6), "b2": (6,), "w3": (6, 3)}
KEPT = np.array([0, 2, 3, 6])


@pytest.fixture
def params():
    weights = {name: jnp.asarray(RNG.normal(size=shape)) for name, shape in SHAPES.items()}
    return {"weights": weights, "statistics": {"mean": jnp.zeros(8), "var": jnp.ones(8)}}


@pytest.fixture
def batch():
    return {"x": jnp.asarray(RNG.normal(size=(16, 5))), "y": jnp.asarray(RNG.integers(0, 3, 16))}


def forward(p, x, training):
    """(logits, new statistics): batch norm between two layers."""
    w, held = p["weights"], p["statistics"]
    h = x @ w["w1"]
    mean, var = (h.mean(0), h.var(0)) if training else (held["mean"], held["var"])
    new = {"mean": mean, "var": var}
    new = jax.tree.map(lambda old, one: MOMENTUM * old + (1 - MOMENTUM) * one, held, new) if training else held
    h = (h - mean[None]) / jnp.sqrt(var[None] + EPSILON) * w["scale"][None] + w["shift"][None]
    h = jax.nn.relu(jax.nn.relu(h) @ w["w2"] + w["b2"][None])
    return h @ w["w3"], new


def predict(p, batch):
    return forward(p, batch["x"], False)[0]


def loss(p, batch):
    logits, new = forward(p, batch["x"], True)
    own = jnp.take_along_axis(jax.nn.log_softmax(logits), batch["y"][:, None], 1)
    return -own.mean(), {"statistics": new}


def deleted(small, params):
    return small.expand(small.shrink_like(params))


def test_new_statistics_are_cut_as_the_old_ones_are(params, batch):
    small = po.shrink_units(loss, params, batch, {("weights/w1", 1): KEPT})
    assert small.params["statistics"]["mean"].shape == (4,)
    value, new = jax.jit(small.fn)(small.params, batch)
    expected, dense = loss(deleted(small, params), batch)
    np.testing.assert_allclose(value, expected, rtol=1e-12)
    for name in ("mean", "var"):
        np.testing.assert_allclose(new["statistics"][name], dense["statistics"][name][KEPT], rtol=1e-12)


@pytest.mark.slow
def test_predict_loss_and_step_are_cut_alike_and_training_goes_on(params, batch):
    small = po.shrink_units(predict, params, batch, {("weights/w1", 1): KEPT, ("weights/w2", 1): [0, 1, 4]})
    small_loss = small.of(loss, batch)
    optimizer = optax.sgd(0.1, momentum=0.9)

    def train(fn, params):
        state = optimizer.init(params["weights"])
        for _ in range(5):
            objective = lambda w, p: fn({**p, "weights": w}, batch)  # noqa: E731
            (_, new), gradient = jax.value_and_grad(objective, has_aux=True)(params["weights"], params)
            moves, state = optimizer.update(gradient, state)
            params = {"weights": optax.apply_updates(params["weights"], moves), **new}
        return params

    mine = train(small_loss, small.params)
    by_hand = small.shrink_like(deleted(small, params))  # the same function runs at the smaller widths
    theirs = train(loss, by_hand)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-10, atol=1e-12), mine, theirs)
    logits = small.fn(mine, batch)
    np.testing.assert_allclose(logits, predict(mine, batch), rtol=1e-10)


@pytest.mark.slow
def test_a_step_that_returns_all_params_is_cut(params, batch):
    def step(p, batch):
        (value, new), gradient = jax.value_and_grad(lambda p: loss(p, batch), has_aux=True)(p)
        moved = jax.tree.map(lambda w, g: w - 0.1 * g, p["weights"], gradient["weights"])
        return {"weights": moved, **new}, value

    small = po.shrink_units(predict, params, batch, {("weights/w2", 1): [0, 1, 4]})
    taken, value = jax.jit(small.of(step, batch))(small.params, batch)
    by_hand, expected = step(small.shrink_like(params), batch)
    np.testing.assert_allclose(value, expected, rtol=1e-12)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-10, atol=1e-12), taken, by_hand)


def test_features_that_are_returned_still_block(params, batch):
    def features(p, batch):
        return {"w1": jnp.abs(batch["x"] @ p["weights"]["w1"]).sum(0)}

    with pytest.raises(ValueError, match="it is an output of fn"):
        po.shrink_units(features, params, batch, {("weights/w1", 1): KEPT})


@pytest.mark.parametrize(
    ("after", "apart"),
    [([1j, 2.0], 0.0), ([1j, 2.0 + 1e-3j], 5e-4), ([-1j, 2.0], 1.0), ([np.nan, 2.0], np.nan)],
)
def test_the_difference_of_complex_outputs_sees_both_parts(after, apart):
    np.testing.assert_allclose(difference([np.array([1j, 2.0])], [np.array(after, complex)]), apart, rtol=1e-12)


def test_what_is_not_finite_alike_does_not_differ():
    a = np.array([np.nan, np.inf, 4.0])
    assert difference([a], [a]) == 0
    assert difference([a], [np.array([np.nan, np.inf, 5.0])]) == 0.25
    assert np.isnan(difference([np.array([1.0]), a], [np.array([np.nan]), a]))


class TestRunsAsIs:
    """Whether the user's own function computes the same of the smaller leaves."""

    def test_where_no_number_comes_from_a_width(self, params, batch):
        small = po.shrink_units(predict, params, batch, {("weights/w1", 1): KEPT})
        assert small.runs_as_is(batch)

    def test_not_where_a_mean_divides_by_what_it_finds(self):
        def rms(p, x):
            h = x @ p["w1"]
            return h / jnp.sqrt((h**2).mean(-1, keepdims=True)) @ p["w2"]

        params = {"w1": jnp.asarray(RNG.normal(size=(5, 8))), "w2": jnp.asarray(RNG.normal(size=(8, 3)))}
        x = jnp.asarray(RNG.normal(size=(4, 5)))
        small = po.shrink_units(rms, params, x, {("w1", 1): KEPT})
        assert small.error < 1e-12
        assert not small.runs_as_is(x)

    def test_not_where_a_width_is_written_down(self):
        def heads(p, x):
            return jnp.tanh((x @ p["w1"]).reshape(x.shape[0], 2, 4)).sum(1) @ p["w2"]

        params = {"w1": jnp.asarray(RNG.normal(size=(5, 8))), "w2": jnp.asarray(RNG.normal(size=(4, 3)))}
        x = jnp.asarray(RNG.normal(size=(4, 5)))
        small = po.shrink_units(heads, params, x, {("w2", 0): [1, 2]})
        assert not small.runs_as_is(x)


def test_the_operator_where_two_programs_part_is_named(params, batch, monkeypatch):
    monkeypatch.setattr("pruneopt.delivery.smaller.TOLERANCE", -1.0)
    with pytest.raises(ValueError, match=r"they part at dot_general \(16 x 8\), which reads 'weights/w1'"):
        po.shrink_units(predict, params, batch, {("weights/w1", 1): KEPT})


def test_weights_that_are_not_finite_are_refused(params, batch):
    params["weights"]["w1"] = params["weights"]["w1"].at[0, 0].set(jnp.nan)
    with pytest.raises(ValueError, match=r"leaf 'weights/w1' holds a NaN"):
        po.shrink_units(predict, params, batch, {("weights/w1", 1): KEPT})


def test_a_branch_without_units_vanishes_from_the_program():
    def fn(p, x):
        h = x @ p["in"]
        h = h + jax.nn.gelu(h @ p["up"]) @ p["down"]
        return h @ p["out"]

    shapes = {"in": (5, 4), "up": (4, 8), "down": (8, 4), "out": (4, 2)}
    params = {name: jnp.asarray(RNG.normal(size=shape)) for name, shape in shapes.items()}
    x = jnp.asarray(RNG.normal(size=(3, 5)))
    small = po.shrink_units(fn, params, x, {("up", 1): []})
    names = [e.primitive.name for e in jax.make_jaxpr(small.fn)(small.params, x).eqns]
    assert names == ["dot_general", "dot_general"]
    np.testing.assert_allclose(small.fn(small.params, x), x @ params["in"] @ params["out"], rtol=1e-12)


def test_a_function_of_a_derivative_of_its_own_leaves_what_it_was_given_alone():
    """The identity with a gradient of its own: what else reads its input keeps the plain one."""

    @jax.custom_vjp
    def reverse(x):
        return x

    reverse.defvjp(lambda x: (x, None), lambda _, g: (-g,))

    def fn(p, x):
        h = x @ p["w1"]
        return (reverse(h) + 3.0 * h) @ p["w2"]

    params = {"w1": jnp.asarray(RNG.normal(size=(5, 8))), "w2": jnp.asarray(RNG.normal(size=(8, 3)))}
    x = jnp.asarray(RNG.normal(size=(4, 5)))
    small = po.shrink_units(fn, params, x, {("w1", 1): KEPT})
    mine = jax.grad(lambda p: small.fn(p, x).sum())(small.params)
    dense = small.shrink_like(jax.grad(lambda p: fn(p, x).sum())(small.expand()))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-12), mine, dense)


class TestState:
    """Caches in the batch are cut along."""

    @pytest.fixture
    def decoder(self):
        shapes = {"q": (4, 6), "k": (4, 6), "v": (4, 6), "o": (6, 4), "out": (4, 3)}
        return {name: jnp.asarray(RNG.normal(size=shape)) for name, shape in shapes.items()}

    @staticmethod
    def decode(p, batch):
        """One token: two heads of three, attending to what is held."""
        x, cache, at = batch["x"], batch["cache"], batch["at"]
        n = x.shape[0]
        split = lambda name: (x @ p[name]).reshape(n, 1, 2, 3)  # noqa: E731
        where = (jnp.int32(0), at, jnp.int32(0), jnp.int32(0))
        new = {name: jax.lax.dynamic_update_slice(cache[name], split(name), where) for name in ("k", "v")}
        scores = jnp.einsum("nqhd,nkhd->nhqk", split("q"), new["k"])
        held = jnp.arange(cache["k"].shape[1], dtype=at.dtype) <= at
        weights = jax.nn.softmax(jnp.where(held[None, None, None], scores, -1e9))
        mixed = jnp.einsum("nhqk,nkhd->nqhd", weights, new["v"]).reshape(n, 6)
        return (x + mixed @ p["o"]) @ p["out"], new

    def start(self, n=2):
        cache = {"k": jnp.zeros((n, 5, 2, 3)), "v": jnp.zeros((n, 5, 2, 3))}
        return {"x": jnp.asarray(RNG.normal(size=(n, 4))), "cache": cache, "at": jnp.int32(0)}

    def cut(self, decoder):
        heads = np.repeat([True, False], 3)
        return po.shrink_units(self.decode, decoder, self.start(), {("o", 0): heads}, state={"cache": "1"})

    def test_a_head_and_its_cache_go_and_steps_are_the_dense_ones(self, decoder):
        small = self.cut(decoder)
        assert small.params["k"].shape == (4, 3)
        mine = small.shrink_batch(dense := self.start(3))
        assert mine["cache"]["k"].shape == (3, 5, 1, 3)
        step, deleted = jax.jit(small.fn), small.expand()
        for at in range(3):
            x = {"x": jnp.asarray(RNG.normal(size=(3, 4))), "at": jnp.int32(at)}
            got, new = step(small.params, {**mine, **x})
            want, whole = self.decode(deleted, {**dense, **x})
            np.testing.assert_allclose(got, want, rtol=1e-12)
            np.testing.assert_allclose(new["v"], whole["v"][:, :, :1], rtol=1e-12)
            mine, dense = {**mine, "cache": new}, {**dense, "cache": whole}

    def test_whether_it_runs_as_is_is_asked_of_a_batch_with_the_smaller_cache(self, decoder):
        assert not self.cut(decoder).runs_as_is(self.start())  # the heads are written down in fn

        def two_wide(p, batch):
            h = jnp.tanh(batch["h"] @ p["w"] + batch["x"] @ p["u"])
            return h @ p["o"], h

        params = {n: jnp.asarray(RNG.normal(size=s)) for n, s in {"w": (5, 5), "u": (4, 5), "o": (5, 3)}.items()}
        batch = {"h": jnp.zeros((2, 5)), "x": jnp.asarray(RNG.normal(size=(2, 4)))}
        small = po.shrink_units(two_wide, params, batch, {("o", 0): [0, 2]}, state={"h": "1"})
        assert small.runs_as_is(batch)

    def test_it_is_saved_and_loaded(self, decoder, tmp_path):
        small = self.cut(decoder)
        po.save(small, tmp_path / "small.safetensors")
        like = jax.eval_shape(lambda: decoder)
        again = po.load_smaller(tmp_path / "small.safetensors", self.decode, like)
        batch = self.start()
        got = again.fn(again.params, again.shrink_batch(batch))
        want = small.fn(small.params, small.shrink_batch(batch))
        jax.tree.map(np.testing.assert_array_equal, got, want)

    def test_without_a_name_the_cache_bars_the_heads(self, decoder):
        with pytest.raises(ValueError, match="it is an axis of the batch"):
            po.shrink_units(self.decode, decoder, self.start(), {("o", 0): np.repeat([True, False], 3)})

    def test_names_that_are_not_there(self, decoder):
        with pytest.raises(ValueError, match=r"state: 'caches' -> '1' names no arrays of the batch"):
            po.shrink_units(self.decode, decoder, self.start(), {("o", 0): [0]}, state={"caches": "1"})
