"""Prune a network: stage by stage, model the loss, solve, apply, fine-tune."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from tqdm import tqdm

from pruneopt import _tree
from pruneopt.constraints.base import Constraint
from pruneopt.constraints.intersection import Intersection
from pruneopt.constraints.support import Support
from pruneopt.network.batches import Batches, Source
from pruneopt.network.leaves import Choice, as_key, check_finite, check_like, combine, partition
from pruneopt.objectives.loss import Loss
from pruneopt.plans.judged import DAMPINGS, FACTS, damped, judged
from pruneopt.plans.layerwise import layerwise
from pruneopt.plans.methods import LayerMethod, Method, any_method
from pruneopt.plans.schedules import OneShot, Schedule, stages_of
from pruneopt.problem import Problem
from pruneopt.solution import Pruned, Solution, Status
from pruneopt.solve import solve

Tree = Any
FineTune = Callable[[Tree, Tree], Tree]


@_tree.on_host
def prune(
    fn: Callable[[Tree, Any], Any] | None,
    params: Tree,
    batches: Source | None,
    constraint: Constraint,
    *,
    method: str | Method | LayerMethod = "magnitude",
    schedule: Schedule | None = None,
    fine_tune: FineTune | None = None,
    evaluate: Callable[[Tree], Any] | None = None,
    held_out: Source | None = None,
    leaves: Choice = None,
    key: jax.Array | int | None = None,
    progress: bool = True,
) -> Pruned:
    """minimise model(w) subject to `constraint`, the model rebuilt at each stage of `schedule`.

    fn: loss(params, batch) -> scalar, a mean over examples; None for methods that read no data; for methods that go
        layer by layer (`plans.LAYER_METHODS`) outputs will do.
    params: any pytree. batches: re-iterable, or a function that returns an iterator; None where no data is read.
    constraint: on the chosen leaves: per="tree" lets importance decide where to prune, per="leaf" prunes the same
        fraction everywhere. Layer by layer (see `plans.layerwise`) it holds for each layer's matrix by itself.
    method: a name of `plans.METHODS` or `plans.LAYER_METHODS`, or a row of your own.
    schedule: OneShot() (default), Iterative, Cubic, CoarseThenFine. Supports are nested: what is cut stays cut.
    fine_tune: (params, support) -> params after each stage (`plans.retrain` makes one); pruned weights are set back to
        zero. evaluate: params -> anything, kept in `history` after pruning ("pruned") and fine-tuning ("tuned").
    held_out: examples that the method does not read. On them the damping of a method that has one is chosen, out of
        `plans.judged.DAMPINGS`, at one solve each.
    leaves: which leaves are pruned: a predicate (path, leaf), glob patterns over paths, or None for floating arrays of
        two or more axes whose path does not say bias, norm, scale or embed. key: defaults to seed 0.
    progress: show a bar with the time left.

    Returns a Pruned; every other leaf is the very object that was given. `params` is never changed. `history` has for
    each stage cut, sparsity, kept, objective, status, seconds; for a method that models the loss `predicted`, the
    change of it that the model foresaw, and `measured`, that on `held_out` or else on the first batch.
    Raises ValueError or TypeError, naming the argument, before any work where arguments do not fit.
    """
    row = any_method(method)
    if not isinstance(constraint, Constraint):
        raise TypeError(f"constraint is {constraint!r}; pass a constraint such as Cardinality(sparsity=0.9)")
    chosen, rest = partition(params, leaves)
    check_finite(chosen, "params")
    stages = stages_of(schedule or OneShot(), constraint, chosen)
    for name, call in (("fine_tune", fine_tune), ("evaluate", evaluate)):
        if call is not None and not callable(call):
            raise TypeError(f"{name} is {call!r}; pass a function")
    rows = [row if stage.method is None else any_method(stage.method) for stage in stages]
    held_out = None if held_out is None else Batches(held_out, "held_out")
    if any(isinstance(r, Method) for r in rows):
        constraint.check(chosen)
    if fn is None and any(isinstance(r, LayerMethod) or r.reads_data for r in rows):
        raise TypeError(f"fn is None, but method={method!r} reads a loss; pass fn(params, batch) -> scalar")
    key = as_key(key)

    size = _tree.size(chosen)
    support: Tree = None
    solutions: dict[str, Solution] = {}
    history: list[dict[str, Any]] = []
    for i, stage in enumerate(tqdm(stages, desc="prune", unit="stage", disable=not progress)):
        clock = time.perf_counter()
        keys = jax.random.split(jax.random.fold_in(key, i))
        allowed, row = constraint if stage.cut == 1 else constraint.relaxed(stage.cut), rows[i]
        record: dict[str, Any] = {"stage": i, "cut": stage.cut}
        if isinstance(row, LayerMethod):
            assert fn is not None
            done = _by_layer(row, fn, params, batches, held_out, allowed, support, leaves, keys[1], progress)
            params, solutions, record["layers"] = done.params, done.solutions, done.history
            chosen, rest = partition(params, leaves)
            support = _everywhere(done.support, chosen, support)
        else:
            if support is not None:
                allowed = Intersection((Support(support), allowed))
            solution = _as_a_whole(row, fn, params, batches, held_out, allowed, leaves, keys)
            solutions, support = {"*": solution}, solution.support
            params = combine(solution.value, rest)
            record |= {name: solution.stats[name] for name in FACTS if name in solution.stats}
        kept = _tree.kept(support)
        record |= {
            "sparsity": 1 - kept / size,
            "kept": kept,
            "objective": sum(s.objective for s in solutions.values()),
            "status": _worst(solutions).name.lower(),
        }
        if evaluate is not None:
            record["pruned"] = evaluate(params)
        if fine_tune is not None:
            params, rest = _tuned(fine_tune, params, support, leaves)
            if evaluate is not None:
                record["tuned"] = evaluate(params)
        record["seconds"] = time.perf_counter() - clock
        history.append(record)
    return Pruned(params, support, solutions, history)


def _by_layer(
    row: LayerMethod,
    fn: Any,
    params: Tree,
    batches: Any,
    held_out: Any,
    allowed: Constraint,
    support: Tree,
    leaves: Choice,
    key: jax.Array,
    progress: bool,
) -> Pruned:
    """One pass of a method that goes layer by layer; held-out batches choose the damping of those that have one."""
    return layerwise(
        fn,
        params,
        batches,
        allowed,
        row.solver,
        target=row.target,
        damping=None if row.damping and held_out is not None else row.damping,
        held_out=held_out,
        within=support,
        leaves=leaves,
        key=key,
        progress=progress,
    )


def _as_a_whole(
    row: Method,
    fn: Any,
    params: Tree,
    batches: Any,
    held_out: Any,
    allowed: Constraint,
    leaves: Choice,
    keys: jax.Array,
) -> Solution:
    """One solve over all chosen leaves; what the model foresaw beside what the loss did, where the model is of it."""
    objective = row.model(fn, params, batches, leaves, keys[0])
    if not row.predicts:
        return solve(Problem(objective, subject_to=allowed), row.solver, key=keys[1])
    others = [next(iter(Batches(batches)))] if held_out is None else held_out
    judge = Loss(fn, params, others, leaves)
    before = judge.finite_value(judge.center)
    dampings = () if held_out is None else DAMPINGS
    return judged(damped(objective, dampings), allowed, row.solver, judge, before, keys[1])[0]


def _everywhere(support: Tree, chosen: Tree, before: Tree) -> Tree:
    """A mask for every chosen leaf: where no operator reads a leaf, what lived before lives on."""
    found, old = (dict(_tree.named_leaves(tree)) for tree in (support, before))

    def one(path: str, leaf: Any) -> Any:
        return found[path] if path in found else old.get(path, np.ones(leaf.shape, bool))

    return _tree.map_named(one, chosen)


def _worst(solutions: dict[str, Solution]) -> Status:
    """The least that is known of all solutions."""
    return max((s.status for s in solutions.values()), key=list(Status).index)


def _tuned(fine_tune: FineTune, params: Tree, support: Tree, leaves: Choice) -> tuple[Tree, Any]:
    """The user's fine-tuned parameters with pruned weights at zero, and the leaves that are not pruned."""
    tuned = fine_tune(params, support)
    check_like(tuned, params, "fine_tune's result")
    check_finite(tuned, "fine_tune's result")
    for (path, new), old in zip(_tree.named_leaves(tuned), jax.tree.leaves(params), strict=True):
        if getattr(new, "dtype", None) != getattr(old, "dtype", None):
            raise ValueError(
                f"fine_tune's result: leaf '{path}' is {new.dtype}, params has {old.dtype}; keep the dtype"
            )
    chosen, rest = partition(tuned, leaves)
    chosen = _tree.masked(chosen, support)
    return combine(chosen, rest), rest
