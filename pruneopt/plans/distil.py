"""Distillation: retraining towards the outputs of the dense network."""

from __future__ import annotations

from collections.abc import Callable
from numbers import Real
from typing import Any

import jax
import jax.numpy as jnp

from pruneopt import _tree

Tree = Any


def distil(
    forward: Callable[[Tree, Any], jax.Array],
    teacher: Tree,
    loss: Callable[[Tree, Any], jax.Array] | None = None,
    *,
    temperature: float = 4.0,
    share: float = 0.9,
) -> Callable[[Tree, Any], jax.Array]:
    """A loss (params, batch) -> scalar for `retrain`:

        share T^2 mean KL(softmax(teacher's logits / T) | softmax(logits / T)) + (1 - share) loss(params, batch).

    forward: (params, batch) -> logits (..., classes). teacher: the dense parameters, held fixed. loss: the labels'
    part; None with share=1: no labels are read. T^2 keeps the gradient's size as T changes.
    Source: Hinton, Vinyals and Dean 2015, section 2. Raises ValueError for a temperature or a share outside its range.
    """
    for name, call in (("forward", forward), ("loss", loss)):
        if not callable(call) and (name == "forward" or call is not None):
            raise TypeError(f"{name} is {call!r}; pass a function (params, batch)")
    number = isinstance(temperature, Real) or (_tree.is_array(temperature) and jnp.ndim(temperature) == 0)
    if not number or not 0 < temperature < float("inf"):
        raise ValueError(f"temperature={temperature!r} is not a positive number; pass one, such as 4.0")
    if not 0 <= share <= 1 or (loss is None and share < 1):
        needs = "share=1 where loss is None" if loss is None else "a number in [0, 1]"
        raise ValueError(f"share={share!r}: pass {needs}, the weight of the teacher")

    def distilled(params: Tree, batch: Any) -> jax.Array:
        wanted = jax.lax.stop_gradient(forward(teacher, batch)) / temperature
        target, found = jax.nn.log_softmax(wanted), jax.nn.log_softmax(forward(params, batch) / temperature)
        divergence = jnp.mean(jnp.sum(jnp.exp(target) * (target - found), axis=-1))
        labels = loss(params, batch) if loss is not None and share < 1 else 0.0
        return share * temperature**2 * divergence + (1 - share) * labels

    return distilled
