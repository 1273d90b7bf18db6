"""Re-estimate batch-norm statistics after pruning."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from pruneopt import _tree
from pruneopt.network import calls
from pruneopt.network.batches import Batches, Source
from pruneopt.network.leaves import Rest, check_finite, combine, partition

Tree = Any
Updates = Callable[[Tree, Any], Tree]


@_tree.on_host
def recalibrate(updates: Updates, params: Tree, batches: Source) -> Tree:
    """`params` with each running statistic replaced by its mean over batches, weighted by their examples.

    updates: (params, batch) -> a tree like `params` holding the statistics that one training-mode step leaves, None
        at everything else; counters and keys among them are passed over. Any exponential moving average will do,
        r' = m r + (1 - m) s(batch): the momentum m is read off by a second call with other statistics, so neither its
        value nor the old statistics matter.

    The variance of a batch is used as the network computes it. Raises ValueError for updates that are not a moving
    average of the old statistics or not finite; unusable batches.
    Source: re-estimation after pruning, Li et al. 2020 (EagleEye), section 3.3.
    """
    stream = Batches(batches)
    first = next(iter(stream))
    left = dict(_tree.named_leaves(calls.outputs(updates, params, first)))
    left = {path: leaf for path, leaf in left.items() if jnp.issubdtype(leaf.dtype, jnp.floating)}
    if not left:
        raise ValueError("updates returns no statistic; return the running statistics after one training-mode step")
    statistics, rest = partition(params, lambda path, leaf: path in left)

    from_zero, from_one = (_step(updates, value, statistics, rest, first) for value in (0.0, 1.0))
    momentum = {path: _momentum(path, from_zero[path], from_one[path]) for path in left}
    mean = stream.mean(lambda batch: _step(updates, 0.0, statistics, rest, batch))
    check_finite(mean, "updates")
    fresh = {path: (s / jnp.asarray(1 - momentum[path], s.dtype)).astype(left[path].dtype) for path, s in mean.items()}
    return _tree.map_named(lambda path, leaf: fresh.get(path, leaf), params)


@partial(jax.jit, static_argnums=0)
def _step(updates: Updates, old: float, statistics: Tree, rest: Rest, batch: Any) -> dict[str, jax.Array]:
    """The floating statistics that a step leaves when every old one is `old`."""
    filled = jax.tree.map(lambda x: jnp.full(x.shape, jnp.asarray(old).astype(x.dtype)), statistics)
    left = _tree.named_leaves(updates(combine(filled, rest), batch))
    return {path: leaf for path, leaf in left if jnp.issubdtype(leaf.dtype, jnp.floating)}


def _momentum(path: str, from_zero: jax.Array, from_one: jax.Array) -> float:
    slope = np.asarray(from_one, np.float64) - np.asarray(from_zero, np.float64)
    momentum = float(np.mean(slope))
    if not (-1e-3 < momentum < 1 - 1e-6 and np.max(np.abs(slope - momentum)) < 1e-3):
        raise ValueError(
            f"updates: '{path}' is not a moving average of its old value (slope {momentum:.4g}); return "
            "momentum * old + (1 - momentum) * statistic(batch)"
        )
    return momentum
