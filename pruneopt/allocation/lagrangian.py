"""Prices of the resources: the Lagrangian dual of an allocation, by cutting planes (Kelley 1960), and a row near it."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Int
from scipy.optimize import linprog

from pruneopt.allocation.chain import Chain, cheapest
from pruneopt.allocation.exchange import exchanged, filled, repaired

_CUTS, _SEEN, _BETTERED = 200, 20, 8


class Priced(NamedTuple):
    """prices: of each resource. bound: no row within the room has less error. levels: a row within it, or None."""

    prices: Float[np.ndarray, " resources"]
    bound: float
    levels: Int[np.ndarray, " groups"] | None


def lagrangian(given: Chain, gap: float = 0.0) -> Priced:
    """The prices that prove the largest bound, and a row near it, bettered until `gap` apart, as a part of the error.

    The dual is concave and piecewise linear, each row of levels a cut; with one resource the cuts' corner is where two
    lines meet, and the prices are exact after as many cuts as there are corners on the way.
    """
    scale = _scale(given)
    most = 1e3
    best, rows = Priced(np.zeros(len(given.room)), -np.inf, None), []
    cuts: list[tuple[float, np.ndarray]] = []
    prices = np.zeros(len(given.room))
    for _ in range(_CUTS):
        levels = cheapest(given, prices)
        rows.append(levels)
        over, lost = given.spent(levels) - given.room, given.lost(levels)
        if (value := lost + float(prices @ over)) > best.bound:
            best = best._replace(prices=prices, bound=value)
        cuts.append((lost, over * scale))
        if (found := _corner(cuts, most)) is None:  # prices too far apart for the solver; any price proves its bound
            break
        corner, ceiling = found
        if ceiling <= best.bound + 1e-12 * max(abs(best.bound), abs(ceiling)):
            if np.all(corner < 0.99 * most) or most > 1e12:
                break
            most *= 1e3
            continue
        prices = corner * scale
    return best._replace(levels=_near(given, best.prices, rows, best.bound + gap * abs(best.bound)))


def _corner(cuts: list[tuple[float, np.ndarray]], most: float) -> tuple[np.ndarray, float] | None:
    """The prices within [0, most] at which the least of the cuts is largest, and that least; None where HiGHS fails."""
    over = np.array([row for _, row in cuts])
    rows = np.concatenate([np.ones((len(cuts), 1)), -over], axis=1)
    limits = [(None, None), *[(0.0, most)] * over.shape[1]]
    found = linprog([-1.0, *[0.0] * over.shape[1]], rows, [lost for lost, _ in cuts], bounds=limits, method="highs")
    return None if found.x is None else (np.maximum(found.x[1:], 0.0), float(found.x[0]))


def _scale(given: Chain) -> Float[np.ndarray, " resources"]:
    """The error of a network over its cost, of each resource: prices in that unit are near 1."""
    errors = np.where(np.isfinite(given.errors), given.errors, 0.0)
    span = max(float((errors.max(1) - np.minimum(errors.min(1), 0.0)).sum()), 1e-300)
    least = np.array(
        [given.spent(cheapest(given, unit, error=0.0))[k] for k, unit in enumerate(np.eye(len(given.room)))]
    )
    return span / np.maximum(np.maximum(np.abs(given.room), least), 1e-300)


def _near(
    given: Chain, prices: Float[np.ndarray, " resources"], rows: list[Int[np.ndarray, " groups"]], enough: float
) -> Int[np.ndarray, " groups"] | None:
    """The best row within the room found from those seen last and from the cheapest; the first one below `enough`."""
    last = cheapest(given, 1 / np.maximum(np.abs(given.room), 1e-300), error=0.0)
    distinct = {levels.tobytes(): levels for levels in [last, *rows[-_SEEN:]]}.values()
    inside: list[Int[np.ndarray, " groups"]] = []
    for levels in list(distinct)[::-1]:
        fitted = repaired(given, levels, prices)
        if fitted is not None:
            inside.append(filled(given, fitted))
            if given.lost(inside[-1]) <= enough:
                return inside[-1]
    inside.sort(key=given.lost)
    for k, levels in enumerate(inside[:_BETTERED] if given.is_separable else []):
        inside[k] = exchanged(given, levels, prices)
        if given.lost(inside[k]) <= enough:
            break
    return min(inside, key=given.lost, default=None)
