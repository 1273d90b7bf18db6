"""Measured time and memory of compiled programs: calls in turn, medians with their spread, batches of any size."""

from __future__ import annotations

import contextlib
import ctypes
import os
import platform
import re
import statistics
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np

from pruneopt.network.batches import shared_length
from pruneopt.network.leaves import combine, is_floating, partition
from pruneopt.network.readable import readable

Tree = Any

_FEWEST = 5  # rounds, however long they take
_TURN = 1e-3  # seconds of a turn at least: shorter calls are repeated in it
_RESOLVED = 32 << 20  # bytes: smaller buffers need not go back to the system, and the next call takes them again
_STATUS = Path("/proc/self/status")


@dataclass(frozen=True)
class Seconds:
    """Seconds of one call, by rounds in which every program had its turn."""

    rounds: tuple[float, ...]

    @property
    def median(self) -> float:
        """The middle one."""
        return statistics.median(self.rounds)

    @property
    def quartiles(self) -> tuple[float, float]:
        """Between them lies the middle half of the rounds."""
        low, _, high = np.quantile(self.rounds, (0.25, 0.5, 0.75))
        return float(low), float(high)

    def over(self, other: Seconds) -> float:
        """The median over rounds of this one's seconds over the other's: what slows the machine slows both."""
        return statistics.median(a / b for a, b in zip(self.rounds, other.rounds, strict=True))


def race(
    calls: Mapping[Any, Callable[[], Any]],
    rounds: int,
    limit: float = 10.0,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[Any, Seconds]:
    """Seconds of each call, warmed, in turn and each round from another first one; a turn is one call, or the mean of
    as many as fill a millisecond.

    limit: seconds after which no further round begins, once there were 5. clock: what tells seconds.
    """
    names, found, times = list(calls), {name: [] for name in calls}, {}
    for name, call in calls.items():
        jax.block_until_ready(call())
        times[name] = min(100, max(1, round(_TURN / max(1e-9, _turn(call, 1, time.perf_counter)))))
    begun = time.perf_counter()
    for i in range(rounds):
        if i >= _FEWEST and time.perf_counter() - begun > limit:
            break
        for name in names[i % len(names) :] + names[: i % len(names)]:
            found[name].append(_turn(calls[name], times[name], clock))
    return {name: Seconds(tuple(seconds)) for name, seconds in found.items()}


def _turn(call: Callable[[], Any], times: int, clock: Callable[[], float]) -> float:
    begun = clock()
    for _ in range(times):
        jax.block_until_ready(call())
    return (clock() - begun) / times


@dataclass(frozen=True)
class Memory:
    """Bytes of one compiled program on its device.

    arguments, outputs, temporary: as the compiler laid out its buffers. peak: measured, the arguments and by how much
        one warm call raised the most that the process held at once; None where the system does not tell (only Linux
        does, for a CPU) or less than 32 MiB are temporary, which an allocator may keep.
    """

    arguments: int
    outputs: int
    temporary: int
    peak: int | None


class Compiled:
    """fn(params, batch) as one compiled program with its arguments; calling it runs it once."""

    def __init__(self, fn: Callable[[Tree, Any], Any], params: Tree, batch: Any):
        chosen, rest = partition(params, is_floating)
        self._arguments = jax.tree.map(_on_device, (chosen, rest, readable(batch)))
        self._run = _called.lower(_hashable(fn), *self._arguments).compile()  # JAX keeps what it compiled for an fn

    def __call__(self) -> Any:
        """Run it once."""
        return self._run(*self._arguments)

    def with_params(self, params: Tree) -> Callable[[], Any]:
        """The same program on other weights of the same shapes."""
        chosen, rest = partition(params, is_floating)
        arguments = (*jax.tree.map(_on_device, (chosen, rest)), self._arguments[2])
        return lambda: self._run(*arguments)

    def memory(self) -> Memory | None:
        """What it takes, where the compiler tells. Runs it where the peak can be measured."""
        counted = self._run.memory_analysis()
        if counted is None:
            return None
        resolved = counted.temp_size_in_bytes >= _RESOLVED and jax.default_backend() == "cpu"
        rise, arguments = _rise(self) if resolved else None, counted.argument_size_in_bytes
        return Memory(
            arguments,
            counted.output_size_in_bytes,
            counted.temp_size_in_bytes,
            None if rise is None else arguments + rise,
        )


@partial(jax.jit, static_argnums=0, keep_unused=True)
def _called(fn: Any, chosen: Tree, rest: Any, batch: Any) -> Any:
    return fn(combine(chosen, rest), batch)


def _hashable(fn: Any) -> Any:
    try:
        hash(fn)
    except TypeError:
        return lambda params, batch: fn(params, batch)
    return fn


def nothing(params: Tree, batch: Any) -> Any:
    """A function that computes nothing: what a call with its arguments costs by itself."""
    return jax.numpy.zeros(())


def resized(batch: Any, size: int) -> Any:
    """A batch of `size` examples: those of `batch`, the first axis of its arrays, again and again or the first ones.

    Raises ValueError where its arrays do not agree on that axis, so that it is a guess which one holds the examples.
    """
    n = shared_length(batch := readable(batch))
    if n is None:
        raise ValueError(
            f"sizes: the first axes of the batch's arrays differ, so that which of them hold its examples is a guess; "
            f"pass sizes=() for the batch as it is, or close fn over what examples share ({size} examples were asked)"
        )
    return jax.tree.map(lambda leaf: leaf[np.arange(size) % n] if np.ndim(leaf) else leaf, batch)


def device() -> str:
    """The device that JAX computes on, in words: kind, threads that a CPU may use, version of JAX."""
    kind = jax.devices()[0].device_kind
    if jax.default_backend() == "cpu":
        with contextlib.suppress(OSError):
            kind = (re.findall(r"model name\s*:\s*(.+)", Path("/proc/cpuinfo").read_text()) or [platform.processor()])[
                0
            ]
        threads = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
        kind = f"{kind}, {threads} threads"
    return f"{kind}, jax {jax.__version__}"


def _on_device(leaf: Any) -> Any:
    return jax.device_put(leaf) if isinstance(leaf, np.ndarray) else leaf


def _rise(call: Callable[[], Any]) -> int | None:
    """Bytes by which a call raises the most that this process held at once, by Linux's mark of it, set back before."""
    if not sys.platform.startswith("linux"):
        return None
    rises = []
    try:
        for _ in range(3):
            jax.block_until_ready(call())
            time.sleep(0.01)  # buffers are given back a moment after their call
            ctypes.CDLL(None).malloc_trim(0)  # else the next call takes what this one left
            Path("/proc/self/clear_refs").write_text("5")
            before = _status("VmRSS")
            jax.block_until_ready(call())
            rises.append(_status("VmHWM") - before)
        return max(0, *rises)
    except (OSError, AttributeError, LookupError):
        return None


def _status(key: str) -> int:
    return 1024 * int(re.findall(rf"{key}:\s+(\d+) kB", _STATUS.read_text())[0])
