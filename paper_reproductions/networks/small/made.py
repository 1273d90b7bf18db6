"""What the small networks here are made of: arrays drawn from a seed, leaves stirred, norms, convolutions."""

import zlib
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np


class Network(NamedTuple):
    """fn(params, batch) -> outputs, with one batch."""

    fn: Any
    params: Any
    batch: Any


def drawn(shapes, seed=0):
    """A tree of shapes as normal arrays in float64, each over the square root of its inputs."""
    random = np.random.default_rng(seed)

    def one(shape):
        return jnp.asarray(random.normal(size=shape) / np.sqrt(np.prod(shape[:-1]) if len(shape) > 1 else 1))

    return jax.tree.map(one, shapes, is_leaf=lambda x: isinstance(x, tuple) and all(isinstance(n, int) for n in x))


def images(*shape, seed=1):
    """Normal numbers of this shape in float64."""
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape))


def tokens(*shape, vocabulary=11, seed=1):
    """Token ids of this shape."""
    return jnp.asarray(np.random.default_rng(seed).integers(0, vocabulary, shape), jnp.int32)


def stirred(tree):
    """A framework's params in float64, each leaf moved at random, so that no bias is zero; variances stay positive."""

    def one(path, leaf):
        if not hasattr(leaf, "dtype") or not jnp.issubdtype(leaf.dtype, jnp.floating):
            return leaf
        name = jax.tree_util.keystr(path)
        noise = np.random.default_rng(zlib.crc32(name.encode())).normal(size=leaf.shape)
        inputs = np.prod(leaf.shape[:-1]) if leaf.ndim > 1 else 1
        moved = np.asarray(leaf, np.float64) + 0.2 * noise / np.sqrt(inputs)
        return jnp.asarray(np.abs(moved) + 0.1 if "var" in name else moved)

    return jax.tree_util.tree_map_with_path(one, tree)


def dense(layer, x):
    """x W + b."""
    return x @ layer["w"] + layer["b"]


def layer_norm(norm, x, axis=-1):
    """Its variance as the mean of (x - mean)^2."""
    x = x - x.mean(axis, keepdims=True)
    return x * jax.lax.rsqrt((x * x).mean(axis, keepdims=True) + 1e-5) * norm["scale"] + norm["bias"]


def fast_norm(norm, x):
    """Its variance as mean of x^2 less mean^2."""
    mean = x.mean(-1, keepdims=True)
    return (x - mean) * jax.lax.rsqrt((x * x).mean(-1, keepdims=True) - mean**2 + 1e-5) * norm["scale"] + norm["bias"]


def rms_norm(scale, x):
    """Over the root of the mean of x^2."""
    return x * jax.lax.rsqrt((x * x).mean(-1, keepdims=True) + 1e-5) * scale


def batch_norm(norm, x):
    """By running statistics."""
    return (x - norm["mean"]) * (norm["scale"] * jax.lax.rsqrt(norm["var"] ** 2 + 1e-5)) + norm["bias"]


def conv(x, kernel, stride=1, groups=1, dilation=1):
    """2-D, HWIO, channels last."""
    spec = ("NHWC", "HWIO", "NHWC")
    return jax.lax.conv_general_dilated(
        x,
        kernel,
        (stride, stride),
        "SAME",
        rhs_dilation=(dilation, dilation),
        dimension_numbers=spec,
        feature_group_count=groups,
    )


def conv1d(x, kernel, groups=1, dilation=1):
    """Causal, (time, in, out), channels last."""
    return jax.lax.conv_general_dilated(
        x,
        kernel,
        (1,),
        [(dilation * (kernel.shape[0] - 1), 0)],
        rhs_dilation=(dilation,),
        dimension_numbers=("NTC", "TIO", "NTC"),
        feature_group_count=groups,
    )


def layer(n_in, n_out):
    """Shapes of a dense layer."""
    return {"w": (n_in, n_out), "b": (n_out,)}


def norm(n):
    """Shapes of a layer norm."""
    return {"scale": (n,), "bias": (n,)}


def running(n):
    """Shapes of a batch norm."""
    return {"scale": (n,), "bias": (n,), "mean": (n,), "var": (n,)}
