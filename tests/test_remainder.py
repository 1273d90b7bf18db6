"""Sums over units that are not zero where their leaves are: what they leave is added, against the masked network."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import pruneopt as po
from paper_reproductions.networks.small import deletion
from tests.test_units import FLAT, TOKENS, arrays


def two_passes(p, x):
    h = x @ p["a"]
    h = (h - h.mean(-1, keepdims=True)) * jax.lax.rsqrt(h.var(-1, keepdims=True) + 1e-5) * p["scale"][None]
    return jnp.tanh(h @ p["b"]) @ p["o"]


def numbered(p, x):
    """A constant stands along the units that are summed."""
    h = x @ p["a"] + jnp.asarray(np.linspace(1, 2, 6))[None]
    return jax.lax.rsqrt((h**2).sum(-1, keepdims=True)) * (h @ p["c"])


def contracted(p, x):
    """Neither side of a product is zero at zero."""
    return jax.nn.sigmoid(x @ p["a"]) @ jnp.exp(p["c"])


def averaged(p, x):
    return jax.nn.sigmoid(x @ p["a"]) @ jnp.full((6, 1), 1 / 6)


def exponentials(p, x):
    """A softmax without its maximum."""
    h = jnp.exp(x @ p["a"])
    return (h / h.sum(-1, keepdims=True)) @ p["c"]


def mixed(p, x):
    """A product along the tokens, with a bias, writes into channels that are zero."""
    h = x @ p["a"]
    h = h + jnp.swapaxes(jnp.tanh(jnp.swapaxes(h, 1, 2) @ p["t"] + p["bias"][None, None]), 1, 2)
    h = h - h.mean(-1, keepdims=True)
    return h * jax.lax.rsqrt((h * h).mean(-1, keepdims=True) + 1e-5) @ p["c"]


def joined(p, x):
    """Two classes of units side by side in one variance."""
    h = jnp.concatenate([x @ p["a"], x @ p["d"]], -1)
    return h * jax.lax.rsqrt(h.var(-1, keepdims=True) + 1e-5) @ p["e"]


def mean(h):
    return h.sum(-1, keepdims=True) / 6.0


@jax.custom_jvp
def normed(h):
    h = h - mean(h)
    return h * jax.lax.rsqrt(mean(h * h) + 1e-5)


@normed.defjvp
def _normed_rule(primals, tangents):
    """Not quite the derivative, so that another one would show."""
    (h,), (t,) = primals, tangents
    scale = jax.lax.rsqrt(mean((h - mean(h)) ** 2) + 1e-5)
    return normed(h), 2 * scale * (t - mean(t) - normed(h) * mean(normed(h) * t))


def own_derivative(p, x):
    """Two passes inside a function with a derivative of its own, which sums too."""
    return normed(x @ p["a"]) @ p["c"]


@jax.custom_vjp
def fused(h):
    return _fused_forward(h)[0]


def _fused_forward(h):
    scale = jax.lax.rsqrt(mean(h * h) - mean(h) ** 2 + 1e-5)
    y = (h - mean(h)) * scale
    return y, (y, scale)


def _fused_backward(kept, g):
    """Divided by as many units as there were, as the forward pass is."""
    y, scale = kept
    n = float(y.shape[-1])
    return (scale * (g - g.sum(-1, keepdims=True) / n - y * (g * y).sum(-1, keepdims=True) / n),)


fused.defvjp(_fused_forward, _fused_backward)


def own_backward(p, x):
    """A backward pass that counts the units: it is the old one's, at the sizes that are left."""
    return fused(x @ p["a"]) @ p["c"]


def in_a_loop(p, x):
    """Two passes inside a loop over data that stays whole."""

    def step(h, now):
        h = 0.5 * h + now
        h = h - h.mean()
        return h * jax.lax.rsqrt((h * h).mean() + 1e-5) * p["scale"], h

    return jax.lax.scan(step, jnp.zeros(6), x @ p["a"])[1] @ p["c"]


def of_layers(p, x):
    """Two passes inside a loop over layers."""

    def step(h, layer):
        n = h - h.mean(-1, keepdims=True)
        n = n * jax.lax.rsqrt((n * n).mean(-1, keepdims=True) + 1e-5)
        return h + jnp.tanh(n @ layer["up"]) @ layer["down"], None

    return jax.lax.scan(step, x @ p["a"], {"up": p["ups"], "down": p["downs"]})[0] @ p["c"]


SHAPES = {"a": (5, 6), "b": (6, 7), "c": (6, 3), "d": (5, 4), "e": (10, 3), "o": (7, 3), "scale": (6,)} | {
    "t": (3, 3),
    "bias": (3,),
    "ups": (2, 6, 7),
    "downs": (2, 7, 6),
}
CASES = {
    two_passes: ("a b o scale", FLAT, 2),
    numbered: ("a c", FLAT, 1),
    contracted: ("a c", FLAT, 1),
    averaged: ("a", FLAT, 1),
    exponentials: ("a c", FLAT, 1),
    mixed: ("a t bias c", TOKENS, 1),
    joined: ("a d e", FLAT, 2),
    own_derivative: ("a c", FLAT, 1),
    own_backward: ("a c", FLAT, 1),
    in_a_loop: ("a c scale", FLAT, 1),
    of_layers: ("a c ups downs", FLAT, 2),
}


@pytest.mark.parametrize("fn", CASES, ids=lambda fn: fn.__name__)
@pytest.mark.slow
def test_what_units_left_in_a_sum_is_added(fn):
    """Values and gradients are the masked network's; without the remainder they are not."""
    names, batch, count = CASES[fn]
    params, batch = arrays(**{name: SHAPES[name] for name in names.split()}), arrays(x=batch)["x"]
    found = po.structure.trace(fn, params, batch).units()
    assert len(deletion.free(found)) == count
    (cut,) = deletion.rounds(found)
    small, masked = po.shrink_units(fn, params, batch, cut.kept), deletion.zeroed(params, cut.gone)
    assert jax.tree.map(jnp.shape, small.params) != jax.tree.map(jnp.shape, params)
    larger = jnp.concatenate([batch, 2 * batch]) if fn is not in_a_loop else batch
    mine, whole = (
        jax.jit(lambda p, f=f: (f(p, larger), jax.grad(lambda p: jnp.sin(f(p, larger)).sum())(p)))(q)
        for f, q in ((small.fn, small.params), (fn, masked))
    )
    assert deletion.difference(whole[0], mine[0]) < 1e-12
    assert deletion.difference(deletion.zeroed(whole[1], cut.gone), small.expand(mine[1])) < 1e-11


@pytest.mark.slow
def test_two_passes_of_fewer_units_are_not_the_masked_ones():
    """The remainder is no rounding: fn on the small leaves is far from the masked network."""
    params, batch = arrays(a=(5, 6), b=(6, 7), o=(7, 3), scale=(6,)), arrays(x=FLAT)["x"]
    small = po.shrink_units(two_passes, params, batch, {("a", 1): [0, 2, 3]})
    assert deletion.difference(two_passes(small.expand(), batch), two_passes(small.params, batch)) > 0.01
