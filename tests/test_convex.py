"""Penalised problems: the exact solver and proximal gradient against scikit-learn, and what their proofs are worth."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import MATRIX_PENALTIES, gram, matrix, tiny_batches, tiny_loss, tree

import pruneopt as po
from pruneopt.bounds import Duality
from pruneopt.constraints import Cardinality
from pruneopt.curvature import Diagonal, Gram
from pruneopt.objectives import Loss, Quadratic, Reconstruction
from pruneopt.penalties import L0, L1, MCP, ElasticNet, GroupLasso, Partition
from pruneopt.solvers import ActiveSet, ProximalGradient

OPTIMAL, LIMIT = po.Status.OPTIMAL, po.Status.LIMIT


def correlated(n=24, m=7, seed=0, samples=200):
    """A layer whose inputs are strongly correlated and of unlike size."""
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((samples, 6)) @ rng.standard_normal((6, n)) + 0.3 * rng.standard_normal((samples, n))
    x *= 10.0 ** rng.uniform(-1, 1, n)
    dtype = jnp.zeros(()).dtype
    w0 = jnp.asarray(rng.standard_normal((n, m)), dtype)
    return x, Reconstruction(w0, Gram.from_inputs(jnp.asarray(x, dtype)))


def steepest(f):
    """The largest useful weight of each output, (1, m)."""
    return np.abs(f.slope(jnp.zeros_like(f.center))).max(0, keepdims=True)


@pytest.mark.parametrize("share", [0.5, 0.1, 0.01])
@pytest.mark.parametrize("ratio", [1.0, 0.6])
def test_active_set_is_scikit_learns_optimum(share, ratio):
    linear_model = pytest.importorskip("sklearn.linear_model")
    x, f = correlated()
    top = steepest(f)
    penalty = L1(share, top) if ratio == 1 else ElasticNet(share, ratio, top)
    solution = po.solve(po.Problem(f, penalty=penalty), ActiveSet(first=3))
    assert solution.status is OPTIMAL
    assert solution.gap < 1e-10
    y = x @ np.asarray(f.center)
    for o in range(y.shape[1]):
        net = linear_model.ElasticNet(
            alpha=share * top[0, o], l1_ratio=ratio, fit_intercept=False, tol=1e-11, max_iter=2_000_000
        ).fit(x, y[:, o])
        np.testing.assert_allclose(solution.value[:, o], net.coef_, atol=1e-5 * np.abs(net.coef_).max())


def test_one_weight_for_all_outputs_or_one_each_and_a_warm_start_takes_fewer_steps():
    _, f = correlated()
    problem = po.Problem(f, penalty=L1(0.02 * float(steepest(f).max())))
    cold = po.solve(problem, ActiveSet())
    near = po.solve(replace(problem, penalty=L1(1.1 * problem.penalty.weight)), ActiveSet())
    warm = po.solve(problem, ActiveSet(), init=near)
    assert cold.objective == pytest.approx(warm.objective, rel=1e-12)
    assert warm.status is OPTIMAL
    assert warm.stats["steps"] < cold.stats["steps"]
    again = po.solve(problem, ActiveSet(), init=cold)
    np.testing.assert_allclose(again.value, cold.value, atol=1e-12)


@pytest.mark.parametrize("solver", [ActiveSet(), ProximalGradient()], ids=["active set", "proximal gradient"])
def test_the_largest_useful_weight_gives_zero_and_no_weight_the_dense_matrix(solver):
    f = Reconstruction(matrix(1), Gram.checked(gram()), damping=0.01)
    most = L1(1.0).weight_max(f.slope(jnp.zeros_like(f.center)))
    empty = po.solve(po.Problem(f, penalty=L1((1 + 1e-12) * most)), solver)  # at `most` itself rounding decides
    assert (empty.kept, empty.status) == (0, OPTIMAL)
    assert po.solve(po.Problem(f, penalty=L1(0.999 * most)), solver).kept > 0
    dense = po.solve(po.Problem(f, penalty=L1(0.0)), solver)
    np.testing.assert_allclose(dense.value, f.center, atol=1e-9)


@pytest.mark.parametrize("name", ["l1", "weighted l1", "elastic net"])
def test_singular_grams_and_dead_inputs_are_solved(name):
    h = np.array(gram(rank=3))
    h[2], h[:, 2] = 0, 0
    problem = po.Problem(Reconstruction(matrix(1), Gram.checked(jnp.asarray(h))), penalty=MATRIX_PENALTIES[name])
    exact = po.solve(problem, ActiveSet(first=1))
    plain = po.solve(problem, ProximalGradient(iterations=20_000, tolerance=1e-9))
    assert exact.objective == pytest.approx(plain.objective, rel=1e-7)
    assert not np.any(np.asarray(exact.value)[2])
    assert po.bounds.dual_value(problem, exact.evidence.point) == pytest.approx(exact.objective, rel=1e-7)
    assert exact.status.is_usable


@pytest.mark.parametrize("name", MATRIX_PENALTIES)
def test_a_bound_from_any_point_is_below_the_optimum(name):
    problem = po.Problem(Reconstruction(matrix(1), Gram.checked(gram())), penalty=MATRIX_PENALTIES[name])
    best = po.solve(problem, ProximalGradient(iterations=8000, tolerance=1e-10))
    for seed in range(5):
        point = best.value + 0.3**seed * matrix(60 + seed)
        bound = po.bounds.dual_value(problem, point)
        claim = replace(best, value=point, support=jnp.ones_like(point, bool), evidence=Duality(np.asarray(point)))
        found = po.certify(problem, claim)
        assert found.bound == bound
        assert found.status is not OPTIMAL
        assert bound <= best.objective if problem.penalty.is_convex else bound == -np.inf


def test_an_indefinite_gram_or_a_gradient_proves_nothing():
    bent = Reconstruction(jnp.ones((2, 1)), Gram.checked(jnp.asarray([[1.0, 3.0], [3.0, 1.0]])), damping=0.1)
    for f in (bent, Quadratic(tree(1), Diagonal(jax.tree.map(jnp.ones_like, tree(1))), tree(2))):
        problem = po.Problem(f, penalty=L1(0.1))
        point = jax.tree.map(np.asarray, f.center)
        claim = po.Solution(f.center, problem.full_support(), OPTIMAL, 0.0, 0.0, 0.0, Duality(point), {})
        assert po.certify(problem, claim).bound == -np.inf


@pytest.mark.default_flags
def test_float32_weights_are_proven_optimal_in_float64():
    _, f = correlated(samples=400)
    assert f.center.dtype == jnp.float32
    solution = po.solve(po.Problem(f, penalty=L1(0.05, jnp.asarray(steepest(f), jnp.float32))), ActiveSet())
    assert solution.status is OPTIMAL
    assert solution.value.dtype == jnp.float32


def test_rounds_at_their_limit_are_said():
    _, f = correlated()
    solution = po.solve(po.Problem(f, penalty=L1(0.01, steepest(f))), ActiveSet(first=1, growth=0.0, rounds=3))
    assert solution.status is LIMIT
    assert 0 < solution.bound < solution.objective


@pytest.mark.parametrize("step", [1e3, 1e30])
def test_a_step_that_diverges_is_halved_and_said(step):
    problem = po.Problem(Reconstruction(matrix(1), Gram.checked(gram())), penalty=L1(0.1))
    wild = po.solve(problem, ProximalGradient(step=step))
    tame = po.solve(problem, ProximalGradient())
    assert wild.stats["halvings"] >= 8
    assert wild.stats["step"] < 10
    assert wild.status is OPTIMAL
    assert wild.objective == pytest.approx(tame.objective, rel=2e-6)
    if step > 1e6:  # from there the threshold alone reaches zero, a stationary point of this loss
        return
    loss = po.Problem(Loss(tiny_loss, tree(1), tiny_batches(), ["a", "b"]), penalty=L1(0.01))
    slow = po.solve(loss, ProximalGradient(step=step, iterations=300))
    assert slow.stats["halvings"] >= 8
    assert slow.objective == pytest.approx(po.solve(loss, ProximalGradient(iterations=300)).objective, rel=1e-2)


def test_too_few_iterations_are_said():
    solution = po.solve(
        po.Problem(Reconstruction(matrix(1), Gram.checked(gram())), penalty=L1(0.1)), ProximalGradient(iterations=2)
    )
    assert solution.status is LIMIT
    assert solution.bound <= solution.objective


def test_momentum_and_restart_beat_plain_steps():
    _, f = correlated()
    penalty = L1(0.01, steepest(f))
    fast = po.solve(po.Problem(f, penalty=penalty), ProximalGradient(iterations=20_000))
    assert fast.status is OPTIMAL
    w, step = np.asarray(f.center), fast.stats["step"]
    h, w0 = np.asarray(f.curvature.matrix), np.asarray(f.center)
    for _ in range(fast.stats["iterations"]):
        v = w - step * h @ (w - w0)
        w = np.sign(v) * np.maximum(np.abs(v) - step * 0.01 * steepest(f), 0)
    plain = po.Problem(f, penalty=penalty).value(jnp.asarray(w))
    assert fast.objective < plain


def test_a_nonconvex_penalty_ends_at_a_point_where_no_step_helps():
    f = Reconstruction(matrix(1), Gram.checked(gram()))
    for penalty in (L0(0.05), MCP(0.2, 3.0)):
        solution = po.solve(po.Problem(f, penalty=penalty), ProximalGradient(tolerance=1e-12))
        assert solution.status is po.Status.FEASIBLE
        step = solution.stats["step"]
        moved = penalty.prox(solution.value - step * jnp.asarray(f.slope(solution.value)), step)
        np.testing.assert_allclose(moved, solution.value, atol=1e-9)


def test_group_lasso_removes_whole_inputs_of_a_layer():
    _, f = correlated()
    groups = Partition.slices(f.center, axis=0)
    most = GroupLasso(1.0, groups).weight_max(f.slope(jnp.zeros_like(f.center)))
    solution = po.solve(po.Problem(f, penalty=GroupLasso(0.1 * most, groups)), ProximalGradient(iterations=50_000))
    assert solution.status is OPTIMAL
    alive = np.asarray(solution.support)
    assert 0 < alive.any(1).sum() < len(alive)
    assert (alive.any(1) == alive.all(1)).all()


def test_logistic_regression_is_scikit_learns():
    linear_model = pytest.importorskip("sklearn.linear_model")
    rng = np.random.default_rng(0)
    x = rng.standard_normal((120, 6))
    y = (x @ np.asarray([2.0, -1.0, 0.5, 0, 0, 0]) + 0.5 * rng.standard_normal(120) > 0).astype(float)

    def loss(p, batch):
        features, labels = batch
        score = (features @ p["w"])[:, 0]
        return jnp.mean(jnp.logaddexp(0.0, score) - labels * score)

    data = [(jnp.asarray(x[:70]), jnp.asarray(y[:70])), (jnp.asarray(x[70:]), jnp.asarray(y[70:]))]
    problem = po.Problem(Loss(loss, {"w": jnp.zeros((6, 1))}, data), penalty=L1(0.05))
    solution = po.solve(problem, ProximalGradient(iterations=400, tolerance=1e-9))
    theirs = linear_model.LogisticRegression(
        C=1 / (0.05 * 120), l1_ratio=1.0, solver="saga", fit_intercept=False, tol=1e-9, max_iter=20_000
    ).fit(x, y)
    np.testing.assert_allclose(solution.value["w"][:, 0], theirs.coef_[0], atol=1e-4)
    assert solution.kept == np.count_nonzero(np.abs(theirs.coef_) > 1e-6)


LAYER = Reconstruction(np.ones((3, 2), np.float32), Gram(np.eye(3, dtype=np.float32)))
REFUSALS = {
    "other penalty": (lambda: (po.Problem(LAYER, penalty=MCP(0.1)), ActiveSet()), ("L1 or ElasticNet", "MCP", "use")),
    "no penalty": (lambda: (po.Problem(LAYER), ActiveSet()), ("L1 or ElasticNet", "None")),
    "other objective": (
        lambda: (po.Problem(Quadratic(tree(1), None, tree(2)), penalty=L1(0.1)), ActiveSet()),
        ("Reconstruction", "Quadratic", "ProximalGradient"),
    ),
    "constraint": (
        lambda: (po.Problem(LAYER, penalty=L1(0.1), subject_to=Cardinality(count=2)), ActiveSet()),
        ("constraint", "drop subject_to="),
    ),
    "no penalty for the prox": (lambda: (po.Problem(LAYER), ProximalGradient()), ("needs a penalty", "L1(0.01)")),
    "constraint beside the prox": (
        lambda: (po.Problem(LAYER, penalty=L1(0.1), subject_to=Cardinality(count=2)), ProximalGradient()),
        ("drop subject_to=",),
    ),
    "no curvature": (
        lambda: (po.Problem(Quadratic(tree(1), None, tree(2)), penalty=L1(0.1)), ProximalGradient()),
        ("curvature", "Quadratic"),
    ),
}


@pytest.mark.parametrize("name", REFUSALS)
def test_refuses_with_a_remedy(name):
    problem, solver = REFUSALS[name][0]()
    with pytest.raises(ValueError, match=r"\w") as caught:
        po.solve(problem, solver)
    for word in REFUSALS[name][1]:
        assert word in str(caught.value), caught.value


@pytest.mark.parametrize(
    ("make", "word"),
    [
        (lambda: ProximalGradient(step=-1.0), "step=-1.0"),
        (lambda: ProximalGradient(step=float("nan")), "step=nan"),
        (lambda: ProximalGradient(iterations=0), "iterations=0"),
        (lambda: ProximalGradient(tolerance=-1e-6), "tolerance=-1e-06"),
        (lambda: ActiveSet(first=0), "first=0"),
        (lambda: ActiveSet(growth=float("inf")), "growth=inf"),
    ],
)
def test_knobs_are_checked(make, word):
    with pytest.raises(ValueError, match=r"pass") as caught:
        make()
    assert word in str(caught.value)


def test_a_loss_that_is_not_finite_where_it_starts_is_an_error():
    problem = po.Problem(
        Loss(lambda p, b: jnp.log(p["w"]).sum() * jnp.mean(b), {"w": -jnp.ones((2, 2))}, [jnp.ones(3)]), penalty=L1(0.1)
    )
    with pytest.raises(ValueError, match="fn returns nan"):
        po.solve(problem, ProximalGradient())


# Celer's objective (0.7.4, tolerance 1e-6) of lambda = 0.3, 0.1 of the largest of each output, on the damped layer.
CELER = {0.3: 278.1685699, 0.1: 119.1625598}


@pytest.mark.slow
@pytest.mark.default_flags
@pytest.mark.parametrize("share", CELER)
def test_a_real_layer_is_proven_optimal_at_celers_objective(share, folder, optimised):
    with np.load(folder / "layers" / "minilm_l4_ffn_out.npz", allow_pickle=False) as layer:
        h, w0 = layer["H"] / int(layer["n_samples"]), layer["W0"].T
    f = Reconstruction(jnp.asarray(w0), Gram.checked(jnp.asarray(h)), damping=0.01)
    solution = po.solve(po.Problem(f, penalty=L1(share, jnp.asarray(steepest(f), jnp.float32))), ActiveSet())
    assert solution.status is OPTIMAL
    assert solution.objective == pytest.approx(CELER[share], rel=1e-6)
