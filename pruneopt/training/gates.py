"""Hard-concrete gates: each weight, or slice of a leaf, is multiplied by a random gate that can be exactly zero."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import lax

from pruneopt import _tree
from pruneopt.constraints.base import Constraint, check_orientation
from pruneopt.network.leaves import Choice
from pruneopt.penalties.base import check_weight
from pruneopt.solution import Pruned
from pruneopt.training.base import (
    SparseOptimizer,
    as_optimizer,
    check_alive,
    check_trained,
    checked,
    chosen,
    everywhere,
    filled,
    is_hole,
    own_state,
    towards,
)
from pruneopt.training.schedule import check_steps

Tree = Any
Scope = Literal["weight", "in", "out"]

# Temperature and stretch. Source: Louizos et al. 2018, section 4.
BETA, GAMMA, ZETA = 2 / 3, -0.1, 1.1


class GatedState(NamedTuple):
    """The gated weights and what moves them.

    step: updates made. weights: theta. log_alpha: one number a gate. gates: z of the current params, one a gate.
    masks: what lives once the gates are fixed, everything before. price: what one expected living weight costs.
    inner, gate_inner: the optimisers' states.
    """

    step: jax.Array
    weights: Tree
    log_alpha: Tree
    gates: Tree
    masks: Tree
    price: jax.Array
    inner: Any
    gate_inner: Any


def l0(
    optimizer: optax.GradientTransformation,
    weight: float,
    *,
    gate_optimizer: optax.GradientTransformation | None = None,
    per: Scope = "weight",
    open_: float = 0.5,
    end: int | None = None,
    leaves: Choice = None,
    key: jax.Array | int = 0,
) -> SparseOptimizer:
    """minimise E_z f(theta z) + weight E |z|_0 over weights theta and the gates' distribution; |z|_0 counts weights.

    z = clip(s (ZETA - GAMMA) + GAMMA, 0, 1), s = sigmoid((log u - log(1 - u) + log_alpha) / BETA), u uniform, so that
    P(z != 0) = sigmoid(log_alpha - BETA log(-GAMMA / ZETA)). The params in the user's loop are theta z with gates drawn
    for the next batch; their gradient gives those of theta and log_alpha by the chain rule, so the loss stays as it is.
    `finish` gives theta times the gates' noiseless estimate, exactly zero where that is.

    weight: of one living weight, such as 0.1 / (training examples). per: a gate for each "weight", each "in" (an index
        of all axes but the last: an input, with all its weights) or each "out" (of the last: a neuron, a filter).
    open_: first P(s > 1/2) of a gate, in (0, 1). end: from that step on the gates are fixed at that estimate, what it
        left is trained on. gate_optimizer: of log_alpha; None: as `optimizer`. key: of the draws.
    Source: Louizos, Welling and Kingma 2018, equations 10 to 13. Raises ValueError for a negative or NaN weight,
    and at `finish` where the params are not theta z, since something chained after this one moved them.
    """
    check_weight(weight)

    def price(_: jax.Array, living: jax.Array, theta: Tree) -> jax.Array:
        return jnp.asarray(weight, living.dtype)

    def select(estimate: Tree) -> Tree:
        return jax.tree.map(lambda w: w != 0, estimate)

    gate_inner = optimizer if gate_optimizer is None else gate_optimizer
    return Gating("l0", optimizer, gate_inner, per, open_, end, leaves, key, None, weight, price, select).optimizer()


class Gating(NamedTuple):
    """What methods with gates share: `l0` has a fixed price, `lagrangian` a constraint that sets it.

    priced(price, E|z|_0, theta) is the next price; select(theta z) the support at the end.
    """

    name: str
    inner: optax.GradientTransformation
    gate_inner: optax.GradientTransformation
    per: Scope
    open_: float
    end: int | None
    leaves: Choice
    key: jax.Array | int
    constraint: Constraint | None
    first_price: float
    priced: Callable[[jax.Array, jax.Array, Tree], jax.Array]
    select: Callable[[Tree], Tree]

    def optimizer(self) -> SparseOptimizer:
        """The transformation. Raises ValueError or TypeError for arguments that are none of those named in `l0`."""
        inner, gate_inner = as_optimizer(self.inner, self.name), as_optimizer(self.gate_inner, self.name)
        if self.end is not None:
            check_steps("end", self.end)
        if self.per not in ("weight", "in", "out"):
            raise ValueError(f"per={self.per!r} is unknown; pass 'weight', 'in' or 'out'")
        if not 0 < self.open_ < 1:
            raise ValueError(f"open_={self.open_!r} is outside (0, 1); pass the first probability of an open gate")
        made = self._replace(inner=inner, gate_inner=gate_inner)
        return SparseOptimizer(
            made.init, made.update, made.finish, "" if self.constraint is None else self.constraint.scope()
        )

    def init(self, params: Tree) -> GatedState:
        """Every gate open with probability `open_`."""
        theta = jax.tree.map(jnp.array, chosen(params, self.leaves, self.constraint))
        if self.per != "weight":
            check_orientation(f"per={self.per!r}", theta, "pass per='weight', or leave it out with leaves=")
        first = math.log(self.open_ / (1 - self.open_))
        log_alpha = jax.tree.map(lambda w: jnp.full(gate_shape(w.shape, self.per), first, _tree.wide(w.dtype)), theta)
        dtype = _tree.wide(jax.tree.leaves(theta)[0].dtype)
        return GatedState(
            jnp.zeros((), jnp.int32), theta, log_alpha, jax.tree.map(jnp.ones_like, log_alpha), everywhere(theta),
            jnp.asarray(self.first_price, dtype), self.inner.init(params), self.gate_inner.init(log_alpha),
        )  # fmt: skip

    def update(
        self, gradient: Tree, state: GatedState, params: Tree | None = None, **extra: Any
    ) -> tuple[Tree, GatedState]:
        """One step of the gates, one of the weights, and gates for the next batch."""
        params = checked(params, gradient, state.weights)
        log_alpha, gate_inner, price = self._gates_moved(gradient, state)
        through = jax.tree.map(
            lambda z, m, g: g if z is None else gated(g, z, m), state.gates, state.masks, gradient, is_leaf=is_hole
        )
        updates, inner = self.inner.update(through, state.inner, filled(state.weights, params), **extra)
        theta = jax.tree.map(
            lambda w, u: None if w is None else w + u.astype(w.dtype), state.weights, updates, is_leaf=is_hole
        )
        theta, gates, masks = self._drawn(state, theta, log_alpha)
        sparse = jax.tree.map(gated, theta, gates, masks)
        state = GatedState(state.step + 1, theta, log_alpha, gates, masks, price, inner, gate_inner)
        return towards(sparse, params, updates), state

    def _gates_moved(self, gradient: Tree, state: GatedState) -> tuple[Tree, Any, jax.Array]:
        """log_alpha after a step, its optimiser's state, and the price: the chain rule through z, and being open."""
        theta, log_alpha = state.weights, state.log_alpha

        def gate_gradient(a: jax.Array, g: jax.Array, w: jax.Array, z: jax.Array) -> jax.Array:
            axes = tuple(i for i, (n, m) in enumerate(zip(a.shape, w.shape, strict=True)) if n < m)
            p = open_probability(a)
            along = jnp.sum((g * w).astype(a.dtype), axis=axes, keepdims=True)
            return along * slope(z) + price * (w.size // a.size) * p * (1 - p)

        living = sum(
            jnp.sum(open_probability(a)) * (w.size // a.size)
            for a, w in zip(jax.tree.leaves(log_alpha), jax.tree.leaves(theta), strict=True)
        )
        price = self.priced(state.price, jnp.asarray(living, state.price.dtype), theta)
        picked = jax.tree.map(lambda w, g: None if w is None else g, theta, gradient, is_leaf=is_hole)
        slopes = jax.tree.map(gate_gradient, log_alpha, picked, theta, state.gates)
        step, new = self.gate_inner.update(slopes, state.gate_inner, log_alpha)
        return optax.apply_updates(log_alpha, step), new, price

    def _drawn(self, state: GatedState, theta: Tree, log_alpha: Tree) -> tuple[Tree, Tree, Tree]:
        """theta, gates and masks for the next batch: drawn before `end`, fixed at it, as they are after it."""

        def draw(w: Tree, z: Tree, m: Tree) -> tuple[Tree, Tree, Tree]:
            key = jax.random.fold_in(jax.random.key(self.key) if isinstance(self.key, int) else self.key, state.step)
            leaves, structure = jax.tree.flatten(log_alpha)
            keys = jax.random.split(key, len(leaves))
            return w, jax.tree.unflatten(structure, [sample(k, a) for k, a in zip(keys, leaves, strict=True)]), m

        def fix(w: Tree, z: Tree, m: Tree) -> tuple[Tree, Tree, Tree]:
            w = jax.tree.map(estimated, log_alpha, w)
            return w, jax.tree.map(jnp.ones_like, z), self.select(w)

        if self.end is None:
            return draw(theta, state.gates, state.masks)
        phase = jnp.sign(state.step - self.end) + 1
        return lax.switch(phase, [draw, fix, lambda w, z, m: (w, z, m)], theta, state.gates, state.masks)

    def finish(self, params: Tree, state: Any) -> Pruned:
        """theta times the gates without noise, on what `select` keeps of it; what training left of it after `end`."""
        own = own_state(state, GatedState, params)
        sparse = jax.tree.map(gated, own.weights, own.gates, own.masks)
        check_trained(params, sparse, own.weights, own.step, self.name)
        if self.end is not None and int(own.step) > self.end:
            kept, masks = own.weights, own.masks
        else:
            kept = jax.tree.map(estimated, own.log_alpha, own.weights)
            masks = self.select(kept)
        done = Pruned(filled(_tree.masked(kept, masks), params), masks)
        return done if self.constraint is None else check_alive(done, self.constraint)


def open_probability(log_alpha: jax.Array) -> jax.Array:
    """P(z != 0). Source: Louizos et al. 2018, equation 12."""
    return jax.nn.sigmoid(log_alpha - BETA * math.log(-GAMMA / ZETA))


def sample(key: jax.Array, log_alpha: jax.Array) -> jax.Array:
    """Gates z, from 16 random bits each. Source: Louizos et al. 2018, equations 10 and 11.

    s is written as 1 / (1 + x^(1 / BETA)), x = (1 - u) / u / alpha: drawing and this are most of what a gate costs.
    """
    words = jax.random.bits(key, (-(-log_alpha.size // 2),), jnp.uint32)
    halves = jnp.concatenate([words & 0xFFFF, words >> 16])[: log_alpha.size].reshape(log_alpha.shape)
    u = (halves.astype(log_alpha.dtype) + 0.5) / 2**16
    x = (1 - u) / u * jnp.exp(-log_alpha)
    s = 1 / (1 + x * jnp.sqrt(x))
    return jnp.clip(s * (ZETA - GAMMA) + GAMMA, 0, 1)


def estimate(log_alpha: jax.Array) -> jax.Array:
    """Gates without noise. Source: Louizos et al. 2018, equation 13."""
    return jnp.clip(jax.nn.sigmoid(log_alpha) * (ZETA - GAMMA) + GAMMA, 0, 1)


def slope(z: jax.Array) -> jax.Array:
    """dz / dlog_alpha, read off z: zero where it is clipped."""
    s = (z - GAMMA) / (ZETA - GAMMA)
    return jnp.where((z > 0) & (z < 1), (ZETA - GAMMA) * s * (1 - s) / BETA, jnp.zeros((), z.dtype))


def gate_shape(shape: tuple[int, ...], per: Scope) -> tuple[int, ...]:
    """One entry for each gate of a leaf, broadcastable to it."""
    if per == "weight":
        return shape
    return (*shape[:-1], 1) if per == "in" else (*(1 for _ in shape[:-1]), *shape[-1:])


def gated(weights: jax.Array, gates: jax.Array, mask: jax.Array) -> jax.Array:
    """Each weight times its gate, zero off the mask."""
    return jnp.where(mask, weights * gates.astype(weights.dtype), jnp.zeros((), weights.dtype))


def estimated(log_alpha: jax.Array, weights: jax.Array) -> jax.Array:
    """theta times the noiseless gates."""
    return weights * estimate(log_alpha).astype(weights.dtype)
