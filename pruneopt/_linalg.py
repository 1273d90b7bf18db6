"""Dense kernels that solvers, constraints and checks share."""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Integer, Shaped, UInt

# Entries a block: large enough to hide the loop, small enough to stay in a CPU's cache. XLA writes the input
# of a large reduction to memory first; on 10^8 weights blocks are ten times faster than one reduction and
# need no temporary.
_BLOCK = 1 << 20


def blocked_sum(fn: Callable[..., Shaped[Array, " n"]], *arrays: Shaped[Array, ...]) -> Shaped[Array, ""]:
    """sum(fn(*arrays)) over all entries, for an elementwise `fn`, without a temporary of their size."""
    flat = [array.reshape(-1) for array in arrays]
    n = flat[0].size
    whole = n // _BLOCK

    def one(start, length):
        values = fn(*(lax.dynamic_slice_in_dim(x, start, length) for x in flat))
        return jnp.sum(values, dtype=values.dtype)

    rest = one(whole * _BLOCK, n - whole * _BLOCK)
    if whole == 0:
        return rest
    return lax.fori_loop(0, whole, lambda i, total: total + one(i * _BLOCK, _BLOCK), rest)


def ordered_bits(x: Float[Array, ...]) -> UInt[Array, ...]:
    """Unsigned integers in the order of the floats `x` (-0 equals +0); NaN counts as -inf."""
    if x.dtype.itemsize < 4:
        x = x.astype(jnp.float32)
    unsigned, bits = (jnp.uint64, 64) if x.dtype == jnp.float64 else (jnp.uint32, 32)
    x = jnp.where(jnp.isnan(x), jnp.asarray(-jnp.inf, x.dtype), x)
    raw = lax.bitcast_convert_type(jnp.where(x == 0, jnp.zeros((), x.dtype), x), unsigned)
    sign = jnp.asarray(1 << (bits - 1), unsigned)
    return jnp.where(raw >= sign, ~raw, raw | sign)


def _count(rows: Float[Array, "g n"], fn: Callable[[Array], Bool[Array, ...]]) -> UInt[Array, " g"]:
    """For each row the number of entries whose `fn` is True."""
    if rows.shape[0] == 1:
        return blocked_sum(lambda x: fn(x[None])[0].astype(jnp.uint32), rows)[None]
    return jnp.sum(fn(rows), axis=1, dtype=jnp.uint32)


@jax.jit
def keep_largest(parts: list[Float[Array, "g _"]], counts: Integer[Array, " g"]) -> list[Bool[Array, "g _"]]:
    """For each g, mark the `counts[g]` largest entries of row g over all parts together.

    Ties are kept in the order of parts, then of columns; -inf (and NaN) is never kept. The threshold is found by
    bisection on the bits of the floats: exact, no sort, no copy of the scores. Fewer than 2^32 entries a row.
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
