"""A constraint's selection inside a loop: a threshold that follows its budget, or the exact selection."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float

from pruneopt.constraints import parts
from pruneopt.constraints.base import Constraint

State = Any


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Threshold:
    """About `counts` of the largest |T| in each scope, by one step of Newton on the logarithm of a threshold a call.

    The threshold is warm, so that it follows T from iteration to iteration for a fraction of the cost of a selection.
    axis: None for one scope, 0 for one an input, 1 for one an output; span: so many of them share one.
    """

    counts: Float[Array, " g"]
    axis: int | None = field(metadata={"static": True})
    span: int = field(metadata={"static": True})

    def start(self, t: Float[Array, "n m"]) -> State:
        """The logarithm of each scope's threshold by bisection over 20 e-folds below the largest |T|, to 0.5 %."""
        high = jnp.log(jnp.maximum(jnp.max(jnp.abs(t)), jnp.finfo(t.dtype).tiny)) + jnp.zeros_like(self.counts)

        def halve(_, ends):
            low, high = ends
            middle = (low + high) / 2
            over = self._count(t, middle) > self.counts
            return jnp.where(over, middle, low), jnp.where(over, high, middle)

        low, high = lax.fori_loop(0, 12, halve, (high - 20, high))
        return self.turn(t, ((low + high) / 2, high))

    def turn(self, t: Float[Array, "n m"], state: State) -> State:
        """The state with the slope of the count measured anew, by counts 5 % below and above the threshold."""
        level, _ = state
        slope = (self._count(t, level - 0.05) - self._count(t, level + 0.05)) * 10
        return level, slope + 1e-3 * self.counts + 1e-3

    def mask(self, t: Float[Array, "n m"], state: State) -> tuple[Bool[Array, "n m"], State]:
        """Which entries are kept, and the next state."""
        level, slope = state
        level = level + jnp.clip((self._count(t, level) - self.counts) / slope, -0.3, 0.3)
        return jnp.abs(t) > self._spread(jnp.exp(level), t), (level, slope)

    def _count(self, t: Float[Array, "n m"], level: Float[Array, " g"]) -> Float[Array, " g"]:
        kept = jnp.where(jnp.abs(t) > self._spread(jnp.exp(level), t), jnp.ones((), t.dtype), jnp.zeros((), t.dtype))
        if self.axis is None:
            return jnp.sum(jnp.sum(kept, axis=0))[None]
        each = jnp.sum(kept, axis=1 - self.axis)
        missing = -each.shape[0] % self.span
        return jnp.sum(jnp.pad(each, (0, missing)).reshape(-1, self.span), axis=1)

    def _spread(self, level: Float[Array, " g"], t: Float[Array, "n m"]) -> Float[Array, "n m"]:
        if self.axis is None:
            return jnp.broadcast_to(level[:, None], (1, 1))
        each = jnp.repeat(level, self.span)[: t.shape[self.axis]]
        return each[:, None] if self.axis == 0 else each[None, :]


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Groups:
    """The `n` largest |T| of every `m` consecutive ones along `axis`, and those that equal the n-th of them."""

    n: int = field(metadata={"static": True})
    m: int = field(metadata={"static": True})
    axis: int = field(metadata={"static": True})

    def start(self, t: Float[Array, "n m"]) -> State:
        """Nothing."""
        return ()

    def turn(self, t: Float[Array, "n m"], state: State) -> State:
        """Nothing."""
        return state

    def mask(self, t: Float[Array, "n m"], state: State) -> tuple[Bool[Array, "n m"], State]:
        """By insertion into the n largest so far: minima and maxima alone."""
        shape = (-1, self.m, t.shape[1]) if self.axis == 0 else (t.shape[0], -1, self.m)
        size = jnp.abs(t).reshape(shape)
        largest: list[Array] = []
        for i in range(self.m):
            new = lax.index_in_dim(size, i, self.axis + 1, keepdims=True)
            for j, old in enumerate(largest):
                largest[j], new = jnp.maximum(old, new), jnp.minimum(old, new)
            largest = [*largest, new][: self.n]
        return (size >= largest[-1]).reshape(t.shape), state


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Selection:
    """What the choices select in turn for the scores T^2."""

    choices: tuple[parts.Choice, ...] = field(metadata={"static": True})

    def start(self, t: Float[Array, "n m"]) -> State:
        """Nothing."""
        return ()

    def turn(self, t: Float[Array, "n m"], state: State) -> State:
        """Nothing."""
        return state

    def mask(self, t: Float[Array, "n m"], state: State) -> tuple[Bool[Array, "n m"], State]:
        """The selection."""
        return parts.chosen(self.choices, t * t), state


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Masking:
    """How to select inside a loop: among what is `allowed` (None: everything), as `choose` does."""

    choose: Threshold | Groups | Selection
    allowed: Bool[Array, "n m"] | None

    def start(self, t: Float[Array, "n m"]) -> State:
        """The state before the first call."""
        return self.choose.start(self._allowed(t))

    def turn(self, t: Float[Array, "n m"], state: State) -> State:
        """The state where rho changes."""
        return self.choose.turn(self._allowed(t), state)

    def mask(self, t: Float[Array, "n m"], state: State) -> tuple[Bool[Array, "n m"], State]:
        """Which entries are kept, and the next state."""
        mask, state = self.choose.mask(self._allowed(t), state)
        return (mask if self.allowed is None else mask & self.allowed), state

    def _allowed(self, t: Float[Array, "n m"]) -> Float[Array, "n m"]:
        return t if self.allowed is None else jnp.where(self.allowed, t, jnp.zeros((), t.dtype))


def projection(constraint: Constraint, shape: tuple[int, ...], dtype: Any) -> Masking:
    """The masking of a constraint for matrices of `shape`."""
    found = parts.of(constraint, ndim=2)
    allowed = found.allowed(jnp.zeros(shape)) if found.masks else None
    if found.fixed:  # everything that is allowed
        return Masking(Threshold(jnp.full((1,), shape[0] * shape[1], dtype), None, 1), allowed)
    one = found.one
    if one is not None and one.free and one.group and one.box and one.group[0] * one.group[1] <= 64:
        return Masking(Groups(*one.group, axis=0 if one.box[1] == 1 else 1), allowed)
    if one is None or one.counts is None or one.box is None or -1 not in one.box:
        return Masking(Selection(found.choices), allowed)
    axis = None if one.box == (-1, -1) else one.box.index(-1) ^ 1
    return Masking(
        Threshold(jnp.asarray(one.counts(shape), dtype), axis, 1 if axis is None else one.box[axis]), allowed
    )


def selected(constraint: Constraint, scores: Float[Array, "n m"]) -> Bool[Array, "n m"]:
    """constraint.select(scores) from outside a program; compiled where that pays: not for budgets of single weights."""
    found = parts.of(constraint, ndim=2)
    if found.masks:
        scores = jnp.where(found.allowed(scores), scores, jnp.asarray(-jnp.inf, scores.dtype))
    if found.fixed or all(choice.counts for choice in found.choices):
        return replace(found, masks=()).select(scores)
    return _selected(found.choices, scores)


@partial(jax.jit, static_argnums=0)
def _selected(choices: tuple[parts.Choice, ...], scores: Float[Array, "n m"]) -> Bool[Array, "n m"]:
    return parts.chosen(choices, scores)
