"""Networks of Flax Linen, NNX, Equinox, Keras and Haiku, by their own layers."""

import contextlib

import jax
import jax.numpy as jnp

from paper_reproductions.networks.small.made import Network, images, stirred, tokens

KEY = 0


def linen_cnn():
    """Convolutions, batch norm, pooling, dropout."""
    from flax import linen as nn

    class Net(nn.Module):
        @nn.compact
        def __call__(self, x):
            for width in (4, 6):
                x = nn.relu(nn.BatchNorm(use_running_average=True)(nn.Conv(width, (3, 3))(x)))
                x = nn.max_pool(x, (2, 2), (2, 2))
            x = nn.Dropout(0.1, deterministic=True)(nn.relu(nn.Dense(7)(x.reshape(len(x), -1))))
            return nn.Dense(3)(x)

    x = images(2, 8, 8, 2)
    return Network(Net().apply, stirred(Net().init(jax.random.key(KEY), x)), x)


def linen_transformer():
    """Attention, layer norms of both variances, group norm."""
    from flax import linen as nn

    class Net(nn.Module):
        @nn.compact
        def __call__(self, ids):
            x = nn.Embed(11, 8)(ids) + self.param("position", nn.initializers.normal(), (1, ids.shape[1], 8))
            mask = nn.make_causal_mask(ids)
            x = x + nn.MultiHeadDotProductAttention(2)(nn.LayerNorm()(x), mask=mask)
            x = x + nn.Dense(8)(nn.gelu(nn.Dense(12)(nn.RMSNorm()(x))))
            return nn.Dense(11)(nn.LayerNorm(use_fast_variance=False)(x))

    ids = tokens(2, 5)
    return Network(Net().apply, stirred(Net().init(jax.random.key(KEY), ids)), ids)


def linen_recurrent():
    """Cells of an LSTM and a GRU, run over time."""
    from flax import linen as nn

    class Net(nn.Module):
        @nn.compact
        def __call__(self, x):
            x = nn.RNN(nn.OptimizedLSTMCell(6, param_dtype=jnp.float64))(x)
            x = nn.RNN(nn.GRUCell(5, param_dtype=jnp.float64))(x)
            return nn.Dense(3)(x[:, -1])

    x = images(2, 4, 5)
    return Network(Net().apply, stirred(Net().init(jax.random.key(KEY), x)), x)


def nnx_cnn():
    """Convolutions with groups, batch and group norm."""
    from flax import nnx

    class Net(nnx.Module):
        def __init__(self, rngs):
            self.one = nnx.Conv(2, 8, (3, 3), strides=2, rngs=rngs)
            self.norm = nnx.BatchNorm(8, use_running_average=True, rngs=rngs)
            self.two = nnx.Conv(8, 8, (3, 3), feature_group_count=8, rngs=rngs)
            self.three = nnx.Conv(8, 6, (1, 1), rngs=rngs)
            self.groups = nnx.GroupNorm(6, 3, rngs=rngs)
            self.head = nnx.Linear(6, 3, rngs=rngs)

        def __call__(self, x):
            x = nnx.relu(self.norm(self.one(x)))
            x = nnx.silu(self.groups(self.three(self.two(x))))
            return self.head(x.mean((1, 2)))

    graph, params = nnx.split(Net(nnx.Rngs(KEY)))
    return Network(lambda p, x: nnx.merge(graph, p)(x), stirred(params), images(2, 8, 8, 2))


def nnx_transformer():
    """Attention, low-rank additions, RMS norm."""
    from flax import nnx

    class Net(nnx.Module):
        def __init__(self, rngs):
            self.embed = nnx.Embed(11, 8, dtype=jnp.float64, rngs=rngs)
            self.norm1 = nnx.RMSNorm(8, rngs=rngs)
            self.attention = nnx.MultiHeadAttention(2, 8, decode=False, rngs=rngs)
            self.norm2 = nnx.LayerNorm(8, rngs=rngs)
            self.up = nnx.LoRALinear(8, 12, lora_rank=2, rngs=rngs)
            self.down = nnx.Linear(12, 8, rngs=rngs)

        def __call__(self, ids):
            x = self.embed(ids)
            x = x + self.attention(self.norm1(x))
            return self.embed.attend(x + self.down(nnx.gelu(self.up(self.norm2(x)))))

    graph, params = nnx.split(Net(nnx.Rngs(KEY)))
    return Network(lambda p, x: nnx.merge(graph, p)(x), stirred(params), tokens(2, 5))


def _equinox(net, x):
    """The arrays are the params; functions and flags stay with fn."""
    import equinox as eqx

    arrays, rest = eqx.partition(net, eqx.is_array)
    return Network(lambda p, x: jax.vmap(eqx.combine(p, rest))(x), stirred(arrays), x)


def equinox_mlp():
    """A perceptron, batch norm's running statistics left out; kernels are (out, in)."""
    import equinox as eqx

    net = eqx.nn.MLP(5, 3, 8, 2, activation=jax.nn.gelu, key=jax.random.key(KEY))
    return _equinox(net, images(4, 5))


def equinox_cnn():
    """Convolutions, transposed ones, group norm of one channel a group."""
    import equinox as eqx

    keys = jax.random.split(jax.random.key(KEY), 4)
    net = eqx.nn.Sequential(
        [
            eqx.nn.Conv2d(2, 4, 3, 2, 1, key=keys[0]),
            eqx.nn.Lambda(jax.nn.leaky_relu),
            eqx.nn.Conv2d(4, 6, 3, padding=1, key=keys[1]),
            eqx.nn.GroupNorm(6, 6),
            eqx.nn.Lambda(jax.nn.relu),
            eqx.nn.ConvTranspose2d(6, 5, 2, 2, key=keys[2]),
            eqx.nn.Lambda(jnp.tanh),
            eqx.nn.Conv2d(5, 2, 1, key=keys[3]),
        ]
    )
    return _equinox(net, images(2, 2, 8, 8))


def equinox_transformer():
    """Attention with a layer norm and a rotary embedding."""
    import equinox as eqx

    class Net(eqx.Module):
        embed: eqx.nn.Embedding
        norm: eqx.nn.LayerNorm
        rotary: eqx.nn.RotaryPositionalEmbedding
        attention: eqx.nn.MultiheadAttention
        mlp: eqx.nn.MLP

        def __call__(self, ids):
            x = jax.vmap(self.embed)(ids)
            turned = lambda q, k, v: (jax.vmap(self.rotary, 1, 1)(q), jax.vmap(self.rotary, 1, 1)(k), v)  # noqa: E731
            h = jax.vmap(self.norm)(x)
            x = x + self.attention(h, h, h, process_heads=turned)
            return jax.vmap(self.mlp)(x)

    keys = jax.random.split(jax.random.key(KEY), 3)
    net = Net(
        eqx.nn.Embedding(11, 8, key=keys[0]),
        eqx.nn.LayerNorm(8),
        eqx.nn.RotaryPositionalEmbedding(4),
        eqx.nn.MultiheadAttention(2, 8, key=keys[1]),
        eqx.nn.MLP(8, 3, 12, 1, key=keys[2]),
    )
    return _equinox(net, tokens(2, 5))


def equinox_recurrent():
    """An LSTM's and a GRU's cell under scan."""
    import equinox as eqx

    class Net(eqx.Module):
        lstm: eqx.nn.LSTMCell
        gru: eqx.nn.GRUCell
        head: eqx.nn.Linear

        def __call__(self, x):
            start = jnp.zeros(6), jnp.zeros(6)
            hidden = jax.lax.scan(lambda c, now: ((c := self.lstm(now, c)), c[0]), start, x)[1]
            last = jax.lax.scan(lambda h, now: (self.gru(now, h), None), jnp.zeros(5), hidden)[0]
            return self.head(last)

    keys = jax.random.split(jax.random.key(KEY), 3)
    net = Net(eqx.nn.LSTMCell(5, 6, key=keys[0]), eqx.nn.GRUCell(6, 5, key=keys[1]), eqx.nn.Linear(5, 3, key=keys[2]))
    return _equinox(net, images(2, 4, 5))


@contextlib.contextmanager
def _double():
    import keras

    before = keras.config.dtype_policy()
    keras.config.set_dtype_policy("float64")
    try:
        yield keras
    finally:
        keras.config.set_dtype_policy(before)


def _keras(net, x):
    paths, held = [v.path for v in net.trainable_variables], [v.path for v in net.non_trainable_variables]

    def fn(p, x):
        return net.stateless_call([p[path] for path in paths], [p[path] for path in held], x, training=False)[0]

    params = {v.path: jnp.asarray(v.value) for v in net.variables}
    return Network(fn, stirred(params), x)


def keras_attention():
    """Attention, layer norm, a GRU, separable convolutions over time."""
    with _double() as keras:
        inputs = keras.Input((6, 5))
        x = keras.layers.Dense(8)(inputs)
        x = x + keras.layers.MultiHeadAttention(2, 4)(x, x)
        x = keras.layers.LayerNormalization()(x)
        x = keras.layers.SeparableConv1D(7, 3, padding="same", activation="relu")(x)
        x = keras.layers.GRU(5, unroll=False)(x)
        return _keras(keras.Model(inputs, keras.layers.Dense(3)(x)), images(2, 6, 5))


def _application(name, size):
    def made():
        with _double() as keras:
            keras.utils.set_random_seed(0)
            options = {"weights": None, "classes": 10, "classifier_activation": None}
            net = getattr(keras.applications, name)(input_shape=(size, size, 3), **options)
        return _keras(net, images(1, size, size, 3))

    made.__doc__ = f"Keras's {name}."
    return made


mobilenet = _application("MobileNetV2", 32)
efficientnet = _application("EfficientNetB0", 32)
densenet121 = _application("DenseNet121", 32)
convnext_tiny = _application("ConvNeXtTiny", 32)
resnet50 = _application("ResNet50V2", 32)


def haiku_transformer():
    """Attention, layer norm of Haiku, a gated feed-forward."""
    import haiku as hk

    def net(ids):
        x = hk.Embed(11, 8)(ids)
        h = hk.LayerNorm(-1, True, True)(x)
        x = x + hk.MultiHeadAttention(2, 4, w_init=hk.initializers.VarianceScaling(), model_size=8)(h, h, h)
        h = hk.RMSNorm(-1)(x)
        x = x + hk.Linear(8)(jax.nn.silu(hk.Linear(12)(h)) * hk.Linear(12)(h))
        return hk.Linear(11)(x)

    transformed = hk.without_apply_rng(hk.transform(net))
    ids = tokens(2, 5)
    return Network(transformed.apply, stirred(transformed.init(jax.random.key(KEY), ids)), ids)


def haiku_cnn():
    """A residual block of Haiku, batch norm, an LSTM over rows."""
    import haiku as hk

    def net(x):
        x = jax.nn.relu(hk.BatchNorm(True, True, 0.9)(hk.Conv2D(4, 3)(x), is_training=hk.running_init()))
        x = x + hk.Conv2D(4, 3)(jax.nn.relu(hk.Conv2D(6, 3)(x)))
        rows = jnp.moveaxis(hk.avg_pool(x, (1, 2, 2, 1), (1, 2, 2, 1), "VALID").mean(2), 1, 0)
        core = hk.LSTM(5)
        out, _ = hk.dynamic_unroll(core, rows, core.initial_state(len(x)))
        return hk.Linear(3)(out[-1])

    transformed = hk.without_apply_rng(hk.transform_with_state(net))
    x = images(2, 8, 8, 2)
    params, state = transformed.init(jax.random.key(KEY), x)
    return Network(lambda p, x: transformed.apply(p[0], p[1], x)[0], stirred((params, state)), x)
