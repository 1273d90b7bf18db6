"""The Combinatorial Brain Surgeon: choose all that goes together, by what the weights cost jointly, with swaps."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Bool, Float, Int

from pruneopt import _tree
from pruneopt.objectives.base import QuadraticObjective
from pruneopt.problem import Problem
from pruneopt.solvers.base import Outcome, Solver, Start, check_bends, check_not_negative, check_whole, network_only
from pruneopt.solvers.obs import Quota, quota_of

Tree = Any
Flat = Float[np.ndarray, " p"]
# Parts of a partition, with sqrt(p) ours: on MLPNet (300 examples, 80 and 95 %) half of sqrt(p) lowers the objective of
# what is drawn by 2 to 3 % and moves the result's by -0.3 and 0.4 %; 1,000 is met from a million weights on.
_PARTS = 1000


@dataclass(frozen=True)
class CBS(Solver):
    """minimise 1/2 <d, (H + lambda I) d> + <g, d> over what goes, P: d = -w0 on P and 0 elsewhere (CBS-S).

    With the slope s = g + (H + lambda I) d, keeping i of P again changes this by a_i, cutting j by b_j, and both by

        a_i + b_j - w_i w_j H_ij,    a_i = w_i s_i + w_i^2 h_ii / 2,    b_j = -w_j s_j + w_j^2 h_jj / 2.

    Start: the support of `init`, else the best of `draws` supports: the largest |w0|, then of randomised magnitude,
    which ranks each weight among those of its part of a random partition into sqrt(p) parts, at most 1,000. Each sweep
    takes the `candidates` of least a and of least b and makes the best swap of a pair among them, exactly followed,
    until none lowers the objective by more than `tolerance` of it, a weight once in a sweep; ends when a sweep makes
    none.

    What is kept keeps its value: `Then(CBS(), Polish())` adds the joint update of all of it (CBS-U).

    Any curvature with products and blocks: one product a draw and a sweep, a block of 2 `candidates` a sweep. The
    constraint: Cardinality over the tree or per leaf, a Support, or both. Raises ValueError where a Hessian has
    negative curvature on its diagonal or along the result.
    stats: swaps, sweeps. Source: Yu et al. 2022, equation 7 and algorithms 1 and 2, with all pairs of the candidates
    where they try a window of them, and draws judged by the model where they measure the loss.
    """

    draws: int = 10
    sweeps: int = 100
    candidates: int = 256
    tolerance: float = 1e-5

    def __post_init__(self) -> None:
        check_whole(self, 1, "draws", "candidates")
        check_whole(self, 0, "sweeps")
        check_not_negative(self, "tolerance")

    @property
    def never_worse_than(self) -> frozenset[str]:
        """W0 on the support of a feasible init."""
        return frozenset({"mask"})

    def refuses(self, problem: Problem) -> str | None:
        """An objective without a curvature of the whole network that has blocks, a penalty, other constraints."""
        reason = network_only(problem, self, twin="Swap")
        if reason:
            return reason
        f: Any = problem.objective
        if not hasattr(f.curvature, "block"):
            return (
                f"CBS needs a curvature with blocks, not {type(f.curvature).__name__}; pass empirical_fisher(...), or "
                "use Score for a diagonal"
            )
        assert problem.subject_to is not None
        if quota_of(problem.subject_to, f.center) is None:
            return (
                f"CBS cannot swap under {problem.subject_to!r}; pass Cardinality per 'tree' or 'leaf', a Support, or "
                "an Intersection of Supports with one of them"
            )
        return None

    def run(self, problem: Problem, init: Start | None, key: jax.Array) -> Outcome:
        """Draw, then swap."""
        f, constraint = problem.objective, problem.subject_to
        assert isinstance(f, QuadraticObjective)
        assert constraint is not None
        model, quota = _Model.of(f), quota_of(constraint, f.center)
        assert quota is not None
        check_bends(self, f, model.diagonal)
        drawn = self._drawn(model, constraint, key)
        if init is not None:
            drawn = iter([model.layout.host(init.support) > 0])
        point = min((model.at(support) for support in drawn), key=lambda point: point.value)
        swaps, sweeps, settled = 0, 0, False
        while not settled and sweeps < self.sweeps:
            sweeps += 1
            support, made = self._swept(model, quota, point)
            trial = model.at(support)
            settled = made == 0 or trial.value >= point.value
            if not settled:
                point, swaps = trial, swaps + made
        support = jax.tree.map(jnp.asarray, model.layout.tree(point.support))
        value, stats = _tree.masked(f.center, support), {"swaps": swaps, "sweeps": sweeps}
        check_bends(self, f, model.diagonal, value)
        return Outcome(value, support, hit_limit=bool(self.sweeps and not settled), stats=stats)

    def _drawn(self, model: _Model, constraint: Any, key: jax.Array) -> Iterator[Bool[np.ndarray, " p"]]:
        """The supports to start from: of magnitude, then of randomised magnitude."""
        size, p = np.abs(model.center), len(model.center)
        rng = np.random.default_rng(np.asarray(jax.random.key_data(key)))
        score = size / max(float(np.max(size)), np.finfo(float).tiny)
        parts = max(1, min(int(p**0.5), _PARTS))
        for _ in range(self.draws):
            yield model.layout.host(constraint.select(model.tree(score))) > 0
            part = rng.permutation(np.arange(p) % parts)
            order = np.lexsort((size, part))  # by part, in it by size
            rank = np.empty(p)
            rank[order] = np.arange(p) - np.searchsorted(part[order], part[order])
            score = (rank + 0.5) / np.bincount(part)[part]

    def _swept(self, model: _Model, quota: Quota, point: _Point) -> tuple[Bool[np.ndarray, " p"], int]:
        """The support after the best swaps among the candidates, and their number."""
        w, s = model.center, point.slope
        back = np.where(~point.support & quota.allowed, w * s + 0.5 * w**2 * model.diagonal, np.inf)
        cut = np.where(point.support, -w * s + 0.5 * w**2 * model.diagonal, np.inf)
        entering, leaving = _least(back, self.candidates), _least(cut, self.candidates)
        support, made = point.support.copy(), 0
        if not (entering.size and leaving.size):
            return support, made
        at = np.concatenate([entering, leaving])
        square = w[at, None] * model.block(at) * w[at]  # w_k H_kl w_l
        first, a, b = len(entering), back[entering], cut[leaving]
        leaf_in, leaf_out = quota.leaf[entering], quota.leaf[leaving]
        kept = np.bincount(quota.leaf[support], minlength=len(quota.least))
        while True:
            free = (leaf_in[:, None] == leaf_out) | (kept > quota.least)[leaf_out]
            change = np.where(free, a[:, None] + b - square[:first, first:], np.inf)
            i, j = np.unravel_index(np.argmin(change), change.shape)
            if not change[i, j] < -self.tolerance * abs(point.value):
                return support, made
            moved = square[:, i] - square[:, first + j]  # w_k times the change of s_k
            a, b = a + moved[:first], b - moved[first:]
            a[i] = b[j] = np.inf
            support[entering[i]], support[leaving[j]] = True, False
            kept[leaf_in[i]] += 1
            kept[leaf_out[j]] -= 1
            made += 1


class _Point(NamedTuple):
    """A support, the slope at w0 on it, and the objective there, its constant aside."""

    support: Bool[np.ndarray, " p"]
    slope: Flat
    value: float


class _Model(NamedTuple):
    """The objective in one vector on the host: w0, g, lambda, and diag(H) + lambda."""

    f: QuadraticObjective
    layout: _tree.Layout
    center: Flat
    gradient: Flat
    ridge: float
    diagonal: Flat

    @staticmethod
    def of(f: QuadraticObjective) -> _Model:
        """The parts of f."""
        layout, ridge = _tree.Layout.of(f.center), f.exact_ridge()
        center = layout.host(f.center)
        gradient = np.zeros_like(center) if f.gradient is None else layout.host(f.gradient)
        diagonal: Any = f.curvature.diagonal(f.center)  # type: ignore[union-attr]
        whole = jax.tree.map(lambda h, w: jnp.broadcast_to(h, w.shape), diagonal, f.center)
        return _Model(f, layout, center, gradient, ridge, layout.host(whole) + ridge)

    def tree(self, vector: Flat) -> Tree:
        """The tree of a vector, in the weights' dtypes, float32 at least."""
        return jax.tree.map(jnp.asarray, self.layout.tree(vector, _tree.wide_shapes(self.f.center)))

    def at(self, support: Bool[np.ndarray, " p"]) -> _Point:
        """The objective with what is outside `support` at zero."""
        d = np.where(support, 0.0, -self.center)
        curved = self.layout.host(self.f.curvature.mv(self.tree(d)))  # type: ignore[union-attr]
        slope = self.gradient + curved + self.ridge * d
        return _Point(support, slope, float(0.5 * d @ (self.gradient + slope)))

    def block(self, at: Int[np.ndarray, " k"]) -> Float[np.ndarray, "k k"]:
        """H on some entries."""
        return np.asarray(self.f.curvature.block(at), np.float64)  # type: ignore[union-attr]


def _least(costs: Flat, count: int) -> Int[np.ndarray, " k"]:
    """The finite least of them, in their order."""
    count = min(count, int(np.sum(np.isfinite(costs))))
    some = np.argpartition(costs, count - 1)[:count] if count else np.zeros(0, int)
    return some[np.argsort(costs[some], kind="stable")]
