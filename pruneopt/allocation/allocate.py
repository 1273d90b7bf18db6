"""One level for each group within budgets: the multiple-choice problem, with what is proven of the answer."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Int

from pruneopt.allocation.chain import Chain, chain, changes, cheapest, fits
from pruneopt.allocation.exchange import filled
from pruneopt.allocation.lagrangian import lagrangian
from pruneopt.allocation.programme import programme
from pruneopt.allocation.search import search
from pruneopt.allocation.tables import Tables
from pruneopt.certify import OPTIMAL_GAP, relative_gap
from pruneopt.solution import Status

_SHOWN = 12


class Change(NamedTuple):
    """A change of one group's level: to which, what error it saves, and what it costs more of each resource."""

    group: str
    level: Any
    saves: float
    costs: dict[str, float]


@dataclass(frozen=True, eq=False)
class Allocation:
    """A level for each group.

    levels: {group: number of its level}. error: the sum of the tables' errors there. spent, budget: {resource: amount}.
    bound: no choice from these tables within the budget has a smaller sum of errors. It says nothing of the network,
        whose errors need not add. gap: (error - bound) over the larger of their sizes. status: as of a solution.
    prices: {resource: by how much the bound falls with each unit more of it}. next: the change of one group beyond the
        budget that saves most error for what it costs more at these prices, None where nothing is saved any more.
    """

    tables: Tables
    levels: dict[str, int]
    error: float
    spent: dict[str, float]
    budget: dict[str, float]
    bound: float
    gap: float
    status: Status
    prices: dict[str, float]
    next: Change | None
    seconds: float

    def __getitem__(self, group: str) -> Any:
        """What the level of a group is called."""
        return self.tables.label(group, self.levels[group])

    def __repr__(self) -> str:
        parts = [f"{group} {self[group]}" for group in self.tables.groups]
        shown = ", ".join(
            parts if len(parts) <= _SHOWN else [*parts[: _SHOWN - 1], f"... {len(parts) - _SHOWN + 1} more"]
        )
        rows = [
            f"{self.status.name.lower()} for these tables: error {self.error:.6g}, bound {self.bound:.6g}, "
            f"gap {self.gap:.2g}"
        ]
        for name, limit in self.budget.items():
            rows.append(f"{name} {self.spent[name]:.6g} of {limit:.6g}, price {self.prices[name]:.3g} a unit")
        if self.next is not None:
            more = ", ".join(f"{amount:+.4g} {name}" for name, amount in self.next.costs.items())
            rows.append(f"next: {self.next.group} at {self.next.level} saves {self.next.saves:.3g} for {more}")
        return "\n".join([f"Allocation({shown})", *rows, f"{self.seconds:.3g} s"])


class Infeasible(ValueError):
    """A budget that no choice of levels meets. least: {resource: the least that can be reached of it alone}."""

    def __init__(self, message: str, least: dict[str, float]):
        super().__init__(message)
        self.least = least


def allocate(tables: Tables, budget: Mapping[str, float], *, gap: float = 1e-4, seconds: float = 60.0) -> Allocation:
    """min the sum of errors, one level for each group, subject to costs within the budget of each resource it names.

    The multiple-choice knapsack problem (Kellerer, Pferschy and Pisinger 2004, chapter 11); costs of neighbours may be
    products of their levels. Lagrangian prices give a bound and an answer near it; where the gap between them is larger
    than `gap`, what the prices leave open is searched: with one budget by a shortest path with a resource, with
    several by HiGHS.

    gap: how well the answer is proven, as a part of the error. seconds: the most that a search by HiGHS may take.
    Raises Infeasible, a ValueError, where no choice fits, with the least that can be reached; ValueError for a budget
    of a resource that the tables do not have.
    """
    started = time.perf_counter()
    given, limits = chain(tables, checked(tables, budget)), dict(budget)
    priced = lagrangian(given, gap)
    levels = priced.levels
    if levels is None and len(limits) > 1:  # found by no change of one group: budgets that are hard to meet together
        levels = programme(given, priced.prices, math.inf, 1.0, seconds).levels
    if levels is None:
        raise _infeasible(tables, given, limits)
    levels, bound = _proven(given, priced.prices, priced.bound, levels, gap, seconds)
    error = given.lost(levels)
    found = {group: int(level) for group, level in zip(tables.groups, levels, strict=True)}
    apart = relative_gap(error, bound)
    prices = dict(zip(limits, (float(price) for price in priced.prices), strict=True))
    after = _next(tables, given, limits, priced.prices, levels)
    return Allocation(
        tables,
        found,
        error,
        tables.spent(found),
        limits,
        bound,
        apart,
        status_of(apart, gap),
        prices,
        after,
        time.perf_counter() - started,
    )


def _proven(
    given: Chain, prices: np.ndarray, bound: float, levels: Int[np.ndarray, " groups"], gap: float, seconds: float
) -> tuple[Int[np.ndarray, " groups"], float]:
    """The levels, and the bound, once a search has closed the gap."""
    best = given.lost(levels)
    if relative_gap(best, bound) <= gap:
        return levels, bound
    # Nothing less than half of `gap` better is looked for, so that the ceiling is a bound where nothing is found.
    ceiling = best - 0.5 * gap * abs(best)
    if len(prices) == 1:
        found, is_complete = search(given, float(prices[0]), ceiling)
        proven = ceiling if is_complete else bound
    else:
        found, proven = programme(given, prices, ceiling, 0.5 * gap, seconds)
    if found is None or not fits(given, found):
        return levels, max(bound, proven)
    better = filled(given, found)
    return better, max(bound, min(proven, given.lost(better)))


def status_of(apart: float, gap: float) -> Status:
    """Of an answer that is `apart` from its bound, where `gap` was asked for."""
    return Status.OPTIMAL if apart <= OPTIMAL_GAP else Status.FEASIBLE if apart <= gap else Status.LIMIT


def checked(tables: Tables, budget: Mapping[str, float]) -> Mapping[str, float]:
    """The budget, or ValueError for one that is empty, of another resource or no amount."""
    if not budget:
        raise ValueError(f"budget is empty; say how much of {' or '.join(tables.costs)} may be spent")
    for name, limit in budget.items():
        if name not in tables.costs:
            raise ValueError(f"budget names '{name}', the tables know {', '.join(tables.costs)}")
        if not math.isfinite(limit) or limit < 0:
            raise ValueError(f"budget['{name}'] is {limit}; pass a number of the unit of its costs")
    return budget


def _infeasible(tables: Tables, given: Chain, limits: dict[str, float]) -> Infeasible:
    """What can be reached of each resource, and what sets it."""
    said, least = [], {}
    for k, (name, limit) in enumerate(limits.items()):
        levels = cheapest(given, np.eye(len(limits))[k], error=0.0)
        choice = dict(zip(tables.groups, map(int, levels), strict=True))
        least[name] = tables.spent(choice)[name]
        rows = {group: float(row[choice[group]]) for group, row in tables.costs[name].items()}
        rows["fixed"] = tables.fixed.get(name, 0.0)
        top = sorted(rows, key=rows.__getitem__)[::-1][:3]
        held = ", ".join(f"{group} {rows[group]:.6g}" for group in top if rows[group])
        said.append(
            f"{name} can be {least[name]:.6g} at least, {limit:.6g} was asked for" + (f" ({held})" if held else "")
        )
    each = all(least[name] <= limit for name, limit in limits.items())
    together = "; each budget can be met alone, not all together" if each else ""
    return Infeasible(f"infeasible: {'; '.join(said)}{together}", least)


def _next(
    tables: Tables, given: Chain, limits: dict[str, float], prices: np.ndarray, levels: Int[np.ndarray, " groups"]
) -> Change | None:
    """The best change that does not fit."""
    change, spent = changes(given, levels)
    more = np.tensordot(np.maximum(prices, 1e-300), np.maximum(spent, 0.0), 1)
    rate = np.full(change.shape, -np.inf)
    np.divide(-change, np.maximum(more, 1e-100), out=rate, where=change < 0)
    g, level = np.unravel_index(int(rate.argmax()), rate.shape)
    if not rate[g, level] > 0:
        return None
    group = tables.groups[int(g)]
    costs = {name: float(spent[k, g, level]) for k, name in enumerate(limits)}
    return Change(group, tables.label(group, int(level)), float(-change[g, level]), costs)
