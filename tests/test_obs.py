"""Optimal Brain Surgeon: every removal against brute force, the result against the exact refit."""

import dataclasses
import re

import jax
import jax.flatten_util
import jax.numpy as jnp
import numpy as np
import pytest
from cases import masks, tiny_batches, tiny_loss, tree

import pruneopt as po
from pruneopt.constraints import NM, Cardinality, Intersection, Support
from pruneopt.curvature import Diagonal, Hessian, LowRank
from pruneopt.objectives import Quadratic
from pruneopt.solvers import OBS


def model(gradient=None, rank=20, damping=0.0, seed=3):
    center = tree(1)
    g = np.random.default_rng(seed).standard_normal((rank, 12))
    return Quadratic(center, LowRank.checked(jnp.asarray(g), center), gradient, damping=damping)


def parts(f):
    """w0, H + lambda I and g, from the operator's products alone."""
    w0, unflat = jax.flatten_util.ravel_pytree(f.center)
    h = np.stack([jax.flatten_util.ravel_pytree(f.curvature.mv(unflat(e)))[0] for e in jnp.eye(12)])
    g = np.zeros(12) if f.gradient is None else np.asarray(jax.flatten_util.ravel_pytree(f.gradient)[0])
    return np.asarray(w0), h + float(f.ridge()) * np.eye(12), g


def best_on(f, alive):
    """The minimum of f with the weights outside `alive` at zero, by least squares."""
    w0, h, g = parts(f)
    d = np.where(alive, 0.0, -w0)
    s = np.flatnonzero(alive)
    d[s] = np.linalg.solve(h[np.ix_(s, s)], -(h @ d + g)[s])
    return g @ d + 0.5 * d @ h @ d, w0 + d


@pytest.mark.parametrize("gradient", [None, 9])
def test_each_removal_is_the_best_one_and_the_rest_is_refitted(gradient):
    f = model(gradient if gradient is None else tree(gradient), damping=0.01)
    got = po.solve(po.Problem(f, subject_to=Cardinality(count=4, floor=0)), OBS())
    alive, before = np.ones(12, bool), best_on(f, np.ones(12, bool))[0]
    for q, rise in zip(got.stats["removed"], got.stats["rises"], strict=True):
        trials = {i: best_on(f, alive & (np.arange(12) != i))[0] for i in np.flatnonzero(alive)}
        assert q == min(trials, key=lambda i: trials[i])
        assert rise == pytest.approx(trials[q] - before, rel=1e-9)
        alive[q], before = False, trials[q]
    value, w = best_on(f, alive)
    np.testing.assert_allclose(np.concatenate([np.ravel(x) for x in jax.tree.leaves(got.value)]), w, atol=1e-10)
    assert got.objective == pytest.approx(value, rel=1e-9)


@pytest.mark.slow
def test_it_is_near_the_best_of_all_supports():
    f, ratios = model(rank=30), []
    for count in (3, 6, 9, 11):
        feasible = [a for a in (np.arange(4096)[:, None] >> np.arange(12)) % 2 == 1 if a.sum() == count]
        best = min(best_on(f, alive)[0] for alive in feasible)
        got = po.solve(po.Problem(f, subject_to=Cardinality(count=count, floor=0)), OBS())
        assert got.objective >= best * (1 - 1e-9)
        ratios.append(got.objective / best)
    assert ratios[-1] == pytest.approx(1, rel=1e-9)  # one removal: exact
    assert np.mean(ratios) < 1.1


def test_floors_leaves_and_supports_are_kept():
    f, allowed = model(), masks(8)
    cases = {
        Cardinality(count=5, floor=2): None,
        Cardinality(sparsity=0.5, per="leaf"): [4, 2],
        Support(allowed): [int(m.sum()) for m in jax.tree.leaves(allowed)],
        Intersection((Support(allowed), Cardinality(count=4, floor=0))): None,
    }
    for constraint, kept in cases.items():
        got = po.solve(po.Problem(f, subject_to=constraint), OBS())
        assert got.status is po.Status.FEASIBLE
        if kept is not None:
            assert [int(m.sum()) for m in jax.tree.leaves(got.support)] == kept
        alive = np.concatenate([np.ravel(x) for x in jax.tree.leaves(got.support)])
        assert got.objective == pytest.approx(best_on(f, alive)[0], rel=1e-9)


def test_what_it_cannot_do_is_refused():
    budget = Cardinality(count=4, floor=0)
    for problem, solver, message in (
        (po.Problem(Quadratic(tree(1), Diagonal(tree(1))), subject_to=budget), OBS(), "dense matrix"),
        (po.Problem(model(), subject_to=NM(1, 2)), OBS(), "cannot prune under"),
        (po.Problem(model(), subject_to=budget), OBS(memory=1000), "2,304 bytes"),
        (po.Problem(model(rank=5), subject_to=budget), OBS(), "not positive definite"),
    ):
        with pytest.raises(ValueError, match=message):
            po.solve(problem, solver)
    with pytest.raises(ValueError, match="memory="):
        OBS(memory=0)


@pytest.mark.default_flags
def test_a_small_ridge_is_not_lost_in_single_precision():
    g = (np.random.default_rng(0).standard_normal((6, 12)) * np.exp(np.arange(12) - 6)).astype(np.float32)
    run = lambda dtype: po.solve(  # noqa: E731
        po.Problem(
            Quadratic(c := tree(1, dtype=dtype), LowRank.checked(jnp.asarray(g, dtype), c), damping=1e-8),
            subject_to=Cardinality(count=8, floor=0),
        ),
        OBS(),
    )
    single = run(jnp.float32)
    with jax.enable_x64(True):
        double = run(jnp.float64)
    np.testing.assert_array_equal(single.stats["removed"], double.stats["removed"])
    np.testing.assert_allclose(single.stats["rises"], double.stats["rises"], rtol=1e-4)


def test_the_damping_that_it_asks_for_is_enough():
    for semidefinite in (True, False):
        f = model(rank=5) if semidefinite else indefinite()
        problem = lambda f: po.Problem(f, subject_to=Cardinality(count=4, floor=0))  # noqa: E731
        with pytest.raises(ValueError, match=r"damping=\) above .* mean\(diag H\)") as caught:
            po.solve(problem(f), OBS())
        assert ("Gauss-Newton" in str(caught.value)) != semidefinite
        asked = float(re.search(r"above ([-+.e0-9]+),", str(caught.value))[1])
        po.solve(problem(dataclasses.replace(f, damping=1.01 * asked)), OBS())


def indefinite():
    w = tree(1)
    h = Hessian.of(tiny_loss, w, tiny_batches(), ["a", "b"])
    assert np.trace(h.dense()) > 0 > np.linalg.eigvalsh(h.dense())[0]
    return Quadratic(w, h)
