"""A row of levels made to fit, and bettered by changes of one group or of two at a time."""

from __future__ import annotations

import numpy as np
from jaxtyping import Float, Int

from pruneopt.allocation.chain import Chain, changes, fits

_CORE = 400  # changes that are tried in pairs: the cheapest at the prices


def repaired(
    given: Chain, levels: Int[np.ndarray, " groups"], prices: Float[np.ndarray, " resources"]
) -> Int[np.ndarray, " groups"] | None:
    """The row, once changes of one group at a time, those that lose least for what they save, make it fit; or None."""
    levels = levels.copy()
    unit = 1 / np.maximum(np.abs(given.room), 1e-300)
    for _ in range(8 * len(levels)):
        if fits(given, levels):
            return levels
        over = (given.spent(levels) - given.room) * unit
        change, spent = changes(given, levels)
        left = over[:, None, None] + spent * unit[:, None, None]
        saved = np.maximum(over, 0.0).sum() - np.maximum(left, 0.0).sum(0)
        lost = change + np.tensordot(prices, spent, 1)
        rate = np.full(lost.shape, np.inf)
        np.divide(np.maximum(lost, 0.0), saved, out=rate, where=saved > 1e-15)
        g, level = np.unravel_index(int(rate.argmin()), rate.shape)
        if not np.isfinite(rate[g, level]):
            return None
        levels[g] = level
    return None


def filled(given: Chain, levels: Int[np.ndarray, " groups"]) -> Int[np.ndarray, " groups"]:
    """A row that fits, bettered by changes of one group at a time while one fits; the largest gain first."""
    levels = levels.copy()
    while True:
        change, spent = changes(given, levels)
        fit = np.all(spent <= _left(given, levels)[:, None, None], axis=0)
        gains = np.where(fit, -change, -np.inf)
        g, level = np.unravel_index(int(gains.argmax()), gains.shape)
        if not gains[g, level] > 1e-15 * max(abs(given.lost(levels)), 1e-300):
            return levels
        levels[g] = level


def exchanged(
    given: Chain, levels: Int[np.ndarray, " groups"], prices: Float[np.ndarray, " resources"]
) -> Int[np.ndarray, " groups"]:
    """A row that fits, of groups that share no cost, bettered by changes of two groups at once while one fits."""
    levels = levels.copy()
    while True:
        change, spent = changes(given, levels)
        reduced = change + np.tensordot(prices, spent, 1)
        reduced[np.arange(len(levels)), levels] = np.inf
        core = np.argsort(reduced, axis=None)[:_CORE]
        core = core[np.isfinite(reduced.ravel()[core])]
        group, level = np.unravel_index(core, reduced.shape)
        gain, cost, room = -change.ravel()[core], spent.reshape(len(spent), -1)[:, core], _left(given, levels)
        fit = np.all(cost[:, :, None] + cost[:, None] <= room[:, None, None], axis=0) & (group[:, None] != group)
        both = np.where(fit, gain[:, None] + gain, -np.inf)
        one, other = np.unravel_index(int(both.argmax()), both.shape) if both.size else (0, 0)
        if not (both.size and both[one, other] > 1e-12 * max(abs(given.lost(levels)), 1e-300)):
            return levels
        levels[group[one]], levels[group[other]] = level[one], level[other]
        levels = filled(given, levels)


def _left(given: Chain, levels: Int[np.ndarray, " groups"]) -> Float[np.ndarray, " resources"]:
    return given.room - given.spent(levels) + 1e-12 * np.abs(given.room)
