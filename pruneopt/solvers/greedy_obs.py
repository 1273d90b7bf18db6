"""Greedy OBS: remove one weight at a time, the cheapest first, and let the others make up for it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Bool, Float, Int

from pruneopt.constraints import parts
from pruneopt.constraints.base import Constraint
from pruneopt.objectives.prepared import Layer
from pruneopt.problem import Problem
from pruneopt.solvers.base import Outcome, Solver, Start, check_not_negative, check_whole, layer_only, outcome, prepared
from pruneopt.solvers.factors import inverted
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
        check_whole(self, 1, "memory")
        check_not_negative(self, "damping")

    def refuses(self, problem: Problem) -> str | None:
        """Other objectives than Reconstruction, a penalty, and constraints that couple outputs other than by a sum."""
        reason = layer_only(problem, self)
        if reason is None and _group(problem.subject_to, len(problem.objective.center)) is None:
            return (
                f"GreedyOBS cannot prune under {problem.subject_to!r}; pass Cardinality per 'tree', 'leaf' or 'out', "
                "NM along the inputs, a Support, or an Intersection of Supports with one of them"
            )
        return reason

    def run(self, problem: Problem, init: Start | None, key: jax.Array) -> Outcome:
        """Trace, select, compensate."""
        ready = prepared(problem)
        trace, gram, damping = self._traced(problem, ready)
        assert problem.subject_to is not None
        with jax.enable_x64(True):
            support = np.asarray(problem.subject_to.select(ready.scores(jnp.asarray(trace.ranks()))))
        value, _ = refit(gram, np.asarray(ready.center, np.float64), support, 0.0)
        value, kept = jnp.asarray(value, ready.center.dtype), jnp.asarray(support)
        return outcome(problem, ready, value, kept, stats={"damping": damping})

    def trace(self, problem: Problem) -> Trace:
        """The removals of all outputs, as far as the constraint may need them: all, for a budget over the layer."""
        reason = self.refuses(problem)
        if reason:
            raise ValueError(reason)
        return self._traced(problem, prepared(problem))[0]

    def _traced(self, problem: Problem, ready: Layer) -> tuple[Trace, np.ndarray, float]:
        center, gram = np.asarray(ready.center, np.float64), np.asarray(ready.gram, np.float64)
        inverse, damped, damping = inverted(gram, float(ready.mean), self.damping)
        allowed = parts.of(problem.subject_to).allowed(problem.objective.center)
        free = ~np.asarray(ready.dead)[:, None] & np.asarray(allowed)
        found = _group(problem.subject_to, len(gram))
        assert found is not None
        group, least = found
        chunk = max(1, self.memory // (16 * gram.size))
        traces = [
            _removals(inverse, center[:, i : i + chunk], free[:, i : i + chunk], group, least)
            for i in range(0, center.shape[1], chunk)
        ]
        order, losses = (np.concatenate([t[part] for t in traces], axis=1) for part in (0, 1))
        return Trace(order, losses, len(gram)), damped, damping


def _removals(
    inverse: Float[np.ndarray, "n n"],
    center: Float[np.ndarray, "n m"],
    free: Bool[np.ndarray, "n m"],
    group: int,
    least: int,
) -> tuple[Int[np.ndarray, "k m"], Float[np.ndarray, "k m"]]:
    """The trace of some outputs: what is not `free` first, then the cheapest, while its group has more than `least`.

    C after k removals is inverse - V^T V, with the scaled columns of C at the removed inputs as the rows of V: only
    its diagonal and one column are ever formed.
    """
    n, m = center.shape
    w, alive, each = center.T.copy(), np.ones((m, n), bool), np.arange(m)
    diagonal = np.broadcast_to(np.diagonal(inverse), (m, n)).copy()
    rows = np.zeros((m, n, n))
    order, losses = np.full((n, m), -1), np.full((n, m), np.inf)
    for k in range(n):
        counts = np.repeat(alive.reshape(m, -1, group).sum(2), group, axis=1)
        cost = np.where(alive & (counts > least), w**2 / (2 * diagonal), np.inf)
        cost[alive & ~free.T] = -1.0
        p = np.argmin(cost, axis=1)
        going = np.isfinite(cost[each, p])
        if not going.any():
            break
        column = inverse[p] - np.matmul(rows[each, :k, p][:, None, :], rows[:, :k])[:, 0] if k else inverse[p].copy()
        pivot = np.maximum(column[each, p], np.finfo(float).tiny)
        column[~going] = 0.0
        step = column * (w[each, p] / pivot)[:, None]
        order[k, going] = p[going]
        losses[k, going] = (w[each, p] ** 2 / (2 * pivot))[going]
        rows[:, k] = column / np.sqrt(pivot)[:, None]
        w, diagonal = w - step, diagonal - rows[:, k] ** 2
        alive[each[going], p[going]] = False
        w[~alive] = 0.0
        diagonal = np.maximum(diagonal, np.finfo(float).tiny)
    return order[: int((order >= 0).sum(0).max(initial=0))], losses[: int((order >= 0).sum(0).max(initial=0))]


def _group(constraint: Constraint | None, inputs: int) -> tuple[int, int] | None:
    """(inputs of a group, how many of them an output keeps at least); None for what cannot be followed."""
    found = parts.of(constraint, ndim=2)
    one = found.one
    if found.fixed or (one is not None and one.free and one.box is not None and one.box[0] == -1):
        return inputs, 0
    if one is not None and one.free and one.group is not None and one.box is not None and one.box[1] == 1:
        return one.group[1], one.group[0]
    return None
