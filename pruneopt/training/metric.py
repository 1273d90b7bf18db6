"""The diagonal metric in which an adaptive optimiser steps: w - learning_rate * d * momentum, d from its state."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from pruneopt import _tree

Tree = Any
Metric = Callable[[Any], Tree]


def adam_metric(b2: float = 0.999, eps: float = 1e-8, eps_root: float = 0.0) -> Metric:
    """d = 1 / (sqrt(v / (1 - b2^t) + eps_root) + eps), v the second moments in the state of Adam, AdamW and their kin.

    Give the constants that the optimiser was given; these are optax's defaults. Before
    the first step d is 1 / eps everywhere. Source: Kingma and Ba 2015, alg. 1.
    """

    def metric(state: Any) -> Tree:
        adam = _the(state, optax.ScaleByAdamState, "adam_metric")

        def one(v: jax.Array) -> jax.Array:
            v = v.astype(_tree.wide(v.dtype))
            seen = 1 - jnp.asarray(b2, v.dtype) ** jnp.maximum(adam.count, 1).astype(v.dtype)
            return 1 / (jnp.sqrt(v / seen + eps_root) + eps)

        return jax.tree.map(one, adam.nu)

    return metric


def rms_metric(eps: float = 1e-8) -> Metric:
    """d = 1 / sqrt(v + eps), v the second moments in the state of `optax.rmsprop`. Source: Tieleman and Hinton 2012."""

    def metric(state: Any) -> Tree:
        rms = _the(state, optax.ScaleByRmsState, "rms_metric")
        return jax.tree.map(lambda v: jax.lax.rsqrt(v.astype(_tree.wide(v.dtype)) + eps), rms.nu)

    return metric


def _the(state: Any, kind: type, name: str) -> Any:
    found = [s for s in jax.tree.leaves(state, is_leaf=lambda s: isinstance(s, kind)) if isinstance(s, kind)]
    if len(found) != 1:
        raise ValueError(
            f"metric={name}() finds {len(found)} states of {kind.__name__} in the optimiser's state; it reads one: "
            "pass the metric of your optimiser, a function from its state to a tree like the parameters"
        )
    return found[0]
