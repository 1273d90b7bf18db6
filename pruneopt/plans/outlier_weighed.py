"""Sparsities of blocks by how many of their weights stand out (OWL)."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from pruneopt import _tree
from pruneopt.capture.statistics import capture
from pruneopt.constraints.by_path import ByPath
from pruneopt.constraints.shares import block_of, shifted
from pruneopt.network.batches import Source
from pruneopt.network.leaves import Choice
from pruneopt.structure.defaults import network_of
from pruneopt.structure.graph import trace

Tree = Any


def outlier_weighed(
    fn: Callable[[Tree, Any], Any],
    params: Tree,
    batches: Source,
    sparsity: float,
    blocks: Sequence[str],
    *,
    threshold: float = 5.0,
    width: float = 0.08,
    weights: Callable[[Any], Any] | None = None,
    leaves: Choice = None,
) -> ByPath:
    """Blocks with many outliers keep more: block b has the density 1 - sparsity + 2 width (u_b - mean u).

    u_b is the share of the block's weights whose score |w_ij| sqrt(H_ii), H the Gram of the operator's inputs in the
    dense network, is above `threshold` times the mean score of the block, brought to [0, 1] over all blocks. The mean
    runs over blocks; where blocks differ in size, or a density would leave [0, 1], all are shifted by one number so
    that exactly floor((1 - sparsity) n + 1e-9) weights are kept, at least one a leaf.

    blocks: glob patterns of paths, a block each, such as [f"layers/{i}/*" for i in range(L)]; leaves of a block share
        its sparsity. threshold: M, 5 or 7 in the paper. width: lambda; sparsities lie 2 width apart at most.
    Source: Yin et al. 2024 (Outlier Weighed Layerwise sparsity), section 3.2, with the scale of the authors' code.
    Raises ValueError for a threshold or a width that is not positive, for a leaf that no block matches or no operator
    reads, and what `capture` raises.
    """
    for name, value in (("threshold", threshold), ("width", width)):
        if not value > 0:
            raise ValueError(f"{name}={value!r} is not positive; pass a number such as 5 for threshold, 0.08 for width")
    network = network_of(fn, params, batches, leaves)
    named = dict(_tree.named_leaves(network.chosen))
    sizes = {path: math.prod(np.shape(leaf)) for path, leaf in named.items()}
    graph = trace(fn, params, next(iter(network.batches)))
    everything = dict(_tree.named_leaves(params))
    scores: list[list[np.ndarray]] = [[] for _ in blocks]
    of = {path: block_of(path, blocks) for path in sizes}
    for name, seen in capture(fn, params, network.batches, leaves=network.leaves, weights=weights).items():
        op = graph.operator(name)
        diagonal = np.diagonal(np.asarray(seen.gram, np.float64), axis1=1, axis2=2)
        score = np.abs(np.asarray(op.to_matrix(everything), np.float64)) * np.sqrt(diagonal)[:, :, None]
        scores[of[op.paths[0]]].append(score.reshape(-1))
    empty = next((pattern for pattern, found in zip(blocks, scores, strict=True) if not found), None)
    if empty is not None:
        raise ValueError(f"blocks: no operator reads a leaf of '{empty}'; drop it, or choose its leaves")
    outliers = np.array([np.mean(s > threshold * s.mean()) for s in map(np.concatenate, scores)])
    span = np.ptp(outliers)
    share = (outliers - outliers.min()) / span if span else np.zeros(len(blocks))
    densities = 1 - sparsity + 2 * width * (share - share.mean())
    return shifted(sizes, sparsity, {path: float(densities[of[path]]) for path in sizes})
