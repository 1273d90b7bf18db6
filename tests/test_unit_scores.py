"""Rows that rank whole units: each score against NumPy and autodiff by hand, on coupled units of small networks."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import pruneopt as po
from pruneopt.constraints import Cardinality, Coupled, Intersection, Support
from pruneopt.constraints.members import Members
from pruneopt.objectives.unit_scores import UnitScores
from pruneopt.plans import UNIT_METHODS, UnitMethod, unit_scores
from pruneopt.solvers import Score

pytestmark = pytest.mark.default_flags
RNG = np.random.default_rng(0)


@pytest.fixture(autouse=True)
def double():
    with jax.enable_x64(True):
        yield


def normal(*shape):
    return jnp.asarray(RNG.normal(size=shape))


def gated(p, x):
    return (jax.nn.silu(x @ p["gate"]) * (x @ p["up"] + p["bias"])) @ p["down"]


def convolved(x, w, groups=1):
    dims = ("NHWC", "HWIO", "NHWC")
    return jax.lax.conv_general_dilated(x, w, (1, 1), "SAME", dimension_numbers=dims, feature_group_count=groups)


def conv(p, x):
    y = convolved(x, p["k"])
    y = (y - p["mean"]) * (p["scale"] / jnp.sqrt(p["var"] + 1e-5)) + p["shift"]
    return jnp.mean(convolved(jax.nn.relu(y), p["l"]), (1, 2))


def attention(p, x):
    q, k, v = (jnp.einsum("btd,de->bte", x, p[n]).reshape(*x.shape[:2], 3, 2) for n in "qkv")
    s = jax.nn.softmax(jnp.einsum("bthw,bshw->bhts", q, k))
    return jnp.einsum("bhts,bshw->bthw", s, v).reshape(*x.shape[:2], -1) @ p["o"]


def stream(p, x):
    h = x @ p["in"]
    h = h + jax.nn.relu(h @ p["a"]) @ p["b"]
    return jnp.tanh(h @ p["c"]) @ p["d"] + h @ p["out"]


def dispatched(p, x):
    gate = jax.nn.sigmoid(x @ p["router"])
    hidden = jax.nn.relu(jnp.einsum("td,edf->etf", x, p["up"]))
    return jnp.einsum("etd,te->td", jnp.einsum("etf,efd->etd", hidden, p["down"]), gate)


def routed(p, batch):
    """Rows sorted by expert, up and gate apart, each row's output times its gate, back in place: as mixtures do it."""
    x, expert, weight = batch
    order = jnp.argsort(expert, stable=True)
    sizes = jnp.sum(expert[:, None] == jnp.arange(p["up"].shape[0])[None], axis=0).astype(jnp.int32)
    hidden = jax.nn.silu(jax.lax.ragged_dot(x[order], p["gate"], sizes)) * jax.lax.ragged_dot(x[order], p["up"], sizes)
    return jax.lax.ragged_dot(hidden, p["down"], sizes)[jnp.argsort(order)] * weight[:, None]


SHAPES = {
    "gated": (gated, {"gate": (4, 6), "up": (4, 6), "bias": (6,), "down": (6, 3)}, (30, 4)),
    "conv": (
        conv,
        {"k": (3, 3, 2, 5), "mean": (5,), "var": (5,), "scale": (5,), "shift": (5,), "l": (3, 3, 5, 3)},
        (6, 4, 4, 2),
    ),
    "attention": (attention, {"q": (4, 6), "k": (4, 6), "v": (4, 6), "o": (6, 3)}, (5, 6, 4)),
    "stream": (
        stream,
        {"in": (4, 6), "a": (6, 7), "b": (7, 6), "c": (6, 5), "d": (5, 3), "out": (6, 3)},
        (30, 4),
    ),
    "experts": (dispatched, {"router": (4, 3), "up": (3, 4, 5), "down": (3, 5, 4)}, (30, 4)),
}
# The group that is ranked: {leaf: the unit of each of its entries along an axis}.
GROUPS = {
    "gated": ("bias[0]", {"gate": (1, 1), "up": (1, 1), "bias": (0, 1), "down": (0, 1)}),
    "conv": ("k[3]", {"k": (3, 1), "scale": (0, 1), "shift": (0, 1), "l": (2, 1)}),
    "attention": ("k[1]", {"q": (1, 2), "k": (1, 2), "v": (1, 2), "o": (0, 2)}),
    "stream": ("in[1]", {"in": (1, 1), "a": (0, 1), "b": (1, 1), "c": (0, 1), "out": (0, 1)}),
    "experts": ("up[0]", {"router": (1, 1), "up": (0, 1), "down": (0, 1)}),
}


class Case:
    """A network, its loss, its data, one group of its units and what each unit owns."""

    def __init__(self, name):
        self.fn, shapes, batch = SHAPES[name]
        self.params = {leaf: normal(*shape) for leaf, shape in shapes.items()}
        if name == "conv":
            self.params["var"] = self.params["var"] ** 2 + 0.5
        self.x = normal(*batch)
        self.y = normal(*jax.eval_shape(self.fn, self.params, self.x).shape)
        wanted, members = GROUPS[name]
        units = po.structure.trace(self.fn, self.params, self.x).units()
        self.units = po.constraints.coupled(units, {}, [wanted])
        (self.group,) = self.units.groups
        self.members = members

    def loss(self, p, batch):
        return jnp.mean((self.fn(p, batch[0]) - batch[1]) ** 2)

    @property
    def batches(self):
        n = len(self.x) // 2
        return [(self.x[:n], self.y[:n]), (self.x[n:], self.y[n:])]

    def scores(self, row, **words):
        return unit_scores(self.loss, self.params, self.batches, self.units, row, **words)[self.group.name]

    def owned(self, u, leaf, array):
        """Unit u's part of a leaf."""
        axis, each = self.members[leaf]
        return np.take(np.asarray(array), np.arange(u * each, (u + 1) * each), axis)

    def pooled(self, tree, leaves=None):
        """For each unit the sum over what it owns."""
        leaves = leaves or list(self.members)
        return np.array([sum(self.owned(u, n, tree[n]).sum() for n in leaves) for u in range(self.group.size)])

    @property
    def kernels(self):
        return [n for n in self.members if self.params[n].ndim > 1]


CASES = pytest.mark.parametrize("name", SHAPES)


@pytest.mark.cases(5)
@CASES
def test_rows_of_weights(name):
    case = Case(name)
    size = {n: np.asarray(w) ** 2 for n, w in case.params.items()}
    squares = case.pooled(size, case.kernels)
    np.testing.assert_allclose(case.scores("unit_l2"), np.sqrt(squares), rtol=1e-12)
    np.testing.assert_allclose(case.scores("unit_magnitude"), squares / squares.mean(), rtol=1e-12)
    absolute = case.pooled({n: np.abs(w) for n, w in case.params.items()}, case.kernels)
    np.testing.assert_allclose(case.scores("unit_l1"), absolute, rtol=1e-12)


@pytest.mark.cases(5)
@CASES
def test_rows_of_gradients(name):
    """Taylor and Fisher by the gradient in a factor on each unit, whose derivative at one is the sum of g w."""
    case = Case(name)

    def scaled(factors, batch):
        params = dict(case.params)
        for n, (axis, each) in case.members.items():
            along = [-1 if k == axis else 1 for k in range(params[n].ndim)]
            params[n] = params[n] * jnp.repeat(factors, each).reshape(along)
        return case.loss(params, batch)

    ones = jnp.ones(case.group.size)
    each = [jax.grad(scaled)(ones, (case.x[i : i + 1], case.y[i : i + 1])) for i in range(len(case.x))]
    np.testing.assert_allclose(case.scores("unit_taylor"), np.abs(np.mean(each, 0)), rtol=1e-9)
    np.testing.assert_allclose(case.scores("unit_fisher"), 0.5 * np.mean(np.square(each), 0), rtol=1e-9)


def test_traces_of_the_hessian(monkeypatch):
    """Of the exact diagonal, from the dense Hessian, in the place of Hutchinson's estimate."""
    case = Case("gated")
    from pruneopt.curvature.diagonal import Diagonal
    from pruneopt.plans import unit_models

    dense = {}
    for n in case.members:
        one = lambda w, n=n: case.loss(case.params | {n: w}, (case.x, case.y))  # noqa: E731
        h = np.asarray(jax.hessian(one)(case.params[n])).reshape(case.params[n].size, -1)
        dense[n] = jnp.asarray(np.diagonal(h).reshape(case.params[n].shape))
    seen = []

    def exact(loss, params, batches, leaves, probes, key):
        seen.append({path for path, x in params.items() if leaves(path, x)})
        return Diagonal({n: dense.get(n) for n in params})

    monkeypatch.setattr(unit_models, "hutchinson_diagonal", exact)
    many = np.array([sum(case.owned(u, n, case.params[n]).size for n in case.kernels) for u in range(6)])
    squares = case.pooled({n: np.asarray(w) ** 2 for n, w in case.params.items()}, case.kernels)
    wanted = 0.5 * np.abs(case.pooled(dense, case.kernels)) / many * squares
    np.testing.assert_allclose(case.scores("unit_hessian"), wanted, rtol=1e-9)
    assert seen == [set(case.members)] * 8
    makers = UnitMethod(lambda *given: unit_models.hessian_traces(*given, of="makers"))
    trace, size = (case.pooled(t, ["gate", "up"]) for t in (dense, {n: w**2 for n, w in case.params.items()}))
    np.testing.assert_allclose(case.scores(makers), 0.5 * np.abs(trace) / 8 * size, rtol=1e-9)


@pytest.mark.cases(2)
@pytest.mark.parametrize("name", ["gated", "attention"])
def test_units_in_the_metric_of_kronecker_factors(name):
    case = Case(name)
    kernels = {n: case.params[n] for n in case.kernels}
    h = po.curvature.Kronecker.of(case.loss, case.params, case.batches, sorted(kernels))
    wanted = []
    for u in range(case.group.size):
        only = {n: jnp.zeros_like(w) for n, w in kernels.items()}
        for n, w in kernels.items():
            axis, each = case.members[n]
            own = np.repeat(np.arange(case.group.size) == u, each)
            only[n] = w * own.reshape([-1 if k == axis else 1 for k in range(w.ndim)])
        zero = {n: jnp.zeros_like(w) if n in kernels else None for n, w in case.params.items()}
        wanted.append(0.5 * h.form(zero | only, zero, 0.0))
    np.testing.assert_allclose(case.scores("unit_kfac"), wanted, rtol=1e-9)


def inputs_of(case):
    """{leaf that reads the group: (inputs (positions, units, entries), squared norms of rows (units, entries))}."""
    p, x = jax.tree.map(np.asarray, case.params), np.asarray(case.x)
    flat = lambda h, n: h.reshape(-1, case.group.size, h.shape[-1] // case.group.size)  # noqa: E731
    norm = lambda w: (w**2).sum(-1).reshape(case.group.size, -1)  # noqa: E731
    if case.fn is gated:
        h = np.asarray(jax.nn.silu(x @ p["gate"])) * (x @ p["up"] + p["bias"])
        return {"down": (flat(h, 1), norm(p["down"]))}
    if case.fn is conv:
        y = (np.asarray(convolved(x, p["k"])) - p["mean"]) * p["scale"] / np.sqrt(p["var"] + 1e-5) + p["shift"]
        rows = (p["l"] ** 2).sum((0, 1, 3))[:, None]
        return {"l": (flat(np.maximum(y, 0).reshape(-1, 5), 1), rows)}
    if case.fn is attention:
        q, k, v = ((x @ p[n]).reshape(5, 6, 3, 2) for n in "qkv")
        s = np.asarray(jax.nn.softmax(jnp.einsum("bthw,bshw->bhts", q, k)))
        return {"o": (np.einsum("bhts,bshw->bthw", s, v).reshape(-1, 3, 2), norm(p["o"]))}
    if case.fn is stream:
        h = x @ p["in"]
        later = h + np.maximum(h @ p["a"], 0) @ p["b"]
        return {n: (flat(t, 1), norm(p[n])) for n, t in (("a", h), ("c", later), ("out", later))}
    return {"down": (np.maximum(np.einsum("td,edf->tef", x, p["up"]), 0), (p["down"] ** 2).sum(2))}


@pytest.mark.cases(5)
@CASES
def test_rows_of_what_enters_the_operators_that_read_a_unit(name):
    case = Case(name)
    reads = list(inputs_of(case).values())
    mean = lambda of: sum(of(h).sum(1) for h, _ in reads) / sum(h.shape[2] for h, _ in reads)  # noqa: E731
    np.testing.assert_allclose(case.scores("apoz"), mean(lambda h: (h != 0).mean(0)), rtol=1e-9)
    np.testing.assert_allclose(case.scores("activation_variance"), mean(lambda h: h.var(0)), rtol=1e-9)
    if name != "conv":  # there the mean is over what the window sees, padding included
        np.testing.assert_allclose(case.scores("activation_mean"), mean(lambda h: np.abs(h).mean(0)), rtol=1e-9)
    squares = sum(((h**2).mean(0) * rows).sum(1) for h, rows in reads)
    np.testing.assert_allclose(case.scores("activation_rms"), np.sqrt(squares), rtol=1e-9)
    moves = sum((h.var(0) * rows).sum(1) for h, rows in reads)
    standard = (moves - moves.mean()) / moves.std()
    np.testing.assert_allclose(case.scores("flap"), standard - standard.min(), rtol=1e-8, atol=1e-9)


def test_the_scale_of_a_norm_and_no_variance():
    case = Case("conv")
    np.testing.assert_allclose(case.scores("bn_scale"), np.abs(case.params["scale"]), rtol=1e-12)
    with pytest.raises(ValueError, match=r"group 'bias\[0\]' has no norm's scale"):
        Case("gated").scores("bn_scale")


def test_experts_by_gate_and_output():
    case = Case("experts")
    p, x = case.params, case.x
    gate = np.asarray(jax.nn.sigmoid(x @ p["router"]))
    y = np.einsum("etf,efd->etd", np.maximum(np.einsum("td,edf->etf", x, p["up"]), 0), p["down"])
    np.testing.assert_allclose(case.scores("reap"), (gate.T * np.linalg.norm(y, axis=2)).mean(1), rtol=1e-9)
    with pytest.raises(ValueError, match="holds no experts whose outputs a gate weighs"):
        Case("gated").scores("reap")


def test_experts_of_sorted_rows():
    p = {"gate": normal(3, 4, 5), "up": normal(3, 4, 5), "down": normal(3, 5, 4)}
    batches = []
    for n, choice in ((7, [0, 1]), (9, [0, 1, 1])):  # nothing goes to the third expert
        batches.append((normal(n, 4), jnp.asarray(RNG.choice(choice, n)), jnp.asarray(RNG.random(n))))
    groups = Coupled((Members("experts", 3, {(n, 0): np.arange(3) for n in p}),), {})
    words = (routed, p, batches, groups)
    silu = lambda z: z / (1 + np.exp(-z))  # noqa: E731
    norms, hidden = [[], [], []], [[], [], []]
    for x, expert, weight in (tuple(map(np.asarray, b)) for b in batches):
        for row, e, g in zip(x, expert, weight, strict=True):
            h = silu(row @ np.asarray(p["gate"][e])) * (row @ np.asarray(p["up"][e]))
            norms[e].append(g * np.linalg.norm(h @ np.asarray(p["down"][e])))
            hidden[e].append((row, h))
    name = groups.groups[0].name
    np.testing.assert_allclose(unit_scores(*words, "reap")[name], [np.mean(n) if n else 0 for n in norms], rtol=1e-9)
    wanted = [0.0, 0.0, 0.0]
    for e in (0, 1):
        rows, hs = (np.var([pair[k] for pair in hidden[e]], axis=0) for k in (0, 1))
        wanted[e] = sum(rows @ np.asarray(p[n][e] ** 2).sum(1) for n in ("gate", "up")) + hs @ np.asarray(
            p["down"][e] ** 2
        ).sum(1)
    plain = UnitMethod(UNIT_METHODS["flap"].ranks)
    np.testing.assert_allclose(unit_scores(*words, plain)[name], wanted, rtol=1e-7)
    with pytest.raises(ValueError, match="read by experts whose rows are sorted"):
        unit_scores(*words, "apoz")


@pytest.mark.cases(5)
@pytest.mark.parametrize(
    ("name", "row"),
    list(zip(SHAPES, ("flap", "bn_scale", "unit_taylor", "unit_fisher", "reap"), strict=True)),
)
def test_a_network_is_cut_by_its_units_and_shrinks_exactly(name, row):
    case = Case(name)
    few = Coupled(case.units.groups, {case.group.name: case.group.size - 2})
    pruned = po.prune(case.loss, case.params, case.batches, few, method=row, progress=False)
    kept = np.asarray(few.alive(pruned.support)[case.group.name])
    assert set(np.flatnonzero(~kept)) == set(np.argsort(case.scores(row))[:2])
    small = po.shrink(case.fn, pruned.params, case.x, pruned)
    assert small.error < 1e-12
    for n, (axis, each) in case.members.items():
        assert small.params[n].shape[axis] == (case.group.size - 2) * each
    if name == "conv":  # running statistics are no weights
        np.testing.assert_array_equal(pruned.params["mean"], case.params["mean"])
        assert pruned.support["var"] is None
    solution = pruned.solutions["*"]
    assert solution.status is po.Status.OPTIMAL
    assert pruned.history[0]["method"] == row


def two_layers():
    shapes = {"a": (4, 6), "b": (6,), "c": (6, 5), "d": (5,), "e": (5, 3)}
    fn = lambda p, x: jax.nn.relu(jax.nn.relu(x @ p["a"] + p["b"]) @ p["c"] + p["d"]) @ p["e"]  # noqa: E731
    return fn, {n: normal(*s) for n, s in shapes.items()}, normal(30, 4)


def budget(fn, p, x, per, sparsity=0.5):
    return po.constraints.coupled(
        po.structure.trace(fn, p, x).units(), Cardinality(sparsity=sparsity, per=per, floor=0)
    )


@pytest.mark.parametrize("per", ["leaf", "tree"])
def test_no_other_units_have_a_larger_sum(per):
    """By enumeration, of groups that share a leaf: no score is shared out to weights."""
    fn, p, x = two_layers()
    units = budget(fn, p, x, per)
    scores = {"a[1]": RNG.random(6), "c[1]": 3 * RNG.random(5)}
    mine = UnitMethod(lambda network, groups, key: scores, reads_data=False)
    pruned = po.prune(None, p, None, units, method=mine, progress=False)
    alive = {n: np.asarray(x) for n, x in units.alive(pruned.support).items()}
    lost = sum(scores[n][~alive[n]].sum() for n in scores)
    counts = (3, 2) if per == "leaf" else (None, None)
    best = np.inf
    for choice in itertools.product([False, True], repeat=11):
        first, second = np.array(choice[:6]), np.array(choice[6:])
        if (first.sum(), second.sum()) == counts or (per == "tree" and sum(choice) == 5):
            best = min(best, scores["a[1]"][~first].sum() + scores["c[1]"][~second].sum())
    assert lost == pytest.approx(best, rel=1e-12)
    solution = pruned.solutions["*"]
    assert solution.objective == pytest.approx(best, rel=1e-12)
    assert solution.bound == pytest.approx(best, rel=1e-12)
    np.testing.assert_array_equal(pruned.support["c"], np.outer(alive["a[1]"], alive["c[1]"]))


def test_stages_are_nested_and_dead_units_compare_with_nothing():
    fn, p, x = two_layers()
    units = budget(fn, p, x, "tree")
    seen = []
    pruned = po.prune(
        fn,
        p,
        [x],
        units,
        method="flap",
        schedule=po.plans.Iterative(3),
        fine_tune=lambda params, support: seen.append(support) or params,
        progress=False,
    )
    for before, after in itertools.pairwise(seen):
        assert not any(
            np.any(np.asarray(b) & ~np.asarray(a)) for a, b in zip(*map(jax.tree.leaves, (before, after)), strict=True)
        )
    assert units.violation(pruned.support) == 0
    assert po.shrink(fn, pruned.params, x, pruned).error < 1e-12
    only = unit_scores(fn, po.apply(p, seen[0]), [x], units, "flap")
    row = UnitMethod(UNIT_METHODS["flap"].ranks)
    plain, living = unit_scores(fn, po.apply(p, seen[0]), [x], units, row), units.alive(seen[0])
    standard = {n: (z - z[living[n]].mean()) / z[living[n]].std() for n, z in plain.items()}
    least = min(z.min() for z in standard.values())
    for n, z in standard.items():
        np.testing.assert_allclose(only[n], z - least, rtol=1e-9, atol=1e-12)


def test_within_a_fixed_support():
    fn, p, x = two_layers()
    units = po.constraints.coupled(po.structure.trace(fn, p, x).units(), {"a[1]": 3, "c[1]": 5})
    norm = unit_scores(None, p, None, units, "unit_l2")["a[1]"]
    best = int(np.argmax(norm))
    mask = {n: np.ones(w.shape, bool) for n, w in p.items()}
    mask["a"][:, best] = mask["b"][best] = mask["c"][best] = False
    mask["e"][0, 0] = False
    pruned = po.prune(None, p, None, Intersection((Support(mask), units)), method="unit_l2", progress=False)
    alive = np.asarray(units.alive(pruned.support)["a[1]"])
    assert set(np.flatnonzero(alive)) == set([u for u in np.argsort(-norm) if u != best][:3])
    assert not pruned.support["e"][0, 0]
    assert pruned.solutions["*"].status is po.Status.OPTIMAL


def test_a_claim_is_no_more_than_what_is_proven():
    fn, p, x = two_layers()
    units = po.constraints.coupled(po.structure.trace(fn, p, x).units(), {"a[1]": 3, "c[1]": 5})
    negative = {"a[1]": np.array([3.0, -1, 2, -2, 1, 4]), "c[1]": np.ones(5)}
    found = po.solve(po.Problem(UnitScores(negative, units.groups, p), subject_to=units), Score())
    assert (found.status, found.objective) == (po.Status.FEASIBLE, -2.0)
    zero = p | {"a": p["a"].at[:, 0].set(0), "b": p["b"].at[0].set(0), "c": p["c"].at[0].set(0)}
    f = UnitScores(negative | {"a[1]": np.arange(6.0) + 1}, units.groups, zero)
    assert f.costs()["a[1]"].tolist() == [0, 2, 3, 4, 5, 6]
    assert f.value(jax.tree.map(jnp.zeros_like, zero)) == 25
    other = Coupled(tuple(po.constraints.coupled(po.structure.trace(fn, p, x).units(), {}).groups), {"a[1]": 3})
    with pytest.raises(ValueError, match="is no set; pass the Coupled set"):
        po.solve(po.Problem(f, subject_to=other), Score())
    with pytest.raises(ValueError, match=r"Score\(rule='random'\) ranks weights"):
        po.solve(po.Problem(f, subject_to=units), Score("random"))
    for scores, match in (
        ({"a[1]": np.ones(6)}, r"none for group 'c\[1\]'"),
        ({"a[1]": np.ones(5), "c[1]": np.ones(5)}, r"shape \(5,\)"),
        ({"a[1]": np.full(6, np.nan), "c[1]": np.ones(5)}, "a NaN or an infinity"),
    ):
        with pytest.raises(ValueError, match=match):
            po.Problem(UnitScores(scores, units.groups, p), subject_to=units)


def test_what_does_not_rank_units_is_refused():
    fn, p, x = two_layers()
    units, half = budget(fn, p, x, "leaf"), Cardinality(sparsity=0.5)
    loss = lambda p, x: jnp.mean(fn(p, x) ** 2)  # noqa: E731
    with pytest.raises(ValueError, match="ranks whole units, and constraint=Cardinality"):
        po.prune(fn, p, [x], half, method="flap", progress=False)
    with pytest.raises(ValueError, match="ranks whole units, and this plan cuts weights"):
        po.plans.sensitivity(loss, p, [x], (0.5,), method="unit_l2", progress=False)
    with pytest.raises(ValueError, match="ranks whole units, and this plan cuts weights"):
        po.plans.layerwise(fn, p, [x], units, "flap", progress=False)
    with pytest.raises(ValueError, match=r"unknown; pass one of .*flap"):
        po.prune(fn, p, [x], units, method="flapp", progress=False)
    with pytest.raises(ValueError, match="is no row of units; pass one of unit_random"):
        unit_scores(fn, p, [x], units, "magnitude")
    with pytest.raises(TypeError, match="fn is None"):
        po.prune(None, p, None, units, method="flap", progress=False)
    with pytest.raises(TypeError, match="this row reads data"):
        unit_scores(None, p, None, units, "flap")
    with pytest.raises(ValueError, match="another network's"):
        unit_scores(fn, p | {"b": normal(7)}, [x], units, "unit_l2")
    with pytest.raises(ValueError, match="across='sum' is unknown"):
        UnitMethod(lambda *_: {}, across="sum")
    with pytest.raises(TypeError, match="ranks is 'flap'"):
        UnitMethod("flap")


def test_data_that_rank_nothing_are_refused():
    fn, p, x = two_layers()
    units = budget(fn, p, x, "leaf")
    dead = p | {"b": jnp.full(6, -100.0)}
    with pytest.raises(
        ValueError, match=r"all that enters the operators that read group 'a\[1\]' is zero in every batch"
    ):
        unit_scores(fn, dead, [x], units, "flap")
    with pytest.raises(ValueError, match=r"the score of every unit of group 'a\[1\]' is zero"):
        unit_scores(fn, p, [x[:1]], units, "activation_variance")
    with pytest.raises(ValueError, match="batch 1: the inputs of 'c' overflow or are not a number"):
        unit_scores(fn, p, [x, jnp.full((3, 4), jnp.nan)], units, "apoz")
    width = po.constraints.coupled(
        po.structure.trace(attention, Case("attention").params, normal(5, 6, 4)).units(), {}, ["k[1].1"]
    )
    with pytest.raises(ValueError, match=r"'k\[1\].1': no product with weights reads its units"):
        unit_scores(attention, Case("attention").params, [normal(5, 6, 4)], width, "flap")


def test_draws_are_of_a_key():
    fn, p, x = two_layers()
    units = budget(fn, p, x, "leaf")
    one, same, other = (unit_scores(None, p, None, units, "unit_random", key=k)["a[1]"] for k in (1, 1, 2))
    np.testing.assert_array_equal(one, same)
    assert not np.array_equal(one, other)


def test_what_a_width_adds_to_the_products_of_queries_and_keys():
    params, x = {n: normal(5, 6) for n in "qkv"} | {"o": normal(6, 5)}, normal(7, 4, 5)
    units = po.constraints.coupled(po.structure.trace(attention, params, x).units(), {}, ["k[1].1"])
    scores = unit_scores(attention, params, [x[:4], x[4:]], units, "unit_products")["k[1].1"]
    q, k = (np.asarray(x @ params[n]).reshape(7, 4, 3, 2) for n in "qk")
    whole = np.einsum("bthw,bshw->bhts", q, k)
    for unit in range(2):
        without = np.delete(q, unit, 3), np.delete(k, unit, 3)
        lost = np.sum((whole - np.einsum("bthw,bshw->bhts", *without)) ** 2) / 7
        assert scores[unit] == pytest.approx(lost, rel=1e-6)
    pruned = po.prune(
        attention, params, [x], Coupled(units.groups, {"k[1].1": 1}), method="unit_products", progress=False
    )
    small = po.shrink(attention, pruned.params, x, pruned)
    assert small.params["q"].shape == (5, 3)
    np.testing.assert_allclose(small.fn(small.params, x), attention(pruned.params, x), rtol=1e-8)
    heads = po.constraints.coupled(po.structure.trace(attention, params, x).units(), {}, ["k[1]"])
    with pytest.raises(ValueError, match="contracted in no product of two activations"):
        unit_scores(attention, params, [x], heads, "unit_products")
