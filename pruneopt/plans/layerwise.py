"""Prune a network layer by layer, each layer seeing the pruned ones before it."""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from tqdm import tqdm

from pruneopt import _data, _tree
from pruneopt.constraints.base import Constraint
from pruneopt.constraints.intersection import Intersection
from pruneopt.constraints.support import Support
from pruneopt.curvature.gram import Gram
from pruneopt.objectives.reconstruction import Reconstruction
from pruneopt.plans.run_folder import RunFolder
from pruneopt.problem import Problem
from pruneopt.solution import Pruned, Solution, Status
from pruneopt.solve import solve
from pruneopt.solvers.base import Solver
from pruneopt.structure import capture, walk
from pruneopt.structure.graph import Graph, Operator
from pruneopt.structure.leaves import Choice, check_finite, partition
from pruneopt.structure.walk import Cut, Env, Graphs, Walk

Tree = Any
DAMPINGS = (0.001, 0.003, 0.01, 0.03, 0.1)  # tried where held-out batches are given


def layerwise(
    fn: Callable[[Tree, Any], Any],
    params: Tree,
    batches: _data.Source,
    constraint: Constraint,
    solver: Solver,
    *,
    target: Literal["layer", "network"] = "layer",
    damping: float | Sequence[float] | None = None,
    held_out: _data.Source | None = None,
    weights: Callable[[Any], Any] | None = None,
    within: Tree | None = None,
    leaves: Choice = None,
    run_dir: str | os.PathLike[str] | None = None,
    key: jax.Array | int | None = None,
    progress: bool = True,
) -> Pruned:
    """For each operator in turn, minimise 1/2 tr(D^T (H + lambda I) D) over D = W - W0, W in `constraint`.

    H = X^T X / N from the inputs X that the *pruned* network gives the operator, over all batches; the new W flows on.
    One pass over the network: only live activations are kept, operators with the same input share one Gram.

    fn: outputs or a loss, of params and a batch. batches: read once.
    constraint: on each operator's matrix (n_in, n_out) by itself; `ByPath` gives layers different ones. Experts, heads
        and feature groups are problems of their own. solver: any that takes a `Reconstruction`.
    target: "layer" matches the dense layer on the pruned inputs (Frantar and Alistarh 2023); "network" matches what
        the dense network computes there, ||X0 W0 - X W||^2 with X0 its inputs: the centre moves to
        W0 - (H + lambda I)^-1 X^T (X - X0) W0 / N, which leaves the minimiser exact.
    damping: lambda / mean(diag H); 0.01 by default. A sequence is tried in turn and the one with the least undamped
        error on `held_out` kept (default with held_out: DAMPINGS).
    weights: batch -> one weight a position (B, T) or example (B,), such as an attention mask; in Grams and errors.
    within: a tree of boolean masks; what they cut stays cut. leaves: which leaves are pruned; leaves that are not
        chosen are skipped. run_dir: a folder; after a kill the same call continues there, to the same bits.

    Returns a Pruned: `solutions` by operator (`name{e}` for problem e of several), `history` with one entry an operator
    and one for each chosen leaf that no operator reads, with the reason.
    Raises ValueError for a leaf named by a pattern that no operator reads, a layer whose inputs are all zero, a folder
    of another run, and whatever `solve` refuses.
    """
    _check(fn, constraint, solver, target)
    chosen, _ = partition(params, leaves)
    check_finite(chosen, "params")
    plan = _Plan(fn, params, batches, constraint, solver, target, _dampings(damping, held_out), held_out, weights)
    plan.choose(leaves, within)
    folder = None if run_dir is None else RunFolder(run_dir, plan.identity(within))
    key = jax.random.key(key or 0) if key is None or isinstance(key, int) else key
    with tqdm(total=len(plan.operators), desc="layers", unit="layer", disable=not progress) as bar:
        for cut in range(len(plan.cuts)):
            plan.visit(cut, folder, key, bar)
    return plan.pruned(chosen)


def _check(fn: Any, constraint: Any, solver: Any, target: Any) -> None:
    if not callable(fn):
        raise TypeError(f"fn is {fn!r}; layer by layer needs the network, fn(params, batch) -> outputs or loss")
    if not isinstance(constraint, Constraint):
        raise TypeError(f"constraint is {constraint!r}; pass a constraint such as Cardinality(sparsity=0.5)")
    if not isinstance(solver, Solver):
        raise TypeError(f"solver is {solver!r}; pass a solver such as Then(Score(), Polish())")
    if target not in ("layer", "network"):
        raise ValueError(f"target={target!r} is unknown; pass 'layer' or 'network'")


def _dampings(damping: Any, held_out: Any) -> tuple[float, ...]:
    if damping is None:
        return DAMPINGS if held_out is not None else (0.01,)
    values = tuple(damping) if isinstance(damping, Sequence) else (damping,)
    if len(values) > 1 and held_out is None:
        raise ValueError(f"damping={damping!r} leaves a choice, but held_out is None; pass batches to choose on")
    return values


@dataclass(eq=False)
class _Stream:
    """Batches on their way through the network: an environment a batch, for the pruned and maybe the dense one."""

    graphs: list[Graph]
    weights: list[Any]
    envs: list[Env]
    dense: list[Env] | None
    walks: dict[int, Walk]
    cuts: dict[int, list[Cut]]

    def advance(self, cut: int, leaves: dict[str, Any], before: dict[str, Any]) -> None:
        """Evaluate every batch up to a cut."""
        steps = {}
        for number, position in self.walks.items():
            demand = self.cuts[number][cut].inputs
            steps[number] = position.advance(demand)
            position.release(demand)
        for i, graph in enumerate(self.graphs):
            self.envs[i] = steps[id(graph)](self.envs[i], leaves)
            if self.dense is not None:
                self.dense[i] = steps[id(graph)](self.dense[i], before)

    def rows(self, cut: int, i: int) -> tuple[Cut, list[Any], list[Any] | None]:
        """A cut in batch i with its arrays, of the pruned and the dense network."""
        graph = self.graphs[i]
        here = self.cuts[id(graph)][cut]
        dense = None if self.dense is None else walk.values(graph.program, self.dense[i], here.inputs)
        return here, walk.values(graph.program, self.envs[i], here.inputs), dense

    def later(self, cut: int, i: int, leaves: dict[str, Any]) -> list[tuple[int, Any, list[Any]]]:
        """(operator, form, arrays) of the further products with a cut's weights, looking ahead with `leaves`."""
        graph = self.graphs[i]
        here, position, env, found = self.cuts[id(graph)][cut], self.walks[id(graph)].ahead(), self.envs[i], []
        for op, use in sorted(here.further, key=lambda pair: pair[1].equation):
            env = position.advance(use.inputs)(env, leaves)
            found.append((op, use.form, walk.values(graph.program, env, use.inputs)))
            position.release(use.inputs)
        return found


@dataclass(eq=False)
class _Plan:
    """One pass: the network, the batches on their way, and what has been decided."""

    fn: Any
    params: Tree
    batches: Any
    constraint: Constraint
    solver: Solver
    target: str
    dampings: tuple[float, ...]
    held_out: Any
    weights: Any
    solutions: dict[str, Solution] = field(default_factory=dict)
    history: list[dict[str, Any]] = field(default_factory=list)
    masks: dict[str, Any] = field(default_factory=dict)

    def choose(self, leaves: Choice, within: Tree | None) -> None:
        """Read the network, choose its operators, start the batches."""
        self.graphs = Graphs(self.fn, self.params)
        self.before = dict(_tree.named_leaves(self.params))
        self.leaves = dict(self.before)
        self.within = {} if within is None else dict(_tree.named_leaves(within))
        self.stream = self._started(self.batches, leaves, self.target == "network")
        self.aside = None if self.held_out is None else self._started(self.held_out, leaves, False)
        self.operators = self._chosen(self.stream.graphs[0], leaves)
        self.cuts = self.stream.cuts[id(self.stream.graphs[0])]
        self.names = [op.name for op in self.operators]
        for op in self.operators:
            _resolved(self.constraint, op)

    def _chosen(self, graph: Graph, leaves: Choice) -> list[Operator]:
        return capture.selected(graph, self.params, leaves)

    def _started(self, batches: Any, leaves: Choice, dense: bool) -> _Stream:
        stream = _Stream([], [], [], [] if dense else None, {}, {})
        for batch in _data.Batches(batches):
            graph = self.graphs.of(batch)
            if id(graph) not in stream.walks:
                cuts = walk.cuts(self._chosen(graph, leaves))
                demands = [d for cut in cuts for d in (cut.inputs, *(use.inputs for _, use in cut.further))]
                stream.cuts[id(graph)] = cuts
                stream.walks[id(graph)] = Walk(graph.program, demands)
            stream.graphs.append(graph)
            stream.weights.append(None if self.weights is None else self.weights(batch))
            env = stream.walks[id(graph)].start(batch)
            stream.envs.append(env)
            if stream.dense is not None:
                stream.dense.append(env)
        return stream

    def identity(self, within: Tree | None) -> dict[str, Any]:
        """What tells this call from another."""
        return {
            "params": list(self.before.values()),
            "operators": [(op.name, op.problems, op.n_in, op.n_out) for op in self.operators],
            "batches": [list(env.values()) for env in self.stream.envs],
            "held_out": None if self.aside is None else [list(env.values()) for env in self.aside.envs],
            "weights": self.stream.weights,
            "constraint": self.constraint,
            "solver": self.solver,
            "target": self.target,
            "damping": self.dampings,
            "within": within,
        }

    def visit(self, cut: int, folder: RunFolder | None, key: jax.Array, bar: Any) -> None:
        """Solve every operator of one cut."""
        clock = time.perf_counter()
        numbers = self.cuts[cut].operators
        for stream in filter(None, (self.stream, self.aside)):
            stream.advance(cut, self.leaves, self.before)
        jax.block_until_ready(self.stream.envs)
        seconds = {"forward": time.perf_counter() - clock}
        known = {n: folder.load(n) for n in numbers} if folder is not None else {}
        inputs = None
        if not all(known.get(n) for n in numbers):
            clock = time.perf_counter()
            inputs = _Inputs(self, cut)
            seconds["gram"] = time.perf_counter() - clock
        for n in numbers:
            op, clock = self.operators[n], time.perf_counter()
            bar.set_postfix_str(op.name, refresh=False)
            stored = known.get(n)
            if stored is not None:
                matrix, support, facts = self._restored(op, stored)
            else:
                assert inputs is not None
                matrix, support, facts = self._solved(n, inputs, jax.random.fold_in(key, n))
                if folder is not None:
                    folder.store(n, {"matrix": matrix, "support": support}, facts)
            self.leaves |= op.to_leaves(matrix, {**self.before, **self.leaves})
            for path, mask in op.masks(support).items():
                self.masks[path] = mask & self.masks[path] if path in self.masks else mask
            seconds["solve"] = time.perf_counter() - clock
            self.history.append({"layer": op.name, **facts["layer"], "seconds": seconds})
            seconds = {}
            bar.update()

    def _solved(self, n: int, inputs: _Inputs, key: jax.Array) -> tuple[Any, Any, dict[str, Any]]:
        op = self.operators[n]
        center = op.to_matrix(self.before)
        center = center.astype(_tree.wide(center.dtype))
        limits = {p: self.within[p] for p in op.paths if p in self.within}
        within = (
            op.support({p: limits.get(p, np.ones(self.before[p].shape, bool)) for p in op.paths}) if limits else None
        )
        found = []
        for e in range(op.problems):
            constraint = _resolved(self.constraint, op, e)
            if within is not None:
                constraint = Intersection((Support(within[e]), constraint))
            found.append(self._best(center[e], inputs.problem(n, e), constraint, jax.random.fold_in(key, e), op, e))
        for e, (solution, _, _) in enumerate(found):
            self.solutions[op.name if op.problems == 1 else f"{op.name}{{{e}}}"] = solution
        errors = [s.stats["relative_error"] for s, _, _ in found]
        layer = {
            "relative_error": float(np.mean([x for x in errors if math.isfinite(x)] or [math.nan])),
            "damping": found[0][1] if op.problems == 1 else [d for _, d, _ in found],
            "kept": sum(s.kept for s, _, _ in found),
            "size": op.size,
        }
        if notes := [note for _, _, note in found if note]:
            layer["notes"] = notes
        problems = [
            {
                "status": s.status.name,
                "objective": s.objective,
                "bound": s.bound,
                "gap": s.gap,
                "seconds": s.stats["seconds"],
            }
            | {"relative_error": s.stats["relative_error"]}
            for s, _, _ in found
        ]
        value, support = (jnp.stack([getattr(s, part) for s, _, _ in found]) for part in ("value", "support"))
        return value, support, {"layer": layer, "problems": problems}

    def _best(
        self, center: Any, inputs: _Layer, constraint: Constraint, key: jax.Array, op: Operator, e: int
    ) -> tuple[Solution, float, str]:
        """The solution with the damping that does best on the held-out Gram, that damping, and what to note."""
        where = op.name if op.problems == 1 else f"{op.name}{{{e}}}"
        gram, note = inputs.gram, ""
        if inputs.count == 0:
            gram, note = jnp.eye(op.n_in, dtype=center.dtype), f"{where} saw no input: pruned by magnitude"
        elif not bool(jnp.any(jnp.diagonal(gram) > 0)):
            raise ValueError(
                f"batches: the inputs of '{where}' are zero in all batches, so every pruning of it looks perfect; check "
                "the calibration data, or leave it out of leaves="
            )
        best: tuple[float, Solution, float] | None = None
        for damping in self.dampings if not note else self.dampings[:1]:
            objective = Reconstruction(inputs.moved(center, gram, damping), Gram(gram), damping)
            solution = solve(Problem(objective, subject_to=constraint), self.solver, key=key)
            score = 0.0
            if inputs.held_out is not None and len(self.dampings) > 1:
                score = inputs.held_out.form(solution.value, center, 0.0)
            if best is None or score < best[0]:
                best = (score, solution, damping)
        assert best is not None
        return best[1], best[2], note

    def _restored(self, op: Operator, stored: Any) -> tuple[Any, Any, dict[str, Any]]:
        arrays, facts = stored
        matrix, support = jnp.asarray(arrays["matrix"]), jnp.asarray(arrays["support"])
        for e, said in enumerate(facts["problems"]):
            stats = {"seconds": said["seconds"], "relative_error": said["relative_error"], "resumed": True}
            self.solutions[op.name if op.problems == 1 else f"{op.name}{{{e}}}"] = Solution(
                matrix[e],
                support[e],
                Status[said["status"]],
                *(said[k] for k in ("objective", "bound", "gap")),
                None,
                stats,
            )
        return matrix, support, facts

    def pruned(self, chosen: Tree) -> Pruned:
        """The network with its new weights."""
        graph = self.stream.graphs[0]
        params = _tree.map_named(lambda path, leaf: self.leaves.get(path, leaf), self.params)
        unread = [p for p, _ in _tree.named_leaves(chosen) if p not in self.masks]
        self.history += [{"layer": path, "skipped": graph.why_not(path)} for path in unread]
        support = _tree.map_named(lambda path, leaf: self.masks.get(path), self.params)
        params = _like(params, self.params, self.masks)
        return Pruned(params, support, self.solutions, self.history)


def _like(params: Tree, given: Tree, masks: dict[str, Any]) -> Tree:
    """NumPy leaves stay NumPy leaves."""

    def one(path: str, new: Any, old: Any) -> Any:
        return np.asarray(new) if path in masks and isinstance(old, np.ndarray) else new

    return _tree.map_named(one, params, given)


def _resolved(constraint: Constraint, op: Operator, e: int = 0) -> Constraint:
    """The constraint on one problem of an operator, checked against its matrix."""

    def laid(masks: dict[str, Any]) -> Any:
        return op.support(masks)[e]

    found = constraint.restricted(op.paths, laid)
    found.check(jax.ShapeDtypeStruct((op.n_in, op.n_out), np.dtype(np.float32)))
    return found


@dataclass(frozen=True, eq=False)
class _Layer:
    """What one problem sees: positions, Gram, the cross term X^T (X0 - X) / N, a Gram of other data."""

    count: float
    gram: Any
    drift: Any
    held_out: Gram | None

    def moved(self, center: Any, gram: Any, damping: float) -> Any:
        """The weights to be matched: `center`, or what reproduces the dense network's outputs from these inputs."""
        if self.drift is None or self.count == 0:
            return center
        h, c, w = (np.asarray(x, np.float64) for x in (gram, self.drift, center))
        ridge = damping * np.mean(np.diagonal(h))
        values, vectors = np.linalg.eigh(h)
        shifted = values + ridge
        live = shifted > len(h) * np.finfo(np.asarray(gram).dtype).eps * shifted[-1]
        move = vectors[:, live] @ ((vectors[:, live].T @ (c @ w)) / shifted[live, None])
        return jnp.asarray(w + move, center.dtype)


class _Inputs:
    """The sums over all batches at a cut, for each of its operators."""

    def __init__(self, plan: _Plan, cut: int):
        self._sums: dict[int, dict[str, Any]] = {}
        self._aside: dict[int, dict[str, Any]] = {}
        self._gather(plan.stream, cut, plan.leaves, self._sums)
        if plan.aside is not None:
            self._gather(plan.aside, cut, plan.leaves, self._aside)
        jax.block_until_ready((self._sums, self._aside))

    def _gather(self, stream: _Stream, cut: int, leaves: dict[str, Any], sums: dict[int, dict[str, Any]]) -> None:
        for i in range(len(stream.graphs)):
            here, arrays, dense = stream.rows(cut, i)
            form, weights = here.use.form, stream.weights[i]
            mine = capture.sums(form, arrays, weights)
            if dense is not None:
                mine["cross"] = capture.cross(form, arrays, dense, weights)
            for op in here.operators:
                _add(sums, op, mine)
            for op, other, values in stream.later(cut, i, leaves):
                _add(sums, op, capture.sums(other, values, weights))

    def problem(self, op: int, e: int) -> _Layer:
        """One problem of an operator."""
        sums = self._sums[op]
        count = float(sums["count"][e])
        over = 1.0 / count if count else 0.0
        gram = sums["gram"][e] * jnp.asarray(over, sums["gram"].dtype)
        drift = None
        if "cross" in sums:
            drift = sums["cross"][e] * jnp.asarray(over, gram.dtype) - gram
        held_out = None
        if self._aside and float(self._aside[op]["count"][e]):
            aside = self._aside[op]
            held_out = Gram(aside["gram"][e] / jnp.asarray(float(aside["count"][e]), gram.dtype))
        return _Layer(count, gram, drift, held_out)


def _add(sums: dict[int, dict[str, Any]], op: int, more: dict[str, Any]) -> None:
    old = sums.get(op)
    sums[op] = (
        dict(more)
        if old is None
        else {k: old[k] + v if k in old else v for k, v in more.items()}
        | {k: v for k, v in old.items() if k not in more}
    )
