"""What pruning changed, dense, masked and shrunk side by side: parameters, FLOPs, bytes, memory and measured time."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np

from pruneopt import _tree
from pruneopt.delivery.apply import from_masks
from pruneopt.delivery.files import stored_bytes
from pruneopt.delivery.shrink import SmallerNetwork
from pruneopt.delivery.timings import Timing, checked_sizes, foreseen, masked_by, reasons, timings
from pruneopt.network.leaves import check_like
from pruneopt.solution import Pruned
from pruneopt.structure import stopwatch
from pruneopt.structure.cost import cost
from pruneopt.structure.graph import trace
from pruneopt.structure.latency import Latency

Tree = Any

_LISTED = 20  # leaves that are printed, those with the most FLOPs


@dataclass(frozen=True)
class Row:
    """One pruned leaf: its weights, those that live, FLOPs of the products with it (None: no fn was given)."""

    path: str
    shape: tuple[int, ...]
    kept: int
    flops: int | None

    @property
    def size(self) -> int:
        """Number of weights."""
        return math.prod(self.shape)


@dataclass(frozen=True)
class Report:
    """A dense network beside what became of it.

    rows: the pruned leaves. parameters: entries of all floating arrays; kept: those that live.
    flops_dense: FLOPs of the products of fn on the batch; flops_kept: those left if every zero weight of an operator
        were skipped, what a sparse kernel could do at best; products that could not be read stay whole.
        flops_shrunk: those of the shrunk program, which are done.
    activations_dense, activations_shrunk: bytes of activations held at one time on the batch, by the program's
        equations. bytes_dense: all arrays; bytes_stored: as `save` writes them (values of the support and one bit a
        weight); bytes_shrunk: all arrays of the shrunk network.
    timings: measured, the programs of a size in turn. The masked program is the dense one with pruned weights.
    why: for each size where nothing was gained, the reason, in words.
    """

    rows: tuple[Row, ...]
    parameters: int
    kept: int
    bytes_dense: int
    bytes_stored: int
    flops_dense: int | None = None
    flops_kept: int | None = None
    flops_shrunk: int | None = None
    activations_dense: int | None = None
    activations_shrunk: int | None = None
    bytes_shrunk: int | None = None
    timings: tuple[Timing, ...] = ()
    why: tuple[str, ...] = ()

    @property
    def sparsity(self) -> float:
        """Fraction removed of the weights of the pruned leaves."""
        return 1 - sum(r.kept for r in self.rows) / sum(r.size for r in self.rows)

    def timing(self, program: str, size: int | None = None) -> Timing:
        """Of a program at a batch size; None: the first size that was measured."""
        for timing in self.timings:
            if timing.program == program and size in (None, timing.size):
                return timing
        measured = sorted({(t.program, str(t.size)) for t in self.timings})
        raise ValueError(f"nothing was measured of '{program}' at size={size}; there are {measured}")

    def __str__(self) -> str:
        width = max(10, *(len(r.path) for r in self.rows))
        lines = [f"{'leaf':<{width}} {'shape':>18} {'kept':>12} {'sparsity':>9} {'MFLOPs':>10}"]
        dearest = sorted(self.rows, key=lambda r: (r.flops or 0, r.size))[-_LISTED:]
        for r in (row for row in self.rows if row in dearest):
            shape = "x".join(map(str, r.shape))
            lines.append(
                f"{r.path:<{width}} {shape:>18} {r.kept:>12,} {1 - r.kept / r.size:>9.2%} {_mega(r.flops):>10}"
            )
        if rest := [r for r in self.rows if r not in dearest]:
            size, kept = sum(r.size for r in rest), sum(r.kept for r in rest)
            lines.append(f"and {len(rest)} smaller leaves, {kept:,} kept of {size:,}")
        lines.append(f"parameters {self.parameters:,} -> {self.kept:,}; pruned leaves at {self.sparsity:.2%}")
        shrunk = "" if self.bytes_shrunk is None else f", {self.bytes_shrunk:,} shrunk"
        lines.append(f"bytes {self.bytes_dense:,} -> {self.bytes_stored:,} stored{shrunk}")
        if self.flops_dense is not None:
            done = "" if self.flops_shrunk is None else f", {_mega(self.flops_shrunk)} shrunk"
            lines.append(f"MFLOPs {_mega(self.flops_dense)} -> {_mega(self.flops_kept)} if zeros were skipped{done}")
        if self.activations_dense is not None:
            held = "" if self.activations_shrunk is None else f" -> {self.activations_shrunk:,} shrunk"
            lines.append(f"activations {self.activations_dense:,} bytes at the peak{held}")
        return "\n".join([*lines, *self._measured(), *self.why])

    def _measured(self) -> list[str]:
        if not self.timings:
            return []
        lines = [f"measured on {stopwatch.device()}, {len(self.timings[0].seconds.rounds)} turns each:"]
        columns = "{:>6} {:8} {:>9} {:>18} {:>7} {:>14} {:>10}".format
        lines.append(columns("batch", "program", "ms", "middle half", "faster", "temporary KiB", "peak KiB"))
        for t in self.timings:
            spread = " to ".join(f"{1e3 * s:.3f}" for s in t.seconds.quartiles)
            memory = (None, None) if t.memory is None else (t.memory.temporary, t.memory.peak)
            size, ms = "given" if t.size is None else t.size, f"{1e3 * t.seconds.median:.3f}"
            told = "" if t.predicted is None else f"   {1e3 * t.predicted:.3f} ms predicted"
            lines.append(columns(size, t.program, ms, spread, f"{t.faster:.2f}", *map(_kibi, memory)) + told)
        return lines


@_tree.on_host
def report(
    fn: Callable[[Tree, Any], Any] | None,
    params: Tree,
    pruned: Pruned | SmallerNetwork,
    batch: Any = None,
    *,
    small: SmallerNetwork | None = None,
    sizes: Sequence[int] | None = None,
    repeats: int = 30,
    latency: Latency | None = None,
) -> Report:
    """What became of `params` in `pruned`, dense, masked and shrunk side by side.

    fn, batch: the network, fn(params, batch) -> arrays, and one example batch, for FLOPs and time; both or None.
    pruned: what `prune` returned, or what `shrink` did, for the masked and the shrunk network; small: what `shrink`
        returned, beside a `Pruned`.
    sizes: numbers of examples to measure with, 1, 32 and 256 by default; those of the batch, the first axis of all its
        arrays, are taken again and again or in part. (): the batch as it is, which is the default where its arrays do
        not agree on their first axis.
    repeats: calls of each program behind the medians, fewer (5 at least) where a size would take longer than 10
        seconds; 0 measures nothing.
    latency: a table of `structure.latency`, whose prediction is told beside what was measured of the shrunk program.

    Time is that of a call of the compiled program, from Python to results that are ready, the programs of a size in
    turn. Temporary memory is as the compiler laid it out. Peak memory is measured on a CPU under Linux where 32 MiB
    or more are temporary: what one warm call adds to the most that the process held at once, and its arguments; that
    mark of the process is set back for it.

    Raises ValueError where `pruned` is not of the same structure as `params`, where only one of fn and batch is given,
    for sizes of a batch whose arrays do not agree on their first axis, and where fn cannot be run at a size.
    """
    if (fn is None) != (batch is None):
        raise ValueError(f"fn and batch: only {'batch' if fn is None else 'fn'} given; pass both, or neither")
    pruned, small = _given(params, pruned, small)
    check_like(pruned.params, params, "pruned")
    if not isinstance(repeats, int) or repeats < 0:
        raise ValueError(f"repeats={repeats!r} is not a whole number >= 0; pass the calls behind each median")
    shapes = dict(_tree.named_leaves(pruned.support))
    graph = None if fn is None else trace(fn, params, batch)
    work = None if graph is None else cost(graph, pruned.support)
    cut = None if small is None or fn is None else cost(trace(small.fn, small.params, batch))
    rows = tuple(
        Row(path, mask.shape, _tree.kept(mask), None if work is None else work.by_leaf.get(path, 0))
        for path, mask in shapes.items()
    )
    arrays = [leaf for leaf in jax.tree.leaves(params) if _tree.is_array(leaf)]
    parameters = sum(math.prod(a.shape) for a in arrays if np.dtype(a.dtype).kind not in "biu")
    measured: tuple[Timing, ...] = ()
    if fn is not None and repeats:
        measured = timings(fn, params, pruned.params, small, batch, checked_sizes(batch, sizes), repeats)
        if latency is not None and small is not None and graph is not None:
            measured = foreseen(measured, latency, graph, small)
    return Report(
        rows,
        parameters,
        parameters - sum(r.size - r.kept for r in rows),
        sum(a.nbytes for a in arrays),
        stored_bytes(pruned),
        None if work is None else work.flops,
        None if work is None else work.alive_flops,
        None if cut is None else cut.flops,
        None if work is None else work.activation_bytes,
        None if cut is None else cut.activation_bytes,
        None if small is None else sum(a.nbytes for a in jax.tree.leaves(small.params) if _tree.is_array(a)),
        measured,
        () if work is None or not measured else reasons(measured, work, small, cut),
    )


def _given(params: Tree, pruned: Any, small: Any) -> tuple[Pruned, SmallerNetwork | None]:
    """The masked and the shrunk network that were given, in either way."""
    if isinstance(pruned, SmallerNetwork) and small is None:
        return from_masks(pruned.expand(), masked_by(pruned)), pruned
    if not isinstance(pruned, Pruned):
        raise TypeError(f"pruned is a {type(pruned).__name__}; pass what prune or shrink returned")
    if small is not None and not isinstance(small, SmallerNetwork):
        raise TypeError(f"small is a {type(small).__name__}; pass what shrink returned")
    return pruned, small


def _mega(flops: int | None) -> str:
    return "-" if flops is None else f"{flops / 1e6:.3f}"


def _kibi(size: int | None) -> str:
    return "-" if size is None else f"{size / 1024:,.0f}"
