"""A support that training keeps: weights, updates and optimiser state are exactly zero off it."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import optax

from pruneopt import _tree
from pruneopt.constraints.support import Support
from pruneopt.network.leaves import Choice
from pruneopt.solution import Pruned
from pruneopt.training.base import (
    MaskedState,
    SparseOptimizer,
    as_optimizer,
    checked,
    chosen,
    on_support,
    own_state,
    step_on,
)

Tree = Any


def freeze(
    optimizer: optax.GradientTransformation, masks: Pruned | Tree | None = None, *, leaves: Choice = None
) -> SparseOptimizer:
    """minimise f(w) subject to w = 0 off a fixed support, by any optimiser.

    At every step the optimiser sees a gradient that is zero off the support; then updates, weights and whatever of its
    state has the shape of a parameter (momentum, second moments) are zero there, to the bit, in any dtype. So weights
    that were cut late carry no old momentum, and decay, noise or clipping inside `optimizer` see only what lives.
    `optax.masked` and a masked gradient alone do neither.

    masks: what `prune` returned, or a tree of booleans, None or no entry where nothing is pruned; None: the weights
        that are exactly zero at `init` stay zero, in the leaves chosen by `leaves` (as in `prune`; with None alone).
    Everything that moves weights belongs inside: freeze(optax.chain(...)). What is chained after it can move them, and
    `finish` then raises ValueError. Raises ValueError or TypeError at `init` for masks that do not fit the parameters.
    """
    inner = as_optimizer(optimizer, "freeze")
    support = masks.support if isinstance(masks, Pruned) else masks
    if support is not None and leaves is not None:
        raise ValueError(
            f"leaves={leaves!r} and masks are both given, but masks say themselves which leaves they hold; drop "
            "leaves=, or pass the masks of those leaves alone"
        )

    def init(params: Tree) -> MaskedState:
        if support is None:
            held = jax.tree.map(lambda w: w != 0, chosen(params, leaves))
        else:
            named = dict(_tree.named_leaves(support))
            Support(named).check({p: x for p, x in _tree.named_leaves(params) if p in named or _tree.is_array(x)})
            held = _tree.map_named(lambda p, _: jnp.array(named[p]) if p in named else None, params)
        return MaskedState(jnp.zeros((), jnp.int32), held, inner.init(params))

    def update(
        gradient: Tree, state: MaskedState, params: Tree | None = None, **extra: Any
    ) -> tuple[Tree, MaskedState]:
        params = checked(params, gradient, state.masks)
        updates, new = step_on(inner, gradient, state.inner, params, state.masks, extra)
        return updates, MaskedState(state.step + 1, state.masks, new)

    def finish(params: Tree, state: Any) -> Pruned:
        own = own_state(state, MaskedState, params)
        return on_support(params, own.masks, own.step, "freeze")

    return SparseOptimizer(init, update, finish, "a given support")
