"""Which scores are the largest: exact thresholds, without a sort or a copy."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.core
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Bool, Float, Integer, Shaped, UInt

from pruneopt._linalg import BLOCK, blocked_sum


def ordered_bits(x: Float[Array, "..."]) -> UInt[Array, "..."]:
    """Unsigned integers in the order of the floats `x`; -0 equals +0, NaN counts as -inf.

    All on integers: float comparisons may flush subnormal numbers to zero.
    """
    if x.dtype.itemsize < 4:
        x = x.astype(jnp.float32)
    unsigned, bits = (jnp.uint64, 64) if x.dtype == jnp.float64 else (jnp.uint32, 32)
    sign = jnp.asarray(1 << (bits - 1), unsigned)
    infinity = lax.bitcast_convert_type(jnp.asarray(jnp.inf, x.dtype), unsigned)
    raw = lax.bitcast_convert_type(x, unsigned)
    raw = jnp.where(raw == sign, jnp.zeros((), unsigned), raw)
    raw = jnp.where((raw & ~sign) > infinity, infinity | sign, raw)
    return jnp.where(raw >= sign, ~raw, raw | sign)


def _count(rows: Float[Array, "g n"], fn: Callable[[Array], Bool[Array, "..."]]) -> UInt[Array, " g"]:
    """For each row the number of entries whose `fn` is True."""
    if rows.shape[0] == 1:
        return blocked_sum(lambda x: fn(x[None])[0].astype(jnp.uint32), rows)[None]
    return jnp.sum(fn(rows), axis=1, dtype=jnp.uint32)


def keep_largest(leaves: list[Float[Array, "..."]], count: Any) -> list[Bool[Array, "..."]]:
    """Mark the `count` largest entries over all leaves together; masks have the leaves' shapes.

    Ties are kept in the order of leaves, then of indices; -inf and NaN are never kept. Exact, without a sort or a copy
    of the leaves. Fewer than 2^32 entries. Traceable by JAX.
    """
    if all(not isinstance(leaf, jax.core.Tracer) and _is_on_cpu(leaf) for leaf in leaves):
        masks = _keep_largest_on_host([_plain(leaf) for leaf in leaves], int(count))
        return [jnp.asarray(mask.reshape(leaf.shape)) for mask, leaf in zip(masks, leaves, strict=True)]
    return _keep_largest_of_all(leaves, jnp.asarray(count, jnp.uint32))


def _is_on_cpu(leaf: Shaped[Array, "..."]) -> bool:
    return isinstance(leaf, np.ndarray) or next(iter(leaf.devices())).platform == "cpu"


def _plain(leaf: Shaped[Array, "..."]) -> np.ndarray:
    """A flat view, or for dtypes that NumPy does not know a float32 copy."""
    flat = np.asarray(leaf).reshape(-1)
    return flat if flat.dtype in (np.float32, np.float64) else flat.astype(np.float32)


@jax.jit
def _keep_largest_of_all(leaves: list[Float[Array, "..."]], count: UInt[Array, ""]) -> list[Bool[Array, "..."]]:
    wide = jnp.float64 if any(leaf.dtype == jnp.float64 for leaf in leaves) else jnp.float32
    masks = keep_largest_in_rows([leaf.astype(wide).reshape(1, -1) for leaf in leaves], count[None])
    return [mask.reshape(leaf.shape) for mask, leaf in zip(masks, leaves, strict=True)]


_SAMPLED = 1 << 15  # from so many entries on a sample pays


def _keep_largest_on_host(rows: list[np.ndarray], count: int) -> list[np.ndarray]:
    """`keep_largest` on a CPU, where nothing needs compiling.

    A sample brackets the threshold, one pass counts what lies above and collects what lies between, and only that is
    partitioned (Floyd and Rivest 1975): half the time of numpy.partition, and no copy.
    """
    n = sum(row.size for row in rows)
    if count >= n:
        return [row > -np.inf for row in rows]
    if count == 0:
        return [np.zeros(row.shape, bool) for row in rows]
    low, high = _bracket(rows, count, n) if n > _SAMPLED else (-np.inf, np.inf)
    above, between = 0, []
    for row in rows:
        for start in range(0, row.size, BLOCK):
            block = row[start : start + BLOCK]
            over = block > high
            above += np.count_nonzero(over)
            between.append(block[np.flatnonzero((block >= low) ^ over)])
    middle = np.concatenate(between)
    if not above < count <= above + middle.size:  # the sample misled: take everything
        middle, above = np.concatenate([row[~np.isnan(row)] for row in rows]), 0
    if count - above > middle.size:
        return [row > -np.inf for row in rows]
    place = middle.size - (count - above)
    threshold = np.partition(middle, place)[place]
    places = count - above - np.count_nonzero(middle > threshold)
    if places == np.count_nonzero(middle == threshold):
        return [(row >= threshold) & (row > -np.inf) if threshold == -np.inf else row >= threshold for row in rows]
    masks = []
    for row in rows:
        mask = row > threshold
        first = np.flatnonzero(row == threshold)[:places]
        mask[first] = threshold > -np.inf
        places -= first.size
        masks.append(mask)
    return masks


def _bracket(rows: list[np.ndarray], count: int, n: int) -> tuple[float, float]:
    """Values between which the `count`-th largest lies, almost surely, from a sample of a 16th, at most 2^18."""
    rng, draws = np.random.default_rng(0), min(n >> 4, 1 << 18)
    shares = np.diff(np.floor(np.cumsum([0] + [row.size for row in rows]) / n * draws).astype(int))
    drawn = [row[rng.integers(0, row.size, m)] for row, m in zip(rows, shares, strict=True) if m]
    sample = np.sort(np.concatenate(drawn))
    rank, spread = sample.size * (1 - count / n), 5 * np.sqrt(sample.size * (count / n) * (1 - count / n)) + 5
    return sample[max(0, int(rank - spread))], sample[min(sample.size - 1, int(rank + spread))]


@jax.jit
def keep_largest_in_rows(parts: list[Float[Array, "g _"]], counts: Integer[Array, " g"]) -> list[Bool[Array, "g _"]]:
    """For each g, mark the `counts[g]` largest entries of row g over all parts together, as `keep_largest` does.

    The threshold of a row is found by bisection on the bits of the floats.
    """
    counts = counts.astype(jnp.uint32)
    key_type = ordered_bits(jnp.zeros((), parts[0].dtype)).dtype
    groups = counts.shape[0]

    def at_least(key):
        return sum(_count(part, lambda x: ordered_bits(x) >= key[:, None]) for part in parts)

    # Invariant: #(key >= low) >= count > #(key >= high). A midpoint that keeps exactly `count` ends its row.
    low = jnp.zeros((groups,), key_type)
    high = jnp.full((groups,), jnp.iinfo(key_type).max, key_type)

    def narrow(state):
        low, high = state
        middle = low + (high - low) // 2
        kept = at_least(middle)
        return (
            jnp.where(kept >= counts, middle, low),
            jnp.where(kept == counts, middle + 1, jnp.where(kept > counts, high, middle)),
        )

    low, _ = lax.while_loop(lambda s: jnp.any(s[1] - s[0] > 1), narrow, (low, high))

    above = [_count(part, lambda x: ordered_bits(x) > low[:, None]) for part in parts]
    tied = [_count(part, lambda x: ordered_bits(x) == low[:, None]) for part in parts]
    places = counts - jnp.minimum(sum(above), counts)  # for the tied, in the order of parts
    masks = []
    for part, ties in zip(parts, tied, strict=True):
        here = jnp.minimum(places, ties)
        places = places - here
        end = _end_of_first(part, low, here, ties)
        key = ordered_bits(part)
        column = lax.broadcasted_iota(jnp.uint32, (1, part.shape[1]), 1)
        chosen = (key > low[:, None]) | ((key == low[:, None]) & (column < end[:, None]))
        masks.append(chosen & (part > -jnp.inf))
    return masks


def _end_of_first(
    part: Float[Array, "g n"], key: UInt[Array, " g"], wanted: UInt[Array, " g"], ties: UInt[Array, " g"]
) -> UInt[Array, " g"]:
    """The smallest column `end` such that `wanted` of the entries equal to `key` stand before it."""
    n = part.shape[1]

    def before(end):
        column = lax.broadcasted_iota(jnp.uint32, part.shape, 1)
        equal = ordered_bits(part) == key[:, None]
        return jnp.sum(equal & (column < end[:, None]), axis=1, dtype=jnp.uint32)

    def narrow(state):
        low, high = state
        middle = low + (high - low) // 2
        enough = before(middle) >= wanted
        return jnp.where(enough, low, middle + 1), jnp.where(enough, middle, high)

    all_or_none = (wanted == ties) | (wanted == 0)
    high = jnp.where(wanted == 0, 0, n).astype(jnp.uint32)
    low = jnp.where(all_or_none, high, 0).astype(jnp.uint32)
    return lax.while_loop(lambda s: jnp.any(s[0] < s[1]), narrow, (low, high))[1]
