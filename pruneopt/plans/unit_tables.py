"""What each width of each group of coupled units costs, and what the network loses with that group alone cut."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from tqdm import tqdm

from pruneopt import _tree
from pruneopt.allocation.tables import Tables
from pruneopt.capture.statistics import capture
from pruneopt.constraints.coupled import Coupled, Rows
from pruneopt.constraints.support import Support
from pruneopt.curvature.gram import Gram
from pruneopt.network.batches import Batches, Source
from pruneopt.objectives.reconstruction import Reconstruction
from pruneopt.problem import Problem
from pruneopt.solve import solve
from pruneopt.solvers.greedy_units import GreedyUnits
from pruneopt.solvers.polish import Polish
from pruneopt.structure.graph import Graph, trace
from pruneopt.structure.layout import slots_of

Tree = Any
Measure = Callable[[Any, Any], Any]


def kl(before: Any, after: Any) -> jax.Array:
    """The mean over positions of KL(softmax(before) || softmax(after)), of logits along the last axis."""
    p, q = (jax.nn.log_softmax(jax.tree.leaves(x)[0].astype(jnp.float32), axis=-1) for x in (before, after))
    return jnp.mean(jnp.sum(jnp.exp(p) * (p - q), axis=-1))


def squared(before: Any, after: Any) -> jax.Array:
    """The squared difference of all outputs over their squares."""
    pairs = list(zip(jax.tree.leaves(before), jax.tree.leaves(after), strict=True))
    apart = sum(jnp.sum(jnp.square((a - b).astype(jnp.float32))) for b, a in pairs)
    return jnp.asarray(apart / sum(jnp.sum(jnp.square(b.astype(jnp.float32))) for b, _ in pairs))


@_tree.on_host
def unit_tables(
    fn: Callable[[Tree, Any], Any],
    params: Tree,
    batches: Source,
    units: Coupled,
    measured: Source,
    *,
    measure: Measure = kl,
    widths: int | Mapping[str, Sequence[int]] = 16,
    damping: float = 1e-3,
    progress: bool = True,
) -> Tables:
    """{group: the error of each width} and their FLOPs and parameters, for `allocation.allocate`.

    One pass: each group's units are ordered by backward elimination on the Gram of the operator that consumes them, and
    for each width that operator alone is refitted and the network measured. The supports of a group are nested. What
    several groups lose together is not their sum; the allocation's `error` is a prediction to be measured.

    batches: for the Grams. units: which groups, as `constraints.coupled` found them; its budget is not read. measured:
        other examples, on which `measure(outputs before, outputs after)` is taken, a mean over each batch: `kl` of
        logits, `squared` for others.
    widths: of each group, or how many steps to take from the whole group down to one unit. damping: relative, of the
        refits.
    Costs of groups that meet in one operator or leaf are products of their widths: groups are ordered so that those are
    neighbours. Raises ValueError where they are not a chain, where a group has no single consumer, and for widths that
    the group does not have.
    """
    stream, probe = Batches(batches), Batches(measured, "measured")
    graph, named = trace(fn, params, next(iter(stream))), dict(_tree.named_leaves(params))
    slots = slots_of(graph.operators, named)
    consumers = units.consumers(slots)
    steps = _widths(units, widths)
    paths = sorted({path for slot, _ in consumers.values() for path in slot.paths})
    grams = capture(fn, params, batches, leaves=paths)
    forward = jax.jit(fn)
    before = [jax.block_until_ready(forward(params, batch)) for batch in probe]
    of = jax.jit(measure)
    errors: dict[str, list[float]] = {}
    for group in tqdm(units.groups, desc="groups", unit="group", disable=not progress):
        slot, rows = consumers[group.name]
        (op,) = slot.operators
        center, statistics = op.to_matrix(named)[0], grams[op.name].gram
        assert statistics is not None
        center = center.astype(_tree.wide(center.dtype))
        objective = Reconstruction(center, Gram(statistics[0]), damping)
        order = GreedyUnits().order(Problem(objective, subject_to=Rows(tuple(map(int, rows)), 1)))
        errors[group.name] = []
        for width in steps[group.name]:
            alive = np.ones(group.size + 1, bool)
            alive[order[: group.size - width]] = False
            mask = jnp.asarray(np.broadcast_to(alive[rows][:, None], center.shape))
            value = (
                solve(Problem(objective, subject_to=Support(mask)), Polish()).value if width < group.size else center
            )
            changed = named | op.to_leaves(value[None], named)
            cut = _tree.map_named(lambda path, _, changed=changed: changed[path], params)
            found = [float(of(a, forward(cut, batch))) for a, batch in zip(before, probe, strict=True)]
            errors[group.name].append(max(float(np.mean(found)), 0.0))
    return _costed(units, graph, errors, steps)


def _widths(units: Coupled, widths: int | Mapping[str, Sequence[int]]) -> dict[str, list[int]]:
    found = {}
    for group in units.groups:
        if isinstance(widths, Mapping):
            if group.name not in widths:
                raise ValueError(f"widths: there are none for group '{group.name}'; name every group of units")
            each = sorted({int(w) for w in widths[group.name]})
            if not each or each[0] < 1 or each[-1] > group.size:
                raise ValueError(f"widths of '{group.name}': {each}; pass whole numbers from 1 to {group.size}")
        else:
            each = sorted({max(1, round(group.size * k / widths)) for k in range(1, widths + 1)})
        found[group.name] = each
    return found


def _costed(units: Coupled, graph: Graph, errors: Mapping[str, list[float]], steps: Mapping[str, list[int]]) -> Tables:
    """The tables: amounts of work and of weights scale with the widths of the groups that own their axes."""
    sizes = {group.name: group.size for group in units.groups}
    of_leaf: dict[str, set[str]] = {}
    for group in units.groups:
        for path, _ in group.places:
            of_leaf.setdefault(path, set()).add(group.name)
    work = [(op.flops, set().union(*(of_leaf.get(path, set()) for path in op.paths))) for op in graph.operators]
    types = {path: graph.program.shapes[var] for path, var in graph.program.leaves.items()}
    floats = {path: t for path, t in types.items() if jnp.issubdtype(t.dtype, jnp.inexact)}
    held = [(math.prod(t.shape), of_leaf.get(path, set())) for path, t in floats.items()]
    costs: dict[str, dict[str, Any]] = {"flops": {}, "parameters": {}}
    coupled: dict[str, dict[frozenset[str], float]] = {"flops": {}, "parameters": {}}
    fixed = dict.fromkeys(costs, 0.0)
    for name, amounts in (("flops", work), ("parameters", held)):
        for amount, groups in amounts:
            if len(groups) > 2:
                raise ValueError(f"units: groups {', '.join(sorted(groups))} meet in one leaf; leave one of them out")
            if len(groups) == 2:
                key = frozenset(groups)
                coupled[name][key] = coupled[name].get(key, 0.0) + amount
            for group in groups if len(groups) == 1 else ():
                row = np.array(steps[group]) / sizes[group] * amount
                costs[name][group] = costs[name].get(group, 0.0) + row
            fixed[name] += amount if not groups else 0.0
    order = _chain([group.name for group in units.groups], {pair for pairs in coupled.values() for pair in pairs})
    share = {group: np.array(steps[group]) / sizes[group] for group in order}
    pairs: dict[str, dict[tuple[str, str], Any]] = {name: {} for name in costs}
    for name, table in coupled.items():
        for pair, amount in table.items():
            a, b = sorted(pair, key=order.index)
            pairs[name][a, b] = amount * np.outer(share[a], share[b])
    return Tables({g: errors[g] for g in order}, costs, {g: steps[g] for g in order}, fixed, pairs)


def _chain(names: Sequence[str], pairs: set[frozenset[str]]) -> list[str]:
    """The groups in an order in which those of a pair are neighbours."""
    beside: dict[str, list[str]] = {name: [] for name in names}
    for a, b in (sorted(pair, key=list(names).index) for pair in pairs):
        beside[a].append(b)
        beside[b].append(a)
    wide = next((name for name in names if len(beside[name]) > 2), None)
    if wide is not None:
        raise ValueError(
            f"units: group '{wide}' meets {len(beside[wide])} others in products ({', '.join(beside[wide][:4])}); only "
            "chains of groups can be allocated: leave some out"
        )
    order: list[str] = []
    for start in [*(name for name in names if len(beside[name]) < 2), *names]:
        at: str | None = start if start not in order else None
        while at is not None:
            order.append(at)
            at = next((other for other in beside[at] if other not in order), None)
    ends = {frozenset(pair) for pair in itertools.pairwise(order)}
    if not pairs <= ends:
        raise ValueError(
            f"units: groups {', '.join(sorted(set().union(*(pairs - ends))))} meet in a ring; leave one out"
        )
    return order
