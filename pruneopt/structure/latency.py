"""Tables of measured seconds: each block of a network at widths on a grid, and what they say of a whole network."""

from __future__ import annotations

import itertools
import json
import math
import os
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jaxtyping import Float

from pruneopt import _store, _tree
from pruneopt.network.batches import shared_length
from pruneopt.network.readable import readable
from pruneopt.program.axes import Reader
from pruneopt.program.bottlenecks import bottlenecks
from pruneopt.program.flatten import flatten
from pruneopt.program.primitives import column
from pruneopt.program.program import Program
from pruneopt.program.rewrite import Rewritten, Rules, gone_units
from pruneopt.program.segment import closure
from pruneopt.structure.stopwatch import Compiled, device, nothing, race
from pruneopt.structure.units import Group, Units

Tree = Any
Widths = Mapping[Group, int]

_MOST = 1024  # programs that one block may ask for
_SHOWN = 6  # widths of a block that are printed


@dataclass(frozen=True, eq=False)
class Block:
    """A stretch of a network between two cuts through which one variable passes.

    groups: those whose widths its time depends on, such as what comes in and what goes out; widths: the grid of each.
    seconds: of one call, an axis a group.
    """

    name: str
    groups: tuple[Group, ...]
    widths: tuple[tuple[int, ...], ...]
    seconds: Float[np.ndarray, "..."]

    def at(self, widths: Widths) -> float:
        """Seconds at widths on the grid; of groups that are not named, whole."""
        place = [
            grid.index(widths.get(group, group.size)) for group, grid in zip(self.groups, self.widths, strict=True)
        ]
        return float(self.seconds[tuple(place)])


@dataclass(frozen=True, eq=False)
class Latency:
    """Measured seconds of the blocks of a network, and what they predict of it at other widths.

    whole: seconds of the dense network; empty: of a call that computes nothing, which is in the seconds of each block.
    size: examples of the batch, None where its arrays do not agree. device: where they were measured, in words.
    groups: those whose widths may be asked for; widths: the grid of each.
    """

    blocks: tuple[Block, ...]
    whole: float
    empty: float
    size: int | None
    device: str
    groups: tuple[Group, ...]
    widths: tuple[tuple[int, ...], ...]

    @property
    def grid(self) -> dict[Group, tuple[int, ...]]:
        """{group: its widths}."""
        return dict(zip(self.groups, self.widths, strict=True))

    @property
    def scale(self) -> float:
        """Seconds of the dense network over those of its blocks, what a call costs aside."""
        return (self.whole - self.empty) / self._sum({})

    def predict(self, widths: Widths, *, whole: float | None = None) -> float:
        """Seconds of the network with groups cut to these widths; groups that are not named stay whole.

        whole: seconds of the dense network as measured now, where the machine may run faster or slower than then.
        Raises ValueError for a group that the table does not have, or a width that is not on its grid.
        """
        grid = self.grid
        for group, width in widths.items():
            if group not in grid:
                there = ", ".join(map(_named, self.groups))
                raise ValueError(f"widths: the table has no group of {_named(group)}; there are {there}")
            if width not in grid[group]:
                known = ", ".join(map(str, grid[group]))
                raise ValueError(f"widths: {width} of {_named(group)} is not on its grid, which is {known}")
        return (self.empty + self.scale * self._sum(widths)) * (1.0 if whole is None else whole / self.whole)

    def __str__(self) -> str:
        lines = [f"measured on {self.device}; blocks times {self.scale:.3f} make the dense {1e3 * self.whole:.3f} ms"]
        for block in self.blocks:
            axes = " x ".join(_named(group) for group in block.groups) or "always"
            cells = list(itertools.product(*block.widths))
            shown = cells if len(cells) <= _SHOWN else [cells[0], cells[len(cells) // 2], cells[-1]]
            texts = [
                f"{' x '.join(map(str, cell))}: {1e3 * s:.3f}" if cell else f"{1e3 * s:.3f}"
                for cell in shown
                for s in [float(block.seconds[tuple(g.index(w) for g, w in zip(block.widths, cell, strict=True))])]
            ]
            lines.append(f"{block.name} ({axes}): {', '.join(texts)} ms" + f" of {len(cells)}" * (len(cells) > _SHOWN))
        return "\n".join(lines)

    def _sum(self, widths: Widths) -> float:
        return sum(max(0.0, block.at(widths) - self.empty) for block in self.blocks)


def latency(
    fn: Callable[[Tree, Any], Any],
    params: Tree,
    batch: Any,
    groups: Sequence[Group | str] | Mapping[Group, Sequence[int]] | Mapping[str, Sequence[int]],
    *,
    file: str | os.PathLike[str] | None = None,
    repeats: int = 30,
    limit: float = 300.0,
    clock: Callable[[], float] = time.perf_counter,
) -> Latency:
    """Measure the blocks of a network at widths on a grid, on this device and for batches of this size.

    The program is cut where the batch's way to the outputs goes through a single variable, before the next product with
    a leaf. Each block is compiled and measured alone, at all widths of the groups that it holds; equal blocks once.
    A block's seconds are the median over rounds of what it takes of the dense network's, times the dense median.

    groups: of `trace(fn, params, batch).units()`, or their names, or {group or name: widths}. By default quarters of a
        group, of 16 units or more rounded up to multiples of 8: speed moves in such steps. The whole width is always
        measured.
    file: where the table is kept. One of the same program, groups, batch and device is read and nothing is measured.
    repeats: turns of each block behind the medians, fewer (5 at least) where they would take more than `limit` seconds.
    clock: what tells seconds. Where others use the machine too, `time.process_time` in a process with one thread gives
        those that the network would take alone; give it to every figure that is compared.

    Raises ValueError for a group that is blocked or of another network, widths outside 0 to its size, a block that
    would need more than 1,024 programs, and a file of another device, another network, or that is damaged.
    """
    batch = readable(batch)
    program = flatten(fn, params, batch, unroll=False)
    units = Units(program)
    grid = _grid(units, groups)
    identity = _identity(program, grid)
    if file is not None and Path(file).exists():
        return _read(file, identity, grid)
    empty, whole = Compiled(nothing, params, batch), Compiled(fn, params, batch)
    values = dict(_tree.named_leaves(params))
    given = {var: values[path] for path, var in program.leaves.items()}
    given.update(zip(program.batch, [leaf for leaf in jax.tree.leaves(batch) if hasattr(leaf, "dtype")], strict=True))
    plans = [_Stretch(units, *ends, given) for ends in itertools.pairwise(bottlenecks(program))]
    calls: dict[Any, Callable[[], Any]] = {"whole": whole, "empty": empty}
    places = [plan.prepared(grid, calls) for plan in plans]
    measured = race(calls, repeats, limit, clock)
    seconds = {name: one.over(measured["whole"]) * measured["whole"].median for name, one in measured.items()}
    blocks = []
    for plan, place in zip(plans, places, strict=True):
        held = plan.groups(grid)
        widths = tuple(grid[group] for group in held)
        table = np.array([seconds[key] for key in place]).reshape([len(one) for one in widths])
        blocks.append(Block(plan.name, held, widths, table))
    found = Latency(
        tuple(blocks),
        seconds["whole"],
        seconds["empty"],
        shared_length(batch),
        device(),
        tuple(grid),
        tuple(grid.values()),
    )
    if file is not None:
        _write(file, identity, found)
    return found


class _Stretch:
    """What lies between two cuts of a program, as a program of its own whose inputs are what it reads."""

    def __init__(self, units: Units, start: tuple[int, ...], stop: tuple[Any, ...], given: Mapping[int, Any]):
        whole = units.rewritten({}).reader
        program = whole.program
        equations = closure(program, stop, set(start))
        made = {var for equation in equations for var in equation.outputs}
        reads = [atom for equation in equations for atom in equation.inputs if isinstance(atom, int)]
        self._inputs = tuple(v for v in dict.fromkeys(reads) if v not in made and v not in program.constants)
        self._units, self._given, self._whole, self._start = units, given, whole, start
        paths = [program.names[var] for var in self._inputs if var in program.names]
        self.name = _common(paths) or "rest"
        names = {str(i): var for i, var in enumerate(self._inputs)}
        part = replace(
            program,
            equations=equations,
            leaves=names,
            names={var: name for name, var in names.items()},
            batch=[],
            maker={},
            outputs=[atom for atom in stop if isinstance(atom, int)],
            loops=[],
            calls=[],
        )
        ids = [whole.of(var) for var in self._inputs]
        copies = {str(i): [k for k, axis in enumerate(one) if axis in whole.copies] for i, one in enumerate(ids)}
        self._rules = Rules(column("axes"), column("whole"), column("resize"))
        self._reader = Reader(part, self._rules.axes, self._rules.whole, copies)
        atoms = {atom for var in (*reads, *made) for axis in whole.of(var) for atom in whole.axes.atoms(axis)}
        self._atoms = atoms

    def groups(self, grid: Mapping[Group, tuple[int, ...]]) -> tuple[Group, ...]:
        """Those whose units its variables have."""
        return tuple(group for group in grid if self._units.atom(group) in self._atoms)

    def prepared(self, grid: Mapping[Group, tuple[int, ...]], calls: dict[Any, Callable[[], Any]]) -> list[Any]:
        """The programs at all widths of its groups, put into `calls` unless an equal one is there; their keys."""
        held = self.groups(grid)
        count = math.prod(len(grid[group]) for group in held)
        if count > _MOST:
            raise ValueError(
                f"groups: block '{self.name}' holds {len(held)} groups and would need {count} programs, more than "
                f"{_MOST}; pass fewer groups or fewer widths of each"
            )
        keys = []
        for widths in itertools.product(*(grid[group] for group in held)):
            run, inputs = self._at(dict(zip(held, widths, strict=True)))
            lowered = jax.jit(run).lower(*inputs)
            keys.append(key := lowered.as_text())
            if key not in calls:
                calls[key] = _Call(lowered.compile(), inputs)
        return keys

    def _at(self, widths: Widths) -> tuple[Callable[..., list[Any]], list[Any]]:
        """The stretch at these widths, and arrays to run it on: what was given, else of normal numbers."""
        gone = {self._units.atom(group): np.arange(group.size) >= width for group, width in widths.items()}
        cut = self._units.rewritten({atom: lost for atom, lost in gone.items() if lost.any()})
        axes, copies = self._whole.axes, self._whole.copies
        entries = [
            (f"input {i}", self._reader.leaves[str(i)][k], ~cut.left.kept(axis))
            for i, var in enumerate(self._inputs)
            for k, axis in enumerate(self._whole.of(var))
            if axis not in copies and axes.size[axis] != 1
        ]
        part = Rewritten(self._reader, gone_units(self._reader.axes, entries), self._rules)
        rng, inputs = np.random.default_rng(0), []
        for var in self._inputs:
            ids, kind = self._whole.of(var), self._whole.program.type_of(var)
            if var in self._given:
                inputs.append(cut.left.sliced(jax.numpy.asarray(self._given[var]), ids))
            else:
                inputs.append(jax.numpy.asarray(rng.standard_normal(cut.left.sizes(ids)), kind.dtype))
        return lambda *values: part({str(i): value for i, value in enumerate(values)}, ()), inputs


class _Call:
    """A compiled program and its arguments."""

    def __init__(self, compiled: Any, inputs: Sequence[Any]):
        self._compiled, self._inputs = compiled, inputs

    def __call__(self) -> Any:
        return self._compiled(*self._inputs)


def _grid(units: Units, groups: Any) -> dict[Group, tuple[int, ...]]:
    """The widths of each group that is asked for, rising."""
    grid: dict[Group, tuple[int, ...]] = {}
    known = {group: group for group in units.groups}
    for asked in groups:
        if isinstance(asked, str):
            group = units.group(asked)
        elif isinstance(asked, Group) and asked in known:
            group = known[asked]
        else:
            raise ValueError(f"groups: {asked!r:.200} is no group of fn; pass those of structure.trace(...).units()")
        if group.blocked:
            raise ValueError(f"groups: units of {_named(group)} cannot be cut: {group.blocked[0]}")
        widths = _quarters(group.size) if not isinstance(groups, Mapping) else groups[asked]
        if not all(isinstance(w, int) and 0 <= w <= group.size for w in widths):
            raise ValueError(f"groups: widths {list(widths)} of {_named(group)}; pass whole numbers, 0 to {group.size}")
        grid[group] = tuple(sorted({*widths, group.size}))
    if not grid:
        raise ValueError("groups is empty; pass groups of structure.trace(...).units() that can be cut")
    return grid


def _quarters(size: int) -> Iterable[int]:
    step = -(-size // 4) if size < 16 else -(-size // 32) * 8
    return range(step, size, step)


def _common(paths: Sequence[str]) -> str:
    """The folder that all paths share, else the first path; "" of none."""
    shared = [here[0] for here in zip(*(path.split("/")[:-1] for path in paths), strict=False) if len({*here}) == 1]
    return "/".join(shared) or "".join(paths[:1])


def _named(group: Group) -> str:
    path, axis = group.members[0]
    return f"axis {axis} of '{path}'"


def _identity(program: Program, grid: Mapping[Group, tuple[int, ...]]) -> str:
    types = [
        [path, *map(str, (program.type_of(v).shape, program.type_of(v).dtype))] for path, v in program.leaves.items()
    ]
    data = [str((program.type_of(var).shape, program.type_of(var).dtype)) for var in program.batch]
    asked = [[list(map(list, group.members)), group.size, list(widths)] for group, widths in grid.items()]
    return _store.digest([program.text(), types, data, asked])


def _write(file: Any, identity: str, table: Latency) -> None:
    order = list(table.groups)
    blocks = [{"name": block.name, "groups": [order.index(g) for g in block.groups]} for block in table.blocks]
    said = {"whole": table.whole, "empty": table.empty, "size": table.size, "blocks": blocks}
    arrays = {f"{i}": np.asarray(block.seconds, np.float64) for i, block in enumerate(table.blocks)}
    _store.write_tensors(file, arrays, {"device": table.device, "table": json.dumps(said)}, identity)


def _read(file: Any, identity: str, grid: Mapping[Group, tuple[int, ...]]) -> Latency:
    try:
        arrays, texts = _store.read_tensors(file, identity)
        said = _store.read_json(texts["table"], dict)
    except _store.Foreign as error:
        raise ValueError(
            f"file '{file}' holds no table of this network, groups and batch: {error}; pass another name"
        ) from error
    except (_store.Damaged, KeyError) as error:
        raise ValueError(f"file '{file}' is damaged: {error}; remove it, and it is measured anew") from error
    if texts["device"] != device():
        raise ValueError(f"file '{file}' was measured on {texts['device']}, this is {device()}; pass another name")
    order = list(grid)
    blocks = []
    for i, one in enumerate(said["blocks"]):
        groups = tuple(order[k] for k in one["groups"])
        blocks.append(Block(one["name"], groups, tuple(grid[g] for g in groups), arrays[str(i)]))
    return Latency(
        tuple(blocks), said["whole"], said["empty"], said["size"], texts["device"], tuple(grid), tuple(grid.values())
    )
