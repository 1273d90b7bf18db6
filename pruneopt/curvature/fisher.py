"""The empirical Fisher: second moments of per-example gradients, whole (low rank) or its diagonal."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float

from pruneopt import _data, _tree
from pruneopt.curvature.base import check_memory
from pruneopt.curvature.diagonal import Diagonal
from pruneopt.curvature.low_rank import LowRank, check_ridge
from pruneopt.structure import evaluate
from pruneopt.structure.leaves import Choice, Rest, partition
from pruneopt.structure.per_example import Separable

Tree = Any
# Per-example gradients computed at a time, in bytes and in examples: more do not fit a CPU's cache.
_CHUNK_BYTES, _CHUNK = 1 << 25, 256


def empirical_fisher(
    loss: evaluate.Loss,
    params: Tree,
    batches: _data.Source,
    leaves: Choice = None,
    *,
    ridge: float = 0.0,
    dtype: Any = None,
    memory: int = 1 << 33,
) -> LowRank:
    """F = 1/n sum_i g_i g_i^T + ridge I with g_i the gradient of example i's loss at `params`; n examples in all.

    loss: (params, batch) -> scalar, a mean over examples; it is called on batches of one example.
    leaves: which leaves of `params` are differentiated (default: the prunable ones); None elsewhere.
    dtype: of the n x p gradients: float32 (float64 for float64 leaves) or bfloat16, half the memory at 3 digits.

    Gradients of convolutions in their kernels are activations times deltas (`structure.per_example`), computed a few
    examples at a time and written into place: peak memory is that of the gradients and 32 MiB a chunk. Two passes over
    `batches`. Bit for bit the same however the data is batched.
    Raises ValueError for a loss that is not scalar, fewer than 2 examples, gradients of more than `memory` bytes, a NaN
    or an infinity in a gradient (naming the batch and the leaf), unusable batches.
    Source: Martens 2020, section 11; Singh and Alistarh 2020 (WoodFisher).
    """
    check_ridge(ridge)
    chosen, rest = partition(params, leaves)
    stream = _data.Batches(batches)
    evaluate.check_scalar(loss, chosen, rest, stream)
    layout = _tree.Layout.of(chosen)
    dtype = _dtype(chosen, dtype)
    n = sum(_data.examples(batch) for batch in stream)
    if n < 2:
        raise ValueError(f"batches holds {n} example; a Fisher of one gradient has rank 1: pass at least 2 examples")
    check_memory(
        f"the gradients of {n:,} examples",
        (n, layout.size),
        dtype,
        memory,
        "pass dtype=jnp.bfloat16, fewer examples or leaves=, or use empirical_fisher_diagonal",
    )
    gradients, start = jnp.zeros((n, layout.size), dtype), 0
    for rows in _gradients(loss, chosen, rest, stream, dtype):
        gradients = _written(gradients, rows, start)
        start += rows.shape[0]
    return LowRank(gradients, layout, float(ridge))


def empirical_fisher_diagonal(
    loss: evaluate.Loss, params: Tree, batches: _data.Source, leaves: Choice = None
) -> Diagonal:
    """diag F, F = 1/n sum_i g_i g_i^T with g_i the gradient of example i's loss; n examples in all.

    loss: (params, batch) -> scalar, a mean over examples; it is called on batches of one example.
    leaves: which leaves of `params` are differentiated (default: the prunable ones); the values have None elsewhere.

    Invariant to how the data is batched. Memory: 32 MiB of per-example gradients at a time.
    Raises ValueError for a loss that is not scalar, a NaN or an infinity in a gradient, unusable batches.
    Source: the diagonal of the empirical Fisher, Martens 2020, section 11.
    """
    chosen, rest = partition(params, leaves)
    stream = _data.Batches(batches)
    evaluate.check_scalar(loss, chosen, rest, stream)
    dtype = _dtype(chosen, None)
    total, n = jnp.zeros(_tree.size(chosen), dtype), 0
    for rows in _gradients(loss, chosen, rest, stream, dtype):
        total, n = _with_squares(total, rows), n + rows.shape[0]
    return Diagonal(_tree.Layout.of(chosen).tree(total / jnp.asarray(n, dtype)))


def _dtype(chosen: Tree, asked: Any) -> Any:
    """The dtype of the gradients."""
    widest = max((_tree.wide(x.dtype) for x in jax.tree.leaves(chosen)), key=lambda d: d.itemsize)
    if asked is not None and np.dtype(asked) not in (np.float32, jnp.bfloat16, widest):
        raise ValueError(f"dtype={asked!r} cannot hold gradients; pass jnp.float32 or jnp.bfloat16")
    return np.dtype(widest if asked is None else asked)


def _gradients(
    loss: evaluate.Loss, chosen: Tree, rest: Rest, stream: _data.Batches, dtype: Any
) -> Iterator[Float[Array, "k p"]]:
    """The gradient of each example as a row, k examples at a time. Raises ValueError naming the first bad batch."""
    layout = _tree.Layout.of(chosen)
    size = max(1, min(_CHUNK, _CHUNK_BYTES // (4 * layout.size)))
    for examples, origin in _chunks(stream, size):
        rows, finite = _rows(Separable(loss), dtype, chosen, rest, examples)
        if not np.all(ok := np.asarray(finite)[: len(origin)]):
            bad = int(np.argmin(ok))
            path = _tree.first_nonfinite(layout.tree(rows[bad]))
            raise ValueError(
                f"batches: batch {origin[bad]}: the gradient of fn holds a NaN or an infinity in leaf '{path}'; repair "
                "that batch, or the loss there"
            )
        yield rows if len(origin) == size else rows[: len(origin)]


def _chunks(stream: _data.Batches, size: int) -> Iterator[tuple[Any, list[int]]]:
    """Examples `size` at a time, the last ones repeated to fill their chunk, and the batch that each came from."""
    left, origin = None, []
    for index, batch in enumerate(stream):
        batch = jax.tree.map(np.asarray, batch)
        origin += [index] * _data.examples(batch)
        left = batch if left is None else jax.tree.map(lambda a, b: np.concatenate([a, b]), left, batch)
        while len(origin) >= size:
            yield jax.tree.map(lambda x: x[:size], left), origin[:size]
            left, origin = jax.tree.map(lambda x: x[size:], left), origin[size:]
    if origin:
        more = size - len(origin)
        yield jax.tree.map(lambda x: np.concatenate([x, np.repeat(x[-1:], more, axis=0)]), left), origin


@partial(jax.jit, static_argnames=("loss", "dtype"))
def _rows(
    loss: Separable, dtype: Any, chosen: Tree, rest: Rest, examples: Any
) -> tuple[Float[Array, "k p"], Bool[Array, " k"]]:
    """Each example's gradient as a row, and whether it is finite."""
    layout = _tree.Layout.of(chosen)

    def one(example: Any) -> Array:
        alone = jax.tree.map(lambda x: x[None], example)
        return layout.vector(jax.grad(evaluate.closed(loss, rest, alone))(chosen), dtype)

    rows = jax.vmap(one)(examples)
    return rows, jnp.all(jnp.isfinite(rows), axis=1)


@partial(jax.jit, donate_argnums=0)
def _written(gradients: Array, rows: Array, start: int) -> Array:
    """`gradients` with `rows` from row `start` on, in place."""
    return jax.lax.dynamic_update_slice(gradients, rows, (start, 0))


@jax.jit
def _with_squares(total: Array, rows: Array) -> Array:
    return total + jnp.sum(jnp.square(rows), axis=0)
