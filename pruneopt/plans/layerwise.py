"""Prune a network layer by layer, each layer seeing the pruned ones before it."""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from tqdm import tqdm

from pruneopt import _tree
from pruneopt.capture import calibration
from pruneopt.capture.calibration import Calibration
from pruneopt.capture.statistics import selected
from pruneopt.capture.walk import Graphs
from pruneopt.constraints.base import Constraint
from pruneopt.constraints.intersection import Intersection
from pruneopt.constraints.support import Support
from pruneopt.curvature.gram import Gram
from pruneopt.network.batches import Batches, Source
from pruneopt.network.leaves import Choice, as_key, check_finite, check_like, partition
from pruneopt.objectives.reconstruction import Reconstruction
from pruneopt.plans.judged import DAMPINGS, as_dampings
from pruneopt.plans.run_folder import RunFolder
from pruneopt.problem import Problem
from pruneopt.solution import Pruned, Solution, Status
from pruneopt.solve import solve
from pruneopt.solvers.base import Solver
from pruneopt.structure.operators import Operator

Tree = Any


@_tree.on_host
def layerwise(
    fn: Callable[[Tree, Any], Any],
    params: Tree,
    batches: Source,
    constraint: Constraint,
    solver: Solver,
    *,
    target: Literal["layer", "network"] = "layer",
    damping: float | Sequence[float] | None = None,
    held_out: Source | None = None,
    weights: Callable[[Any], Any] | None = None,
    within: Tree | None = None,
    leaves: Choice = None,
    run_dir: str | os.PathLike[str] | None = None,
    key: jax.Array | int | None = None,
    progress: bool = True,
) -> Pruned:
    """For each operator in turn, minimise 1/2 tr(D^T (H + lambda I) D) over D = W - W0, W in `constraint`.

    H = X^T X / N from the inputs X that the *pruned* network gives the operator, over all batches; the new W flows on.
    One pass over the network: only live activations are kept, operators with the same input share one Gram. Weights
    that several products share see all their inputs, the later ones with the weights as they are before.

    fn: outputs or a loss, of params and a batch. batches: read once.
    constraint: on each operator's matrix (n_in, n_out) by itself; `ByPath` gives layers different ones. Experts, heads
        and feature groups are problems of their own. solver: any that takes a `Reconstruction`.
    target: "layer" matches the dense layer on the pruned inputs (Frantar and Alistarh 2023); "network" matches what
        the dense network computes there, ||X0 W0 - X W||^2 with X0 its inputs, by moving the centre
        (`calibration.Inputs.target`).
    damping: lambda / mean(diag H); 0.01 by default. Of a sequence, the one with the least undamped error on `held_out`
        is kept (default with held_out: 0.001, 0.003, 0.01, 0.03, 0.1).
    weights: batch -> one weight >= 0 a position (B, T) or example (B,), such as an attention mask; in Grams and errors.
        They are laid on an operator's positions by their shapes, in the batch's order: an fn that moves or reverses
        the time axis gets the wrong ones. Where an operator has positions (B,) alone, such as a pooled output or one
        step of a loop over time, an example counts if any of its positions does.
    within: a tree of boolean masks; what they cut stays cut. leaves: which leaves are pruned; leaves that are not
        chosen are skipped. run_dir: a folder; after a kill the same call continues there, to the same bits.

    Returns a Pruned: `solutions` by operator (`name{e}` for problem e of several), `history` with one entry an operator
    and one for each chosen leaf that no operator reads, with the reason.
    Raises ValueError for a leaf named by a pattern that no operator reads, a layer whose inputs are all zero, a folder
    of another run, and whatever `solve` refuses.
    """
    for name, part, kind in (("constraint", constraint, Constraint), ("solver", solver, Solver)):
        if not isinstance(part, kind):
            raise TypeError(f"{name} is {part!r}; pass a pruneopt {kind.__name__}")
    if target not in ("layer", "network"):
        raise ValueError(f"target={target!r} is unknown; pass 'layer' or 'network'")
    chosen, _ = partition(params, leaves)
    check_finite(chosen, "params")
    dampings = _dampings(damping, held_out)
    before = dict(_tree.named_leaves(params))
    masks = {} if within is None else dict(_tree.named_leaves(within))
    graphs = Graphs(fn, params)

    def choose(graph: Any) -> list[Operator]:
        return selected(graph, params, leaves)

    stream = Calibration(graphs, batches, weights, choose, before if target == "network" else None)
    aside = None if held_out is None else Calibration(graphs, Batches(held_out, "held_out"), weights, choose, None)
    operators = choose(graphs.first)
    task = _Task(operators, before, masks, constraint, solver, dampings)
    task.check()
    key = as_key(key)
    folder = None
    if run_dir is not None:
        identity = task.identity() | {"params": list(before.values()), "target": target}
        identity |= {"fn": graphs.first.program.text(), "key": jax.random.key_data(key)}
        identity |= {"batches": stream.arrays, "held_out": None if aside is None else aside.arrays}
        folder = RunFolder(run_dir, identity)
    now, supports, solutions, history = dict(before), {}, {}, []
    with tqdm(total=len(operators), desc="layers", unit="layer", disable=not progress) as bar:
        for number, cut in enumerate(stream.cuts):
            clock = time.perf_counter()
            stream.advance(number, now)
            if aside is not None:
                aside.advance(number, now)
            seconds = {"forward": time.perf_counter() - clock}
            done = {} if folder is None else {i: task.remembered(folder, i) for i in cut.operators}
            sums, others = {}, {}
            if not all(done.get(i) for i in cut.operators):
                clock = time.perf_counter()
                sums = stream.sums(number, now)
                others = {} if aside is None else aside.sums(number, now)
                seconds["gram"] = time.perf_counter() - clock
            for i in cut.operators:
                clock, op, known = time.perf_counter(), operators[i], done.get(i)
                bar.set_postfix_str(op.name, refresh=False)
                found, facts = known or task.solve(i, sums[i], others.get(i), jax.random.fold_in(key, i))
                if folder is not None and known is None:
                    folder.store(i, *_packed(found, facts))
                matrix, support = (jnp.stack([getattr(s, part) for s in found]) for part in ("value", "support"))
                now |= op.to_leaves(matrix, now)
                for path, mask in op.masks(support).items():
                    supports[path] = mask & supports[path] if path in supports else mask
                    now[path] = _tree.masked(now[path], supports[path])  # where a scale is zero the matrix says nothing
                solutions |= {_name(op, e): solution for e, solution in enumerate(found)}
                seconds["solve"] = time.perf_counter() - clock
                history.append({"layer": op.name, **facts, "seconds": seconds})
                seconds = {}
                bar.update()
    operators_by_name = {op.name: op for op in operators}
    unread = [path for path, _ in _tree.named_leaves(chosen) if path not in supports]
    history += [{"layer": path, "skipped": graphs.first.why_not(path)} for path in unread]
    for entry in history[: len(operators)]:
        if unseen := graphs.first.unread(operators_by_name[entry["layer"]].paths):
            entry.setdefault("notes", []).append(f"a use that cannot be read has no part in its inputs: {unseen}")
    support = _tree.map_named(lambda path, _: supports.get(path), params)
    return Pruned(_tree.map_named(lambda p, x: _tree.like(now[p], x), params), support, solutions, history)


def _dampings(damping: Any, held_out: Any) -> tuple[float, ...]:
    if damping is None:
        return DAMPINGS if held_out is not None else (0.01,)
    values = as_dampings("damping", damping)
    if len(values) != 1 and held_out is None:
        raise ValueError(f"damping={damping!r} leaves a choice, but held_out is None; pass batches to choose on")
    return values


def _name(op: Operator, e: int) -> str:
    return op.name if op.problems == 1 else f"{op.name}{{{e}}}"


def _gram(inputs: calibration.Inputs) -> Gram | None:
    """The Gram of what reached a problem, None where nothing did."""
    return Gram(inputs.gram) if inputs.count else None


def _check_inputs(gram: Any, argument: str, name: str) -> None:
    """Raise ValueError for inputs that are all zero."""
    if not np.any(np.asarray(jnp.diagonal(gram)) > 0):
        raise ValueError(
            f"{argument}: the inputs of '{name}' are zero in all batches, so that every pruning of it looks perfect; "
            "check the calibration data, or leave it out of leaves="
        )


class _Task:
    """What is asked of every layer."""

    def __init__(
        self,
        operators: list[Operator],
        before: Mapping[str, Any],
        within: Mapping[str, Any],
        constraint: Constraint,
        solver: Solver,
        dampings: tuple[float, ...],
    ):
        self._operators, self._before, self._within = operators, before, within
        self._constraint, self._solver, self._dampings = constraint, solver, dampings

    def check(self) -> None:
        """Raise where a constraint does not fit a layer, before any work."""
        for path, mask in self._within.items():
            check_like(mask, self._before.get(path), f"within: '{path}'")
            if np.asarray(mask).dtype != bool:
                raise TypeError(f"within: '{path}' has dtype {np.asarray(mask).dtype}; pass booleans, True = may live")
        for op in self._operators:
            try:
                self._constraints(op)[0].check(jax.ShapeDtypeStruct((op.n_in, op.n_out), np.dtype(np.float32)))
            except ValueError as error:  # the matrix of a layer is a tree of one leaf, which has no path
                raise ValueError(str(error).replace("leaf ''", f"layer '{op.name}'")) from error

    def identity(self) -> dict[str, Any]:
        """What tells this task from another."""
        return {
            "operators": [(op.name, op.problems, op.n_in, op.n_out) for op in self._operators],
            "within": dict(self._within),
            "constraint": self._constraint,
            "solver": self._solver,
            "damping": self._dampings,
        }

    def solve(self, i: int, sums: Any, others: Any, key: jax.Array) -> tuple[list[Solution], dict[str, Any]]:
        """The solutions of an operator's problems, and what the history says of them."""
        op = self._operators[i]
        center = op.to_matrix(self._before)
        center = center.astype(_tree.wide(center.dtype))
        constraints, found, dampings, notes = self._constraints(op), [], [], []
        for e in range(op.problems):
            inputs = calibration.problem(sums, e)
            if not inputs.count:
                notes.append(f"{_name(op, e)} saw no input: pruned by magnitude")
                inputs = calibration.Inputs(0.0, jnp.eye(op.n_in, dtype=center.dtype), None)
            else:
                _check_inputs(inputs.gram, "batches", _name(op, e))
            aside = None if others is None else _gram(calibration.problem(others, e))
            if aside is not None:
                _check_inputs(aside.matrix, "held_out", _name(op, e))
            try:
                solution, damping = self._best(center[e], inputs, aside, constraints[e], jax.random.fold_in(key, e))
            except ValueError as error:
                raise ValueError(str(error).replace("leaf ''", f"layer '{_name(op, e)}'")) from error
            found.append(solution)
            dampings.append(damping)
        errors = [s.stats["relative_error"] for s in found]
        facts: dict[str, Any] = {
            "relative_error": float(np.mean([x for x in errors if math.isfinite(x)] or [math.nan])),
            "damping": dampings[0] if len(set(dampings)) == 1 else dampings,
            "kept": sum(s.kept for s in found),
            "size": op.size,
        }
        return found, facts | ({"notes": notes} if notes else {})

    def remembered(self, folder: RunFolder, i: int) -> tuple[list[Solution], dict[str, Any]] | None:
        """What `solve` returned for an operator in an earlier call, or None. Raises ValueError where it cannot have."""
        op = self._operators[i]
        shape = (op.problems, op.n_in, op.n_out)
        stored = folder.load(i, {"value": (shape, _tree.wide(op.dtype)), "support": (shape, bool)})
        if stored is None:
            return None
        try:
            found, facts = _unpacked(*stored)
        except (KeyError, TypeError, ValueError) as error:
            raise folder.damaged(i, f"its facts: {error!r}") from error
        for solution, constraint in zip(found, self._constraints(op), strict=True):
            if _tree.first_nonfinite(solution.value) is not None:
                raise folder.damaged(i, "it holds a NaN or an infinity")
            if constraint.violation(solution.support) or _tree.outside(solution.value, solution.support):
                raise folder.damaged(i, f"its support is not in {constraint!r}")
        return found, facts

    def _best(
        self, center: Any, inputs: calibration.Inputs, aside: Gram | None, constraint: Constraint, key: jax.Array
    ) -> tuple[Solution, float]:
        """The solution, and damping, with the least error on the Gram of other data."""
        tried = []
        for damping in self._dampings if aside is not None else self._dampings[:1]:
            objective = Reconstruction(inputs.target(center, damping), Gram(inputs.gram), damping)
            solution = solve(Problem(objective, subject_to=constraint), self._solver, key=key)
            tried.append((0.0 if aside is None else aside.form(solution.value, center, 0.0), solution, damping))
        _, solution, damping = min(tried, key=lambda row: row[0])
        return solution, damping

    def _constraints(self, op: Operator) -> list[Constraint]:
        """The constraint of each of an operator's problems."""
        found = []
        within = None
        if any(path in self._within for path in op.paths):
            everything = {p: np.ones(np.shape(self._before[p]), bool) for p in op.paths}
            within = op.support(everything | {p: self._within[p] for p in op.paths if p in self._within})
        for e in range(op.problems):
            one = self._constraint.restricted(op.paths, lambda masks, e=e: op.support(masks)[e])
            found.append(one if within is None else Intersection((Support(within[e]), one)))
        return found


def _packed(found: list[Solution], facts: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Arrays and facts of an operator's solutions, for a folder."""
    arrays = {part: np.stack([np.asarray(getattr(s, part)) for s in found]) for part in ("value", "support")}
    numbers = ("objective", "bound", "gap")
    said = [{"status": s.status.name, "relative_error": s.stats["relative_error"]} for s in found]
    said = [row | {n: getattr(s, n) for n in numbers} for row, s in zip(said, found, strict=True)]
    return arrays, {"layer": facts, "problems": said}


def _unpacked(arrays: dict[str, Any], said: dict[str, Any]) -> tuple[list[Solution], dict[str, Any]]:
    """What a folder remembers; its evidence is not kept."""
    found = []
    for value, support, row in zip(arrays["value"], arrays["support"], said["problems"], strict=True):
        numbers = (float(row["objective"]), float(row["bound"]), float(row["gap"]))
        stats = {"relative_error": float(row["relative_error"]), "resumed": True}
        status = Status[row["status"]]
        found.append(Solution(jnp.asarray(value), jnp.asarray(support), status, *numbers, None, stats))
    return found, {**said["layer"]}
