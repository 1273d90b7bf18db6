"""How far a support is from the best of its neighbours: the largest gain of one exchange, all that is kept refitted."""

from __future__ import annotations

from typing import Any

import numpy as np
from jaxtyping import Bool, Float, Int

from pruneopt import _tree
from pruneopt.constraints import parts
from pruneopt.objectives.exchange import Fit
from pruneopt.objectives.prepared import exact_layer
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
    ready = exact_layer(f, problem.subject_to)
    live, runs = ~np.asarray(ready.gone)[:, None], np.arange(n) // run
    gram, center = np.asarray(ready.gram) + DAMPING * float(ready.mean) * np.eye(n), np.asarray(ready.center)
    some = np.unique(np.linspace(0, m - 1, m if outputs is None else min(outputs, m)).round().astype(int))
    kept, free = mask & live, free & live
    return max(_gain(gram, center[:, o], kept[:, o], free[:, o], runs) for o in some)


def _gain(
    gram: Float[np.ndarray, "n n"],
    w0: Float[np.ndarray, " n"],
    kept: Bool[np.ndarray, " n"],
    free: Bool[np.ndarray, " n"],
    runs: Int[np.ndarray, " n"],
) -> float:
    """The gain of one output's best exchange, over its error."""
    fit = Fit.of(gram, w0, kept)
    if fit is None or not fit.error > 0:
        return 0.0
    best = fit.best(free, runs)[0] / fit.error
    return best if best > LEAST else 0.0
