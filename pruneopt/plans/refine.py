"""A short refit of a pruned network towards the dense one's outputs, stopped and judged on examples set aside."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from pruneopt import _tree
from pruneopt.network.batches import Batches, Source
from pruneopt.network.leaves import Choice, Rest, combine, is_trainable, partition
from pruneopt.plans.held_out import HeldOut, check_apart
from pruneopt.plans.levels import Measure, kl
from pruneopt.solution import Pruned
from pruneopt.solvers.descent import stepped

Tree = Any
UNCHANGED = "the loss on held_out did not fall: nothing was changed"


@_tree.on_host
def refine(
    fn: Callable[[Tree, Any], Any],
    params: Tree,
    pruned: Pruned,
    batches: Source,
    held_out: Source,
    *,
    measure: Measure = kl,
    rates: Sequence[float] = (3e-3, 1e-2),
    epochs: int = 4,
    optimizer: Callable[[optax.Schedule], optax.GradientTransformation] = optax.adam,
    trained: Choice = None,
) -> Pruned:
    """min over weights on the support of the mean of measure(outputs of params, outputs of the pruned network).

    One step of `optimizer` a batch, `epochs` passes, the rate on a cosine to zero. Each rate makes the first pass; the
    one that then has the least loss on `held_out` goes on. What comes back is the best point of any, after any pass, on
    `held_out`: never worse there than `pruned`, which it is where nothing was better, and says so.

    fn: the network as it is evaluated, of params and a batch; statistics of norms do not move. params: the dense ones.
    pruned: what any plan returned. batches: many different examples are worth more than many passes over few.
    held_out: other examples. measure: `kl` of logits, `squared` for others, or your own.
    optimizer: of a schedule of the rate. trained: which leaves move; by default all floating arrays but running
        statistics, embeddings, biases and norms too. Half-precision weights move in float32.
    Returns the Pruned, with one more record in its history: "held_out" before and after, "rate", the "losses" on
    held_out after each pass at each rate, "notes" where training diverged or changed nothing.
    Raises ValueError for rates or epochs that are none, a `held_out` most of which is among `batches`, and a measure
    that is not finite before any step.
    """
    check_effort(rates, epochs)
    clock, stream, probe = time.perf_counter(), Batches(batches), Batches(held_out, "held_out")
    notes = check_apart(stream, probe)
    held = HeldOut(fn, params, probe, measure)
    before = loss_before(held, pruned)
    task = _Task(fn, params, pruned, held, measure, trained)
    total = epochs * sum(1 for _ in stream)
    runs = {float(rate): _Run(task, optimizer(optax.cosine_decay_schedule(float(rate), total))) for rate in rates}
    for run in runs.values():
        run.go(stream)
    rate = min(runs, key=lambda r: runs[r].losses[-1])
    for _ in range(epochs - 1):
        if not math.isfinite(runs[rate].losses[-1]):
            break
        runs[rate].go(stream)
    after, best = min((run.best for run in runs.values()), key=lambda pair: pair[0])
    notes += [f"training diverged at a rate of {r:g}" for r, run in runs.items() if not np.all(np.isfinite(run.losses))]
    is_better = after < before
    notes += [] if is_better else [UNCHANGED]
    facts = {"method": "refine", "held_out": (before, after if is_better else before), "rate": rate}
    facts |= {"losses": {r: run.losses for r, run in runs.items()}, "seconds": time.perf_counter() - clock}
    return recorded(pruned, task.whole(best) if is_better else pruned.params, facts, notes)


class _Task:
    """What every run shares: the networks, the support of what moves, and held-out data."""

    def __init__(
        self,
        fn: Callable[[Tree, Any], Any],
        params: Tree,
        pruned: Pruned,
        held: HeldOut,
        measure: Measure,
        trained: Choice,
    ):
        self.fn, self.dense, self.measure, self.held = fn, params, measure, held
        self._pruned = pruned
        chosen, self.rest = partition(pruned.params, is_trainable if trained is None else trained)
        self.start = _tree.widened(jax.tree.map(jnp.asarray, chosen))
        masks = dict(_tree.named_leaves(pruned.support))
        self.support = _tree.map_named(lambda path, _: masks.get(path), self.start)

    def whole(self, moved: Tree) -> Tree:
        """All of params with these leaves, in the dtypes and on the devices that they had."""
        named = dict(_tree.named_leaves(moved))
        back = lambda path, x: _tree.like(named[path].astype(x.dtype), x) if path in named else x  # noqa: E731
        return _tree.map_named(back, self._pruned.params)


class _Run:
    """One optimiser on its way; losses: on held-out data after each pass. best: (loss, leaves)."""

    def __init__(self, task: _Task, optimizer: optax.GradientTransformation):
        self._task, self._optimizer = task, optimizer
        self._moved, self._state = task.start, optimizer.init(task.start)
        self.losses: list[float] = []
        self.best: tuple[float, Tree] = (math.inf, task.start)

    def go(self, stream: Batches) -> None:
        """A pass."""
        task = self._task
        for batch in stream:
            given = (task.dense, task.rest, batch, task.support)
            self._moved, self._state = _step(task.fn, task.measure, self._optimizer, self._moved, self._state, *given)
        loss = task.held.lost(task.whole(self._moved))
        self.losses.append(loss if math.isfinite(loss) else math.inf)
        if self.losses[-1] < self.best[0]:
            self.best = self.losses[-1], self._moved


@partial(jax.jit, static_argnums=(0, 1, 2))
def _step(
    fn: Callable[[Tree, Any], Any],
    measure: Measure,
    optimizer: optax.GradientTransformation,
    moved: Tree,
    state: Any,
    dense: Tree,
    rest: Rest,
    batch: Any,
    support: Tree,
) -> tuple[Tree, Any]:
    def loss(leaves: Tree) -> jax.Array:
        return measure(jax.lax.stop_gradient(fn(dense, batch)), fn(combine(leaves, rest), batch))

    return stepped(optimizer, jax.grad(loss)(moved), moved, state, support)


def loss_before(held: HeldOut, pruned: Pruned) -> float:
    """The loss of `pruned`. Raises ValueError where it is not finite."""
    before = held.lost(pruned.params)
    if not math.isfinite(before):
        raise ValueError(f"measure: it is {before} on held_out before any step; check the network and the data")
    return before


def check_effort(rates: Sequence[float], epochs: int) -> None:
    """Raise ValueError unless there are rates > 0 and a pass."""
    if not len(rates) or not all(0 < float(rate) < math.inf for rate in rates):
        raise ValueError(f"rates={rates!r}: pass numbers > 0, such as (0.003, 0.01)")
    if isinstance(epochs, bool) or not hasattr(epochs, "__index__") or epochs < 1:
        raise ValueError(f"epochs={epochs!r} is not a whole number >= 1; pass the number of passes to make")


def recorded(pruned: Pruned, values: Tree, facts: Mapping[str, Any], notes: Sequence[str]) -> Pruned:
    """`pruned` with other values on its support, and one more record in its history."""
    last = pruned.history[-1] if pruned.history else {}
    record = {k: last[k] for k in ("layers", "scope") if k in last} | {"stage": len(pruned.history)} | dict(facts)
    record |= {"notes": list(notes)} if notes else {}
    return replace(pruned, params=values, history=[*pruned.history, record])
