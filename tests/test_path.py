"""Paths over the weight and exact counts, against scikit-learn and least squares."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from cases import matrix, tiny_batches, tiny_loss, tree

import pruneopt as po
from pruneopt.constraints import Cardinality, Support
from pruneopt.curvature import Diagonal, Gram
from pruneopt.objectives import Loss, Quadratic, Reconstruction
from pruneopt.penalties import L1, MCP, OWL, ElasticNet, GroupLasso, Partition
from pruneopt.plans import at_sparsity, path
from pruneopt.solvers import Descent, Polish

QUIET = {"progress": False}


def layer(n=12, m=3, seed=0):
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((80, n)) @ (np.eye(n) + 0.6 * rng.standard_normal((n, n)))
    return x, Reconstruction(jnp.asarray(rng.standard_normal((n, m))), Gram.from_inputs(jnp.asarray(x)))


def test_path_is_scikit_learns():
    linear_model = pytest.importorskip("sklearn.linear_model")
    x, f = layer(m=1)
    found = path(f, L1(1.0), points=6, least=0.01, **QUIET)
    theirs = linear_model.lasso_path(x, (x @ np.asarray(f.center))[:, 0], alphas=found.weights, tol=1e-12)[1]
    ours = np.concatenate([s.value for s in found.solutions], axis=1)
    np.testing.assert_allclose(ours, theirs, atol=1e-6)
    assert found.kept[0] == 0
    assert found.kept == tuple(np.count_nonzero(ours, axis=0))
    assert all(s.status is po.Status.OPTIMAL for s in found.solutions)
    assert str(found).count("\n") == 6
    assert "sparsity" in str(found)


def test_path_takes_its_own_weights_in_any_order():
    _, f = layer()
    found = path(f, ElasticNet(1.0, 0.5), weights=(0.01, 1.0, 0.1), **QUIET)
    assert found.weights == (1.0, 0.1, 0.01)
    alone = po.solve(po.Problem(f, penalty=ElasticNet(0.1, 0.5)), po.solvers.ActiveSet())
    assert found.solutions[1].objective == pytest.approx(alone.objective, rel=1e-12)


@pytest.mark.parametrize("count", [1, 7, 18, 35, 36])
def test_the_count_is_met_and_the_weights_are_the_best_on_it(count):
    _, f = layer()
    solution = at_sparsity(f, L1(1.0), count=count, **QUIET)
    assert solution.kept == count
    assert solution.status is po.Status.FEASIBLE
    mask = np.asarray(solution.support)
    best = po.solve(po.Problem(f, subject_to=Support(mask)), Polish())
    assert solution.objective == pytest.approx(best.objective, rel=1e-12)
    again = po.solve(po.Problem(f, penalty=L1(solution.stats["weight"])), po.solvers.ActiveSet())
    assert again.kept == count + solution.stats["tied"]
    np.testing.assert_array_equal(mask & np.asarray(again.support), mask)
    check = po.certify(po.Problem(f, subject_to=Cardinality(count=count, floor=0)), solution)
    assert check.violation == check.outside == 0


def test_sparsity_is_the_fraction_removed_to_the_unit():
    _, f = layer(n=11)
    assert at_sparsity(f, L1(1.0), sparsity=0.77, **QUIET).kept == int((1 - 0.77) * 33 + 1e-9)


def test_ties_are_cut_in_order():
    _, f = layer(m=1)
    twins = Reconstruction(jnp.concatenate([f.center] * 3, axis=1), f.curvature)
    solution = at_sparsity(twins, L1(1.0), count=7, **QUIET)
    assert solution.kept == 7
    assert solution.stats["tied"] in (2, 5)  # a multiple of three live at any weight
    by_output = np.asarray(solution.support).sum(0)
    assert list(by_output) == sorted(by_output, reverse=True)


def test_groups_are_counted_whole():
    _, f = layer()
    groups = Partition.slices(f.center, axis=0)
    solution = at_sparsity(f, GroupLasso(1.0, groups), count=5, **QUIET)
    alive = np.asarray(solution.support)
    assert alive.any(1).sum() == 5
    assert alive.sum() == 15


def test_penalties_that_are_not_convex_and_trees():
    w0 = tree(1)
    f = Quadratic(w0, Diagonal(jax.tree.map(lambda x: x**2 + 0.1, tree(3))))
    for count in (3, 8):
        assert at_sparsity(f, MCP(1.0, 3.0), count=count, **QUIET).kept == count


@pytest.mark.parametrize(
    "penalty", [MCP(1.0, 3.0), L1(1.0), OWL(1.0, jnp.linspace(2.0, 1.0, 12))], ids=["MCP", "L1", "OWL"]
)
def test_nothing_lives_at_the_largest_useful_weight(penalty):
    w0 = tree(1)
    f = Quadratic(w0, Diagonal(jax.tree.map(lambda x: x**2 + 0.1, tree(3))))
    found = path(f, penalty, points=2, progress=False)
    assert found.kept[0] == 0
    assert found.kept[1] > 0


def test_a_loss_is_debiased_by_descent():
    f = Loss(tiny_loss, tree(1), tiny_batches(), ["a", "b"])
    solver = po.solvers.ProximalGradient(iterations=100)
    # From the trained weights: zero is a stationary point of this loss.
    found = path(f, L1(1.0), solver, weights=(0.3, 0.05), **QUIET)
    assert found.kept[0] <= found.kept[1]
    with pytest.raises(ValueError, match=r"largest useful weight.*network of two layers.*weights=.*plans.penalised"):
        at_sparsity(f, L1(1.0), solver, count=6, debias=Descent(optax.sgd(0.05)), **QUIET)
    linear = Loss(lambda p, b: jnp.mean((b[0] @ p["w"] - b[1]) ** 2), {"w": matrix(1, 2, 1)}, tiny_batches())
    solution = at_sparsity(linear, L1(1.0), solver, count=1, debias=Descent(optax.sgd(0.1), 40), **QUIET)
    assert solution.kept == 1
    x, y = (np.concatenate([np.asarray(b[i]) for b in tiny_batches()]) for i in (0, 1))
    kept = int(np.flatnonzero(np.asarray(solution.support["w"])[:, 0])[0])
    best = (x[:, kept] @ y[:, 0]) / (x[:, kept] @ x[:, kept])
    assert float(solution.value["w"][kept, 0]) == pytest.approx(best, rel=1e-3)


F = Reconstruction(np.ones((3, 2), np.float32), Gram(np.eye(3, dtype=np.float32)))
DEAD = Reconstruction(np.ones((3, 2), np.float32), Gram(np.diag(np.asarray([1, 1, 0], np.float32))))
REFUSALS = {
    "a count that no weight reaches": (
        lambda: at_sparsity(DEAD, L1(1.0), count=5, solves=8, **QUIET),
        ("count=5", "only 4 of 6", "no weight brackets", "dead inputs"),
    ),
    "no amount": (lambda: at_sparsity(F, L1(1.0), **QUIET), ("neither", "exactly one")),
    "both amounts": (lambda: at_sparsity(F, L1(1.0), count=2, sparsity=0.5, **QUIET), ("both",)),
    "count 0": (lambda: at_sparsity(F, L1(1.0), count=0, **QUIET), ("count=0", "none of 6", ">= 1")),
    "count above": (lambda: at_sparsity(F, L1(1.0), count=7, **QUIET), ("count=7", "6")),
    "a loss without a way to debias": (
        lambda: at_sparsity(Loss(tiny_loss, tree(1), tiny_batches(), ["a", "b"]), L1(1.0), count=3, **QUIET),
        ("debias is None", "Descent"),
    ),
    "negative weights": (lambda: path(F, L1(1.0), weights=(0.1, -0.1), **QUIET), ("weights=", "> 0")),
    "weights that are a number": (lambda: path(F, L1(1.0), weights=0.1, **QUIET), ("weights=0.1", "pass")),
    "weights used up": (lambda: path(F, L1(1.0), weights=iter((0.1,)), **QUIET), ("weights=", "pass")),
    "no solves": (lambda: at_sparsity(F, L1(1.0), count=2, solves=0, **QUIET), ("solves=0", ">= 1")),
    "no weights": (lambda: path(F, L1(1.0), weights=(), **QUIET), ("weights=()", "pass")),
    "no points": (lambda: path(F, L1(1.0), points=0, **QUIET), ("points=0", ">= 1")),
    "least": (lambda: path(F, L1(1.0), least=1.5, **QUIET), ("least=1.5", "(0, 1)")),
    "weights that are not penalised": (
        lambda: path(F, L1(1.0, np.asarray([[1.0, 0.0]], np.float32)), **QUIET),
        ("largest useful weight", "inf", "weights="),
    ),
    "what the solver refuses": (lambda: path(F, MCP(1.0), po.solvers.ActiveSet(), **QUIET), ("L1 or ElasticNet",)),
}


@pytest.mark.parametrize("name", REFUSALS)
@pytest.mark.default_flags
def test_refuses_with_a_remedy(name):
    call, words = REFUSALS[name]
    with pytest.raises(ValueError, match=r"\w") as caught:
        call()
    for word in words:
        assert word in str(caught.value), caught.value


def test_weights_may_be_an_array_and_a_penalty_must_be_one():
    assert path(F, L1(1.0), weights=np.asarray([0.1, 0.5]), **QUIET).weights == (0.5, 0.1)
    with pytest.raises(TypeError, match=r"penalty is 'L1'; pass a penalty"):
        path(F, "L1", **QUIET)
