"""A short refit of a pruned network window by window, for networks that are too large to differentiate whole."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
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
from pruneopt.plans.levels import Measure, kl, squared
from pruneopt.plans.refine import check_apart, check_effort
from pruneopt.program.bottlenecks import bottlenecks
from pruneopt.program.segment import Segment, closure
from pruneopt.solution import Pruned
from pruneopt.structure.defaults import network_of
from pruneopt.structure.traced import Traced

Tree = Any
Leaves = dict[str, Any]


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
    traced = Traced(network_of(fn, params, batches, None), keep_derivatives=True)
    traced.of(stream.first)
    dense, now = dict(_tree.named_leaves(params)), dict(_tree.named_leaves(pruned.params))
    masks = dict(_tree.named_leaves(pruned.support))
    chosen, _ = partition(pruned.params, is_trainable if trained is None else trained)
    paths = {path for path, _ in _tree.named_leaves(chosen)}
    ways = [[_Way(traced, batch) for batch in source] for source in (stream, probe)]
    count = len(ways[0][0].windows)
    read = [ways[0][0].reads(i) & paths for i in range(count)]
    windows = []
    for i in range(count):
        once = sorted(path for path in read[i] if sum(path in other for other in read) == 1)
        last = i == count - 1
        for way in (*ways[0], *ways[1]):
            way.enter(i, dense, now)
        fit = _Fit(ways, once, {p: masks.get(p, True) for p in once}, measure if last else squared, now)
        before = fit.lost({path: now[path] for path in once})
        found, after, rate = fit.best(rates, epochs, optimizer) if once else ({}, before, None)
        if after < before:
            now |= {path: _tree.like(found[path].astype(now[path].dtype), now[path]) for path in once}
        windows.append((once, before, min(before, after), rate if after < before else None))
        for way in (*ways[0], *ways[1]):
            way.leave(now)
    moved = _tree.map_named(lambda path, _: now[path], pruned.params)
    run, of = jax.jit(fn), jax.jit(measure)
    sizes = [probe.weight(batch) for batch in probe]

    def lost(tree: Tree) -> float:
        return float(np.average([float(of(run(params, b), run(tree, b))) for b in probe], weights=sizes))

    before, after = lost(pruned.params), lost(moved)
    is_better = after < before
    record = {"stage": len(pruned.history), "method": "refine_windows", "held_out": (before, min(before, after))}
    record |= {"windows": windows, "seconds": time.perf_counter() - clock}
    notes += [] if is_better else ["the loss on held_out did not fall: nothing was changed"]
    record |= {"notes": notes} if notes else {}
    last_record = pruned.history[-1] if pruned.history else {}
    record = {k: last_record[k] for k in ("layers", "scope") if k in last_record} | record
    return replace(pruned, params=moved if is_better else pruned.params, history=[*pruned.history, record])


class _Way:
    """One batch on its way through the windows, in the dense network and in the refitted one."""

    def __init__(self, traced: Traced, batch: Any):
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
        self._now = dict(
            zip(
                self.segment.outputs,
                self.segment.run({v: self._value(v, self._now, now) for v in self.segment.inputs}),
                strict=True,
            )
        )
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
    """One window: its batches to train on and held out, which leaves move, their masks, and the loss."""

    ways: Sequence[Sequence[_Way]]
    paths: Sequence[str]
    masks: Mapping[str, Any]
    measure: Measure
    now: Mapping[str, Any]

    def lost(self, leaves: Leaves) -> float:
        """The mean over held-out batches."""
        given = [leaves[path] for path in self.paths]
        losses = [
            _loss(way.segment, self._at(way), self.measure, given, way.inputs, way.wanted) for way in self.ways[1]
        ]
        return float(np.mean(np.asarray(losses, np.float64)))

    def best(self, rates: Any, epochs: int, optimizer: Any) -> tuple[Leaves, float, float | None]:
        """The best leaves of any rate after any pass, their loss on held-out data, and the rate."""
        wide = lambda x: jnp.asarray(x).astype(_tree.wide(x.dtype))  # noqa: E731
        found: tuple[Leaves, float, float | None] = {}, math.inf, None
        masks = [jnp.asarray(self.masks[path]) for path in self.paths]
        for rate in rates:
            moved = [wide(self.now[path]) for path in self.paths]
            schedule = optax.cosine_decay_schedule(float(rate), epochs * len(self.ways[0]))
            step = optimizer(schedule)
            state = step.init(moved)
            for _ in range(epochs):
                for way in self.ways[0]:
                    given = (moved, state, masks, way.inputs, way.wanted)
                    moved, state = _step(way.segment, self._at(way), self.measure, step, *given)
                leaves = dict(zip(self.paths, moved, strict=True))
                loss = self.lost({path: x.astype(self.now[path].dtype) for path, x in leaves.items()})
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
    masks: list[Any],
    inputs: list[Any],
    wanted: list[Any],
) -> tuple[list[Any], Any]:
    masked = lambda xs: [jnp.where(m, x, jnp.zeros((), x.dtype)) for x, m in zip(xs, masks, strict=True)]  # noqa: E731
    gradient = jax.grad(lambda leaves: _window(segment, at, measure, leaves, inputs, wanted))(moved)
    step, state = optimizer.update(masked(gradient), state, moved)
    return masked(optax.apply_updates(moved, step)), state
