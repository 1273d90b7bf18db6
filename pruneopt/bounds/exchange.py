"""How far a support is from the best of its neighbours: the largest gain of one exchange, all that is kept refitted."""

from __future__ import annotations

from typing import Any

import jax
import numpy as np

from pruneopt import _linalg, _tree
from pruneopt.constraints import parts
from pruneopt.objectives.prepared import layer
from pruneopt.objectives.reconstruction import Reconstruction
from pruneopt.problem import Problem

Tree = Any
DAMPING = 1e-8  # of H, relative, for singular ones; the solver `Swap` adds as much
LEAST = 1e-9  # gain of an exchange, of its output's error: below it rounding decides


@_tree.on_host
def largest_gain(problem: Problem, support: Tree, outputs: int | None = None) -> float:
    """By which part of its error the best single exchange in an output would lower that, all kept weights refitted.

    0: no exchange helps, the support is 1-swap optimal. The largest over all outputs, or over `outputs` of them evenly
    spaced: then it is a lower bound. Exact for the refitted support, in float64 on the host; |S|^3 + n |S|^2 an output.
    Raises ValueError for another objective than Reconstruction, a penalty, or a constraint that does not let weights of
    an output change places.
    """
    f = problem.objective
    if not isinstance(f, Reconstruction) or problem.penalty is not None:
        what = type(f).__name__ if problem.penalty is None else repr(problem.penalty)
        raise ValueError(f"largest_gain needs a Reconstruction without a penalty, not {what}; leave exchange=False")
    mask = np.asarray(support)
    found = parts.exchanges(problem.subject_to, mask.shape)
    if found is None:
        raise ValueError(parts.no_exchange("largest_gain", problem.subject_to))
    (run, free), (n, m) = found, mask.shape
    with jax.enable_x64(True):
        ready = layer(_tree.float64(f), problem.subject_to)
    live, runs = ~np.asarray(ready.gone)[:, None], np.arange(n) // run
    gram, center, ridge = np.asarray(ready.gram), np.asarray(ready.center), DAMPING * float(ready.mean)
    some = np.unique(np.linspace(0, m - 1, m if outputs is None else min(outputs, m)).round().astype(int))
    kept, free = mask & live, free & live
    return max(_gain(gram, ridge, center[:, o], kept[:, o], free[:, o], runs) for o in some)


def _gain(
    gram: np.ndarray, ridge: float, w0: np.ndarray, kept: np.ndarray, free: np.ndarray, runs: np.ndarray
) -> float:
    """The gain of one output's best exchange, over its error."""
    s, cut, rest = np.flatnonzero(kept), np.flatnonzero(~kept), np.flatnonzero((free & ~kept)[~kept])
    if not (s.size and rest.size):
        return 0.0
    own, across_cut, below = (gram[np.ix_(i, j)] for i, j in ((s, s), (cut, s), (cut, cut)))
    for square in (own, below):
        np.einsum("ii->i", square)[:] += ridge
    inverse = _linalg.inverse_on_host(own)
    if inverse is None:  # more singular than its damping mends
        return 0.0
    moved = inverse @ (w0[cut] @ across_cut)  # w - w0 on the support
    w, residual = w0[s] + moved, below @ w0[cut] - across_cut @ moved
    error = float(w0[cut] @ residual)
    if not error > 0:
        return 0.0
    gram_across = across_cut[rest]
    across, pivot, diagonal = gram_across @ inverse, np.diagonal(inverse), np.diagonal(below)[rest]
    schur = np.maximum(diagonal - np.einsum("ij,ij->i", across, gram_across), 1e-12 * diagonal)
    top = residual[rest, None] + across * (w / pivot)
    gain = top**2 / (schur[:, None] + across**2 / pivot) - w**2 / pivot
    best = float(np.max(gain, where=runs[cut[rest], None] == runs[s], initial=0.0)) / error
    return best if best > LEAST else 0.0
