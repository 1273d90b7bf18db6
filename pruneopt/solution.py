"""What comes back: a solution with its evidence, and a pruned network."""

from __future__ import annotations

import enum
from dataclasses import dataclass, field
from typing import Any

import jax

from pruneopt import _tree
from pruneopt.bounds.base import Evidence

Tree = Any


class Status(enum.Enum):
    """How good a solution is known to be; the value is the sentence that an error shows."""

    OPTIMAL = "optimal: the objective equals a proven lower bound to 1e-6 of its size"
    FEASIBLE = "feasible: every constraint holds; optimality is not proven"
    LIMIT = "feasible, but the solver stopped at its iteration limit"
    NONFINITE = "nonfinite: the solver produced a NaN or an infinity; damp the curvature or shrink the step"
    INFEASIBLE = "infeasible: the solver's result breaks the constraint"

    @property
    def is_usable(self) -> bool:
        """Whether the value may be used: finite and feasible."""
        return self not in (Status.NONFINITE, Status.INFEASIBLE)


class _Supported:
    """What a support says of itself."""

    support: Tree

    @property
    def kept(self) -> int:
        """Weights of the support, over the leaves that are decided."""
        return _tree.kept(self.support)

    @property
    def sparsity(self) -> float:
        """Fraction of those leaves' weights outside the support."""
        return 1 - self.kept / _tree.size(self.support)


@dataclass(frozen=True, eq=False)
class Solution(_Supported):
    """The answer to one problem.

    value: w, zero outside the support. support: what was allowed to live; a kept weight may be exactly zero.
    objective: f(w) + penalty(w). bound: a lower bound on any feasible objective (-inf: none known).
    gap: (objective - bound) / max(|objective|, |bound|), 0 when equal. evidence: what proves the bound.
    stats: seconds, the solver, and what it had to say.
    """

    value: Tree
    support: Tree
    status: Status
    objective: float
    bound: float
    gap: float
    evidence: Evidence | None
    stats: dict[str, Any]

    def __repr__(self) -> str:
        proof = f"bound {self.bound:.6g}, gap {self.gap:.2g}" if self.bound > float("-inf") else "no bound"
        return (
            f"Solution({self.status.name.lower()}, objective {self.objective:.6g}, {proof}, kept {self.kept} of "
            f"{_tree.size(self.support)}, {self.stats.get('seconds', float('nan')):.3g} s)"
        )


@dataclass(frozen=True, eq=False)
class Pruned(_Supported):
    """A pruned network, what `prune` and every plan return.

    params: same structure as given, pruned weights exactly zero. support: a tree of masks, None where untouched.
    solutions: {path: Solution} of the last stage; "*" is a problem over all chosen leaves. history: one dictionary
        for each stage. scope: what shared one budget, in words.
    """

    params: Tree
    support: Tree
    solutions: dict[str, Solution] = field(default_factory=dict)
    history: list[dict[str, Any]] = field(default_factory=list)
    scope: str = ""

    @property
    def layers(self) -> list[dict[str, Any]]:
        """What the last stage says of each layer; empty for methods that take the network as a whole."""
        return self.history[-1].get("layers", []) if self.history else []

    def __repr__(self) -> str:
        return (
            f"Pruned({len(jax.tree.leaves(self.support))} leaves, kept {self.kept} of {_tree.size(self.support)} "
            f"weights, sparsity {self.sparsity:.4f}, {len(self.history)} stages)"
        )
