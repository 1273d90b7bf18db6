"""The registry of transformations, over one small network; `test_training.py` takes the cross product with the laws."""

from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import optax

from pruneopt import training as t
from pruneopt.constraints import NM, Cardinality
from pruneopt.penalties import L1

HALF = Cardinality(sparsity=0.5)  # 20 of 40 weights; the biases are not pruned
KEPT = 20
STEPS = 12


def params(seed=0):
    rng = np.random.default_rng(seed)
    shapes = {"a": {"kernel": (4, 5), "bias": (5,)}, "b": {"kernel": (5, 4)}}
    return jax.tree.map(
        lambda s: jnp.asarray(rng.standard_normal(s), jnp.zeros(()).dtype),
        shapes,
        is_leaf=lambda s: isinstance(s, tuple),
    )


def loss(p, batch):
    x, y = batch
    h = jnp.tanh(x @ p["a"]["kernel"] + p["a"]["bias"][None])
    return jnp.mean((h @ p["b"]["kernel"] - y) ** 2)


def batch(seed, n=16):
    rng = np.random.default_rng(seed)
    return tuple(jnp.asarray(rng.standard_normal((n, 4)), jnp.zeros(()).dtype) for _ in range(2))


# name: (optimiser -> transformation that ends before STEPS, weights that finish must keep or None).
OPTIMIZERS = {
    "freeze": (lambda o: t.freeze(o, {"a/kernel": jnp.arange(20).reshape(4, 5) % 2 == 0}), 10),
    "gradual": (lambda o: t.gradual(o, HALF, begin=1, end=7, every=2), KEPT),
    "proximal": (lambda o: t.proximal(o, L1(0.05), 0.02, metric=t.adam_metric()), None),
    "rigl": (lambda o: t.rigl(o, HALF, end=9, every=3), KEPT),
    "sparse_evolution": (lambda o: t.sparse_evolution(o, NM(2, 4, axis="out"), end=9, every=3, leaves="b/*"), 10),
    "hard_threshold": (lambda o: t.hard_threshold(o, HALF, begin=1, end=7, every=3, hold=2), KEPT),
    "straight_through": (lambda o: t.straight_through(o, NM(2, 4, axis="out"), leaves="b/*"), 10),
    "admm": (lambda o: t.admm(o, HALF, begin=1, end=8, every=2, pull=0.2, metric=t.adam_metric()), KEPT),
    "l0": (lambda o: t.l0(o, 1e-3, per="in"), None),
    "lagrangian": (lambda o: t.lagrangian(o, HALF, end=8, ascent=0.1), KEPT),
}
ADAM = partial(optax.adam, 0.02)


GRADIENT = jax.jit(jax.grad(loss))


@cache
def of(name, adam=ADAM):
    """The transformation of that name; one object, so that a step of it is compiled once."""
    return OPTIMIZERS[name][0](adam())


@cache
def step_of(optimizer):
    """One compiled step of plain training, buffers donated."""

    def step(p, state, data):
        value, gradient = jax.value_and_grad(loss)(p, data)
        updates, state = optimizer.update(gradient, state, p)
        return optax.apply_updates(p, updates), state, value

    return jax.jit(step, donate_argnums=(0, 1))


def trained(optimizer, steps=STEPS, p=None, state=None, begin=0, data=batch):
    """(params, state, loss) after `steps` steps on seeded batches."""
    p = params() if p is None else p
    state = optimizer.init(p) if state is None else state
    value = None
    for i in range(begin, begin + steps):
        p, state, value = step_of(optimizer)(p, state, data(i))
    return p, state, value
