"""The true Fisher: labels come from the model's own distribution, sampled or summed over exactly."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from pruneopt import _tree
from pruneopt.curvature.diagonal import Diagonal
from pruneopt.curvature.fisher import empirical_fisher, empirical_fisher_diagonal
from pruneopt.curvature.gauss_newton import Outputs
from pruneopt.curvature.low_rank import LowRank
from pruneopt.network.batches import Batches, Source, each
from pruneopt.network.calls import outputs
from pruneopt.network.leaves import Choice, as_key

Tree = Any
_PIECE = 256  # examples that are repeated for each class at a time


def draw(key: jax.Array, logits: Float[Array, "... classes"]) -> Int[Array, "..."]:
    """Labels from the softmax of logits."""
    return jax.random.categorical(key, logits)


def cross_entropy(logits: Float[Array, "... classes"], labels: Int[Array, "..."]) -> Float[Array, ""]:
    """-log p(labels), summed over all positions: the negative log-likelihood of one example."""
    logs = jax.nn.log_softmax(logits)
    return -jnp.sum(jnp.take_along_axis(logs, labels[..., None], axis=-1))


@_tree.on_host
def sampled_fisher(
    model: Outputs,
    params: Tree,
    batches: Source,
    leaves: Choice = None,
    *,
    key: jax.Array | None = None,
    sample: Callable[[jax.Array, Any], Any] = draw,
    loss: Callable[[Any, Any], Any] = cross_entropy,
    ridge: float = 0.0,
    dtype: Any = None,
    memory: int = 1 << 33,
) -> LowRank:
    """F = 1/n sum_i g_i g_i^T + ridge I with g_i the gradient of -log p(y_i | x_i), y_i drawn from the model itself.

    Unbiased for the true Fisher, which with softmax or squares is the Gauss-Newton matrix; n examples in all.
    model: (params, batch) -> outputs. sample: (key, outputs) -> labels; loss: (outputs, labels) -> -log p of one
        example; by default those of a softmax, summed over an example's positions.
    key: defaults to seed 0; example i has the key `fold_in(key, i)`, whatever its batch.
    dtype, memory, errors: as `empirical_fisher`. Source: Martens 2020, section 5; Kunstner, Balles, Hennig 2019.
    """
    drawn, keyed = _Sampled(model, sample, loss), _with_keys(model, params, batches, key)
    return empirical_fisher(drawn, params, keyed, leaves, ridge=ridge, dtype=dtype, memory=memory)


@_tree.on_host
def sampled_fisher_diagonal(
    model: Outputs,
    params: Tree,
    batches: Source,
    leaves: Choice = None,
    *,
    key: jax.Array | None = None,
    sample: Callable[[jax.Array, Any], Any] = draw,
    loss: Callable[[Any, Any], Any] = cross_entropy,
) -> Diagonal:
    """diag F of `sampled_fisher` with the same arguments, without its gradients: 16 MiB of them at a time."""
    drawn, keyed = _Sampled(model, sample, loss), _with_keys(model, params, batches, key)
    return empirical_fisher_diagonal(drawn, params, keyed, leaves)


@_tree.on_host
def softmax_fisher(
    model: Outputs,
    params: Tree,
    batches: Source,
    leaves: Choice = None,
    *,
    ridge: float = 0.0,
    dtype: Any = None,
    memory: int = 1 << 33,
) -> LowRank:
    """The true Fisher of a softmax over C classes, exactly: 1/n sum_i sum_c p_ic g_ic g_ic^T + ridge I.

    g_ic is the gradient of -log p_ic. It is the Gauss-Newton matrix of the cross-entropy, as n C rows
    sqrt(C p_ic) g_ic.
    model: (params, batch) -> logits (n, C). dtype, memory, errors: as `empirical_fisher`, and for other outputs.
    C gradients an example, whatever the labels. Source: Martens 2020, section 5.
    """
    stream = Batches(batches)
    logits: Any = outputs(model, params, next(iter(stream)))
    if getattr(logits, "ndim", 0) != 2:
        raise ValueError(f"fn returns {logits}; pass a model whose outputs are logits (n, classes), or sampled_fisher")
    classes = logits.shape[1]

    def with_classes() -> Iterator[tuple[Any, np.ndarray]]:
        for batch in stream:
            whole, n = each(batch, stream.name)
            for at in range(0, n, _PIECE):
                size = min(_PIECE, n - at)
                which = at + np.arange(size * classes) // classes
                repeated = jax.tree.map(lambda x, which=which: x[which], whole)
                yield repeated, np.tile(np.arange(classes, dtype=np.int32), size)

    return empirical_fisher(_Weighted(model), params, with_classes, leaves, ridge=ridge, dtype=dtype, memory=memory)


def _with_keys(
    model: Outputs, params: Tree, batches: Source, key: jax.Array | None
) -> Callable[[], Iterator[tuple[Any, np.ndarray]]]:
    """The batches, each with its examples' keys."""
    start = as_key(key)
    stream = Batches(batches)
    found: Any = outputs(model, params, next(iter(stream)))
    if getattr(found, "shape", None) == ():
        raise ValueError(f"model returns {found}, a loss; pass the network, (params, batch) -> outputs")

    def of() -> Iterator[tuple[Any, np.ndarray]]:
        n = 0
        for batch in stream:
            batch, size = each(batch, stream.name)
            yield batch, np.asarray(_keys(start, np.arange(n, n + size)))
            n += size

    return of


@dataclass(frozen=True)
class _Sampled:
    """-log p of labels drawn with each example's own key. One example a batch. Equal where its functions are."""

    model: Outputs
    sample: Callable[[jax.Array, Any], Any]
    loss: Callable[[Any, Any], Any]

    def __call__(self, params: Tree, batch_and_key: Any) -> Any:
        batch, data = batch_and_key
        found = self.model(params, batch)
        labels = jax.lax.stop_gradient(self.sample(jax.random.wrap_key_data(data[0]), jax.lax.stop_gradient(found)))
        return self.loss(found, labels)


@dataclass(frozen=True)
class _Weighted:
    """-log p of a class, times sqrt(C p) held fixed. One example a batch."""

    model: Outputs

    def __call__(self, params: Tree, batch_and_class: Any) -> Any:
        batch, label = batch_and_class
        logs = jax.nn.log_softmax(self.model(params, batch))[0, label[0]]
        classes = jax.eval_shape(self.model, params, batch).shape[1]
        weight = jnp.sqrt(jnp.asarray(classes, logs.dtype) * jnp.exp(jax.lax.stop_gradient(logs)))
        return -weight * logs


@partial(jax.jit)
def _keys(key: jax.Array, indices: Int[Array, " n"]) -> Array:
    return jax.random.key_data(jax.vmap(jax.random.fold_in, (None, 0))(key, indices))
