"""What each width of each group of coupled units costs, and what the network loses with that group alone cut."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
from tqdm import tqdm

from pruneopt import _tree
from pruneopt.allocation.tables import Tables
from pruneopt.capture.affine import affine
from pruneopt.capture.calibration import Inputs, Means
from pruneopt.capture.statistics import Statistics, capture
from pruneopt.constraints.coupled import Coupled
from pruneopt.constraints.rows import Rows
from pruneopt.constraints.support import Support
from pruneopt.curvature.gram import Gram
from pruneopt.network.batches import Batches, Source
from pruneopt.objectives.reconstruction import Reconstruction
from pruneopt.plans.levels import Levels, Measure, kl
from pruneopt.plans.methods import LayerMethod, layer_row
from pruneopt.plans.unit_costs import unit_costs
from pruneopt.problem import Problem
from pruneopt.solve import solve
from pruneopt.solvers.base import Solver
from pruneopt.solvers.greedy_units import GreedyUnits
from pruneopt.solvers.polish import Polish
from pruneopt.structure.defaults import network_of
from pruneopt.structure.graph import Graph
from pruneopt.structure.latency import Latency
from pruneopt.structure.layout import slots_of
from pruneopt.structure.operators import Operator
from pruneopt.structure.traced import Traced

Tree = Any


@_tree.on_host
def unit_levels(
    fn: Callable[[Tree, Any], Any],
    params: Tree,
    batches: Source,
    units: Coupled,
    *,
    method: str | LayerMethod | Solver = "units",
    widths: int | Mapping[str, Sequence[int]] | Latency = 16,
    weights: Callable[[Any], Any] | None = None,
    progress: bool = True,
) -> Levels:
    """For each group and each width the operator that consumes the group, its units chosen and refitted, alone.

    One pass over the dense network takes the Gram of each consumer's inputs, for all widths. With `GreedyUnits` the
    supports of a group are nested: one elimination serves all widths; other solvers choose anew for each.

    units: which groups, as `constraints.coupled` found them; its budget is not read. method: its solver, damping and
        centring.
    widths: of each group, or how many steps to take from the whole group down to one unit; 0 is a group without units,
        such as a residual branch that goes whole. A table of measured seconds of these groups (`structure.latency`)
        gives its grid, and "seconds" for its batch among the costs.
    weights: of the positions in the Grams, as in `layerwise`.
    Costs: "flops" as `structure.cost` counts, "parameters", "bytes" of the arrays of params, "activations": bytes of
    all arrays that depend on the batch, for the first batch. Those of groups that meet in one array are products of
    their widths: groups are ordered so that those are neighbours.
    Raises ValueError where they are not a chain, where a group has no single consumer, for widths that the group does
    not have, and inputs that are all zero.
    """
    row, named = layer_row(method), dict(_tree.named_leaves(params))
    graph = Traced(network_of(fn, params, batches, None)).of(Batches(batches).first)
    consumers = units.consumers(slots_of(graph.operators, named))
    seconds = widths if isinstance(widths, Latency) else None
    steps = _widths(units, widths if not isinstance(widths, Latency) else _grid(graph, widths))
    costs = unit_costs(units, graph, steps, seconds)
    paths = sorted({path for slot, _ in consumers.values() for path in slot.paths})
    seen = capture(fn, params, batches, leaves=paths, means=row.centred, weights=weights)
    starts: dict[str, str] = {}
    values: dict[str, list[dict[str, np.ndarray]]] = {}
    relative: dict[str, list[float]] = {}
    for name in tqdm(costs.order, desc="groups", unit="group", disable=not progress):
        slot, rows = consumers[name]
        (op,) = slot.operators
        found = list(_refitted(graph, op, rows, named, seen[op.name], steps[name], row))
        starts[name] = op.name
        values[name] = [changed for changed, _ in found]
        relative[name] = [error for _, error in found]
    labels = {name: steps[name] for name in costs.order}
    return Levels(fn, params, params, labels, values, relative, starts, costs.costs, costs.fixed, costs.coupled)


def unit_tables(
    fn: Callable[[Tree, Any], Any],
    params: Tree,
    batches: Source,
    units: Coupled,
    measured: Source,
    *,
    measure: Measure = kl,
    method: str | LayerMethod | Solver = "units",
    widths: int | Mapping[str, Sequence[int]] | Latency = 16,
    weights: Callable[[Any], Any] | None = None,
    progress: bool = True,
) -> Tables:
    """{group: what the network loses with that group alone at each width} and the costs, for `allocation.allocate`.

    `unit_levels(...)`, which says how groups are cut and what they cost, then `measured(...)` on other examples: the
    mean of `measure(outputs of params, outputs with the group cut)`, `kl` of logits, `squared` for others. What groups
    lose together is not their sum: the allocation's `error` is a prediction to be measured.
    """
    words: dict[str, Any] = {"method": method, "widths": widths, "weights": weights, "progress": progress}
    return unit_levels(fn, params, batches, units, **words).measured(measured, measure, progress=progress)


def _refitted(
    graph: Graph,
    op: Operator,
    rows: np.ndarray,
    named: Mapping[str, Any],
    seen: Statistics,
    steps: list[int],
    row: LayerMethod,
) -> Iterator[tuple[dict[str, np.ndarray], float]]:
    """(leaves, relative error) of an operator cut to each number of units of its inputs, and refitted."""
    center, size = op.to_matrix(named)[0], int(rows.max()) + 1
    center = center.astype(_tree.wide(center.dtype))
    assert seen.gram is not None
    inputs = Inputs(1.0, seen.gram[0], None, None, None if seen.mean is None else Means(seen.mean[0], None, None))
    if not np.any(np.diagonal(np.asarray(inputs.gram)) > 0):
        raise ValueError(f"batches: the inputs of '{op.name}' are zero in all batches; check the calibration data")
    after = affine(graph.program, op.uses[0], named) if row.centred and len(op.uses) == 1 else None
    inputs = inputs if after is None else inputs.centred
    objective = Reconstruction(center, Gram(inputs.gram), row.damping)
    ids = tuple(map(int, rows))
    greedy = row.solver if isinstance(row.solver, GreedyUnits) else None
    order = [] if greedy is None else greedy.order(Problem(objective, subject_to=Rows(ids, 1)))
    for width in steps:
        value = center
        if width < size:
            alive = np.ones(size + 1, bool)
            alive[[*order, *set(range(size)).difference(order)][: size - width]] = False
            mask = jnp.asarray(np.broadcast_to(alive[rows][:, None], center.shape))
            allowed, solver = (Support(mask), Polish()) if greedy and width else (Rows(ids, width), row.solver)
            value = solve(Problem(objective, subject_to=allowed), solver).value
        changed = op.to_leaves(value[None], named)
        if after is not None:
            changed |= after.moved(dict(named) | changed, inputs.intercept(center, value))
        lost, whole = objective.error(value), objective.energy
        yield {path: np.asarray(leaf) for path, leaf in changed.items()}, lost / whole if whole else 0.0


def _grid(graph: Graph, latency: Latency) -> dict[str, list[int]]:
    """The widths of a table of seconds, by the names of its groups."""
    found = graph.units()
    named = {group: found.name(group) for group in found.groups}
    return {named[group]: list(widths) for group, widths in latency.grid.items() if group in named}


def _widths(units: Coupled, widths: int | Mapping[str, Sequence[int]]) -> dict[str, list[int]]:
    found = {}
    for group in units.groups:
        if isinstance(widths, Mapping):
            if group.name not in widths:
                raise ValueError(f"widths: there are none for group '{group.name}'; name every group of units")
            each = sorted({int(w) for w in widths[group.name]})
            if not each or each[0] < 0 or each[-1] > group.size:
                raise ValueError(f"widths of '{group.name}': {each}; pass whole numbers from 0 to {group.size}")
        else:
            each = sorted({max(1, round(group.size * k / widths)) for k in range(1, widths + 1)})
        found[group.name] = each
    return found
