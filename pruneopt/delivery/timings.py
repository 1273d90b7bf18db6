"""Dense, masked and shrunk programs measured side by side at several batch sizes, and why one gained nothing."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from pruneopt import _tree
from pruneopt.delivery.shrink import SmallerNetwork
from pruneopt.network.batches import shared_length
from pruneopt.network.leaves import is_floating
from pruneopt.structure.cost import Cost
from pruneopt.structure.graph import Graph
from pruneopt.structure.latency import Latency
from pruneopt.structure.stopwatch import Compiled, Memory, Seconds, nothing, race, resized

Tree = Any

SIZES = (1, 32, 256)
_GAINED = 1.05  # times faster; less is told from nothing by no reader
_STEADY = 0.1  # by how much the same program may differ from itself
_LANES = 8  # numbers that a vector unit takes at once, at least


@dataclass(frozen=True)
class Timing:
    """One program at one batch size.

    size: examples (None: the batch as it was given). program: "dense", "masked" or "shrunk". seconds: of a call.
    faster: the dense program's seconds over this one's, the median over rounds. memory: what it takes. empty: seconds
        of a call with the dense program's arguments that computes nothing. predicted: seconds by a table of this size,
        scaled to the dense program as it was measured here; None without one, or off its grid.
    """

    size: int | None
    program: str
    seconds: Seconds
    faster: float
    memory: Memory | None
    empty: Seconds
    predicted: float | None = None


def checked_sizes(batch: Any, sizes: Sequence[int] | None) -> tuple[int | None, ...]:
    """The numbers of examples to measure with; None: the batch as it is."""
    if sizes is None:
        return SIZES if shared_length(batch) else (None,)
    if not all(isinstance(n, int) and n >= 1 for n in sizes):
        raise ValueError(f"sizes={sizes!r}: pass numbers of examples, whole and 1 or more")
    return tuple(dict.fromkeys(sizes)) or (None,)


def timings(
    fn: Callable[[Tree, Any], Any],
    dense: Tree,
    masked: Tree,
    small: SmallerNetwork | None,
    batch: Any,
    sizes: Sequence[int | None],
    repeats: int,
) -> tuple[Timing, ...]:
    """Of every program at every size."""
    found: list[Timing] = []
    for size in sizes:
        examples = batch if size is None else resized(batch, size)
        try:
            programs = {"dense": Compiled(fn, dense, examples)}
        except (TypeError, ValueError) as error:
            if size is None:
                raise
            raise ValueError(
                f"sizes: fn cannot be run with {size} examples: {str(error).splitlines()[0]}; pass sizes that it "
                "takes, or () for the batch as it is"
            ) from error
        if small is not None:
            programs["shrunk"] = Compiled(small.fn, small.params, examples)
        empty = Compiled(nothing, dense, examples)
        calls = {"dense": programs["dense"], "masked": programs["dense"].with_params(masked), **programs}
        seconds = race({**calls, "empty": empty}, repeats)
        memory = {name: program.memory() for name, program in programs.items()}
        memory["masked"] = memory["dense"]
        found += [
            Timing(size, name, seconds[name], seconds["dense"].over(seconds[name]), memory[name], seconds["empty"])
            for name in calls
        ]
    return tuple(found)


def foreseen(found: Sequence[Timing], table: Latency, graph: Graph, small: SmallerNetwork) -> tuple[Timing, ...]:
    """`found` with what the table predicts of the shrunk program.

    Raises ValueError where the table has groups that the network of `graph` does not have.
    """
    units, widths = graph.units(), {}
    known = {group: group for group in units.groups}
    for asked in table.grid:
        if asked not in known:
            raise ValueError("latency: the table is of another network; pass one of structure.latency(fn, params, ...)")
        (path, axis), *_ = asked.members
        left = small.kept[path][axis] if path in small.kept else np.arange(units.type_of(path).shape[axis])
        widths[asked] = int(np.isin(units.places(known[asked], path, axis), left).any(axis=1).sum())
    if any(width not in table.grid[group] for group, width in widths.items()):
        return tuple(found)
    dense = {timing.size: timing.seconds.median for timing in found if timing.program == "dense"}
    return tuple(
        replace(timing, predicted=table.predict(widths, whole=dense[timing.size]))
        if timing.program == "shrunk" and timing.size in (None, table.size)
        else timing
        for timing in found
    )


def reasons(found: Sequence[Timing], work: Cost, small: SmallerNetwork | None, cut: Cost | None) -> tuple[str, ...]:
    """Why a masked or a shrunk program gained nothing, a sentence each.

    work: the dense network's cost, with what is alive in it; cut: the shrunk one's.
    """
    dead = [r for r in work.rows if r.alive_in < r.problems * r.n_in or r.alive_out < r.problems * r.n_out]
    said = ["masked gains nothing: zeros are multiplied like any number"]
    if small is None:
        said[0] += (
            f"; {len(dead)} of {len(work.rows)} operators lost whole inputs or outputs, which shrink may cut"
            if dead
            else ", and no operator lost a whole input or output that could be cut"
        )
    by_reason: dict[str, list[str]] = {}
    for timing in found:
        if timing.program == "shrunk" and timing.faster < _GAINED:
            assert small is not None
            assert cut is not None
            at = "this batch" if timing.size is None else f"batch {timing.size}"
            by_reason.setdefault(_reason(timing, work, small, cut), []).append(at)
    unsteady = max(abs(timing.faster - 1) for timing in found if timing.program == "masked")
    if unsteady > _STEADY:
        said.append(f"the machine was busy: dense and masked, one program, differ by {unsteady:.0%}; measure again")
    said += [f"shrunk gains nothing at {' and '.join(at)}: {reason}" for reason, at in by_reason.items()]
    return tuple(said)


def _reason(timing: Timing, work: Cost, small: SmallerNetwork, cut: Cost) -> str:
    if not small.kept:
        return "no whole unit went, so that it is the masked program"
    if timing.empty.median > 0.5 * timing.seconds.median:
        return "the network is too small, most of a call's time is that of a call that computes nothing"
    less = work.flops / max(1, cut.flops)
    if less < 1.1:
        return f"the units that went had {100 - 100 / less:.2g} % of the FLOPs"
    whole = dict(_tree.named_leaves(small.expand()))
    widths = {
        len(left)
        for path, every in small.kept.items()
        for left, n in zip(every, whole[path].shape, strict=True)
        if len(left) < n
    }
    odd = sorted(n for n in widths if n % _LANES)
    held = work.activation_bytes / max(1, cut.activation_bytes)
    return (
        f"FLOPs fell {less:.2f} times, but activations, which are read and written, {held:.2f} times"
        + f", and the widths {', '.join(map(str, odd[:4]))} are no multiples of {_LANES}" * bool(odd)
    )


def masked_by(small: SmallerNetwork) -> Tree:
    """{path: which entries are left} of the leaves that were cut, or of all arrays where none was."""
    masks = {}
    for path, leaf in _tree.named_leaves(small.expand()):
        if path in small.kept or (not small.kept and is_floating(path, leaf)):
            masks[path] = np.zeros(leaf.shape, bool)
            masks[path][np.ix_(*small.kept[path]) if path in small.kept else ...] = True
    return masks
