"""Norm balls: projections against optax, and the constrained problem against the penalised one."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from cases import gram, matrix, tree

import pruneopt as po
from pruneopt.constraints import ByPath, Cardinality, GroupBall, Intersection, L1Ball
from pruneopt.curvature import Gram
from pruneopt.objectives import Reconstruction
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
@pytest.mark.parametrize("ball", [L1Ball(2.0), L1Ball(0.3), GroupBall(0.5, axis=0), GroupBall(1.5)], ids=str)
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
    "in an intersection": (
        lambda: Intersection((L1Ball(1.0), Cardinality(count=2))),
        TypeError,
        ("L1Ball", "stands alone"),
    ),
    "by path": (lambda: ByPath({"*": GroupBall(1.0)}), TypeError, ("GroupBall", "stands alone")),
}


@pytest.mark.parametrize("name", REFUSALS)
@pytest.mark.default_flags
def test_refuses_with_a_remedy(name):
    call, kind, words = REFUSALS[name]
    with pytest.raises(kind, match=r"\w") as caught:
        call()
    for word in words:
        assert word in str(caught.value), caught.value
