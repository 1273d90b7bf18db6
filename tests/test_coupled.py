"""Coupled units: chosen, pruned, reconstructed and cut, over all leaves that hold a part of them."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import pruneopt as po
from pruneopt.constraints.members import Members
from pruneopt.curvature import Gram
from pruneopt.objectives import Reconstruction
from pruneopt.solvers import GreedyUnits, Polish

pytestmark = pytest.mark.default_flags
RNG = np.random.default_rng(0)
HEADS, WIDTH = 3, 4


@pytest.fixture(autouse=True)
def double():
    with jax.enable_x64(True):
        yield


def normal(*shape):
    return jnp.asarray(RNG.normal(size=shape))


def mlp(p, x):
    return jax.nn.relu(jax.nn.relu(x @ p["a"] + p["b"]) @ p["c"] + p["d"]) @ p["e"]


def mlp_params(first=6, second=5):
    return {
        "a": normal(4, first), "b": normal(first), "c": normal(first, second), "d": normal(second),
        "e": normal(second, 3),
    }  # fmt: skip


def conv(p, x):
    y = jax.lax.conv_general_dilated(x, p["k"], (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))
    y = jax.nn.relu(y * p["scale"] + p["bias"])
    y = jax.lax.conv_general_dilated(y, p["l"], (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))
    return jnp.mean(y, (1, 2))


def conv_params():
    return {"k": normal(3, 3, 2, 5), "scale": normal(5), "bias": normal(5), "l": normal(3, 3, 5, 4)}


def attention(p, x):
    q, k, v = (jnp.einsum("btd,de->bte", x, p[n]).reshape(*x.shape[:2], HEADS, WIDTH) for n in "qkv")
    s = jax.nn.softmax(jnp.einsum("bthw,bshw->bhts", q, k))
    return jnp.einsum("bhts,bshw->bthw", s, v).reshape(*x.shape[:2], -1) @ p["o"]


def attention_params():
    return {n: normal(5, HEADS * WIDTH) for n in "qkv"} | {"o": normal(HEADS * WIDTH, 5)}


NETWORKS = {
    "mlp": (mlp, mlp_params, lambda: normal(40, 4), "a[1]", ("a", 1), "c", 0),
    "conv": (conv, conv_params, lambda: normal(6, 5, 5, 2), "bias[0]", ("k", 3), "l", 2),
    "attention": (attention, attention_params, lambda: normal(8, 6, 5), "k[1]", ("q", 1), "o", 0),
}


def built(name, budget, groups=None):
    fn, made, batch, *rest = NETWORKS[name]
    params, x = made(), batch()
    units = po.structure.trace(fn, params, x).units()
    return fn, params, x, po.constraints.coupled(units, budget, groups), rest


def test_groups_are_what_can_be_cut_and_heads_come_before_their_width():
    *_, found, (name, _, _, _) = built("attention", {})
    assert [(group.name, group.size) for group in found.groups] == [(name, HEADS)]
    assert set(found.groups[0].places) == {("q", 1), ("k", 1), ("v", 1), ("o", 0)}
    *_, found, _ = built("mlp", {})
    assert [(group.name, group.size) for group in found.groups] == [("a[1]", 6), ("c[1]", 5)]


@pytest.mark.parametrize("per", ["leaf", "tree"])
def test_select_keeps_the_units_with_the_largest_sums(per):
    budget = po.constraints.Cardinality(sparsity=0.5, per=per, floor=1 if per == "leaf" else 0)
    _, params, _, found, _ = built("mlp", budget)
    scores = jax.tree.map(lambda w: w**2, params)
    support = found.select(scores)
    totals = [
        np.sum(scores["a"], 0) + scores["b"] + np.sum(scores["c"], 1),
        np.sum(scores["c"], 0) + scores["d"] + np.sum(scores["e"], 1),
    ]
    if per == "leaf":
        alive = [np.argsort(np.argsort(-np.asarray(t))) < len(t) // 2 for t in totals]
    else:
        both = np.concatenate(totals)
        alive = np.split(np.argsort(np.argsort(-both)) < len(both) // 2, [6])
    np.testing.assert_array_equal(support["b"], alive[0])
    np.testing.assert_array_equal(support["d"], alive[1])
    np.testing.assert_array_equal(support["a"], np.broadcast_to(alive[0], (4, 6)))
    np.testing.assert_array_equal(support["c"], np.outer(*alive).astype(bool))
    np.testing.assert_array_equal(support["e"], np.broadcast_to(alive[1][:, None], (5, 3)))
    assert found.violation(support) == 0
    more = support | {"b": jnp.ones(6, bool)}
    assert found.violation(more) == 6 - int(alive[0].sum())


@pytest.mark.parametrize("schedule", [None, po.plans.Iterative(3)])
def test_a_network_is_pruned_by_units_and_becomes_smaller(schedule):
    fn, params, x, found, _ = built("mlp", {"a[1]": 3, "c[1]": 2})
    words = {} if schedule is None else {"schedule": schedule}
    pruned = po.prune(fn, params, [x], found, method="magnitude", leaves=lambda *_: True, progress=False, **words)
    small = po.shrink(fn, pruned.params, x, pruned)
    assert {path: leaf.shape for path, leaf in small.params.items()} == {
        "a": (4, 3), "b": (3,), "c": (3, 2), "d": (2,), "e": (2, 3),
    }  # fmt: skip
    assert small.error < 1e-12


def test_units_are_pruned_while_training():
    fn, params, x, found, _ = built("mlp", {"a[1]": 2})
    y = normal(40, 3)
    opt = po.training.gradual(optax.adam(1e-2), found, end=10, every=2)
    state = opt.init(params)

    @jax.jit
    def step(params, state):
        grads = jax.grad(lambda p: jnp.mean((fn(p, x) - y) ** 2))(params)
        updates, state = opt.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    for _ in range(15):
        params, state = step(params, state)
    pruned = opt.finish(params, state)
    assert int(found.alive(pruned.support)["a[1]"].sum()) == 2
    assert po.shrink(fn, pruned.params, x, pruned).params["a"].shape == (4, 2)


@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.cases(3)
def test_layer_by_layer_the_consumer_chooses_and_what_makes_its_inputs_goes_along(name):
    fn, params, x, found, (group, producer, consumer, axis) = built(name, {}, None)
    size = next(g.size for g in found.groups if g.name == group)
    found = po.constraints.Coupled(found.groups, {group: size - 2})
    method = po.plans.LayerMethod(GreedyUnits(), damping=1e-6, dampings=(), target="network")
    pruned = po.plans.layerwise(fn, params, [x], found, method, leaves=lambda path, w: w.ndim > 1, progress=False)
    assert found.violation(pruned.support) == 0
    small = po.shrink(fn, pruned.params, x, pruned)
    assert small.error < 1e-12
    each = params[consumer].shape[axis] // size
    assert small.params[consumer].shape[axis] == (size - 2) * each
    assert small.params[producer[0]].shape[producer[1]] == (size - 2) * each
    dense, cut = fn(params, x), fn(pruned.params, x)
    kept = np.ones(params[consumer].shape[axis], bool)
    alive = np.asarray(found.alive(pruned.support)[group])
    kept[np.repeat(~alive, each)] = False
    plain = {
        **params,
        consumer: params[consumer] * kept.reshape([-1 if k == axis else 1 for k in range(params[consumer].ndim)]),
    }
    assert float(jnp.sum((cut - dense) ** 2)) < float(jnp.sum((fn(plain, x) - dense) ** 2))


def residual(p, x):
    z = x + jax.nn.relu(x @ p["a"]) @ p["b"]
    y = jax.nn.relu(z @ p["c"]) @ p["d"] * p["scale"] + p["shift"]
    return z - y if p.get("minus") else y + z


def residual_params(minus):
    shapes = {"a": (4, 6), "b": (6, 4), "c": (4, 7), "d": (7, 4), "shift": (4,)}
    return {n: normal(*s) for n, s in shapes.items()} | {"scale": normal(4) ** 2 + 0.5, "minus": minus}


@pytest.mark.parametrize("minus", [0, 1])
@pytest.mark.parametrize("groups", [1, 3])
@pytest.mark.cases(4)
def test_outputs_make_up_for_what_the_stream_lost(minus, groups):
    """Against least squares in NumPy: the last product is to bring the sum to the dense one, not its own output."""
    params, x = residual_params(minus), normal(60, 4)
    minus_static = lambda p, x: residual({**p, "minus": minus}, x)  # noqa: E731
    params.pop("minus")
    found = po.constraints.coupled(po.structure.trace(minus_static, params, x).units(), {"a[1]": 2}, ["a[1]"])
    method = po.plans.LayerMethod(GreedyUnits(), damping=1e-12, dampings=(), target="stream")
    pieces = [x[i::groups] for i in range(groups)]
    pruned = po.plans.layerwise(minus_static, params, pieces, found, method, leaves=list("abcd"), progress=False).params
    z = np.asarray(x + np.maximum(x @ pruned["a"], 0) @ pruned["b"])
    h = np.maximum(z @ np.asarray(pruned["c"]), 0)
    wanted = np.asarray(minus_static(params, x))
    rest = (z - wanted if minus else wanted - z) - np.asarray(params["shift"])
    best = np.linalg.lstsq(h, rest / np.asarray(params["scale"]), rcond=None)[0]
    np.testing.assert_allclose(pruned["d"], best, rtol=1e-5, atol=1e-6)
    plain = po.plans.LayerMethod(GreedyUnits(), damping=1e-12, dampings=(), target="network")
    other = po.plans.layerwise(minus_static, params, pieces, found, plain, leaves=list("abcd"), progress=False).params
    lost = [float(np.sum((np.asarray(minus_static(p, x)) - wanted) ** 2)) for p in (pruned, other)]
    assert lost[0] < lost[1]


def test_an_output_that_counts_for_nothing_makes_up_for_nothing():
    """A norm's scale of zero hides an output from the sum: no finite weight could make up for the stream there."""
    params, x = residual_params(0), normal(60, 4)
    params.pop("minus")
    params["scale"] = params["scale"].at[1].set(0.0)
    found = po.constraints.coupled(po.structure.trace(residual, params, x).units(), {"a[1]": 2}, ["a[1]"])
    words = {"leaves": list("abcd"), "progress": False}
    made = [
        po.plans.layerwise(
            residual,
            params,
            [x],
            found,
            po.plans.LayerMethod(GreedyUnits(), damping=1e-9, dampings=(), target=t),
            **words,
        ).params["d"]
        for t in ("stream", "network")
    ]
    assert np.all(np.isfinite(made[0]))
    np.testing.assert_allclose(made[0][:, 1], made[1][:, 1], rtol=1e-6)
    assert not np.allclose(made[0][:, 0], made[1][:, 0], rtol=1e-3)


def reconstruction(seed, units, each):
    rng = np.random.default_rng(seed)
    n = units * each
    x = rng.normal(size=(60, n)) @ (np.eye(n) + 0.7 * rng.normal(size=(n, n)) / np.sqrt(n))
    return Reconstruction(jnp.asarray(rng.normal(size=(n, 3))), Gram(jnp.asarray(x.T @ x / 60)), 1e-3)


def least(f, ids, chosen):
    """The objective of these units, refitted by least squares in NumPy."""
    h, w0 = np.asarray(f.curvature.matrix), np.asarray(f.center)
    h = h + f.damping * np.trace(h) / len(h) * np.eye(len(h))
    s = np.flatnonzero(np.isin(ids, list(chosen)))
    w = np.zeros_like(w0)
    w[s] = np.linalg.solve(h[np.ix_(s, s)], (h @ w0)[s])
    return 0.5 * np.sum((w - w0) * (h @ (w - w0)))


def best_of_all(f, ids, count):
    """The least objective over all choices of units."""
    return min(least(f, ids, chosen) for chosen in itertools.combinations(range(ids.max() + 1), count))


@pytest.mark.parametrize("seed", range(10))
@pytest.mark.parametrize("each", [1, 3])
@pytest.mark.cases(20)
def test_elimination_and_exchanges_are_near_the_best_choice(seed, each):
    from pruneopt.constraints.rows import Rows

    f = reconstruction(seed, 8, each)
    ids = np.random.default_rng(seed).permutation(np.repeat(np.arange(8), each))  # units need not be neighbours
    problem = po.Problem(f, subject_to=Rows(tuple(ids.tolist()), 4))
    best = best_of_all(f, ids, 4)
    found, plain = po.solve(problem, GreedyUnits()), po.solve(problem, GreedyUnits(exchanges=0))
    assert best * (1 - 1e-9) <= found.objective <= min(plain.objective * (1 + 1e-9), 1.4 * best)
    refitted = po.solve(po.Problem(f, subject_to=po.constraints.Support(found.support)), Polish())
    assert found.objective == pytest.approx(refitted.objective, rel=1e-6)
    kept = np.unique(ids[np.asarray(found.support)[:, 0]])
    assert len(kept) == 4
    for gone, new in itertools.product(kept, set(range(8)) - set(kept)):  # no exchange lowers it further
        assert least(f, ids, [*set(kept) - {gone}, new]) >= found.objective * (1 - 1e-6)
    order = GreedyUnits().order(po.Problem(f, subject_to=Rows(tuple(ids.tolist()), 1)))
    assert len(order) == 7
    assert set(np.unique(ids[np.asarray(plain.support)[:, 0]])) == set(range(8)) - set(order[:4])


def test_what_a_unit_costs_is_what_removing_it_adds():
    f = reconstruction(3, 6, 2)
    problem = po.Problem(f, subject_to=po.constraints.Blocks((2, -1), po.constraints.Cardinality(count=5)))
    ids = np.repeat(np.arange(6), 2)
    assert po.solve(problem, GreedyUnits(exchanges=0)).objective == pytest.approx(best_of_all(f, ids, 5), rel=1e-6)


def test_a_branch_goes_whole_and_the_network_can_be_read_again():
    """Width zero: the residual block is the stream alone, with what the branch added on average in its bias."""

    def fn(p, x):
        return x + (jax.nn.relu(x @ p["a"]) @ p["c"] + p["d"])

    params, x = {"a": normal(4, 6), "c": normal(6, 4), "d": normal(4)}, normal(50, 4)
    units = po.constraints.coupled(po.structure.trace(fn, params, x).units(), {"a[1]": 0})
    pruned = po.plans.layerwise(fn, params, [x], units, "units", leaves=["a", "c"], progress=False)
    small = po.shrink(fn, pruned.params, x, pruned)
    np.testing.assert_allclose(small.fn(small.params, x), x + jnp.mean(fn(params, x) - x, axis=0), rtol=1e-6)
    assert small.params["a"].shape == (4, 0)
    again = po.structure.trace(small.fn, small.params, x)
    assert po.structure.cost(again).flops == 0
    tables = po.plans.unit_tables(fn, params, [x], units, [x], measure=po.plans.squared, widths={"a[1]": [0, 6]})
    lost = float(jnp.sum((small.fn(small.params, x) - fn(params, x)) ** 2) / jnp.sum(fn(params, x) ** 2))
    assert tables.errors["a[1]"] == pytest.approx([lost, 0.0], rel=1e-5)


@pytest.mark.parametrize(
    ("budget", "groups", "match"),
    [
        ({"x": 1}, None, "budget names the group 'x'"),
        ({"a[1]": 7}, None, r"budget\['a\[1\]'\] is 7"),
        (po.constraints.Cardinality(sparsity=0.5, per="out"), None, "units have no axes"),
        ({}, ["z[0]"], r"there is no 'z\[0\]'; those that can be cut are a\[1\], c\[1\]"),
        ({}, ["e[1]"], r"units of 'e\[1\]' cannot be cut"),
    ],
)
def test_budgets_and_groups_that_are_not_there_are_refused(budget, groups, match):
    with pytest.raises(ValueError, match=match):
        built("mlp", budget, groups)


def test_groups_of_another_network_are_refused():
    *_, found, _ = built("mlp", {})
    with pytest.raises(ValueError, match="another network's"):
        found.check(mlp_params(first=7))
    with pytest.raises(ValueError, match="none of its leaves is decided"):
        found.check({"other": normal(3)})


def test_layer_by_layer_each_group_has_one_consumer_and_its_own_budget():
    def shared(p, x):
        h = jax.nn.relu(x @ p["a"])
        return h @ p["b"] + h @ p["c"]

    params, x = {"a": normal(4, 6), "b": normal(6, 3), "c": normal(6, 3)}, normal(9, 4)
    found = po.constraints.coupled(po.structure.trace(shared, params, x).units(), {"a[1]": 3})
    method = po.plans.LayerMethod(GreedyUnits(), dampings=())
    with pytest.raises(ValueError, match=r"'a\[1\]' is consumed by 'b', 'c'"):
        po.plans.layerwise(shared, params, [x], found, method, progress=False)
    tree = po.constraints.Coupled(found.groups, po.constraints.Cardinality(sparsity=0.5))
    with pytest.raises(ValueError, match="ranks the units of all groups together"):
        po.plans.layerwise(shared, params, [x], tree, method, progress=False)


def test_units_print_what_they_are():
    group = Members("h", 4, {("a", 1): np.arange(4)})
    assert repr(group) == "h: 4 units in 1 axes"
    assert repr(po.constraints.Coupled((group,), {"h": 2})) == "Coupled(4 units in 1 groups, {'h': 2})"


@pytest.mark.parametrize("seed", range(3))
def test_runs_of_units_are_the_best_ones_within_the_budget(seed):
    """Against all choices of whole runs."""
    rng = np.random.default_rng(seed)
    groups = tuple(Members(n, size, {(n, 0): np.arange(size)}) for n, size in (("x", 6), ("y", 5)))
    scores = {n: jnp.asarray(rng.random(size)) for n, size in (("x", 6), ("y", 5))}
    found = po.constraints.Coupled(groups, po.constraints.Cardinality(count=7, floor=0), 2).select(scores)
    kept = {n: int(mask.sum()) for n, mask in found.items()}
    best = lambda n, k: float(np.sort(np.asarray(scores[n]))[::-1][:k].sum())  # noqa: E731
    want = max(best("x", a) + best("y", b) for a in range(0, 7, 2) for b in range(0, 5, 2) if a + b <= 6)
    assert all(k % 2 == 0 or (n, k) == ("y", 5) for n, k in kept.items())
    assert sum(kept.values()) <= 7
    assert sum(float(scores[n][mask].sum()) for n, mask in found.items()) == pytest.approx(want, rel=1e-6)


def test_multiples_hold_in_every_way_of_pruning():
    fn, params, x, whole, _ = built("mlp", {})
    half = po.constraints.Cardinality(sparsity=0.4, per="leaf")
    units = po.constraints.Coupled(whole.groups, half, 2)
    ranked = po.prune(fn, params, [x], units, method="unit_l2", progress=False)
    solved = po.plans.layerwise(fn, params, [x], units, "units", leaves=["c", "e"], progress=False)
    for pruned in (ranked, solved):
        assert [int(jnp.any(pruned.params[leaf] != 0, axis=1).sum()) for leaf in ("c", "e")] == [2, 2]
    assert ranked.solutions["*"].status is po.Status.FEASIBLE
    with pytest.raises(ValueError, match="multiple=0"):
        po.constraints.Coupled(whole.groups, half, 0)
