"""What a solver is: frozen knobs, with no problem in it."""

from __future__ import annotations

import abc
import math
from dataclasses import dataclass, field, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float

from pruneopt import _tree
from pruneopt.bounds.base import Evidence
from pruneopt.constraints import parts
from pruneopt.objectives.base import QuadraticObjective
from pruneopt.objectives.prepared import Layer, layer
from pruneopt.objectives.reconstruction import Reconstruction
from pruneopt.problem import Problem

Tree = Any


@dataclass(frozen=True, eq=False)
class Start:
    """Where a solver starts: a value and a feasible support."""

    value: Tree
    support: Tree


@dataclass(frozen=True, eq=False)
class Outcome:
    """What a solver found: value and support, whether it stopped at a limit, what proves it, what it has to say."""

    value: Tree
    support: Tree
    hit_limit: bool = False
    evidence: Evidence | None = None
    stats: dict[str, Any] = field(default_factory=dict)


BASELINES = {
    "init": "a feasible start",
    "mask": "the trained weights on the support of a feasible start",
    "refit": "the best weights on the support of the result, where `Polish` knows them",
    "zero": "all weights zero, as any support allows",
}
"""What a solver may promise never to be worse than."""


class Solver(abc.ABC):
    """An algorithm. Subclasses are final frozen dataclasses whose fields define it; `solve` runs it."""

    @property
    def projects(self) -> bool:
        """Whether it obeys constraints on values, by their `project`."""
        return False

    @property
    def never_worse_than(self) -> frozenset[str]:
        """Of which of `BASELINES` its result is never worse, in float64 on the problem as stated."""
        return frozenset()

    @abc.abstractmethod
    def refuses(self, problem: Problem) -> str | None:
        """Why this solver cannot solve `problem`, with the remedy; None if it can."""

    @abc.abstractmethod
    def run(self, problem: Problem, init: Start | None, key: jax.Array) -> Outcome:
        """Solve. Called by `solve` alone, for a problem that is not refused."""


@dataclass(frozen=True)
class Then(Solver):
    """Run `first`, then `second` from its result."""

    first: Solver
    second: Solver

    def refuses(self, problem: Problem) -> str | None:
        """What either refuses."""
        return self.first.refuses(problem) or self.second.refuses(problem)

    @property
    def never_worse_than(self) -> frozenset[str]:
        """How the second ends; and what the first promises of a start, where the second keeps that."""
        start = frozenset({"init", "mask"})
        kept = self.first.never_worse_than & start if "init" in self.second.never_worse_than else frozenset()
        return self.second.never_worse_than - start | kept

    def run(self, problem: Problem, init: Start | None, key: jax.Array) -> Outcome:
        """Both in turn, the promises of each kept; the statistics of both."""
        early, late = jax.random.split(key)
        a = run(self.first, problem, init, early)
        b = run(self.second, problem, Start(a.value, a.support), late)
        return Outcome(b.value, b.support, a.hit_limit or b.hit_limit, b.evidence, {**a.stats, **b.stats})


def run(solver: Solver, problem: Problem, init: Start | None, key: jax.Array) -> Outcome:
    """What the solver finds; the start itself, or W0 on its support, where that is better and the solver promises so.

    A result that is not finite stays what it is: a failure.
    """
    found = solver.run(problem, init, key)
    promised = solver.never_worse_than & {"init", "mask"}
    if init is None or not promised or problem.violation(init.support) or problem.value_violation(init.value):
        return found
    for name in sorted(promised):
        value = _tree.masked(init.value if name == "init" else problem.objective.center, init.support)
        value = jax.tree.map(lambda x, like: x.astype(like.dtype), value, problem.objective.center)
        found = better(problem, found, replace(found, value=value, support=init.support), instead=name)
    return found


def better(problem: Problem, found: Outcome, other: Outcome, instead: str) -> Outcome:
    """The one of two feasible outcomes with the lower objective, in float64 on the problem as stated.

    `found` where they tie or it is not finite; stats["instead"] says by what it was replaced.
    """
    if not problem.value(other.value) < problem.value(found.value):
        return found
    return replace(other, stats={**found.stats, "instead": instead})


def check_whole(solver: Solver, least: int, *fields: str) -> None:
    """Raise ValueError unless these fields of a solver are whole numbers >= least."""
    for name in fields:
        value = getattr(solver, name)
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            usual = getattr(type(solver), name)  # the field's default
            raise ValueError(f"{name}={value!r} is not a whole number >= {least}; pass one, such as {usual}")


def check_not_negative(solver: Solver, *fields: str) -> None:
    """Raise ValueError unless these fields of a solver are finite numbers >= 0."""
    for name in fields:
        value = getattr(solver, name)
        if not (isinstance(value, int | float | np.floating) and 0 <= value < math.inf):
            usual = getattr(type(solver), name)
            raise ValueError(f"{name}={value!r} is not a finite number >= 0; pass one, such as {usual}")


def ignored_values(problem: Problem, solver: Solver) -> str | None:
    """The refusal of a solver that looks at supports alone, for a constraint on values."""
    if problem.subject_to is not None and problem.subject_to.bounds_values and not solver.projects:
        name = type(solver).__name__
        return f"{name} knows constraints on supports alone, not {problem.subject_to!r}; use ProximalGradient"
    return None


def without_penalty(problem: Problem, solver: Solver) -> str | None:
    """The refusal of a solver that knows no penalties."""
    if problem.penalty is not None:
        return f"{type(solver).__name__} handles no penalty; drop penalty={problem.penalty!r}"
    return None


def layer_only(problem: Problem, solver: Solver) -> str | None:
    """The refusal of a solver for one layer's reconstruction under a constraint."""
    name = type(solver).__name__
    if not isinstance(problem.objective, Reconstruction):
        return f"{name} needs the objective Reconstruction, not {type(problem.objective).__name__}"
    if problem.subject_to is None:
        return f"{name} needs a constraint; pass subject_to="
    if parts.of(problem.subject_to).by_path:
        return (
            f"{name} solves one layer, and ByPath is for many; pass the layer's own constraint, or use plans.layerwise"
        )
    return without_penalty(problem, solver)


def no_exchange(problem: Problem, solver: Solver) -> str | None:
    """The refusal of a solver that exchanges weights inside outputs, for a constraint that this can break."""
    if parts.exchanges(problem.subject_to, problem.objective.center.shape) is not None:
        return None
    return parts.no_exchange(type(solver).__name__, problem.subject_to)


def network_only(problem: Problem, solver: Solver, twin: str) -> str | None:
    """The refusal of a solver for a quadratic model of a whole network under a constraint; `twin` solves one layer."""
    name, f = type(solver).__name__, problem.objective
    if isinstance(f, Reconstruction):
        return f"{name} is for models of a whole network; {twin} solves one layer's Reconstruction"
    if not isinstance(f, QuadraticObjective) or f.curvature is None:
        return f"{name} needs a Quadratic with a curvature, not {f!r:.40}; pass one, or use Score"
    if problem.subject_to is None:
        return f"{name} needs a constraint; pass subject_to="
    return without_penalty(problem, solver)


def indefinite(solver: Solver, f: QuadraticObjective, bend: float) -> ValueError:
    """What to raise where a direction d has <d, (H + lambda I) d> = bend <d, d> < 0."""
    return ValueError(
        f"{type(solver).__name__} met a direction d with <d, (H + lambda I) d> = {bend:.3g} <d, d>: the "
        f"{type(f.curvature).__name__} is indefinite there and the model falls without end; pass an "
        f"empirical_fisher, or the GaussNewton of a loss convex in the outputs: never indefinite; or more than "
        f"Quadratic(damping={f.damping:.3g})"
    )


def check_bends(solver: Solver, f: QuadraticObjective, damped: Float[np.ndarray, " p"], w: Tree | None = None) -> None:
    """Raise ValueError where a Hessian bends down: on `damped`, the diagonal of H + lambda I, or along w - w0."""
    assert f.curvature is not None
    if f.is_convex:
        return
    least, beyond = float(np.min(damped)), 1e-9 * float(np.max(np.abs(damped)))
    if w is not None:
        size = sum(
            float(np.sum((np.asarray(x, np.float64) - np.asarray(c, np.float64)) ** 2))
            for x, c in zip(*map(jax.tree.leaves, (w, f.center)), strict=True)
        )
        least = f.curvature.form(w, f.center, f.exact_ridge()) / size if size else 0.0
    if least < -beyond:
        raise indefinite(solver, f, least)


def prepared(problem: Problem) -> Layer:
    """The layer of a problem that `layer_only` does not refuse, made ready."""
    f = problem.objective
    assert isinstance(f, Reconstruction)
    return layer(f, problem.subject_to)


def outcome(
    problem: Problem,
    ready: Layer,
    value: Float[Array | np.ndarray, "n m"],
    support: Bool[Array | np.ndarray, "n m"],
    **facts: Any,
) -> Outcome:
    """What a layer's solver returns for `value` in the units of `ready`: in the weights' own units and dtype."""
    return Outcome(_restored(ready, value, support, problem.objective.center), jnp.asarray(support), **facts)


@jax.jit
def _restored(ready: Layer, value: Array, support: Array, like: Array) -> Array:
    kept = jnp.where(support, value, jnp.zeros((), value.dtype)) / ready.unit
    return kept.astype(like.dtype)
