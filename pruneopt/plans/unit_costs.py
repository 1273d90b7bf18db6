"""What coupled units cost: FLOPs, parameters, bytes, activations, measured seconds at each width of each group."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from pruneopt.constraints.coupled import Coupled
from pruneopt.program.forms import PRODUCTS
from pruneopt.structure.cost import product_flops
from pruneopt.structure.graph import Graph
from pruneopt.structure.latency import Latency

Widths = Mapping[str, Sequence[int]]


class Costs(NamedTuple):
    """order: the groups so that those of one product are neighbours; the rest as `allocation.Tables` has it."""

    order: list[str]
    costs: dict[str, dict[str, Any]]
    fixed: dict[str, float]
    coupled: dict[str, dict[tuple[str, str], Any]]


def unit_costs(units: Coupled, graph: Graph, widths: Widths, seconds: Latency | None) -> Costs:
    """The tables of all resources: an amount in which groups have an axis each scales with the product of their widths.

    Raises ValueError for amounts of three groups or more, for pairs that are no chain, and for a table of seconds that
    does not fit the groups.
    """
    sizes = {group.name: group.size for group in units.groups}
    found = _Sums(widths)
    share = {name: np.array(widths[name]) / sizes[name] for name in sizes}
    for resource, amount, groups in _amounts(units, graph):
        table: Any = amount
        for group in groups:
            table = np.multiply.outer(table, share[group])
        found.add(resource, table, groups)
    for groups, table in () if seconds is None else _seconds(units, graph, widths, seconds):
        found.add("seconds", table, groups)
    return found.ordered(list(sizes))


class _Sums:
    """Costs summed by resource and by the groups that they depend on."""

    def __init__(self, widths: Widths):
        self._widths = widths
        self._sums: dict[tuple[str, tuple[str, ...]], Any] = {}

    def add(self, resource: str, table: Any, groups: Sequence[str]) -> None:
        """An axis of the table for each group."""
        if len(groups) > 2:
            raise ValueError(f"units: groups {', '.join(sorted(groups))} meet in one array; leave one of them out")
        order = sorted(groups)
        table = np.asarray(table, float)
        table = table if list(groups) == order else table.T
        key = resource, tuple(order)
        self._sums[key] = self._sums.get(key, 0.0) + table

    def ordered(self, names: Sequence[str]) -> Costs:
        """With the groups in an order in which pairs are neighbours."""
        order = _chain(names, {frozenset(groups) for _, groups in self._sums if len(groups) == 2})
        resources = list(dict.fromkeys(resource for resource, _ in self._sums))
        found = Costs(order, {r: {} for r in resources}, dict.fromkeys(resources, 0.0), {r: {} for r in resources})
        for (resource, groups), table in self._sums.items():
            if not groups:
                found.fixed[resource] += float(table)
            elif len(groups) == 1:
                found.costs[resource][groups[0]] = table
            else:
                a, b = sorted(groups, key=order.index)
                found.coupled[resource][a, b] = table if (a, b) == groups else table.T
        return found


def _amounts(units: Coupled, graph: Graph) -> list[tuple[str, float, tuple[str, ...]]]:
    """(resource, amount, the groups along whose axes it lies)."""
    found = graph.units()
    reader, program = found.reader, found.reader.program
    names = {found.name(group): found.atom(group) for group in found.groups}
    group_of = {names[group.name]: group.name for group in units.groups if group.name in names}

    def groups(*atoms: Any) -> tuple[str, ...]:
        axes = [axis for atom in atoms for axis in reader.of(atom)]
        return tuple(dict.fromkeys(group_of[a] for x in axes for a in reader.axes.atoms(x) if a in group_of))

    amounts: list[tuple[str, float, tuple[str, ...]]] = [
        ("flops", op.flops, groups(*(program.leaves[p] for p in op.paths))) for op in graph.operators
    ]
    for equation in program.equations:
        if equation.primitive.name in PRODUCTS and not any(map(program.is_parametric, equation.inputs[:2])):
            amounts.append(("flops", product_flops(program, equation), groups(*equation.inputs[:2])))
    for var in program.leaves.values():
        kind = program.shapes[var]
        size, is_number = math.prod(kind.shape), jnp.issubdtype(kind.dtype, jnp.inexact)
        amounts.append(("parameters", size if is_number else 0, groups(var)))
        amounts.append(("bytes", size * kind.dtype.itemsize, groups(var)))
    copies = {v for e in program.equations if e.primitive.name == "copy" for v in e.outputs}
    for var in program.data - copies:
        kind = program.shapes[var]
        amounts.append(("activations", math.prod(kind.shape) * kind.dtype.itemsize, groups(var)))
    return amounts


def _seconds(units: Coupled, graph: Graph, widths: Widths, table: Latency) -> list[tuple[tuple[str, ...], Any]]:
    """(groups, seconds at their widths) of each block; what every call costs and what no group changes, without any.

    Raises ValueError for groups or widths that the table does not have.
    """
    found = graph.units()
    name = {group: found.name(group) for group in found.groups}
    known = {name.get(group): grid for group, grid in table.grid.items()}
    for group in units.groups:
        if group.name not in known:
            raise ValueError(f"latency: it has no seconds of group '{group.name}'; measure it: structure.latency(...)")
        if off := [w for w in widths[group.name] if w not in known[group.name]]:
            raise ValueError(
                f"latency: widths {off} of group '{group.name}' are not on its grid, {list(known[group.name])}"
            )
    mine = {group.name for group in units.groups}
    rows: list[tuple[tuple[str, ...], Any]] = [((), table.empty)]
    for block in table.blocks:
        at = np.maximum(np.asarray(block.seconds, float) - table.empty, 0.0) * table.scale
        groups = []
        for axis, (group, grid) in reversed(list(enumerate(zip(block.groups, block.widths, strict=True)))):
            if name.get(group) in mine:
                groups.insert(0, name[group])
                at = np.take(at, [grid.index(w) for w in widths[name[group]]], axis)
            else:
                at = np.take(at, grid.index(group.size), axis)
        rows.append((tuple(groups), at))
    return rows


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
