"""Tables of leaves against passes over networks pruned by hand; the way back from an allocation; ATP and OWL."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import pruneopt as po
from pruneopt.allocation import Tables, allocate
from pruneopt.constraints import Cardinality, arithmetic

RNG = np.random.default_rng(0)
STEPS = (0.0, 0.25, 0.5, 0.75)
HIDDEN = 10


def network():
    shapes = {"0": {"w": (8, HIDDEN)}, "1": {"w": (HIDDEN, HIDDEN), "gain": (HIDDEN,)}, "2": {"w": (HIDDEN, 6)}}
    return jax.tree.map(lambda s: jnp.asarray(RNG.standard_normal(s)), shapes, is_leaf=lambda s: isinstance(s, tuple))


def fn(params, x):
    h = jnp.tanh(x @ params["0"]["w"])
    return (h + jnp.tanh(h @ params["1"]["w"]) * params["1"]["gain"][None]) @ params["2"]["w"]


def examples(n=64):
    return [jnp.asarray(RNG.standard_normal((n, 8))) for _ in range(2)]


def words(**more):
    return {"sparsities": STEPS, "progress": False, **more}


def divergence(before, after):
    """KL in NumPy by its sum."""
    p, q = (np.exp(np.asarray(x, np.float64)) for x in (before, after))
    p, q = p / p.sum(-1, keepdims=True), q / q.sum(-1, keepdims=True)
    return float(np.mean(np.sum(p * np.log(p / q), -1)))


@pytest.mark.parametrize("method", ["wanda", "wanda_refit"])
def test_each_entry_is_the_loss_of_the_network_with_that_leaf_alone_pruned_by_layerwise(method):
    """`layerwise` on one leaf prunes it in the dense network; what it loses is measured here in NumPy."""
    params, seen, probe = network(), examples(), examples(16)
    tables = po.plans.layer_tables(fn, params, seen, probe, method=method, **words())
    assert tables.groups == ["0/w", "1/w", "2/w"]
    for path in tables.groups:
        for level, sparsity in enumerate(STEPS):
            c = Cardinality(sparsity=sparsity, per="leaf")
            alone = po.plans.layerwise(fn, params, seen, c, method, leaves=[path], progress=False)
            lost = np.mean([divergence(fn(params, x), fn(alone.params, x)) for x in probe])
            assert tables.errors[path][level] == pytest.approx(lost, rel=1e-4, abs=1e-7)
            assert tables.costs["weights"][path][level] == alone.solutions[path].kept


def test_costs_are_those_of_the_network_with_the_kept_weights():
    params, seen = network(), examples()
    tables = po.plans.layer_tables(fn, params, seen, seen, method="wanda", **words())
    choice = {"0/w": 2, "1/w": 0, "2/w": 3}
    spent = tables.spent(choice)
    kept = {"0/w": 40, "1/w": 100, "2/w": 15}
    assert spent["weights"] == sum(kept.values())
    pruned = po.plans.layerwise(fn, params, seen, po.plans.budgets(tables, choice), "wanda", progress=False)
    whole = po.structure.cost(po.structure.trace(fn, params, seen[0]), pruned.support)
    assert spent["flops"] == pytest.approx(whole.alive_flops)
    assert spent["bytes"] == whole.alive_bytes
    assert tables.largest("flops") == whole.flops


def test_the_layers_own_errors_are_those_of_their_outputs():
    params, seen = network(), examples()
    levels = po.plans.layer_levels(fn, params, seen, method="wanda", **words())
    tables, x = levels.reconstruction(), np.concatenate(seen)
    assert tables.errors == levels.relative
    h = np.tanh(x @ np.asarray(params["0"]["w"]))
    for level in range(len(STEPS)):
        w, w0 = levels.values["1/w"][level]["1/w"], np.asarray(params["1"]["w"])
        expected = np.sum((h @ (w - w0)) ** 2) / np.sum((h @ w0) ** 2)
        assert tables.errors["1/w"][level] == pytest.approx(expected, rel=1e-5, abs=1e-9)


def test_around_a_base_inputs_are_its_own_and_a_sum_is_its_loss_and_the_changes():
    params, seen, probe = network(), examples(), examples(16)
    row = po.plans.LayerMethod(po.solvers.Then(po.solvers.Score(), po.solvers.Polish()), target="network")
    half = Cardinality(sparsity=0.5, per="leaf")
    base = po.plans.layerwise(fn, params, seen, half, row, progress=False).params
    levels = po.plans.layer_levels(fn, params, seen, method=row, base=base, **words())
    tables = levels.measured(probe, po.plans.squared, progress=False)
    for path in tables.groups:  # the pass that made the base saw the same inputs and targets
        np.testing.assert_allclose(levels.values[path][2][path], base[path[0]]["w"], atol=1e-9)

    def lost(p):
        return np.mean([np.sum((fn(p, x) - fn(params, x)) ** 2) / np.sum(fn(params, x) ** 2) for x in probe])

    at_base = lost(base)
    assert tables.lost(dict.fromkeys(tables.groups, 2)) == pytest.approx(at_base, rel=1e-6)
    changed = lost(levels.network({"1/w": 3}))
    assert tables.lost({"0/w": 2, "1/w": 3, "2/w": 2}) == pytest.approx(changed, rel=1e-5)
    both = levels.network({"0/w": 0, "2/w": 1})
    np.testing.assert_array_equal(both["0"]["w"], levels.values["0/w"][0]["0/w"])
    np.testing.assert_array_equal(both["1"]["w"], base["1"]["w"])


def test_a_leaf_of_several_layers_is_one_group():
    stacked = {"w": jnp.asarray(RNG.standard_normal((3, HIDDEN, HIDDEN)))}

    def scanned(params, x):
        return jax.lax.scan(lambda h, w: (jnp.tanh(h @ w), None), x, params["w"])[0]

    x = [jnp.asarray(RNG.standard_normal((40, HIDDEN)))]
    levels = po.plans.layer_levels(scanned, stacked, x, method="wanda", **words())
    tables = levels.measured(x, po.plans.squared, progress=False)
    assert tables.groups == ["w"]
    assert tables.costs["weights"]["w"] == [300.0, 225.0, 150.0, 75.0]
    half = levels.network({"w": 2})["w"]
    assert [int(np.count_nonzero(w)) for w in half] == [50, 50, 50]
    pruned = po.plans.layerwise(scanned, stacked, x, po.plans.budgets(tables, {"w": 2}, 151), "wanda", progress=False)
    assert po.plans.budgets(tables, {"w": 2}, 151).of["w"].count == int(pruned.support["w"].sum()) == 151


def test_an_allocation_keeps_its_total_to_the_unit():
    params, seen = network(), examples()
    tables = po.plans.layer_tables(fn, params, seen, seen, method="wanda", **words())
    for total in (61, 117, 199):
        found = allocate(tables, {"weights": total})
        constraint = po.plans.budgets(tables, found.levels, total)
        pruned = po.plans.layerwise(fn, params, seen, constraint, "wanda", progress=False)
        assert sum(int(m.sum()) for m in jax.tree.leaves(pruned.support)) == total
        for path, c in constraint.of.items():
            least = tables.costs["weights"][path][found.levels[path]]
            assert c.count >= least


def test_what_is_left_goes_where_a_weight_saves_most():
    counts = {"a": [10, 6, 2], "b": [8, 4, 0]}
    tables = Tables({"a": [0.0, 1.0, 9.0], "b": [0.0, 2.0, 4.0]}, {"weights": counts})
    at = lambda total: {p: c.count for p, c in po.plans.budgets(tables, {"a": 2, "b": 2}, total).of.items()}  # noqa: E731
    assert at(2) == {"a": 2, "b": 0}
    assert at(5) == {"a": 5, "b": 0}  # (9 - 1) / 4 a weight, (4 - 2) / 4
    assert at(8) == {"a": 6, "b": 2}
    assert at(11) == {"a": 6, "b": 5}  # both at their next level: now (1 - 0) / 4 and (2 - 0) / 4
    assert at(18) == {"a": 10, "b": 8}


BLOCKS = ["0/*", "1/*", "2/*"]


def test_an_arithmetic_progression_is_its_formula():
    """Blocks of 80, 100 and 60 weights: the sparsities' differences are the slope, the total is exact."""
    params = network()
    for slope in (-0.1, 0.0, 0.2):
        found = arithmetic(params, 0.5, slope, BLOCKS, leaves=["*/w"])
        counts = [c.count for c in found.of.values()]
        assert sum(counts) == 120
        sparsities = 1 - np.array(counts) / (80, 100, 60)
        np.testing.assert_allclose(np.diff(sparsities), slope, atol=0.03)
    same = {"a": jnp.zeros((10, 10)), "b": jnp.zeros((10, 10)), "c": jnp.zeros((10, 10)), "d": jnp.zeros((10, 10))}
    found = arithmetic(same, 0.6, 0.1, list("abcd"))
    assert [c.count for c in found.of.values()] == [55, 45, 35, 25]  # sparsities 0.45, 0.55, 0.65, 0.75
    steep = arithmetic(same, 0.5, 0.5, list("abcd"))  # -0.25, 0.25, 0.75, 1.25 are cut to [0, 1]
    assert [c.count for c in steep.of.values()] == [99, 75, 25, 1]  # a leaf keeps one


def test_outliers_weigh_as_their_formula():
    params, seen = network(), examples()
    params["0"]["w"] = params["0"]["w"].at[:2, 0].multiply(30.0)
    x = np.concatenate(seen)
    h = np.tanh(x @ np.asarray(params["0"]["w"]))
    h2 = h + np.tanh(h @ np.asarray(params["1"]["w"])) * np.asarray(params["1"]["gain"])
    ratio = []
    for inputs, i in ((x, "0"), (h, "1"), (h2, "2")):
        score = np.abs(np.asarray(params[i]["w"])) * np.linalg.norm(inputs, axis=0)[:, None]
        ratio.append(np.mean(score > 2.0 * score.mean()))
    assert len(set(ratio)) == 3
    share = (np.array(ratio) - min(ratio)) / np.ptp(ratio)
    density = 0.5 + 2 * 0.1 * (share - share.mean())
    found = po.plans.outlier_weighed(fn, params, seen, 0.5, BLOCKS, threshold=2.0, width=0.1)
    counts = np.array([c.count for c in found.of.values()])
    sizes = np.array([80, 100, 60])
    shift = (120 - density @ sizes) / 240
    np.testing.assert_allclose(counts, (density + shift) * sizes, atol=1)
    assert counts.sum() == 120


def test_blocks_without_outliers_are_equal():
    found = po.plans.outlier_weighed(fn, network(), examples(), 0.5, BLOCKS, threshold=1e6)
    assert [c.count for c in found.of.values()] == [40, 50, 30]


def fused(params, x):
    return x @ jnp.concatenate([params["q"], params["k"]], axis=1)


@pytest.mark.parametrize(
    ("call", "match"),
    [
        (lambda p, x: po.plans.layer_levels(fn, p, x, sparsities=()), r"sparsities=\(\): pass different numbers"),
        (lambda p, x: po.plans.layer_levels(fn, p, x, sparsities=(0.5, 1.0)), "pass different numbers in"),
        (lambda p, x: po.plans.layer_levels(fn, p, x, method="fisher"), "models the whole network's loss"),
        (lambda p, x: po.plans.layer_levels(fn, p, x, base={"0": p["0"]}), "base has structure"),
        (lambda p, x: po.plans.layer_levels(fused, {"q": jnp.ones((8, 3)), "k": jnp.ones((8, 3))}, x),
         "is made of 2 leaves"),
        (lambda p, x: arithmetic(p, 0.5, 0.1, ["0/*"], leaves=["*/w"]), "blocks: leaf '1/w' matches none"),
        (lambda p, x: arithmetic(p, 1.5, 0.1, BLOCKS, leaves=["*/w"]), "sparsity=1.5 is outside"),
        (lambda p, x: po.plans.outlier_weighed(fn, p, x, 0.5, BLOCKS, threshold=0), "threshold=0 is not positive"),
        (lambda p, x: po.plans.outlier_weighed(fn, p, x, 0.5, BLOCKS, width=-1.0), "width=-1.0 is not positive"),
        (lambda p, x: po.plans.outlier_weighed(fn, p, x, 0.5, [*BLOCKS, "z*"]), "no operator reads a leaf of 'z"),
    ],
)  # fmt: skip
@pytest.mark.cases(10)
def test_bad_input_is_refused(call, match):
    with pytest.raises(ValueError, match=match):
        call(network(), examples())


def test_levels_and_totals_that_are_not_there_are_refused():
    tables = Tables({"a": [0.0, 1.0]}, {"weights": {"a": [10, 5]}})
    with pytest.raises(ValueError, match="total=4 is outside 5 to 10"):
        po.plans.budgets(tables, {"a": 1}, 4)
    with pytest.raises(ValueError, match="total=11 is outside 5 to 10"):
        po.plans.budgets(tables, {"a": 1}, 11)
    with pytest.raises(ValueError, match="tables know flops and no 'weights'"):
        po.plans.budgets(Tables({"a": [0.0]}, {"flops": {"a": [1]}}), {"a": 0})
    levels = po.plans.layer_levels(fn, network(), examples(), method="wanda", **words())
    with pytest.raises(ValueError, match="'z' at 0 is not there"):
        levels.network({"z": 0})
    with pytest.raises(ValueError, match="'0/w' at 4 is not there"):
        levels.network({"0/w": 4})
