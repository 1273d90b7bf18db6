"""The best row of levels within one budget: partial rows, kept while they may lead to a better one."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Int

from pruneopt.allocation.chain import Chain, ahead

_ROWS = 2_000_000  # partial rows of one group, under 100 MB


class Found(NamedTuple):
    """levels: the best row, None where none beats the ceiling. is_complete: whether no row was left out."""

    levels: Int[np.ndarray, " groups"] | None
    is_complete: bool


class _Rows(NamedTuple):
    """Partial rows: what each costs and loses, its last level, and which row of the group before it goes on."""

    cost: Float[np.ndarray, " rows"]
    error: Float[np.ndarray, " rows"]
    level: Int[np.ndarray, " rows"]
    before: Int[np.ndarray, " rows"]


def search(given: Chain, price: float, ceiling: float) -> Found:
    """The row of least error, below `ceiling`, within the room of the one resource.

    A shortest path with one resource (Dumitrescu and Boland 2003): group after group; of the partial rows that end
    alike those stay that no other beats in error and in cost, whose cheapest end fits, and which at this price may end
    below the ceiling.
    """
    room = given.room[0] + 1e-12 * abs(given.room[0])
    need, least = ahead(given, np.ones(1), error=0.0), ahead(given, np.array([price]))
    nothing, start = np.zeros(1), np.zeros(1, int)
    stages = [_Rows(nothing, nothing, start, start)]
    for g, errors in enumerate(given.errors):
        last, pair = stages[-1], given.pairs[g - 1] if g else None
        parts = []
        for level in np.flatnonzero(np.isfinite(errors)):
            cost = last.cost + given.costs[0, g, level] + (0.0 if pair is None else pair[0, last.level, level])
            error = last.error + errors[level]
            may_fit = cost + need[g, level] <= room
            at = np.flatnonzero(may_fit & (error + price * (cost - room) + least[g, level] < ceiling))
            parts.append(_Rows(cost[at], error[at], np.full(len(at), level), at))
        if g + 1 < len(given.errors) and given.pairs[g] is not None:
            parts = [_undominated(rows) for rows in parts]  # rows that end on different levels go on differently
            stages.append(_joined(parts))
        else:
            stages.append(_undominated(_joined(parts)))
        if not len(stages[-1].cost):
            return Found(None, True)
        if len(stages[-1].cost) > _ROWS:
            return Found(None, False)
    row, levels = int(stages[-1].error.argmin()), []
    for stage in stages[:0:-1]:
        levels.append(int(stage.level[row]))
        row = int(stage.before[row])
    return Found(np.array(levels[::-1]), True)


def _joined(parts: list[_Rows]) -> _Rows:
    return _Rows(*(np.concatenate(column) for column in zip(*parts, strict=True)))


def _undominated(rows: _Rows) -> _Rows:
    """Those that no other beats in both cost and error."""
    order = np.lexsort((rows.error, rows.cost))
    lowest = np.minimum.accumulate(rows.error[order])
    kept = order[np.concatenate([[True], lowest[1:] < lowest[:-1]])] if len(order) else order
    return _Rows(*(column[kept] for column in rows))
