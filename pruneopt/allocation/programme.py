"""Several budgets: a mixed-integer programme over the levels that prices leave open, solved by HiGHS."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Int
from scipy.optimize import Bounds, LinearConstraint, milp
from scipy.sparse import coo_array

from pruneopt.allocation.chain import Chain, through


class Found(NamedTuple):
    """levels: the best row, None where none beats the ceiling. bound: no row has less error."""

    levels: Int[np.ndarray, " groups"] | None
    bound: float


def programme(
    given: Chain, prices: Float[np.ndarray, " resources"], ceiling: float, gap: float, seconds: float
) -> Found:
    """The row of least error, below `ceiling`, within the room of every resource; proven to `gap` where time allows.

    A flow from group to group: one arc for each level, or for each pair of levels that share a cost. Arcs that at these
    prices lead to no row below the ceiling are left out.
    """
    nodes = through(given, prices) < ceiling
    if not nodes.any(1).all():
        return Found(None, ceiling)
    number = np.full(given.errors.shape, -1)
    number[nodes] = np.arange(nodes.sum())
    group, level = np.nonzero(nodes)
    n = len(group)
    parts, costs = [(np.ones(n), group, np.arange(n))], [given.costs[:, group, level]]
    right = [np.ones(len(nodes))]
    for g, pair in enumerate(given.pairs):
        if pair is None:
            continue
        one, other = np.flatnonzero(nodes[g]), np.flatnonzero(nodes[g + 1])
        s, t = (index.ravel() for index in np.meshgrid(one, other, indexing="ij"))
        arcs = n + sum(len(c.T) for c in costs[1:]) + np.arange(len(s))
        costs.append(pair[:, s, t])
        for side, ends, at in ((one, s, g), (other, t, g + 1)):  # the arcs at a level carry what it does
            first = sum(map(len, right))
            rows = first + np.searchsorted(side, ends)
            parts.append((np.ones(len(s)), rows, arcs))
            parts.append((-np.ones(len(side)), first + np.arange(len(side)), number[at, side]))
            right.append(np.zeros(len(side)))
    cost = np.concatenate(costs, axis=1)
    values, rows, columns = (np.concatenate(column) for column in zip(*parts, strict=True))
    flow = coo_array((values, (rows, columns)), shape=(sum(map(len, right)), cost.shape[1]))
    scale = 1 / np.maximum(np.abs(given.room), 1e-300)
    found = milp(
        np.concatenate([given.errors[nodes], np.zeros(cost.shape[1] - n)]),
        constraints=[
            LinearConstraint(flow, *[np.concatenate(right)] * 2),  # pyright: ignore[reportArgumentType]
            LinearConstraint(cost * scale[:, None], ub=given.room * scale),  # pyright: ignore[reportArgumentType]
        ],
        integrality=np.arange(cost.shape[1]) < n,
        bounds=Bounds(0, 1),
        options={"mip_rel_gap": gap, "time_limit": seconds},
    )
    bound = (
        ceiling if found.status == 2 else float(found.mip_dual_bound) if found.mip_dual_bound is not None else -np.inf
    )
    if found.x is None:
        return Found(None, min(bound, ceiling))
    levels = np.zeros(len(nodes), int)
    chosen = np.flatnonzero(found.x[:n] > 0.5)
    levels[group[chosen]] = level[chosen]
    return Found(levels, min(bound, ceiling))
