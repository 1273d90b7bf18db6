"""When a transformation acts: every so many steps from one step to another."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np


def check_steps(name: str, value: Any, least: int = 0) -> None:
    """Raise ValueError unless `value` is a whole number of steps, at least `least`."""
    if isinstance(value, bool) or not hasattr(value, "__index__") or value < least:
        raise ValueError(f"{name}={value!r} is not a whole number >= {least}; pass a number of steps")


@dataclass(frozen=True)
class Interval:
    """The steps begin, begin + every, begin + 2 every, ..., and `end` itself, the last; steps count from 0.

    Methods are traceable in `step`, an int32 scalar.
    """

    begin: int
    end: int
    every: int

    def __post_init__(self) -> None:
        for name, least in (("begin", 0), ("end", self.begin), ("every", 1)):
            check_steps(name, getattr(self, name), least)

    @property
    def stages(self) -> int:
        """How many steps act."""
        return -(-(self.end - self.begin) // self.every) + 1

    def is_due(self, step: jax.Array) -> jax.Array:
        """Whether `step` acts."""
        regular = (step >= self.begin) & (step < self.end) & ((step - self.begin) % self.every == 0)
        return regular | (step == self.end)

    def stage(self, step: jax.Array) -> jax.Array:
        """The number, from 0, of the last step that acted, clipped to what exists."""
        whole = (jnp.minimum(step, self.end) - self.begin) // self.every
        return jnp.clip(jnp.where(step >= self.end, self.stages - 1, whole), 0, self.stages - 1)

    def fraction(self, step: jax.Array, dtype: np.dtype) -> jax.Array:
        """How much of the way from begin to end is done, in [0, 1]."""
        done = (step - self.begin).astype(dtype) / max(self.end - self.begin, 1)
        return jnp.clip(done, 0, 1)

    def cubic(self) -> list[float]:
        """For each stage the fraction of the removals made after it, 1 - (1 - t)^3 for t from 0 to 1.

        Source: Zhu and Gupta 2017, equation 1. The first stage already removes a little, so that none is idle.
        """
        n = self.stages
        return [1 - (1 - (i + 1) / n) ** 3 for i in range(n - 1)] + [1.0]
