"""Greedy elimination of units: groups of inputs that live or die for all outputs, the others refitted each time."""

from __future__ import annotations

from dataclasses import dataclass

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

    In float64 on the host, n^3 multiply-adds. The weights are the exact refit of the support. Source: OSSCAR (Meng et
    al. 2024, section 3), whose local search this is; backward elimination as in ZipLM (Kurtic et al. 2023,
    algorithm 1).
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
        going = left[np.argsort(_costs(c, w, [rows[u] for u in left]), kind="stable")[:many]]
        at = np.concatenate([rows[u] for u in going])
        factor = c[:, at]
        step = _linalg.solve(c[np.ix_(at, at)], np.concatenate([c[at], w[at]], axis=1))
        c -= factor @ step[:, : len(c)]
        w -= factor @ step[:, len(c) :]
        alive[going] = False
        gone += going.tolist()
        w[at] = 0.0
        c[at], c[:, at] = 0.0, 0.0
        c[at, at] = 1.0
    return gone


def _costs(
    c: Float[np.ndarray, "n n"], w: Float[np.ndarray, "n m"], rows: list[Int[np.ndarray, " g"]]
) -> Float[np.ndarray, " units"]:
    """1/2 tr(W_u^T [C_uu]^-1 W_u) of each of these units."""
    found = np.empty(len(rows))
    sizes = np.array([len(r) for r in rows])
    for size in np.unique(sizes):
        some = np.flatnonzero(sizes == size)
        at = np.array([rows[u] for u in some])
        if size == 1:
            found[some] = 0.5 * (w[at[:, 0]] ** 2).sum(1) / np.maximum(c[at[:, 0], at[:, 0]], np.finfo(float).tiny)
            continue
        blocks, each = c[at[:, :, None], at[:, None, :]], w[at]
        found[some] = 0.5 * np.einsum("ugm,ugm->u", each, _linalg.solve(blocks, each))
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
    for moves in range(most):
        outside, kept = np.flatnonzero(~alive), np.flatnonzero(np.append(alive, True)[owner])
        if not len(outside) or not alive.any():
            return alive, moves
        gains = _gains(gram, pull, kept, [rows[u] for u in outside])
        found = []
        for k in np.argsort(-gains, kind="stable")[:candidates]:
            new = int(outside[k])
            more = np.sort(np.concatenate([kept, rows[new]]))
            c = _linalg.inverse(gram[np.ix_(more, more)])
            inside = np.flatnonzero(alive)
            cost = _costs(c, c @ pull[more], [np.searchsorted(more, rows[u]) for u in inside])
            found.append((float(cost.min() - gains[k]), new, int(inside[cost.argmin()])))
        change, new, old = min(found)
        if not change < -1e-9 * gains.max():
            return alive, moves
        alive[new], alive[old] = True, False
    return alive, most


def _gains(
    gram: Float[np.ndarray, "n n"],
    pull: Float[np.ndarray, "n m"],
    kept: Int[np.ndarray, " k"],
    rows: list[Int[np.ndarray, " g"]],
) -> Float[np.ndarray, " units"]:
    """By how much the error falls once each of these units joins those kept: the cost of the last one out."""
    every = np.concatenate(rows)
    c, cross = _linalg.inverse(gram[np.ix_(kept, kept)]), gram[np.ix_(every, kept)]
    through = cross @ c
    residual = pull[every] - through @ pull[kept]
    found, first = np.empty(len(rows)), 0
    for k, r in enumerate(rows):
        at = slice(first, first := first + len(r))
        schur = gram[np.ix_(r, r)] - through[at] @ cross[at].T
        found[k] = 0.5 * float(np.sum(residual[at] * _linalg.solve(schur, residual[at])))
    return found
