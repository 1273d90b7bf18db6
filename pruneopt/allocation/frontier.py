"""The whole curve of error against one resource, from one set of tables."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from pruneopt.allocation.allocate import Allocation, allocate, status_of
from pruneopt.allocation.chain import chain, cheapest
from pruneopt.allocation.tables import Tables
from pruneopt.certify import OPTIMAL_GAP, relative_gap

_POINTS = 20


@dataclass(frozen=True, eq=False)
class Frontier:
    """The least error within each budget of one resource, the smallest budget first.

    points: an `Allocation` for each budget; of a larger budget neither error nor bound is larger. `print` shows the
    table, `plot` the curve.
    """

    resource: str
    points: tuple[Allocation, ...]

    @property
    def spent(self) -> list[float]:
        """What each point costs of the resource."""
        return [point.spent[self.resource] for point in self.points]

    @property
    def errors(self) -> list[float]:
        """The sum of the tables' errors at each point."""
        return [point.error for point in self.points]

    @property
    def bounds(self) -> list[float]:
        """No choice within the budget of a point has a smaller sum of errors."""
        return [point.bound for point in self.points]

    def __str__(self) -> str:
        head = f"{self.resource + ' at most':>18} {'spent':>14} {'error':>12} {'bound':>12} {'gap':>9}  {'price':>10}"
        rows = [
            f"{point.budget[self.resource]:>18,.6g} {spent:>14,.6g} {point.error:>12.6g} {point.bound:>12.6g} "
            f"{point.gap:>9.1e}  {point.prices[self.resource]:>10.3g}"
            for point, spent in zip(self.points, self.spent, strict=True)
        ]
        return "\n".join([head, *rows])

    def plot(self, axes: Any = None) -> Any:
        """Draw error and bound against what is spent on matplotlib `axes` (new ones by default); returns the axes."""
        if axes is None:
            import matplotlib.pyplot as plt

            axes = plt.subplots()[1]
        budgets = [point.budget[self.resource] for point in self.points]
        axes.plot(self.spent, self.errors, marker=".", label="error of the choice")
        axes.plot(budgets, self.bounds, color="black", linestyle=":", zorder=3, label="bound within the budget")
        axes.set(xlabel=self.resource, ylabel="sum of errors", title="Frontier")
        axes.legend(fontsize="small")
        return axes


def frontier(tables: Tables, resource: str, budgets: Sequence[float] | None = None, *, gap: float = 1e-4) -> Frontier:
    """min the sum of errors within each of several budgets of one resource, each as `allocate` solves it.

    budgets: in the resource's unit; default 20 evenly spaced ones, from a twentieth of the way between the least that
        any choice costs and what the choice of least error costs up to the latter.
    gap: how well points are proven, as a part of the error at the smallest budget; a point's own `gap` is relative to
        its own error and may be larger.
    An answer within a budget is one within every larger one, and a bound of a budget is one for every smaller one: the
    curves never turn. Raises Infeasible for a budget that no choice meets, ValueError for a resource that the tables do
    not have.
    """
    if resource not in tables.costs:
        raise ValueError(f"resource={resource!r} is unknown; the tables know {', '.join(tables.costs)}")
    limits = _spread(tables, resource) if budgets is None else sorted({float(b) for b in budgets})
    if not limits:
        raise ValueError("budgets is empty; pass amounts of the resource, or None for an even spread")
    points = [allocate(tables, {resource: limits[0]}, gap=gap)]
    apart = gap * abs(points[0].error)
    points += [_point(tables, {resource: limit}, apart) for limit in limits[1:]]
    for k in range(1, len(points)):
        if points[k].error > points[k - 1].error:
            same = {"levels": points[k - 1].levels, "error": points[k - 1].error, "spent": points[k - 1].spent}
            points[k] = _proven(points[k], same, points[k].bound)
    for k in reversed(range(len(points) - 1)):
        if points[k].bound < points[k + 1].bound:
            points[k] = _proven(points[k], {}, points[k + 1].bound)
    return Frontier(resource, tuple(points))


def _point(tables: Tables, budget: dict[str, float], apart: float) -> Allocation:
    """The choice within a budget, searched for only where prices leave more than `apart` open."""
    found = allocate(tables, budget, gap=1.0)
    if found.error - found.bound <= apart:
        return found
    return allocate(tables, budget, gap=apart / max(abs(found.error), abs(found.bound)))


def _proven(point: Allocation, changed: dict[str, Any], bound: float) -> Allocation:
    """A point with what its neighbours know of it."""
    error = changed.get("error", point.error)
    apart = relative_gap(error, bound)
    return replace(point, **changed, bound=bound, gap=apart, status=status_of(apart, max(apart, OPTIMAL_GAP)))


def _spread(tables: Tables, resource: str) -> list[float]:
    """Budgets on the way from the cheapest choice to the one of least error."""
    given = chain(tables, {resource: 0.0})
    fixed = tables.fixed.get(resource, 0.0)
    least = float(given.spent(cheapest(given, np.ones(1), error=0.0))[0]) + fixed
    free = allocate(tables, {resource: tables.largest(resource)}, gap=0.0)
    most = free.spent[resource]
    return sorted({least + (most - least) * k / _POINTS for k in range(1, _POINTS + 1)}) if most > least else [least]
