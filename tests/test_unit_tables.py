"""Tables of coupled units: what the network loses with one group cut, what each width costs, and who is refused."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_coupled import built, normal

import pruneopt as po
from pruneopt.curvature import Gram
from pruneopt.objectives import Reconstruction
from pruneopt.solvers import GreedyUnits
from pruneopt.structure.latency import Block, Latency

pytestmark = pytest.mark.default_flags


@pytest.fixture(autouse=True)
def double():
    with jax.enable_x64(True):
        yield


def test_tables_are_the_losses_of_each_group_cut_alone():
    fn, params, x, found, _ = built("mlp", {})
    measured = normal(30, 4)
    widths = {"a[1]": [2, 4, 6], "c[1]": [3, 5]}
    method = po.plans.LayerMethod(GreedyUnits(), damping=1e-6)
    words = {"measure": po.plans.squared, "widths": widths, "method": method, "progress": False}
    tables = po.plans.unit_tables(fn, params, [x], found, [measured], **words)
    assert {group: tables.levels[group] for group in tables.groups} == widths
    assert tables.errors["a[1]"][-1] == tables.errors["c[1]"][-1] == 0
    assert tables.errors["a[1]"][0] > tables.errors["a[1]"][1] > 0
    hidden = np.maximum(np.asarray(x @ params["a"] + params["b"]), 0)
    gram, c = hidden.T @ hidden / len(hidden), np.asarray(params["c"])
    gram += 1e-6 * np.mean(np.diagonal(gram)) * np.eye(6)
    order = GreedyUnits().order(
        po.Problem(Reconstruction(params["c"], Gram(jnp.asarray(hidden.T @ hidden / len(hidden))), 1e-6),
                   subject_to=po.constraints.Blocks((1, -1), po.constraints.Cardinality(count=1)))
    )  # fmt: skip
    s = np.sort(order[4:] + [k for k in range(6) if k not in order])
    w = np.zeros_like(c)
    w[s] = np.linalg.solve(gram[np.ix_(s, s)], (gram @ c)[s])
    before, after = fn(params, measured), fn(params | {"c": jnp.asarray(w)}, measured)
    assert tables.errors["a[1]"][0] == pytest.approx(
        float(jnp.sum((after - before) ** 2) / jnp.sum(before**2)), rel=1e-4
    )


def test_costs_are_those_of_the_smaller_network():
    """A chain of widths: what the tables say of every choice, beside the cut network's own numbers."""
    fn, params, x, found, _ = built("mlp", {})
    words = {"measure": po.plans.squared, "widths": {"a[1]": [2, 4, 6], "c[1]": [3, 5]}, "progress": False}
    tables = po.plans.unit_tables(fn, params, [x], found, [x], **words)
    for choice in itertools.product(range(3), range(2)):
        levels = dict(zip(tables.groups, choice, strict=True))
        first, second = tables.levels["a[1]"][levels["a[1]"]], tables.levels["c[1]"][levels["c[1]"]]
        small = po.shrink_units(fn, params, x, {("a", 1): range(first), ("c", 1): range(second)})
        cost = po.structure.cost(po.structure.trace(small.fn, small.params, x))
        arrays = 3 * first + 3 * second  # before and after the bias, and after the rectifier
        assert tables.spent(levels) == {
            "flops": cost.flops,
            "parameters": cost.parameters,
            "bytes": cost.bytes,
            "activations": 8 * 40 * (4 + arrays + 3),
        }
    budget = {"flops": 0.5 * tables.largest("flops"), "parameters": 0.7 * tables.largest("parameters")}
    found = po.allocation.allocate(tables, budget)
    assert all(found.spent[name] <= limit for name, limit in budget.items())


def with_seconds(units, grid):
    """A table as `structure.latency` makes it: a block of the first group, one of both, one of the second."""
    first, second = (units.of(path, 1)[0] for path in "ac")
    rng, widths = np.random.default_rng(0), (tuple(grid["a[1]"]), tuple(grid["c[1]"]))
    blocks = [
        Block("a", (first,), widths[:1], 1 + rng.random(len(widths[0]))),
        Block("c", (second, first), widths[::-1], 1 + rng.random((len(widths[1]), len(widths[0])))),
        Block("e", (second,), widths[1:], 1 + rng.random(len(widths[1]))),
        Block("rest", (), (), np.asarray(1.5)),
    ]
    return Latency(tuple(blocks), 7.0, 0.25, 40, "a device", (first, second), widths)


def test_seconds_are_what_the_latency_table_predicts():
    fn, params, x, found, _ = built("mlp", {})
    units = po.structure.trace(fn, params, x).units()
    table = with_seconds(units, {"a[1]": [2, 4, 6], "c[1]": [3, 5]})
    words = {"measure": po.plans.squared, "widths": table, "progress": False}
    tables = po.plans.unit_tables(fn, params, [x], found, [x], **words)
    assert tables.levels == {"a[1]": [2, 4, 6], "c[1]": [3, 5]}
    for i, j in itertools.product(range(3), range(2)):
        widths = {table.groups[0]: table.widths[0][i], table.groups[1]: table.widths[1][j]}
        assert tables.spent({"a[1]": i, "c[1]": j})["seconds"] == pytest.approx(table.predict(widths), rel=1e-12)


def test_seconds_of_other_groups_are_refused():
    fn, params, x, found, _ = built("mlp", {})
    units = po.structure.trace(fn, params, x).units()
    table = with_seconds(units, {"a[1]": [2, 4, 6], "c[1]": [3, 5]})
    only = Latency(table.blocks[2:], 7.0, 0.25, 40, "a device", table.groups[1:], table.widths[1:])
    with pytest.raises(ValueError, match=r"there are none for group 'a\[1\]'"):
        po.plans.unit_tables(fn, params, [x], found, [x], widths=only, progress=False)


@pytest.mark.parametrize(
    ("words", "match"),
    [
        ({"batches": [jnp.zeros((40, 4))]}, "inputs of .* are zero in all batches"),
        ({"measure": lambda a, b: jnp.nan}, "measure: it is .*nan"),
        ({"widths": {"a[1]": [9], "c[1]": [5]}}, "whole numbers from 0 to 6"),
        ({"widths": {"a[1]": [6]}}, r"there are none for group 'c\[1\]'"),
        ({"method": "fisher"}, "models the whole network's loss"),
    ],
)
def test_what_cannot_be_measured_is_refused(words, match):
    fn, params, x, found, _ = built("mlp", {})
    params = params | {"b": jnp.zeros(6)}  # so that inputs of zero stay zero
    given = {"batches": [x], "measure": po.plans.squared, "progress": False} | words
    with pytest.raises(ValueError, match=match):
        po.plans.unit_tables(fn, params, given.pop("batches"), found, [x], **given)


@pytest.mark.parametrize("precision", ["float32", "float64"])
@pytest.mark.parametrize("solver", [GreedyUnits(), po.solvers.Score()])
def test_inputs_that_are_constant_go_into_the_intercept(solver, precision):
    """Neurons that the data never move: a bias takes what they did, whichever go."""
    _, params, x, _, _ = built("mlp", {})
    cast = lambda a: jnp.asarray(a, precision)  # noqa: E731
    params = jax.tree.map(cast, {"a": 0 * params["a"], "b": 1 + normal(6), "c": normal(6, 5), "d": normal(5)})
    fn, x = lambda p, x: jnp.tanh(x @ p["a"] + p["b"]) @ p["c"] + p["d"], cast(x)
    found = po.constraints.coupled(po.structure.trace(fn, params, x).units(), {"a[1]": 2}, ["a[1]"])
    method = po.plans.LayerMethod(solver, damping=0.01, target="layer", centred=True)
    tables = po.plans.unit_tables(fn, params, [x], found, [x], measure=po.plans.squared, method=method, progress=False)
    pruned = po.plans.layerwise(fn, params, [x], found, method, leaves=["c"], progress=False)
    assert max(tables.errors["a[1]"]) < 1e-11
    np.testing.assert_allclose(fn(pruned.params, x), fn(params, x), rtol=1e-5)
    assert int(found.violation(pruned.support)) == 0
    assert pruned.history[0]["layers"][0]["relative_error"] == 0


def test_batches_count_by_their_examples():
    fn, params, x, found, _ = built("mlp", {})
    words = {"measure": lambda a, b: jnp.mean((a - b) ** 2), "widths": {"a[1]": [3], "c[1]": [5]}, "progress": False}
    whole, parts = (po.plans.unit_tables(fn, params, [x], found, m, **words) for m in ([x], [x[:30], x[30:]]))
    assert whole.errors["a[1]"] == pytest.approx(parts.errors["a[1]"], rel=1e-9)


def test_the_best_of_several_methods_is_the_one_of_least_loss_on_other_data():
    fn, params, x, found, _ = built("mlp", {"a[1]": 3})
    other = normal(50, 4)
    rows = {str(d): po.plans.LayerMethod(GreedyUnits(), damping=d, dampings=()) for d in (1e-6, 1.0, 100.0)}
    words = {"leaves": ["c", "e"], "progress": False}
    best = po.plans.best_of(fn, params, [x[:8]], found, rows, [other], measure=po.plans.squared, **words)
    tried = {
        name: float(po.plans.squared(fn(params, other), fn(done.params, other)))
        for name, row in rows.items()
        for done in [po.plans.layerwise(fn, params, [x[:8]], found, row, **words)]
    }
    assert best.history[0]["tried"] == pytest.approx(tried, rel=1e-5)
    assert best.history[0]["chosen"] == min(tried, key=tried.__getitem__)
    with pytest.raises(ValueError, match="methods is empty"):
        po.plans.best_of(fn, params, [x], found, {}, [other])
    with pytest.raises(ValueError, match="a number for none of the methods"):
        po.plans.best_of(fn, params, [x[:8]], found, rows, [other], measure=lambda a, b: jnp.inf, **words)


def test_units_with_several_consumers_are_ranked_and_the_rest_is_refitted():
    """The width of a stream: scores choose it, a pass over the fixed supports makes up for it."""

    def fn(p, x):
        x = x @ p["stem"]
        x = x + jax.nn.relu(x @ p["a"]) @ p["b"]
        return x @ p["head"]

    params = {"stem": normal(4, 8), "a": normal(8, 6), "b": normal(6, 8), "head": normal(8, 3)}
    x, half = normal(60, 4), po.constraints.Cardinality(sparsity=0.25, per="leaf")
    units = po.constraints.coupled(po.structure.trace(fn, params, x).units(), half, ["stem[1]"])
    ranked = po.prune(fn, params, [x], units, method="activation_rms", progress=False)
    method = po.plans.LayerMethod(po.solvers.Polish(), damping=1e-6, dampings=(), target="stream")
    allowed = po.constraints.Support(ranked.support)
    refitted = po.plans.layerwise(fn, params, [x], allowed, method, progress=False)
    lost = [float(po.plans.squared(fn(params, x), fn(p.params, x))) for p in (ranked, refitted)]
    assert lost[1] < 0.5 * lost[0]
    small = po.shrink(fn, refitted.params, x, refitted)
    assert small.params["stem"].shape == (4, 6)
    np.testing.assert_allclose(small.fn(small.params, x), fn(refitted.params, x), rtol=1e-8)


def test_two_groups_of_one_axis_are_chosen_by_scores_and_not_by_one_operator():
    fn, params, x, found, _ = built("attention", {}, ["q[1]", "o[0].1"])
    assert len(found.groups) == 2
    budget = {group.name: group.size - 1 for group in found.groups}
    both = po.constraints.Coupled(found.groups, budget)
    with pytest.raises(ValueError, match="consumes units of several groups"):
        po.plans.layerwise(fn, params, [x], both, "units", progress=False)
    pruned = po.prune(fn, params, [x], both, method="unit_l2", progress=False)
    small = po.shrink(fn, pruned.params, x, pruned)
    assert small.params["v"].shape == (5, 2 * 3)
    np.testing.assert_allclose(small.fn(small.params, x), fn(pruned.params, x), rtol=1e-8)


def test_levels_hold_the_cut_operators_and_measure_around_others():
    """Around an allocation the sum of the table is the loss there and the changes that one group at a time makes."""
    fn, params, x, found, _ = built("mlp", {})
    other, widths = normal(30, 4), {"a[1]": [3, 6], "c[1]": [2, 5]}
    levels = po.plans.unit_levels(fn, params, [x], found, method=GreedyUnits(), widths=widths, progress=False)

    def lost(choice):
        return float(po.plans.squared(fn(params, other), fn(levels.network(choice), other)))

    around = {"a[1]": 0, "c[1]": 0}
    tables = levels.measured([other], po.plans.squared, around=around, progress=False)
    for group, level in itertools.product(around, range(2)):
        change = lost(around | {group: level}) - lost(around)
        assert tables.errors[group][level] - lost(around) / 2 == pytest.approx(change, rel=1e-5, abs=1e-9)
    hidden = np.maximum(np.asarray(x @ params["a"] + params["b"]), 0)
    apart = hidden @ (np.asarray(levels.network({"a[1]": 0})["c"]) - np.asarray(params["c"]))
    relative = np.sum(apart**2) / np.sum((hidden @ np.asarray(params["c"])) ** 2)
    assert levels.reconstruction().errors["a[1]"] == pytest.approx([relative, 0.0], rel=1e-5)
    with pytest.raises(ValueError, match=r"'a\[1\]' at 2 is not there"):
        levels.network({"a[1]": 2})
