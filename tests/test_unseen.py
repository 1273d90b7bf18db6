"""A leaf that the loss does not see is refused by name wherever a score is made of the loss's derivatives."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import pruneopt as po
from pruneopt.constraints import Cardinality
from pruneopt.curvature import (
    GaussNewton,
    Hessian,
    Kronecker,
    empirical_fisher,
    empirical_fisher_diagonal,
    hutchinson_diagonal,
    sampled_fisher,
    softmax_fisher,
)
from pruneopt.plans import gauss_newton
from pruneopt.plans.methods import METHODS
from pruneopt.solution import Pruned

RNG = np.random.default_rng(0)
PARAMS = {"back": RNG.normal(size=(4, 5)), "head": RNG.normal(size=(5, 3))}
DATA = [(RNG.normal(size=(n, 4)), RNG.integers(0, 3, n)) for n in (5, 3)]

BLIND = {
    "stop_gradient": lambda x, w: x @ jax.lax.stop_gradient(w),
    "in a jitted function": jax.jit(lambda x, w: x @ jax.lax.stop_gradient(w)),
    "whole numbers": lambda x, w: x @ jnp.round(4 * w).astype(int).astype(x.dtype),
    "unused": lambda x, w: jnp.concatenate([x, x[:, :1]], axis=1),
}
# The gradient is no zero of the program, but it is zero in every batch.
ZERO = {
    "times zero": lambda x, w: x[:, :1] * 0.3 + 0.0 * (x @ w),
    "dead units": lambda x, w: jax.nn.relu(x @ w - 1e3) + 0.5,
}


def logits(of):
    return lambda p, batch: of(batch[0], p["back"]) @ p["head"]


def loss(of):
    def fn(p, batch):
        logs = jax.nn.log_softmax(logits(of)(p, batch))
        return -jnp.mean(jnp.take_along_axis(logs, batch[1][:, None], axis=1))

    return fn


READERS = sorted(n for n, row in METHODS.items() if row.reads_data)


def prune(of, method, leaves=None) -> Pruned:
    fn = logits(of) if method == "synflow" else loss(of)
    return po.prune(fn, PARAMS, DATA, Cardinality(sparsity=0.5), method=method, leaves=leaves, progress=False)


@pytest.mark.parametrize("blind", BLIND)
@pytest.mark.parametrize("method", ["taylor", "fisher", "obd"])
def test_a_leaf_behind_a_cut_derivative_is_named(blind, method):
    with pytest.raises(ValueError, match=r"does not see 'back'.*leave it out of leaves=.*method='magnitude'"):
        prune(BLIND[blind], method)


@pytest.mark.parametrize("method", READERS)
def test_every_row_of_derivatives_names_it(method):
    with pytest.raises(ValueError, match=r"'back'.*leaves="):
        prune(BLIND["stop_gradient"], method)


@pytest.mark.parametrize("zero", ZERO)
@pytest.mark.parametrize(
    "method", ["taylor", "grasp", "fisher", "m_fac", "kfac_obd", "kfac_channels", "obd", "synflow"]
)
def test_a_leaf_of_zeros_in_every_batch_is_named(zero, method):
    with pytest.raises(ValueError, match=r"zero in all of 'back' in every batch.*leave it out of leaves="):
        prune(ZERO[zero], method)


@pytest.mark.slow
def test_the_others_can_be_pruned():
    found = prune(BLIND["stop_gradient"], "fisher", leaves="head")
    assert int(found.support["head"].sum()) == 7
    assert found.support["back"] is None


def test_weights_of_zero_are_seen():
    """A leaf that is zero itself has a gradient."""
    params = PARAMS | {"head": np.zeros((5, 3))}
    fn = loss(lambda x, w: jnp.tanh(x @ w))
    found = po.prune(fn, params, DATA, Cardinality(count=9), method="fisher", leaves="head", progress=False)
    assert int(found.support["head"].sum()) == 9


FN = loss(BLIND["stop_gradient"])
NET = logits(BLIND["stop_gradient"])
CURVATURES = {
    "Hessian": lambda: Hessian.of(FN, PARAMS, DATA),
    "Hutchinson": lambda: hutchinson_diagonal(FN, PARAMS, DATA),
    "Gauss-Newton": lambda: GaussNewton.of(NET, lambda z, b: jnp.mean(z**2), PARAMS, DATA),
    "Fisher": lambda: empirical_fisher(FN, PARAMS, DATA),
    "its diagonal": lambda: empirical_fisher_diagonal(FN, PARAMS, DATA),
    "sampled": lambda: sampled_fisher(NET, PARAMS, DATA),
    "softmax": lambda: softmax_fisher(NET, PARAMS, DATA),
    "K-FAC": lambda: Kronecker.of(FN, PARAMS, DATA),
    "a row of the network": lambda: prune(BLIND["stop_gradient"], gauss_newton(NET)),
}


@pytest.mark.parametrize("name", CURVATURES)
def test_every_curvature_of_a_loss_names_it(name):
    with pytest.raises(ValueError, match="does not see 'back'"):
        CURVATURES[name]()


def test_synaptic_flow_takes_arrays_that_examples_share():
    fn = lambda p, b: jnp.tanh((b["x"] * b["a"][None]) @ p["back"]) @ p["head"]  # noqa: E731
    plain = lambda p, b: jnp.tanh(b["x"] @ p["back"]) @ p["head"]  # noqa: E731
    run = lambda fn, batch: po.prune(  # noqa: E731
        fn, PARAMS, [batch], Cardinality(sparsity=0.5), method="synflow", progress=False
    )
    x = DATA[0][0]
    a, b = run(fn, {"x": x, "a": RNG.normal(size=4)}), run(plain, {"x": x})
    jax.tree.map(np.testing.assert_array_equal, a.support, b.support)
