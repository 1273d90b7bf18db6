"""Loops that are cut stay loops: recurrences, scanned layers, and what the batch alone carries."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import pruneopt as po
from pruneopt.program.flatten import flatten

RNG = np.random.default_rng(0)
WIDTH, HIDDEN, LAYERS = 3, 6, 4


def lstm(p, x):
    def step(carry, x):
        h, c = carry
        i, f, g, o = jnp.split(x @ p["in"] + h @ p["hidden"] + p["bias"][None], 4, -1)
        c = jax.nn.sigmoid(f) * c + jax.nn.sigmoid(i) * jnp.tanh(g)
        return (jax.nn.sigmoid(o) * jnp.tanh(c), c), None

    start = jnp.zeros((x.shape[0], p["out"].shape[0]))
    (h, _), _ = jax.lax.scan(step, (start, start), x.swapaxes(0, 1))
    return h @ p["out"]


def gru(p, x):
    def step(h, x):
        r, z = jnp.split(jax.nn.sigmoid(x @ p["in"] + h @ p["hidden"] + p["bias"][None]), 2, -1)
        h = (1 - z) * h + z * jnp.tanh(x @ p["new"] + (r * h) @ p["again"])
        return h, h

    h, every = jax.lax.scan(step, jnp.zeros((x.shape[0], p["out"].shape[0])), x.swapaxes(0, 1), reverse=True)
    return (h + every.sum(0)) @ p["out"]


def layers(p, x):
    """Residual blocks, scanned: one body, stacked weights."""

    def block(h, w):
        return h + jax.nn.gelu(h @ w["up"] + w["bias"][None]) @ w["down"], None

    return jax.lax.scan(block, x[:, 0] @ p["in"], p["layers"])[0] @ p["out"]


def by_number(p, x):
    """The same as a fori_loop that picks its layer by number."""

    def block(i, h):
        w = jax.tree.map(lambda a: a[i], p["layers"])
        return h + jax.nn.gelu(h @ w["up"] + w["bias"][None]) @ w["down"]

    return jax.lax.fori_loop(0, LAYERS, block, x[:, 0] @ p["in"]) @ p["out"]


def recurrent(gates):
    shapes = {"in": (WIDTH, gates * HIDDEN), "hidden": (HIDDEN, gates * HIDDEN), "bias": (gates * HIDDEN,)}
    return {**shapes, "out": (HIDDEN, 2)}


STACKED = {
    "in": (WIDTH, 5),
    "layers": {"up": (LAYERS, 5, HIDDEN), "bias": (LAYERS, HIDDEN), "down": (LAYERS, HIDDEN, 5)},
    "out": (5, 2),
}
NETWORKS = {
    "lstm": (lstm, recurrent(4), [("out", 0)], "bias"),
    "gru": (gru, recurrent(2) | {"new": (WIDTH, HIDDEN), "again": (HIDDEN, HIDDEN)}, [("out", 0)], "bias"),
    "layers": (layers, STACKED, [("layers/up", 2), ("out", 0)], "layers/bias"),
    "by number": (by_number, STACKED, [("layers/up", 2), ("out", 0)], "layers/bias"),
}


def drawn(shapes):
    return jax.tree.map(lambda shape: jnp.asarray(RNG.normal(size=shape)), shapes, is_leaf=lambda s: type(s) is tuple)


@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.cases(1)
def test_a_loop_is_cut_exactly_and_stays_one(name):
    fn, shapes, axes, bias = NETWORKS[name]
    params, x = drawn(shapes), jnp.asarray(RNG.normal(size=(2, 5, WIDTH)))
    units = po.structure.trace(fn, params, x).units()
    kept = {}
    for path, axis in axes:
        (group,) = units.of(path, axis)
        assert not group.blocked
        kept[path, axis] = np.arange(1, group.size, 2)
    small = po.shrink_units(fn, params, x, kept)
    names = dict(po._tree.named_leaves(small.params))
    assert names[bias].shape[-1] == dict(po._tree.named_leaves(params))[bias].shape[-1] // 2
    deleted = small.expand()
    for batch in (x, jnp.asarray(RNG.normal(size=(4, 7, WIDTH)))):
        np.testing.assert_allclose(small.fn(small.params, batch), fn(deleted, batch), rtol=0, atol=1e-12)
    loops = [e for e in jax.make_jaxpr(small.fn)(small.params, x).eqns if e.primitive.name == "scan"]
    assert len(loops) == 1
    gradient = jax.grad(lambda p: jnp.sum(small.fn(p, x) ** 2))(small.params)
    dense = small.shrink_like(jax.grad(lambda p: jnp.sum(fn(p, x) ** 2))(deleted))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=1e-10), gradient, dense)


def test_the_axis_of_scanned_layers_says_what_it_is():
    text = po.structure.trace(layers, drawn(STACKED), jnp.ones((2, 5, WIDTH))).explain("layers/up")
    assert "axis 0 (layer, 4)" in text
    assert "it stacks layers" in text


def test_a_long_recurrence_is_read_without_its_steps():
    params = drawn(recurrent(4))
    assert len(flatten(lstm, params, jnp.ones((2, 1000, WIDTH)), unroll=False).equations) < 20


@pytest.mark.slow
def test_a_loop_whose_steps_differ_by_their_number_is_read_step_by_step():
    def fn(p, x):
        def block(h, both):
            i, w = both
            return jax.lax.cond(i == 1, lambda h: h, lambda h: h + jnp.tanh(h @ w["up"]) @ w["down"], h), None

        return jax.lax.scan(block, x, (jnp.arange(3), p))[0]

    params = drawn({"up": (3, WIDTH, 4), "down": (3, 4, WIDTH)})
    x = jnp.asarray(RNG.normal(size=(2, WIDTH)))
    small = po.shrink_units(fn, params, x, {("up", 2): [0, 3]})
    np.testing.assert_allclose(small.fn(small.params, x), fn(small.expand(), x), rtol=0, atol=1e-12)
