"""Polish and descent against NumPy's least squares and plain loops."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from cases import gram, masks, matrix, tiny_batches, tiny_loss, tree

import pruneopt as po
from pruneopt.constraints import Cardinality, Support
from pruneopt.curvature import Diagonal, Gram
from pruneopt.objectives import Loss, Quadratic, Reconstruction
from pruneopt.solvers import Descent, Polish


@pytest.mark.parametrize("rank", [None, 3], ids=["regular", "singular"])
@pytest.mark.parametrize("damping", [0.0, 0.01])
@pytest.mark.parametrize("density", [0.0, 0.3, 0.7, 1.0])
def test_refit_reaches_the_least_squares_error_of_every_column(rank, damping, density):
    n, m = 9, 5
    h, w0 = gram(n, rank), matrix(1, n, m)
    mask = np.random.default_rng(3).random((n, m)) < density
    objective = Reconstruction(w0, Gram.checked(h), damping=damping)
    problem = po.Problem(objective, subject_to=Cardinality(count=int(mask.sum()), floor=0))
    solution = po.solve(problem, Polish(), init=jnp.asarray(mask))
    dense = np.asarray(h) + damping * np.trace(h) / n * np.eye(n)
    root = np.linalg.cholesky(dense + 1e-13 * np.eye(n)).T
    best = 0.0
    for j in range(m):
        s = np.flatnonzero(mask[:, j])
        target = root @ np.asarray(w0)[:, j]
        fitted = root[:, s] @ np.linalg.lstsq(root[:, s], target, rcond=None)[0] if len(s) else 0 * target
        best += 0.5 * np.sum((target - fitted) ** 2)
    assert solution.objective == pytest.approx(best, rel=1e-8, abs=1e-10)
    assert np.all(np.asarray(solution.value)[~mask] == 0)


def test_refit_is_proven_optimal_on_a_fixed_support_with_damping():
    mask = jnp.asarray(np.random.default_rng(4).random((6, 2)) < 0.5)
    problem = po.Problem(Reconstruction(matrix(1), Gram.checked(gram()), damping=0.01), subject_to=Support(mask))
    assert po.solve(problem, Polish()).status is po.Status.OPTIMAL
    assert po.certify(problem, po.solve(problem, Polish())).gap < 1e-9


def test_bound_of_a_half_finished_refit_is_below_the_optimum():
    mask = jnp.asarray(np.random.default_rng(4).random((6, 2)) < 0.5)
    problem = po.Problem(Reconstruction(matrix(1), Gram.checked(gram()), damping=0.01), subject_to=Support(mask))
    best = po.solve(problem, Polish())
    nearly = jax.tree.map(lambda w: jnp.where(mask, w + 1e-3, 0), best.value)
    unfinished = po.Solution(nearly, mask, best.status, 0.0, 0.0, 0.0, best.evidence, {})
    found = po.certify(problem, unfinished)
    assert found.bound <= best.objective <= found.objective
    assert found.status is po.Status.FEASIBLE


def test_diagonal_polish_is_newton_coordinate_by_coordinate():
    w0, g, h = tree(1), tree(2), jax.tree.map(lambda x: x**2 + 0.1, tree(3))
    problem = po.Problem(Quadratic(w0, Diagonal(h), g), subject_to=Support(masks(4)))
    value = po.solve(problem, Polish()).value
    jax.tree.map(
        lambda v, w, g, h, m: np.testing.assert_allclose(v, np.where(m, w - g / h, 0), rtol=1e-12),
        value,
        w0,
        g,
        h,
        masks(4),
    )


def test_descent_is_masked_gradient_descent():
    params, mask, data = tree(1), masks(5), tiny_batches((5, 5))
    solution = po.solve(
        po.Problem(Loss(tiny_loss, params, data, ["a", "b"]), subject_to=Support(mask)),
        Descent(optax.sgd(0.1), epochs=3),
    )
    w = jax.tree.map(lambda x, m: jnp.where(m, x, 0), params, mask)
    for _ in range(3):
        for batch in data:
            w = jax.tree.map(lambda x, g, m: jnp.where(m, x - 0.1 * g, 0), w, jax.grad(tiny_loss)(w, batch), mask)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-12, atol=1e-14), solution.value, w)
    assert len(solution.stats["losses"]) == 3
    assert solution.stats["losses"][-1] < solution.stats["losses"][0]


@pytest.mark.default_flags  # optax's Adam promotes an integer count
def test_descent_with_momentum_never_leaves_the_support_and_advances_state():
    params = {**tree(1), "seen": jnp.zeros(())}

    def stateful(p, batch):
        return tiny_loss(p, batch), {"a": None, "b": None, "seen": p["seen"] + 1}

    mask = masks(6)
    problem = po.Problem(Loss(stateful, params, tiny_batches((5, 5)), ["a", "b"], True), subject_to=Support(mask))
    solution = po.solve(problem, Descent(optax.adam(0.05), epochs=4))
    for k, m in mask.items():
        assert np.all(np.asarray(solution.value[k])[~np.asarray(m)] == 0)
    assert float(po.structure.combine(solution.value, solution.stats["rest"])["seen"]) == 8


def test_updates_may_not_touch_what_is_trained():
    problem = po.Problem(
        Loss(lambda p, b: (tiny_loss(p, b), p), tree(1), tiny_batches(), ["a", "b"], True), subject_to=Support(masks(6))
    )
    with pytest.raises(ValueError, match="updates"):
        po.solve(problem, Descent(optax.sgd(0.1)))
