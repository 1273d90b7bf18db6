"""Conjugate gradients on a fixed support: the refit at the cost of a few products."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import jax
from jaxtyping import Array, Bool, Float

from pruneopt import _linalg
from pruneopt.constraints import parts
from pruneopt.objectives.prepared import Layer
from pruneopt.problem import Problem
from pruneopt.solvers.base import Outcome, Solver, Start, check_whole, layer_only, outcome, prepared


@dataclass(frozen=True)
class ConjugateGradients(Solver):
    """Lower 1/2 tr((W - W0)^T (H + lambda I) (W - W0)) over W on a support, by `steps` of conjugate gradients.

    All outputs at once, each a system of its own, with diag(H) as preconditioner, from `init`'s weights. The support is
    that of `init`, or the mask of a `Support` constraint. Never worse than where it starts but for rounding; `Polish`
    is the exact minimum, at n^3 / 3 for each distinct support.

    Cost: steps + 1 products of n^2 m; memory: n^2 + 6 n m numbers.
    Source: Meng et al. 2024 (ALPS), algorithm 2; Hestenes and Stiefel 1952.
    """

    steps: int = 10

    def __post_init__(self) -> None:
        check_whole(self, 1, "steps")

    @property
    def never_worse_than(self) -> frozenset[str]:
        """A feasible init."""
        return frozenset({"init"})

    def refuses(self, problem: Problem) -> str | None:
        """Any objective but Reconstruction, a penalty, or no constraint."""
        return layer_only(problem, self)

    def run(self, problem: Problem, init: Start | None, key: jax.Array) -> Outcome:
        """Refit."""
        ready = prepared(problem)
        found = parts.of(problem.subject_to)
        if init is None and not found.fixed:
            raise ValueError(
                "init is None, but ConjugateGradients works on a given support; pass init= or subject_to=Support(mask)"
            )
        support = problem.full_support() if init is None else init.support
        if found.fixed:
            support = support & found.allowed(support)
        start = ready.center if init is None else ready.started(init.value)
        return outcome(problem, ready, _refitted(ready, start, support, self.steps), support)


@partial(jax.jit, static_argnums=3)
def _refitted(ready: Layer, start: Float[Array, "n m"], support: Bool[Array, "n m"], steps: int) -> Float[Array, "n m"]:
    return _linalg.masked_cg(ready.gram, ready.center, start, ready.counted(support), steps)[0]
