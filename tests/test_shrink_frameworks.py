"""Networks of four frameworks in train mode: batch norm's new statistics are cut along, beside the loss."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import pruneopt as po

pytestmark = pytest.mark.default_flags

RNG = np.random.default_rng(0)
IMAGE = {"x": RNG.normal(size=(4, 8, 8, 3)).astype("float32"), "y": RNG.integers(0, 4, 4)}
KEPT = np.arange(0, 8, 2)


def linen():
    nn = pytest.importorskip("flax.linen")

    class Net(nn.Module):
        @nn.compact
        def __call__(self, x, training):
            x = nn.relu(nn.BatchNorm(use_running_average=not training)(nn.Conv(8, (3, 3), use_bias=False)(x)))
            return nn.Dense(4)(nn.relu(nn.Conv(8, (3, 3))(x)).mean((1, 2)))

    net = Net()
    params = net.init(jax.random.key(0), IMAGE["x"], False)

    def loss(p, batch):
        out, new = net.apply(p, batch["x"], True, mutable=["batch_stats"])
        return jnp.mean(out**2), new

    return loss, params, ("params/Conv_0/kernel", 3), lambda new: new["batch_stats"]["BatchNorm_0"]["mean"]


def nnx():
    nnx = pytest.importorskip("flax.nnx")

    class Net(nnx.Module):
        def __init__(self, rngs):
            self.conv = nnx.Conv(3, 8, (3, 3), rngs=rngs)
            self.norm, self.out = nnx.BatchNorm(8, rngs=rngs), nnx.Linear(8, 4, rngs=rngs)

        def __call__(self, x):
            return self.out(jax.nn.relu(self.norm(self.conv(x))).mean((1, 2)))

    graph, params = nnx.split(Net(nnx.Rngs(0)))

    def loss(p, batch):
        net = nnx.merge(graph, p)
        out = net(batch["x"])
        return jnp.mean(out**2), nnx.state(net)

    path = next(path for path, _ in po._tree.named_leaves(params) if path.startswith("conv/kernel"))
    return loss, params, (path, 3), lambda new: new["norm"]["mean"][...]


def keras():
    keras = pytest.importorskip("keras")
    layers = keras.layers
    net = keras.Sequential(
        [
            layers.Input((8, 8, 3)),
            layers.Conv2D(8, 3, use_bias=False),
            layers.BatchNormalization(),
            layers.ReLU(),
            layers.GlobalAveragePooling2D(),
            layers.Dense(4),
        ]
    )
    params = [[v.value for v in net.trainable_variables], [v.value for v in net.non_trainable_variables]]

    def loss(p, batch):
        out, new = net.stateless_call(p[0], p[1], batch["x"], training=True)
        return jnp.mean(out**2), new

    return loss, params, ("0/0", 3), lambda new: new[0]


@pytest.mark.slow
@pytest.mark.parametrize("made", [linen, nnx, keras])
def test_statistics_shrink_beside_the_loss(made):
    loss, params, (path, axis), mean = made()
    small = po.shrink_units(loss, params, IMAGE, {(path, axis): KEPT})
    value, new = jax.jit(small.fn)(small.params, IMAGE)
    expected, dense = jax.jit(loss)(small.expand(), IMAGE)
    np.testing.assert_allclose(value, expected, rtol=1e-5)
    np.testing.assert_allclose(mean(new), np.asarray(mean(dense))[KEPT], rtol=1e-5, atol=1e-7)
    assert not np.allclose(mean(new), 0)


def test_a_module_with_functions_among_its_leaves():
    equinox = pytest.importorskip("equinox")
    net = equinox.nn.MLP(5, 3, 8, 1, key=jax.random.key(0))
    x = RNG.normal(size=(6, 5)).astype("float32")

    def fn(net, x):
        return jax.vmap(net)(x)

    small = po.shrink_units(fn, net, x, {("layers/0/weight", 0): [1, 2, 5]})
    assert small.params.layers[0].weight.shape == (3, 5)
    np.testing.assert_allclose(small.fn(small.params, x), fn(small.expand(), x), rtol=1e-5, atol=1e-6)
