"""What comes back: a solution with its evidence, and a pruned network."""

from __future__ import annotations

import enum
from dataclasses import dataclass, field
from typing import Any

import jax

from pruneopt import _tree
from pruneopt.bounds.base import Evidence

Tree = Any
_ROWS = 12  # lines of a printed table, what fits a screen beside its title


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
        error = self.stats.get("relative_error")
        said = "" if error is None else f", relative error {error:.3g}"
        return (
            f"Solution({self.status.name.lower()}, objective {self.objective:.6g}, {proof}, kept {self.kept:,} of "
            f"{_tree.size(self.support):,}{said}, {self.stats.get('seconds', float('nan')):.3g} s)"
        )


class _Account:
    """What JAX carries along with a pruned network unread; the same object is the same account."""

    def __init__(self, *parts: Any):
        self.parts = parts

    def __hash__(self) -> int:
        return hash(tuple(map(id, self.parts)))

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Account) and all(a is b for a, b in zip(self.parts, other.parts, strict=True))


@jax.tree_util.register_pytree_with_keys_class
@dataclass(frozen=True, eq=False, repr=False)
class Pruned(_Supported):
    """A pruned network, what `prune` and every plan return.

    params: same structure as given, pruned weights exactly zero. support: a tree of masks, None where untouched.
    solutions: {path: Solution} of the last stage; "*" is a problem over all chosen leaves. history: one dictionary
        for each stage. scope: what shared one budget, in words.

    A pytree whose leaves are those of `params` and `support`; the account of how it came about goes along unread.
    """

    params: Tree
    support: Tree
    solutions: dict[str, Solution] = field(default_factory=dict)
    history: list[dict[str, Any]] = field(default_factory=list)
    scope: str = ""

    def tree_flatten_with_keys(self) -> tuple[tuple[tuple[Any, Tree], tuple[Any, Tree]], _Account]:
        """For JAX."""
        key = jax.tree_util.GetAttrKey
        account = _Account(self.solutions, self.history, self.scope)
        return ((key("params"), self.params), (key("support"), self.support)), account

    @classmethod
    def tree_unflatten(cls, static: _Account, children: tuple[Tree, Tree]) -> Pruned:
        """For JAX."""
        return cls(*children, *static.parts)

    @property
    def layers(self) -> list[dict[str, Any]]:
        """What the last stage says of each layer; empty for methods that take the network as a whole."""
        return self.history[-1].get("layers", []) if self.history else []

    def to_records(self) -> list[dict[str, Any]]:
        """One dictionary a layer, or a leaf where the network was taken as a whole: layer, size, kept, sparsity.

        Where they are known: relative_error, damping, seconds (all of that layer's), notes; a layer that was skipped
        says why.
        """
        if not self.layers:
            named = _tree.named_leaves(self.support)
            return [_counted({"layer": path, "size": mask.size, "kept": _tree.kept(mask)}) for path, mask in named]
        return [
            _counted(entry | {"seconds": sum(entry["seconds"].values())}) if "kept" in entry else dict(entry)
            for entry in self.layers
        ]

    def __repr__(self) -> str:
        last = self.history[-1] if self.history else {}
        said = [f"by {last['method']}"] if "method" in last else []
        said += [self.scope] if self.scope else []
        said += [f"{len(self.history)} stages"] if len(self.history) > 1 else []
        size, seconds = _tree.size(self.support), [record.get("seconds", 0.0) for record in self.history]
        title = f"Pruned {'; '.join(said)}".rstrip()
        total = f"kept {self.kept:,} of {size:,} weights, sparsity {self.sparsity:.4f}"
        left = [f"left out: {path}: {why}"[:120] for path, why in last.get("left_out", {}).items()]
        left = left if len(left) <= 4 else [*left[:3], f"... {len(left) - 3} more left out"]
        total += f", {sum(seconds):.3g} s" if any(seconds) else ""
        return "\n".join([title, *_table(self.to_records()), *left, total])


def _counted(record: dict[str, Any]) -> dict[str, Any]:
    return record | {"sparsity": 1 - record["kept"] / record["size"]}


def _table(records: list[dict[str, Any]]) -> list[str]:
    """A line a layer; of a long list the first and the last, and how many are between them."""
    if not records:
        return []
    shown = records if len(records) <= _ROWS else [*records[: _ROWS - 3], *records[-2:]]
    width = max(len("layer"), *(len(record["layer"]) for record in shown))
    with_error = any("relative_error" in record for record in records)
    head = f"{'layer':<{width}} {'kept':>11} {'of':>11} {'sparsity':>9}" + f" {'error':>9} {'s':>7}" * with_error
    lines = [head]
    for record in shown:
        if "kept" not in record:
            lines.append(f"{record['layer']:<{width}} skipped: {record['skipped']}"[:120])
            continue
        line = f"{record['layer']:<{width}} {record['kept']:>11,} {record['size']:>11,} {record['sparsity']:>9.2%}"
        lines.append(line + (f" {record['relative_error']:>9.3g} {record['seconds']:>7.3g}" if with_error else ""))
    if len(shown) < len(records):
        lines.insert(_ROWS - 2, f"... {len(records) - len(shown)} more layers")
    return lines
