"""Prune a network: stage by stage, model the loss, solve, apply, fine-tune."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import jax
from tqdm import tqdm

from pruneopt import _tree
from pruneopt.constraints.base import Constraint
from pruneopt.constraints.intersection import Intersection
from pruneopt.constraints.laid import as_multiplied
from pruneopt.constraints.support import Support
from pruneopt.delivery.apply import apply
from pruneopt.network.batches import Batches, Source
from pruneopt.network.leaves import Choice, as_key, check_finite, check_like
from pruneopt.network.network import Network
from pruneopt.objectives.loss import Loss
from pruneopt.objectives.unit_scores import UnitScores
from pruneopt.plans.judged import FACTS, damped, judged, left_out, standing
from pruneopt.plans.layerwise import layerwise
from pruneopt.plans.methods import Asked, LayerMethod, Method, name_of, row_of
from pruneopt.plans.schedules import OneShot, Schedule, stages_of
from pruneopt.plans.unit_scores import UnitMethod, groups_of, owned
from pruneopt.problem import Problem
from pruneopt.solution import Pruned, Solution
from pruneopt.solve import solve
from pruneopt.solvers.score import Score
from pruneopt.structure.defaults import network_of

Tree = Any
FineTune = Callable[[Tree, Tree], Tree]


@_tree.on_host
def prune(
    fn: Callable[[Tree, Any], Any] | None,
    params: Tree,
    batches: Source | None,
    constraint: Constraint,
    *,
    method: Asked = "magnitude",
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
        fraction everywhere. Layer by layer (see `plans.layerwise`) a tree's budget is shared out uniformly.
        Inputs and outputs are those of the matrices that fn multiplies in the first batch; where fn or batches are None
        a leaf of two axes is (n_in, n_out), one of four an HWIO kernel, and others are refused (`constraints.laid`).
    method: a name of `plans.METHODS`, `plans.LAYER_METHODS` or, under a Coupled set, `plans.UNIT_METHODS`, a row of
        your own, a solver alone, which goes layer by layer (`LayerMethod(solver)`), or `objectives.Scores` for a
        saliency of your own. A name is one problem in every plan: objective, target and damping.
    schedule: OneShot() (default), Iterative, Cubic, CoarseThenFine. Supports are nested: what is cut stays cut.
    fine_tune: (params, support) -> params after each stage (`plans.retrain` makes one); pruned weights are set back to
        zero. evaluate: params -> anything, kept in `history` after pruning ("pruned") and fine-tuning ("tuned").
    held_out: examples that the method does not read. On them the damping of a method that has one is chosen, out of
        the `dampings` of its row, at one solve each.
    leaves: which leaves are pruned: a predicate (path, leaf), glob patterns over paths, or None for those of two or
        more axes that fn multiplies (`structure.default_leaves`); where fn or batches are None, for floating arrays of
        two or more axes whose path does not say bias, norm, scale or embed; for a row of `plans.UNIT_METHODS`, for all
        that its groups own but running statistics. key: defaults to seed 0.
    progress: show a bar with the time left.

    Returns a Pruned; every other leaf is the very object that was given. `params` is never changed. `history` has for
    each stage cut, method, scope (what shared one budget), sparsity, kept, objective, status, seconds; `left_out`,
    {path: why} of leaves that look like weights and that fn does not multiply; layer by layer "layers" (see
    `layerwise`); for a method that models the loss `predicted`, the change of it that the model foresaw, and
    `measured`, that on `held_out` or else on the first batch.
    Raises ValueError or TypeError, naming the argument, before any work where arguments do not fit.
    """
    row = row_of(method)
    if not isinstance(constraint, Constraint):
        raise TypeError(f"constraint is {constraint!r}; pass a constraint such as Cardinality(sparsity=0.9)")
    for name, call in (("fine_tune", fine_tune), ("evaluate", evaluate)):
        if call is not None and not callable(call):
            raise TypeError(f"{name} is {call!r}; pass a function")
    if isinstance(row, UnitMethod) and leaves is None:
        leaves = owned(groups_of(constraint, method))
    network = network_of(fn, params, batches, leaves)
    stages = stages_of(schedule or OneShot(), constraint, network.chosen)
    methods = [method if stage.method is None else stage.method for stage in stages]
    rows = [row_of(m) for m in methods]
    if not all(isinstance(r, LayerMethod) for r in rows):
        constraint = as_multiplied(constraint, network)
        constraint.check(network.chosen)
    for named in (m for m, r in zip(methods, rows, strict=True) if isinstance(r, UnitMethod)):
        groups_of(constraint, named)
    if fn is None and any(isinstance(r, LayerMethod) or r.reads_data for r in rows):
        raise TypeError(f"fn is None, but method={method!r} reads a loss; pass fn(params, batch) -> scalar")
    aside = None if held_out is None else Batches(held_out, "held_out")
    key = as_key(key)

    support: Tree = None
    solutions: dict[str, Solution] = {}
    history: list[dict[str, Any]] = []
    for i, stage in enumerate(tqdm(stages, desc="prune", unit="stage", disable=not progress)):
        clock, row = time.perf_counter(), rows[i]
        allowed = constraint if stage.cut == 1 else constraint.relaxed(stage.cut)
        if support is not None:
            allowed = Intersection((Support(support), allowed))
        scope = constraint.scope(by_layer=isinstance(row, LayerMethod))
        record: dict[str, Any] = {"stage": i, "cut": stage.cut, "method": name_of(methods[i]), "scope": scope}
        drawn = key if i == 0 else jax.random.fold_in(key, i)  # so that one stage is `layerwise` to the bit
        if isinstance(row, LayerMethod):
            words: dict[str, Any] = {"held_out": aside, "leaves": network.leaves, "key": drawn, "progress": progress}
            done = layerwise(*network.given[:3], allowed, row, **words)
            values, solutions, record["layers"] = done.params, done.solutions, done.history[0]["layers"]
            support = _together(params, done.support, support)
        else:
            solution = _as_a_whole(row, network, aside, allowed, drawn)
            solutions, support = {"*": solution}, solution.support
            values = network.put(solution.value)
            record |= {name: solution.stats[name] for name in FACTS if name in solution.stats}
        record |= standing(support, solutions) | left_out(network)
        if evaluate is not None:
            record["pruned"] = evaluate(values)
        if fine_tune is not None:
            values = _tuned(fine_tune, values, support)
            if evaluate is not None:
                record["tuned"] = evaluate(values)
        network = network.at(values)
        record["seconds"] = time.perf_counter() - clock
        history.append(record)
    return Pruned(network.params, support, solutions, history, history[-1]["scope"])


def _as_a_whole(
    row: Method | UnitMethod, network: Network, held_out: Any, allowed: Constraint, key: jax.Array
) -> Solution:
    """One solve over all chosen leaves; what the model foresaw beside what the loss did, where the model is of it."""
    if isinstance(row, UnitMethod):
        groups = groups_of(allowed, row)
        ranked = UnitScores(row.scores(network, groups, key), groups, network.chosen)
        return solve(Problem(ranked, subject_to=allowed), Score())
    modelled, solved = jax.random.split(key)
    objective = row.model(network, modelled)
    if not row.predicts:
        return solve(Problem(objective, subject_to=allowed), row.solver, key=solved)
    others = [next(iter(network.batches))] if held_out is None else held_out
    judge = Loss(network.fn, network.params, others, network.leaves)  # pyright: ignore[reportArgumentType]
    before = judge.finite_value(judge.center)
    dampings = () if held_out is None else row.dampings
    return judged(damped(objective, dampings), allowed, row.solver, judge, before, solved)[0]


def _together(params: Tree, support: Tree, before: Tree) -> Tree:
    """The masks of a stage, and those of leaves that only the stages before it cut."""
    masks = dict(_tree.named_leaves(before)) | dict(_tree.named_leaves(support))
    return _tree.map_named(lambda path, _: masks.get(path), params)


def _tuned(fine_tune: FineTune, params: Tree, support: Tree) -> Tree:
    """The user's fine-tuned parameters with pruned weights at zero."""
    tuned = fine_tune(params, support)
    check_like(tuned, params, "fine_tune's result")
    check_finite(tuned, "fine_tune's result")
    for (path, new), old in zip(_tree.named_leaves(tuned), jax.tree.leaves(params), strict=True):
        if getattr(new, "dtype", None) != getattr(old, "dtype", None):
            raise ValueError(
                f"fine_tune's result: leaf '{path}' is {new.dtype}, params has {old.dtype}; keep the dtype"
            )
    return apply(tuned, support)
