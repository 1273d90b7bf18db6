"""What the transformers here are made of: products, norms, rotary embeddings, causal attention."""

import math

import jax
import jax.numpy as jnp
import numpy as np


def dense(layer, x):
    """x W + b; kernels are (in, out)."""
    return x @ layer["kernel"] + layer["bias"]


def layer_norm(norm, x, epsilon):
    """Centred and scaled to variance one along the last axis, then scaled and shifted by `norm`."""
    x = x - x.mean(axis=-1, keepdims=True)
    return x * jax.lax.rsqrt((x * x).mean(axis=-1, keepdims=True) + epsilon) * norm["scale"] + norm["bias"]


def rms_norm(scale, x, epsilon):
    """Scaled to a mean square of one along the last axis, then by `scale`."""
    return x * jax.lax.rsqrt(jnp.mean(x * x, axis=-1, keepdims=True) + epsilon) * scale


def rotate(x, frequencies):
    """Rotary embedding of (B, T, heads, d): entries j and j + d/2 turn by position times frequency j."""
    angles = np.outer(np.arange(x.shape[1]), frequencies)[:, None]  # (T, 1, d/2)
    cos, sin = jnp.asarray(np.cos(angles), x.dtype), jnp.asarray(np.sin(angles), x.dtype)
    first, second = jnp.split(x, 2, axis=-1)
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)


def causal_attention(q, k, v):
    """(B, T, heads * d) of q (B, T, heads, d) and k, v (B, T, groups, d); group g serves heads/groups heads in turn."""
    batch, time, _, width = q.shape
    q = q.reshape(batch, time, k.shape[2], -1, width)  # (B, T, groups, heads/groups, d)
    scores = jnp.einsum("btkgd,bskd->bkgts", q, k) / math.sqrt(width)
    weights = jax.nn.softmax(jnp.where(jnp.tri(time, dtype=bool), scores, -jnp.inf))
    return jnp.einsum("bkgts,bskd->btkgd", weights, v).reshape(batch, time, -1)
