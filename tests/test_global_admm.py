"""ADMM on a model of the whole network: its iteration in dense NumPy, its quality against all supports."""

import jax
import jax.flatten_util
import jax.numpy as jnp
import numpy as np
import pytest
from cases import tree
from test_obs import best_on, model, parts

import pruneopt as po
from pruneopt.constraints import Cardinality, Support
from pruneopt.curvature import LowRank
from pruneopt.objectives import Quadratic, Reconstruction
from pruneopt.solvers import OBS, GlobalADMM, Score

BUDGET = Cardinality(count=5, floor=0)


def flat(tree):
    return np.asarray(jax.flatten_util.ravel_pytree(tree)[0])


def largest(scores, count):
    mask = np.zeros(len(scores), bool)
    mask[np.argsort(-scores, kind="stable")[:count]] = True
    return mask


@pytest.mark.parametrize("gradient", [None, 9])
def test_an_exact_step_is_the_formula(gradient):
    f = model(gradient if gradient is None else tree(gradient), damping=0.1)
    w0, h, g = parts(f)
    scale = np.sqrt(np.diag(h))
    a, dense, t = h / np.outer(scale, scale), scale * w0, scale * w0
    mask = largest(t * t, 5)
    for i, rho in enumerate((0.5, 1.0, 2.0)):
        t = np.where(mask, t, t * (0.5 if i else 1.0))
        for _ in range(2):
            side = rho * (np.where(mask, t, -t) - dense) - g / scale
            b = dense + np.linalg.solve(a + rho * np.eye(12), side)
            t = t + 1.2 * (b - np.where(mask, t, 0.0))
            mask = largest(t * t, 5)
    solver = GlobalADMM(rho=(0.5, 2.0), levels=3, iterations=2, inner=30, refit=30)
    got = po.solve(po.Problem(f, subject_to=BUDGET), solver)
    np.testing.assert_array_equal(flat(got.support), mask)
    np.testing.assert_allclose(flat(got.value), best_on(f, mask)[1], atol=1e-8)
    raw = po.solve(po.Problem(f, subject_to=BUDGET), GlobalADMM((0.5, 2.0), 3, 2, inner=30, refit=0))
    np.testing.assert_allclose(flat(raw.value), np.where(mask, t / scale, 0.0), atol=1e-10)


@pytest.mark.slow
def test_it_beats_the_largest_saliencies_and_greedy_removal_on_correlated_weights():
    rng = np.random.default_rng(0)
    center = {"w": jnp.asarray(rng.standard_normal((20, 10)))}
    g = rng.standard_normal((300, 40)) @ rng.standard_normal((40, 200)) + rng.standard_normal((300, 200))
    f = Quadratic(center, LowRank.checked(jnp.asarray(g), center), damping=0.001)
    ours, greedy, ranked = (
        po.solve(po.Problem(f, subject_to=Cardinality(sparsity=0.6)), s)
        for s in (GlobalADMM((0.03, 3.0), inner=20, refit=100), OBS(), Score())
    )
    refitted = po.solve(po.Problem(f, subject_to=Support(ranked.support)), OBS())
    assert ours.objective < greedy.objective < refitted.objective


def test_it_is_not_worse_than_where_it_starts():
    f = model(damping=0.01)
    problem = po.Problem(f, subject_to=BUDGET)
    first = po.solve(problem, OBS())
    poor = GlobalADMM(levels=1, iterations=1, inner=1, refit=0)
    assert po.solve(problem, poor).objective > first.objective
    assert po.solve(problem, poor, init=first).objective <= first.objective


def test_on_a_support_it_is_the_refit():
    f = model(tree(9), damping=0.01)
    mask = tree(12)
    mask = {k: v > 0 for k, v in mask.items()}
    got = po.solve(po.Problem(f, subject_to=Support(mask)), GlobalADMM(refit=30))
    assert got.objective == pytest.approx(best_on(f, flat(mask))[0], rel=1e-8)


def test_a_weight_that_no_curvature_sees_is_the_first_to_go():
    f = model()
    h = f.curvature.gradients.at[:, 0].set(0.0)
    blind = Quadratic({**f.center, "a": f.center["a"] * 10}, type(f.curvature)(h, f.curvature.layout))
    got = po.solve(po.Problem(blind, subject_to=Cardinality(count=8, floor=0)), GlobalADMM())
    assert not flat(got.support)[0]


def test_what_it_cannot_do_is_refused():
    gram = po.curvature.Gram.from_inputs(tree(1)["a"].T)
    for problem, message in (
        (po.Problem(Reconstruction(tree(1)["a"], gram), subject_to=BUDGET), "ADMM solves one layer"),
        (po.Problem(Quadratic(tree(1), None, tree(2)), subject_to=BUDGET), "needs a Quadratic with a curvature"),
        (po.Problem(model()), "needs a constraint"),
    ):
        with pytest.raises(ValueError, match=message):
            po.solve(problem, GlobalADMM())
    for knobs, message in (({"rho": (0.0, 1.0)}, "rho="), ({"inner": 0}, "inner="), ({"relaxation": 2}, "relaxation=")):
        with pytest.raises(ValueError, match=message):
            GlobalADMM(**knobs)
    assert jnp.zeros(()).dtype == np.float64
