"""One layer's problems: what is asked of each, the damping that other data choose, what is said of the answer."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from copy import copy
from typing import Any
from weakref import WeakKeyDictionary

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

from pruneopt import _tree
from pruneopt.capture import calibration
from pruneopt.constraints.base import Constraint
from pruneopt.constraints.cardinality import Cardinality
from pruneopt.curvature.gram import Gram
from pruneopt.objectives.reconstruction import Reconstruction
from pruneopt.plans.methods import LayerMethod
from pruneopt.plans.run_folder import RunFolder
from pruneopt.problem import Problem
from pruneopt.solution import Solution, Status
from pruneopt.solve import solve
from pruneopt.structure.layout import Slot, slots_of
from pruneopt.structure.operators import Operator

# Positions an input below which the history warns: at n / N = 1/4 the eigenvalues of a sample's Gram already spread
# from 1/4 to 9/4 of the truth (Marchenko and Pastur 1967), and small ones are where a refit gains most.
_POSITIONS = 4
Shift = Float[np.ndarray, " outputs"]  # what the outputs of an operator's problems, one after the other, are moved by


def _intercepts(reaching: list[calibration.Inputs], center: Any, found: list[Solution]) -> Shift:
    """What reached each problem, its dense weights, its solution; nothing for problems that saw no input."""
    each = zip(reaching, center, found, strict=True)
    parts = [np.zeros(w.shape[1]) if x.means is None else x.intercept(w, s.value) for x, w, s in each]
    return np.concatenate(parts)


def problem_name(op: Operator, e: int) -> str:
    """What problem e of an operator is called."""
    return op.name if op.problems == 1 else f"{op.name}{{{e}}}"


def _check_inputs(gram: Any, argument: str, name: str) -> None:
    """Raise ValueError for inputs that are all zero."""
    if not np.any(np.asarray(jnp.diagonal(gram)) > 0):
        raise ValueError(
            f"{argument}: the inputs of '{name}' are zero in all batches, so that every pruning of it looks perfect; "
            "check the calibration data, or leave it out of leaves="
        )


class LayerTask:
    """What is asked of every layer."""

    def __init__(
        self,
        operators: list[Operator],
        before: Mapping[str, Any],
        constraint: Constraint,
        row: LayerMethod,
        dampings: tuple[float, ...],
    ):
        self._operators, self._before, self._constraint = operators, before, constraint
        self._row, self._dampings = row, dampings
        self._slots = slots_of(operators, before)
        self._allowed = constraint.restricted(self._slots)
        self._grams: WeakKeyDictionary[calibration.Inputs, Gram] = WeakKeyDictionary()

    def under(self, constraint: Constraint) -> LayerTask:
        """The same task under another constraint; both share what solvers keep with the last Gram."""
        other = copy(self)
        other._constraint, other._allowed = constraint, constraint.restricted(self._slots)
        return other

    def check(self) -> None:
        """Raise where a constraint does not fit a layer, before any work."""
        for slot, allowed in zip(self._slots, self._allowed, strict=True):
            with _about(slot.name):
                allowed.check(slot)

    def identity(self) -> dict[str, Any]:
        """What tells this task from another."""
        return {
            "operators": [(op.name, op.problems, op.n_in, op.n_out) for op in self._operators],
            "constraint": self._constraint,
            "solver": self._row.solver,
            "target": self._row.target,
            "centred": self._row.centred,
            "damping": self._dampings,
        }

    def solve(
        self, i: int, sums: Any, others: Any, is_centred: bool, key: jax.Array
    ) -> tuple[list[Solution], Shift | None, dict[str, Any]]:
        """The solutions of an operator's problems, what its outputs are moved by where they are centred, and what the
        history says of them.
        """
        op = self._operators[i]
        center = op.to_matrix(self._before)
        center = center.astype(_tree.wide(center.dtype))
        reaching, found, dampings, notes, lost, whole = [], [], [], [], 0.0, 0.0
        for e in range(op.problems):
            reaching.append(calibration.problem(sums, e))
            if not reaching[e].count:
                notes.append(f"{problem_name(op, e)} saw no input: pruned by magnitude")
                reaching[e] = calibration.Inputs(0.0, jnp.eye(op.n_in, dtype=center.dtype), None)
            else:
                _check_inputs(reaching[e].gram, "batches", problem_name(op, e))
        if is_centred:
            reaching = [inputs.centred for inputs in reaching]
        targets = [reaching[e].target(center[e], self._dampings[0]) for e in range(op.problems)]
        with _about(op.name):
            constraints = self._by_problem(i, targets, reaching)
        for e, inputs in enumerate(reaching):
            aside = _gram(others, e, is_centred, problem_name(op, e))
            with _about(problem_name(op, e)):
                given = (center[e], targets[e], inputs, aside, constraints[e])
                objective, solution = self._best(*given, jax.random.fold_in(key, e))
            found.append(solution)
            dampings.append(objective.damping)
            lost += inputs.count * objective.error(solution.value, solution.objective)
            whole += inputs.count * objective.energy
        facts: dict[str, Any] = {
            "relative_error": lost / whole if whole else 0.0 if lost == 0 else math.nan,
            "damping": dampings[0] if len(set(dampings)) == 1 else dampings,
            "kept": sum(s.kept for s in found),
            "size": op.size,
            "scope": self._scope(i),
        }
        notes += self._few(op, sums)
        shift = _intercepts(reaching, center, found) if is_centred else None
        return found, shift, facts | ({"notes": notes} if notes else {})

    def remembered(
        self, folder: RunFolder, i: int, is_centred: bool
    ) -> tuple[list[Solution], Shift | None, dict[str, Any]] | None:
        """What `solve` returned for an operator in an earlier call, or None. Raises ValueError where it cannot have."""
        op = self._operators[i]
        shape = (op.problems, op.n_in, op.n_out)
        expected = {"value": (shape, _tree.wide(op.dtype)), "support": (shape, bool)}
        if is_centred:
            expected["shift"] = (op.problems * op.n_out,), np.float64
        stored = folder.load(i, expected)
        if stored is None:
            return None
        try:
            found, facts = _unpacked(*stored)
        except (KeyError, TypeError, ValueError) as error:
            raise folder.damaged(i, f"its facts: {error!r}") from error
        value, support = (jnp.stack([getattr(s, part) for s in found]) for part in ("value", "support"))
        allowed = self._allowed[i]
        if _tree.first_nonfinite(value) is not None:
            raise folder.damaged(i, "it holds a NaN or an infinity")
        if allowed.violation(support.reshape(self._slots[i].shape)) or _tree.outside(value, support):
            raise folder.damaged(i, f"its support is not in {allowed!r}")
        return found, stored[0].get("shift"), facts

    def _few(self, op: Operator, sums: Any) -> list[str]:
        """What is said of an operator whose Gram rests on few positions."""
        counts = [count for e in range(op.problems) if (count := calibration.problem(sums, e).count)]
        if self._row.target == "layer" or not counts or min(counts) >= _POSITIONS * op.n_in:
            return []
        return [
            f"{min(counts):g} positions for {op.n_in} inputs: with fewer than {_POSITIONS} an input the weights "
            "may fit the calibration data alone"
        ]

    def _best(
        self,
        center: Any,
        first: Any,
        inputs: calibration.Inputs,
        aside: Gram | None,
        constraint: Constraint,
        key: jax.Array,
    ) -> tuple[Reconstruction, Solution]:
        """The problem's objective, and its solution, with the damping of least error on the Gram of other data.

        first: the target with the first damping.
        """
        tried, gram = [], self._shared(inputs)
        for n, damping in enumerate(self._dampings if aside is not None else self._dampings[:1]):
            objective = Reconstruction(inputs.target(center, damping) if n else first, gram, damping)
            solution = solve(Problem(objective, subject_to=constraint), self._row.solver, key=key)
            error = 0.0 if aside is None else aside.form(solution.value, center, 0.0)
            tried.append((error, objective, solution))
        _, objective, solution = min(tried, key=lambda row: row[0])
        return objective, solution

    def _shared(self, inputs: calibration.Inputs) -> Gram:
        """One Gram for operators with the same inputs, solved in turn, so that they share what a solver keeps with it.

        The last alone, and no longer than the inputs are held: what is kept takes the memory of one layer.
        """
        if inputs not in self._grams:
            self._grams.clear()
            self._grams[inputs] = Gram(inputs.gram)
        return self._grams[inputs]

    def _by_problem(self, i: int, targets: list[Any], reaching: list[calibration.Inputs]) -> list[Constraint]:
        """The constraint on each problem; what they share is spent where it lowers the layer's error most, by score."""
        allowed, slot = self._allowed[i], self._slots[i]
        if slot.problems == 1:
            return [allowed]
        if not allowed.shares:
            return [allowed.portion(None, e) for e in range(slot.problems)]
        support = np.asarray(allowed.select(_scores(targets, reaching, self._dampings[0], allowed, slot)))
        if not support.any() and not allowed.allows_empty:
            raise ValueError(
                f"constraint={allowed!r} keeps no weight: the layer would collapse; lower the sparsity, pass floor=1 "
                "(or more) to keep some, or floor=0 to allow it"
            )
        nothing = Cardinality(count=0, floor=0)
        return [allowed.portion(support, e) if support[e].any() else nothing for e in range(slot.problems)]

    def _scope(self, i: int) -> str:
        """What shares one budget, for the history."""
        joint = self._allowed[i].shares and self._slots[i].problems > 1
        rest = f"; here shared by its {self._slots[i].problems} problems" if joint else ""
        return self._constraint.scope(by_layer=True) + rest


def _scores(
    targets: list[Any], reaching: list[calibration.Inputs], damping: float, allowed: Constraint, slot: Slot
) -> Any:
    """What removing each weight alone adds to the layer's error: (H_jj + lambda) w^2, problems weighted by positions.

    A problem that saw no input has no say: the fraction that everything keeps is kept of it, by magnitude.
    """
    scores = np.zeros(slot.shape)
    for e, (w, inputs) in enumerate(zip(targets, reaching, strict=True)):
        h = np.diagonal(np.asarray(inputs.gram, np.float64))
        scores[e] = inputs.count * (h + damping * h.mean())[:, None] * np.asarray(w, np.float64) ** 2
    scores /= max(scores.max(), np.finfo(np.float64).tiny)
    density = allowed.density(slot)
    for e, (w, inputs) in enumerate(zip(targets, reaching, strict=True)):
        if not inputs.count:
            sizes = np.abs(np.asarray(w, np.float64)).reshape(-1)
            first = np.argsort(-sizes, kind="stable")[: math.floor(density * sizes.size + 1e-9)]
            scores[e].reshape(-1)[first] = np.inf
    return jnp.asarray(scores, targets[0].dtype)


def _gram(sums: Any, e: int, is_centred: bool, name: str) -> Gram | None:
    """The Gram of what reached a problem from held-out data, None where nothing did."""
    if sums is None or not (inputs := calibration.problem(sums, e)).count:
        return None
    _check_inputs(inputs.gram, "held_out", name)
    return Gram((inputs.centred if is_centred else inputs).gram)


@contextmanager
def _about(name: str) -> Iterator[None]:
    """Errors inside say which layer they are about."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"layer '{name}': {error}") from error


def packed(found: list[Solution], shift: Shift | None, facts: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Arrays and facts of an operator's solutions, for a folder."""
    arrays = {part: np.stack([np.asarray(getattr(s, part)) for s in found]) for part in ("value", "support")}
    arrays |= {} if shift is None else {"shift": shift}
    numbers = ("objective", "bound", "gap")
    said = [{"status": s.status.name, "relative_error": s.stats["relative_error"]} for s in found]
    said = [row | {"seconds": s.stats["seconds"]} for row, s in zip(said, found, strict=True)]
    said = [row | {n: getattr(s, n) for n in numbers} for row, s in zip(said, found, strict=True)]
    return arrays, {"layer": facts, "problems": said}


def _unpacked(arrays: dict[str, Any], said: dict[str, Any]) -> tuple[list[Solution], dict[str, Any]]:
    """What a folder remembers; its evidence is not kept."""
    found = []
    for value, support, row in zip(arrays["value"], arrays["support"], said["problems"], strict=True):
        numbers = (float(row["objective"]), float(row["bound"]), float(row["gap"]))
        stats = {name: float(row[name]) for name in ("relative_error", "seconds")} | {"resumed": True}
        status = Status[row["status"]]
        found.append(Solution(jnp.asarray(value), jnp.asarray(support), status, *numbers, None, stats))
    return found, {**said["layer"]}
