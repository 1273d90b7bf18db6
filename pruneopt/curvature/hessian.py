"""The exact Hessian of the loss, through Hessian-vector products."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from pruneopt import _data, _tree
from pruneopt.curvature.diagonal import Diagonal
from pruneopt.structure import evaluate
from pruneopt.structure.leaves import Choice, Rest, check_finite, partition

Tree = Any


def hessian_vector_product(loss: Callable[[Tree], Any], at: Tree, direction: Tree) -> Tree:
    """H d for the Hessian H of `loss` at `at`, forward over reverse: the cost of about two gradients."""
    return jax.jvp(jax.grad(loss), (at,), (direction,))[1]


def hutchinson_diagonal(
    loss: evaluate.Loss,
    params: Tree,
    batches: _data.Source,
    leaves: Choice = None,
    *,
    probes: int = 8,
    key: jax.Array | None = None,
) -> Diagonal:
    """diag H estimated as the mean over probes of v * (H v), v of random signs; H the Hessian of the mean loss.

    loss: (params, batch) -> scalar, a mean over examples. leaves: which leaves are differentiated, as in
    `prune`. probes: number of sign vectors; the variance of an entry is the sum of its row's squared
    off-diagonal entries over `probes`. key: defaults to seed 0; the same probes serve every batch, so the
    result does not depend on the batching.

    Entries may be negative: the Hessian of a network is indefinite.
    Raises ValueError for a loss that is not scalar, probes < 1, non-finite products, unusable batches.
    Source: Bekas, Kokiopoulou, Saad 2007, section 2.
    """
    if probes < 1:
        raise ValueError(f"probes={probes!r} is below 1; pass the number of random sign vectors")
    chosen, rest = partition(params, leaves)
    stream = _data.Batches(batches)
    evaluate.check_scalar(loss, chosen, rest, stream)
    keys = jax.random.split(jax.random.key(0) if key is None else key, probes)
    mean = stream.mean(lambda batch: _mean_probe(loss, chosen, rest, batch, keys))
    return Diagonal(check_finite(mean, "the Hessian of fn"))


@partial(jax.jit, static_argnames=("loss",))
def _mean_probe(loss: evaluate.Loss, chosen: Tree, rest: Rest, batch: Any, keys: jax.Array) -> Tree:
    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, _tree.wide(x.dtype)), chosen)
    flat, structure = jax.tree.flatten(chosen)
    ends = np.cumsum([x.size for x in flat])

    def probe(total, key):
        # One draw for the whole tree: compiling the generator for each leaf takes seconds a shape.
        draw = jax.random.bits(key, (int(ends[-1]),), jnp.uint8) < 128
        signs = jax.tree.unflatten(
            structure,
            [
                jnp.where(draw[end - x.size : end], 1.0, -1.0).reshape(x.shape).astype(x.dtype)
                for x, end in zip(flat, ends, strict=True)
            ],
        )
        product = hessian_vector_product(evaluate.closed(loss, rest, batch), chosen, signs)
        return jax.tree.map(lambda t, v, hv: t + (v * hv).astype(t.dtype), total, signs, product), None

    total, _ = lax.scan(probe, zeros, keys)
    return jax.tree.map(lambda t: t / jnp.asarray(keys.shape[0], t.dtype), total)
