"""A layer's reconstruction and its constraint made ready for a solver: in good units, what f does not see set aside."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Bool, Float

from pruneopt import _linalg, _tree
from pruneopt.constraints.base import Constraint
from pruneopt.objectives.reconstruction import Reconstruction


class Layer(NamedTuple):
    """A reconstruction made ready, in float32, or float64 for float64 weights.

    gram: H + ridge I times a power of two that brings the mean of its live diagonal to [1, 2); the rows and
        columns of dead inputs are those of the identity, so that H is no more singular for them.
    center: W0 times a power of two that brings its largest entry to [1, 2); zero in dead rows. unit: that power.
    dead: inputs that f does not see, (H + ridge I)_jj = 0. If all are dead the Gram says nothing: it is then the
        identity and nothing is dead, which makes the problem magnitude pruning. blank: whether that is so.
    gone: the dead inputs whose weights go and cost no budget: all of them, or none where the constraint cannot do
        without (a floor above what else may live, a mask that lets nothing else live).
    mean: of H's live diagonal without the ridge, in the same units; what relative damping refers to.
    """

    gram: Float[Array, "n n"]
    center: Float[Array, "n m"]
    dead: Bool[Array, " n"]
    gone: Bool[Array, " n"]
    blank: Bool[Array, ""]
    mean: Float[Array, ""]
    unit: Float[Array, ""]

    def scores(self, scores: Float[Array, "n m"]) -> Float[Array, "n m"]:
        """Scores >= 0 with the weights of dead inputs last: cut, or below all others where they count."""
        last = jnp.where(self.gone, jnp.asarray(-jnp.inf, scores.dtype), jnp.asarray(-1, scores.dtype))
        return jnp.where(self.dead[:, None], last[:, None], scores)

    def counted(self, support: Bool[Array, "n m"]) -> Bool[Array, "n m"]:
        """`support` without the weights that cost no budget."""
        return support & ~self.gone[:, None]

    def damped(self, damping: float | Array) -> Float[Array, "n n"]:
        """gram + damping * mean * I."""
        return self.gram + (jnp.asarray(damping, self.mean.dtype) * self.mean) * jnp.eye(
            self.gram.shape[0], dtype=self.gram.dtype
        )

    def started(self, value: Float[Array, "n m"]) -> Float[Array, "n m"]:
        """Weights from outside in the units of `center`."""
        scaled = jnp.asarray(value).astype(self.center.dtype) * self.unit
        return jnp.where(self.dead[:, None], jnp.zeros((), scaled.dtype), scaled)


def layer(f: Reconstruction, constraint: Constraint | None) -> Layer:
    """The layer of a problem, made ready. One compiled pass over H and W0, and a selection where inputs are dead."""
    ready = _layer(f.curvature.matrix, f.center, f.ridge())
    if constraint is not None and bool(jnp.any(ready.dead)):
        like = jnp.ones(f.center.shape, ready.center.dtype)
        kept = constraint.select(ready.scores(like))
        if constraint.violation(kept) or not bool(jnp.any(kept)):
            return ready._replace(gone=jnp.zeros_like(ready.dead))
    return ready


def exact_layer(f: Reconstruction, constraint: Constraint | None) -> Layer:
    """The layer in NumPy's float64, of the problem as it was stated, in any mode of JAX."""
    with jax.enable_x64(True):
        return jax.tree.map(np.asarray, layer(_tree.float64(f), constraint))


@jax.jit
def _layer(gram: Float[Array, "n n"], center: Float[Array, "n m"], ridge: Float[Array, ""]) -> Layer:
    dtype = jnp.promote_types(_tree.wide(center.dtype), _tree.wide(gram.dtype))
    gram, center, ridge = gram.astype(dtype), center.astype(dtype), ridge.astype(dtype)
    n = gram.shape[0]
    eye = jnp.eye(n, dtype=bool)
    diagonal = jnp.diagonal(gram)
    dead = ~(diagonal > 0)
    blank = jnp.all(dead)
    dead &= ~blank
    mean = jnp.sum(jnp.where(dead, 0, diagonal)) / jnp.sum(~dead).astype(dtype)
    mean = jnp.where(blank, jnp.ones((), dtype), mean)
    unit = _power(mean)
    dead &= ~(diagonal + ridge > 0)
    ready = jnp.where(dead[:, None] | dead[None, :] | blank, jnp.zeros((), dtype), gram * unit)
    extra = jnp.where(blank | dead, jnp.ones((), dtype), ridge * unit)
    scale = _power(jnp.max(jnp.abs(center)))
    return Layer(
        gram=ready + jnp.where(eye, extra[:, None], jnp.zeros((), dtype)),
        center=jnp.where(dead[:, None], jnp.zeros((), dtype), center * scale),
        dead=dead,
        gone=dead,
        blank=blank,
        mean=mean * unit,
        unit=scale,
    )


def _power(x: Float[Array, ""]) -> Float[Array, ""]:
    """The power of two p with p x in [1, 2); 1 for x = 0."""
    _, exponent = jnp.frexp(x)
    return jnp.where(x > 0, jnp.ldexp(jnp.ones_like(x), 1 - exponent), jnp.ones_like(x))


@jax.jit
def regular_factor(ready: Layer, damping: float) -> tuple[Float[Array, "n n"], Float[Array, ""]]:
    """U, upper triangular, with (gram + damping * mean * I)^-1 = U^T U, and the damping that this took.

    `damping` times ten until the matrix has a Cholesky factor. The inputs from j on have the inverse U_j:^T U_j: of
    their own damped Gram in the same U.
    """
    eps = jnp.finfo(ready.gram.dtype).eps

    def attempt(state):
        _, damping, _ = state
        gram = ready.damped(damping)
        factor = _linalg.inverse_factor(gram)
        regular = jnp.all(1 / jnp.diagonal(factor) ** 2 > 10 * eps * jnp.diagonal(gram))  # False for a NaN
        return regular, jnp.where(regular, damping, jnp.maximum(10 * damping, 10 * eps)), factor

    start = (jnp.asarray(False), jnp.asarray(damping, ready.gram.dtype), ready.gram)
    _, damping_used, factor = lax.while_loop(lambda state: ~state[0], attempt, start)
    return factor, damping_used
