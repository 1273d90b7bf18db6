"""The layer engine: ADMM, conjugate gradients and the presets."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import pruneopt as po
from pruneopt import _linalg
from pruneopt.constraints import NM, Blocks, Cardinality, Intersection, Slices, Support
from pruneopt.curvature import Gram
from pruneopt.objectives import Reconstruction
from pruneopt.solvers import ADMM, Auto, ConjugateGradients, Polish, Score, Then, auto, factors
from pruneopt.solvers.base import prepared

N, M = 24, 10


def inputs(seed=0, n=N, rows=200, spread=1.0, dtype=np.float64):
    rng = np.random.default_rng(seed)
    mixing = rng.standard_normal((n, n)) * np.exp(spread * rng.standard_normal(n))
    return (rng.standard_normal((rows, n)) @ mixing).astype(dtype)


def problem(constraint, x=None, dtype=np.float64, m=M, damping=0.0, weights=None):
    x = inputs(dtype=dtype) if x is None else x
    w = np.random.default_rng(1).standard_normal((x.shape[1], m)) if weights is None else weights
    gram = Gram.checked(jnp.asarray(x.T @ x / len(x), dtype))
    return po.Problem(Reconstruction(jnp.asarray(w, dtype), gram, damping), subject_to=constraint)


def by_density(damped, density, floor, ends=None):
    """What removing an input costs where that part of the others is kept: OBS's Schur complement in noise."""
    diagonal, noise = np.diag(damped), (1 - density) / np.sqrt(density) * np.diag(damped)
    noisy = damped + np.diag(noise)
    blocks = [noisy[i:j, i:j] for i, j in itertools.pairwise(ends or [0, len(damped)])]
    removed = np.concatenate([1 / np.diag(np.linalg.inv(block)) for block in blocks])
    return np.maximum(removed - noise, floor * diagonal)


def by_hand(x, w0, solver):
    """ADMM with B, D and the dual V apart, in NumPy, under 2:4 along the inputs; the mask."""
    h = x.T @ x / len(x)
    damped = h + solver.damping * np.mean(np.diag(h)) * np.eye(len(h))
    s = by_density(damped, 0.5, solver.floor)
    a, b0 = damped / np.sqrt(np.outer(s, s)), np.sqrt(s)[:, None] * w0

    def mask(t):
        order = np.argsort(np.argsort(-np.abs(t).reshape(-1, 4, t.shape[1]), axis=1), axis=1)
        return (order < 2).reshape(t.shape)

    rhos = np.geomspace(*solver.rho, solver.levels)
    d = b0 * mask(b0)
    v = rhos[0] * (b0 - d)
    for rho in rhos:
        for _ in range(solver.iterations):
            b = np.linalg.solve(a + rho * np.eye(len(a)), a @ b0 + rho * d - v)
            t = b + v / rho
            d = t * mask(t)
            v = v + rho * (b - d)
    return mask(t)


def test_the_iterations_are_the_papers():
    x, w0 = inputs(), np.random.default_rng(1).standard_normal((N, M))
    solver = ADMM(relaxation=1.0, levels=3, iterations=5, rho=(0.5, 3.0), refit=30, refit_damping=0.0)
    solution = po.solve(problem(NM(2, 4), x), solver)
    expected = by_hand(x, w0, solver)
    assert not np.array_equal(expected, by_hand(x, w0, ADMM(levels=1, iterations=1)))
    np.testing.assert_array_equal(solution.support, expected)
    polished = po.solve(problem(Support(solution.support), x), Polish())
    assert solution.objective == pytest.approx(polished.objective, rel=1e-6)


CONSTRAINTS = {
    "layer": Cardinality(sparsity=0.6),
    "output": Cardinality(sparsity=0.6, per="out"),
    "input": Cardinality(count=4, per="in"),
    "runs of 7 inputs": Cardinality(sparsity=0.6, per="in", span=7),
    "runs of 4 outputs": Cardinality(sparsity=0.6, per="out", span=4),
    "2:4": NM(2, 4),
    "1:5 of outputs": NM(1, 5, axis="out"),
    "blocks": Blocks((4, 1), Cardinality(sparsity=0.5)),
    "whole inputs": Slices(-2, Cardinality(count=12)),
    "2:4 within a mask": Intersection(
        (Support(jnp.asarray(np.random.default_rng(5).random((N, M)) < 0.8)), NM(2, 4, axis="in"))
    ),
    "budget within a mask": Intersection(
        (Support(jnp.asarray(np.random.default_rng(5).random((N, M)) < 0.8)), Cardinality(sparsity=0.6))
    ),
    "budget within 2:4": Intersection((NM(2, 4), Cardinality(sparsity=0.6))),
    "a mask": Support(jnp.asarray(np.random.default_rng(5).random((N, M)) < 0.5)),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", CONSTRAINTS)
def test_every_constraint_is_met_and_beats_the_score_with_its_exact_refit(name):
    task = problem(CONSTRAINTS[name])
    solution = po.solve(task, Then(ADMM(levels=4, refit=10), Polish()))
    assert po.certify(task, solution).violation == 0
    reference = po.solve(task, Then(Score(), Polish()))
    assert solution.objective <= reference.objective * (1 + 1e-9)
    if name == "layer":
        assert solution.kept == 96
        assert solution.objective < 0.8 * reference.objective


@pytest.mark.default_flags
@pytest.mark.parametrize("products", ["bfloat16", "float32"])
@pytest.mark.slow
def test_single_precision_finds_what_double_finds(products):
    task = problem(Cardinality(sparsity=0.6), dtype=np.float32)
    found = po.solve(task, ADMM(products=products))
    with jax.enable_x64(True):
        wide = po.solve(problem(Cardinality(sparsity=0.6)), ADMM())
    assert found.stats["products"] == products
    assert found.objective <= 1.1 * wide.objective  # 240 weights: one other choice is worth some per cent


def test_never_worse_than_where_it_starts():
    task = problem(Cardinality(sparsity=0.6))
    best = po.solve(task, Then(ADMM(levels=8, iterations=20, refit=20), Polish()))
    for solver in (ADMM(levels=1, iterations=1), ADMM(), ConjugateGradients(3)):
        assert po.solve(task, solver, init=best).objective <= best.objective * (1 + 1e-12)
    score = po.solve(task, Score())
    refitted = po.solve(task, Polish(), init=score).objective
    for iterations, share in ((2, 1 + 1e-9), (20, 0.99)):
        found = po.solve(task, ADMM(levels=1, iterations=iterations, refit=40, refit_damping=0.0), init=score)
        assert found.objective < share * refitted


def test_a_good_start_is_nearly_a_fixed_point():
    task = problem(Cardinality(sparsity=0.6))
    best = po.solve(task, Then(ADMM(levels=8, iterations=20, refit=20), Polish()))
    again = po.solve(task, ADMM(levels=1, iterations=1, rho=(3.0, 3.0), damping=1e-9), init=best)
    assert np.mean(np.asarray(again.support) == np.asarray(best.support)) > 0.95


@pytest.mark.parametrize("power", [-80, 80])
def test_scale_does_not_matter_to_the_bit(power):
    plain = po.solve(problem(Cardinality(sparsity=0.6)), ADMM())
    f = problem(Cardinality(sparsity=0.6)).objective
    scaled = Reconstruction(f.center * 2.0 ** (power // 2), Gram(f.curvature.matrix * 2.0**power))
    moved = po.solve(po.Problem(scaled, subject_to=Cardinality(sparsity=0.6)), ADMM())
    np.testing.assert_array_equal(moved.value, plain.value * 2.0 ** (power // 2))


def test_dead_inputs_cost_no_budget():
    x = inputs()
    x[:, [3, 11]] = 0
    whole = po.solve(problem(Cardinality(count=96), x), ADMM())
    assert whole.stats["dead_inputs"] == 2
    assert whole.kept == 96
    assert not np.asarray(whole.support)[[3, 11]].any()
    alive = [i for i in range(N) if i not in (3, 11)]
    w0 = np.random.default_rng(1).standard_normal((N, M))[alive]
    apart = po.solve(problem(Cardinality(count=96), x[:, alive], weights=w0), ADMM())
    assert whole.objective == pytest.approx(apart.objective, rel=1e-3)


DEGENERATE = {
    "one input": (inputs(n=1), 10, Cardinality(count=4)),
    "one output": (inputs(), 1, Cardinality(count=6)),
    "nothing kept": (inputs(), M, Cardinality(count=0, floor=0)),
    "everything kept": (inputs(), M, Cardinality(sparsity=0.0)),
    "duplicated inputs": (np.repeat(inputs(n=12), 2, axis=1), M, Cardinality(sparsity=0.6)),
    "fewer rows than inputs": (inputs(rows=5), M, Cardinality(sparsity=0.6)),
    "no input at all": (0 * inputs(), M, Cardinality(sparsity=0.6)),
}


@pytest.mark.parametrize("name", DEGENERATE)
@pytest.mark.parametrize("dtype", [np.float64, pytest.param(np.float32, marks=pytest.mark.default_flags)])
@pytest.mark.slow
def test_degenerate_layers(name, dtype):
    x, m, constraint = DEGENERATE[name]
    solution = po.solve(problem(constraint, x.astype(dtype), dtype=dtype, m=m), ADMM(damping=1e-9, products="float32"))
    assert np.isfinite(np.asarray(solution.value)).all()
    center = np.random.default_rng(1).standard_normal((x.shape[1], m)).astype(dtype)
    if name == "everything kept":
        np.testing.assert_allclose(solution.value, center, rtol=0, atol=1e-3 if dtype == np.float32 else 1e-9)
    if name == "no input at all":
        kept = np.abs(center)[np.asarray(solution.support)]
        assert kept.min() >= np.abs(center)[~np.asarray(solution.support)].max()


@pytest.mark.default_flags
def test_a_failed_factor_is_redone_in_double_and_said():
    x = np.repeat(inputs(n=8), 3, axis=1)
    gram = x.T @ x / len(x)
    gram -= 1e-7 * np.trace(gram) / N * np.eye(N)  # indefinite by rounding, as float32 sums are
    w = np.random.default_rng(1).standard_normal((N, M))
    f = Reconstruction(jnp.asarray(w, jnp.float32), Gram.checked(jnp.asarray(gram, jnp.float32)))
    task = po.Problem(f, subject_to=Cardinality(sparsity=0.7))
    solution = po.solve(task, ADMM(damping=0.0, density=1.0))
    assert solution.stats["factors"] == "float64"
    assert solution.stats["factor_damping"] > 0
    assert solution.status.is_usable
    assert po.solve(task, ADMM(damping=0.01)).stats["factors"] == "float32"


def test_layers_that_share_a_gram_share_its_factors(monkeypatch):
    calls = []
    inner = factors._metric_on_host
    monkeypatch.setattr(factors, "_metric_on_host", lambda *a: calls.append(1) or inner(*a))
    f = problem(Cardinality(sparsity=0.6), m=N).objective
    for constraint in (Cardinality(sparsity=0.6), Cardinality(sparsity=0.6, per="out")):
        po.solve(po.Problem(f, subject_to=constraint), ADMM(density=0.4))
    other = Reconstruction(f.center * 3, f.curvature)
    po.solve(po.Problem(other, subject_to=Cardinality(sparsity=0.6)), ADMM(density=0.4))
    assert len(calls) == 1
    po.solve(po.Problem(f, subject_to=Cardinality(sparsity=0.6)), ADMM(damping=0.1))
    po.solve(problem(Cardinality(sparsity=0.6), m=N), ADMM(damping=0.1))
    assert len(calls) == 3


def test_conjugate_gradients_reach_the_exact_refit():
    task = problem(Cardinality(sparsity=0.6), damping=0.01)
    start = po.solve(task, Score())
    exact = po.solve(task, Polish(), init=start)
    costs = [po.solve(task, ConjugateGradients(steps), init=start).objective for steps in (1, 4, 60)]
    assert start.objective > costs[0] > costs[1] > costs[2]
    assert costs[2] == pytest.approx(exact.objective, rel=1e-9)
    fixed = problem(Support(start.support), damping=0.01)
    assert po.solve(fixed, ConjugateGradients(60)).objective == pytest.approx(exact.objective, rel=1e-9)


@pytest.mark.parametrize("n", [1, 5, 300])
def test_inverse_is_the_inverse(n):
    x = inputs(n=n, rows=2 * n)
    gram = jnp.asarray(x.T @ x / len(x) + 0.1 * np.mean(x**2) * np.eye(n))
    np.testing.assert_allclose(_linalg.spd_inverse(gram) @ gram, np.eye(n), atol=1e-9)
    np.testing.assert_allclose(_linalg.inverse_on_host(np.asarray(gram)) @ gram, np.eye(n), atol=1e-9)
    factor = _linalg.inverse_factor_on_host(np.asarray(gram))
    np.testing.assert_allclose(factor.T @ factor @ gram, np.eye(n), atol=1e-9)
    assert not np.triu(factor, 1).any()
    assert _linalg.inverse_on_host(-np.eye(n)) is None


@pytest.mark.parametrize(("n", "block"), [(24, None), (24, 10), (300, None), (300, 299)])
@pytest.mark.slow
def test_a_host_and_a_device_find_the_same_factors(n, block):
    ready = prepared(problem(Cardinality(sparsity=0.6), inputs(n=n, rows=2 * n, spread=0.3)))
    wanted = factors.Wanted(0.01, 0.4, 0.05, block, (1.0, 1.0), 1, None)
    (host, scale, known), (device, other, estimate) = (
        metric(ready, wanted, 0.01, ready.gram.dtype) for metric in (factors._metric_on_host, factors._metric_on_device)
    )
    damped = np.asarray(ready.damped(0.01))
    ends = {None: [0, n], 10: [0, 8, 16, 24], 299: [0, 150, 300]}[block]
    s = by_density(damped, 0.4, 0.05, ends)
    for found, root in ((host, scale), (device, other)):
        np.testing.assert_allclose(root[:, 0], np.sqrt(s), rtol=1e-9)
        np.testing.assert_allclose(found, damped / np.sqrt(np.outer(s, s)), rtol=1e-9, atol=1e-12)
    assert known == pytest.approx(estimate, rel=1e-6)
    assert known <= np.linalg.cond(damped) * (1 + 1e-9)
    expected = 2 * np.linalg.inv(host + 2 * np.eye(n))
    np.testing.assert_allclose(factors._inverse_on_host(host, 2.0), expected, rtol=1e-9, atol=1e-12)
    np.testing.assert_allclose(factors._inverse_on_device(device, 2.0), expected, rtol=1e-9, atol=1e-12)


@pytest.mark.default_flags
def test_inverses_that_are_large_are_made_one_at_a_time_to_the_same_result(monkeypatch):
    task = problem(Cardinality(sparsity=0.6), dtype=np.float32)
    assert po.solve(task, ADMM(levels=2)).kept == 96
    assert len(task.objective.curvature.kept) == 1
    many = po.solve(task, ADMM(levels=4))
    assert not task.objective.curvature.kept
    monkeypatch.setattr(factors, "_KEPT", 100)
    other = problem(Cardinality(sparsity=0.6), dtype=np.float32)
    again = po.solve(other, ADMM(levels=4))
    assert len(other.objective.curvature.kept) == 1
    assert not task.objective.curvature.kept
    np.testing.assert_array_equal(again.value, many.value)


def test_auto_says_what_it_took():
    task = problem(Cardinality(sparsity=0.6))
    assert po.solve(task, Auto()).stats["preset"] == "best"
    assert po.solve(task, Auto(seconds=1e-9)).stats["preset"] == "fast"
    costs = [auto._seconds(auto.PRESETS[name], 1536, 384) for name in ("fast", "balanced", "best")]
    assert costs == sorted(costs)
    assert auto._seconds(auto.FAST, 1000, 100) == pytest.approx((12 * 1e8 + 1.16 * 0.7e9) / 5e10)


# Relative errors by the peers' own code (SparseGPT, ALPS; layer, sparsity or "2:4"), four digits.
PEERS = [
    ("minilm_l2_attn_out", 0.7, 7.866e-02, 4.085e-02),
    ("minilm_l2_attn_out", "2:4", 5.012e-02, 3.456e-02),
    ("mlpnet_fc1", 0.5, 2.438e-04, 6.299e-05),
    ("mlpnet_fc1", 0.9, 3.536e-02, 7.744e-03),
    ("resnet20_l3_conv", 0.9, 2.449e-01, 1.196e-01),
]


@pytest.mark.default_flags
@pytest.mark.usefixtures("optimised")
@pytest.mark.parametrize(("layer", "spec", "sparsegpt", "alps"), PEERS)
@pytest.mark.slow
def test_presets_on_real_layers(folder, layer, spec, sparsegpt, alps):
    with np.load(folder / "layers" / f"{layer}.npz", allow_pickle=False) as archive:
        gram = jnp.asarray(archive["H"] / archive["n_samples"].astype(np.float32))
        f = Reconstruction(jnp.asarray(archive["W0"].T), Gram.checked(gram))
    task = po.Problem(f, subject_to=NM(2, 4) if spec == "2:4" else Cardinality(sparsity=spec))
    errors = {name: po.solve(task, preset).stats["relative_error"] for name, preset in auto.PRESETS.items()}
    assert errors["fast"] <= 0.75 * sparsegpt
    assert errors["balanced"] <= 1.06 * alps
    assert errors["best"] <= 1.0 * alps
    assert errors["best"] <= errors["balanced"] <= errors["fast"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ({"rho": (0.0, 1.0)}, "rho="),
        ({"rho": (2.0, 1.0)}, "rho="),
        ({"levels": 0}, "levels=0"),
        ({"iterations": 1.5}, r"iterations=1\.5"),
        ({"refit": -1}, "refit=-1"),
        ({"relaxation": 2.0}, "relaxation="),
        ({"density": 1.5}, "density="),
        ({"density": 0.0}, "density="),
        ({"floor": -0.1}, "floor="),
        ({"damping": float("nan")}, "damping="),
        ({"refit_damping": -0.1}, "refit_damping="),
        ({"products": "float16"}, "products="),
    ],
)
def test_bad_knobs(words, message):
    with pytest.raises(ValueError, match=message):
        ADMM(**words)


def test_other_bad_input():
    with pytest.raises(ValueError, match="steps=0"):
        ConjugateGradients(0)
    with pytest.raises(ValueError, match="init is None"):
        po.solve(problem(Cardinality(sparsity=0.6)), ConjugateGradients())
    with pytest.raises(ValueError, match="seconds=-1"):
        Auto(-1)
    with pytest.raises(ValueError, match="needs a constraint"):
        po.solve(problem(None), ADMM())
