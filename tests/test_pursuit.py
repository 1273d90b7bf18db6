"""Hard thresholding pursuit: its step in dense NumPy, its refits by least squares, its quality against all supports."""

import jax
import jax.flatten_util
import jax.numpy as jnp
import numpy as np
import pytest
from cases import every_support, tree
from test_obs import best_on, model, parts

import pruneopt as po
from pruneopt.constraints import Cardinality, Intersection, Support
from pruneopt.curvature import Identity, LowRank
from pruneopt.objectives import Quadratic, Reconstruction
from pruneopt.solvers import CHITA, Polish, Pursuit, Score, Then

BUDGET = Cardinality(count=5, floor=0)


def flat(tree):
    return np.asarray(jax.flatten_util.ravel_pytree(tree)[0])


def correlated(shape=(20, 10), ridge=1e-3):
    rng = np.random.default_rng(0)
    center = {"w": jnp.asarray(rng.standard_normal(shape))}
    g = rng.standard_normal((60, 10)) @ rng.standard_normal((10, np.prod(shape)))
    g = g + 0.3 * rng.standard_normal((60, np.prod(shape)))
    return Quadratic(center, LowRank.checked(jnp.asarray(g), center, ridge=ridge))


@pytest.mark.parametrize("gradient", [None, 9])
@pytest.mark.parametrize("rank", [4, 20])
def test_each_step_is_a_thresholded_gradient_step_from_the_refit(gradient, rank):
    f = model(gradient if gradient is None else tree(gradient), rank=rank, damping=0.1)
    w0, h, g = parts(f)
    r = float(f.ridge())
    keep = lambda z: np.isin(np.arange(12), np.argsort(-(z**2), kind="stable")[:5])  # noqa: E731
    support, t = keep(w0 - g / r), 1.0
    for steps in range(1, 5):
        value, w = best_on(f, support)
        slope = h @ (w - w0) + g
        for _ in range(16):
            trial = keep(np.where(support, w, -t * slope / r))
            if (trial == support).all() or best_on(f, trial)[0] < value:
                break
            t /= 1.5
        if (trial != support).any() and best_on(f, trial)[0] < value:
            support, t = trial, min(1.0, 1.2 * t)
        got = po.solve(po.Problem(f, subject_to=BUDGET), Pursuit(steps, tolerance=0.0))
        np.testing.assert_array_equal(flat(got.support), support)
        np.testing.assert_allclose(flat(got.value), best_on(f, support)[1], atol=1e-9)
        assert got.objective == pytest.approx(best_on(f, support)[0], rel=1e-9)


@pytest.mark.slow
def test_it_lowers_the_refit_of_magnitude_where_thresholded_gradient_steps_do_not_move():
    f = correlated()
    problem = po.Problem(f, subject_to=Cardinality(sparsity=0.6))
    by_size = po.solve(po.Problem(Quadratic(f.center, Identity()), subject_to=problem.subject_to), Score())
    of_magnitude = po.solve(po.Problem(f, subject_to=Support(by_size.support)), Polish())
    still = po.solve(problem, CHITA(30))
    np.testing.assert_array_equal(flat(still.support), flat(by_size.support))
    got = po.solve(problem, Pursuit())
    assert got.objective < 0.9 * of_magnitude.objective
    assert got.stats["entered"] == np.sum(flat(got.support) & ~flat(by_size.support)) > 0
    again = po.solve(po.Problem(f, subject_to=Support(got.support)), Polish())
    np.testing.assert_allclose(flat(got.value), flat(again.value), atol=1e-9)
    from_there = po.solve(problem, Then(Score("random"), Pursuit()))
    assert from_there.objective < of_magnitude.objective
    assert po.solve(problem, Pursuit(1), init=got).objective <= got.objective * (1 + 1e-12)
    assert po.solve(problem, Pursuit(1)).status is po.Status.LIMIT


def test_what_is_zero_and_barred_takes_no_part():
    f = correlated()
    live = np.random.default_rng(3).random(200) < 0.5
    center = {"w": jnp.where(live.reshape(20, 10), f.center["w"], 0.0)}
    slope = np.random.default_rng(4).standard_normal(200)
    whole = Quadratic(center, f.curvature, {"w": jnp.asarray(slope.reshape(20, 10))})
    small = {"w": jnp.asarray(flat(center)[live])}
    part = Quadratic(
        small, LowRank.checked(f.curvature.gradients[:, live], small, ridge=1e-3), {"w": jnp.asarray(slope[live])}
    )
    within = Intersection((Support({"w": jnp.asarray(live.reshape(20, 10))}), Cardinality(count=30)))
    got = po.solve(po.Problem(whole, subject_to=within), Pursuit())
    alone = po.solve(po.Problem(part, subject_to=Cardinality(count=30)), Pursuit())
    np.testing.assert_allclose(flat(got.value)[live], flat(alone.value), atol=1e-9)
    assert not flat(got.value)[~live].any()
    assert got.objective == pytest.approx(alone.objective, rel=1e-10)


def test_it_is_near_the_best_of_all_supports():
    ratios = []
    for seed in range(8):
        f = model(damping=0.05, rank=4, seed=seed)
        w0, h, _ = parts(f)
        values = []
        for row in every_support()[every_support().sum(1) == 5]:
            d = np.where(row, 0.0, -w0)
            d[row] = -np.linalg.solve(h[np.ix_(row, row)], (h @ d)[row])
            values.append(0.5 * d @ h @ d)
        ratios.append(po.solve(po.Problem(f, subject_to=BUDGET), Pursuit()).objective / min(values))
    assert min(ratios) > 1 - 1e-9
    assert np.median(ratios) < 1.1


@pytest.mark.default_flags
def test_it_keeps_its_digits_in_float32():
    f = correlated(ridge=1e-5)
    narrow = Quadratic(
        {"w": f.center["w"].astype(jnp.float32)},
        LowRank.checked(jnp.asarray(f.curvature.gradients, jnp.float32), f.center, 1e-5),
    )
    got = po.solve(po.Problem(narrow, subject_to=Cardinality(sparsity=0.5)), Pursuit())
    s = np.flatnonzero(flat(got.support))
    g = np.asarray(narrow.curvature.gradients, np.float64)
    d = np.where(flat(got.support), 0.0, -flat(narrow.center).astype(np.float64))
    d[s] = -np.linalg.solve(g[:, s].T @ g[:, s] / len(g) + 1e-5 * np.eye(len(s)), g[:, s].T @ (g @ d) / len(g))
    exact = (np.sum((g @ d) ** 2) / len(g) + 1e-5 * d @ d) / 2
    assert got.objective == pytest.approx(exact, rel=1e-3)


@pytest.mark.default_flags
@pytest.mark.parametrize("solver", [Pursuit(), Then(Score(), Polish())])
def test_a_ridge_that_rounding_swallows_is_an_error(solver):
    g = np.tile(np.random.default_rng(0).standard_normal((40, 5)), (1, 20)).astype(np.float32)
    center = {"w": jnp.asarray(np.random.default_rng(1).standard_normal(100), jnp.float32)}
    f = Quadratic(center, LowRank.checked(jnp.asarray(g), center, ridge=1e-12))
    with pytest.raises(ValueError, match="ridge of 1e-12 in all, below the rounding"):
        po.solve(po.Problem(f, subject_to=Cardinality(sparsity=0.5)), solver)


def test_what_it_cannot_do_is_refused():
    gram = po.curvature.Gram.from_inputs(tree(1)["a"].T)
    for problem, message in (
        (po.Problem(Reconstruction(tree(1)["a"], gram), subject_to=BUDGET), "HardThresholding solves one layer"),
        (po.Problem(Quadratic(tree(1), Identity()), subject_to=BUDGET), "needs a low-rank curvature"),
        (po.Problem(model(), subject_to=BUDGET), "with a ridge"),
        (po.Problem(model(damping=0.1)), "needs a constraint"),
    ):
        with pytest.raises(ValueError, match=message):
            po.solve(problem, Pursuit())
    for knobs, message in (({"iterations": 0}, "iterations="), ({"tolerance": -1.0}, "tolerance=")):
        with pytest.raises(ValueError, match=message):
            Pursuit(**knobs)
