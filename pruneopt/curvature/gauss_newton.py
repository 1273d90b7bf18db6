"""The generalised Gauss-Newton matrix: the loss bends in the outputs, the network is taken as linear."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any, ClassVar

import jax
from jaxtyping import Array, Float

from pruneopt import _data, _tree
from pruneopt.curvature.streamed import Streamed, over_rows
from pruneopt.structure import evaluate
from pruneopt.structure.leaves import Choice, Rest, combine, partition

Tree = Any
Outputs = Callable[[Tree, Any], Any]


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class GaussNewton(Streamed):
    """H = J^T H_L J of the mean loss over all examples: J the Jacobian of model(params, batch) in the chosen leaves,
    H_L the Hessian of loss(outputs, batch) in the outputs.

    Made by `of`. Positive semidefinite where the loss is convex in the outputs, as squares and softmax cross-entropy
    are; with the negative log-likelihood of an exponential family in its natural parameters it is the true Fisher.
    A product costs about as much as one with the Hessian. Source: Schraudolph 2002; Martens 2020, section 8.
    """

    chosen: Tree
    rest: Rest
    model: Outputs = field(metadata={"static": True})
    loss: Outputs = field(metadata={"static": True})
    batches: _data.Batches = field(metadata={"static": True})
    name: ClassVar[str] = "Gauss-Newton matrix"
    instead: ClassVar[str] = "use empirical_fisher, which needs no more than its gradients"

    @staticmethod
    def of(model: Outputs, loss: Outputs, params: Tree, batches: _data.Source, leaves: Choice = None) -> GaussNewton:
        """Of model(params, batch) -> outputs and loss(outputs, batch) -> scalar, a mean over examples.

        leaves: default the prunable ones; None elsewhere. Raises as `prune` does for a loss that is not scalar, for
        leaves or batches that cannot be used.
        """
        chosen, rest = partition(params, leaves)
        stream = _data.Batches(batches)
        for fn in (model, loss):
            if not callable(fn):
                raise TypeError(f"{fn!r} is no function; pass model(params, batch) and loss(outputs, batch)")
        evaluate.check_scalar(lambda p, b: loss(model(p, b), b), chosen, rest, stream)
        return GaussNewton(chosen, rest, model, loss, stream)

    def on_batch(self, chosen: Tree, rest: Rest, batch: Any, rows: Float[Array, "k p"]) -> Float[Array, "k p"]:
        """Products on one batch: forward through the network, through H_L, and back."""
        return _products(self.model, self.loss, chosen, rest, batch, rows)


@partial(jax.jit, static_argnames=("model", "loss"))
def _products(model: Outputs, loss: Outputs, chosen: Tree, rest: Rest, batch: Any, rows: Array) -> Array:
    outputs = lambda c: model(combine(c, rest), batch)  # noqa: E731
    slope = jax.grad(lambda z: loss(z, batch))

    def product(direction: Tree) -> Tree:
        z, along = jax.jvp(outputs, (chosen,), (direction,))
        bent = jax.jvp(slope, (z,), (along,))[1]
        return jax.vjp(outputs, chosen)[1](bent)[0]

    return over_rows(product, _tree.Layout.of(chosen), chosen, rows)
