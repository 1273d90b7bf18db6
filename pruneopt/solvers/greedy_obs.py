"""Greedy OBS: remove one weight at a time, the cheapest first, and let the others make up for it."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Bool, Float, Int

from pruneopt import _linalg
from pruneopt.constraints.base import Constraint
from pruneopt.constraints.cardinality import Cardinality
from pruneopt.constraints.intersection import Intersection
from pruneopt.constraints.nm import NM
from pruneopt.constraints.support import Support
from pruneopt.problem import Problem
from pruneopt.solvers.base import Layer, Outcome, Solver, Start, layer, layer_only
from pruneopt.solvers.polish import refit


class Trace(NamedTuple):
    """The removals of every output in their order: `order[k, j]` is the k-th input that output j loses.

    losses: by how much 1/2 tr(D^T (H + damping) D) rises with each removal. Where an output has fewer removals than
    the others (a fixed support), its last entries have order -1 and loss inf. In the units of the prepared layer.
    """

    order: Int[np.ndarray, "k m"]
    losses: Float[np.ndarray, "k m"]
    inputs: int

    def ranks(self) -> Float[np.ndarray, "n m"]:
        """The position of each weight in the merged order of all outputs; inf where it is never removed.

        The outputs are merged as the paper does: next is the output whose next removal is the cheapest, which is the
        order of the running maxima of the losses.
        """
        k, m = self.order.shape
        merged = np.argsort(np.maximum.accumulate(self.losses, axis=0), axis=None, kind="stable")
        place = np.empty(k * m)
        place[merged] = np.arange(k * m)
        ranks = np.full((self.inputs, m), np.inf)
        step, output = np.nonzero(self.order >= 0)
        ranks[self.order[step, output], output] = place.reshape(k, m)[step, output]
        return ranks

    def support(self, constraint: Constraint) -> Bool[np.ndarray, "n m"]:
        """What is left under `constraint`: a cardinality over the tree, the leaf or each output; or what was traced."""
        with jax.enable_x64(True):
            return np.asarray(constraint.select(self.ranks()))


@dataclass(frozen=True)
class GreedyOBS(Solver):
    """min 1/2 tr(D^T (H + lambda I) D), D = W - W0, by exact greedy removal (OBC, ExactOBS).

    Each output removes the weight p with the least w_p^2 / (2 [C]_pp), C the inverse of H on what is left, moves the
    others by -C_:p w_p / C_pp and C by -C_:p C_p: / C_pp, and so on. The whole trace serves every sparsity: a budget
    over the layer merges the outputs by their losses; under N:M along the inputs a weight can go while its group has
    more than n; a fixed support (also intersected with one of these) goes first.

    damping: relative, added to the mean diagonal before inverting; multiplied by ten until H has a Cholesky factor.
    memory: bytes that the factors of the outputs in work may take, 16 n^2 each; at least one is worked on.

    In float64 on the host. C is never formed: its downdates are those of a pivoted Cholesky factorisation, n^3 / 2
    multiply-adds an output for the whole trace. The weights are the exact refit of the support for the damped H.
    Refused: budgets that couple the outputs in another way (per input, N:M along outputs, blocks, slices).
    stats: damping (the one used). Source: Frantar, Singh, Alistarh 2022, algorithm 1, sections 4 and 5.
    """

    damping: float = 1e-8
    memory: int = 1 << 29

    def __post_init__(self) -> None:
        if not (isinstance(self.damping, int | float) and math.isfinite(self.damping) and self.damping >= 0):
            raise ValueError(f"damping={self.damping!r} is not a number >= 0; pass a fraction of mean(diag H)")
        if isinstance(self.memory, bool) or not isinstance(self.memory, int) or self.memory < 1:
            raise ValueError(f"memory={self.memory!r} is not a whole number >= 1; pass bytes, such as 1 << 29")

    def refuses(self, problem: Problem) -> str | None:
        """Other objectives than Reconstruction, a penalty, and constraints that couple outputs other than by a sum."""
        reason = layer_only(problem, self)
        if reason is None and _rule(problem.subject_to) is None:
            return (
                f"GreedyOBS cannot prune under {problem.subject_to!r}; pass Cardinality per 'tree', 'leaf' or 'out', "
                "NM along the inputs, a Support, or an Intersection of Supports with one of them"
            )
        return reason

    def run(self, problem: Problem, init: Start | None, key: jax.Array) -> Outcome:
        """Trace, select, compensate."""
        assert problem.subject_to is not None
        trace, gram, damping = self._traced(problem)
        ready = layer(problem)
        support = trace.support(problem.subject_to) & ~np.asarray(ready.dead)[:, None]
        value = _compensated(gram, np.asarray(ready.center, np.float64), support)
        return ready.outcome(
            problem, jnp.asarray(value, ready.center.dtype), jnp.asarray(support), stats={"damping": damping}
        )

    def trace(self, problem: Problem) -> Trace:
        """The removals of all outputs, as far as the constraint may need them: all, for a budget over the layer.

        Raises ValueError for a problem that is refused. The inputs without variance go first, at no loss.
        """
        reason = self.refuses(problem)
        if reason:
            raise ValueError(reason)
        return self._traced(problem)[0]

    def _traced(self, problem: Problem) -> tuple[Trace, np.ndarray, float]:
        ready, rule = layer(problem), _rule(problem.subject_to)
        center, dead = np.asarray(ready.center, np.float64), np.asarray(ready.dead)
        n, m = center.shape
        gram, damping = _regular(np.asarray(ready.gram, np.float64), float(ready.mean), self.damping)
        inverse = scipy.linalg.inv(gram)
        inverse = 0.5 * (inverse + inverse.T)
        forced = ~_allowed(problem.subject_to, n, m) | dead[:, None]
        groups, room = _room(rule, forced)
        depth = room.sum(0)
        order = np.full((depth.max(initial=0), m), -1)
        losses = np.full(order.shape, np.inf)
        chunk = max(1, self.memory // (16 * n * n))
        for k in np.unique(depth[depth > 0]):
            alike = np.flatnonzero(depth == k)
            for at in (alike[i : i + chunk] for i in range(0, alike.size, chunk)):
                order[:k, at], losses[:k, at] = _removals(
                    inverse, center[:, at].T.copy(), forced[:, at].T, groups, room[:, at].T.copy(), int(k)
                )
        return Trace(order, losses / _units(problem, ready), n), gram, damping


def _rule(constraint: Constraint | None) -> Cardinality | NM | Support | None:
    """The one part of the constraint that chooses, a Support where none does; None if it cannot be followed."""
    if isinstance(constraint, Intersection):
        choosing = [part for part in constraint.parts if not isinstance(part, Support)]
        return constraint.parts[0] if not choosing else _rule(choosing[0]) if len(choosing) == 1 else None  # type: ignore[return-value]
    if isinstance(constraint, Support):
        return constraint
    if isinstance(constraint, NM) and constraint.axis in ("in", 0, -2):
        return constraint
    if isinstance(constraint, Cardinality) and constraint.per in ("tree", "leaf", "out", 1, -1, (1,), (-1,)):
        return constraint
    return None


def _allowed(constraint: Constraint | None, n: int, m: int) -> Bool[np.ndarray, "n m"]:
    """What the fixed supports of the constraint let live."""
    parts = constraint.parts if isinstance(constraint, Intersection) else (constraint,)
    allowed = np.ones((n, m), bool)
    for part in parts:
        if isinstance(part, Support):
            allowed &= np.asarray(part.select(jnp.zeros((n, m))))
    return allowed


def _room(
    rule: Cardinality | NM | Support | None, forced: Bool[np.ndarray, "n m"]
) -> tuple[Int[np.ndarray, " n"], Int[np.ndarray, "g m"]]:
    """The group of each input, and how many weights of each group every output removes."""
    n, m = forced.shape
    size = rule.m if isinstance(rule, NM) else n
    must = forced.reshape(-1, size, m).sum(1)
    if isinstance(rule, NM):
        may = size - rule.n
    elif isinstance(rule, Support):
        may = 0
    elif rule.per in ("tree", "leaf"):
        may = n
    else:
        may = n - rule.kept_of(n)
    return np.arange(n) // size, np.maximum(must, may)


def _regular(gram: np.ndarray, mean: float, damping: float) -> tuple[np.ndarray, float]:
    """gram + damping * mean * I with the least damping, from the given one on by tens, that Cholesky accepts."""
    while True:
        damped = gram + damping * mean * np.eye(len(gram))
        factor, failed = scipy.linalg.lapack.dpotrf(damped, lower=True)
        if not failed and np.min(np.diagonal(factor)) ** 2 > len(gram) * np.finfo(np.float64).eps * mean:
            return damped, damping
        damping = max(10 * damping, 1e-10)


def _units(problem: Problem, ready: Layer) -> float:
    """What the objective is multiplied by in the layer that is made ready."""
    diagonal = np.diagonal(np.asarray(problem.objective.curvature.matrix, np.float64))
    live = diagonal[diagonal > 0]
    scale = float(ready.mean) / live.mean() if live.size else 1.0
    return float(ready.unit) ** 2 * 2.0 ** np.round(np.log2(scale))


def _removals(
    inverse: Float[np.ndarray, "n n"],
    w: Float[np.ndarray, "b n"],
    forced: Bool[np.ndarray, "b n"],
    groups: Int[np.ndarray, " n"],
    room: Int[np.ndarray, "b g"],
    depth: int,
) -> tuple[Int[np.ndarray, "k b"], Float[np.ndarray, "k b"]]:
    """Algorithm 1 on b outputs at once: the order of `depth` removals and their losses. Writes to w and room."""
    b, n = w.shape
    order, losses = np.empty((depth, b), int), np.empty((depth, b))
    rows, c = np.arange(b), inverse[None]
    ids, d = np.tile(np.arange(n), (b, 1)), np.tile(np.diagonal(inverse), (b, 1))
    bias = np.where(forced, -np.inf, np.where(room[:, groups] > 0, 0.0, np.inf))  # -inf: first, inf: never
    for start in range(0, depth, _BLOCK):
        steps = min(_BLOCK, depth - start)
        low = np.empty((b, steps, ids.shape[1]))  # C becomes C - low^T low
        for i in range(steps):
            p = np.argmin(w * w / d + bias, axis=1)
            column = c[rows if len(c) > 1 else 0, p]
            if i:
                column = column - np.matmul(low[rows, :i, p][:, None], low[:, :i])[:, 0]
            pivot = np.sqrt(d[rows, p])
            step = w[rows, p] / pivot
            order[start + i], losses[start + i] = ids[rows, p], 0.5 * step * step
            column = column / pivot[:, None]
            low[:, i] = column
            w -= step[:, None] * column
            d -= column * column
            np.maximum(d, _TINY, out=d)
            bias[rows, p] = np.inf
            group = groups[ids[rows, p]]
            room[rows, group] -= 1
            full = room[rows, group] == 0
            if full.any():
                bias[full[:, None] & (groups[ids] == group[:, None])] = np.inf
            w[rows, p], d[rows, p] = 0.0, 1.0
        if start + steps < depth:
            alive = np.ones(ids.shape, bool)
            alive[rows[:, None], np.argsort(ids, axis=1)[:, :0]] = True
