"""What each width of each group of coupled units costs, and what the network loses with that group alone cut."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from tqdm import tqdm

from pruneopt import _tree
from pruneopt.allocation.tables import Tables
from pruneopt.capture.affine import affine
from pruneopt.capture.calibration import Inputs, Means
from pruneopt.capture.onwards import Onwards
from pruneopt.capture.statistics import Statistics, capture
from pruneopt.constraints.coupled import Coupled, Rows, called
from pruneopt.constraints.support import Support
from pruneopt.curvature.gram import Gram
from pruneopt.network.batches import Batches, Source
from pruneopt.objectives.reconstruction import Reconstruction
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
    method: str | LayerMethod | Solver = "units",
    widths: int | Mapping[str, Sequence[int]] | Latency = 16,
    weights: Callable[[Any], Any] | None = None,
    progress: bool = True,
) -> Tables:
    """{group: the error of each width}, and what each width costs, for `allocation.allocate`.

    One pass over the dense network: for each width of each group the operator that consumes it alone chooses its units
    and is refitted, as `method` says, and the network is measured from there on. With `GreedyUnits` the supports of a
    group are nested: one elimination serves all widths. What several groups lose together is not the sum of what each
    loses alone; the allocation's `error` is a prediction to be measured.

    batches: for the Grams. units: which groups, as `constraints.coupled` found them; its budget is not read. measured:
        other examples, on which `measure(outputs before, outputs after)` is taken, a mean over each batch: `kl` of
        logits, `squared` for others.
    method: its solver, damping and centring. widths: of each group, or how many steps to take from the whole group down
        to one unit; 0 is a group without units, such as a residual branch that goes whole. A table of measured seconds
        of these groups (`structure.latency`) gives its grid, and "seconds" for its batch among the costs.
    weights: of the positions in the Grams, as in `layerwise`.
    Costs: "flops" as `structure.cost` counts, "parameters", "bytes" of the arrays of params, "activations": bytes of
    all arrays that depend on the batch, for the first batch. Those of groups that meet in one array are products of
    their widths: groups are ordered so that those are neighbours.
    Raises ValueError where they are not a chain, where a group has no single consumer, for widths that the group does
    not have, inputs that are all zero, and a measure that is not finite.
    """
    row, stream, probe = layer_row(method), Batches(batches), Batches(measured, "measured")
    network = network_of(fn, params, batches, None)
    traced, named = Traced(network), dict(_tree.named_leaves(params))
    graph = traced.of(next(iter(stream)))
    consumers = units.consumers(slots_of(graph.operators, named))
    seconds = widths if isinstance(widths, Latency) else None
    steps = _widths(units, widths if not isinstance(widths, Latency) else _grid(graph, widths))
    costs = unit_costs(units, graph, steps, seconds)
    paths = sorted({path for slot, _ in consumers.values() for path in slot.paths})
    seen = capture(fn, params, batches, leaves=paths, means=row.centred, weights=weights)
    of, errors = jax.jit(measure), dict[str, list[float]]()
    before = [jax.block_until_ready(jax.jit(fn)(params, batch)) for batch in probe]
    sizes = [probe.weight(batch) for batch in probe]
    for group in tqdm(units.groups, desc="groups", unit="group", disable=not progress):
        slot, rows = consumers[group.name]
        (op,) = slot.operators
        onwards = [Onwards(traced.of(batch), op.name, batch, named) for batch in probe]
        errors[group.name] = []
        for width, changed in _refitted(graph, op, rows, named, seen[op.name], steps[group.name], row):
            found = [float(of(a, after.outputs(changed))) for a, after in zip(before, onwards, strict=True)]
            if not np.all(np.isfinite(found)):
                raise ValueError(f"measure: it is {found} for group '{group.name}' of width {width}; repair it")
            errors[group.name].append(max(float(np.average(found, weights=sizes)), 0.0))
    return Tables(
        {name: errors[name] for name in costs.order},
        costs.costs,
        {name: steps[name] for name in costs.order},
        costs.fixed,
        costs.coupled,
    )


def _refitted(
    graph: Graph,
    op: Operator,
    rows: np.ndarray,
    named: Mapping[str, Any],
    seen: Statistics,
    steps: list[int],
    row: LayerMethod,
) -> Iterator[tuple[int, dict[str, Any]]]:
    """(width, all leaves) with an operator cut to each number of units of its inputs, and refitted."""
    center, size = op.to_matrix(named)[0], int(rows.max()) + 1
    center = center.astype(_tree.wide(center.dtype))
    assert seen.gram is not None
    inputs = Inputs(1.0, seen.gram[0], None, None, None if seen.mean is None else Means(seen.mean[0], None, None))
    after = affine(graph.program, op.uses[0], named) if row.centred and len(op.uses) == 1 else None
    inputs = inputs if after is None else inputs.centred
    if not np.any(np.diagonal(np.asarray(inputs.gram)) > 0):
        raise ValueError(f"batches: the inputs of '{op.name}' are zero in all batches; check the calibration data")
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
        changed = dict(named) | op.to_leaves(value[None], named)
        yield width, changed if after is None else changed | after.moved(changed, inputs.intercept(center, value))


def _grid(graph: Graph, latency: Latency) -> dict[str, list[int]]:
    """The widths of a table of seconds, by the names of its groups."""
    found = graph.units()
    named = {group: called(found, group) for group in found.groups}
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
