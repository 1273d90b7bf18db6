"""Small real networks of every framework, trained on digits and pruned through the public API alone.

To add a framework, write a builder that returns a `Network` and add it to `NETWORKS`.
"""

from __future__ import annotations

import functools
import itertools
import math
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from sklearn.datasets import load_digits

import pruneopt as po

pytestmark = [pytest.mark.default_flags, pytest.mark.slow]

Tree = Any
Weights = dict[str, Any]

SPARSITY = 0.5
BATCH, EPOCHS = 128, 12
KEY = jax.random.key(0, impl="unsafe_rbg")  # compiles fastest
ADAM = optax.adam(1e-2)
MOMENTUM = optax.sgd(0.05, momentum=0.9)  # one object: the library compiles anew for each optimiser object


def digits() -> list[tuple[np.ndarray, np.ndarray]]:
    """Three batches of 128 images (8, 8, 1) in [0, 1], and their labels."""
    data = load_digits()
    images = (data.images[: 3 * BATCH, :, :, None] / 16).astype(np.float32)
    labels = data.target[: 3 * BATCH].reshape(3, BATCH)
    return list(zip(images.reshape(3, BATCH, 8, 8, 1), labels, strict=True))


BATCHES = digits()
IMAGES, LABELS = (np.concatenate(part) for part in zip(*BATCHES, strict=True))


def tokens(images):
    """The 17 grey levels, for networks that embed them."""
    return jnp.round(16 * images[..., 0]).astype(jnp.int32)


@jax.jit
def cross_entropy(logits, labels):
    return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()


def named(tree: Tree) -> dict[str, Any]:
    """{path: leaf}."""
    leaves, _ = jax.tree_util.tree_flatten_with_path(tree)
    return {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in leaves}


def bits(leaf: Any) -> Any:
    """A copy of an array's (or key array's) numbers; anything else is itself."""
    if isinstance(leaf, jax.Array) and jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
        leaf = jax.random.key_data(leaf)
    return np.array(leaf) if isinstance(leaf, (jax.Array, np.ndarray)) else leaf


def snapshot(tree: Tree) -> dict[str, Any]:
    """{path: a deep copy of the leaf}."""
    return {path: bits(leaf) for path, leaf in named(tree).items()}


def same(old: Any, new: Any) -> bool:
    """Whether two results of `bits` agree to the bit."""
    if isinstance(old, np.ndarray):
        return old.dtype == new.dtype and old.shape == new.shape and old.tobytes() == new.tobytes()
    return old is new


def moved(old: dict[str, Any], new: dict[str, Any]) -> set[str]:
    """Paths at which two snapshots differ."""
    assert list(old) == list(new)
    return {path for path in old if not same(old[path], new[path])}


@functools.cache
def loss_of(logits: Callable[[Tree, Any], Any]) -> Callable[[Tree, Any], Any]:
    """One loss a network: the library compiles anew for each function object."""
    return lambda params, batch: cross_entropy(logits(params, batch[0]), batch[1])


@dataclass(eq=False)
class Network:
    """A trained network and what the tests must know about it, all through its framework's own API.

    params: what the user hands to pruneopt. logits(params, images): stateless evaluation.
    train(params, batch) -> (loss, updates): training mode; updates has None at what the optimiser moves.
    weights(params): {path: kernel}, the leaves to be pruned by default, in leaf order, paths written by hand.
    put(params, weights): params with these kernels.
    model(params): images -> logits, by the framework's own object.
    sliced: patterns for the layers whose outputs may go; sliced_paths: theirs, in leaf order.
    in_axis, out_axis: of a kernel. trained: which leaves `retrain` moves, None for its default.
    moments(params, images): {path: statistics of one batch}, by hand.
    """

    params: Tree
    logits: Callable[[Tree, Any], Any]
    train: Callable[[Tree, Any], Any]
    weights: Callable[[Tree], Weights]
    put: Callable[[Tree, Weights], Tree]
    model: Callable[[Tree], Callable[[Any], Any]]
    sliced: tuple[str, ...]
    sliced_paths: tuple[str, ...]
    in_axis: int = -2
    out_axis: int = -1
    trained: Callable[[str, Any], bool] | None = None
    moments: Callable[[Tree, Any], Weights] | None = None

    def __post_init__(self) -> None:
        self.loss = loss_of(self.logits)
        self.before = snapshot(self.params)
        self.taken = {path: np.array(w) for path, w in self.weights(self.params).items()}

    def mean_loss(self, params: Tree) -> float:
        return float(cross_entropy(jnp.asarray(self.model(params)(IMAGES)), LABELS))

    def accuracy(self, params: Tree) -> float:
        return float(np.mean(np.argmax(self.model(params)(IMAGES), axis=-1) == LABELS))

    def retrain(self, **choice: Any) -> Callable[[Tree, Tree], Tree]:
        if self.trained is not None:
            choice = {"trained": self.trained, **choice}
        return po.plans.retrain(self.train, BATCHES, MOMENTUM, has_updates=True, **choice)


# ------------------------------------------------------------------------------------------- the frameworks


def fit(train: Callable[[Tree, Tree, Any], Any], weights: Tree, state: Tree) -> tuple[Tree, Tree]:
    """Adam on train(weights, state, batch) -> (loss, state)."""

    @jax.jit
    def step(weights, state, moments, batch):
        gradient, state = jax.grad(lambda w: train(w, state, batch), has_aux=True)(weights)
        change, moments = ADAM.update(gradient, moments)
        return optax.apply_updates(weights, change), state, moments

    moments = ADAM.init(weights)
    for _, batch in itertools.product(range(EPOCHS), BATCHES):
        weights, state, moments = step(weights, state, moments, batch)
    return weights, state


def conv_moments(embedding, kernel, bias, images):
    """Mean and variance, over a batch and its positions, of a 3x3 convolution of stride 2, padding SAME."""
    x = np.asarray(embedding, np.float64)[np.asarray(tokens(images))]
    x = np.pad(x, ((0, 0), (0, 1), (0, 1), (0, 0)))  # SAME for 8 -> 4 pads one pixel after
    kernel, y = np.asarray(kernel, np.float64), 0.0
    for i, j in itertools.product(range(3), range(3)):
        y = y + x[:, i : i + 7 : 2, j : j + 7 : 2] @ kernel[i, j]
    y = y + np.asarray(bias, np.float64)
    return y.mean((0, 1, 2)), y.var((0, 1, 2))


def linen() -> Network:
    """{"params": ..., "batch_stats": ...}, as `init` returns them."""
    from flax import linen as nn

    class Net(nn.Module):
        @nn.compact
        def __call__(self, x, train):
            x = nn.Embed(17, 4)(tokens(x))
            x = nn.Conv(8, (3, 3), strides=2)(x)
            x = nn.relu(nn.BatchNorm(use_running_average=not train, momentum=0.9)(x))
            x = nn.relu(nn.Dense(16)(x.reshape(x.shape[0], -1)))
            return nn.Dense(10)(x)

    net = Net()

    def step(weights, stats, batch):
        variables = {"params": weights, "batch_stats": stats}
        logits, new = net.apply(variables, batch[0], True, mutable=["batch_stats"])
        return cross_entropy(logits, batch[1]), new["batch_stats"]

    def train(params, batch):
        loss, stats = step(params["params"], params["batch_stats"], batch)
        return loss, {"params": None, "batch_stats": stats}

    def weights(params):
        layers = ("Conv_0", "Dense_0", "Dense_1")
        return {f"params/{layer}/kernel": params["params"][layer]["kernel"] for layer in layers}

    def put(params, new):
        layers = dict(params["params"])
        for path, kernel in new.items():
            layer = path.split("/")[1]
            layers[layer] = {**layers[layer], "kernel": kernel}
        return {**params, "params": layers}

    def moments(params, images):
        embed, conv = params["params"]["Embed_0"], params["params"]["Conv_0"]
        mean, var = conv_moments(embed["embedding"], conv["kernel"], conv["bias"], images)
        return {"batch_stats/BatchNorm_0/mean": mean, "batch_stats/BatchNorm_0/var": var}

    evaluate = jax.jit(lambda params, x: net.apply(params, x, False))
    start = jax.jit(net.init, static_argnums=2)(KEY, IMAGES[:1], False)
    trained, stats = fit(step, start["params"], start["batch_stats"])
    return Network(
        params={"params": trained, "batch_stats": stats},
        logits=evaluate,
        train=train,
        weights=weights,
        put=put,
        model=lambda params: lambda x: evaluate(params, x),
        sliced=("params/Conv_*/kernel", "*/Dense_0/kernel"),
        sliced_paths=("params/Conv_0/kernel", "params/Dense_0/kernel"),
        moments=moments,
    )


def nnx() -> Network:
    """`nnx.state(model)`: parameters, batch statistics, and dropout's keys and counters in one tree."""
    from flax import nnx

    class Net(nnx.Module):
        def __init__(self, rngs):
            self.embed = nnx.Embed(17, 4, rngs=rngs)
            self.conv = nnx.Conv(4, 8, (3, 3), strides=2, rngs=rngs)
            self.bn = nnx.BatchNorm(8, momentum=0.9, rngs=rngs)
            self.dense = nnx.Linear(128, 16, rngs=rngs)
            self.drop = nnx.Dropout(0.1, rngs=rngs)
            self.head = nnx.Linear(16, 10, rngs=rngs)

        def __call__(self, x):
            x = nnx.relu(self.bn(self.conv(self.embed(tokens(x)))))
            x = nnx.relu(self.dense(x.reshape(x.shape[0], -1)))
            return self.head(self.drop(x))

    net = nnx.jit(lambda: Net(nnx.Rngs(KEY)))()
    graph, start, rest = nnx.split(net, nnx.Param, ...)

    def loss_and_rest(live, batch):
        live.train()
        loss = cross_entropy(live(batch[0]), batch[1])
        return loss, nnx.state(live, nnx.Not(nnx.Param))

    def step(weights, rest, batch):
        return loss_and_rest(nnx.merge(graph, weights, rest, copy=True), batch)

    def train(params, batch):
        loss, rest = loss_and_rest(nnx.merge(graph, params), batch)
        weights = nnx.filter_state(params, nnx.Param)
        return loss, nnx.merge_state(jax.tree.map(lambda _: None, weights), rest)

    @jax.jit
    def evaluate(params, x):
        live = nnx.merge(graph, params)
        live.eval()
        return live(x)

    def weights(params):
        live = nnx.merge(graph, params)
        layers = {name: getattr(live, name) for name in ("conv", "dense", "head")}
        return {f"{name}/kernel/value": layer.kernel[...] for name, layer in layers.items()}

    def put(params, new):
        live = nnx.merge(graph, params, copy=True)
        for path, kernel in new.items():
            getattr(live, path.split("/")[0]).kernel = nnx.Param(jnp.asarray(kernel))
        return nnx.state(live)

    def moments(params, images):
        live = nnx.merge(graph, params)
        conv = live.conv
        mean, var = conv_moments(live.embed.embedding[...], conv.kernel[...], conv.bias[...], images)
        return {"bn/mean/value": mean, "bn/var/value": var}

    def trained(path, leaf):
        return jnp.issubdtype(leaf.dtype, jnp.floating) and not path.startswith(("bn/mean", "bn/var"))

    nnx.update(net, *fit(step, start, rest))
    return Network(
        params=nnx.state(net),
        logits=evaluate,
        train=train,
        weights=weights,
        put=put,
        model=lambda params: lambda x: evaluate(params, x),
        sliced=("conv/kernel/*", "dense/*kernel*"),
        sliced_paths=("conv/kernel/value", "dense/kernel/value"),
        trained=trained,
        moments=moments,
    )


def equinox() -> Network:
    """(model, state): functions, a dropout rate and flags are leaves; kernels are (out, in, ...)."""
    import equinox as eqx

    class Net(eqx.Module):
        embed: eqx.nn.Embedding
        conv: eqx.nn.Conv2d
        norm: eqx.nn.BatchNorm
        drop: eqx.nn.Dropout
        mlp: eqx.nn.MLP

        def __init__(self, key):
            a, b, c = jax.random.split(key, 3)
            self.embed = eqx.nn.Embedding(17, 4, key=a)
            self.conv = eqx.nn.Conv2d(4, 8, 3, 2, 1, key=b)
            self.norm = eqx.nn.BatchNorm(8, axis_name="batch", momentum=0.9, mode="ema")
            self.drop = eqx.nn.Dropout(0.1)
            self.mlp = eqx.nn.MLP(128, 10, 16, 1, key=c)

        def __call__(self, x, state, key):
            x = jnp.moveaxis(self.embed.weight[tokens(x)], -1, 0)
            x, state = self.norm(self.conv(x), state)
            x = self.drop(jax.nn.relu(x).ravel(), key=key)
            return self.mlp(x), state

    net, state = eqx.filter_jit(eqx.nn.make_with_state(Net))(KEY)
    start, static = eqx.partition(net, eqx.is_inexact_array)

    def call(net, state, images):
        keys = jax.random.split(KEY, images.shape[0])
        return jax.vmap(net, axis_name="batch", in_axes=(0, None, 0), out_axes=(0, None))(images, state, keys)

    def train(params, batch):
        logits, state = call(*params, batch[0])
        return cross_entropy(logits, batch[1]), (None, state)

    def step(weights, state, batch):
        loss, (_, state) = train((eqx.combine(weights, static), state), batch)
        return loss, state

    def kernels(net):
        return [net.conv.weight, net.mlp.layers[0].weight, net.mlp.layers[1].weight]

    def put(params, new):
        return eqx.tree_at(kernels, params[0], [jnp.asarray(new[path]) for path in paths]), params[1]

    paths = ("0/conv/weight", "0/mlp/layers/0/weight", "0/mlp/layers/1/weight")
    evaluate = eqx.filter_jit(lambda params, x: call(eqx.nn.inference_mode(params[0]), params[1], x)[0])
    trained, state = fit(step, start, state)
    return Network(
        params=(eqx.combine(trained, static), state),
        logits=evaluate,
        train=train,
        weights=lambda params: dict(zip(paths, kernels(params[0]), strict=True)),
        put=put,
        model=lambda params: lambda x: evaluate(params, x),
        sliced=("*/conv/weight", "0/mlp/layers/0/weight"),
        sliced_paths=paths[:2],
        in_axis=1,
        out_axis=0,
        trained=lambda path, leaf: path.startswith("0/") and eqx.is_inexact_array(leaf),
    )


def keras() -> Network:
    """{variable.path: value}, with the integer seeds of dropout."""
    import keras

    keras.utils.clear_session()  # names count on from what other tests of this process made
    keras.utils.set_random_seed(0)
    inputs = keras.Input((8, 8), dtype="int32")
    x = keras.layers.Embedding(17, 4, name="embed")(inputs)
    x = keras.layers.Conv2D(8, 3, 2, "same", name="conv")(x)
    x = keras.layers.BatchNormalization(momentum=0.9, name="bn")(x)
    x = keras.layers.Flatten()(keras.layers.ReLU()(x))
    x = keras.layers.Dense(16, "relu", name="dense")(x)
    x = keras.layers.Dropout(0.1, seed=1)(x)
    net = keras.Model(inputs, keras.layers.Dense(10, name="head")(x))
    weight_paths = [v.path for v in net.trainable_variables]
    state_paths = [v.path for v in net.non_trainable_variables]

    def step(weights, state, batch):
        logits, state = net.stateless_call(weights, state, tokens(batch[0]), training=True)
        return cross_entropy(logits, batch[1]), state

    def split(params):
        return [params[path] for path in weight_paths], [params[path] for path in state_paths]

    def train(params, batch):
        loss, state = step(*split(params), batch)
        return loss, {**dict.fromkeys(weight_paths), **dict(zip(state_paths, state, strict=True))}

    def model(params):
        def run(x):
            for variable in net.variables:
                variable.assign(params[variable.path])
            return net(tokens(x), training=False)

        return run

    def moments(params, images):
        layer = (params["embed/embeddings"], params["conv/kernel"], params["conv/bias"])
        mean, var = conv_moments(*layer, images)
        return {"bn/moving_mean": mean, "bn/moving_variance": var}

    kernels = ("conv/kernel", "dense/kernel", "head/kernel")
    weights, state = split({v.path: v.value for v in net.variables})
    weights, state = fit(step, weights, state)
    return Network(
        params=dict(zip(weight_paths + state_paths, weights + state, strict=True)),
        logits=jax.jit(lambda params, x: net.stateless_call(*split(params), tokens(x), training=False)[0]),
        train=train,
        weights=lambda params: {path: params[path] for path in kernels},
        put=lambda params, new: {**params, **new},
        model=model,
        sliced=("dense/kernel", "conv/kernel"),
        sliced_paths=("conv/kernel", "dense/kernel"),
        moments=moments,
    )


@functools.cache
def arrays() -> Network:
    """A dictionary of JAX arrays: biases and scales with two axes, and an integer counter."""

    def run(params, x):
        x = x.reshape(x.shape[0], -1) * params["input_scale"].ravel()
        x = jnp.concatenate([x, x * x], axis=1)
        x = jax.nn.relu(x @ params["hidden"]["w"] + params["hidden"]["bias"])
        return x @ params["head"]["w"] + params["head"]["bias"]

    def train(params, batch):
        loss = cross_entropy(run(params, batch[0]), batch[1])
        return loss, {**dict.fromkeys(params), "steps": params["steps"] + 1}

    def step(weights, steps, batch):
        loss, updates = train({**weights, "steps": steps}, batch)
        return loss, updates["steps"]

    draw = np.random.default_rng(0)
    start = {
        "hidden": {"w": draw.normal(0, 0.1, (128, 16)), "bias": np.zeros((1, 16))},
        "head": {"w": draw.normal(0, 0.2, (16, 10)), "bias": np.zeros((1, 10))},
        "input_scale": np.ones((8, 8)),
    }
    weights, steps = fit(step, jax.tree.map(jnp.float32, start), jnp.int32(0))
    evaluate = jax.jit(run)
    return Network(
        params={**weights, "steps": steps},
        logits=evaluate,
        train=train,
        weights=lambda params: {f"{layer}/w": params[layer]["w"] for layer in ("head", "hidden")},
        put=lambda params, new: {**params, **{p[:-2]: {**params[p[:-2]], "w": w} for p, w in new.items()}},
        model=lambda params: lambda x: evaluate(params, x),
        sliced=("hidden/*w",),
        sliced_paths=("hidden/w",),
    )


def numpy_arrays() -> Network:
    """The same dictionary of NumPy arrays."""
    net = arrays()
    return replace(net, params=jax.tree.map(np.array, net.params))


NETWORKS: dict[str, Callable[[], Network]] = {
    "linen": linen,
    "nnx": nnx,
    "equinox": equinox,
    "keras": keras,
    "jax-arrays": arrays,
    "numpy-arrays": numpy_arrays,
}

built = functools.cache(lambda name: NETWORKS[name]())


@pytest.fixture(scope="module", params=NETWORKS)
def network(request) -> Network:
    return built(request.param)


# -------------------------------------------------------------------------------------------------- pruning

CARRIED = {
    "nnx": ["drop/rngs/key/value", "drop/rngs/count/value"],
    "equinox": ["0/mlp/activation", "0/mlp/final_activation", "0/drop/p", "0/norm/inference", "1/0"],
    "keras": ["seed_generator/seed_generator_state"],
    "numpy-arrays": ["steps"],
}
COUNTERS = {"steps", "drop/rngs/count/value"}
FIXED = {"drop/rngs/key/value", "1/0"}  # dropout's key, and Equinox's flag for the first step
METHODS = ("magnitude", "taylor", "fisher", "obd")
SCOPES = ("tree", "leaf")


@functools.cache
def pruned_by(network: Network, method: str, per: str) -> po.Pruned:
    constraint = po.constraints.Cardinality(sparsity=SPARSITY, per=per)
    return po.prune(network.loss, network.params, BATCHES, constraint, method=method, progress=False)


QUICK = {("magnitude", "tree"), ("fisher", "leaf")}
CASES = [
    pytest.param(pair, id="-".join(pair), marks=[] if pair in QUICK else pytest.mark.slow)
    for pair in itertools.product(METHODS, SCOPES)
]


@pytest.fixture(scope="module", params=CASES)
def case(network, request) -> tuple[str, po.Pruned]:
    method, per = request.param
    return per, pruned_by(network, method, per)


def budget(size: int, sparsity: float = SPARSITY) -> int:
    return math.floor((1 - sparsity) * size + 1e-9)


def top(scores: Weights, per: str) -> dict[str, np.ndarray]:
    """Masks of the largest half, by NumPy's argsort."""
    flat = {path: np.asarray(s).ravel() for path, s in scores.items()}
    groups = [list(flat)] if per == "tree" else [[path] for path in flat]
    masks = {}
    for group in groups:
        joined = np.concatenate([flat[path] for path in group])
        mask = np.zeros(joined.size, bool)
        mask[np.argsort(-joined, kind="stable")[: budget(joined.size)]] = True
        parts = np.split(mask, np.cumsum([flat[path].size for path in group])[:-1])
        for path, part in zip(group, parts, strict=True):
            masks[path] = part.reshape(scores[path].shape)
    return masks


def assert_untouched(network: Network) -> None:
    assert moved(network.before, snapshot(network.params)) == set()


def test_network_learns(network):
    assert network.accuracy(network.params) > 0.9


def test_the_prunable_leaves_are_chosen(network, case):
    _, pruned = case
    assert list(named(pruned.support)) == list(network.taken)
    assert jax.tree.structure(pruned.params) == jax.tree.structure(network.params)


def test_counts_are_met_to_the_unit(network, case):
    per, pruned = case
    zeros = {path: int(np.sum(np.asarray(w) == 0)) for path, w in network.weights(pruned.params).items()}
    sizes = {path: w.size for path, w in network.taken.items()}
    assert not any(np.any(w == 0) for w in network.taken.values())
    total = sum(sizes.values())
    if per == "tree":
        assert sum(zeros.values()) == total - budget(total)
    else:
        assert zeros == {path: n - budget(n) for path, n in sizes.items()}
    assert pruned.kept == total - sum(zeros.values())


def test_kept_weights_keep_their_bits_and_types(network, case):
    _, pruned = case
    old, new, support = named(network.params), named(pruned.params), named(pruned.support)
    for path, before in network.taken.items():
        mask = np.asarray(support[path])
        assert same(np.where(mask, before, np.float32(0)), bits(new[path]))
        assert type(new[path]) is type(old[path])


def test_other_leaves_are_the_same_objects(network, case):
    _, pruned = case
    old, new = named(network.params), named(pruned.params)
    assert list(new) == list(old)
    assert [path for path in new if path not in network.taken and new[path] is not old[path]] == []


@pytest.mark.parametrize(("network", "paths"), CARRIED.items(), indirect=["network"])
def test_keys_counters_seeds_and_functions_are_carried(network, paths):
    pruned = named(pruned_by(network, "fisher", "tree").params)
    for path in paths:
        leaf = named(network.params)[path]
        assert pruned[path] is leaf
        assert not (hasattr(leaf, "dtype") and jnp.issubdtype(leaf.dtype, jnp.floating))


@pytest.mark.usefixtures("case")
def test_params_are_untouched(network):
    assert_untouched(network)


def test_the_framework_runs_the_pruned_network(network, case):
    _, pruned = case
    masks = named(pruned.support)
    by_hand = {path: np.where(np.asarray(masks[path]), w, np.float32(0)) for path, w in network.taken.items()}
    theirs = network.model(network.put(network.params, by_hand))(IMAGES)
    ours = network.model(pruned.params)(IMAGES)
    np.testing.assert_array_equal(np.asarray(ours), np.asarray(theirs))
    assert network.accuracy(pruned.params) == np.mean(np.argmax(theirs, axis=-1) == LABELS)


def test_masks_go_onto_other_params(network):
    pruned = pruned_by(network, "magnitude", "leaf")
    masks = {path: np.asarray(mask) for path, mask in named(pruned.support).items()}
    for again in (po.apply(network.params, pruned), po.from_masks(network.params, masks).params):
        assert jax.tree.structure(again) == jax.tree.structure(network.params)
        assert moved(snapshot(pruned.params), snapshot(again)) == set()


@pytest.mark.parametrize("per", SCOPES)
def test_magnitude_is_numpys_argsort(network, per):
    expected = top({path: np.abs(w) for path, w in network.taken.items()}, per)
    found = named(pruned_by(network, "magnitude", per).support)
    for path, mask in expected.items():
        np.testing.assert_array_equal(np.asarray(found[path]), mask)


@pytest.mark.parametrize("network", [name for name in NETWORKS if name != "numpy-arrays"], indirect=True)
def test_taylor_and_fisher_keep_the_largest_scores(network):
    def loss(weights, image, label):
        logits = network.logits(network.put(network.params, weights), image[None])
        return cross_entropy(logits, label[None])

    @jax.jit
    def moments(weights):
        each = jax.vmap(jax.grad(loss), (None, 0, 0))(weights, IMAGES, LABELS)
        return [jax.tree.map(lambda g, p=p: jnp.mean(g**p, axis=0), each) for p in (1, 2)]

    gradient, fisher = moments({path: jnp.asarray(w) for path, w in network.taken.items()})
    scores = {
        "taylor": {path: np.abs(np.asarray(gradient[path]) * w) for path, w in network.taken.items()},
        "fisher": {path: np.asarray(fisher[path]) * w * w for path, w in network.taken.items()},
    }
    for method, per in itertools.product(scores, SCOPES):
        score, found = scores[method], named(pruned_by(network, method, per).support)
        expected = top(score, per)
        differ = sum(int(np.sum(np.asarray(found[path]) != mask)) for path, mask in expected.items())
        assert differ <= 4, (method, per)  # rounding swaps weights at the threshold
        kept = sum(float(np.sum(score[path], where=np.asarray(found[path]), dtype=float)) for path in score)
        best = sum(float(np.sum(score[path], where=expected[path], dtype=float)) for path in score)
        assert kept == pytest.approx(best, rel=1e-5), (method, per)


def test_two_of_four_along_the_inputs(network):
    axis = "in" if network.in_axis == -2 else network.in_axis
    constraint = po.constraints.NM(2, 4, axis)
    pruned = po.prune(None, network.params, None, constraint, leaves=network.sliced, progress=False)
    assert tuple(named(pruned.support)) == network.sliced_paths
    after = network.weights(pruned.params)
    for path, before in network.taken.items():
        expected = np.moveaxis(before, network.in_axis, -1)
        if path in network.sliced_paths:
            groups = expected.reshape(-1, 4)
            worst = np.argsort(np.abs(groups), axis=1)[:, :2]
            kept = np.ones(groups.shape, bool)
            np.put_along_axis(kept, worst, False, axis=1)
            expected = np.where(kept, groups, 0).reshape(expected.shape)
        np.testing.assert_array_equal(np.moveaxis(np.asarray(after[path]), network.in_axis, -1), expected)
    assert network.accuracy(pruned.params) > 0.2
    assert_untouched(network)


def test_whole_filters_and_neurons(network):
    constraint = po.constraints.Slices(network.out_axis, po.constraints.Cardinality(sparsity=0.5, per="leaf"))
    pruned = po.prune(None, network.params, None, constraint, leaves=network.sliced, progress=False)
    assert tuple(named(pruned.support)) == network.sliced_paths
    after = network.weights(pruned.params)
    for path, before in network.taken.items():
        expected = np.moveaxis(before.copy(), network.out_axis, 0)
        if path in network.sliced_paths:
            energy = np.sum(np.square(expected, dtype=float), axis=tuple(range(1, expected.ndim)))
            expected[np.argsort(-energy)[len(energy) // 2 :]] = 0
        np.testing.assert_array_equal(np.moveaxis(np.asarray(after[path]), network.out_axis, 0), expected)
    assert np.isfinite(network.mean_loss(pruned.params))
    assert_untouched(network)


# ----------------------------------------------------------------------------------------------- retraining


def test_retraining_keeps_the_zeros(network):
    constraint = po.constraints.Cardinality(sparsity=0.8, per="leaf")
    pruned = po.prune(None, network.params, None, constraint, progress=False)
    given = snapshot(pruned.params)
    tuned = network.retrain(epochs=3)(pruned.params, pruned.support)

    assert moved(given, snapshot(pruned.params)) == set()
    assert jax.tree.structure(tuned) == jax.tree.structure(network.params)
    masks = named(pruned.support)
    for path, w in network.weights(tuned).items():
        assert np.all(np.asarray(w)[~np.asarray(masks[path])] == 0)
    now = snapshot(tuned)
    static = {path for path, leaf in given.items() if not isinstance(leaf, np.ndarray)}
    assert set(given) - moved(given, now) == static | (FIXED & set(given))
    for path in COUNTERS & set(given):
        assert now[path] == given[path] + 3 * len(BATCHES)
    assert network.mean_loss(tuned) < 0.8 * network.mean_loss(pruned.params)
    assert_untouched(network)


def test_pruning_with_a_schedule_and_retraining(network):
    pruned = po.prune(
        network.loss,
        network.params,
        BATCHES,
        po.constraints.Cardinality(sparsity=0.8),
        method="taylor",
        schedule=po.plans.Iterative(2),
        fine_tune=network.retrain(epochs=2),
        evaluate=network.accuracy,
        progress=False,
    )
    total = sum(w.size for w in network.taken.values())
    zeros = sum(int(np.sum(np.asarray(w) == 0)) for w in network.weights(pruned.params).values())
    assert zeros == total - budget(total, 0.8)
    assert [set(record) >= {"pruned", "tuned"} for record in pruned.history] == [True, True]
    assert pruned.history[-1]["tuned"] == network.accuracy(pruned.params) > 0.6
    assert_untouched(network)


@pytest.mark.parametrize(
    ("network", "paths"),
    [("nnx", ["bn/mean/value", "bn/var/value"]), ("equinox", ["1/1/0", "1/1/1"])],
    indirect=["network"],
)
def test_retraining_leaves_running_statistics_to_the_updates(network, paths):
    """By default, without `trained=`: their paths do not tell, but `updates` has them."""
    full = {path: np.ones(w.shape, bool) for path, w in network.taken.items()}
    tuned = po.plans.retrain(network.train, BATCHES, MOMENTUM, has_updates=True)(network.params, full)
    assert set(paths) <= moved(network.before, snapshot(tuned))


@pytest.mark.parametrize("network", ["linen", "nnx", "keras"], indirect=True)
def test_gradients_do_not_train_running_statistics(network):
    leaves, statistics = named(network.params), network.moments(network.params, IMAGES[:2])
    assert not [path for path in statistics if po.structure.is_trainable(path, leaves[path])]


# -------------------------------------------------------------------------------------------- recalibration


def copied(tree: Tree) -> Tree:
    """A tree of the same leaves: NNX merges a state without copying it, so that its model writes into it."""
    return jax.tree.map(lambda leaf: leaf, tree)


def statistics(network: Network) -> Callable[[Tree, Any], Tree]:
    """The updates of one training step, without counters, keys and seeds."""

    def floating(leaf):
        return leaf if jnp.issubdtype(leaf.dtype, jnp.floating) else None

    return lambda params, batch: jax.tree.map(floating, network.train(params, batch)[1])


@pytest.mark.parametrize(("network", "last"), [("linen", 64), ("nnx", 128), ("keras", 128)], indirect=["network"])
def test_recalibrated_statistics_are_means_over_batches(network, last):
    params = copied(pruned_by(network, "magnitude", "tree").params)
    given = snapshot(params)
    batches = [*BATCHES[:2], (BATCHES[2][0][:last], BATCHES[2][1][:last])]
    fresh = po.plans.recalibrate(statistics(network), params, batches)

    assert moved(given, snapshot(params)) == set()
    each = [network.moments(params, images) for images, _ in batches]
    sizes = [len(images) for images, _ in batches]
    now = named(fresh)
    assert moved(given, snapshot(fresh)) == set(each[0])
    for path in each[0]:
        expected = np.average([moments[path] for moments in each], axis=0, weights=sizes)
        np.testing.assert_allclose(np.asarray(now[path]), expected, rtol=2e-5, atol=1e-5)
    assert [p for p, leaf in named(params).items() if p not in each[0] and now[p] is not leaf] == []
    network.model(fresh)(IMAGES)


@pytest.mark.parametrize("network", ["nnx", "keras"], indirect=True)
def test_recalibration_passes_over_counters_and_seeds(network):
    params = copied(network.params)
    given = snapshot(params)
    fresh = po.plans.recalibrate(lambda *given: network.train(*given)[1], params, BATCHES)
    assert moved(given, snapshot(fresh)) == set(network.moments(params, IMAGES))
    assert moved(given, snapshot(params)) == set()


# ------------------------------------------------------------------------------ sensitivity, lossless, import


@pytest.mark.parametrize("network", ["keras"], indirect=True)
def test_sensitivity_prunes_one_leaf_at_a_time(network):
    levels = (0.5, 0.9)
    curves = po.plans.sensitivity(network.loss, network.params, BATCHES, levels, progress=False)
    assert list(curves.losses) == list(network.taken)
    assert curves.dense == pytest.approx(network.mean_loss(network.params), rel=1e-5)
    for path, w in network.taken.items():
        for level, loss in zip(levels, curves.losses[path], strict=True):
            cut = w.copy()
            cut.ravel()[np.argsort(-np.abs(w).ravel(), kind="stable")[budget(w.size, level) :]] = 0
            alone = network.put(network.params, {**network.taken, path: cut})
            assert loss == pytest.approx(network.mean_loss(alone), rel=1e-5)
    assert_untouched(network)


@pytest.mark.parametrize("network", ["numpy-arrays"], indirect=True)
def test_lossless_meets_its_tolerance(network):
    pruned = po.plans.lossless(
        network.loss, network.params, BATCHES, tolerance=0.01, method="magnitude", progress=False
    )
    dense = network.mean_loss(network.params)
    assert network.mean_loss(pruned.params) - dense <= 0.01 + 1e-6
    joined = np.sort(np.concatenate([np.abs(w).ravel() for w in network.taken.values()]))[::-1]
    assert 0 < pruned.kept < joined.size

    def rise(count):
        masked = {path: np.where(np.abs(w) >= joined[count - 1], w, 0) for path, w in network.taken.items()}
        return network.mean_loss(network.put(network.params, masked)) - dense

    assert rise(pruned.kept) <= 0.01 + 1e-6
    assert rise(pruned.kept - 1) > 0.01 - 1e-6
    assert_untouched(network)


def test_layer_by_layer_beats_magnitude_at_its_own_sparsity(network):
    """Of any framework, without an adapter: each layer on the inputs that the pruned ones before it give."""
    half = po.constraints.Cardinality(sparsity=SPARSITY)
    pruned = po.prune(network.loss, network.params, BATCHES, half, method="wanda_refit", progress=False)
    kept = {path: int(np.asarray(mask).sum()) for path, mask in named(pruned.support).items()}
    assert kept == {path: budget(before.size) for path, before in network.taken.items()}
    assert moved(snapshot(network.params), snapshot(pruned.params)) == set(network.taken)

    def change(params):
        return float(np.mean(np.square(network.logits(params, IMAGES) - network.logits(network.params, IMAGES))))

    assert change(pruned.params) < change(pruned_by(network, "magnitude", "leaf").params)
    assert_untouched(network)


def test_importing_pruneopt_imports_no_framework():
    script = "import sys, pruneopt; print(*sorted({name.partition('.')[0] for name in sys.modules}))"
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    loaded = set(run.stdout.split())
    assert "pruneopt" in loaded
    assert not loaded & {"equinox", "flax", "haiku", "keras", "tensorflow", "torch"}


# ------------------------------------------------------------------------------------------------- abstract parameters


def linen_shapes():
    import flax.linen as nn

    model = nn.Sequential([nn.Dense(4), nn.BatchNorm(use_running_average=True), nn.Dense(3)])
    made = functools.partial(model.init, KEY, jnp.ones((2, 5)))
    return made(), jax.eval_shape(made)


def nnx_shapes():
    from flax import nnx

    def made():
        rngs = nnx.Rngs(0)
        return nnx.Sequential(nnx.Linear(5, 4, rngs=rngs), nnx.Dropout(0.1, rngs=rngs), nnx.Linear(4, 3, rngs=rngs))

    return nnx.split(made())[1], nnx.split(nnx.eval_shape(made))[1]


def equinox_shapes():
    import equinox as eqx

    made = functools.partial(eqx.nn.MLP, 5, 3, 4, 1, key=jax.random.key(0))
    return made(), eqx.filter_eval_shape(made)


def keras_shapes():
    import keras

    model = keras.Sequential([keras.Input((5,)), keras.layers.Dense(4), keras.layers.Dense(3)])
    shapes = {v.path: jax.ShapeDtypeStruct(v.shape, v.dtype) for v in model.variables}
    return {v.path: v.value for v in model.variables}, shapes


@pytest.mark.parametrize("made", [linen_shapes, nnx_shapes, equinox_shapes, keras_shapes])
def test_abstract_parameters_are_enough_to_load_into(made, tmp_path):
    """Arrays, random keys and masks come back bit for bit in the structure of a framework's own shapes."""
    params, shapes = made()
    before = po.prune(None, params, None, po.constraints.Cardinality(sparsity=SPARSITY), progress=False)
    po.save(before, tmp_path / "x")
    after = po.load(tmp_path / "x", shapes)
    assert jax.tree.structure(after.params) == jax.tree.structure(params)
    for old, new in ((before.params, after.params), (before.support, after.support)):
        one, two = snapshot(old), snapshot(new)
        assert one.keys() == two.keys()
        assert all(same(one[path], two[path]) for path in one)
