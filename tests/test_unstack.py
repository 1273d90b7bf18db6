"""Stacked layers taken apart: the same function, and a width of its own for each layer."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import pruneopt as po

pytestmark = pytest.mark.default_flags
RNG = np.random.default_rng(0)
LAYERS, WIDTH, HIDDEN = 3, 4, 6


@pytest.fixture(autouse=True)
def double():
    with jax.enable_x64(True):
        yield


def block(x, layer):
    h = jax.nn.relu(x @ layer["up"] + layer["b"])
    return x + h @ layer["down"], jnp.mean(h)


def scanned(p, x):
    y, means = jax.lax.scan(block, x @ p["in"], p["layers"])
    return y @ p["out"], means


def reversed_and_recomputed(p, x):
    layers = jax.tree.map(lambda w: w.astype(jnp.float32).astype(jnp.float64), p["layers"])
    return jax.lax.scan(jax.checkpoint(block), x @ p["in"], layers, reverse=True)[0] @ p["out"]


def counted(p, x):
    step = lambda i, x: block(x, jax.tree.map(lambda w: w[i], p["layers"]))[0]  # noqa: E731
    return jax.lax.fori_loop(0, LAYERS, step, x @ p["in"]) @ p["out"]


def written_out(p, x):
    x = x @ p["in"]
    for i in range(LAYERS):
        x = block(x, jax.tree.map(lambda w, i=i: w[i], p["layers"]))[0]
    return x @ p["out"]


def scanned_over_time(p, x):
    """A recurrence of scanned layers in each of its steps, and a table of positions, of which none is a layer."""

    def step(h, inputs):
        token, place = inputs
        h = jax.lax.scan(block, jnp.tanh(h + token @ p["in"] + place), p["layers"])[0]
        return h, h

    start = jnp.zeros((len(x), WIDTH))
    times = jnp.broadcast_to(x, (len(p["places"]), *x.shape))
    return jax.lax.scan(step, start, (times, p["places"]))[1] @ p["out"]


def normal(*shape):
    return jnp.asarray(RNG.normal(size=shape))


def drawn():
    shapes = {"up": (WIDTH, HIDDEN), "b": (HIDDEN,), "down": (HIDDEN, WIDTH)}
    return {
        "in": normal(5, WIDTH),
        "layers": {name: normal(LAYERS, *shape) for name, shape in shapes.items()},
        "out": normal(WIDTH, 2),
        "places": normal(7, WIDTH),
        "name": "blocks",
    }


EVERY = pytest.mark.parametrize("fn", [scanned, reversed_and_recomputed, counted, written_out, scanned_over_time])


@EVERY
@pytest.mark.cases(5)
def test_it_computes_what_the_stacked_network_does(fn):
    params, x = drawn(), normal(8, 5)
    found = po.structure.unstack(fn, params, x)
    assert found.layers == {f"layers/{name}": LAYERS for name in ("b", "down", "up")}
    assert found.params["in"] is params["in"]
    expected = jax.tree.leaves(fn(params, x[:3]))
    for a, b in zip(
        expected,
        jax.tree.leaves(
            jax.jit(lambda p: found.fn({**p, "name": "blocks"}, x[:3]))(
                {k: v for k, v in found.params.items() if k != "name"}
            )
        ),
        strict=True,
    ):
        np.testing.assert_allclose(a, b, rtol=1e-12, atol=1e-12)


@EVERY
@pytest.mark.cases(2)
def test_its_gradient_is_the_stacked_one(fn):
    params, x = drawn(), normal(8, 5)
    found = po.structure.unstack(fn, params, x)

    def gradient(fn, params):
        layers = params["layers"]
        loss = lambda layers: jnp.sum(jax.tree.leaves(fn({**params, "layers": layers}, x))[0] ** 2)  # noqa: E731
        return {"layers": jax.grad(loss)(layers)}

    theirs = found.split(gradient(fn, params))
    for a, b in zip(jax.tree.leaves(theirs), jax.tree.leaves(gradient(found.fn, found.params)), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-10, atol=1e-10)


@EVERY
@pytest.mark.cases(2)
def test_each_layer_is_cut_to_a_width_of_its_own(fn):
    params, x = drawn(), normal(8, 5)
    masks = jax.tree.map(lambda w: np.ones(w.shape, bool) if hasattr(w, "shape") else w, params)
    gone = ([1], [], [0, 2, 3, 5])
    for i, units in enumerate(gone):
        masks["layers"]["up"][i][:, units] = masks["layers"]["b"][i][units] = masks["layers"]["down"][i][units] = False
    masks = {name: masks["layers"][name] for name in ("up", "b", "down")}
    found = po.structure.unstack(fn, params, x)
    chosen = {**jax.tree.map(lambda _: None, params), "layers": masks}
    small = po.shrink(found.fn, found.params, x, found.split(chosen))
    assert [leaf.shape for leaf in small.params["layers"]["up"]] == [(WIDTH, 5), (WIDTH, 6), (WIDTH, 2)]
    assert small.error < 1e-12
    zeroed = {**params, "layers": {name: w * masks[name] for name, w in params["layers"].items()}}
    for a, b in zip(jax.tree.leaves(fn(zeroed, x)), jax.tree.leaves(small.fn(small.params, x)), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-12, atol=1e-12)


def test_stacked_networks_are_cut_to_one_width():
    params, x = drawn(), normal(8, 5)
    groups = po.structure.trace(scanned, params, x).units().of("layers/up", 2)
    assert [group.size for group in groups] == [HIDDEN]


def test_layers_of_linen_s_scan():
    nn = pytest.importorskip("flax.linen")

    class Block(nn.Module):
        @nn.compact
        def __call__(self, x, _):
            h = nn.relu(nn.Dense(HIDDEN)(nn.LayerNorm()(x)))
            return x + nn.Dense(WIDTH)(h), None

    class Net(nn.Module):
        @nn.compact
        def __call__(self, x):
            blocks = nn.scan(Block, variable_axes={"params": 0}, split_rngs={"params": True}, length=LAYERS)
            return blocks(name="blocks")(x, None)[0]

    x = normal(8, WIDTH)
    params = Net().init(jax.random.key(0), x)
    found = po.structure.unstack(Net().apply, params, x)
    np.testing.assert_allclose(found.fn(found.params, x), Net().apply(params, x), rtol=1e-12)
    kernel = "params/blocks/Dense_0/kernel"
    small = po.shrink_units(found.fn, found.params, x, {(f"{kernel}/0", 1): [0, 1], (f"{kernel}/2", 1): range(4)})
    kernels = small.params["params"]["blocks"]["Dense_0"]["kernel"]
    assert [leaf.shape[1] for leaf in kernels] == [2, 6, 4]


def test_rows_of_a_table_are_no_layers():
    def fn(p, x):
        return x @ p["w"] + p["types"][0] - p["types"][1]

    with pytest.raises(ValueError, match="nothing needs to be unstacked"):
        po.structure.unstack(fn, {"w": normal(5, 4), "types": normal(2, 4)}, normal(8, 5))


def test_a_leaf_that_is_one_array_elsewhere_stays_stacked():
    def regularised(p, x):
        return scanned(p, x)[0], jnp.linalg.norm(p["layers"]["b"])

    params, x = drawn(), normal(8, 5)
    found = po.structure.unstack(regularised, params, x)
    assert set(found.layers) == {"layers/up", "layers/down"}
    for a, b in zip(regularised(params, x), found.fn(found.params, x), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-12)


def test_nothing_to_unstack_is_said():
    with pytest.raises(ValueError, match="nothing needs to be unstacked"):
        po.structure.unstack(lambda p, x: jax.vmap(lambda w: x @ w)(p["w"]), {"w": normal(3, 5, 2)}, normal(4, 5))


def test_layers_cut_by_hand_name_what_runs_them():
    params, x = drawn(), normal(8, 5)
    found = po.structure.unstack(scanned, params, x)
    found.params["layers"]["up"][0] = found.params["layers"]["up"][0][:, :2]
    with pytest.raises(ValueError, match="SmallerNetwork"):
        found.fn(found.params, x)
