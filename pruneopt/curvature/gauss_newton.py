"""The generalised Gauss-Newton matrix: the loss bends in the outputs, the network is taken as linear."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property, partial
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.flatten_util import ravel_pytree
from jaxtyping import Array, Float

from pruneopt import _linalg, _tree
from pruneopt.curvature.streamed import Streamed, over_rows
from pruneopt.network import calls
from pruneopt.network.batches import Batches, Source
from pruneopt.network.leaves import Choice, Rest, combine
from pruneopt.structure.defaults import loss_network

Tree = Any
Outputs = Callable[[Tree, Any], Any]
_MOST = 128  # outputs of an example for which H_L is checked


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class GaussNewton(Streamed):
    """H = J^T H_L J of the mean loss over all examples: J the Jacobian of model(params, batch) in the chosen leaves,
    H_L the Hessian of loss(outputs, batch) in the outputs.

    Made by `of`. Positive semidefinite where the loss is convex in the outputs, as squares and softmax cross-entropy
    are; `semidefinite` looks at H_L and assumes nothing. With the negative log-likelihood of an exponential family in
    its natural parameters it is the true Fisher. A product costs about as much as one with the Hessian.
    Source: Schraudolph 2002; Martens 2020, section 8.
    """

    chosen: Tree
    rest: Rest
    model: Outputs = field(metadata={"static": True})
    loss: Outputs = field(metadata={"static": True})
    batches: Batches = field(metadata={"static": True})
    name: ClassVar[str] = "Gauss-Newton matrix"
    instead: ClassVar[str] = "use empirical_fisher, which needs no more than its gradients"

    @staticmethod
    def of(model: Outputs, loss: Outputs, params: Tree, batches: Source, leaves: Choice = None) -> GaussNewton:
        """Of model(params, batch) -> outputs and loss(outputs, batch) -> scalar, a mean over examples.

        leaves: default the prunable ones; None elsewhere. Raises as `prune` does for a loss that is not scalar, for
        leaves or batches that cannot be used.
        """
        for fn in (model, loss):
            if not callable(fn):
                raise TypeError(f"{fn!r} is no function; pass model(params, batch) and loss(outputs, batch)")
        _, chosen, rest, stream = loss_network(_composed(model, loss), params, batches, leaves).parts
        return GaussNewton(chosen, rest, model, loss, stream)

    @property
    def mean_loss(self) -> calls.Loss:
        """The loss of the model's outputs."""
        return _composed(self.model, self.loss)

    @cached_property
    def semidefinite(self) -> bool:
        """Whether H_L is, at the outputs of every example: its least eigenvalue against its largest entry, in float64.

        A mean over examples has a block of H_L for each of them. Another loss, more than 128 outputs an example, or a
        network that fixes float32 within, is not known to be convex. One pass through the network.
        """
        try:
            return self._bends_up()
        except TypeError:  # it cannot be traced in float64
            return False

    def _bends_up(self) -> bool:
        least = largest = 0.0
        with jax.enable_x64(True):
            chosen, rest = _tree.float64(self.chosen), _tree.float64(self.rest)
            for batch in map(_tree.float64, self.batches):
                z = jax.eval_shape(lambda c, r, b: self.model(combine(c, r), b), chosen, rest, batch)
                firsts, size = {x.shape[:1] for x in jax.tree.leaves(z)}, _tree.size(z)
                if len(firsts) != 1 or firsts == {()} or size > (n := firsts.pop()[0]) * _MOST:
                    return False
                probe = np.random.default_rng(0).standard_normal((n, size // n))
                blocks, apart = map(np.asarray, _output_bends(self.model, self.loss, chosen, rest, batch, probe))
                high = float(np.max(np.abs(blocks)))
                if not np.max(np.abs(apart)) <= 1e-9 * high:
                    return False
                least, largest = min(least, float(np.min(_linalg.eigvalsh(blocks)))), max(largest, high)
        return least >= -1e-12 * largest

    def on_batch(self, chosen: Tree, rest: Rest, batch: Any, rows: Float[Array, "k p"]) -> Float[Array, "k p"]:
        """Products on one batch: forward through the network, through H_L, and back."""
        return _products(self.model, self.loss, chosen, rest, batch, rows)


def _composed(model: Outputs, loss: Outputs) -> calls.Loss:
    return lambda params, batch: loss(model(params, batch), batch)


@partial(jax.jit, static_argnames=("model", "loss"))
def _products(model: Outputs, loss: Outputs, chosen: Tree, rest: Rest, batch: Any, rows: Array) -> Array:
    outputs = lambda c: model(combine(c, rest), batch)  # noqa: E731
    slope = jax.grad(lambda z: loss(z, batch))

    def product(direction: Tree) -> Tree:
        z, along = jax.jvp(outputs, (chosen,), (direction,))
        bent = jax.jvp(slope, (z,), (along,))[1]
        return jax.vjp(outputs, chosen)[1](bent)[0]

    return over_rows(product, _tree.Layout.of(chosen), chosen, rows)


@partial(jax.jit, static_argnames=("model", "loss"))
def _output_bends(
    model: Outputs, loss: Outputs, chosen: Tree, rest: Rest, batch: Any, probe: Float[Array | np.ndarray, "n k"]
) -> tuple[Float[Array, "n k k"], Float[Array, "n k"]]:
    """The examples' blocks of H_L, and what a product with H_L has beside theirs."""
    outputs = model(combine(chosen, rest), batch)
    back = ravel_pytree(jax.tree.map(lambda x: x[0], outputs))[1]
    z = jax.vmap(lambda one: ravel_pytree(one)[0])(outputs)  # (n, k)
    slope = jax.grad(lambda z: loss(jax.vmap(back)(z), batch))
    product = lambda d: jax.jvp(slope, (z,), (d,))[1]  # noqa: E731
    rows = lax.map(lambda e: product(jnp.broadcast_to(e, z.shape)), jnp.eye(z.shape[1]))  # (k, n, k)
    blocks = jnp.swapaxes(rows, 0, 1)
    return blocks, product(probe) - jnp.einsum("nkj,nk->nj", blocks, probe)
