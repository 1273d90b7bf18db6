"""The empirical Fisher: second moments of per-example gradients."""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from pruneopt import _data, _tree
from pruneopt.curvature.diagonal import Diagonal
from pruneopt.structure import evaluate
from pruneopt.structure.leaves import Choice, Rest, check_finite, partition

Tree = Any
# Per-example gradients held at a time, in bytes; larger batches are scanned in chunks.
_CHUNK_BYTES = 1 << 28


def empirical_fisher_diagonal(
    loss: evaluate.Loss, params: Tree, batches: _data.Source, leaves: Choice = None
) -> Diagonal:
    """diag F, F = 1/n sum_i g_i g_i^T with g_i the gradient of example i's loss; n examples in all.

    loss: (params, batch) -> scalar, a mean over examples; it is called on batches of one example.
    leaves: which leaves of `params` are differentiated (default: the prunable ones); the values have None elsewhere.

    Invariant to how the data is batched. Memory: per-example gradients of at most 256 MiB at a time.
    Raises ValueError for a loss that is not scalar, a NaN or an infinity in a gradient, unusable batches.
    Source: the diagonal of the empirical Fisher, Martens 2020, section 11.
    """
    chosen, rest = partition(params, leaves)
    chunk = max(1, _CHUNK_BYTES // (4 * _tree.size(chosen)))
    stream = _data.Batches(batches)
    evaluate.check_scalar(loss, chosen, rest, stream)
    mean = stream.mean(lambda batch: _mean_square(loss, chunk, chosen, rest, batch))
    return Diagonal(check_finite(mean, "the gradient of fn"))


@partial(jax.jit, static_argnames=("loss", "chunk"))
def _mean_square(loss: evaluate.Loss, chunk: int, chosen: Tree, rest: Rest, batch: Any) -> Tree:
    def squared(example):
        alone = jax.tree.map(lambda x: x[None], example)
        gradient = jax.grad(evaluate.closed(loss, rest, alone))(chosen)
        return jax.tree.map(lambda g: jnp.square(g.astype(_tree.wide(g.dtype))), gradient)

    def added(total, piece):
        return jax.tree.map(lambda t, s: t + jnp.sum(s, axis=0), total, jax.vmap(squared)(piece)), None

    n = _data.examples(batch)
    cut = n - n % chunk
    total = jax.tree.map(lambda x: jnp.zeros(x.shape, _tree.wide(x.dtype)), chosen)
    if cut:
        pieces = jax.tree.map(lambda x: x[:cut].reshape(cut // chunk, chunk, *x.shape[1:]), batch)
        total, _ = lax.scan(added, total, pieces)
    if n % chunk:
        total, _ = added(total, jax.tree.map(lambda x: x[cut:], batch))
    return jax.tree.map(lambda t: t / jnp.asarray(n, t.dtype), total)
