"""Rows that rank weights by gradients: SNIP, GraSP, SynFlow and HAP against their formulas in plain autodiff."""

import jax
import jax.flatten_util
import jax.numpy as jnp
import numpy as np
import pytest
from cases import tiny_batches, tiny_loss, tree

import pruneopt as po
from pruneopt.constraints import Cardinality, Slices
from pruneopt.plans import METHODS, Iterative
from pruneopt.structure import Network

SHAPES = {"a": (2, 6), "b": (6, 1)}


def flat(tree):
    return np.concatenate([np.ravel(x) for x in jax.tree.leaves(tree)])


def support_of(scores, count):
    chosen = np.zeros(len(scores), bool)
    chosen[np.argsort(-scores, kind="stable")[:count]] = True
    return chosen


def pruned(method, params, count, fn=tiny_loss, **more):
    return po.prune(fn, params, tiny_batches((3, 7)), Cardinality(count=count, floor=0), method=method,
                    progress=False, **more)  # fmt: skip


@pytest.mark.slow
def test_snip_and_grasp_are_their_formulas():
    params, (whole,) = tree(1, SHAPES), tiny_batches()
    w, unflat = jax.flatten_util.ravel_pytree(params)
    g, h = (d(lambda v: tiny_loss(unflat(v), whole))(w) for d in (jax.grad, jax.hessian))
    np.testing.assert_array_equal(flat(pruned("snip", params, 7).support), support_of(np.abs(g * w), 7))
    np.testing.assert_array_equal(flat(pruned("grasp", params, 7).support), support_of(np.asarray(w * (h @ g)), 7))


@pytest.mark.slow
def test_grasp_keeps_the_weights_whose_loss_would_lower_the_gradient_most():
    params, (whole,) = tree(1, SHAPES), tiny_batches()
    model = METHODS["grasp"].model(Network.of(tiny_loss, params, [whole]), jax.random.key(0))
    w, unflat = jax.flatten_util.ravel_pytree(params)

    def flow(v):
        return -0.5 * jnp.sum(jax.grad(lambda u: tiny_loss(unflat(u), whole))(v) ** 2)

    np.testing.assert_allclose(flat(model.gradient), jax.grad(flow)(w), rtol=1e-10)


def network(params, batch):
    return jax.nn.relu(batch[0] @ params["a"]) @ params["b"]


def test_synflow_is_the_flow_through_absolute_weights_and_is_conserved():
    params = tree(1, SHAPES)
    model = METHODS["synflow"].model(Network.of(network, params, tiny_batches()), jax.random.key(0))
    scores = jax.tree.map(np.abs, model.saliency())
    a, b = np.abs(params["a"]), np.abs(params["b"])
    np.testing.assert_allclose(scores["a"], a * b[:, 0], rtol=1e-12)
    np.testing.assert_allclose(scores["b"], b * a.sum(0)[:, None], rtol=1e-12)
    assert scores["a"].sum() == pytest.approx(scores["b"].sum())  # Tanaka et al. 2020, theorem 2
    np.testing.assert_allclose(scores["a"].sum(0), scores["b"][:, 0], rtol=1e-12)  # theorem 1: of every unit


@pytest.mark.slow
def test_synflow_in_rounds_keeps_a_path_where_one_round_collapses():
    rng = np.random.default_rng(0)
    params = {"a": jnp.asarray(rng.standard_normal((2, 6))), "b": jnp.asarray(rng.standard_normal((6, 6))),
              "c": jnp.asarray(rng.standard_normal((6, 1)))}  # fmt: skip

    def three(params, batch):
        return jax.nn.relu(jax.nn.relu(batch[0] @ params["a"]) @ params["b"]) @ params["c"]

    rounds = pruned("synflow", params, 3, three, schedule=Iterative(100))
    assert float(jnp.sum(three(jax.tree.map(jnp.abs, rounds.params), (jnp.ones((1, 2)),)))) > 0
    assert [int(m.sum()) for m in jax.tree.leaves(rounds.support)] == [1, 1, 1]  # maximal critical compression


def test_synflow_refuses_a_loss():
    with pytest.raises(ValueError, match="outputs, not a loss"):
        pruned("synflow", tree(1, SHAPES), 7)


@pytest.mark.slow
def test_hap_ranks_channels_by_their_trace_times_their_norm():
    curve = {k: np.abs(v) for k, v in tree(2, {"w": (3, 4), "v": (2, 5)}).items()}
    params = tree(3, {"w": (3, 4), "v": (2, 5)})

    def loss(params, batch):  # its Hessian is diagonal, for which Hutchinson's probes are exact
        return jnp.mean(batch) * sum(0.5 * jnp.sum(curve[k] * params[k] ** 2) for k in curve)

    got = po.prune(loss, params, [jnp.ones(2)], Slices(-1, Cardinality(count=4, floor=0)), method="hap", progress=False)
    scores = np.concatenate([curve[k].sum(0) / (2 * len(curve[k])) * (params[k] ** 2).sum(0) for k in ("v", "w")])
    alive = np.concatenate([np.asarray(got.support[k]).all(0) for k in ("v", "w")])
    np.testing.assert_array_equal(alive, support_of(scores, 4))
