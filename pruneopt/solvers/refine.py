"""Small problems refined by exchanges, from several supports: what splitting leaves where few weights are kept."""

from __future__ import annotations

from typing import Any

import jax
import numpy as np
from jaxtyping import Bool, Float

from pruneopt import _linalg
from pruneopt.constraints import parts
from pruneopt.objectives.exchange import forward
from pruneopt.objectives.prepared import Layer, exact_layer
from pruneopt.objectives.reconstruction import Reconstruction
from pruneopt.problem import Problem
from pruneopt.solvers.greedy_obs import GreedyOBS
from pruneopt.solvers.swap import Swap, exchanged, refitted

INPUTS, OUTPUTS = 1024, 16  # up to which a problem is small: seconds on the host, whatever is kept
TINY, ENTRIES = 64, 1 << 14  # inputs and weights up to which it is tiny: tenths of a second
_FEW = 1 / 16  # of the inputs kept: then exchanges find much that splitting leaves
_STEPS = 1000


def is_tiny(shape: tuple[int, ...]) -> bool:
    """Whether exchanges cost tenths of a second."""
    return shape[0] <= TINY and shape[0] * shape[1] <= ENTRIES


def is_small(problem: Problem, shape: tuple[int, ...]) -> bool:
    """Whether exchanges are allowed and cost seconds at most."""
    few = shape[0] <= INPUTS and shape[1] <= OUTPUTS
    return (few or is_tiny(shape)) and parts.exchanges(problem.subject_to, shape) is not None


def is_hard(ready: Layer, support: Bool[np.ndarray, "n m"]) -> bool:
    """Whether at most a 16th of the inputs is kept, or H is singular to float32: splitting is far off there."""
    n, m = support.shape
    if np.count_nonzero(support) <= _FEW * n * m:
        return True
    gram = np.asarray(ready.gram, np.float32)
    (factorise,) = _linalg.lapack(("potrf",), gram)
    factor, failed = factorise(gram, lower=True)
    return bool(failed or np.min(np.diagonal(factor)) ** 2 <= n * np.finfo(np.float32).eps * np.max(np.diagonal(gram)))


def refined(
    problem: Problem, ready: Layer, support: Bool[np.ndarray, "n m"], key: jax.Array, *, starts: bool
) -> tuple[Float[np.ndarray, "n m"], Bool[np.ndarray, "n m"], dict[str, Any]]:
    """(value, support, stats) after exchanges from `support`: optimal against every single one, refitted exactly.

    All in float64 on the problem as it was stated; the value in the units and dtype of `ready`.
    starts: from the supports of forward selection and of `GreedyOBS` as well, the best of the three.
    """
    f = problem.objective
    assert isinstance(f, Reconstruction)
    exact, supports = exact_layer(f, problem.subject_to), [support]
    if starts:
        supports.append(_forward(problem, exact, support))
        if GreedyOBS().refuses(problem) is None:
            supports.append(np.asarray(GreedyOBS().run(problem, None, key).support))
    found = [exchanged(problem, exact, start, _STEPS, Swap.damping) for start in supports]
    value, best = refitted(exact, [*(one.support for one in found), support & ~np.asarray(exact.gone)[:, None]])
    unit = float(ready.unit) / float(exact.unit)
    return (value * unit).astype(ready.center.dtype), best, {"swaps": int(sum(one.swaps.sum() for one in found))}


def _forward(problem: Problem, ready: Layer, like: Bool[np.ndarray, "n m"]) -> Bool[np.ndarray, "n m"]:
    """Forward selection of each output, as many in each run as `like` has."""
    groups = parts.exchanges(problem.subject_to, like.shape)
    assert groups is not None
    run, free = groups
    live, runs, support = ~np.asarray(ready.gone)[:, None], np.arange(len(like)) // run, like & False
    gram, center = np.asarray(ready.gram), np.asarray(ready.center)
    for o, (kept, may) in enumerate(zip((like & live).T, (free & live).T, strict=True)):
        counts = np.bincount(runs[kept], minlength=runs[-1] + 1)
        support[forward(gram, center[:, o], may, runs, counts), o] = True
    return support
