"""A budget of what is measured: allocate, measure, and correct what the tables are asked for."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from pruneopt.allocation.allocate import Allocation, Infeasible, allocate
from pruneopt.allocation.tables import Tables


@dataclass(frozen=True)
class Met:
    """allocation: the one whose measured amount came closest to the budget. measured: that amount. tried: (what the
    tables were asked for, what they predicted, what was measured) of each attempt.
    """

    allocation: Allocation
    measured: float
    tried: tuple[tuple[float, float, float], ...]


def meet(
    tables: Tables,
    budget: Mapping[str, float],
    resource: str,
    measure: Callable[[Allocation], float],
    *,
    within: float = 0.03,
    attempts: int = 6,
) -> Met:
    """The allocation that spends the budget of `resource` as measured, not as the tables predict.

    An allocation picks, among levels whose measured costs are noisy, those that came out too cheap, and a network is
    not quite the sum of its parts: seconds come out above the budget. Here each allocation is measured, and the tables
    are asked for the budget over the median ratio of what was measured and what they predicted, until it is met
    `within` a part of it, an allocation comes again, or after so many attempts.

    measure: of an allocation, what it really spends, such as the seconds of the shrunk program; of untrained weights
    where that is all the same. Other resources of the budget are kept by the tables' word.
    Raises Infeasible where the first allocation is, ValueError for a resource that the budget does not name, a budget
    or an amount that is not finite and positive, a resource that the tables do not predict, and no attempts.
    """
    if resource not in budget:
        raise ValueError(f"resource is '{resource}', the budget names {', '.join(budget)}")
    if not 0 < budget[resource] < math.inf:
        raise ValueError(f"budget['{resource}'] is {budget[resource]}; pass an amount > 0 to meet")
    if isinstance(attempts, bool) or not hasattr(attempts, "__index__") or attempts < 1:
        raise ValueError(f"attempts={attempts!r} is not a whole number >= 1; pass how often to measure at most")
    limit, asked, ratios, tried = budget[resource], budget[resource], [], []
    best: tuple[float, Allocation, float] | None = None
    seen: list[dict[str, int]] = []
    for _ in range(attempts):
        try:
            found = allocate(tables, {**budget, resource: asked})
        except Infeasible:
            if best is None:
                raise
            break
        if found.levels in seen:
            break
        seen.append(found.levels)
        measured = float(measure(found))
        if not found.spent[resource] > 0:
            raise ValueError(f"tables predict no {resource} for {found!r:.200}, so that nothing can be corrected")
        if not 0 < measured < math.inf:
            raise ValueError(f"measure: it is {measured} for {found!r:.200}; pass what the network spends")
        tried.append((asked, found.spent[resource], measured))
        apart = abs(math.log(measured / limit))
        if best is None or apart < best[0]:
            best = apart, found, measured
        if abs(measured / limit - 1) <= within:
            break
        ratios.append(measured / found.spent[resource])
        asked = limit / statistics.median(ratios)
    assert best is not None
    return Met(best[1], best[2], tuple(tried))
