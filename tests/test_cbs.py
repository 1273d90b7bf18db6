"""The Combinatorial Brain Surgeon against every swap and every support, and its update against the paper's formula."""

import jax
import jax.flatten_util
import jax.numpy as jnp
import numpy as np
import pytest
from cases import every_support, tree
from test_obs import model, parts

import pruneopt as po
from pruneopt.constraints import NM, Cardinality, Intersection, Support
from pruneopt.curvature import Identity, LowRank
from pruneopt.objectives import Quadratic, Reconstruction
from pruneopt.solvers import CBS, Polish, Score, Then


def flat(tree):
    return np.asarray(jax.flatten_util.ravel_pytree(tree)[0])


def cost(f, support):
    """The objective with w0 on the support and zero elsewhere."""
    w0, h, g = parts(f)
    d = np.where(support, 0.0, -w0)
    return g @ d + 0.5 * d @ h @ d


LEAF = np.repeat(np.arange(len(tree(1))), [x.size for x in jax.tree.leaves(tree(1))])


@pytest.mark.parametrize("gradient", [None, 9])
@pytest.mark.parametrize("per", ["tree", "leaf"])
@pytest.mark.slow
def test_no_swap_of_any_pair_lowers_what_it_returns(per, gradient):
    budget = Cardinality(sparsity=0.5, per=per, floor=0 if per == "tree" else None)
    gains = []
    for seed in range(4):
        f = model(gradient if gradient is None else tree(gradient), rank=8, damping=0.01, seed=seed)
        got = po.solve(po.Problem(f, subject_to=budget), CBS(tolerance=1e-12))
        support = flat(got.support)
        assert got.objective == pytest.approx(cost(f, support), rel=1e-9)
        np.testing.assert_array_equal(flat(got.value), np.where(support, flat(f.center), 0.0))
        for i in np.flatnonzero(~support):
            for j in np.flatnonzero(support):
                if per == "tree" or LEAF[i] == LEAF[j]:
                    other = support.copy()
                    other[[i, j]] = True, False
                    assert cost(f, other) >= got.objective * (1 - 1e-9 * np.sign(got.objective))
        gains.append(got.stats["swaps"])
    assert max(gains) >= 2


def test_it_is_near_the_best_of_all_supports():
    ratios = []
    for seed in range(8):
        f = model(rank=5, damping=0.01, seed=seed)
        w0, h, _ = parts(f)
        rows = every_support()[every_support().sum(1) == 5]
        d = np.where(rows, 0.0, -w0)
        best = np.min(0.5 * np.einsum("ki,ij,kj->k", d, h, d))
        got = po.solve(po.Problem(f, subject_to=Cardinality(count=5, floor=0)), CBS())
        ratios.append(got.objective / best)
    assert min(ratios) > 1 - 1e-9
    assert np.median(ratios) < 1.05


def test_weights_that_cancel_one_another_go_together():
    g = np.linalg.qr(np.random.default_rng(0).standard_normal((30, 6)))[0]
    g[:, 1] = g[:, 0]  # the same input twice
    center = {"w": jnp.asarray([0.8, -1.0, 0.9, 1.1, 1.2, 1.3])}
    f = Quadratic(center, LowRank.checked(jnp.asarray(g), center, ridge=1e-6))
    problem = po.Problem(f, subject_to=Cardinality(count=4))
    alone, together = (np.flatnonzero(~flat(po.solve(problem, s).support)).tolist() for s in (Score(), CBS()))
    assert (alone, together) == ([0, 2], [0, 1])


def test_the_refit_of_what_it_keeps_is_the_joint_update_of_the_paper():
    f = model(damping=0.1)
    w0, h, _ = parts(f)
    inverse = np.linalg.inv(h)
    problem = po.Problem(f, subject_to=Cardinality(count=5, floor=0))
    gone = np.flatnonzero(~flat(po.solve(problem, CBS()).support))
    w = w0 - inverse[:, gone] @ np.linalg.solve(inverse[np.ix_(gone, gone)], w0[gone])
    np.testing.assert_allclose(flat(po.solve(problem, Then(CBS(), Polish())).value), w, atol=1e-9)


def test_it_obeys_its_budget_and_starts_where_it_is_told():
    f = model(rank=8, damping=0.01)
    allowed = {k: jnp.ones(v.shape, bool) for k, v in tree(1).items()}
    allowed["a"] = jnp.zeros_like(allowed["a"])
    within = Intersection((Support(allowed), Cardinality(count=4, floor=0)))
    got = po.solve(po.Problem(f, subject_to=within), CBS(candidates=3))
    assert not np.any(flat(got.support) & ~flat(allowed))
    problem = po.Problem(f, subject_to=Cardinality(count=5, floor=0))
    first = po.solve(problem, Score("random"), key=jax.random.key(3))
    assert po.solve(problem, CBS(sweeps=0), init=first).objective == pytest.approx(first.objective)
    better = po.solve(problem, CBS(), init=first)
    assert better.objective < first.objective
    np.testing.assert_array_equal(flat(po.solve(problem, CBS(), init=better).support), flat(better.support))
    plain, many = (po.solve(problem, CBS(draws, sweeps=0)) for draws in (1, 40))
    np.testing.assert_array_equal(flat(plain.support), np.abs(flat(f.center)) >= np.sort(np.abs(flat(f.center)))[-5])
    assert many.objective < plain.objective


def test_what_it_cannot_do_is_refused():
    gram = po.curvature.Gram.from_inputs(tree(1)["a"].T)
    for problem, message in (
        (po.Problem(Reconstruction(tree(1)["a"], gram), subject_to=Cardinality(count=5)), "Swap solves one layer"),
        (po.Problem(Quadratic(tree(1), Identity()), subject_to=Cardinality(count=5)), "curvature with blocks"),
        (po.Problem(model(), subject_to=NM(1, 2, axis=0)), "cannot swap under"),
        (po.Problem(model()), "needs a constraint"),
    ):
        with pytest.raises(ValueError, match=message):
            po.solve(problem, CBS())
    for knobs, message in (({"draws": 0}, "draws="), ({"candidates": 0}, "candidates="), ({"tolerance": -1.0}, "tol")):
        with pytest.raises(ValueError, match=message):
            CBS(**knobs)
