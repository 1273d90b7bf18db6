"""Score: rank weights one by one, keep the best, change no value."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from pruneopt import _tree
from pruneopt.bounds.separable import Separable
from pruneopt.constraints import parts
from pruneopt.objectives.base import QuadraticObjective
from pruneopt.objectives.reconstruction import Reconstruction
from pruneopt.objectives.scores import Scores
from pruneopt.objectives.unit_scores import UnitScores
from pruneopt.problem import Problem
from pruneopt.solvers.base import Outcome, Solver, Start, without_penalty

Tree = Any


@dataclass(frozen=True)
class Score(Solver):
    """Keep w0 on the support that the constraint selects for the scores; zero elsewhere.

    rule: "saliency", s_i = -g_i w_i + 1/2 (H_ii + lambda) w_i^2, the predicted rise of the objective when weight i
        alone goes (LeCun, Denker, Solla 1990; magnitude and Wanda are its cases H = I and H = the Gram);
        "absolute", |s_i| (first-order Taylor, Molchanov et al. 2019; SNIP, Lee et al. 2019);
        "relative", for a Reconstruction (|w_ij| / sum_i |w_ij| + |w_ij| / sum_j |w_ij|) sqrt(||x_i||_2), input i and
        output j, x_i the input's samples: how much a weight is of its output and of its input (RIA, Zhang et al. 2024,
        with the exponent 1/2);
        "random", uniform scores.

    For `UnitScores` it keeps the best units of a Coupled set, by their own scores.

    Cost: one selection. Optimal, and proven so, for the rule "saliency" where the objective is separable (no
    gradient, diagonal H >= 0) and the constraint's selection exact. `init` is not used.
    """

    rule: Literal["saliency", "absolute", "relative", "random"] = "saliency"

    def __post_init__(self) -> None:
        if self.rule not in ("saliency", "absolute", "relative", "random"):
            raise ValueError(f"rule={self.rule!r} is unknown; pass 'saliency', 'absolute', 'relative' or 'random'")

    def refuses(self, problem: Problem) -> str | None:
        """A penalty, no constraint, or (random aside) an objective without a quadratic model."""
        if problem.subject_to is None:
            return "Score needs a constraint; pass subject_to="
        if isinstance(problem.objective, UnitScores):
            return _no_units(problem, self.rule) or without_penalty(problem, self)
        if self.rule == "relative" and not isinstance(problem.objective, Reconstruction):
            return (
                f"Score(rule='relative') needs the objective Reconstruction, not {type(problem.objective).__name__}; "
                "pass its inputs' Gram, Reconstruction(W, Gram.checked(X^T X / N))"
            )
        if self.rule != "random" and not isinstance(problem.objective, QuadraticObjective | Scores):
            return (
                f"Score(rule={self.rule!r}) needs a quadratic objective, not {type(problem.objective).__name__}; "
                "model the loss with Quadratic(center, curvature, gradient), or pass Scores"
            )
        if self.rule != "random" and _has_no_terms(problem.objective):
            return f"Score(rule={self.rule!r}) has nothing to rank by: the objective has no gradient and no curvature"
        return without_penalty(problem, self)

    def run(self, problem: Problem, init: Start | None, key: jax.Array) -> Outcome:
        """Score, select, mask."""
        f, constraint = problem.objective, problem.subject_to
        assert constraint is not None
        if isinstance(f, UnitScores):
            found = parts.of(constraint)
            support = found.with_units(found.units(f.ranking(), f.center), f.center)
            proof = Separable() if f.is_separable else None
            return Outcome(_tree.masked(f.center, support), support, evidence=proof)
        proof = None
        if self.rule == "random":
            scores = _random(f.center, key)
        elif self.rule == "relative":
            assert isinstance(f, Reconstruction)
            scores = _relative(f.center, jnp.diagonal(f.curvature.matrix))
        else:
            assert isinstance(f, QuadraticObjective | Scores)
            scores = f.ranking() if self.rule == "saliency" else _absolute(f.ranking())
            proof = Separable() if self.rule == "saliency" and f.is_separable and constraint.exact else None
        path = _tree.first_nonfinite(scores)
        if path is not None:
            raise ValueError(
                f"the score of {_tree.called(path)} is not finite: the curvature or gradient overflows; rescale it"
            )
        support = constraint.select(scores)
        del scores
        return Outcome(_tree.masked(f.center, support), support, evidence=proof)


@jax.jit
def _random(like: Tree, key: jax.Array) -> Tree:
    # One draw for the whole tree: compiling the generator for each leaf takes seconds a shape.
    leaves, structure = jax.tree.flatten(like)
    draw = jax.random.uniform(key, (sum(x.size for x in leaves),), jnp.float32)
    ends = np.cumsum([x.size for x in leaves])
    return jax.tree.unflatten(
        structure, [draw[e - x.size : e].reshape(x.shape) for x, e in zip(leaves, ends, strict=True)]
    )


@jax.jit
def _relative(center: Float[Array, "n m"], squares: Float[Array, " n"]) -> Float[Array, "n m"]:
    """RIA times N^-1/4, from the mean squares of the inputs."""
    size = jnp.abs(center.astype(_tree.wide(center.dtype)))
    norm = jnp.sqrt(jnp.sqrt(jnp.maximum(squares.astype(size.dtype), 0)))
    return (_shares(size, 0) + _shares(size, 1)) * norm[:, None]


def _shares(size: Float[Array, "n m"], axis: int) -> Float[Array, "n m"]:
    """Each entry's part of the sum along `axis`, 0 of 0. Scaled by the largest first: the sum may overflow."""
    largest = jnp.max(size, axis=axis, keepdims=True)
    scaled = size / jnp.where(largest > 0, largest, jnp.ones_like(largest))
    total = jnp.sum(scaled, axis=axis, keepdims=True)
    return scaled / jnp.where(total > 0, total, jnp.ones_like(total))


@jax.jit
def _absolute(scores: Tree) -> Tree:
    return jax.tree.map(jnp.abs, scores)


def _no_units(problem: Problem, rule: str) -> str | None:
    """Why units cannot be ranked."""
    f = problem.objective
    if rule != "saliency":
        return f"Score(rule={rule!r}) ranks weights; for UnitScores pass Score()"
    if isinstance(f, UnitScores) and parts.of(problem.subject_to).groups != f.groups:
        return (
            f"UnitScores ranks whole units, of which subject_to={problem.subject_to!r} is no set; pass the Coupled set "
            "of their groups, alone or within a Support"
        )
    return None


def _has_no_terms(f: Any) -> bool:
    return isinstance(f, QuadraticObjective) and f.curvature is None and f.gradient is None
