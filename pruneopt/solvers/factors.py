"""The inverses of operator splitting: by LAPACK on a CPU, which compiles nothing, by products on an accelerator."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from pruneopt import _linalg
from pruneopt.objectives.prepared import Layer
from pruneopt.objectives.reconstruction import Reconstruction
from pruneopt.problem import Problem

_KEPT = 2  # times the memory of H and W: the most that inverses take from one call to the next
_LEAST_DAMPING = 1e-6  # about ten roundings of float32: the least that moves the eigenvalues of such a Gram
PROBE_ERROR = 0.05  # of a factor: |A A^-1 z - z| / |z|; the iterations stand more, the metric does not


class Wanted(NamedTuple):
    """Relative damping of H, the density and floor of the metric and its blocks, how many rhos from first to last."""

    damping: float
    density: float
    floor: float
    metric_block: int | None
    rho: tuple[float, float]
    levels: int
    products: str | None


class Factors(NamedTuple):
    """scale: sqrt(s), (n, 1). rhos: (levels,). inverses: rho (A + rho I)^-1 for each, (n, n), in the dtype `products`.

    A = H / sqrt(s s^T), H damped. What removing input j costs where a random part d of the others, the density, is kept
    and refitted lies between the Schur complement 1 / [H^-1]_jj of all of them (d = 1) and H_jj of none (d = 0). With
    D = diag(H) and g = (1 - d) / sqrt(d): s_j = 1 / [(H + g D)^-1]_jj - g D_j, at least a floor of D_j, the inverse
    that of the diagonal blocks where they are wanted. The inverses can be gone through once.
    """

    scale: Float[Array, "n 1"]
    rhos: np.ndarray
    products: Any
    inverses: Iterable[Float[Array, "n n"]]


def factored(problem: Problem, ready: Layer, wanted: Wanted) -> tuple[Factors, dict[str, Any]]:
    """In the layer's precision or, where a probe of a factor fails, in float64, with ten times the damping, from
    `_LEAST_DAMPING` on, until there is a Cholesky factor.

    Inverses that take up to twice the memory of H and W are kept with the Gram for the next call on it, which gets them
    if it asks for the same; larger ones are made one at a time.
    """
    f = problem.objective
    assert isinstance(f, Reconstruction)
    kept, asked = f.curvature.kept, (f.exact_ridge(), wanted._replace(rho=tuple(wanted.rho)), ready.gram.dtype)
    if asked not in kept:
        kept.clear()
        factors, facts = _factored(ready, wanted)
        n, m = ready.center.shape
        if wanted.levels * n > _KEPT * (n + m):
            return factors, facts
        kept[asked] = factors._replace(inverses=tuple(factors.inverses)), facts
    factors, facts = kept[asked]
    return factors, dict(facts)


def _factored(ready: Layer, wanted: Wanted) -> tuple[Factors, dict[str, Any]]:
    """`factored`, whose inverses can be gone through once."""
    products = dtype = ready.gram.dtype
    if dtype == jnp.float32 and wanted.products != "float32" and (wanted.products or _linalg.multiplies_bfloat16()):
        products = jnp.dtype(jnp.bfloat16)
    on_cpu = next(iter(ready.gram.devices())).platform == "cpu"
    damping, precision = wanted.damping, dtype.name
    found = (_metric_on_host if on_cpu else _metric_on_device)(ready, wanted, damping, dtype)
    while found is None:
        damping = damping if precision != "float64" else max(_LEAST_DAMPING, 10 * damping)
        precision = "float64"
        found = _metric_on_host(ready, wanted, damping, np.dtype(np.float64))
    scaled, scale, condition = found
    facts = {"condition": condition, "factors": precision, "factor_damping": damping}
    rhos = np.geomspace(*wanted.rho, wanted.levels).astype(dtype)
    invert: Any = _inverse_on_host if isinstance(scaled, np.ndarray) else _inverse_on_device
    inverses = (jnp.asarray(invert(scaled, rho), dtype).astype(products) for rho in rhos)
    return Factors(jnp.asarray(scale, dtype), rhos, products, inverses), facts


def _probe(n: int, dtype: Any) -> np.ndarray:
    return np.where(np.arange(n) % 3 == 0, 1, -1).astype(dtype)[:, None]


def _is_wrong(matrix: np.ndarray, inverse: Callable[[np.ndarray], np.ndarray]) -> bool:
    probe = _probe(len(matrix), matrix.dtype)
    return not np.linalg.norm(matrix @ inverse(probe) - probe) <= PROBE_ERROR * np.linalg.norm(probe)


def _blocks(n: int, most: int | None) -> list[slice]:
    """n inputs in the fewest runs of about equal length, at most `most`."""
    count = 1 if most is None else -(-n // most)
    ends = [n * i // count for i in range(count + 1)]
    return [slice(*ends[i : i + 2]) for i in range(count)]


def _spread(density: float) -> float:
    """g of `Factors`: how much of its diagonal H gains where a random part of the inputs alone is kept."""
    return (1 - density) / density**0.5


def _metric_on_host(ready: Layer, wanted: Wanted, damping: float, dtype: Any) -> tuple[Any, Any, float] | None:
    """A, sqrt(s) and the condition number of H + g D; None where a factor does not exist or its probe fails."""
    gram = np.array(ready.gram, dtype)
    np.einsum("ii->i", gram)[:] += dtype.type(damping * float(ready.mean))
    probe, blocks = _probe(len(gram), dtype), _blocks(len(gram), wanted.metric_block)
    noise = dtype.type(_spread(wanted.density)) * np.diagonal(gram)
    removed, smallest = [], []  # 1 / [(H + g D)^-1]_jj, and the inverse of each block's smallest eigenvalue
    for at in blocks:
        noisy = gram[at, at].copy()
        np.einsum("ii->i", noisy)[:] += noise[at]
        factor = _linalg.inverse_factor_on_host(noisy)
        if factor is None:
            return None

        def inverse(x, factor=factor):
            return factor.T @ (factor @ x)

        if _is_wrong(noisy, inverse):
            return None
        removed.append(1 / np.einsum("ij,ij->j", factor, factor))
        smallest.append(_linalg.largest_eigenvalue(inverse, probe[at]))
    condition = _linalg.largest_eigenvalue(lambda x: gram @ x + noise[:, None] * x, probe) * max(smallest)
    s = np.maximum(np.concatenate(removed) - noise, dtype.type(wanted.floor) * np.diagonal(gram))
    scale = np.sqrt(s)[:, None]
    gram /= scale
    gram /= scale.T
    return gram, scale, float(condition)


def inverted(
    gram: Float[np.ndarray, "n n"], mean: float, damping: float
) -> tuple[Float[np.ndarray, "n n"], Float[np.ndarray, "n n"], float]:
    """(inverse, damped Gram, damping) of H + damping * mean I in float64; times ten until it has a factor."""
    eye = np.eye(len(gram))
    while (inverse := _linalg.inverse_on_host(damped := gram + damping * mean * eye)) is None:
        damping = max(1e-8, 10 * damping)
    return inverse, damped, damping


def _inverse_on_host(scaled: np.ndarray, rho: float) -> np.ndarray:
    """rho (A + rho I)^-1, in float64 where its probe fails."""
    matrix = scaled.copy()
    np.einsum("ii->i", matrix)[:] += matrix.dtype.type(rho)
    inverse = _linalg.inverse_on_host(matrix)
    if inverse is None or _is_wrong(matrix, inverse.__matmul__):
        assert matrix.dtype != np.float64  # A is positive definite
        return _inverse_on_host(scaled.astype(np.float64), rho)
    inverse *= matrix.dtype.type(rho)
    return inverse


def _metric_on_device(ready: Layer, wanted: Wanted, damping: float, dtype: Any) -> tuple[Any, Any, float] | None:
    """`_metric_on_host` in JAX, in the layer's precision."""
    scaled, scale, condition, error = _metric(
        ready, damping, _spread(wanted.density), wanted.floor, wanted.metric_block
    )
    return (scaled, scale, float(condition)) if float(error) <= PROBE_ERROR else None


def _inverse_on_device(scaled: Float[Array, "n n"], rho: float) -> Any:
    """`_inverse_on_host` in JAX, in the layer's precision."""
    inverse, error = _level(scaled, rho)
    return inverse if float(error) <= PROBE_ERROR else _inverse_on_host(np.asarray(scaled, np.float64), rho)


# One program an inverse: XLA runs several of them in one program at half the speed.
@partial(jax.jit, static_argnums=4)
def _metric(
    ready: Layer, damping: float, spread: float, floor: float, block: int | None
) -> tuple[Array, Array, Array, Array]:
    """A without rho, sqrt(s), the condition number of H + g D, and the largest error of an inverse on a probe."""
    gram = ready.damped(damping)
    noise = jnp.asarray(spread, gram.dtype) * jnp.diagonal(gram)
    probe = jnp.asarray(_probe(gram.shape[0], gram.dtype))
    removed, smallest, errors = [], [], []
    for at in _blocks(gram.shape[0], block):
        noisy = gram[at, at] + jnp.diag(noise[at])
        factor = _linalg.inverse_factor(noisy)  # U with U^T U the inverse, and more exact at the same cost

        def inverse(x, factor=factor):
            return _linalg.matmul(_linalg.matmul(factor, x).T, factor).T  # no transposed copy of the factor

        removed.append(1 / jnp.sum(factor * factor, axis=0))
        smallest.append(_linalg.largest_eigenvalue(inverse, probe[at]))
        error = jnp.linalg.norm(_linalg.matmul(noisy, inverse(probe[at])) - probe[at])
        errors.append(error / jnp.linalg.norm(probe[at]))
    s = jnp.maximum(jnp.concatenate(removed) - noise, jnp.asarray(floor, gram.dtype) * jnp.diagonal(gram))
    scale = jnp.sqrt(s)[:, None]
    largest = _linalg.largest_eigenvalue(lambda x: _linalg.matmul(gram, x) + noise[:, None] * x, probe)
    condition = largest * jnp.max(jnp.stack(smallest))
    return gram / (scale * scale.T), scale, condition, jnp.max(jnp.stack(errors))


@jax.jit
def _level(scaled: Float[Array, "n n"], rho: Float[Array, ""]) -> tuple[Array, Array]:
    """rho (A + rho I)^-1, and the error of the inverse on a probe."""
    matrix = scaled + rho * jnp.eye(scaled.shape[0], dtype=scaled.dtype)
    inverse = _linalg.spd_inverse(matrix)
    probe = jnp.asarray(_probe(matrix.shape[0], matrix.dtype))
    error = jnp.linalg.norm(_linalg.matmul(matrix, _linalg.matmul(inverse, probe)) - probe) / jnp.linalg.norm(probe)
    return rho * inverse, error
