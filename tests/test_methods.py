"""One door: a name, a row or a solver asks for one problem in every plan."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import pruneopt as po
from pruneopt.constraints import Cardinality
from pruneopt.plans import LAYER_METHODS, LayerMethod, layerwise, methods
from pruneopt.solvers import BALANCED, Polish, Score, Then

RNG = np.random.default_rng(0)
PARAMS = {"a": RNG.standard_normal((6, 8)), "b": RNG.standard_normal((8, 3))}
BATCHES = [RNG.standard_normal((12, 6)), RNG.standard_normal((7, 6))]
HALF = Cardinality(sparsity=0.5, per="leaf")


def forward(params, x):
    return jnp.tanh(jnp.asarray(x) @ params["a"]) @ params["b"]


def loss(params, x):
    return jnp.mean(forward(params, x) ** 2)


def same(one, other):
    for x, y in zip(*map(jax.tree.leaves, ((one.params, one.support), (other.params, other.support))), strict=True):
        np.testing.assert_array_equal(np.asarray(x), np.asarray(y))


@pytest.mark.parametrize("method", ["balanced", BALANCED, LAYER_METHODS["balanced"], LayerMethod(Score("random"))])
@pytest.mark.slow
def test_prune_is_layerwise(method):
    asked = BALANCED if method == "balanced" else method
    got = po.prune(forward, PARAMS, BATCHES, HALF, method=method, progress=False)
    same(got, layerwise(forward, PARAMS, BATCHES, HALF, asked, progress=False))
    assert got.history[0]["method"] == ("Score(rule='random')" if "random" in repr(method) else "balanced")
    assert [entry["layer"] for entry in got.layers] == ["a", "b"]


def test_a_solver_alone_aims_at_the_networks_outputs_and_published_rows_at_each_layers():
    assert methods.row_of(BALANCED).target == "network"
    assert {name for name, row in LAYER_METHODS.items() if row.target == "network"} == {
        "fast", "balanced", "best", "auto"
    }  # fmt: skip


@pytest.mark.parametrize("method", ["wanda", Then(Score(), Polish())], ids=["row", "solver"])
def test_lossless_takes_layer_methods(method):
    """Half of each layer is zero already and all else is seen: exactly that half goes."""
    dense = {name: w * (np.argsort(np.argsort(np.abs(w).ravel())).reshape(w.shape) >= w.size // 2)
             for name, w in PARAMS.items()}  # fmt: skip
    misfit = lambda p, x: jnp.mean((forward(p, x) - forward(dense, x)) ** 2)  # noqa: E731
    found = po.plans.lossless(misfit, dense, BATCHES, tolerance=1e-20, method=method, progress=False)
    for name, w in dense.items():
        np.testing.assert_array_equal(found.support[name], w != 0)
        np.testing.assert_allclose(found.params[name], w, rtol=1e-9)
    assert all(entry["rise"] > 1e-9 for entry in found.history if entry["count"] < 36)
    assert found.kept == 36


def test_sensitivity_takes_layer_methods():
    refit = Then(Score(), Polish())
    found = po.plans.sensitivity(loss, PARAMS, BATCHES, (0.5,), method=refit, progress=False)
    for name in PARAMS:
        alone = layerwise(loss, PARAMS, BATCHES, Cardinality(sparsity=0.5), refit, leaves=[name], progress=False)
        mean = (12 * float(loss(alone.params, BATCHES[0])) + 7 * float(loss(alone.params, BATCHES[1]))) / 19
        assert found.losses[name][0] == pytest.approx(mean, rel=1e-12)


@pytest.mark.slow
def test_few_positions_for_the_inputs_are_said_to_overfit():
    few, enough = [BATCHES[0]], [RNG.standard_normal((40, 6))]
    notes = lambda batches, method: [  # noqa: E731
        note for entry in layerwise(forward, PARAMS, batches, HALF, method, progress=False).layers
        for note in entry.get("notes", [])
    ]  # fmt: skip
    assert [note[:29] for note in notes(few, Then(Score(), Polish()))] == [
        "12 positions for 6 inputs: wi", "12 positions for 8 inputs: wi"
    ]  # fmt: skip
    assert notes(enough, Then(Score(), Polish())) == []
    assert notes(few, "wanda") == []


def test_an_operators_relative_error_is_the_layers():
    """Three heads, of which one matters a hundred times less than the others: not the mean of three ratios."""
    w = RNG.standard_normal((3, 4, 5)) * np.array([1.0, 1.0, 0.01])[:, None, None]
    x = RNG.standard_normal((3, 20, 4))
    fn = lambda p, x: jnp.einsum("hbi,hio->hbo", jnp.asarray(x), p["w"])  # noqa: E731
    got = layerwise(fn, {"w": w}, [x], HALF, "wanda", progress=False)
    lost, whole = (sum(np.sum((x[h] @ m[h]) ** 2) for h in range(3)) for m in (np.asarray(got.params["w"]) - w, w))
    (entry,) = got.layers
    assert entry["relative_error"] == pytest.approx(lost / whole, rel=1e-10)
    each = [s.stats["relative_error"] for s in got.solutions.values()]
    assert abs(np.mean(each) - lost / whole) > 1e-3, "the case must tell them apart"


def test_the_two_clocks_of_a_layer_agree():
    got = layerwise(forward, PARAMS, BATCHES, HALF, BALANCED, progress=False)
    for entry in got.layers:
        assert entry["seconds"]["solve"] == got.solutions[entry["layer"]].stats["seconds"]


def test_a_saliency_of_your_own_is_one_line_and_provably_the_best():
    mine = po.objectives.Scores(lambda params: {name: np.abs(w) ** 3 + 1 for name, w in params.items()})
    got = po.prune(None, {**PARAMS, "bias": np.ones(3)}, None, Cardinality(count=20, floor=0), method=mine,
                   progress=False)  # fmt: skip
    scores = np.concatenate([np.abs(PARAMS[name]).ravel() ** 3 + 1 for name in "ab"])
    kept = np.argsort(-scores, kind="stable")[:20]
    expected = np.zeros(72, bool)
    expected[kept] = True
    np.testing.assert_array_equal(np.concatenate([np.ravel(got.support[name]) for name in "ab"]), expected)
    solution = got.solutions["*"]
    assert solution.status is po.Status.OPTIMAL
    assert solution.objective == pytest.approx(scores[~expected].sum(), rel=1e-12)
    assert got.history[0]["method"] == "Scores"
    assert po.plans.sensitivity(loss, PARAMS, BATCHES, (0.5,), method=mine, progress=False).losses.keys() == {"a", "b"}


def test_scores_claim_no_more_than_they_prove():
    w = {"a": np.array([[1.0, 2.0], [0.0, 3.0]])}
    two = Cardinality(count=2, floor=0)
    for scores, support, status, objective in (
        ([[4.0, 3.0], [9.0, 1.0]], [[1, 0], [1, 0]], po.Status.FEASIBLE, 4.0),  # a zero weight took a place
        ([[4.0, 3.0], [0.0, 1.0]], [[1, 1], [0, 0]], po.Status.OPTIMAL, 1.0),
        ([[4.0, -3.0], [0.0, -1.0]], [[1, 0], [1, 0]], po.Status.FEASIBLE, -4.0),  # fewer could be better
    ):
        problem = po.Problem(po.objectives.Scores({"a": np.array(scores)}, w), subject_to=two)
        got = po.solve(problem, Score())
        np.testing.assert_array_equal(got.support["a"], np.array(support, bool))
        assert (got.status, got.objective) == (status, objective)
        assert po.certify(problem, got).bound <= objective


@pytest.mark.parametrize(
    ("scores", "error", "words"),
    [
        ({"a": np.ones((6, 8))}, ValueError, "scores: there are none for leaf 'b'"),
        ({"a": np.ones((6, 8)), "b": np.ones(3)}, ValueError, "scores: leaf 'b' has shape"),
        ({"a": np.full((6, 8), np.nan), "b": np.ones((8, 3))}, ValueError, "scores holds a NaN or an infinity in"),
    ],
)  # fmt: skip
def test_scores_that_do_not_fit_are_refused(scores, error, words):
    with pytest.raises(error, match=words):
        po.prune(None, PARAMS, None, HALF, method=po.objectives.Scores(scores), progress=False)
    with pytest.raises(TypeError, match="Scores needs its scores and center as arrays"):
        po.Problem(po.objectives.Scores(scores), subject_to=HALF)
