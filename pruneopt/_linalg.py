"""Dense kernels that solvers, constraints and checks share."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from functools import cache, partial
from pathlib import Path
from typing import Any

import jax
import jax.core
import jax.numpy as jnp
import numpy as np
import scipy.linalg
from jax import lax
from jaxtyping import Array, Bool, Float, Integer, Shaped
from threadpoolctl import ThreadpoolController

# Entries a block: large enough to hide the loop, small enough to stay in a CPU's cache. XLA writes the input
# of a large reduction to memory first; on 10^8 weights blocks are ten times faster than one reduction and
# need no temporary.
BLOCK = 1 << 20


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
    whole = n // BLOCK

    def one(start, length):
        return reduce(fn(*(lax.dynamic_slice_in_dim(x, start, length) for x in flat)))

    rest = one(whole * BLOCK, n - whole * BLOCK)
    if whole == 0:
        return rest
    return lax.fori_loop(0, whole, lambda i, total: join(total, one(i * BLOCK, BLOCK)), rest)


def is_nonzero(x: Float[Array, "..."]) -> Bool[Array, "..."]:
    """x != 0 by its bits: a comparison of floats may flush subnormal numbers to zero."""
    raw = lax.bitcast_convert_type(x, {2: jnp.uint16, 4: jnp.uint32, 8: jnp.uint64}[x.dtype.itemsize])
    return (raw << jnp.asarray(1, raw.dtype)) != 0


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


# OpenBLAS was seen to crash the process in a float64 Cholesky factor of 16,000 rows on two threads; one thread, and
# 14,000 rows, were fine. This is the power of two below.
MANY_ROWS = 8192


@contextmanager
def factoring(n: int) -> Iterator[None]:
    """One thread for the host's BLAS and LAPACK, XLA's on a CPU too, where a factor of n rows may crash several."""
    with _controller().limit(limits=1, user_api="blas") if n > MANY_ROWS else nullcontext():
        yield


def _guarded(call: Callable[..., Any]) -> Callable[..., Any]:
    """`call(matrix, ...)` under `factoring`."""

    def guarded(matrix: Any, *args: Any, **words: Any) -> Any:
        with factoring(max(np.shape(matrix)[-2:])):
            return call(matrix, *args, **words)

    return guarded


# Every factor, eigenvalue and solve of a host matrix in this package is one of these.
cholesky = _guarded(np.linalg.cholesky)  # the lower factor; raises np.linalg.LinAlgError
cholesky_solve = _guarded(lambda factor, sides: scipy.linalg.cho_solve((factor, True), sides))
triangular_solve = _guarded(partial(scipy.linalg.solve_triangular, lower=True, check_finite=False))
inverse = _guarded(np.linalg.inv)
solve = _guarded(np.linalg.solve)
eigh = _guarded(np.linalg.eigh)
eigvalsh = _guarded(np.linalg.eigvalsh)
singular_values = _guarded(partial(np.linalg.svd, compute_uv=False))


def lapack(names: tuple[str, ...], matrix: np.ndarray) -> list[Callable[..., Any]]:
    """LAPACK's routines of these names in the matrix's precision; each takes a matrix first."""
    return [_guarded(routine) for routine in scipy.linalg.get_lapack_funcs(names, (matrix,))]


@cache
def _controller() -> ThreadpoolController:
    return ThreadpoolController()


def inverse_on_host(matrix: np.ndarray) -> np.ndarray | None:
    """The inverse by Cholesky in the matrix's precision; None where it is not positive definite, to float64."""
    factor = _cholesky(matrix)
    if factor is None:
        return None
    (invert,) = lapack(("potri",), factor)
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
    (invert,) = lapack(("trtri",), factor)
    return invert(factor, lower=True, overwrite_c=True)[0]


_TILE = 256  # fits a cache on the way across the diagonal
_BELOW = np.tri(_TILE, k=-1, dtype=bool)


def _cholesky(matrix: np.ndarray) -> np.ndarray | None:
    """The lower factor; None without one."""
    (factorise,) = lapack(("potrf",), matrix)
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
