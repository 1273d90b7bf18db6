"""The inverses of operator splitting: by LAPACK on a CPU, where that compiles nothing, by products on an accelerator."""

from __future__ import annotations

import weakref
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from pruneopt import _linalg
from pruneopt.objectives.reconstruction import Reconstruction
from pruneopt.problem import Problem
from pruneopt.solvers.base import Layer

PROBE_ERROR = 0.05  # of a factor: |A A^-1 z - z| / |z|; the iterations stand more, the metric does not


class Wanted(NamedTuple):
    """Relative damping of H, the metric's power p, and how many rhos from the first to the last."""

    damping: float
    metric: float
    rho: tuple[float, float]
    levels: int
    products: str | None


class Factors(NamedTuple):
    """scale: sqrt(s), (n, 1). rhos: (levels,). inverses: rho (A + rho I)^-1 for each, (n, n).

    s_j = (1 / [H^-1]_jj)^p H_jj^(1 - p) and A = H / sqrt(s s^T), H damped.
    """

    scale: Float[Array, "n 1"]
    rhos: np.ndarray
    inverses: tuple[Float[Array, "n n"], ...]


def factored(problem: Problem, ready: Layer, wanted: Wanted) -> tuple[Factors, dict[str, Any]]:
    """The factors in the layer's precision or, where a probe of them fails, in float64, with ten times the damping, from
    1e-6 on, until there is a Cholesky factor; those of the last call if it asked for the same of the same Gram.
    """
    f = problem.objective
    assert isinstance(f, Reconstruction)
    source, asked = f.curvature.matrix, (float(f.ridge()), wanted, ready.gram.dtype)
    if _last and _last[0]() is source and _last[1] == asked:
        return _last[2], dict(_last[3])
    _last.clear()
    dtype = products = ready.gram.dtype
    if dtype == jnp.float32 and wanted.products != "float32" and (wanted.products or _linalg.multiplies_bfloat16()):
        products = jnp.dtype(jnp.bfloat16)
    on_cpu = next(iter(ready.gram.devices())).platform == "cpu"
    found = (_on_host if on_cpu else _on_device)(ready, wanted, products, dtype)
    damping, precision = wanted.damping, dtype.name
    while found is None:
        damping = damping if precision != "float64" else max(1e-6, 10 * damping)
        precision = "float64"
        found = _on_host(ready, wanted._replace(damping=damping), products, np.dtype(np.float64))
    factors, condition = found
    facts = {"condition": condition, "factors": precision, "factor_damping": damping}
    _last[:] = [weakref.ref(source), asked, factors, facts]
    return factors, dict(facts)


_last: list[Any] = []  # one layer's inverses: what the next layer with the same inputs needs


def _rhos(wanted: Wanted, dtype: Any) -> np.ndarray:
    return np.geomspace(*wanted.rho, wanted.levels).astype(dtype)


def _probe(n: int, dtype: Any) -> np.ndarray:
    return np.where(np.arange(n) % 3 == 0, 1, -1).astype(dtype)[:, None]


def _on_host(ready: Layer, wanted: Wanted, products: Any, dtype: Any) -> tuple[Factors, float] | None:
    """The factors and the condition of the damped H; None where a factor does not exist or its probe fails."""
    gram = np.array(ready.gram, dtype)
    np.einsum("ii->i", gram)[:] += dtype.type(wanted.damping * float(ready.mean))
    factor = _linalg.inverse_factor_on_host(gram)
    if factor is None:
        return None
    probe = _probe(len(gram), dtype)

    def wrong(matrix, inverse):
        return not np.linalg.norm(matrix @ inverse(probe) - probe) <= PROBE_ERROR * np.linalg.norm(probe)

    def inverse(x):
        return factor.T @ (factor @ x)

    if wrong(gram, inverse):
        return None
    condition = _linalg.largest_eigenvalue(gram.__matmul__, probe) * _linalg.largest_eigenvalue(inverse, probe)
    s = (1 / np.einsum("ij,ij->j", factor, factor)) ** wanted.metric * np.diagonal(gram) ** (1 - wanted.metric)
    del factor
    scale = np.sqrt(s)[:, None]
    gram /= scale
    gram /= scale.T
    inverses = []
    for rho in _rhos(wanted, dtype):
        matrix = gram + rho * np.eye(len(gram), dtype=dtype)
        inverted = _linalg.inverse_on_host(matrix)
        if inverted is None or wrong(matrix, inverted.__matmul__):
            return None
        inverted *= rho
        inverses.append(jnp.asarray(inverted.astype(ready.gram.dtype, copy=False)).astype(products))
    rhos = _rhos(wanted, ready.gram.dtype)
    return Factors(jnp.asarray(scale.astype(ready.gram.dtype)), rhos, tuple(inverses)), float(condition)


def _on_device(ready: Layer, wanted: Wanted, products: Any, dtype: Any) -> tuple[Factors, float] | None:
    """`_on_host` in JAX, in the layer's precision."""
    rhos = _rhos(wanted, dtype)
    scaled, scale, condition, error = _metric(ready, wanted.damping, wanted.metric)
    inverses, errors = zip(*(_level(scaled, rho, products) for rho in rhos), strict=True)
    condition, *errors = jax.device_get((condition, error, *errors))
    return (Factors(scale, rhos, inverses), float(condition)) if max(errors) <= PROBE_ERROR else None


# One program an inverse: XLA runs several of them in one program at half the speed.
@jax.jit
def _metric(ready: Layer, damping: float, metric: float) -> tuple[Array, Array, Array, Array]:
    """A without rho, sqrt(s), the condition number of the damped Gram, and the error of its inverse on a probe."""
    gram = ready.damped(damping)
    probe = jnp.asarray(_probe(gram.shape[0], gram.dtype))
    factor = _linalg.inverse_factor(gram)  # U with U^T U the inverse: more exact than the inverse at the same cost

    def inverse(x):
        return _linalg.matmul(_linalg.matmul(factor, x).T, factor).T  # no transposed copy of the factor

    power = jnp.asarray(metric, gram.dtype)
    s = (1 / jnp.sum(factor * factor, axis=0)) ** power * jnp.diagonal(gram) ** (1 - power)
    scale = jnp.sqrt(s)[:, None]
    largest = _linalg.largest_eigenvalue(partial(_linalg.matmul, gram), probe)
    error = jnp.linalg.norm(_linalg.matmul(gram, inverse(probe)) - probe) / jnp.linalg.norm(probe)
    return gram / (scale * scale.T), scale, largest * _linalg.largest_eigenvalue(inverse, probe), error


@partial(jax.jit, static_argnums=2)
def _level(scaled: Float[Array, "n n"], rho: Float[Array, ""], products: Any) -> tuple[Array, Array]:
    """rho (A + rho I)^-1, and the error of the inverse on a probe."""
    matrix = scaled + rho * jnp.eye(scaled.shape[0], dtype=scaled.dtype)
    inverse = _linalg.spd_inverse(matrix)
    probe = jnp.asarray(_probe(matrix.shape[0], matrix.dtype))
    error = jnp.linalg.norm(_linalg.matmul(matrix, _linalg.matmul(inverse, probe)) - probe) / jnp.linalg.norm(probe)
    return (rho * inverse).astype(products), error
