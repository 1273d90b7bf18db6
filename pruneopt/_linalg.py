"""Dense kernels that solvers, constraints and checks share."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from functools import cache
from pathlib import Path
from typing import Any

import jax
import jax.core
import jax.numpy as jnp
import numpy as np
import scipy.linalg
from jax import lax
from jaxtyping import Array, Bool, Float, Integer, Shaped, UInt
from threadpoolctl import ThreadpoolController

# Entries a block: large enough to hide the loop, small enough to stay in a CPU's cache. XLA writes the input
# of a large reduction to memory first; on 10^8 weights blocks are ten times faster than one reduction and
# need no temporary.
_BLOCK = 1 << 20


def blocked_sum(fn: Callable[..., Shaped[Array, " n"]], *arrays: Shaped[Array, "..."]) -> Shaped[Array, ""]:
    """sum(fn(*arrays)) over all entries, for an elementwise `fn`, without a temporary of their size."""
    return _blocked(lambda values: jnp.sum(values, dtype=values.dtype), jnp.add, fn, arrays)


def blocked_max(fn: Callable[..., Shaped[Array, " n"]], *arrays: Shaped[Array, "..."]) -> Shaped[Array, ""]:
    """max(0, fn(*arrays)) over all entries, as `blocked_sum`."""
    return _blocked(lambda values: jnp.max(values, initial=0), jnp.maximum, fn, arrays)


def _blocked(
    reduce: Callable[[Array], Array],
    join: Callable[[Array, Array], Array],
    fn: Callable[..., Array],
    arrays: Sequence[Array],
) -> Shaped[Array, ""]:
    flat = [array.reshape(-1) for array in arrays]
    n = flat[0].size
    whole = n // _BLOCK

    def one(start, length):
        return reduce(fn(*(lax.dynamic_slice_in_dim(x, start, length) for x in flat)))

    rest = one(whole * _BLOCK, n - whole * _BLOCK)
    if whole == 0:
        return rest
    return lax.fori_loop(0, whole, lambda i, total: join(total, one(i * _BLOCK, _BLOCK)), rest)


def is_nonzero(x: Float[Array, "..."]) -> Bool[Array, "..."]:
    """x != 0 by its bits: a comparison of floats may flush subnormal numbers to zero."""
    raw = lax.bitcast_convert_type(x, {2: jnp.uint16, 4: jnp.uint32, 8: jnp.uint64}[x.dtype.itemsize])
    return (raw << jnp.asarray(1, raw.dtype)) != 0


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
        for start in range(0, row.size, _BLOCK):
            block = row[start : start + _BLOCK]
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


def masked_cg(
    gram: Float[Array, "n n"],
    center: Float[Array, "n m"],
    start: Float[Array, "n m"],
    support: Bool[Array, "n m"],
    steps: int | Integer[Array, ""],
    products: Any = None,
    ridge: Float[Array, ""] | None = None,
) -> tuple[Float[Array, "n m"], Float[Array, "n m"]]:
    """`steps` of conjugate gradients for min tr((W - center)^T gram (W - center)) over W on `support`.

    ridge: added to gram's diagonal.

    Each column is a system of its own, with gram's diagonal as preconditioner; one product with gram a step, rounded
    to the dtype `products` but for the first. Returns W and the residual gram (center - W), on and off the support:
    then tr((W - center)^T gram (W - center)) is <center - W, residual>. Traceable by JAX.
    """
    rounded = gram.astype(products or gram.dtype)
    zero = jnp.zeros((), gram.dtype)
    ridge = zero if ridge is None else ridge
    diagonal = jnp.diagonal(gram) + ridge
    inverse = jnp.where(diagonal > 0, 1 / jnp.where(diagonal > 0, diagonal, 1), zero)[:, None]

    def over(top, bottom):  # a column that is solved has 0 / 0
        return jnp.where(bottom > 0, top / jnp.where(bottom > 0, bottom, 1), zero)

    def step(_, state):
        w, residual, direction, size = state
        curved = rounded_matmul(rounded, direction) + ridge * direction
        length = over(size, jnp.sum(direction * curved, axis=0, keepdims=True))
        w, residual = w + length * direction, residual - length * curved
        steepest = jnp.where(support, residual, zero) * inverse
        new = jnp.sum(steepest * residual, axis=0, keepdims=True)
        return w, residual, steepest + over(new, size) * direction, new

    w = jnp.where(support, start, zero)
    residual = matmul(gram, center - w) + ridge * (center - w)
    direction = jnp.where(support, residual, zero) * inverse
    size = jnp.sum(direction * residual, axis=0, keepdims=True)
    w, residual, _, _ = lax.fori_loop(0, steps, step, (w, residual, direction, size))
    return w, residual


def matmul(a: Float[Array, "n k"], b: Float[Array, "k m"]) -> Float[Array, "n m"]:
    """a b at the highest precision."""
    return jnp.matmul(a, b, precision=lax.Precision.HIGHEST)


def rounded_matmul(a: Float[Array, "n k"], b: Float[Array, "k m"]) -> Float[Array, "n m"]:
    """a b with b rounded to a's dtype, summed in float32 where that is bfloat16."""
    if a.dtype == jnp.bfloat16:
        return jnp.matmul(a, b.astype(a.dtype), preferred_element_type=jnp.float32)
    return matmul(a, b)


@cache
def multiplies_bfloat16() -> bool:
    """Whether the default device multiplies bfloat16 matrices faster than float32: accelerators, CPUs that say so."""
    if jax.default_backend() != "cpu":
        return True
    try:
        return "avx512_bf16" in Path("/proc/cpuinfo").read_text()
    except OSError:
        return False


def largest_eigenvalue(product: Callable[[Any], Any], start: Any) -> Any:
    """Of the semidefinite matrix that `product` multiplies by, in three power iterations from (n, 1): a lower bound.

    In NumPy or JAX, as `start` is.
    """
    for _ in range(3):
        start = product(start)
        start = start / (start * start).sum() ** 0.5
    end = product(start)
    return (end * end).sum() ** 0.5


@contextmanager
def host_threads(n: int) -> Iterator[None]:
    """One thread for NumPy's and SciPy's BLAS on matrices of n rows where more would lose time.

    Each of the two libraries keeps threads that spin for a while after a call, on the cores that the other one and XLA
    need next: on two cores the layers of a small network took 1.8 times as long with them. From 2048 rows on they pay.
    """
    with _controller().limit(limits=1, user_api="blas") if n < 2048 else nullcontext():
        yield


@cache
def _controller() -> ThreadpoolController:
    return ThreadpoolController()


def inverse_on_host(matrix: np.ndarray) -> np.ndarray | None:
    """The inverse by Cholesky in the matrix's precision; None where it is not positive definite, to float64."""
    factor = _cholesky(matrix)
    if factor is None:
        return None
    (invert,) = scipy.linalg.get_lapack_funcs(("potri",), (factor,))
    inverse = invert(factor, lower=True, overwrite_c=True)[0].T  # its upper half, rows contiguous
    for start in range(0, len(inverse), _TILE):
        here, after = slice(start, start + _TILE), slice(start + _TILE, None)
        inverse[after, here] = inverse[here, after].T
        corner = inverse[here, here]
        np.copyto(corner, corner.T.copy(), where=_BELOW[: len(corner), : len(corner)])
    return inverse


def inverse_factor_on_host(matrix: np.ndarray) -> np.ndarray | None:
    """V, lower triangular, with matrix^-1 = V^T V; None as for `inverse_on_host`."""
    factor = _cholesky(matrix)
    if factor is None:
        return None
    (invert,) = scipy.linalg.get_lapack_funcs(("trtri",), (factor,))
    return invert(factor, lower=True, overwrite_c=True)[0]


_TILE = 256  # fits a cache on the way across the diagonal
_BELOW = np.tri(_TILE, k=-1, dtype=bool)


def _cholesky(matrix: np.ndarray) -> np.ndarray | None:
    """The lower factor; None without one."""
    (factorise,) = scipy.linalg.get_lapack_funcs(("potrf",), (matrix,))
    factor, failed = factorise(matrix.T, lower=True, clean=True)  # symmetric: its transpose needs no copy to columns
    if failed or np.min(np.diagonal(factor)) ** 2 <= len(matrix) * np.finfo(float).eps * np.max(np.diagonal(matrix)):
        return None
    return factor


def spd_inverse(matrix: Float[Array, "n n"]) -> Float[Array, "n n"]:
    """The inverse of a symmetric positive definite matrix, by block elimination: products alone down to blocks of 256.

    With A = [[P, Q], [Q^T, R]] and S = R - Q^T P^-1 Q: three products and two inverses of half the size. Three times
    faster than Cholesky's triangular solves on a CPU, of the same error. Traceable by JAX.
    """
    n = matrix.shape[0]
    if n <= 256:
        factor = lax.linalg.cholesky(matrix, symmetrize_input=False)
        half = lax.linalg.triangular_solve(factor, jnp.eye(n, dtype=matrix.dtype), left_side=True, lower=True)
        return matmul(half.T, half)
    k = n // 2
    first = spd_inverse(matrix[:k, :k])
    across = matmul(first, matrix[:k, k:])
    second = spd_inverse(matrix[k:, k:] - matmul(matrix[k:, :k], across))
    corner = -matmul(across, second)
    return jnp.block([[first - matmul(corner, across.T), corner], [corner.T, second]])


def inverse_factor(gram: Float[Array, "n n"]) -> Float[Array, "n n"]:
    """U = R^-1 for gram = R R^T, both upper triangular, by halves and products; NaN without a Cholesky factor.

    Half the time of a Cholesky factor and a triangular solve on a CPU.
    """
    n = gram.shape[0]
    if n <= 256:
        root = lax.linalg.cholesky(gram[::-1, ::-1], symmetrize_input=False)[::-1, ::-1]
        return lax.linalg.triangular_solve(root, jnp.eye(n, dtype=gram.dtype), left_side=True, lower=False)
    k = n // 2
    last = inverse_factor(gram[k:, k:])
    across = matmul(gram[:k, k:], last.T)
    first = inverse_factor(gram[:k, :k] - matmul(across, across.T))
    corner = -matmul(first, matmul(across, last))
    return jnp.block([[first, corner], [jnp.zeros_like(corner.T), last]])
