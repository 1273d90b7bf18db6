"""What pruning changed: parameters, FLOPs, bytes and measured latency, dense beside pruned."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import numpy as np

from pruneopt import _tree
from pruneopt.delivery.files import stored_bytes
from pruneopt.network.leaves import Rest, check_like, combine, is_floating, partition
from pruneopt.network.readable import readable
from pruneopt.solution import Pruned
from pruneopt.structure.cost import cost
from pruneopt.structure.graph import trace

Tree = Any


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
    """A dense network beside its pruned form.

    rows: the pruned leaves. parameters: entries of all floating arrays; kept: those that live.
    flops_dense: FLOPs of the products of fn on the batch; flops_kept: those left if every zero weight of an operator
        were skipped, what a sparse kernel could do at best; products that could not be read stay whole.
    bytes_dense: all arrays; bytes_stored: as `save` writes them (values of the support and one bit a weight).
    seconds_dense, seconds_pruned: medians of interleaved calls of the same compiled program with dense and with pruned
        weights; the zeros are multiplied like any other number. None: not measured.
    """

    rows: tuple[Row, ...]
    parameters: int
    kept: int
    bytes_dense: int
    bytes_stored: int
    flops_dense: int | None = None
    flops_kept: int | None = None
    seconds_dense: float | None = None
    seconds_pruned: float | None = None

    @property
    def sparsity(self) -> float:
        """Fraction removed of the weights of the pruned leaves."""
        return 1 - sum(r.kept for r in self.rows) / sum(r.size for r in self.rows)

    def __str__(self) -> str:
        width = max(10, *(len(r.path) for r in self.rows))
        lines = [f"{'leaf':<{width}} {'shape':>18} {'kept':>12} {'sparsity':>9} {'MFLOPs':>10}"]
        for r in self.rows:
            work = "-" if r.flops is None else f"{r.flops / 1e6:.3f}"
            shape = "x".join(map(str, r.shape))
            lines.append(f"{r.path:<{width}} {shape:>18} {r.kept:>12,} {1 - r.kept / r.size:>9.2%} {work:>10}")
        lines.append(f"parameters {self.parameters:,} -> {self.kept:,}; pruned leaves at {self.sparsity:.2%}")
        lines.append(f"bytes {self.bytes_dense:,} -> {self.bytes_stored:,} stored")
        if self.flops_dense is not None and self.flops_kept is not None:
            lines.append(f"MFLOPs {self.flops_dense / 1e6:.3f} -> {self.flops_kept / 1e6:.3f} if zeros were skipped")
        if self.seconds_dense is not None and self.seconds_pruned is not None:
            lines.append(
                f"latency {1e3 * self.seconds_dense:.3f} ms dense, {1e3 * self.seconds_pruned:.3f} ms pruned "
                f"(measured; {jax.default_backend()}; zeros are multiplied like any number)"
            )
        return "\n".join(lines)


@_tree.on_host
def report(
    fn: Callable[[Tree, Any], Any] | None,
    params: Tree,
    pruned: Pruned,
    batch: Any = None,
    *,
    repeats: int = 30,
) -> Report:
    """What became of `params` in `pruned`.

    fn, batch: the network, fn(params, batch) -> arrays, and one example batch, for FLOPs and latency; both or None.
    repeats: calls of each network, in turn, behind the medians; 0 measures no latency.
    Raises ValueError where `pruned` is not of the same structure as `params`, or only one of fn and batch is given.
    """
    if (fn is None) != (batch is None):
        raise ValueError(f"fn and batch: only {'batch' if fn is None else 'fn'} given; pass both, or neither")
    if not isinstance(pruned, Pruned):
        raise TypeError(f"pruned is a {type(pruned).__name__}; pass what prune returned")
    check_like(pruned.params, params, "pruned")
    if not isinstance(repeats, int) or repeats < 0:
        raise ValueError(f"repeats={repeats!r} is not a whole number >= 0; pass the calls behind each median")
    shapes = dict(_tree.named_leaves(pruned.support))
    work = None if fn is None else cost(trace(fn, params, batch), pruned.support)
    rows = tuple(
        Row(path, mask.shape, _tree.kept(mask), None if work is None else work.by_leaf.get(path, 0))
        for path, mask in shapes.items()
    )
    arrays = [leaf for leaf in jax.tree.leaves(params) if _tree.is_array(leaf)]
    parameters = sum(math.prod(a.shape) for a in arrays if np.dtype(a.dtype).kind not in "biu")
    cut = sum(r.size - r.kept for r in rows)
    timed = _latency(fn, params, pruned.params, batch, repeats) if fn is not None and repeats else (None, None)
    return Report(
        rows,
        parameters,
        parameters - cut,
        sum(a.nbytes for a in arrays),
        stored_bytes(pruned),
        None if work is None else work.flops,
        None if work is None else work.alive_flops,
        *timed,
    )


@partial(jax.jit, static_argnums=0)
def _run(fn: Any, chosen: Tree, rest: Rest, batch: Any) -> Any:
    return fn(combine(chosen, rest), batch)


def _latency(fn: Any, dense: Tree, pruned: Tree, batch: Any, repeats: int) -> tuple[float, float]:
    (a, rest), (b, _) = partition(dense, is_floating), partition(pruned, is_floating)
    batch = readable(batch)
    seconds: tuple[list[float], list[float]] = ([], [])
    for w in (a, b):
        jax.block_until_ready(_run(fn, w, rest, batch))
    for _ in range(repeats):
        for w, times in zip((a, b), seconds, strict=True):
            clock = time.perf_counter()
            jax.block_until_ready(_run(fn, w, rest, batch))
            times.append(time.perf_counter() - clock)
    return statistics.median(seconds[0]), statistics.median(seconds[1])
