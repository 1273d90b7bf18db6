"""Convolutional networks: what joins, splits, groups, gates, normalises and upsamples channels."""

import jax
import jax.numpy as jnp

from paper_reproductions.networks.small.made import (
    Network,
    batch_norm,
    conv,
    conv1d,
    dense,
    drawn,
    images,
    layer,
    layer_norm,
    norm,
    running,
)

PICTURES = (2, 8, 8, 2)


def max_pool(x):
    """2 x 2."""
    return jax.lax.reduce_window(x, -jnp.inf, jax.lax.max, (1, 2, 2, 1), (1, 2, 2, 1), "VALID")


def unet():
    """Down, up by repetition, skips joined along channels."""

    def block(p, x):
        return jax.nn.relu(batch_norm(p["norm"], conv(x, p["w"])))

    def fn(p, x):
        a = block(p["down1"], x)
        b = block(p["down2"], max_pool(a))
        c = block(p["deep"], max_pool(b))
        up = lambda y: jnp.repeat(jnp.repeat(y, 2, 1), 2, 2)  # noqa: E731
        d = block(p["up2"], jnp.concatenate([up(c), b], -1))
        return conv(block(p["up1"], jnp.concatenate([up(d), a], -1)), p["out"])

    widths = {"down1": (2, 4), "down2": (4, 6), "deep": (6, 8), "up2": (14, 5), "up1": (9, 4)}
    shapes = {name: {"w": (3, 3, *io), "norm": running(io[1])} for name, io in widths.items()}
    return Network(fn, drawn({**shapes, "out": (1, 1, 4, 2)}), images(*PICTURES))


def vae():
    """Strided convolutions, a code of mean and spread, transposed convolutions back."""

    def up(x, kernel):
        return jax.lax.conv_transpose(x, kernel, (2, 2), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))

    def fn(p, batch):
        x, noise = batch
        h = jax.nn.relu(conv(jax.nn.relu(conv(x, p["down1"], 2)), p["down2"], 2))
        mean, spread = jnp.split(dense(p["code"], h.reshape(len(x), -1)), 2, axis=-1)
        code = mean + noise * jnp.exp(0.5 * spread)
        h = jax.nn.relu(dense(p["wide"], code)).reshape(len(x), 2, 2, -1)
        return up(jax.nn.relu(up(h, p["up1"]) + p["bias"]), p["up2"]), (code @ p["judge"])

    shapes = {"down1": (3, 3, 2, 4), "down2": (3, 3, 4, 6), "code": layer(24, 10), "wide": layer(5, 20)}
    shapes |= {"up1": (3, 3, 5, 4), "bias": (4,), "up2": (3, 3, 4, 2), "judge": (5, 3)}
    return Network(fn, drawn(shapes), (images(*PICTURES), jnp.ones((2, 5))))


def resnext():
    """Bottlenecks whose 3 x 3 convolution has groups."""

    def fn(p, x):
        h = jax.nn.relu(conv(x, p["stem"]))
        for b in p["blocks"]:
            y = jax.nn.relu(batch_norm(b["norm1"], conv(h, b["in"])))
            y = jax.nn.relu(batch_norm(b["norm2"], conv(y, b["grouped"], groups=4)))
            h = jax.nn.relu(h + conv(y, b["out"]))
        return h.mean((1, 2)) @ p["head"]

    block = {"in": (1, 1, 6, 8), "norm1": running(8), "grouped": (3, 3, 2, 12), "norm2": running(12)}
    shapes = {"stem": (3, 3, 2, 6), "blocks": [{**block, "out": (1, 1, 12, 6)}] * 2, "head": (6, 3)}
    return Network(fn, drawn(shapes), images(*PICTURES))


def mobile():
    """Inverted residuals: depthwise convolutions, squeeze and excite, swish."""

    def fn(p, x):
        h = conv(x, p["stem"], 2)
        for b in p["blocks"]:
            y = jax.nn.swish(batch_norm(b["norm1"], conv(h, b["expand"])))
            y = jax.nn.swish(batch_norm(b["norm2"], conv(y, b["depth"], groups=y.shape[-1])))
            gate = dense(b["excite"], jax.nn.swish(dense(b["squeeze"], y.mean((1, 2)))))
            h = h + conv(y * jax.nn.sigmoid(gate)[:, None, None], b["project"])
        return h.mean((1, 2)) @ p["head"]

    block = {"expand": (1, 1, 4, 8), "norm1": running(8), "depth": (3, 3, 1, 8), "norm2": running(8)}
    block |= {"squeeze": layer(8, 3), "excite": layer(3, 8), "project": (1, 1, 8, 4)}
    return Network(fn, drawn({"stem": (3, 3, 2, 4), "blocks": [block] * 2, "head": (4, 3)}), images(*PICTURES))


def separable():
    """Depthwise convolutions with a multiplier, then pointwise ones; flattened."""

    def fn(p, x):
        h = jax.nn.relu(conv(x, p["stem"]))
        h = jax.nn.relu(conv(conv(h, p["depth"], 2, groups=h.shape[-1]), p["point"]) + p["bias"])
        return dense(p["head"], max_pool(h).reshape(len(x), -1))

    shapes = {"stem": (3, 3, 2, 4), "depth": (3, 3, 1, 8), "point": (1, 1, 8, 6), "bias": (6,), "head": layer(24, 3)}
    return Network(fn, drawn(shapes), images(*PICTURES))


def densenet():
    """Each layer reads all before it."""

    def fn(p, x):
        h = conv(x, p["stem"])
        for b in p["layers"]:
            y = conv(jax.nn.relu(batch_norm(b["norm1"], h)), b["in"])
            h = jnp.concatenate([h, conv(jax.nn.relu(batch_norm(b["norm2"], y)), b["out"])], -1)
        h = conv(jax.nn.relu(batch_norm(p["norm"], h)), p["transition"])
        return h.mean((1, 2)) @ p["head"]

    def block(n):
        return {"norm1": running(n), "in": (1, 1, n, 5), "norm2": running(5), "out": (3, 3, 5, 3)}

    shapes = {"stem": (3, 3, 2, 4), "layers": [block(n) for n in (4, 7, 10)], "norm": running(13)}
    return Network(fn, drawn({**shapes, "transition": (1, 1, 13, 6), "head": (6, 3)}), images(*PICTURES))


def resnet():
    """Shortcuts without parameters: every second pixel, channels padded with zeros on both sides."""

    def fn(p, x):
        h = jax.nn.relu(batch_norm(p["norm"], conv(x, p["stem"])))
        for b in p["blocks"]:
            stride = 1 + (b["one"].shape[2] != b["one"].shape[3])
            y = jax.nn.relu(batch_norm(b["norm1"], conv(h, b["one"], stride)))
            y = batch_norm(b["norm2"], conv(y, b["two"]))
            if stride > 1:
                n = (y.shape[-1] - h.shape[-1]) // 2
                h = jnp.pad(h[:, ::2, ::2], ((0, 0), (0, 0), (0, 0), (n, n)))
            h = jax.nn.relu(h + y)
        return dense(p["head"], h.mean((1, 2)))

    def block(a, b):
        return {"one": (3, 3, a, b), "norm1": running(b), "two": (3, 3, b, b), "norm2": running(b)}

    shapes = {"stem": (3, 3, 2, 4), "norm": running(4), "blocks": [block(4, 4), block(4, 8), block(8, 8)]}
    return Network(fn, drawn({**shapes, "head": layer(8, 3)}), images(*PICTURES))


def group_norm():
    """Statistics over a group of channels and all pixels, in two passes."""

    def normed(p, x, groups):
        y = x.reshape(*x.shape[:3], groups, -1)
        mean = y.mean((1, 2, 4), keepdims=True)
        y = (y - mean) / jnp.sqrt(((y - mean) ** 2).mean((1, 2, 4), keepdims=True) + 1e-5)
        return y.reshape(x.shape) * p["scale"] + p["bias"]

    def fn(p, x):
        h = jax.nn.relu(normed(p["norm1"], conv(x, p["one"]), 4))
        h = h + jax.nn.relu(normed(p["norm2"], conv(h, p["two"]), 4))
        return h.mean((1, 2)) @ p["head"]

    shapes = {"one": (3, 3, 2, 8), "norm1": norm(8), "two": (3, 3, 8, 8), "norm2": norm(8), "head": (8, 3)}
    return Network(fn, drawn(shapes), images(*PICTURES))


def instance_norm():
    """Statistics of each channel over its pixels, in two passes; style added."""

    def normed(p, x):
        mean = x.mean((1, 2), keepdims=True)
        return (x - mean) / jnp.sqrt(((x - mean) ** 2).mean((1, 2), keepdims=True) + 1e-5) * p["scale"] + p["bias"]

    def fn(p, x):
        h = jax.nn.relu(normed(p["norm1"], conv(x, p["one"])))
        h = h + normed(p["norm2"], conv(jax.nn.relu(normed(p["norm3"], conv(h, p["two"]))), p["three"]))
        return conv(h, p["out"])

    shapes = {"one": (3, 3, 2, 5), "two": (3, 3, 5, 6), "three": (3, 3, 6, 5), "out": (1, 1, 5, 2)}
    return Network(fn, drawn({**shapes, "norm1": norm(5), "norm2": norm(5), "norm3": norm(6)}), images(*PICTURES))


def convnext():
    """Depthwise 7 x 7, a layer norm over channels in two passes, layer scale."""

    def fn(p, x):
        h = layer_norm(p["norm0"], conv(x, p["stem"], 2))
        for b in p["blocks"]:
            y = layer_norm(b["norm"], conv(h, b["depth"], groups=h.shape[-1]) + b["bias"])
            h = h + b["scale"] * dense(b["down"], jax.nn.gelu(dense(b["up"], y)))
        return dense(p["head"], layer_norm(p["norm1"], h.mean((1, 2))))

    block = {
        "depth": (7, 7, 1, 6),
        "bias": (6,),
        "norm": norm(6),
        "up": layer(6, 9),
        "down": layer(9, 6),
        "scale": (6,),
    }
    shapes = {"stem": (2, 2, 2, 6), "norm0": norm(6), "blocks": [block] * 2, "norm1": norm(6), "head": layer(6, 3)}
    return Network(fn, drawn(shapes), images(*PICTURES))


def wavenet():
    """Dilated causal convolutions, gates in one matrix, residuals and skips apart."""

    def fn(p, x):
        h, skips = x @ p["embed"], 0.0
        for i, b in enumerate(p["layers"]):
            a, g = jnp.split(conv1d(h, b["both"], dilation=2**i), 2, axis=-1)
            y = jnp.tanh(a) * jax.nn.sigmoid(g)
            h, skips = h + y @ b["on"], skips + y @ b["skip"]
        return jax.nn.relu(skips) @ p["head"]

    block = {"both": (2, 6, 14), "on": (7, 6), "skip": (7, 8)}
    return Network(fn, drawn({"embed": (3, 6), "layers": [block] * 2, "head": (8, 3)}), images(2, 8, 3))
