"""Small problems refined by exchanges, from several supports: what splitting leaves where few weights are kept."""

from __future__ import annotations

from typing import Any

import jax
import numpy as np
from jaxtyping import Array, Bool, Float

from pruneopt import _linalg
from pruneopt.constraints import parts
from pruneopt.objectives.exchange import forward
from pruneopt.objectives.prepared import Layer
from pruneopt.problem import Problem
from pruneopt.solvers.greedy_obs import GreedyOBS
from pruneopt.solvers.swap import Swap, exchanged, refitted

INPUTS, OUTPUTS = 1024, 16  # up to which a problem is small: seconds on the host, whatever is kept
_FEW = 1 / 16  # of the inputs kept: then ADMM's metric, which takes all others for kept, misleads
_STEPS = 1000


def is_small(problem: Problem, shape: tuple[int, ...]) -> bool:
    """Whether exchanges are allowed and cost seconds at most."""
    n, m = shape
    return n <= INPUTS and m <= OUTPUTS and parts.exchanges(problem.subject_to, shape) is not None


def is_hard(ready: Layer, support: Bool[Array, "n m"]) -> bool:
    """Whether at most a 16th of the inputs is kept, or H is singular to float32: splitting is far off there."""
    n, m = support.shape
    if np.count_nonzero(support) <= _FEW * n * m:
        return True
    gram = np.asarray(ready.gram, np.float32)
    (factorise,) = _linalg.lapack(("potrf",), gram)
    factor, failed = factorise(gram, lower=True)
    return bool(failed or np.min(np.diagonal(factor)) ** 2 <= n * np.finfo(np.float32).eps * np.max(np.diagonal(gram)))


def refined(
    problem: Problem, ready: Layer, support: Bool[Array, "n m"], key: jax.Array, *, starts: bool
) -> tuple[Float[Array, "n m"], Bool[Array, "n m"], dict[str, Any]]:
    """(value, support, stats) after exchanges from `support`: optimal against every single one, refitted exactly.

    starts: from the supports of forward selection and of `GreedyOBS` as well, the best of the three.
    """
    supports = [np.asarray(support)]
    if starts:
        supports.append(_forward(problem, ready, supports[0]))
        if GreedyOBS().refuses(problem) is None:
            supports.append(np.asarray(GreedyOBS().run(problem, None, key).support))
    found = [exchanged(problem, ready, start, _STEPS, Swap.damping) for start in supports]
    value, best = refitted(ready, [*(f.support for f in found), supports[0] & ~np.asarray(ready.gone)[:, None]])
    return value, best, {"swaps": int(sum(f.swaps.sum() for f in found))}


def _forward(problem: Problem, ready: Layer, like: Bool[np.ndarray, "n m"]) -> Bool[np.ndarray, "n m"]:
    """Forward selection of each output, as many in each run as `like` has."""
    groups = parts.exchanges(problem.subject_to, like.shape)
    assert groups is not None
    run, free = groups
    live, runs = ~np.asarray(ready.gone)[:, None], np.arange(len(like)) // run
    gram, center, support = np.asarray(ready.gram, np.float64), np.asarray(ready.center, np.float64), like & False
    for o, (kept, may) in enumerate(zip((like & live).T, (free & live).T, strict=True)):
        counts = np.bincount(runs[kept], minlength=runs[-1] + 1)
        support[forward(gram, center[:, o], may, runs, counts), o] = True
    return support
