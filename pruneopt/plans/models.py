"""What the rows of `plans.methods` minimise: models of the loss at given parameters."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np

from pruneopt import _tree
from pruneopt.curvature.base import Curvature
from pruneopt.curvature.block_diagonal import BlockDiagonal
from pruneopt.curvature.diagonal import Diagonal, Identity
from pruneopt.curvature.fisher import empirical_fisher, empirical_fisher_diagonal
from pruneopt.curvature.gauss_newton import GaussNewton
from pruneopt.curvature.hessian import hessian_vector_product, hutchinson_diagonal
from pruneopt.curvature.kronecker import Kronecker
from pruneopt.curvature.shrunk import Shrunk
from pruneopt.curvature.true_fisher import sampled_fisher_diagonal
from pruneopt.network import calls
from pruneopt.network.batches import each, shared_length
from pruneopt.network.leaves import Rest, check_finite, combine, is_floating
from pruneopt.network.network import Network
from pruneopt.objectives.quadratic import Quadratic

Tree = Any
_Fisher = TypeVar("_Fisher", bound=Curvature)


def weights_alone(network: Network, key: jax.Array) -> Quadratic:
    """1/2 ||w - w0||^2: no data, no loss."""
    return Quadratic(network.chosen, Identity())


def linear(network: Network, key: jax.Array) -> Quadratic:
    """<g, w - w0>, g the gradient of the mean loss."""
    network.check_loss()
    fn, chosen, rest, stream = network.parts
    gradient = calls.mean_gradient(fn, chosen, rest, stream)
    return Quadratic(chosen, None, _not_zero(gradient, "the gradient of fn", "obd"))


def diagonal_fisher(network: Network, key: jax.Array) -> Quadratic:
    """1/2 <d, diag(F) d>, F the empirical Fisher."""
    curvature = empirical_fisher_diagonal(*network.given)
    _not_zero(curvature.values, "the Fisher of fn", "magnitude")
    return Quadratic(network.chosen, curvature)


def low_rank_fisher(network: Network, key: jax.Array) -> Quadratic:
    """1/2 <d, (F + lambda I) d>, F the empirical Fisher of all examples, lambda a hundredth of its mean diagonal."""
    chosen = network.chosen
    return Quadratic(chosen, _bends(empirical_fisher(*network.given), chosen), damping=0.01)


def ridged_fisher(network: Network, key: jax.Array) -> Quadratic:
    """As `low_rank_fisher`, lambda twice the mean diagonal: less trust in what few examples say of pairs of weights.

    Chosen for CBS on MLPNet: of 1e-4, 1e-3, 1e-2 and 1e-1, the mean diagonal 5e-3, by images that no draw touches.
    """
    chosen = network.chosen
    return Quadratic(chosen, _bends(empirical_fisher(*network.given), chosen), damping=2.0)


def fisher_blocks(network: Network, key: jax.Array) -> Quadratic:
    """1/2 <d, (B + lambda I) d>, B the blocks of 1,000 consecutive weights of a leaf on the diagonal of the empirical
    Fisher; lambda a hundredth of its mean diagonal.

    Source: Singh and Alistarh 2020 (WoodFisher), section 4.
    """
    chosen = network.chosen
    fisher = _bends(empirical_fisher(*network.given), chosen)
    return Quadratic(chosen, BlockDiagonal.of(fisher, by=1000), damping=0.01)


def kronecker_fisher(network: Network, key: jax.Array) -> Quadratic:
    """1/2 <d, (A (x) S + lambda I) d> for each operator, A and S its Kronecker factors by the labels of the data;
    lambda a hundredth of the mean diagonal.

    Source: Zeng and Urtasun 2018 (MLPrune), with the factors of Martens and Grosse 2015.
    """
    chosen = network.chosen
    return Quadratic(chosen, _bends(Kronecker.of(*network.given), chosen), damping=0.01)


def fisher_step(network: Network, key: jax.Array) -> Quadratic:
    """<g, d> + 1/2 <d, (F + lambda I) d>, g the mean of the examples' gradients whose second moments are F; lambda a
    tenth of its mean diagonal: the step of a stage away from a minimum.
    """
    chosen = network.chosen
    fisher = _bends(empirical_fisher(*network.given), chosen)
    gradient = fisher.layout.tree(
        jnp.mean(fisher.gradients, axis=0, dtype=_tree.widest(chosen)), _tree.wide_shapes(chosen)
    )
    return Quadratic(chosen, fisher, gradient, damping=0.1)


def diagonal_hessian(network: Network, key: jax.Array) -> Quadratic:
    """1/2 <d, diag(H) d>, H the Hessian of the mean loss, its diagonal by 8 Hutchinson probes."""
    curvature = hutchinson_diagonal(*network.given, key=key)
    _not_zero(curvature.values, "the Hessian of fn", "magnitude")
    return Quadratic(network.chosen, curvature)


def channel_traces(network: Network, key: jax.Array) -> Quadratic:
    """1/2 sum over channels c of (tr(H_cc) / n_c) ||d_c||^2, c the n_c weights of one output of a leaf (its last axis),
    the trace of their block of the Hessian by 8 Hutchinson probes.

    Source: Yu et al. 2021 (HAP), equation 5.
    """
    chosen = network.chosen
    curvature = hutchinson_diagonal(*network.given, key=key)
    _not_zero(curvature.values, "the Hessian of fn", "magnitude")
    return Quadratic(chosen, Diagonal(_channel_means(curvature.values)))


def channel_factors(network: Network, key: jax.Array) -> Quadratic:
    """1/2 sum over channels c of S_cc <d_c, A d_c>, taken along w_c: h_c = S_cc <w_c, A w_c> / ||w_c||^2 for each
    weight, A and S the Kronecker factors of the operator that has c as an output.

    Exact for what goes as whole channels, but for the pairs of them that S couples.
    Source: Wang et al. 2019 (EigenDamage), section 3.1, Kron-OBD of filters.
    """
    chosen = network.chosen
    h = _bends(Kronecker.of(*network.given), chosen)
    w = h.layout.host(chosen)
    values = np.zeros_like(w)
    for a, s, at in zip(h.inputs, h.outputs, h.entries, strict=True):
        part = w[np.asarray(at)]  # (problems, n_in, n_out)
        bend = np.sum(part * (np.asarray(a) @ part), axis=1, keepdims=True)
        size = np.sum(part * part, axis=1, keepdims=True)
        along = bend * np.diagonal(np.asarray(s), axis1=1, axis2=2)[:, None] / np.where(size > 0, size, 1.0)
        values[np.asarray(at)] = along
    return Quadratic(chosen, Diagonal(jax.tree.map(jnp.asarray, h.layout.tree(values, _tree.wide_shapes(chosen)))))


def gradient_flow(network: Network, key: jax.Array) -> Quadratic:
    """-<H g, w - w0>: to first order -1/2 ||gradient||^2 at w, so that least loses the least gradient flow.

    H g is the Hessian of the mean loss times its gradient, each over all batches.
    Source: Wang, Zhang and Grosse 2020 (GraSP), equation 8, its sign turned.
    """
    network.check_loss()
    fn, chosen, rest, stream = network.parts
    gradient = _not_zero(calls.mean_gradient(fn, chosen, rest, stream), "the gradient of fn", "obd")
    flow = stream.finite_mean(lambda batch: _negative_product(fn, chosen, rest, batch, gradient), "the Hessian of fn")
    return Quadratic(chosen, None, _not_zero(flow, "the Hessian of fn times its gradient", "snip"))


def synaptic_flow(network: Network, key: jax.Array) -> Quadratic:
    """<r, w - w0>, r_i = sign(w_i) dR/d|w_i|, R the sum of the outputs of fn(|params|, ones).

    fn: the network's outputs (not a loss) of params and a batch; every floating array of the first batch is replaced by
    one example of ones (all of its examples, where its arrays do not agree on them). The saliency is
    -|w_i| dR/d|w_i|; rank by its size.
    Source: Tanaka et al. 2020 (SynFlow), equation 4 and algorithm 1.
    """
    fn = network.fn
    if not callable(fn):
        raise TypeError(f"fn is {fn!r}, but synaptic flow needs the network: fn(params, batch) -> outputs")
    batch = _one_of_ones(next(iter(network.batches)))
    out: Any = calls.outputs(fn, network.params, batch)
    if not jax.tree.leaves(out) or any(x.ndim == 0 for x in jax.tree.leaves(out)):
        raise ValueError(f"fn returns {out}; synaptic flow needs the network's outputs, not a loss: pass fn=forward")
    flow = check_finite(_flow(fn, network.chosen, network.rest, batch), "the synaptic flow of fn")
    return Quadratic(network.chosen, None, _not_zero(flow, "the synaptic flow of fn", "magnitude"))


@dataclass(frozen=True)
class SoftmaxGaussNewton:
    """1/2 <d, ((1 - share) H + share D + lambda I) d>, H the Gauss-Newton matrix of T^2 times the cross-entropy of
    softmax(logits / T), D its diagonal from one sampled label an example, lambda = damping mean(D).

    logits: (params, batch) -> (n, ..., classes); the labels play no part. temperature: T; above 1 it spreads the
    curvature of a confident network over more of its examples (T = 1 is the cross-entropy's own). Shrinkage takes out
    what few examples say of pairs of weights.
    Source: Martens 2020, section 8; Hinton, Vinyals and Dean 2015 (temperature); Schaefer and Strimmer 2005.
    """

    logits: Any
    temperature: float = 4.0
    share: float = 0.15
    damping: float = 0.01

    def __post_init__(self) -> None:
        if not callable(self.logits):
            raise TypeError(f"logits is {self.logits!r}; pass the network, (params, batch) -> (n, ..., classes)")
        if not 0 < self.temperature < math.inf:
            raise ValueError(f"temperature={self.temperature!r} is not a finite number > 0; pass one, such as 4.0")

    def __call__(self, network: Network, key: jax.Array) -> Quadratic:
        """The model at the network's params; its fn is not read."""
        batch = next(iter(network.batches))
        out: Any = calls.outputs(self.logits, network.params, batch)
        if getattr(out, "ndim", 0) < 2 or not jnp.issubdtype(out.dtype, jnp.floating):
            raise ValueError(f"logits returns {out}; pass the network, (params, batch) -> (n, ..., classes)")
        if out.shape[0] != each(batch, "batches: batch 0")[1]:
            raise ValueError(f"logits returns {out}; its first axis is to be the examples of the batch")
        curvature = GaussNewton.of(self.logits, self.loss, *network.given[1:])
        sampled = sampled_fisher_diagonal(self.cooled, *network.given[1:], key=key).values
        diagonal = jax.tree.map(lambda h: h * jnp.asarray(self.temperature**2, h.dtype), sampled)
        _not_zero(diagonal, "the Fisher of the network's outputs", "magnitude")
        return Quadratic(network.chosen, Shrunk.checked(curvature, diagonal, self.share), damping=self.damping)

    def cooled(self, params: Tree, batch: Any) -> jax.Array:
        """logits / T."""
        logits = self.logits(params, batch)
        return logits / jnp.asarray(self.temperature, logits.dtype)

    def loss(self, logits: jax.Array, batch: Any) -> jax.Array:
        """What of the cross-entropy bends: T^2 log sum exp(logits / T), summed over positions, a mean over examples."""
        t = jnp.asarray(self.temperature, logits.dtype)
        return t * t * jnp.sum(jax.nn.logsumexp(logits / t, axis=-1)) / jnp.asarray(logits.shape[0], logits.dtype)


def _bends(fisher: _Fisher, chosen: Tree) -> _Fisher:
    """`fisher`, or ValueError where its diagonal is zero in a whole leaf."""
    _not_zero(fisher.diagonal(chosen), "the Fisher of fn", "magnitude")
    return fisher


def _not_zero(tree: Tree, what: str, instead: str) -> Tree:
    """`tree`, or ValueError where a whole leaf is zero: its weights would cost nothing, and the cut fall on them."""
    named = _tree.named_leaves(tree)
    zero = [path for path, x in named if not bool(jnp.any(x))]
    if len(zero) == len(named):
        raise ValueError(
            f"{what} is zero everywhere, as at a converged network or a loss that does not use these leaves: it ranks "
            f"no weight; check fn and batches, or pass method={instead!r}"
        )
    if zero:
        raise ValueError(
            f"leaves: {what} is zero in all of {_tree.listed(zero)} in every batch, as behind a zero or dead units: it "
            f"ranks none of its weights; leave it out of leaves=, or pass method={instead!r}"
        )
    return tree


@partial(jax.jit, static_argnums=0)
def _negative_product(loss: calls.Loss, chosen: Tree, rest: Rest, batch: Any, direction: Tree) -> Tree:
    direction = jax.tree.map(lambda d, x: d.astype(x.dtype), direction, chosen)
    product = hessian_vector_product(calls.closed(loss, rest, batch), chosen, direction)
    return jax.tree.map(jnp.negative, product)


@partial(jax.jit, static_argnums=0)
def _flow(fn: Any, chosen: Tree, rest: Rest, batch: Any) -> Tree:
    def total(chosen: Tree) -> jax.Array:
        params = _tree.map_named(lambda path, x: jnp.abs(x) if is_floating(path, x) else x, combine(chosen, rest))
        return sum((jnp.sum(x) for x in jax.tree.leaves(fn(params, batch))), jnp.zeros(()))

    return jax.grad(total)(chosen)


def _one_of_ones(batch: Any) -> Any:
    """One example of ones, or all where arrays do not agree on what their examples are."""
    one = slice(None) if shared_length(batch) is None else slice(1)

    def of(leaf: Any) -> Any:
        if not _tree.is_array(leaf) or leaf.ndim == 0:
            return leaf
        return jnp.ones_like(leaf[one]) if jnp.issubdtype(leaf.dtype, jnp.floating) else leaf[one]

    return jax.tree.map(of, batch)


@jax.jit
def _channel_means(diagonal: Tree) -> Tree:
    def one(h: jax.Array) -> jax.Array:
        return jnp.broadcast_to(jnp.mean(h, axis=tuple(range(h.ndim - 1)), keepdims=True), h.shape)

    return jax.tree.map(one, diagonal)
