"""Which entries of which leaves a unit owns, and what its scores come to."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float


@dataclass(frozen=True, eq=False)
class Members:
    """Units of one group. places: {(path, axis): for each entry of that axis its unit, -1 for none}."""

    name: str
    size: int
    places: Mapping[tuple[str, int], np.ndarray]

    def __repr__(self) -> str:
        return f"{self.name}: {self.size} units in {len(self.places)} axes"


def pooled(group: Members, named: Mapping[str, Any], only: int | None = None) -> Float[Array, " units"]:
    """The sum of scores over what each unit owns; +inf if any is, -inf if all are."""
    total = jnp.zeros(group.size)
    keep, some = jnp.zeros(group.size, bool), jnp.zeros(group.size, bool)
    for (path, axis), places in group.places.items():
        if path not in named or (only is not None and axis != only):
            continue
        scores = jnp.asarray(named[path])
        rest = tuple(k for k in range(scores.ndim) if k != axis)
        finite = jnp.where(jnp.isfinite(scores), scores, jnp.zeros((), scores.dtype)).sum(rest)
        owner = np.where(places >= 0, places, group.size)
        add = lambda x, owner=owner: jax.ops.segment_sum(x, owner, group.size + 1)[:-1]  # noqa: E731
        total = total + add(finite).astype(total.dtype)
        keep |= add(jnp.any(scores == jnp.inf, axis=rest).astype(jnp.int32)) > 0
        some |= add(jnp.any(scores > -jnp.inf, axis=rest).astype(jnp.int32)) > 0
    return jnp.where(keep, jnp.inf, jnp.where(some, total, -jnp.inf))


def in_runs(scores: Float[Array, " units"], run: int) -> Float[Array, " runs"]:
    """Sums of scores, the largest first, in runs of so many; what must live makes its whole run live."""
    rest = -len(scores) % run
    rows = jnp.pad(scores, (0, rest)).reshape(-1, run)
    keep, gone = jnp.any(rows == jnp.inf, axis=1), jnp.any(rows == -jnp.inf, axis=1)
    total = jnp.sum(jnp.where(jnp.isfinite(rows), rows, 0.0), axis=1)
    return jnp.where(keep, jnp.inf, jnp.where(gone, -jnp.inf, total))
