"""One level for each group by the true loss: an evolutionary search that starts at an allocation."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Int
from tqdm import tqdm

from pruneopt.allocation.allocate import allocate, checked
from pruneopt.allocation.chain import Chain, chain, fits
from pruneopt.allocation.tables import Tables

Levels = dict[str, int]
_MUTATIONS = 3  # switches of a child at most, as in the paper


@dataclass(frozen=True, eq=False)
class Evolved:
    """A level for each group, found by measuring.

    levels: {group: number of its level}. loss: measured there. start: measured at the levels that it started at.
    history: the least loss after each generation. evaluations: how many rows of levels were measured with the loss,
    without those of `screens`. spent, budget: {resource: amount}. Nothing is proven.
    """

    tables: Tables
    levels: Levels
    loss: float
    start: float
    history: tuple[float, ...]
    evaluations: int
    spent: dict[str, float]
    budget: dict[str, float]

    def __getitem__(self, group: str) -> Any:
        """What the level of a group is called."""
        return self.tables.label(group, self.levels[group])

    def __repr__(self) -> str:
        used = ", ".join(f"{name} {self.spent[name]:.6g} of {limit:.6g}" for name, limit in self.budget.items())
        return (
            f"Evolved({len(self.levels)} groups; loss {self.start:.6g} -> {self.loss:.6g} in {len(self.history)} "
            f"generations, {self.evaluations} evaluations; {used})"
        )


def evolve(
    tables: Tables,
    budget: Mapping[str, float],
    loss: Callable[[Levels], float],
    *,
    start: Mapping[str, int] | None = None,
    generations: int = 50,
    offspring: int = 16,
    screens: Sequence[tuple[Callable[[Levels], float], int]] = (),
    seed: int = 0,
    progress: bool = True,
) -> Evolved:
    """min loss(levels), one level for each group, subject to costs within the budget, from `start` downhill.

    A (1 + lambda) evolutionary algorithm: each generation makes `offspring` children of the best row of levels so far,
    by one to three level switches, and the best of parent and children goes on. A switch takes one group a level dearer
    and then others, drawn at random, a level cheaper, until the row is within the budget again; what is left is spent
    on random groups that still fit a level dearer. Never worse than `start` by `loss`; no row is measured twice.

    loss: {group: number of its level} -> the loss of the network there, a number; deterministic. tables: the levels and
        their costs; errors are read for the start alone. start: levels within the budget, by default those of
        `allocate(tables, budget)`.
    screens: (loss of less data, how many pass), the least data first: only those children that pass all are measured by
        `loss`. seed: of the draws.
    Source: Sieberling et al. 2025 (EvoPress), algorithm 1. Raises ValueError for a start outside the budget or of other
    groups, a loss of the start that is not finite, numbers below 1, and what `allocate` raises. A child whose loss is
    not finite is dropped.
    """
    limits = dict(checked(tables, budget))
    for name, number in (("generations", generations), ("offspring", offspring), *(("screens", n) for _, n in screens)):
        if number < 1:
            raise ValueError(f"{name}: {number!r} is below 1; pass a whole number >= 1")
    given, rng = chain(tables, limits), np.random.default_rng(seed)
    best = _started(tables, given, limits, start)
    order = _by_cost(given)
    value = first = float(loss(_named(tables, best)))
    if not np.isfinite(value):
        raise ValueError(f"loss of the start is {value}; start where the network works")
    history, seen = [], {best.tobytes()}
    for _ in tqdm(range(generations), desc="evolve", unit="generation", disable=not progress):
        children = [_child(given, best, order, rng) for _ in range(offspring)]
        fresh = [c for c in {c.tobytes(): c for c in children}.values() if c.tobytes() not in seen]
        for screen, passing in screens:
            fresh = sorted(fresh, key=lambda c, screen=screen: _ranked(screen(_named(tables, c))))[:passing]
        for child in fresh:
            seen.add(child.tobytes())
            if (found := _ranked(loss(_named(tables, child)))) < value:
                best, value = child, found
        history.append(value)
    levels = _named(tables, best)
    return Evolved(tables, levels, value, first, tuple(history), len(seen), tables.spent(levels), limits)


def _started(
    tables: Tables, given: Chain, limits: Mapping[str, float], start: Mapping[str, int] | None
) -> Int[np.ndarray, " groups"]:
    levels = allocate(tables, limits).levels if start is None else start
    if set(levels) != set(tables.groups):
        raise ValueError(f"start names {len(levels)} groups, the tables have {len(tables.groups)}; give each its level")
    row = np.array([levels[group] for group in tables.groups])
    for group, level in zip(tables.groups, row, strict=True):
        if not 0 <= level < len(tables.errors[group]):
            raise ValueError(f"start: '{group}' has levels 0 to {len(tables.errors[group]) - 1}, not {level}")
    if not fits(given, row):
        raise ValueError(f"start spends {tables.spent(dict(levels))}, the budget is {dict(limits)}; start within it")
    return row


def _named(tables: Tables, row: Int[np.ndarray, " groups"]) -> Levels:
    return dict(zip(tables.groups, map(int, row), strict=True))


def _ranked(value: Any) -> float:
    """A loss as a number that compares: a NaN is the worst."""
    return float(value) if np.isfinite(value) else float("inf")


def _by_cost(given: Chain) -> list[Int[np.ndarray, " levels"]]:
    """The levels of each group in the order of what they cost, with the mean level of each neighbour."""
    most = np.maximum(np.abs(given.room), 1e-300)[:, None]
    own = np.stack([(given.costs[:, g] / most).sum(0) for g in range(len(given.errors))])
    for g, pair in enumerate(given.pairs):
        if pair is not None:
            own[g] += (pair / most[:, None]).sum(0).mean(1)
            own[g + 1] += (pair / most[:, None]).sum(0).mean(0)
    return [np.argsort(np.where(np.isfinite(e), c, np.inf), kind="stable")[: np.isfinite(e).sum()]
            for e, c in zip(given.errors, own, strict=True)]  # fmt: skip


def _child(
    given: Chain, parent: Int[np.ndarray, " groups"], order: list[np.ndarray], rng: np.random.Generator
) -> Int[np.ndarray, " groups"]:
    """The parent after some level switches; itself where the draws lead nowhere."""
    row = parent.copy()
    for _ in range(min(rng.integers(1, _MUTATIONS + 1, 2))):
        switched = _switched(given, row, order, rng)
        row = row if switched is None else switched
    return row


def _switched(
    given: Chain, row: Int[np.ndarray, " groups"], order: list[np.ndarray], rng: np.random.Generator
) -> Int[np.ndarray, " groups"] | None:
    row, groups = row.copy(), len(row)
    up = _moved(row, int(rng.integers(groups)), order, 1)
    if up is None:
        return None
    row[up[0]] = up[1]
    while not fits(given, row):
        downs = [move for g in range(groups) if g != up[0] and (move := _moved(row, g, order, -1)) is not None]
        if not downs:
            return None
        g, level = downs[rng.integers(len(downs))]
        row[g] = level
    for g in rng.permutation(groups):
        move = _moved(row, int(g), order, 1)
        if move is not None:
            after = row.copy()
            after[move[0]] = move[1]
            row = after if fits(given, after) else row
    return row


def _moved(row: np.ndarray, g: int, order: list[np.ndarray], step: int) -> tuple[int, int] | None:
    """(group, the level one step dearer or cheaper), None at the end."""
    at = int(np.flatnonzero(order[g] == row[g])[0]) + step
    return (g, int(order[g][at])) if 0 <= at < len(order[g]) else None
