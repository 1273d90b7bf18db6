"""What a solver is: frozen knobs, with no problem in it."""

from __future__ import annotations

import abc
from dataclasses import dataclass, field
from typing import Any

import jax

from pruneopt.problem import Problem
from pruneopt.solution import Evidence

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
    evidence: Evidence = None
    stats: dict[str, Any] = field(default_factory=dict)


class Solver(abc.ABC):
    """An algorithm. Subclasses are final frozen dataclasses whose fields define it; `solve` runs it."""

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


def without_penalty(problem: Problem, solver: Solver) -> str | None:
    """The refusal of a solver that knows no penalties."""
    if problem.penalty is not None:
        return f"{type(solver).__name__} handles no penalty; drop penalty={problem.penalty!r}"
    return None
