"""No evidence proves what is not so: each case once came back as optimal, or was wrong in silence."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from cases import matrix, tiny_batches, tiny_loss, tree

import pruneopt as po
from pruneopt.bounds import Separable, StrongConvexity
from pruneopt.constraints import Cardinality, Slices, Support
from pruneopt.curvature import Diagonal, Gram, Identity, empirical_fisher_diagonal
from pruneopt.objectives import Quadratic, Reconstruction
from pruneopt.solvers import Polish, Score

OPTIMAL = po.Status.OPTIMAL


def test_an_indefinite_gram_proves_nothing():
    problem = po.Problem(
        Reconstruction(jnp.ones((2, 1)), Gram.checked(jnp.asarray([[1.0, 3.0], [3.0, 1.0]])), damping=0.1),
        subject_to=Support(jnp.ones((2, 1), bool)),
    )
    assert po.solve(problem, Polish()).status is not OPTIMAL


def test_an_indefinite_diagonal_proves_nothing():
    h = Diagonal({"w": jnp.asarray([[10.0, 10.0], [10.0, -2.0]])})
    everything = Support({"w": jnp.ones((2, 2), bool)})
    problem = po.Problem(Quadratic({"w": jnp.ones((2, 2))}, h, damping=0.1), subject_to=everything)
    center = problem.objective.center
    for evidence in (StrongConvexity(), Separable()):
        claim = po.Solution(center, problem.full_support(), OPTIMAL, 0.0, 0.0, 0.0, evidence, {})
        assert po.certify(problem, claim).status is not OPTIMAL


def test_a_large_constant_hides_no_gap():
    constraint = Cardinality(sparsity=0.5, floor=0)
    problem = po.Problem(Quadratic(tree(1), Identity(), constant=1e9), subject_to=constraint)
    poor = replace(po.solve(problem, Score("random")), evidence=Separable())
    assert po.certify(problem, poor).status is not OPTIMAL
    assert po.solve(problem, Score()).status is OPTIMAL


@pytest.mark.parametrize("per", ["tree", "leaf", "out"])
def test_a_worse_support_is_not_optimal_whatever_it_claims(per):
    constraint = Cardinality(sparsity=0.5, per=per, floor=0 if per == "tree" else None)
    problem = po.Problem(Quadratic(tree(1), Identity()), subject_to=constraint)
    best = po.solve(problem, Score())
    assert best.status is OPTIMAL
    worst = constraint.select(jax.tree.map(lambda s: -s, problem.objective.saliency()))
    value = jax.tree.map(lambda m, w: jnp.where(m, w, 0), worst, problem.objective.center)
    found = po.certify(problem, replace(best, value=value, support=worst, bound=best.objective))
    assert found.status is po.Status.FEASIBLE
    assert found.bound <= best.objective * (1 + 1e-12)


@pytest.mark.slow
def test_polish_on_one_row_and_one_column():
    for n, m in ((1, 3), (6, 1)):
        constraint = Slices(0, Cardinality(count=1, floor=0))
        problem = po.Problem(Reconstruction(matrix(1, n, m), Gram.checked(jnp.eye(n) + 0.1)), subject_to=constraint)
        assert po.solve(problem, po.solvers.Then(Score(), Polish())).status.is_usable


@pytest.mark.default_flags
@pytest.mark.parametrize("scale", [1e-15, 1e-20, 1e-30, 1e15, 1e25])
def test_magnitude_is_right_where_squares_leave_the_range_of_float32(scale):
    order = np.random.default_rng(0).permutation(16)
    w = (np.arange(1.0, 17)[order] * scale).astype(np.float32).reshape(4, 4)
    pruned = po.prune(None, {"w": jnp.asarray(w)}, None, Cardinality(sparsity=0.5), progress=False)
    np.testing.assert_array_equal(np.asarray(pruned.support["w"]).ravel(), order >= 8)


@pytest.mark.default_flags
def test_a_subnormal_weight_off_the_support_is_seen():
    problem = po.Problem(Quadratic({"w": jnp.ones((4, 4))}, Identity()), subject_to=Cardinality(sparsity=0.5))
    solution = po.solve(problem, Score())
    value = {"w": np.where(np.asarray(solution.support["w"]), 1.0, 1e-40).astype(np.float32)}
    found = po.certify(problem, replace(solution, value=value))
    assert found.outside == 8
    assert found.status is po.Status.INFEASIBLE


@pytest.mark.default_flags
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_half_precision_weights_are_averaged_in_float32(dtype):
    def loss(p, batch):
        return jnp.mean(batch.astype(jnp.float32)) * p["w"].astype(jnp.float32).sum()

    params, data = {"w": jnp.ones((2, 2), dtype)}, [np.ones(4, np.float32)] * 600
    fisher = empirical_fisher_diagonal(loss, params, data).values["w"]
    assert fisher.dtype == jnp.float32
    np.testing.assert_allclose(fisher, 1.0, rtol=1e-5)
    pruned = po.prune(loss, params, data, Cardinality(sparsity=0.5), method="taylor", progress=False)
    assert pruned.solutions["*"].objective == pytest.approx(-2.0, rel=1e-5)
    assert pruned.params["w"].dtype == dtype


def test_floor_zero_allows_an_empty_leaf_in_every_stage():
    params = {"a": tree(1)["a"], "b": tree(1)["b"] * 1e-6}
    for schedule in (po.plans.OneShot(), po.plans.Iterative(2)):
        constraint = Cardinality(sparsity=0.5, floor=0)
        pruned = po.prune(None, params, None, constraint, schedule=schedule, progress=False)
        assert not pruned.support["b"].any()


@pytest.mark.default_flags
@pytest.mark.slow
def test_retraining_may_move_other_leaves_than_the_pruned_ones():
    def loss(p, batch):
        return tiny_loss({"a": p["a"], "b": p["b"]}, batch) + jnp.sum((p["bias"] - 1) ** 2)

    params = {**tree(1), "bias": jnp.zeros(1)}
    tune = po.plans.retrain(loss, tiny_batches(), optax.sgd(0.1), trained="bias")
    constraint = Cardinality(sparsity=0.5, floor=1)
    pruned = po.prune(loss, params, tiny_batches(), constraint, fine_tune=tune, progress=False)
    assert float(pruned.params["bias"][0]) == pytest.approx(0.2)
    np.testing.assert_array_equal(pruned.params["a"], jnp.where(pruned.support["a"], params["a"], 0))


def test_numbers_of_numpy_and_jax_are_numbers():
    assert Cardinality(sparsity=np.float32(0.5)) == Cardinality(sparsity=jnp.asarray(0.5)) == Cardinality(sparsity=0.5)
    assert Cardinality(count=np.int64(3), floor=np.int64(1)) == Cardinality(count=3, floor=1)
    assert po.constraints.NM(np.int64(2), np.int64(4)) == po.constraints.NM(2, 4)
    constraint = Cardinality(count=3, floor=1)
    a, b = (
        po.prune(None, tree(1), None, constraint, method="random", key=key, progress=False)
        for key in (7, jax.random.key(7))
    )
    np.testing.assert_array_equal(a.params["a"], b.params["a"])
