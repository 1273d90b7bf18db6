"""Recurrences: state spaces whose scan multiplies activations alone, gates, LSTM and GRU in plain JAX."""

import jax
import jax.numpy as jnp

from paper_reproductions.networks.small.made import Network, conv1d, dense, drawn, images, layer, rms_norm

STEPS = 6


def mamba():
    """Mamba-1: a depthwise causal convolution, a selective scan over (channels, states), a gate."""

    def fn(p, x):
        h = rms_norm(p["norm"], x @ p["embed"])
        u, z = jnp.split(h @ p["in"], 2, axis=-1)
        u = jax.nn.silu(conv1d(u, p["conv"], groups=u.shape[-1]) + p["conv_bias"])
        low, b, c = jnp.split(u @ p["x"], [2, 5], axis=-1)
        delta = jax.nn.softplus(dense(p["delta"], low))

        def one(delta, b, c, u):
            def step(state, now):
                delta, b, c, u = now
                state = jnp.exp(delta[:, None] * -jnp.exp(p["a"])) * state + (delta * u)[:, None] * b[None]
                return state, state @ c + p["d"] * u

            return jax.lax.scan(step, jnp.zeros((u.shape[-1], b.shape[-1])), (delta, b, c, u))[1]

        y = jax.vmap(one)(delta, b, c, u) * jax.nn.silu(z)
        return (x @ p["embed"] + y @ p["out"]) @ p["head"]

    shapes = {"embed": (5, 6), "norm": (6,), "in": (6, 16), "conv": (3, 1, 8), "conv_bias": (8,), "x": (8, 8)}
    shapes |= {"delta": layer(2, 8), "a": (8, 3), "d": (8,), "out": (8, 6), "head": (6, 3)}
    return Network(fn, drawn(shapes), images(2, STEPS, 5))


def mamba2():
    """Mamba-2: one projection split into an empty part, a gate, values, keys, queries and steps of heads."""

    def fn(p, x):
        h = x @ p["embed"]
        parts = jnp.split(h @ p["in"], [0, 8, 16, 19, 22], axis=-1)
        nothing, z, u, b, c, delta = parts
        u = jax.nn.silu(u).reshape(*x.shape[:2], 2, 4)
        delta = jax.nn.softplus(delta + p["bias"])

        def one(u, b, c, delta):
            def step(state, now):
                u, b, c, delta = now
                decay = jnp.exp(-delta * jnp.exp(p["a"]))
                state = decay[:, None, None] * state + (delta[:, None] * u)[:, :, None] * b
                return state, jnp.einsum("hpn,n->hp", state, c) + p["d"][:, None] * u

            return jax.lax.scan(step, jnp.zeros((2, 4, 3)), (u, b, c, delta))[1]

        y = jax.vmap(one)(u, b, c, delta).reshape(*x.shape[:2], -1)
        y = rms_norm(p["norm"], y * jax.nn.silu(z))
        return (h + jnp.concatenate([nothing, y], -1) @ p["out"]) @ p["head"]

    shapes = {"embed": (5, 6), "in": (6, 24), "bias": (2,), "a": (2,), "d": (2,), "norm": (8,), "out": (8, 6)}
    return Network(fn, drawn({**shapes, "head": (6, 3)}), images(2, STEPS, 5))


def lru():
    """A linear recurrent unit with real decays, by a scan over data; a gated unit after it."""

    def fn(p, x):
        u = x @ p["in"]
        decay = jax.nn.sigmoid(p["decay"])
        scale = jnp.sqrt(1 - decay**2)
        states = jax.lax.scan(lambda h, u: ((h := decay * h + scale * u), h), jnp.zeros_like(u[0]), u)[1]
        y = jax.nn.gelu(states @ p["mix"] + p["skip"] * u @ p["side"])
        return (y * jax.nn.sigmoid(y @ p["gate"])) @ p["out"]

    shapes = {"in": (5, 8), "decay": (8,), "mix": (8, 6), "skip": (8,), "side": (8, 6), "gate": (6, 6), "out": (6, 3)}
    return Network(fn, drawn(shapes), images(STEPS, 5))


def qrnn():
    """Gates by convolutions, pooled by a scan over data."""

    def fn(p, x):
        z, f, o = jnp.tanh(conv1d(x, p["z"])), jax.nn.sigmoid(conv1d(x, p["f"])), jax.nn.sigmoid(conv1d(x, p["o"]))
        time = lambda y: jnp.moveaxis(y, 1, 0)  # noqa: E731
        step = lambda c, now: ((c := now[1] * c + (1 - now[1]) * now[0]), c)  # noqa: E731
        cells = jax.lax.scan(step, jnp.zeros_like(z[:, 0]), (time(z), time(f)))[1]
        return (o * jnp.moveaxis(cells, 0, 1))[:, -1] @ p["head"]

    return Network(fn, drawn({**dict.fromkeys("zfo", (2, 5, 7)), "head": (7, 3)}), images(2, STEPS, 5))


def lstm():
    """Two layers, the four gates in one matrix."""

    def run(p, x):
        def step(carry, now):
            h, c = carry
            i, f, g, o = jnp.split(now @ p["x"] + h @ p["h"] + p["b"], 4, axis=-1)
            c = jax.nn.sigmoid(f) * c + jax.nn.sigmoid(i) * jnp.tanh(g)
            h = jax.nn.sigmoid(o) * jnp.tanh(c)
            return (h, c), h

        start = jnp.zeros((x.shape[1], p["h"].shape[0]))
        return jax.lax.scan(step, (start, start), x)[1]

    def fn(p, x):
        return run(p["two"], run(p["one"], jnp.moveaxis(x, 1, 0)))[-1] @ p["head"]

    one = {"x": (5, 24), "h": (6, 24), "b": (24,)}
    return Network(fn, drawn({"one": one, "two": {**one, "x": (6, 24)}, "head": (6, 3)}), images(2, 4, 5))


def gru():
    """Reset and update gates in one matrix, the candidate in another, both ways in time."""

    def run(p, x, reverse):
        def step(h, now):
            r, z = jnp.split(jax.nn.sigmoid(dense(p["gates"], jnp.concatenate([now, h], -1))), 2, axis=-1)
            new = jnp.tanh(dense(p["new"], jnp.concatenate([now, r * h], -1)))
            return (h := (1 - z) * new + z * h), h

        return jax.lax.scan(step, jnp.zeros((x.shape[1], 6)), x, reverse=reverse)[1]

    def fn(p, x):
        x = jnp.moveaxis(x, 1, 0)
        both = jnp.concatenate([run(p["there"], x, False), run(p["back"], x, True)], -1)
        return both.mean(0) @ p["head"]

    one = {"gates": layer(11, 12), "new": layer(11, 6)}
    return Network(fn, drawn({"there": one, "back": one, "head": (12, 3)}), images(2, 4, 5))


def rwkv():
    """RWKV's time mixing: shifted inputs, a weighted mean kept as numerator and denominator."""

    def fn(p, x):
        h = x @ p["embed"]
        before = jnp.pad(h, ((1, 0), (0, 0)))[:-1]
        k, v, r = ((h * p["m" + n] + before * (1 - p["m" + n])) @ p[n] for n in "kvr")

        def step(state, now):
            top, bottom = state
            k, v = now
            own = jnp.exp(p["first"] + k)
            y = (top + own * v) / (bottom + own)
            decay = jnp.exp(-jnp.exp(p["decay"]))
            return (decay * top + jnp.exp(k) * v, decay * bottom + jnp.exp(k)), y

        zero = jnp.zeros(k.shape[-1])
        y = jax.nn.sigmoid(r) * jax.lax.scan(step, (zero, zero), (k, v))[1]
        return (h + y @ p["out"]) @ p["head"]

    shapes = {"embed": (5, 6), "first": (8,), "decay": (8,), "out": (8, 6), "head": (6, 3)}
    shapes |= dict.fromkeys("kvr", (6, 8)) | {"m" + n: (6,) for n in "kvr"}
    return Network(fn, drawn(shapes), images(STEPS, 5))
