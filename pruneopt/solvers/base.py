"""What a solver is: frozen knobs, with no problem in it."""

from __future__ import annotations

import abc
import math
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Bool, Float

from pruneopt import _linalg, _tree
from pruneopt.bounds.base import Evidence
from pruneopt.constraints.base import Constraint
from pruneopt.constraints.by_path import ByPath
from pruneopt.constraints.intersection import Intersection
from pruneopt.constraints.support import Support
from pruneopt.objectives.base import QuadraticObjective
from pruneopt.objectives.reconstruction import Reconstruction
from pruneopt.problem import Problem

Tree = Any


@dataclass(frozen=True, eq=False)
class Start:
    """Where a solver starts: a value and a support."""

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


class Solver(abc.ABC):
    """An algorithm. Subclasses are final frozen dataclasses whose fields define it; `solve` runs it."""

    @property
    def projects(self) -> bool:
        """Whether it obeys constraints on values, by their `project`."""
        return False

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

    def run(self, problem: Problem, init: Start | None, key: jax.Array) -> Outcome:
        """Both in turn; the statistics of both."""
        early, late = jax.random.split(key)
        a = self.first.run(problem, init, early)
        b = self.second.run(problem, Start(a.value, a.support), late)
        return Outcome(b.value, b.support, a.hit_limit or b.hit_limit, b.evidence, {**a.stats, **b.stats})


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
    if isinstance(problem.subject_to, ByPath):
        return (
            f"{name} solves one layer, and ByPath is for many; pass the layer's own constraint, or use plans.layerwise"
        )
    return without_penalty(problem, solver)


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
        least = f.curvature.form(w, f.center, float(f.ridge())) / size if size else 0.0
    if least < -beyond:
        raise indefinite(solver, f, least)


def allowed(constraint: Constraint, center: Tree) -> Bool[np.ndarray, " p"]:
    """Which weights, the leaves laid end to end, every `Support` in a constraint lets live."""
    parts = constraint.parts if isinstance(constraint, Intersection) else (constraint,)
    found = np.ones(sum(x.size for x in jax.tree.leaves(center)), bool)
    for part in parts:
        if isinstance(part, Support):
            mask = part.select(jax.tree.map(lambda x: jnp.zeros(x.shape), center))
            found &= np.concatenate([np.asarray(m, bool).reshape(-1) for m in jax.tree.leaves(mask)])
    return found


class Layer(NamedTuple):
    """A reconstruction problem made ready for a solver, in float32, or float64 for float64 weights.

    gram: H + ridge I times a power of two that brings the mean of its live diagonal to [1, 2); the rows and
        columns of dead inputs (H_jj = 0) are those of the identity, so that H is no more singular for them.
    center: W0 times a power of two that brings its largest entry to [1, 2); zero in dead rows. unit: that power.
    dead: inputs without variance; their weights go, and cost no budget. If all are dead the Gram says nothing: it is
        then the identity and nothing is dead, which makes the problem magnitude pruning. blank: whether that is so.
    mean: of H's live diagonal without the ridge, in the same units; what relative damping refers to.
    """

    gram: Float[Array, "n n"]
    center: Float[Array, "n m"]
    dead: Bool[Array, " n"]
    blank: Bool[Array, ""]
    mean: Float[Array, ""]
    unit: Float[Array, ""]

    def scores(self, scores: Float[Array, "n m"]) -> Float[Array, "n m"]:
        """`scores` with the weights of dead inputs cut."""
        return jnp.where(self.dead[:, None], jnp.asarray(-jnp.inf, scores.dtype), scores)

    def damped(self, damping: float | Array) -> Float[Array, "n n"]:
        """gram + damping * mean * I."""
        return self.gram + (jnp.asarray(damping, self.mean.dtype) * self.mean) * jnp.eye(
            self.gram.shape[0], dtype=self.gram.dtype
        )

    def started(self, value: Float[Array, "n m"]) -> Float[Array, "n m"]:
        """Weights from outside in the units of `center`."""
        scaled = jnp.asarray(value).astype(self.center.dtype) * self.unit
        return jnp.where(self.dead[:, None], jnp.zeros((), scaled.dtype), scaled)

    def outcome(
        self, problem: Problem, value: Float[Array, "n m"], support: Bool[Array, "n m"], **facts: Any
    ) -> Outcome:
        """What a solver returns: in the weights' own units and dtype, with what preparation did among `facts`."""
        like = problem.objective.center
        return Outcome(*_restored(self, value, support, like), **facts)


def layer(problem: Problem) -> Layer:
    """The problem's layer, made ready. One compiled pass over H and W0."""
    f = problem.objective
    assert isinstance(f, Reconstruction)
    return _layer(f.curvature.matrix, f.center, f.ridge())


@jax.jit
def _layer(gram: Float[Array, "n n"], center: Float[Array, "n m"], ridge: Float[Array, ""]) -> Layer:
    dtype = jnp.promote_types(_tree.wide(center.dtype), _tree.wide(gram.dtype))
    gram, center, ridge = gram.astype(dtype), center.astype(dtype), ridge.astype(dtype)
    n = gram.shape[0]
    eye = jnp.eye(n, dtype=bool)
    diagonal = jnp.diagonal(gram)
    dead = ~(diagonal > 0)
    blank = jnp.all(dead)
    dead &= ~blank
    mean = jnp.sum(jnp.where(dead, 0, diagonal)) / jnp.sum(~dead).astype(dtype)
    mean = jnp.where(blank, jnp.ones((), dtype), mean)
    unit = _power(mean)
    ready = jnp.where(dead[:, None] | dead[None, :] | blank, jnp.zeros((), dtype), gram * unit)
    extra = jnp.where(blank | dead, jnp.ones((), dtype), ridge * unit)
    scale = _power(jnp.max(jnp.abs(center)))
    return Layer(
        ready + jnp.where(eye, extra[:, None], jnp.zeros((), dtype)),
        jnp.where(dead[:, None], jnp.zeros((), dtype), center * scale),
        dead,
        blank,
        mean * unit,
        scale,
    )


def _power(x: Float[Array, ""]) -> Float[Array, ""]:
    """The power of two p with p x in [1, 2); 1 for x = 0."""
    _, exponent = jnp.frexp(x)
    return jnp.where(x > 0, jnp.ldexp(jnp.ones_like(x), 1 - exponent), jnp.ones_like(x))


@jax.jit
def _restored(layer: Layer, value: Array, support: Array, like: Array) -> tuple[Array, Array]:
    kept = jnp.where(support, value, jnp.zeros((), value.dtype)) / layer.unit
    return kept.astype(like.dtype), support


@jax.jit
def regular_factor(ready: Layer, damping: float) -> tuple[Float[Array, "n n"], Float[Array, ""]]:
    """U, upper triangular, with (gram + damping * mean * I)^-1 = U^T U, and the damping that this took.

    `damping` times ten until the matrix has a Cholesky factor. The inputs from j on have the inverse U_j:^T U_j: of
    their own damped Gram in the same U.
    """
    eps = jnp.finfo(ready.gram.dtype).eps

    def attempt(state):
        _, damping, _ = state
        gram = ready.damped(damping)
        factor = _linalg.inverse_factor(gram)
        regular = jnp.all(1 / jnp.diagonal(factor) ** 2 > 10 * eps * jnp.diagonal(gram))  # False for a NaN
        return regular, jnp.where(regular, damping, jnp.maximum(10 * damping, 10 * eps)), factor

    start = (jnp.asarray(False), jnp.asarray(damping, ready.gram.dtype), ready.gram)
    _, damping_used, factor = lax.while_loop(lambda state: ~state[0], attempt, start)
    return factor, damping_used
