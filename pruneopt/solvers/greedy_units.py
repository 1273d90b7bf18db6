"""Greedy elimination of units: groups of inputs that live or die for all outputs, the others refitted each time."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Bool, Float, Int

from pruneopt import _linalg
from pruneopt.constraints import parts
from pruneopt.problem import Problem
from pruneopt.solvers.base import Outcome, Solver, Start, check_not_negative, check_whole, layer_only, outcome, prepared
from pruneopt.solvers.factors import inverted
from pruneopt.solvers.polish import refit


@dataclass(frozen=True)
class GreedyUnits(Solver):
    """min 1/2 tr(D^T (H + lambda I) D), D = W - W0, over units of inputs, by backward elimination and exchanges.

    A unit u, such as a channel with its window or a head, goes with all its rows of W. The one of least
    1/2 tr(W_u^T [C_uu]^-1 W_u), C the inverse of H on what is left, goes next; W moves by -C_:u [C_uu]^-1 W_u and C by
    -C_:u [C_uu]^-1 C_u:, and so on. Then units outside and inside change places while that lowers the error: the
    `candidates` that would gain most alone are tried, each against the one that is then the cheapest.

    exchanges: at most so many. batch: while more than twice as many units must go as this, units of one input each go
        so many at a time, the cheapest. damping: relative, added to the mean diagonal before inverting; times ten until
        H has a Cholesky factor.

    In float64 on the host; n^3 multiply-adds, and n^2 times the inputs that are left out for each exchange. The weights
    are the exact refit of the support. Source: OSSCAR (Meng et al. 2024, section 3), whose local search this is;
    backward elimination as in ZipLM (Kurtic et al. 2023, algorithm 1).
    """

    exchanges: int = 20
    candidates: int = 16
    batch: int = 8
    damping: float = 1e-8

    def __post_init__(self) -> None:
        check_whole(self, 0, "exchanges")
        check_whole(self, 1, "candidates", "batch")
        check_not_negative(self, "damping")

    def refuses(self, problem: Problem) -> str | None:
        """Other objectives than Reconstruction, a penalty, and constraints on anything but whole inputs."""
        reason = layer_only(problem, self)
        if reason is None and parts.units_of_inputs(problem.subject_to, len(problem.objective.center)) is None:
            return (
                f"GreedyUnits cannot prune under {problem.subject_to!r}; pass a Coupled set, or Slices(-2, ...) or "
                "Blocks((k, -1), ...) of a matrix"
            )
        return reason

    def order(self, problem: Problem) -> list[int]:
        """Units in the order in which they go, as far as the constraint asks. Raises ValueError for what is refused."""
        if reason := self.refuses(problem):
            raise ValueError(reason)
        ready = prepared(problem)
        center, gram = np.asarray(ready.center, np.float64), np.asarray(ready.gram, np.float64)
        units, count = _units(problem, center)
        inverse, _, _ = inverted(gram, float(ready.mean), self.damping)
        return _eliminated(inverse, center, _rows(units), count, 1)

    def run(self, problem: Problem, init: Start | None, key: jax.Array) -> Outcome:
        """Eliminate, exchange, refit."""
        ready = prepared(problem)
        center, gram = np.asarray(ready.center, np.float64), np.asarray(ready.gram, np.float64)
        units, count = _units(problem, center)
        inverse, damped, damping = inverted(gram, float(ready.mean), self.damping)
        rows = _rows(units)
        alive = np.ones(len(rows), bool)
        alive[_eliminated(inverse, center, rows, count, self.batch)] = False
        alive, moves = _exchanged(damped, center, rows, alive, self.exchanges, self.candidates)
        support = np.broadcast_to(np.append(alive, True)[units][:, None], center.shape)
        value, _ = refit(damped, center, support, 0.0)
        value, kept = jnp.asarray(value, ready.center.dtype), jnp.asarray(support)
        return outcome(problem, ready, value, kept, stats={"damping": damping, "exchanges": moves})


def _units(problem: Problem, center: Float[np.ndarray, "n m"]) -> tuple[Int[np.ndarray, " n"], int]:
    found = parts.units_of_inputs(problem.subject_to, len(center))
    assert found is not None
    return found


def _rows(units: Int[np.ndarray, " n"]) -> list[Int[np.ndarray, " g"]]:
    """The inputs of each unit."""
    return [np.flatnonzero(units == u) for u in range(units.max(initial=-1) + 1)]


def _eliminated(
    inverse: Float[np.ndarray, "n n"],
    center: Float[np.ndarray, "n m"],
    rows: list[Int[np.ndarray, " g"]],
    count: int,
    batch: int,
) -> list[int]:
    """The units that go until `count` are left, the cheapest first."""
    c, w, alive, gone = inverse.copy(), center.copy(), np.ones(len(rows), bool), list[int]()
    single = all(len(r) == 1 for r in rows)
    while alive.sum() > count:
        left = np.flatnonzero(alive)
        many = min(batch, (len(left) - count + 1) // 2) if single and len(left) - count > 2 * batch else 1
        costs = _costs(*_blocks(c, w, [rows[u] for u in left]))
        going = left[np.argsort(costs, kind="stable")[:many]]
        _remove(c, w, np.concatenate([rows[u] for u in going]))
        alive[going] = False
        gone += going.tolist()
    return gone


def _remove(c: Float[np.ndarray, "n n"], w: Float[np.ndarray, "n m"], at: Int[np.ndarray, " g"]) -> None:
    """Inputs go: C and W, zero where an input is gone, are those of what is left."""
    step = _linalg.solve(c[np.ix_(at, at)], np.concatenate([c[at], w[at]], axis=1))
    factor = c[:, at]
    c -= factor @ step[:, : len(c)]
    w -= factor @ step[:, len(c) :]
    c[at], c[:, at], w[at] = 0.0, 0.0, 0.0


def _blocks(
    c: Float[np.ndarray, "n n"], w: Float[np.ndarray, "n m"], rows: list[Int[np.ndarray, " g"]]
) -> tuple[list[Float[np.ndarray, "units g g"]], list[Float[np.ndarray, "units g m"]], list[Int[np.ndarray, " units"]]]:
    """C_uu and W_u of these units, those of one size together, and which they are."""
    sizes = np.array([len(r) for r in rows])
    which = [np.flatnonzero(sizes == size) for size in np.unique(sizes)]
    places = [np.array([rows[u] for u in some]) for some in which]
    return [c[at[:, :, None], at[:, None, :]] for at in places], [w[at] for at in places], which


def _costs(
    blocks: list[Float[np.ndarray, "units g g"]],
    weights: list[Float[np.ndarray, "units g m"]],
    which: list[Int[np.ndarray, " units"]],
) -> Float[np.ndarray, " units"]:
    """1/2 tr(W_u^T [C_uu]^-1 W_u) of each unit."""
    found = np.empty(sum(map(len, which)))
    for c, w, some in zip(blocks, weights, which, strict=True):
        if c.shape[1] == 1:
            found[some] = 0.5 * (w[:, 0] ** 2).sum(1) / np.maximum(c[:, 0, 0], np.finfo(float).tiny)
        else:
            found[some] = 0.5 * np.einsum("ugm,ugm->u", w, _linalg.solve(c, w))
    return found


def _exchanged(
    gram: Float[np.ndarray, "n n"],
    center: Float[np.ndarray, "n m"],
    rows: list[Int[np.ndarray, " g"]],
    alive: Bool[np.ndarray, " units"],
    most: int,
    candidates: int,
) -> tuple[Bool[np.ndarray, " units"], int]:
    """Units change places while that lowers the error: the best of `candidates` comes in, then the cheapest goes."""
    alive, pull, owner = alive.copy(), gram @ center, np.full(len(gram), -1)
    for u, r in enumerate(rows):
        owner[r] = u
    if not most or alive.all() or not alive.any():
        return alive, 0
    kept = np.flatnonzero(np.append(alive, True)[owner])
    c = np.zeros_like(gram)  # the inverse of H on what is kept
    c[np.ix_(kept, kept)] = _linalg.inverse(gram[np.ix_(kept, kept)])
    w = c @ pull
    for moves in range(most):
        inside, outside = np.flatnonzero(alive), np.flatnonzero(~alive)
        joining = _joining(gram, c, pull - gram @ w, [rows[u] for u in outside])
        gains = np.array([one.gain for one in joining])
        blocks, weights, which = _blocks(c, w, [rows[u] for u in inside])
        found = []
        for k in np.argsort(-gains, kind="stable")[:candidates]:
            grown = joining[k].beside(blocks, weights, which, [rows[u] for u in inside])
            cost = _costs(grown[0], grown[1], which)
            found.append((float(cost.min() - gains[k]), int(k), int(inside[cost.argmin()])))
        change, new, old = min(found)
        if not change < -1e-9 * gains.max():
            return alive, moves
        joining[new].add(c, w)
        _remove(c, w, rows[old])
        alive[outside[new]], alive[old] = True, False
    return alive, most


class _Joining(NamedTuple):
    """Inputs that would join those kept. z: C H_:r, with which the others make them; inner: the inverse of their Schur
    complement; w: their weights. gain: by how much the error falls, the cost of the last one out.
    """

    rows: Int[np.ndarray, " g"]
    z: Float[np.ndarray, "n g"]
    inner: Float[np.ndarray, "g g"]
    w: Float[np.ndarray, "g m"]
    gain: float

    def beside(
        self, blocks: list[Any], weights: list[Any], which: list[Any], rows: list[Int[np.ndarray, " g"]]
    ) -> tuple[list[Float[np.ndarray, "units g g"]], list[Float[np.ndarray, "units g m"]]]:
        """C_uu and W_u of units once these have joined them."""
        cs, ws = [], []
        for c, w, some in zip(blocks, weights, which, strict=True):
            z = self.z[np.array([rows[u] for u in some])]
            cs.append(c + z @ self.inner @ z.swapaxes(1, 2))
            ws.append(w - z @ self.w)
        return cs, ws

    def add(self, c: Float[np.ndarray, "n n"], w: Float[np.ndarray, "n m"]) -> None:
        """They join."""
        across = self.z @ self.inner
        c += across @ self.z.T
        c[:, self.rows], c[self.rows] = -across, -across.T
        c[np.ix_(self.rows, self.rows)] = self.inner
        w -= self.z @ self.w
        w[self.rows] = self.w


def _joining(
    gram: Float[np.ndarray, "n n"],
    c: Float[np.ndarray, "n n"],
    residual: Float[np.ndarray, "n m"],
    rows: list[Int[np.ndarray, " g"]],
) -> list[_Joining]:
    """What each of these units would bring."""
    every = np.concatenate(rows)
    through = c @ gram[:, every]
    found, first = [], 0
    for r in rows:
        z = through[:, first : first + len(r)]
        first += len(r)
        inner = _linalg.inverse(gram[np.ix_(r, r)] - gram[r] @ z)
        w = inner @ residual[r]
        found.append(_Joining(r, z, inner, w, 0.5 * float(np.sum(residual[r] * w))))
    return found
