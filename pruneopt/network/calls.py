"""Calling the user's functions: losses checked, evaluated and differentiated over batches."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from pruneopt import _tree
from pruneopt.network.batches import Batches, explained
from pruneopt.network.leaves import Rest, combine, is_floating, partition

Tree = Any
Loss = Callable[[Tree, Any], Any]


def outputs(fn: Callable[[Tree, Any], Any], params: Tree, batch: Any) -> Any:
    """Shapes and dtypes of fn(params, batch), without running it."""
    chosen, rest = partition(params, is_floating)
    return jax.eval_shape(lambda c, r, b: fn(combine(c, r), b), chosen, rest, batch)


def with_updates(loss: Loss, rest: Rest, batch: Any, has_updates: bool) -> Callable[[Tree], tuple[jax.Array, Tree]]:
    """The loss as a function of the chosen leaves alone, with the state that it updates (None for no state)."""

    def of(chosen: Tree) -> tuple[jax.Array, Tree]:
        out = loss(combine(chosen, rest), batch)
        return out if has_updates else (out, None)

    return of


def closed(loss: Loss, rest: Rest, batch: Any, has_updates: bool = False) -> Callable[[Tree], jax.Array]:
    """The loss as a function of the chosen leaves alone."""
    return lambda chosen: with_updates(loss, rest, batch, has_updates)(chosen)[0]


def check_scalar(loss: Loss, chosen: Tree, rest: Rest, batches: Batches, has_updates: bool = False) -> None:
    """Raise unless `loss` maps params and the first batch to one floating-point number (before any updates)."""
    if not callable(loss):
        raise TypeError(f"fn is {loss!r}, but this method needs a loss: fn(params, batch) -> scalar")
    if getattr(loss, "__hash__", None) is None:
        raise TypeError(
            f"fn is a {type(loss).__name__}, which has no hash, so that JAX cannot tell it from another loss; pass a "
            "function, or give the class __hash__ = object.__hash__"
        )
    batch = next(iter(batches))
    out: Any = jax.eval_shape(lambda c, r, b: loss(combine(c, r), b), chosen, rest, batch)
    if has_updates:
        if not (isinstance(out, tuple) and len(out) == 2):
            raise ValueError(f"fn returns {out}, but has_updates=True needs (loss, updates)")
        out = out[0]
    elif isinstance(out, tuple) and len(out) == 2:
        raise ValueError("fn returns a pair; for a loss with state pass has_updates=True, else return the loss alone")
    if getattr(out, "shape", None) != () or not jnp.issubdtype(getattr(out, "dtype", bool), jnp.floating):
        raise ValueError(
            f"fn returns {out}, not one floating-point number; pass a loss, fn(params, batch) -> mean over examples"
        )


def check_seen(loss: Loss, chosen: Tree, rest: Rest, batches: Batches) -> None:
    """Raise ValueError, naming them, for chosen leaves in which the derivative of the loss is zero whatever the data.

    Read off the program of the gradient, no data needed: such a leaf's is a zero that nothing flows into.
    """
    gradient_of = lambda c, r, b: jax.grad(closed(loss, r, b))(c)  # noqa: E731
    program = jax.make_jaxpr(gradient_of)(chosen, rest, next(iter(batches))).jaxpr
    maker = {var: equation for equation in program.eqns for var in equation.outvars}

    def is_zero(atom: Any) -> bool:
        if hasattr(atom, "val"):
            return not np.any(np.asarray(atom.val))
        equation = maker.get(atom)
        return equation is not None and equation.primitive.name == "broadcast_in_dim" and is_zero(equation.invars[0])

    paths = [path for path, _ in _tree.named_leaves(chosen)]
    unseen = [path for path, atom in zip(paths, program.outvars, strict=True) if is_zero(atom)]
    if unseen:
        raise ValueError(
            f"leaves: the derivative of fn does not see {_tree.listed(unseen)}: fn does not use it, or reads it behind "
            "stop_gradient or as whole numbers, so that it ranks none of its weights; leave it out of leaves=, or pass "
            "a method without derivatives, such as method='magnitude'"
        )


@partial(jax.jit, static_argnames=("loss", "has_updates"))
def value(loss: Loss, chosen: Tree, rest: Rest, batch: Any, has_updates: bool = False) -> jax.Array:
    """The loss on one batch."""
    return closed(loss, rest, batch, has_updates)(chosen)


@partial(jax.jit, static_argnames=("loss", "has_updates"))
def gradient(loss: Loss, chosen: Tree, rest: Rest, batch: Any, has_updates: bool = False) -> Tree:
    """The gradient of the loss on one batch."""
    return jax.grad(closed(loss, rest, batch, has_updates))(chosen)


def mean_value(loss: Loss, chosen: Tree, rest: Rest, batches: Batches, has_updates: bool = False) -> float:
    """Mean of the loss over all examples, summed in Python floats."""
    total, n = 0.0, 0.0
    for batch in batches:
        size = batches.weight(batch)
        total += size * float(value(loss, chosen, rest, batch, has_updates))
        n += size
    return total / n


def check_value(loss: Loss, chosen: Tree, rest: Rest, batch: Any, where: str, has_updates: bool = False) -> None:
    """Raise ValueError where the loss on a batch, called `where`, is a NaN or an infinity."""
    found = float(value(loss, chosen, rest, batch, has_updates))
    if not math.isfinite(found):
        raise ValueError(
            f"{where}: fn returns {found} at the given params{explained(batch)}; repair that batch, or the loss there"
        )


def mean_gradient(loss: Loss, chosen: Tree, rest: Rest, batches: Batches, has_updates: bool = False) -> Tree:
    """Mean of the gradient over all examples. Raises ValueError for a NaN or an infinity, naming the batch."""
    return batches.finite_mean(
        lambda batch: gradient(loss, chosen, rest, batch, has_updates),
        "the gradient of fn",
        lambda batch, where: check_value(loss, chosen, rest, batch, where, has_updates),
    )
