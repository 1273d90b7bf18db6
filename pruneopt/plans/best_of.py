"""Several layer methods on one network, judged by what the whole network loses on examples that none of them read."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from pruneopt import _tree
from pruneopt.constraints.base import Constraint
from pruneopt.network.batches import Batches, Source
from pruneopt.network.leaves import Choice
from pruneopt.plans.held_out import HeldOut
from pruneopt.plans.layerwise import layerwise
from pruneopt.plans.levels import Measure, kl
from pruneopt.plans.methods import LayerMethod
from pruneopt.solution import Pruned
from pruneopt.solvers.base import Solver

Tree = Any


@_tree.on_host
def best_of(
    fn: Callable[[Tree, Any], Any],
    params: Tree,
    batches: Source,
    constraint: Constraint,
    methods: Mapping[str, str | LayerMethod | Solver],
    held_out: Source,
    *,
    measure: Measure = kl,
    weights: Callable[[Any], Any] | None = None,
    leaves: Choice = None,
    progress: bool = True,
) -> Pruned:
    """The pass of `layerwise`, among those of several methods, after which the network loses least on `held_out`.

    A target that follows the dense network, and a small damping, fit few examples too well: which to take is the data's
    to say, and a layer's own error does not say it.

    methods: {name: a layer method, such as rows that differ in target, damping or centring}. held_out: examples that no
        method reads, on which `measure(outputs before, outputs after)` is taken, a mean over each batch: `kl` of
        logits, `squared` for others.
    Returns the Pruned of the best; its history says "chosen", its name, and "tried", {name: measured loss}. Raises
    ValueError where there is no method or no measure is a number, and what `layerwise` raises.
    """
    if not methods:
        raise ValueError("methods is empty; name some: {'near': LayerMethod(solver, damping=0.001), ...}")
    held = HeldOut(fn, params, Batches(held_out, "held_out"), measure)
    best: Pruned | None = None
    tried: dict[str, float] = {}
    chosen = ""
    for name, method in methods.items():
        words: dict[str, Any] = {"weights": weights, "leaves": leaves, "progress": progress}
        found = layerwise(fn, params, batches, constraint, method, **words)
        tried[name] = held.lost(found.params)
        if np.isfinite(tried[name]) and (best is None or tried[name] < tried[chosen]):
            best, chosen = found, name
    if best is None:
        raise ValueError(f"measure: it is a number for none of the methods: {tried}; repair it, or held_out")
    best.history[0].update(chosen=chosen, tried=tried)
    return best
