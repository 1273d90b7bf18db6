"""Groups in a row as dense arrays, and the cheapest row of levels at given prices (Viterbi 1967)."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Int

from pruneopt.allocation.tables import Tables


class Chain(NamedTuple):
    """errors: inf where a group has fewer levels. pairs: for each group but the last None, or what its levels and those
    of the next cost together (resources, levels, levels). room: what each resource has for the groups.
    """

    errors: Float[np.ndarray, "groups levels"]
    costs: Float[np.ndarray, "resources groups levels"]
    pairs: list[Float[np.ndarray, "resources levels levels"] | None]
    room: Float[np.ndarray, " resources"]

    @property
    def is_separable(self) -> bool:
        """Whether no two groups share a cost."""
        return all(pair is None for pair in self.pairs)

    def spent(self, levels: Int[np.ndarray, " groups"]) -> Float[np.ndarray, " resources"]:
        """What a row of levels costs."""
        total = self.costs[:, np.arange(len(levels)), levels].sum(1)
        for g, pair in enumerate(self.pairs):
            if pair is not None:
                total = total + pair[:, levels[g], levels[g + 1]]
        return total

    def lost(self, levels: Int[np.ndarray, " groups"]) -> float:
        """The sum of errors of a row of levels."""
        return float(self.errors[np.arange(len(levels)), levels].sum())


def chain(tables: Tables, budget: Mapping[str, float]) -> Chain:
    """The arrays of tables, of the resources that a budget names."""
    groups, most = tables.groups, max(len(row) for row in tables.errors.values())
    errors = np.full((len(groups), most), np.inf)
    costs = np.zeros((len(budget), len(groups), most))
    for g, group in enumerate(groups):
        errors[g, : len(tables.errors[group])] = tables.errors[group]
        for k, name in enumerate(budget):
            if group in tables.costs[name]:
                costs[k, g, : len(tables.errors[group])] = tables.costs[name][group]
    pairs: list[np.ndarray | None] = []
    for one, other in itertools.pairwise(groups):
        pair = np.zeros((len(budget), most, most))
        for k, name in enumerate(budget):
            matrix = tables.coupled.get(name, {}).get((one, other))
            if matrix is not None:
                found = np.asarray(matrix, float)
                pair[k, : found.shape[0], : found.shape[1]] = found
        pairs.append(pair if pair.any() else None)
    room = np.array([float(limit) - tables.fixed.get(name, 0.0) for name, limit in budget.items()])
    return Chain(errors, costs, pairs, room)


def ahead(
    given: Chain, prices: Float[np.ndarray, " resources"], error: float = 1.0
) -> Float[np.ndarray, "groups levels"]:
    """For each level of each group the least error x errors + prices x costs that can follow it, its own left out."""
    own = _priced(given, prices, error)
    rest = np.zeros_like(own)
    for g in range(len(own) - 2, -1, -1):
        after, pair = own[g + 1] + rest[g + 1], given.pairs[g]
        rest[g] = after.min() if pair is None else (np.tensordot(prices, pair, 1) + after).min(1)
    return rest


def through(given: Chain, prices: Float[np.ndarray, " resources"]) -> Float[np.ndarray, "groups levels"]:
    """For each level of each group a lower bound on the errors of the rows within the room that hold it."""
    own, rest = _priced(given, prices, 1.0), ahead(given, prices)
    before = np.zeros_like(own)
    for g, pair in enumerate(given.pairs):
        sofar = own[g] + before[g]
        before[g + 1] = sofar.min() if pair is None else (np.tensordot(prices, pair, 1) + sofar[:, None]).min(0)
    return before + own + rest - float(prices @ given.room)


def cheapest(given: Chain, prices: Float[np.ndarray, " resources"], error: float = 1.0) -> Int[np.ndarray, " groups"]:
    """The row of levels that minimises error x errors + prices x costs."""
    own = _priced(given, prices, error)
    if given.is_separable:
        return own.argmin(1)
    rest = ahead(given, prices, error)
    levels = [int((own[0] + rest[0]).argmin())]
    for g in range(1, len(own)):
        pair = given.pairs[g - 1]
        step = 0.0 if pair is None else np.tensordot(prices, pair, 1)[levels[-1]]
        levels.append(int((own[g] + rest[g] + step).argmin()))
    return np.array(levels)


def _priced(given: Chain, prices: Float[np.ndarray, " resources"], error: float) -> Float[np.ndarray, "groups levels"]:
    """What each level costs by itself; inf where a group has none."""
    lost = error * given.errors if error else np.where(np.isfinite(given.errors), 0.0, np.inf)
    return lost + np.tensordot(prices, given.costs, 1)


def fits(given: Chain, levels: Int[np.ndarray, " groups"]) -> bool:
    """Whether a row of levels stays within the room, to rounding."""
    return bool(np.all(given.spent(levels) <= given.room + 1e-12 * np.maximum(np.abs(given.room), 1e-300)))


def changes(given: Chain, levels: Int[np.ndarray, " groups"]) -> tuple[np.ndarray, np.ndarray]:
    """By how much each other level of one group changes the errors, and what it costs more."""
    rows = np.arange(len(levels))
    change = given.errors - given.errors[rows, levels][:, None]
    spent = given.costs - given.costs[:, rows, levels][:, :, None]
    for g, pair in enumerate(given.pairs):
        if pair is not None:
            now = pair[:, levels[g], levels[g + 1]][:, None]
            spent[:, g] += pair[:, :, levels[g + 1]] - now
            spent[:, g + 1] += pair[:, levels[g], :] - now
    return change, spent
