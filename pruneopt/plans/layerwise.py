"""Prune a network layer by layer, each layer seeing the pruned ones before it."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from tqdm import tqdm

from pruneopt import _tree
from pruneopt.capture.affine import affine
from pruneopt.capture.calibration import Calibration
from pruneopt.constraints.base import Constraint
from pruneopt.network.batches import Batches, Source
from pruneopt.network.leaves import Choice, as_key
from pruneopt.network.network import Network
from pruneopt.plans.judged import left_out, standing
from pruneopt.plans.layer_task import LayerTask, packed, problem_name
from pruneopt.plans.methods import LayerMethod, layer_row, name_of
from pruneopt.plans.run_folder import RunFolder
from pruneopt.solution import Pruned, Solution
from pruneopt.solvers.base import Solver
from pruneopt.structure.defaults import network_of
from pruneopt.structure.traced import Traced

Tree = Any


@_tree.on_host
def layerwise(
    fn: Callable[[Tree, Any], Any],
    params: Tree,
    batches: Source,
    constraint: Constraint,
    method: str | LayerMethod | Solver,
    *,
    held_out: Source | None = None,
    weights: Callable[[Any], Any] | None = None,
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
    constraint: on the matrices (n_in, n_out) of the operators. A budget over the tree is one total, shared out in
        proportion to their weights, to the unit; `ByPath` and `by_size` give layers different ones. Experts, heads and
        feature groups are problems of their own with one budget, spent where (H_jj + lambda) w^2, weighted by
        positions, is largest. What a `Support` cuts stays cut, Intersection((Support(masks), constraint)).
    method: a name of `plans.LAYER_METHODS`, a `LayerMethod` (which says target and damping), or a solver alone, which
        is `LayerMethod(solver)`.
    held_out: examples on which the damping of a method that has `dampings` is chosen, by the least undamped error.
    weights: batch -> one weight >= 0 a position (B, T) or example (B,), such as an attention mask; in Grams and errors.
        Its axes, the first ones of the batch's arrays, are followed through fn, steps of loops over time included; what
        cannot be followed is refused (`capture.positions`). Where an operator has positions (B,) alone, such as a
        pooled output or the last state of a loop, an example counts if any of its positions does.
    leaves: which leaves are pruned; leaves that are not chosen are skipped. run_dir: a folder; after a kill the same
        call continues there, to the same bits.

    Returns a Pruned: `solutions` by operator (`name{e}` for problem e of several), `history` of one stage, whose
    "layers" has an entry for each operator and for each chosen leaf that no operator reads, with the reason. An
    entry's relative_error is the layer's: squared changes of the outputs of all its problems over their squares. Its
    seconds: forward and gram (of all operators with that input, at the first), solve (the solutions' own), rest.
    Raises ValueError for a leaf named by a pattern that no operator reads, a layer whose inputs are all zero, a folder
    of another run, and whatever `solve` refuses.
    """
    if not isinstance(constraint, Constraint):
        raise TypeError(f"constraint is {constraint!r}; pass a pruneopt Constraint")
    clock, row, network = time.perf_counter(), layer_row(method), network_of(fn, params, batches, leaves)
    run = _Pass(network, constraint, row, held_out, weights, as_key(key))
    if run_dir is not None:
        run.folder = RunFolder(run_dir, run.identity())
    run.go(progress)
    chosen = constraint.implied(run.supports)
    support = _tree.map_named(lambda path, x: _tree.placed(chosen.get(path), x), params)
    scope = constraint.scope(by_layer=True)
    record = {"stage": 0, "cut": 1.0, "method": name_of(method), "scope": scope} | standing(support, run.solutions)
    record |= {"seconds": time.perf_counter() - clock, "layers": run.account()} | left_out(network)
    now = {path: x if chosen.get(path) is None else _tree.masked(x, chosen[path]) for path, x in run.now.items()}
    values = _tree.map_named(lambda p, x: _tree.like(now[p], x), params)
    return Pruned(values, support, run.solutions, [record], scope)


class _Pass:
    """One pass over a network: its pruned leaves so far, and what is known of its layers."""

    def __init__(
        self,
        network: Network,
        constraint: Constraint,
        row: LayerMethod,
        held_out: Source | None,
        weights: Callable[[Any], Any] | None,
        key: jax.Array,
    ):
        before = dict(_tree.named_leaves(network.params))
        self._network, self._traced, self._row, self._key = network, Traced(network), row, key
        dense = None if row.target == "layer" else before
        self._stream = Calibration(self._traced, network.batches, weights, dense, row.target == "stream", row.centred)
        self._aside = None
        if held_out is not None:
            self._aside = Calibration(self._traced, Batches(held_out, "held_out"), weights, None, means=row.centred)
        self.operators = self._traced.chosen(self._traced.first)
        program = self._traced.first.program
        alone = [op.uses[0] if row.centred and len(op.uses) == 1 else None for op in self.operators]
        self._affine = [None if use is None else affine(program, use, before) for use in alone]
        dampings = row.dampings if row.dampings and held_out is not None else (row.damping,)
        self.task = LayerTask(self.operators, before, constraint, row, dampings)
        self.task.check()
        self.folder: RunFolder | None = None
        self.now, self.supports = dict(before), dict[str, Any]()
        self.solutions, self._layers = dict[str, Solution](), list[dict[str, Any]]()

    def identity(self) -> dict[str, Any]:
        """What tells this run from another."""
        return self.task.identity() | {
            "params": jax.tree.leaves(self._network.params),
            "fn": self._traced.first.program.text(),
            "key": jax.random.key_data(self._key),
            "batches": self._stream.arrays,
            "held_out": None if self._aside is None else self._aside.arrays,
        }

    def go(self, progress: bool) -> None:
        """Cut by cut: bring all batches there, solve its operators, put their weights in."""
        with tqdm(total=len(self.operators), desc="layers", unit="layer", disable=not progress) as bar:
            for number, cut in enumerate(self._stream.cuts):
                seconds = {"forward": _timed(lambda n=number: self._advance(n))}
                known, sums, others = {i: self._known(i) for i in cut.operators}, {}, {}
                if not all(known.values()):
                    clock = time.perf_counter()
                    sums = self._stream.sums(number, self.now)
                    others = {} if self._aside is None else self._aside.sums(number, self.now)
                    seconds["gram"] = time.perf_counter() - clock
                for i in cut.operators:
                    bar.set_postfix_str(self.operators[i].name, refresh=False)
                    self._layers.append(self._solved(i, known[i], sums.get(i), others.get(i), seconds))
                    seconds = {}
                    bar.update()

    def account(self) -> list[dict[str, Any]]:
        """What is said of each layer, and of each chosen leaf that no operator reads."""
        graph, paths = self._traced.first, {op.name: op.paths for op in self.operators}
        for entry in self._layers:
            if unseen := graph.unread(paths[entry["layer"]]):
                entry.setdefault("notes", []).append(f"a use that cannot be read has no part in its inputs: {unseen}")
        unread = [path for path, _ in _tree.named_leaves(self._network.chosen) if path not in self.supports]
        return self._layers + [{"layer": path, "skipped": graph.why_not(path)} for path in unread]

    def _advance(self, number: int) -> None:
        self._stream.advance(number, self.now)
        if self._aside is not None:
            self._aside.advance(number, self.now)

    def _known(self, i: int) -> Any:
        return None if self.folder is None else self.task.remembered(self.folder, i, self._affine[i] is not None)

    def _solved(self, i: int, known: Any, sums: Any, others: Any, seconds: dict[str, float]) -> dict[str, Any]:
        """Solve operator i, or take what is known of it; put it in. Returns the layer's entry."""
        clock, op, after = time.perf_counter(), self.operators[i], self._affine[i]
        drawn = jax.random.fold_in(self._key, i)
        found, shift, facts = known or self.task.solve(i, sums, others, after is not None, drawn)
        if self.folder is not None and known is None:
            self.folder.store(i, *packed(found, shift, facts))
        matrix, support = (jnp.stack([getattr(s, part) for s in found]) for part in ("value", "support"))
        self.now |= op.to_leaves(matrix, self.now)
        for path, mask in op.masks(support).items():
            self.supports[path] = mask & self.supports[path] if path in self.supports else mask
            self.now[path] = _tree.masked(self.now[path], self.supports[path])  # a zero scale hides it in the matrix
        if after is not None and shift is not None:
            moved = after.moved(self.now, shift)
            self.now |= {path: moved[path].astype(self.now[path].dtype) for path in moved}
        self.solutions |= {problem_name(op, e): solution for e, solution in enumerate(found)}
        solve = sum(s.stats["seconds"] for s in found)
        rest = time.perf_counter() - clock - (solve if known is None else 0.0)
        return {"layer": op.name, **facts, "seconds": seconds | {"solve": solve, "rest": max(rest, 0.0)}}


def _timed(call: Callable[[], None]) -> float:
    clock = time.perf_counter()
    call()
    return time.perf_counter() - clock
