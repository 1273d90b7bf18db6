"""CHITA, M-FAC and the low-rank refit against dense linear algebra and each other."""

import jax
import jax.flatten_util
import jax.numpy as jnp
import numpy as np
import pytest
from cases import tiny_batches, tiny_loss, tree
from test_obs import best_on, model, parts

import pruneopt as po
from pruneopt.constraints import Cardinality, Slices, Support
from pruneopt.curvature import Identity, LowRank
from pruneopt.network.network import Network
from pruneopt.objectives import Quadratic
from pruneopt.plans import METHODS
from pruneopt.solvers import CHITA, OBS, Polish, Score, SummedOBS, Then

BUDGET = Cardinality(count=5, floor=0)


def flat(tree):
    return np.asarray(jax.flatten_util.ravel_pytree(tree)[0])


@pytest.mark.parametrize("gradient", [None, 9])
@pytest.mark.parametrize("rank", [4, 20])
def test_the_low_rank_refit_is_the_dense_one(gradient, rank):
    f = model(gradient if gradient is None else tree(gradient), rank=rank, damping=0.01)
    mask = {k: v > 0 for k, v in tree(12).items()}
    got = po.solve(po.Problem(f, subject_to=Support(mask)), Polish())
    value, w = best_on(f, flat(mask))
    np.testing.assert_allclose(flat(got.value), w, atol=1e-10)
    assert got.objective == pytest.approx(value, rel=1e-10)
    worst = Quadratic(f.center, f.curvature, f.gradient)
    with pytest.raises(ValueError, match="needs a low-rank curvature with a ridge"):
        po.solve(po.Problem(worst, subject_to=Support(mask)), Polish())


@pytest.mark.default_flags
def test_the_refit_keeps_its_digits_in_float32_at_a_small_ridge():
    rng = np.random.default_rng(0)
    center = {"w": jnp.asarray(rng.standard_normal(400), jnp.float32)}
    g = (rng.standard_normal((50, 5)) @ rng.standard_normal((5, 400)) + 1e-3 * rng.standard_normal((50, 400))) / 10
    g = jnp.asarray(g, jnp.float32)
    mask = np.abs(np.asarray(center["w"])) > np.median(np.abs(np.asarray(center["w"])))
    f = Quadratic(center, LowRank.checked(g, center, ridge=1e-5))
    got = po.solve(po.Problem(f, subject_to=Support({"w": jnp.asarray(mask)})), Polish())
    wide, w0 = np.asarray(g, np.float64), np.asarray(center["w"], np.float64)
    d = np.where(mask, 0.0, -w0)
    h = wide[:, mask].T @ wide[:, mask] / 50 + 1e-5 * np.eye(mask.sum())
    d[mask] = -np.linalg.solve(h, wide[:, mask].T @ (wide @ d) / 50)
    exact = (np.sum((wide @ d) ** 2) / 50 + 1e-5 * d @ d) / 2
    assert got.objective == pytest.approx(exact, rel=1e-4)


def test_m_fac_is_its_formula_and_exact_for_one_removal():
    f = model(damping=0.1)
    w0, h, _ = parts(f)
    inverse = np.linalg.inv(h)
    costs = w0**2 / (2 * np.diag(inverse))
    for count in (11, 5):
        got = po.solve(po.Problem(f, subject_to=Cardinality(count=count, floor=0)), SummedOBS())
        gone = np.argsort(costs)[: 12 - count]
        assert set(np.flatnonzero(~flat(got.support))) == set(gone)
        w = w0 - sum(inverse[:, q] * w0[q] / inverse[q, q] for q in gone)
        w[gone] = 0.0
        np.testing.assert_allclose(flat(got.value), w, atol=1e-10)
    one = po.solve(po.Problem(f, subject_to=Cardinality(count=11, floor=0)), OBS())
    assert po.solve(po.Problem(f, subject_to=Cardinality(count=11, floor=0)), SummedOBS()).objective == pytest.approx(
        one.objective
    )


def factors(params, batches):
    """(A, S) of each layer of the tiny network, by hand: inputs, and gradients of an example's loss in the outputs."""
    x, y = (np.concatenate([np.asarray(b[i]) for b in batches]) for i in (0, 1))
    hidden = np.tanh(x @ np.asarray(params["a"]))
    slope = 2 * (hidden @ np.asarray(params["b"]) - y.reshape(len(y), -1))
    early = slope @ np.asarray(params["b"]).T * (1 - hidden**2)
    return [(i.T @ i / len(x), g.T @ g / len(x)) for i, g in ((x, early), (hidden, slope))]


@pytest.mark.parametrize("row", ["woodfisher", "kfac_obs"])
def test_the_rows_by_blocks_and_by_factors_are_their_formula(row):
    params, batches = tree(1), tiny_batches()
    f = METHODS[row].model(Network.of(tiny_loss, params, batches), jax.random.key(0))
    w0, expected = flat(params), np.zeros((12, 12))
    if row == "woodfisher":  # a leaf is one block
        examples = [(x[None], y[None]) for batch in batches for x, y in zip(*batch, strict=True)]
        g = np.stack([flat(jax.grad(tiny_loss)(params, example)) for example in examples])
        for at in (slice(0, 8), slice(8, 12)):
            expected[at, at] = g[:, at].T @ g[:, at] / len(g)
    else:  # entries (i, j) of a matrix side by side: A (x) S
        for at, (a, s) in zip((slice(0, 8), slice(8, 12)), factors(params, batches), strict=True):
            expected[at, at] = np.kron(a, s)
    h = expected + 0.01 * np.trace(expected) / 12 * np.eye(12)
    np.testing.assert_allclose(
        np.stack([flat(f.curvature.mv(jax.flatten_util.ravel_pytree(params)[1](jnp.asarray(e)))) for e in np.eye(12)]),
        expected,
        atol=1e-12,
    )
    inverse = np.linalg.inv(h)
    for count in (11, 5):
        got = po.solve(po.Problem(f, subject_to=Cardinality(count=count, floor=0)), METHODS[row].solver)
        gone = np.argsort(w0**2 / np.diag(inverse))[: 12 - count]
        w = w0 - inverse[:, gone] @ (w0[gone] / np.diag(inverse)[gone])
        w[gone] = 0.0
        np.testing.assert_allclose(flat(got.value), w, atol=1e-9)
    alone = np.argsort(w0**2 * np.diag(h))[:7]
    if row == "kfac_obs":
        ranked = po.solve(po.Problem(f, subject_to=Cardinality(count=5, floor=0)), METHODS["kfac_obd"].solver)
        assert set(np.flatnonzero(~flat(ranked.support))) == set(alone)


def test_channels_go_by_what_each_costs_as_a_whole_in_the_metric_of_k_fac():
    params, batches = tree(1), tiny_batches()
    f = METHODS["kfac_channels"].model(Network.of(tiny_loss, params, batches), jax.random.key(0))
    (a, s), _ = factors(params, batches)
    w = np.asarray(params["a"])
    costs = [0.5 * s[c, c] * w[:, c] @ a @ w[:, c] for c in range(4)]
    for c, cost in enumerate(costs):
        without = {**params, "a": params["a"].at[:, c].set(0.0)}
        assert f.value(without) == pytest.approx(cost, rel=1e-9)
    pruned = po.prune(
        tiny_loss, params, batches, Slices(-1, Cardinality(count=2)), leaves=["a"], method="kfac_channels",
        progress=False,
    )  # fmt: skip
    kept = np.asarray(pruned.support["a"]).any(axis=0)
    np.testing.assert_array_equal(kept, np.argsort(np.argsort(costs)) >= 2)


@pytest.mark.slow
def test_chita_falls_and_is_stationary_on_its_support_after_the_refit():
    rng = np.random.default_rng(0)
    center = {"w": jnp.asarray(rng.standard_normal((20, 10)))}
    g = rng.standard_normal((300, 40)) @ rng.standard_normal((40, 200)) + 3 * rng.standard_normal((300, 200))
    f = Quadratic(center, LowRank.checked(jnp.asarray(g), center), damping=0.001)
    problem = po.Problem(f, subject_to=Cardinality(sparsity=0.6))
    start = po.solve(po.Problem(Quadratic(center, Identity()), subject_to=Cardinality(sparsity=0.6)), Score())
    plain = f.value(start.value)
    values = [po.solve(problem, CHITA(k)).objective for k in (1, 5, 60)]
    assert plain > values[0] > values[1] >= values[2]
    refitted = po.solve(problem, Then(CHITA(60), Polish()))
    of_magnitude = po.solve(po.Problem(f, subject_to=Support(start.support)), Polish())
    assert refitted.objective <= values[2]
    assert refitted.objective < of_magnitude.objective
    assert po.solve(problem, CHITA(1), init=refitted).objective <= refitted.objective * (1 + 1e-12)
    assert po.solve(problem, CHITA(1)).status is po.Status.LIMIT


@pytest.mark.default_flags
@pytest.mark.parametrize(
    "method", ["fisher", "obd", "m_fac", "woodfisher", "kfac_obs", "obs", "cbs", "chita", "pursuit", "global"]
)
@pytest.mark.slow
def test_half_precision_weights_have_curvature_below_their_smallest_number(method):
    def loss(params, batch):  # gradients of about 1e-4, squares of 1e-8, where float16 ends at 6e-8
        z = batch @ params["w"].astype(jnp.float32)
        return 1e-4 * jnp.mean(jnp.sum(z**2, axis=1))

    w, data = tree(1, {"w": (3, 4)}), [np.asarray(tree(2, {"x": (8, 3)})["x"], np.float32)]
    half = jax.tree.map(lambda x: jnp.asarray(x, jnp.float16), w)
    single = jax.tree.map(lambda x: x.astype(jnp.float32), half)
    run = lambda params: po.prune(loss, params, data, Cardinality(count=6), method=method, progress=False)  # noqa: E731
    got, expected = run(half), run(single)
    assert got.params["w"].dtype == jnp.float16
    np.testing.assert_array_equal(got.support["w"], expected.support["w"])
    np.testing.assert_allclose(got.params["w"], expected.params["w"], rtol=2e-3, atol=1e-3)


def test_what_they_cannot_do_is_refused():
    fine = model(damping=0.1)
    for f, solver, message in (
        (model(tree(9), damping=0.1), SummedOBS(), "drop gradient="),
        (model(), SummedOBS(), "invertible curvature"),
        (Quadratic(tree(1), Identity()), SummedOBS(), "inverse diagonal"),
        (Quadratic(tree(1), None, tree(2)), CHITA(), "needs a Quadratic with a curvature"),
    ):
        with pytest.raises(ValueError, match=message):
            po.solve(po.Problem(f, subject_to=BUDGET), solver)
    for solver in (CHITA(), SummedOBS()):
        with pytest.raises(ValueError, match="needs a constraint"):
            po.solve(po.Problem(fine), solver)
    with pytest.raises(ValueError, match="iterations="):
        CHITA(iterations=0)
