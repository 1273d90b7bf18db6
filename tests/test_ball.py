"""Norm balls: projections against optax, and the constrained problem against the penalised one."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import scipy.optimize
from cases import gram, masks, matrix, tree

import pruneopt as po
from pruneopt.constraints import NM, ByPath, Cardinality, GroupBall, Intersection, L1Ball, Laid, Support
from pruneopt.curvature import Diagonal, Gram
from pruneopt.objectives import Loss, Quadratic, Reconstruction
from pruneopt.penalties import L1
from pruneopt.solvers import ActiveSet, ProximalGradient, Score

F = Reconstruction(np.ones((4, 2), np.float32), Gram(np.eye(4, dtype=np.float32)))


def flat(w):
    return jnp.concatenate([x.reshape(-1) for x in jax.tree.leaves(w)])


@pytest.mark.parametrize("radius", [0.1, 2.0, 7.0, 1e3])
def test_the_l1_projection_is_optaxs(radius):
    for seed in range(3):
        w = tree(seed)
        with jax.numpy_dtype_promotion("standard"):
            theirs = optax.projections.projection_l1_ball(flat(w), radius)
        ours = jax.jit(L1Ball(radius).project)(w)
        np.testing.assert_allclose(flat(ours), theirs, atol=1e-12)
        assert L1Ball(radius).value_violation(ours) == 0
        assert (L1Ball(radius).value_violation(w) > 0) == (float(jnp.sum(jnp.abs(flat(w)))) > radius)


def test_the_group_projection_shrinks_norms_and_beats_points_around():
    ball, w = GroupBall(1.5), tree(4)
    found = ball.project(w)
    assert ball.norm(found) == pytest.approx(1.5, rel=1e-12)
    least = float(jnp.sum((flat(found) - flat(w)) ** 2))
    rng = np.random.default_rng(0)
    for _ in range(300):
        moved = jax.tree.map(lambda x: x + jnp.asarray(rng.normal(0, 0.2, x.shape)), found)
        other = jax.tree.map(lambda x, s=min(1.0, 1.5 / ball.norm(moved)): x * s, moved)
        assert float(jnp.sum((flat(other) - flat(w)) ** 2)) >= least
    inside = jax.tree.map(lambda x: 0.01 * x, w)
    np.testing.assert_array_equal(flat(ball.project(inside)), flat(inside))


def test_a_tied_projection_and_zeros_are_exact():
    w = {"w": jnp.asarray([1.0, 1.0, -1.0, 0.0])}
    np.testing.assert_allclose(L1Ball(1.5).project(w)["w"], [0.5, 0.5, -0.5, 0.0], atol=1e-15)
    np.testing.assert_array_equal(GroupBall(1.0, 0).project({"w": jnp.zeros((2, 2))})["w"], jnp.zeros((2, 2)))


def test_the_ball_of_a_lassos_norm_has_the_lassos_solution():
    f = Reconstruction(matrix(1), Gram.checked(gram()), damping=0.01)
    lasso = po.solve(po.Problem(f, penalty=L1(0.2)), ActiveSet())
    ball = L1Ball(float(jnp.sum(jnp.abs(lasso.value))))
    problem = po.Problem(f, subject_to=ball)
    solution = po.solve(problem, ProximalGradient(iterations=5000, tolerance=1e-9))
    assert solution.status is po.Status.OPTIMAL
    np.testing.assert_allclose(solution.value, lasso.value, atol=1e-4)
    assert po.certify(problem, solution).bound == solution.bound <= solution.objective


def test_a_group_ball_is_proven_too_and_a_point_outside_is_infeasible():
    f = Reconstruction(matrix(1), Gram.checked(gram()), damping=0.01)
    problem = po.Problem(f, subject_to=GroupBall(0.5, axis=0))
    solution = po.solve(problem, ProximalGradient(iterations=5000))
    assert solution.status is po.Status.OPTIMAL
    alive = np.asarray(solution.support).any(1)
    assert 0 < alive.sum() < len(alive)
    outside = po.Solution(f.center, problem.full_support(), po.Status.OPTIMAL, 0.0, 0.0, 0.0, solution.evidence, {})
    assert po.certify(problem, outside).status is po.Status.INFEASIBLE


@pytest.mark.default_flags
@pytest.mark.parametrize(
    "ball",
    [
        L1Ball(0.3),
        *(pytest.param(b, marks=pytest.mark.slow) for b in (L1Ball(2.0), GroupBall(0.5, axis=0), GroupBall(1.5))),
    ],
    ids=str,
)
@pytest.mark.slow
def test_balls_hold_and_are_proven_in_float32(ball):
    f = Reconstruction(
        jnp.asarray(matrix(1), jnp.float32), Gram.checked(jnp.asarray(gram(), jnp.float32)), damping=0.01
    )
    problem = po.Problem(f, subject_to=ball)
    solution = po.solve(problem, ProximalGradient(iterations=5000))
    assert solution.value.dtype == jnp.float32
    assert solution.status is po.Status.OPTIMAL
    assert ball.norm(solution.value) == pytest.approx(ball.radius, rel=1e-6)
    # The point is rounded to float32 and may stand outside by that much, below what the ball's own optimum has.
    assert po.certify(problem, solution).bound <= solution.objective * (1 + 1e-6)
    inside = jnp.asarray(np.random.default_rng(0).standard_normal((50, *f.center.shape)), jnp.float32)
    values = [problem.value(ball.project(0.3 * x + solution.value)) for x in inside]
    assert min(values) >= solution.objective - 1e-6 * abs(solution.objective)


@pytest.mark.slow
@pytest.mark.default_flags
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
@pytest.mark.parametrize("ball", [L1Ball(2.0), GroupBall(1.5)], ids=str)
def test_balls_hold_to_the_rounding_of_half_precision(ball, dtype):
    center = {"w": jnp.asarray(np.random.default_rng(1).standard_normal((40, 30)), dtype)}
    problem = po.Problem(po.objectives.Quadratic(center, po.curvature.Identity()), subject_to=ball)
    solution = po.solve(problem, ProximalGradient())
    assert solution.value["w"].dtype == dtype
    rounding = float(jnp.finfo(dtype).eps)
    assert ball.norm(solution.value) == pytest.approx(ball.radius, rel=rounding)
    assert ball.norm(ball.project(center)) == pytest.approx(ball.radius, rel=rounding)
    assert ball.value_violation(jax.tree.map(lambda x: x * (1 + 8 * rounding), solution.value)) > 0


MASK = np.asarray([[1, 1], [0, 1], [1, 0], [1, 1], [0, 0], [1, 1]], bool)


@pytest.mark.parametrize("radius", [0.3, 1.5])
@pytest.mark.parametrize("kind", [L1Ball, GroupBall])
def test_the_projection_within_a_support_is_the_nearest_point_of_both(kind, radius):
    """p is nearest to v if and only if <v - p, z - p> <= 0 for all z of the set: the largest <v - p, z> in NumPy."""
    ball = kind(radius)
    for seed in range(5):
        v = np.asarray(matrix(seed))
        for found in (
            Intersection((Support(jnp.asarray(MASK)), ball)).project(matrix(seed)),
            Intersection((ball,)).project(matrix(seed), jnp.asarray(MASK)),
            ball.project(matrix(seed), jnp.asarray(MASK)),
        ):
            p = np.asarray(found)
            assert not p[~MASK].any()
            assert ball.norm(p) <= radius * (1 + 1e-12)
            left = np.where(MASK, v - p, 0)
            largest = np.abs(left).max() if kind is L1Ball else np.sqrt((left**2).sum(0)).max()
            assert radius * largest - np.sum(left * p) <= 1e-12


def least_in_l1_ball(h, w0, mask, radius):
    """min 1/2 tr(D^T H D) over |W|_1 <= radius, W zero off the mask, by SciPy on W = U - V, U, V >= 0."""
    some, n = np.flatnonzero(mask), mask.sum()

    def full(x):
        w = np.zeros(mask.size)
        w[some] = x[:n] - x[n:]
        return w.reshape(mask.shape)

    def cost(x):
        d = full(x) - w0
        slope = (h @ d).reshape(-1)[some]
        return 0.5 * np.sum(d * (h @ d)), np.concatenate([slope, -slope])

    budget = {"type": "ineq", "fun": lambda x: radius - x.sum(), "jac": lambda x: -np.ones(2 * n)}
    options = {"ftol": 1e-14, "maxiter": 500}
    found = scipy.optimize.minimize(
        cost,
        np.zeros(2 * n),
        jac=True,
        method="SLSQP",
        bounds=[(0, None)] * (2 * n),
        constraints=budget,
        options=options,
    )
    return full(found.x), found.fun


def test_a_ball_within_a_support_has_scipys_optimum():
    f = Reconstruction(matrix(1), Gram.checked(gram()))
    ball = Intersection((L1Ball(1.2), Support(jnp.asarray(MASK))))
    problem = po.Problem(f, subject_to=ball)
    solution = po.solve(problem, ProximalGradient(iterations=5000, tolerance=1e-10))
    w, least = least_in_l1_ball(np.asarray(gram()), np.asarray(matrix(1)), MASK, 1.2)
    assert solution.status is po.Status.OPTIMAL
    assert solution.objective == pytest.approx(least, rel=1e-8)
    assert solution.bound <= least * (1 + 1e-8)
    np.testing.assert_allclose(solution.value, w, atol=1e-4)
    assert not np.asarray(solution.support)[~MASK].any()
    beside = po.Solution(3 * solution.value, solution.support, *[po.Status.OPTIMAL, 0.0, 0.0, 0.0, None, {}])
    assert po.certify(problem, beside).status is po.Status.INFEASIBLE
    assert ball.value_violation(3 * solution.value) == pytest.approx(2.4, rel=1e-5)


@pytest.mark.slow
def test_each_path_has_a_ball_of_its_own():
    h = jax.tree.map(jnp.square, tree(2))
    sets = {"a": L1Ball(1.0), "b": GroupBall(0.5, axis=0)}
    alone = {
        k: po.solve(po.Problem(Quadratic({k: tree(1)[k]}, Diagonal({k: h[k]})), subject_to=sets[k]), ProximalGradient())
        for k in sets
    }
    problem = po.Problem(Quadratic(tree(1), Diagonal(h)), subject_to=ByPath(sets))
    solution = po.solve(problem, ProximalGradient(tolerance=1e-9))
    assert solution.status is po.Status.OPTIMAL
    assert solution.objective == pytest.approx(sum(s.objective for s in alone.values()), rel=1e-6)
    assert problem.value_violation(tree(1)) == pytest.approx(
        sum(sets[k].value_violation({k: tree(1)[k]}) for k in sets), rel=1e-12
    )


def test_a_leaf_that_is_free_beside_a_ball_stays_and_nothing_is_proven():
    free = ByPath({"a": L1Ball(1.0), "b": Cardinality(sparsity=0.0)})
    problem = po.Problem(Quadratic(tree(1), Diagonal(jax.tree.map(jnp.square, tree(2)))), subject_to=free)
    solution = po.solve(problem, ProximalGradient(tolerance=1e-9))
    np.testing.assert_allclose(solution.value["b"], tree(1)["b"], rtol=1e-12)
    assert solution.status is po.Status.FEASIBLE
    assert solution.bound == -np.inf


def test_a_loss_is_lowered_within_a_ball_and_a_support():
    loss = Loss(
        lambda w, batch: jnp.mean(batch) * sum(jnp.sum((x - 1) ** 2) for x in w.values()), tree(1), [np.ones(2)]
    )
    allowed = masks(8)
    problem = po.Problem(loss, subject_to=Intersection((Support(allowed), L1Ball(3.0))))
    solution = po.solve(problem, ProximalGradient(tolerance=1e-8))
    kept = np.asarray(flat(allowed))
    np.testing.assert_allclose(flat(solution.value), np.where(kept, 3.0 / kept.sum(), 0.0), atol=1e-6)


def test_layer_by_layer_within_a_support():
    rng = np.random.default_rng(0)
    params, x = {"w": jnp.asarray(rng.standard_normal((6, 2)))}, jnp.asarray(rng.standard_normal((40, 6)))
    fn = lambda p, batch: batch @ p["w"]  # noqa: E731
    method = po.plans.LayerMethod(ProximalGradient(tolerance=1e-10), damping=0.0, target="layer")
    within = Intersection((Support({"w": jnp.asarray(MASK)}), L1Ball(1.2)))
    pruned = po.plans.layerwise(fn, params, [x], within, method, progress=False)
    h = np.asarray(x.T @ x) / len(x)
    w, _ = least_in_l1_ball(h, np.asarray(params["w"]), MASK, 1.2)
    np.testing.assert_allclose(pruned.params["w"], w, atol=1e-4)


def test_groups_of_a_leaf_are_those_of_its_matrix():
    """x @ W.T: axis 0 of the leaf is the outputs, which are the columns of (n_in, n_out)."""
    rng = np.random.default_rng(1)
    params, x = {"w": jnp.asarray(rng.standard_normal((3, 6)))}, jnp.asarray(rng.standard_normal((40, 6)))
    (slot,) = po.structure.layout(lambda p, batch: batch @ p["w"].T, params, x).of(params).values()
    assert GroupBall(1.0, axis=0).restricted([slot]) == [GroupBall(1.0, axis=-1)]
    assert GroupBall(1.0, axis=1).restricted([slot]) == [GroupBall(1.0, axis=-2)]
    kernel = {"w": jnp.asarray(rng.standard_normal((3, 3, 2, 4)))}
    image = jnp.ones((1, 5, 5, 2))

    def convolved(p, batch):
        return jax.lax.conv_general_dilated(batch, p["w"], (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))

    (slot,) = po.structure.layout(convolved, kernel, image).of(kernel).values()
    with pytest.raises(ValueError, match=r"axis=0: that axis of leaf 'w' is neither .* pass another axis"):
        GroupBall(1.0, axis=0).restricted([slot])


REFUSALS = {
    "radius": (lambda: L1Ball(0.0), ValueError, ("radius=0.0", "> 0")),
    "radius NaN": (lambda: GroupBall(float("nan")), ValueError, ("radius=nan",)),
    "axis": (lambda: po.Problem(F, subject_to=GroupBall(1.0, axis=2)), ValueError, ("axis=2", "pass another")),
    "a solver of supports": (
        lambda: po.solve(po.Problem(F, subject_to=L1Ball(1.0)), Score()),
        ValueError,
        ("Score", "L1Ball", "ProximalGradient"),
    ),
    "a ball beside a penalty": (
        lambda: po.solve(po.Problem(F, subject_to=L1Ball(1.0), penalty=L1(0.1)), ProximalGradient()),
        ValueError,
        ("a penalty or a ball", "drop"),
    ),
    "two balls": (
        lambda: Intersection((Intersection((L1Ball(1.0),)), GroupBall(2.0))),
        ValueError,
        ("L1Ball", "more than one set of values", "pass one"),
    ),
    "a ball and a choice": (
        lambda: po.solve(po.Problem(F, subject_to=Intersection((L1Ball(1.0), NM(2, 4)))), ProximalGradient()),
        ValueError,
        ("L1Ball", "chooses among supports", "Support(mask)"),
    ),
    "a solver of supports by path": (
        lambda: po.solve(po.Problem(F, subject_to=Intersection((NM(2, 4), L1Ball(1.0)))), Score()),
        ValueError,
        ("Score", "supports alone", "ProximalGradient"),
    ),
    "a metric": (
        lambda: Intersection((L1Ball(1.0),)).project(np.ones((4, 2)), None, np.ones((4, 2))),
        ValueError,
        ("metric", "L1Ball", "Euclidean"),
    ),
    "a layout": (lambda: Laid(L1Ball(1.0), None), ValueError, ("constraint=L1Ball", "Intersection")),
    "in training": (
        lambda: po.training.gradual(optax.sgd(0.1), Intersection((L1Ball(1.0), NM(2, 4))), end=2),
        ValueError,
        ("L1Ball", "supports alone"),
    ),
}


@pytest.mark.parametrize("name", REFUSALS)
@pytest.mark.default_flags
def test_refuses_with_a_remedy(name):
    call, kind, words = REFUSALS[name]
    with pytest.raises(kind, match=r"\w") as caught:
        call()
    for word in words:
        assert word in str(caught.value), caught.value
