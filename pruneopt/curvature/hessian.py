"""The exact Hessian of the loss, through Hessian-vector products."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any, ClassVar

import jax
from jaxtyping import Array, Float

from pruneopt import _tree
from pruneopt.curvature.diagonal import Diagonal
from pruneopt.curvature.streamed import Streamed, over_rows
from pruneopt.network import calls
from pruneopt.network.batches import Batches, Source
from pruneopt.network.leaves import Choice, Rest
from pruneopt.structure.defaults import loss_network

Tree = Any


def hessian_vector_product(loss: Callable[[Tree], Any], at: Tree, direction: Tree) -> Tree:
    """H d for the Hessian H of `loss` at `at`, forward over reverse: the cost of about two gradients."""
    return jax.jvp(jax.grad(loss), (at,), (direction,))[1]


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Hessian(Streamed):
    """H = the second derivative of the mean loss over all examples, at the weights given. Indefinite in general.

    Made by `of`. A product is forward over reverse (Pearlmutter 1994), about two gradients over the data.
    """

    chosen: Tree
    rest: Rest
    loss: calls.Loss = field(metadata={"static": True})
    batches: Batches = field(metadata={"static": True})
    name: ClassVar[str] = "Hessian"
    instead: ClassVar[str] = "use empirical_fisher, or GaussNewton with a loss convex in the outputs: never indefinite"

    @staticmethod
    def of(loss: calls.Loss, params: Tree, batches: Source, leaves: Choice = None) -> Hessian:
        """The Hessian of loss(params, batch) -> scalar, a mean over examples, in the chosen leaves of `params`.

        leaves: default the prunable ones; None elsewhere. Raises as `prune` does for a loss that is not scalar, for
        leaves or batches that cannot be used.
        """
        _, chosen, rest, stream = loss_network(loss, params, batches, leaves).parts
        return Hessian(chosen, rest, loss, stream)

    @property
    def mean_loss(self) -> calls.Loss:
        """The loss itself."""
        return self.loss

    def on_batch(self, chosen: Tree, rest: Rest, batch: Any, rows: Float[Array, "k p"]) -> Float[Array, "k p"]:
        """Hessian-vector products on one batch."""
        return _products(self.loss, chosen, rest, batch, rows)


@partial(jax.jit, static_argnames="loss")
def _products(loss: calls.Loss, chosen: Tree, rest: Rest, batch: Any, rows: Array) -> Array:
    of = calls.closed(loss, rest, batch)
    return over_rows(lambda d: hessian_vector_product(of, chosen, d), _tree.Layout.of(chosen), chosen, rows)


@_tree.on_host
def hutchinson_diagonal(
    loss: calls.Loss,
    params: Tree,
    batches: Source,
    leaves: Choice = None,
    *,
    probes: int = 8,
    key: jax.Array | None = None,
) -> Diagonal:
    """diag H estimated as the mean over probes of v * (H v), v of random signs; H the Hessian of the mean loss.

    loss: (params, batch) -> scalar, a mean over examples. leaves: which leaves are differentiated, as in
    `prune`. probes: number of sign vectors; the variance of an entry is the sum of its row's squared
    off-diagonal entries over `probes`. key: defaults to seed 0; the same probes serve every batch, so the
    result does not depend on the batching.

    Entries may be negative: the Hessian of a network is indefinite.
    Raises ValueError for a loss that is not scalar, probes < 1, non-finite products, unusable batches.
    Source: Bekas, Kokiopoulou, Saad 2007, section 2.
    """
    return Hessian.of(loss, params, batches, leaves).hutchinson(probes, key)
