"""Remove only what costs nothing, to a stated tolerance."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import jax
import numpy as np
from tqdm import tqdm

from pruneopt import _tree
from pruneopt.constraints.cardinality import Cardinality
from pruneopt.network.batches import Source
from pruneopt.network.leaves import Choice, as_key
from pruneopt.objectives.loss import Loss
from pruneopt.plans.layerwise import layerwise
from pruneopt.plans.methods import Asked, LayerMethod, Method, weight_row
from pruneopt.problem import Problem
from pruneopt.solution import Pruned
from pruneopt.solve import solve
from pruneopt.structure.defaults import network_of

Tree = Any


@_tree.on_host
def lossless(
    fn: Callable[[Tree, Any], Any],
    params: Tree,
    batches: Source,
    *,
    tolerance: float = 0.0,
    method: Asked = "fisher",
    leaves: Choice = None,
    floor: int = 0,
    key: jax.Array | None = None,
    progress: bool = True,
) -> Pruned:
    """Keep as few weights as possible such that loss(pruned) - loss(dense) <= tolerance, in `method`'s order.

    fn: loss(params, batch) -> scalar, a mean over examples; the rise is measured on `batches`, in the loss's unit.
    The count is found by bisection (log2 of the number of weights evaluations), so a smaller count that happens to
    meet the tolerance below one that does not may be missed; the result itself is always measured to meet it. Where
    none does, the trained weights come back.
    floor: weights to keep in each leaf. `history` holds each count tried with its loss.
    Raises ValueError for a negative or non-finite tolerance, and what `prune` raises.
    """
    if not 0 <= tolerance < float("inf"):
        raise ValueError(f"tolerance={tolerance!r} is not a finite number >= 0; pass the rise of the loss to accept")
    network, row, key = network_of(fn, params, batches, leaves), weight_row(method), as_key(key)
    loss = Loss(*network.given)
    model = row.model(network, key) if isinstance(row, Method) else None
    dense = loss.finite_value(network.chosen)

    def at(count: int) -> Pruned:
        constraint = Cardinality(count=count, floor=floor)
        if isinstance(row, LayerMethod):
            return layerwise(*network.given[:3], constraint, row, leaves=network.leaves, key=key, progress=False)
        assert model is not None
        solution = solve(Problem(model, subject_to=constraint), row.solver, key=key)
        return Pruned(network.put(solution.value), solution.support, {"*": solution}, scope=constraint.scope())

    total = _tree.size(network.chosen)
    low = sum(min(floor, leaf.size) for leaf in jax.tree.leaves(network.chosen))
    everything = jax.tree.map(lambda w: np.ones(w.shape, bool), network.chosen)
    high, best, history = total, Pruned(params, everything), []
    with tqdm(total=(total - low).bit_length(), desc="lossless", unit="try", disable=not progress) as bar:
        while low < high:
            count = (low + high) // 2
            tried = at(count)
            rise = loss.value(network.at(tried.params).chosen) - dense
            history.append({"count": count, "loss": rise + dense, "rise": rise})
            if rise <= tolerance:
                high, best = count, tried
            else:
                low = count + 1
            bar.update()
    return replace(best, history=history)
