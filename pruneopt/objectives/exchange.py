"""One output's support, changed one weight at a time, with every kept weight refitted: on the host, in float64."""

from __future__ import annotations

from typing import Any

import numpy as np
from jaxtyping import Bool, Float, Int

from pruneopt import _linalg

LEAST = 1e-10  # gain of an exchange, over the error: below it rounding decides
_LIKELY = 48  # inputs, and kept ones, that are looked at first: a full look costs n k
_ANEW = 20  # exchanges after which the factors are computed anew: rank-one updates lose about a digit in as many


class Fit:
    """The refit of one output on a support S of k inputs, and what changing S would do.

    With P = (H_SS)^-1, T = H_:S P, v = w0 off S, w = w0 + P (H v)_S on S, g = H (w0 - w) and s_j = H_jj - T_j: H_Sj:
    letting j in lowers the error (w - w0)^T H (w - w0) by g_j^2 / s_j, and putting j in the place of i by exactly

        (g_j + T_ji w_i / P_ii)^2 / (s_j + T_ji^2 / P_ii) - w_i^2 / P_ii.

    All stands as differences from w0, which loses no digits where w0 nearly fits. n k^2 multiply-adds for a new
    support, about 4 n k for an exchange; 3 n k numbers.
    Raises np.linalg.LinAlgError where H_SS is not positive definite in float64; `of` gives None there.
    Source: Hassibi and Stork 1993 (equation 5) for what goes, and its reverse for what comes.
    """

    @classmethod
    def of(
        cls, gram: Float[np.ndarray, "n n"], w0: Float[np.ndarray, " n"], kept: Bool[np.ndarray, " n"]
    ) -> Fit | None:
        """The refit on a mask; None where it keeps nothing, or more than H tells apart."""
        try:
            return cls(gram, w0, np.flatnonzero(kept)) if kept.any() else None
        except np.linalg.LinAlgError:
            return None

    def __init__(self, gram: Float[np.ndarray, "n n"], w0: Float[np.ndarray, " n"], support: Int[np.ndarray, " k"]):
        self._gram, self._w0 = gram, w0
        self._floor = _floor(gram)
        self.support = np.array(support)
        self._anew()

    def _anew(self) -> None:
        self._columns = self._gram[:, self.support]
        inverse = _linalg.inverse_on_host(self._columns[self.support])
        if inverse is None:
            raise np.linalg.LinAlgError("H on the support is not positive definite")
        self._inverse = inverse
        self._across = self._columns @ self._inverse
        self._schur = np.diagonal(self._gram) - np.einsum("ij,ij->i", self._across, self._columns)
        lost = self._w0.copy()
        lost[self.support] = 0.0
        self._pull = self._gram @ lost
        self._refit()

    def _refit(self) -> None:
        moved = self._inverse @ self._pull[self.support]
        self.weights = self._w0[self.support] + moved
        self._residual = self._pull - self._columns @ moved
        self._residual[self.support] = 0.0
        self.error = max(float(self._w0 @ self._residual), 0.0)

    def gains(self, inputs: Any = slice(None), kept: Any = slice(None)) -> Float[np.ndarray, "n k"]:
        """By how much the error falls where an input (row) takes the place of a kept one (column).

        inputs, kept: which of them; all by default.
        """
        rows, columns = np.arange(len(self._w0))[inputs], np.arange(len(self.support))[kept]
        across = self._across if rows.size * columns.size == self._across.size else self._across[np.ix_(rows, columns)]
        pivot, weights = np.diagonal(self._inverse)[columns], self.weights[columns]
        schur = np.maximum(self._schur, self._floor)[rows]
        top = self._residual[rows, None] + across * (weights / pivot)
        return top**2 / (schur[:, None] + across**2 / pivot) - weights**2 / pivot

    def best(
        self, free: Bool[np.ndarray, " n"], runs: Int[np.ndarray, " n"], among: int | None = None
    ) -> tuple[float, int, int]:
        """(gain, input, kept one) of the best exchange inside a run with a `free` input; gain -inf where there is none.

        among: only the so many inputs that gain most alone, and the so many kept ones that cost least alone.
        """
        outside = free.copy()
        outside[self.support] = False
        rows, columns = np.flatnonzero(outside), np.arange(len(self.support))
        if among is not None:
            alone = _alone(self._residual, self._schur, self._floor)
            cost = self.weights**2 / np.diagonal(self._inverse)
            rows, columns = rows[np.argsort(-alone[rows])[:among]], np.argsort(cost)[:among]
        if not (rows.size and columns.size):
            return -np.inf, 0, 0
        gains = self.gains(rows, columns)
        gains[runs[rows, None] != runs[self.support[columns]]] = -np.inf
        j, c = np.unravel_index(np.argmax(gains), gains.shape)
        return float(gains[j, c]), int(rows[j]), int(columns[c])

    def exchange(self, j: int, c: int) -> None:
        """Put input j in the place of the c-th kept one, by two rank-one updates."""
        out, through, pivot = self._inverse[:, c].copy(), self._across[:, c].copy(), self._inverse[c, c]
        inverse, across = self._inverse - np.outer(out, out) / pivot, self._across - np.outer(through, out) / pivot
        inverse[c], inverse[:, c], across[:, c], self._columns[:, c] = 0.0, 0.0, 0.0, 0.0
        toward = across[j].copy()
        pull = self._columns @ toward - self._gram[:, j]
        schur = max(self._schur[j] + through[j] ** 2 / pivot, self._floor[j])
        toward[c] = -1.0
        self._inverse = inverse + np.outer(toward, toward) / schur
        self._across = across + np.outer(pull, toward) / schur
        self._schur = self._schur + through**2 / pivot - pull**2 / schur
        i = self.support[c]
        self._pull += self._gram[:, i] * self._w0[i] - self._gram[:, j] * self._w0[j]
        self._columns[:, c], self.support[c] = self._gram[:, j], j
        self._refit()

    def improved(self, free: Bool[np.ndarray, " n"], runs: Int[np.ndarray, " n"], steps: int) -> tuple[int, float]:
        """Make the best exchange inside a run among `free` inputs, again and again, at most `steps` times.

        Returns how many were made, and by how much the best further one would lower the error, 0 if none helps: judged
        over all pairs, though most exchanges are found among the likeliest.
        """
        one_run, gain = bool(np.all(runs == runs[0])), 0.0
        for step in range(steps + 1):
            least = LEAST * self.error
            gain, j, c = self.best(free, runs, _LIKELY) if one_run else (0.0, 0, 0)
            if not gain > least or step == steps:
                gain, j, c = self.best(free, runs)
            if not gain > least:
                return step, 0.0
            if step == steps:
                break
            before = vars(self) | {name: getattr(self, name).copy() for name in ("support", "_columns", "_pull")}
            try:
                self.exchange(j, c)
                if (step + 1) % _ANEW == 0:
                    self._anew()
                helped = self.error < before["error"]
            except np.linalg.LinAlgError:
                helped = False
            if not helped:  # rounding: the exchange did not do what it promised
                vars(self).update(before)
                return step, 0.0
        return steps, gain


def _floor(gram: Float[np.ndarray, "n n"]) -> Float[np.ndarray, " n"]:
    """What is left of each input's H_jj beside a support that explains it, to rounding; of inputs that are noise, that
    of the largest.
    """
    diagonal = np.diagonal(gram)
    return np.maximum(1e-12 * diagonal, np.finfo(np.float64).eps ** 2 * np.max(diagonal))


def _alone(
    residual: Float[np.ndarray, " n"], schur: Float[np.ndarray, " n"], floor: Float[np.ndarray, " n"]
) -> Float[np.ndarray, " n"]:
    """What each input gains alone: nothing where the support explains it."""
    return np.where(schur > floor, residual**2 / np.maximum(schur, floor), 0.0)


def forward(
    gram: Float[np.ndarray, "n n"],
    w0: Float[np.ndarray, " n"],
    free: Bool[np.ndarray, " n"],
    runs: Int[np.ndarray, " n"],
    counts: Int[np.ndarray, " r"],
) -> Int[np.ndarray, " k"]:
    """Inputs let in one at a time, each the one that lowers the refitted error most; counts[r] of each run.

    n k multiply-adds a step. Source: orthogonal least squares (Chen, Billings and Luo 1989, section 4).
    """
    residual, schur, room = gram @ w0, np.diagonal(gram).copy(), np.array(counts)
    floor, open_ = _floor(gram), free.copy()
    rows, support = np.zeros((int(room.sum()), len(gram))), []
    for k in range(len(rows)):
        gain = np.where(open_ & (room[runs] > 0), _alone(residual, schur, floor), -1.0)
        j = int(np.argmax(gain))
        if gain[j] < 0:
            break
        row = gram[:, j] - rows[:k, j] @ rows[:k]
        rows[k] = row / np.sqrt(max(row[j], floor[j]))
        residual = residual - rows[k] * (residual[j] / max(rows[k, j], np.sqrt(floor[j])))
        schur = schur - rows[k] ** 2
        open_[j] = False
        room[runs[j]] -= 1
        support.append(j)
    return np.array(support, int)
