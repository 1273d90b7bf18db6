"""A short refit of a pruned network window by window, for networks that are too large to differentiate whole."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from pruneopt import _tree
from pruneopt.capture.walk import fixed
from pruneopt.network.batches import Batches, Source
from pruneopt.network.leaves import Choice, is_trainable, partition
from pruneopt.plans.held_out import HeldOut, check_apart
from pruneopt.plans.levels import Measure, kl, squared
from pruneopt.plans.refine import UNCHANGED, check_effort, loss_before, recorded
from pruneopt.program.bottlenecks import bottlenecks
from pruneopt.program.segment import Segment, closure
from pruneopt.solution import Pruned
from pruneopt.solvers.descent import stepped
from pruneopt.structure.defaults import network_of
from pruneopt.structure.traced import Traced

Tree = Any
Leaves = list[Any]


@_tree.on_host
def refine_windows(
    fn: Callable[[Tree, Any], Any],
    params: Tree,
    pruned: Pruned,
    batches: Source,
    held_out: Source,
    *,
    measure: Measure = kl,
    rates: Sequence[float] = (1e-3, 3e-3),
    epochs: int = 4,
    optimizer: Callable[[optax.Schedule], optax.GradientTransformation] = optax.adam,
    trained: Choice = None,
) -> Pruned:
    """`refine`, one window after the other: min ||window(what the refitted ones before it give) - dense window||^2.

    The program is cut where all of the batch's way to the outputs goes through one variable, such as the stream between
    blocks or half blocks; the last window is fitted by `measure`. Only one window is differentiated at a time, and of
    all others one variable a batch is kept. Each rate makes all `epochs` passes over a window, and its best point on
    held_out is taken where the window's error there falls; the whole where the network's `measure` falls.

    A leaf that several windows read stays as it is. Where the whole network can be differentiated, `refine` gains more
    in the same time. Arguments and what comes back as in `refine`; the record's "windows" has (its leaves, error on
    held_out before and after, rate or None) of each.
    Source: window-wise reconstruction after pruning, 2510.14444; here found on the program.
    """
    check_effort(rates, epochs)
    clock, stream, probe = time.perf_counter(), Batches(batches), Batches(held_out, "held_out")
    notes = check_apart(stream, probe)
    held = HeldOut(fn, params, probe, measure)
    before = loss_before(held, pruned)
    traced = Traced(network_of(fn, params, batches, None), keep_derivatives=True)
    traced.of(stream.first)
    dense, now = dict(_tree.named_leaves(params)), dict(_tree.named_leaves(pruned.params))
    masks = dict(_tree.named_leaves(pruned.support))
    chosen, _ = partition(pruned.params, is_trainable if trained is None else trained)
    paths = {path for path, _ in _tree.named_leaves(chosen)}
    ways = [[_Way(traced, batch, source.weight(batch)) for batch in source] for source in (stream, probe)]
    count = len(ways[0][0].windows)
    read = [ways[0][0].reads(i) & paths for i in range(count)]
    windows = []
    for i in range(count):
        once = sorted(path for path in read[i] if sum(path in other for other in read) == 1)
        last = i == count - 1
        for way in (*ways[0], *ways[1]):
            way.enter(i, dense, now)
        fit = _Fit(ways, once, [masks.get(path) for path in once], measure if last else squared, now)
        alone = fit.lost([now[path] for path in once])
        found, after, rate = fit.best(rates, epochs, optimizer) if once else ([], alone, None)
        if after < alone:
            now |= {path: _tree.like(x, now[path]) for path, x in zip(once, found, strict=True)}
        windows.append((once, alone, min(alone, after), rate if after < alone else None))
        for way in (*ways[0], *ways[1]):
            way.leave(now)
    moved = _tree.map_named(lambda path, _: now[path], pruned.params)
    after = held.lost(moved)
    is_better = after < before
    notes += [] if is_better else [UNCHANGED]
    facts = {"method": "refine_windows", "held_out": (before, after if is_better else before), "windows": windows}
    facts |= {"seconds": time.perf_counter() - clock}
    return recorded(pruned, moved if is_better else pruned.params, facts, notes)


class _Way:
    """One batch on its way through the windows, in the dense network and in the refitted one."""

    def __init__(self, traced: Traced, batch: Any, weight: float):
        self.weight = weight
        self._program = program = traced.of(batch).program
        self.windows = list(pairwise(bottlenecks(program)))
        self._given = dict(zip(program.batch, jax.tree.leaves(batch), strict=True))
        self._dense: dict[Any, Any] = {}
        self._now: dict[Any, Any] = {}

    def reads(self, i: int) -> set[str]:
        """The leaves that a window reads."""
        segment = self._segment(i)
        return {self._program.names[v] for v in segment.inputs if v in self._program.names}

    def enter(self, i: int, dense: Mapping[str, Any], now: Mapping[str, Any]) -> None:
        """Take the window's inputs, and what the dense network makes of its own."""
        self.segment = segment = self._segment(i)
        self.at = {self._program.names[v]: k for k, v in enumerate(segment.inputs) if v in self._program.names}
        self.wanted = segment.run({v: self._value(v, self._dense, dense) for v in segment.inputs})
        self.inputs = [self._value(v, self._now, now) for v in segment.inputs]

    def leave(self, now: Mapping[str, Any]) -> None:
        """Go on with the window as it is now."""
        found = self.segment.run({v: self._value(v, self._now, now) for v in self.segment.inputs})
        self._now = dict(zip(self.segment.outputs, found, strict=True))
        self._dense = dict(zip(self.segment.outputs, self.wanted, strict=True))

    def _segment(self, i: int) -> Segment:
        start, stop = self.windows[i]
        return Segment(self._program, closure(self._program, stop, set(start)), stop)

    def _value(self, var: int, env: Mapping[Any, Any], leaves: Mapping[str, Any]) -> Any:
        if var in env:
            return env[var]
        return self._given[var] if var in self._given else fixed(self._program, var, leaves)


@dataclass(frozen=True, eq=False)
class _Fit:
    """One window: its batches to train on and held out, which leaves move, their support, and the loss."""

    ways: Sequence[Sequence[_Way]]
    paths: Sequence[str]
    support: Sequence[Any]
    measure: Measure
    now: Mapping[str, Any]

    def lost(self, leaves: Leaves) -> float:
        """The mean over held-out examples."""
        each = [_loss(way.segment, self._at(way), self.measure, leaves, way.inputs, way.wanted) for way in self.ways[1]]
        return float(np.average(np.asarray(each, np.float64), weights=[way.weight for way in self.ways[1]]))

    def best(self, rates: Any, epochs: int, optimizer: Any) -> tuple[Leaves, float, float | None]:
        """The best leaves of any rate after any pass, their loss on held-out data, and the rate."""
        found: tuple[Leaves, float, float | None] = [], math.inf, None
        for rate in rates:
            moved = _tree.widened([jnp.asarray(self.now[path]) for path in self.paths])
            schedule = optax.cosine_decay_schedule(float(rate), epochs * len(self.ways[0]))
            step = optimizer(schedule)
            state = step.init(moved)
            for _ in range(epochs):
                for way in self.ways[0]:
                    given = (moved, state, list(self.support), way.inputs, way.wanted)
                    moved, state = _step(way.segment, self._at(way), self.measure, step, *given)
                leaves = [x.astype(self.now[path].dtype) for path, x in zip(self.paths, moved, strict=True)]
                loss = self.lost(leaves)
                if loss < found[1]:
                    found = leaves, loss, float(rate)
        return found

    def _at(self, way: _Way) -> tuple[int, ...]:
        return tuple(way.at[path] for path in self.paths)


def _window(segment: Segment, at: tuple[int, ...], measure: Measure, moved: Any, inputs: Any, wanted: Any) -> jax.Array:
    given = list(inputs)
    for k, leaf in zip(at, moved, strict=True):
        given[k] = leaf
    return measure(wanted, segment.trace(given))


_loss = jax.jit(_window, static_argnums=(0, 1, 2))


@partial(jax.jit, static_argnums=(0, 1, 2, 3))
def _step(
    segment: Segment,
    at: tuple[int, ...],
    measure: Measure,
    optimizer: optax.GradientTransformation,
    moved: list[Any],
    state: Any,
    support: list[Any],
    inputs: list[Any],
    wanted: list[Any],
) -> tuple[list[Any], Any]:
    gradient = jax.grad(lambda leaves: _window(segment, at, measure, leaves, inputs, wanted))(moved)
    return stepped(optimizer, gradient, moved, state, support)
