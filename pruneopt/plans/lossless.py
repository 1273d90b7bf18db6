"""Remove only what costs nothing, to a stated tolerance."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
from tqdm import tqdm

from pruneopt import _tree
from pruneopt.constraints.cardinality import Cardinality
from pruneopt.network.batches import Source
from pruneopt.network.leaves import Choice, as_key, check_finite, combine, partition
from pruneopt.objectives.loss import Loss
from pruneopt.plans.methods import Method
from pruneopt.plans.methods import method as row_of
from pruneopt.problem import Problem
from pruneopt.solution import Pruned, Solution
from pruneopt.solve import solve
from pruneopt.solvers.score import Score

Tree = Any


@_tree.on_host
def lossless(
    fn: Callable[[Tree, Any], Any],
    params: Tree,
    batches: Source,
    *,
    tolerance: float = 0.0,
    method: str | Method = "fisher",
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
    chosen, rest = partition(params, leaves)
    check_finite(chosen, "params")
    loss = Loss(fn, params, batches, leaves)
    row = row_of(method)
    key = as_key(key)
    model = row.model(fn, params, loss.stream, leaves, key)
    dense = loss.finite_value(chosen)

    def at(count: int) -> Solution:
        constraint = Cardinality(count=count, floor=floor)
        return solve(Problem(model, subject_to=constraint), row.solver, key=key)

    total = _tree.size(chosen)
    low = sum(min(floor, leaf.size) for leaf in jax.tree.leaves(chosen))
    dense_weights = solve(Problem(model, subject_to=Cardinality(count=total)), Score("random"))
    high, best, history = total, dense_weights, []
    with tqdm(total=(total - low).bit_length(), desc="lossless", unit="try", disable=not progress) as bar:
        while low < high:
            count = (low + high) // 2
            tried = at(count)
            rise = loss.value(tried.value) - dense
            history.append({"count": count, "loss": rise + dense, "rise": rise})
            if rise <= tolerance:
                high, best = count, tried
            else:
                low = count + 1
            bar.update()
    return Pruned(combine(best.value, rest), best.support, {"*": best}, history)
