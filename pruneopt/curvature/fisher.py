"""The empirical Fisher: second moments of per-example gradients, whole (low rank) or its diagonal."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float

from pruneopt import _tree
from pruneopt.curvature.base import check_memory, check_ridge
from pruneopt.curvature.diagonal import Diagonal
from pruneopt.curvature.low_rank import LowRank
from pruneopt.network import calls
from pruneopt.network.batches import Batches, Source, each, explained
from pruneopt.network.leaves import Choice, Rest
from pruneopt.program.per_example import Separable
from pruneopt.structure.defaults import loss_network

Tree = Any
# Per-example gradients computed at a time, in bytes and in examples: more do not fit a CPU's cache.
_CHUNK_BYTES, _CHUNK = 1 << 24, 256


@_tree.on_host
def empirical_fisher(
    loss: calls.Loss,
    params: Tree,
    batches: Source,
    leaves: Choice = None,
    *,
    ridge: float = 0.0,
    dtype: Any = None,
    memory: int = 1 << 33,
) -> LowRank:
    """F = 1/n sum_i g_i g_i^T + ridge I with g_i the gradient of example i's loss at `params`; n examples in all.

    loss: (params, batch) -> scalar, a mean over examples; it is called on batches of one example, so every array of a
        batch has an entry an example, keys included.
    leaves: which leaves of `params` are differentiated (default: the prunable ones); None elsewhere.
    dtype: of the n x p gradients: float32 (float64 for float64 leaves) or bfloat16, half the memory at 3 digits.

    Gradients of convolutions in their kernels are activations times deltas (`structure.per_example`), computed a few
    examples at a time and written into place: peak memory is that of the gradients and 16 MiB a chunk. Two passes over
    `batches`. Bit for bit the same however the data is batched.
    Raises ValueError for a loss that is not scalar, fewer than 2 examples, gradients of more than `memory` bytes, a NaN
    or an infinity in a gradient (naming the batch and the leaf), an array that is not one entry an example, unusable
    batches.
    Source: Martens 2020, section 11; Singh and Alistarh 2020 (WoodFisher).
    """
    check_ridge(ridge)
    _, chosen, rest, stream = loss_network(loss, params, batches, leaves).parts
    layout = _tree.Layout.of(chosen)
    dtype = _dtype(chosen, dtype)
    n = sum(each(batch, f"{stream.name}: batch {index}")[1] for index, batch in enumerate(stream))
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
    for chunk, origin, new in _chunks(stream, _at_once(layout)):
        start += new - len(origin) if start else 0  # the last chunk overlaps the one before
        found, finite = _each(Separable(loss), chosen, rest, chunk)
        _check(loss, chosen, rest, chunk, found, finite, origin)
        gradients = _written(gradients, found, start)
        start += len(origin)
    return LowRank(gradients, layout, float(ridge))


@_tree.on_host
def empirical_fisher_diagonal(loss: calls.Loss, params: Tree, batches: Source, leaves: Choice = None) -> Diagonal:
    """diag F, F = 1/n sum_i g_i g_i^T with g_i the gradient of example i's loss; n examples in all.

    loss: (params, batch) -> scalar, a mean over examples; it is called on batches of one example.
    leaves: which leaves of `params` are differentiated (default: the prunable ones); the values have None elsewhere.

    Invariant to how the data is batched. Memory: 16 MiB of per-example gradients at a time.
    Raises ValueError for a loss that is not scalar, a NaN or an infinity in a gradient, unusable batches.
    Source: the diagonal of the empirical Fisher, Martens 2020, section 11.
    """
    _, chosen, rest, stream = loss_network(loss, params, batches, leaves).parts
    layout, n = _tree.Layout.of(chosen), 0
    total = jnp.zeros(layout.size, _dtype(chosen, None))
    for chunk, origin, new in _chunks(stream, _at_once(layout)):
        found, finite = _each(Separable(loss), chosen, rest, chunk)
        _check(loss, chosen, rest, chunk, found, finite, origin)
        total, n = _with_squares(total, found, new), n + new
    return Diagonal(layout.tree(total / jnp.asarray(n, total.dtype)))


@_tree.on_host
def projected_fisher(
    loss: calls.Loss,
    params: Tree,
    batches: Source,
    leaves: Choice = None,
    *,
    project: Callable[[Tree, Tree], Float[Array, " k"]],
) -> Float[np.ndarray, " k"]:
    """diag(P F P^T) = 1/n sum_i (P g_i)^2, F the empirical Fisher of n examples and P a linear map of gradients.

    project: (gradient, weights) -> P gradient, both trees of the chosen leaves; it has a hash, and JAX traces it. The
        rest is as of `empirical_fisher_diagonal`, errors too.
    """
    _, chosen, rest, stream = loss_network(loss, params, batches, leaves).parts
    layout, n, total = _tree.Layout.of(chosen), 0, 0.0
    for chunk, origin, new in _chunks(stream, _at_once(layout)):
        found, finite = _each(Separable(loss), chosen, rest, chunk)
        _check(loss, chosen, rest, chunk, found, finite, origin)
        part = np.asarray(_projected(project, layout, chosen, found), np.float64)
        total, n = total + np.sum(part[len(part) - new :] ** 2, axis=0), n + new
    return np.asarray(total / n)


def _dtype(chosen: Tree, asked: Any) -> Any:
    """The dtype of the gradients."""
    widest = _tree.widest(chosen)
    if asked is not None and np.dtype(asked) not in (np.float32, jnp.bfloat16, widest):
        raise ValueError(f"dtype={asked!r} cannot hold gradients; pass jnp.float32 or jnp.bfloat16")
    return np.dtype(widest if asked is None else asked)


def _at_once(layout: _tree.Layout) -> int:
    """How many examples to differentiate at a time."""
    return max(1, min(_CHUNK, _CHUNK_BYTES // (4 * layout.size)))


def _chunks(stream: Batches, size: int) -> Iterator[tuple[Any, list[int], int]]:
    """Examples `size` at a time, the batch that each came from, and how many of them, the last ones, are new.

    The last chunk begins with examples of the one before, so that all have one shape; only a first one may be short.
    """
    held, origin, new = None, [], 0
    for index, batch in enumerate(stream):
        batch, more = each(batch, f"{stream.name}: batch {index}")
        held = batch if held is None else jax.tree.map(_joined, held, _fitting(batch, held, stream.name, index))
        origin, new = origin + [index] * more, new + more
        while new >= size:
            first = len(origin) - new
            yield jax.tree.map(lambda x, at=first: x[at : at + size], held), origin[first : first + size], size
            new -= size
            keep = len(origin) - new - size
            held, origin = jax.tree.map(lambda x, at=keep: x[at:], held), origin[keep:]
    if new:
        yield jax.tree.map(lambda x: x[-size:], held), origin[-size:], new


def _fitting(batch: Any, held: Any, name: str, index: int) -> Any:
    """`batch`, or ValueError where its examples have other shapes than those before."""
    for (path, new), old in zip(_tree.named_leaves(batch), jax.tree.leaves(held), strict=True):
        if np.shape(new)[1:] != np.shape(old)[1:]:
            raise ValueError(
                f"{name}: batch {index}: an example of leaf '{path}' has shape {np.shape(new)[1:]}, before it was "
                f"{np.shape(old)[1:]}, and this method joins examples of several batches; pad them to one shape"
            )
    return batch


def _joined(a: Any, b: Any) -> Any:
    """Entries of examples one after another, on the host but for keys."""
    return jnp.concatenate([a, b]) if isinstance(a, jax.Array) else np.concatenate([a, b])


def _check(
    loss: calls.Loss, chosen: Tree, rest: Rest, examples: Any, found: list[Array], finite: Array, origin: list[int]
) -> None:
    """Raise ValueError naming the first batch whose loss or gradient is not finite, and the leaf."""
    if not np.all(finite):
        bad = int(np.argmin(finite))
        example, paths = jax.tree.map(lambda x: x[bad : bad + 1], examples), _tree.Layout.of(chosen).paths
        calls.check_value(loss, chosen, rest, example, f"batches: batch {origin[bad]}")
        path = next(p for p, g in zip(paths, found, strict=True) if not np.all(np.isfinite(g[bad])))
        raise ValueError(
            f"batches: batch {origin[bad]}: the gradient of fn holds a NaN or an infinity in leaf "
            f"'{path}'{explained(example)}; repair that batch, or the loss there"
        )


@partial(jax.jit, static_argnames="loss")
def _each(
    loss: Separable, chosen: Tree, rest: Rest, examples: Any
) -> tuple[list[Float[Array, "k size"]], Bool[Array, " k"]]:
    """Each example's gradient, a leaf at a time and a row an example; which examples' are finite."""

    def one(example: Any) -> list[Array]:
        alone = jax.tree.map(lambda x: x[None], example)
        return [g.reshape(-1) for g in jax.tree.leaves(jax.grad(calls.closed(loss, rest, alone))(chosen))]

    found = jax.vmap(one)(examples)
    return found, jnp.all(jnp.stack([jnp.all(jnp.isfinite(g), axis=1) for g in found]), axis=0)


# Apart from `_each`, which takes long to compile and does not depend on the number of examples.
@partial(jax.jit, donate_argnums=0)
def _written(gradients: Float[Array, "n p"], found: list[Float[Array, "k size"]], start: int) -> Float[Array, "n p"]:
    """`gradients` with those of k examples from row `start` on, in place."""
    at = 0
    for g in found:
        gradients = jax.lax.dynamic_update_slice(gradients, g.astype(gradients.dtype), (start, at))
        at += g.shape[1]
    return gradients


@partial(jax.jit, static_argnames=("project", "layout"))
def _projected(project: Any, layout: _tree.Layout, chosen: Tree, found: list[Float[Array, "n size"]]) -> Any:
    """The map of each example's gradient, a row an example."""

    def one(parts: list[Array]) -> Any:
        leaves = [g.reshape(shape) for g, shape in zip(parts, layout.shapes, strict=True)]
        return project(jax.tree.unflatten(layout.structure, leaves), chosen)

    return jax.vmap(one)(found)


@jax.jit
def _with_squares(total: Float[Array, " p"], found: list[Float[Array, "k size"]], new: int) -> Float[Array, " p"]:
    """`total` and the squares of the last `new` gradients."""
    counts = jnp.arange(found[0].shape[0])[:, None] >= found[0].shape[0] - new
    squares = [jnp.where(counts, jnp.square(g.astype(total.dtype)), jnp.zeros((), total.dtype)) for g in found]
    return total + jnp.concatenate([jnp.sum(s, axis=0) for s in squares])
