"""What a network does not need: dead and duplicate units, weights that cost nothing, effective rank, layer by layer."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np

from pruneopt import _linalg, _tree
from pruneopt.curvature.fisher import empirical_fisher_diagonal
from pruneopt.network.batches import Source
from pruneopt.network.leaves import Choice
from pruneopt.structure.defaults import network_of

Tree = Any


@dataclass(frozen=True)
class LayerRedundancy:
    """One leaf as a matrix (n_in, n_out).

    zero_inputs, zero_outputs: rows and columns that are exactly zero. silent_outputs: columns whose weights no
    example's gradient reaches (None without data). duplicate_outputs: columns whose cosine similarity with an earlier
    column is at least `similarity` in absolute value. free: weights whose removal costs at most the tolerance
    together, by 1/2 F_ii w_i^2, zeros included (exact zeros alone without data). rank: singular values above rounding;
    effective_rank: exp of the entropy of the normalised singular values (Roy and Vetterli 2007).
    """

    path: str
    shape: tuple[int, int]
    zero_inputs: int
    zero_outputs: int
    silent_outputs: int | None
    duplicate_outputs: int
    free: int
    rank: int
    effective_rank: float


@dataclass(frozen=True)
class Redundancy:
    """A layer-by-layer account, printable as a table."""

    layers: tuple[LayerRedundancy, ...]
    tolerance: float
    similarity: float

    def __str__(self) -> str:
        width = max(5, *(len(layer.path) for layer in self.layers))
        head = f"{'layer':<{width}} {'matrix':>13} {'dead in':>8} {'dead out':>8} {'silent':>7} {'twins':>6} "
        lines = [head + f"{'free weights':>21} {'rank':>6} {'eff. rank':>9}"]
        for x in self.layers:
            size = math.prod(x.shape)
            silent = "-" if x.silent_outputs is None else x.silent_outputs
            lines.append(
                f"{x.path:<{width}} {x.shape[0]:>6}x{x.shape[1]:<6} {x.zero_inputs:>8} {x.zero_outputs:>8} {silent:>7} "
                f"{x.duplicate_outputs:>6} {x.free:>12,} ({x.free / size:>5.1%}) {x.rank:>6} {x.effective_rank:>9.1f}"
            )
        lines.append(
            f"free: together at most {self.tolerance:g} of the loss a layer; twins: |cosine| >= {self.similarity:g}"
        )
        return "\n".join(lines)


@_tree.on_host
def redundancy(
    fn: Callable[[Tree, Any], Any] | None,
    params: Tree,
    batches: Source | None = None,
    *,
    leaves: Choice = None,
    tolerance: float = 1e-4,
    similarity: float = 0.99,
) -> Redundancy:
    """What each leaf of `params` holds that the network does not need. Each leaf is read as leaf.reshape(-1, n_out).

    fn: loss(params, batch) -> scalar, a mean over examples, and batches: for what only data shows, silent outputs and
        free weights; both or None. tolerance: rise of the loss, by the diagonal empirical Fisher, that the free
        weights of a layer may cost together. similarity: |cosine| from which two outputs are twins.
    Time: one singular value decomposition a leaf and one gradient an example.
    Raises ValueError for a negative tolerance, a similarity outside (0, 1], only one of fn and batches, and what
    `curvature.empirical_fisher_diagonal` raises.
    """
    if not 0 <= tolerance < math.inf:
        raise ValueError(f"tolerance={tolerance!r} is not a finite number >= 0; pass the rise of the loss to accept")
    if not 0 < similarity <= 1:
        raise ValueError(f"similarity={similarity!r} is outside (0, 1]; pass a cosine such as 0.99")
    if (fn is None) != (batches is None):
        raise ValueError("fn and batches: only one given; pass both, or neither")
    network = network_of(fn, params, batches, leaves)
    chosen = network.chosen
    fisher: list[Any] = [None] * len(jax.tree.leaves(chosen))
    if fn is not None and batches is not None:
        fisher = jax.tree.leaves(empirical_fisher_diagonal(*network.given).values)
    layers = [
        _layer(
            path, np.asarray(leaf, np.float64), None if f is None else np.asarray(f, np.float64), tolerance, similarity
        )
        for (path, leaf), f in zip(_tree.named_leaves(chosen), fisher, strict=True)
    ]
    return Redundancy(tuple(layers), tolerance, similarity)


def _layer(
    path: str, leaf: np.ndarray, fisher: np.ndarray | None, tolerance: float, similarity: float
) -> LayerRedundancy:
    w = leaf.reshape(-1, leaf.shape[-1])
    f = None if fisher is None else fisher.reshape(w.shape)
    norms = np.linalg.norm(w, axis=0)
    unit = w[:, norms > 0] / norms[norms > 0]
    twins = np.triu(np.abs(unit.T @ unit) >= similarity, 1).any(axis=0)
    values = _linalg.singular_values(w)
    share = values[values > 0] / values.sum() if values.sum() else np.ones(0)
    cost = np.where(w == 0, 0.0, np.inf) if f is None else 0.5 * f * w * w
    return LayerRedundancy(
        path,
        (w.shape[0], w.shape[1]),
        int((~w.any(axis=1)).sum()),
        int((norms == 0).sum()),
        None if f is None else int((~f.any(axis=0)).sum()),
        int(twins.sum()),
        int((np.cumsum(np.sort(cost, axis=None)) <= tolerance).sum()),
        int((values > max(w.shape) * np.finfo(np.float32).eps * max(values.max(initial=0.0), 0.0)).sum()),
        float(np.exp(-(share * np.log(share)).sum())) if len(share) else 0.0,
    )
