"""Constraints against brute force over every support, NumPy sorts and SciPy's linear programs (HiGHS)."""

import inspect
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.optimize import linprog
from scipy.sparse import eye, kron, vstack

from pruneopt.constraints import (
    NM,
    Blocks,
    ByPath,
    Cardinality,
    Intersection,
    L1Ball,
    Slices,
    Support,
    TransposableNM,
    parts,
)

RNG = np.random.default_rng(0)
EVERY_16 = (np.arange(2**16)[:, None] >> np.arange(16)) % 2 == 1
EVERY_12 = (np.arange(2**12)[:, None] >> np.arange(12)) % 2 == 1


def sums(masks, scores):
    """Sums of scores with infinities: (how many +inf are kept, the finite rest), -inf where a cut one is kept."""
    s = scores.ravel()
    finite = np.where(np.isfinite(s), s, 0)
    return np.where((masks & (s == -np.inf)).any(1), -np.inf, masks @ finite), (masks & (s == np.inf)).sum(1)


def check_best(chosen, scores, feasible, rel=1e-12):
    """`chosen` is one of the rows of `feasible`, obeys infinities and has the largest finite sum."""
    chosen = np.asarray(chosen).reshape(1, -1)
    assert (feasible == chosen).all(1).any(), "not feasible"
    total, forced = sums(feasible, scores)
    mine, kept = (x[0] for x in sums(chosen, scores))
    assert kept == forced[total > -np.inf].max()
    assert mine == pytest.approx(total[forced == kept].max(), rel=rel, abs=1e-300)


# ---------------------------------------------------------------------------------------------- cardinality


def runs_by_sorting(scores, per, span, budget):
    """The same choice, run by run, by a stable sort."""
    matrix = scores.reshape(-1, scores.shape[-1])
    mask = np.zeros(matrix.shape, bool)
    for start in range(0, matrix.shape[per == "out"], span):
        run = np.s_[start : start + span] if per == "in" else np.s_[:, start : start + span]
        flat = matrix[run].ravel()
        kept = np.zeros(flat.size, bool)
        kept[np.argsort(-flat, kind="stable")[: budget(flat.size)]] = True
        mask[run] = (kept & (flat > -np.inf)).reshape(matrix[run].shape)
    return mask.reshape(scores.shape)


@pytest.mark.parametrize("per", ["in", "out"])
@pytest.mark.parametrize("span", [3, 9])
@pytest.mark.slow
def test_runs_share_a_budget(per, span):
    for shape in ((8, 7), (1, 2, 4, 7)):  # a matrix, and a kernel (height, width, in, out) that is the same matrix
        for ties in (True, False):
            scores = (RNG.integers(-2, 3, shape) if ties else RNG.standard_normal(shape)).astype(float)
            scores[RNG.random(shape) < 0.1] = -np.inf
            scores[RNG.random(shape) < 0.05] = np.inf
            for amount, budget in (
                ({"sparsity": 0.4}, lambda n: int(0.6 * n + 1e-9)),
                ({"count": 8}, lambda n: min(8, n)),
            ):
                constraint = Cardinality(per=per, span=span, **amount)
                expected = runs_by_sorting(scores, per, span, budget)
                constraint.check(scores)
                chosen = constraint.select(jnp.asarray(scores))
                np.testing.assert_array_equal(chosen, expected)
                np.testing.assert_array_equal(jax.jit(constraint.select)(jnp.asarray(scores)), expected)
                assert constraint.violation(chosen) == 0
                full = jnp.ones(shape, bool)
                kept = constraint.select(jnp.zeros(shape)).sum()
                assert constraint.violation(full) == full.size - kept
                assert constraint.density(full) == pytest.approx(float(kept) / full.size)


def test_one_run_is_a_leaf_and_a_span_of_one_is_no_span():
    scores = jnp.asarray(RNG.standard_normal((6, 4)))
    whole = Cardinality(sparsity=0.7, per="leaf").select(scores)
    for per in ("in", "out"):
        np.testing.assert_array_equal(Cardinality(sparsity=0.7, per=per, span=100).select(scores), whole)
    assert Cardinality(sparsity=0.7, per="in", span=np.int64(1)) == Cardinality(sparsity=0.7, per="in")


@pytest.mark.slow
def test_spans_relax_and_count_units():
    runs = Cardinality(sparsity=0.5, per="in", span=4)
    assert runs.relaxed(0.5).select(jnp.ones((8, 4))).sum() == 24
    pairs = Slices(-1, Cardinality(count=1, per="out", span=2))
    scores = jnp.asarray([[1.0, 2.0, 4.0, 3.0, 9.0]] * 3)
    np.testing.assert_array_equal(pairs.select(scores)[0], [False, True, True, False, True])


# ---------------------------------------------------------------------------------------------- N:M


@pytest.mark.parametrize(("n", "m"), [(1, 3), (5, 5), (1, 16), (7, 32)])
def test_nm_is_a_stable_sort_of_each_group(n, m):
    for axis, shape in (("in", (2 * m, 3)), ("out", (3, 2 * m)), (0, (m, 2, 2))):
        for ties in (True, False):
            scores = (RNG.integers(-2, 3, shape) if ties else RNG.standard_normal(shape)).astype(float)
            for value in (-np.inf, np.inf, np.nan):
                scores[RNG.random(shape) < 0.06] = value
            groups = np.moveaxis(scores, {"in": -2, "out": -1}.get(axis, axis), -1)
            flat = np.where(np.isnan(groups), -np.inf, groups).reshape(-1, m)
            expected = np.zeros(flat.shape, bool)
            np.put_along_axis(expected, np.argsort(-flat, axis=1, kind="stable")[:, :n], True, axis=1)
            expected = (expected & (flat > -np.inf)).reshape(groups.shape)
            chosen = NM(n, m, axis).select(jnp.asarray(scores))
            np.testing.assert_array_equal(
                np.moveaxis(np.asarray(chosen), {"in": -2, "out": -1}.get(axis, axis), -1), expected
            )
            assert NM(n, m, axis).violation(chosen) == 0


def test_nm_of_large_groups_stays_one_small_program():
    lines = [len(jax.make_jaxpr(NM(m // 2, m).select)(jnp.ones((128, 2))).pretty_print().splitlines()) for m in (4, 64)]
    assert lines[1] <= 2 * lines[0]


# ---------------------------------------------------------------------------------------------- transposable N:M


def transposable(masks, n, m):
    return (masks.reshape(-1, m, m).sum(1) <= n).all(1) & (masks.reshape(-1, m, m).sum(2) <= n).all(1)


def program(scores, n):
    """The value of the linear program over one tile, by HiGHS; its vertices are masks."""
    m = len(scores)
    s = scores.ravel()
    lines = vstack([kron(eye(m), np.ones((1, m))), kron(np.ones((1, m)), eye(m))])
    upper, lower = np.where(s == -np.inf, 0, 1), np.where(s == np.inf, 1, 0)
    cost = -np.where(np.isfinite(s), s, 0)
    found = linprog(cost, A_ub=lines, b_ub=np.full(2 * m, n), bounds=np.stack([lower, upper], 1), method="highs")
    assert found.status == 0
    return np.where(np.isfinite(s), s, 0)[found.x > 0.5].sum()


def tiles(leaf, m):
    """The m x m tiles of a matrix of three by four."""
    return np.swapaxes(np.asarray(leaf).reshape(3, m, 4, m), 1, 2).reshape(12, m, m)


@pytest.mark.parametrize("n", [1, 2, 3])
def test_transposable_4_beats_every_support(n):
    feasible = EVERY_16[transposable(EVERY_16, n, 4)]
    constraint = TransposableNM(n, 4)
    for seed in range(6):
        rng = np.random.default_rng(seed)
        scores = np.abs(rng.standard_normal((4, 4))) * 10.0 ** rng.integers(-3 * seed, 1, (4, 4))
        if seed % 2:
            forced = feasible[rng.integers(len(feasible))].reshape(4, 4) & (rng.random((4, 4)) < 0.5)
            scores = np.where(forced, np.inf, np.where(rng.random((4, 4)) < 0.3, -np.inf, scores))
        chosen = constraint.select(jnp.asarray(scores))
        check_best(chosen, scores, feasible)
        assert constraint.violation(chosen) == 0


@pytest.mark.parametrize(("n", "m"), [(2, 4), (1, 5), (4, 8), (8, 16)])
def test_transposable_reaches_the_linear_program(n, m):
    """Twelve tiles: plain, of a huge range, with ties, with infinities."""
    rng = np.random.default_rng(n * m)
    scores = np.abs(rng.standard_normal((12, m, m)))
    scores[3:6] **= 8
    scores[6:8] = rng.integers(0, 3, (2, m, m))
    constraint = TransposableNM(n, m)
    known = tiles(constraint.select(jnp.asarray(rng.random((3 * m, 4 * m)))), m)  # feasible, other than the best
    scores[8:] = np.where(known[8:] & (rng.random((4, m, m)) < 0.3), np.inf, scores[8:])
    scores[8:] = np.where(np.isfinite(scores[8:]) & (rng.random((4, m, m)) < 0.3), -np.inf, scores[8:])
    leaf = np.swapaxes(scores.reshape(3, 4, m, m), 1, 2).reshape(3 * m, 4 * m)
    chosen = constraint.select(jnp.asarray(leaf))
    assert constraint.violation(chosen) == 0
    masks = tiles(chosen, m)
    assert masks[scores == np.inf].all()
    assert not masks[scores == -np.inf].any()
    for s, mask in zip(scores, masks, strict=True):
        mine, bound = s[mask & np.isfinite(s)].sum(), program(s, n)
        assert bound * (1 - 1e-12) <= mine <= bound * (1 + 1e-8)  # HiGHS stops at a tolerance


def test_the_best_mask_may_keep_fewer_than_n_in_a_line():
    """Seven ones that no 2-regular mask holds; the sum of a 2-regular one is at most six."""
    scores = np.full((4, 4), 1e-3)
    scores[:3, :3] = 1 - np.eye(3)
    scores[3, 3] = 1
    chosen = np.asarray(TransposableNM(2, 4).select(jnp.asarray(scores)))
    assert (chosen.sum(), scores[chosen].sum()) == (7, 7)


@pytest.mark.parametrize(("n", "m"), [(2, 4), (3, 6)])
def test_negative_scores_are_kept_whatever_their_scale(n, m):
    scores = np.random.default_rng(5).standard_normal((m, m))
    select = TransposableNM(n, m).select
    chosen = np.asarray(select(jnp.asarray(scores)))
    for other in (scores - 7, scores * 4):
        regular = select(jnp.asarray(other))
        assert regular.sum() >= n * m - 1
    np.testing.assert_array_equal(regular, chosen)
    for equal in (-1.0, 0.0):
        assert select(jnp.full((m, m), equal)).sum() == n * m


@pytest.mark.slow
@pytest.mark.default_flags
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float16])
@pytest.mark.parametrize(("n", "m"), [(2, 4), (4, 8)])
def test_transposable_in_short_floats(dtype, n, m):
    rng = np.random.default_rng(6)
    largest = float(jnp.finfo(dtype).max)
    plain = rng.standard_normal((m, m))
    for scores in (plain, plain / np.abs(plain).max() * largest, np.zeros((m, m)), np.full((m, m), np.inf)):
        scores = jnp.asarray(scores, dtype)
        chosen = np.asarray(TransposableNM(n, m).select(scores))
        assert TransposableNM(n, m).violation(chosen) == 0
        assert chosen.sum() >= n * m - 1
        wide = np.asarray(scores, np.float64)
        if np.isfinite(wide).all():
            raised = wide - min(wide.min(), 0)
            assert raised[chosen].sum() == pytest.approx(
                program(raised / max(raised.max(), 1), n) * max(raised.max(), 1), rel=1e-6
            )
    nan = scores.at[0].set(jnp.nan)
    assert not np.asarray(TransposableNM(n, m).select(nan))[0].any()


@pytest.mark.slow
def test_transposable_over_stacked_matrices_many_tiles_and_vmap(monkeypatch):
    monkeypatch.setattr("pruneopt.constraints.transposable._ENTRIES", 5 * 36)  # several rounds, the last not full
    constraint = TransposableNM(2, 6)
    scores = jnp.asarray(np.random.default_rng(7).standard_normal((3, 12, 18)))
    chosen = constraint.select(scores)
    for one, mask in zip(scores, chosen, strict=True):
        np.testing.assert_array_equal(constraint.select(one), mask)
    np.testing.assert_array_equal(jax.vmap(constraint.select)(scores), chosen)
    assert constraint.relaxed(0.5).n == 4
    assert constraint.relaxed(1.0) == constraint


# ---------------------------------------------------------------------------------------------- blocks and slices


@pytest.mark.parametrize("shape", [(1, 4), (4, 4), (16, 16), (2, 1), (-1, 1), (8,)])
@pytest.mark.parametrize("scope", ["tree", "out", "in"])
@pytest.mark.slow
def test_blocks_with_the_largest_sums_live(shape, scope):
    scores = np.abs(np.random.default_rng(8).standard_normal((16, 32)))
    box = [1, *shape][-2:]
    p, q = (s if b == -1 else b for s, b in zip((16, 32), box, strict=True))
    pooled = scores.reshape(16 // p, p, 32 // q, q).sum((1, 3))
    axis = {"tree": None, "out": 0, "in": 1}[scope]
    size = pooled.size if axis is None else pooled.shape[axis]
    order = np.sort(pooled, axis=axis) if axis is not None else np.sort(pooled.ravel())
    count = size // 2
    expected = np.zeros(pooled.shape, bool)
    if count:
        threshold = order[-count] if axis is None else np.expand_dims(np.take(order, size - count, axis), axis)
        expected = pooled >= threshold
    constraint = Blocks(shape, Cardinality(sparsity=0.5, per=scope, floor=0 if scope == "tree" else None))
    chosen = constraint.select(jnp.asarray(scores))
    np.testing.assert_array_equal(chosen, np.kron(expected, np.ones((p, q))).astype(bool))
    assert constraint.violation(chosen) == 0


def test_inputs_are_slices_and_blocks_must_tile():
    scores = np.abs(np.random.default_rng(9).standard_normal((6, 3)))
    chosen = np.asarray(Slices(-2, Cardinality(count=2)).select(jnp.asarray(scores)))
    assert set(np.flatnonzero(chosen.all(1))) == set(np.argsort(scores.sum(1))[-2:])
    assert chosen.any(1).sum() == 2
    with pytest.raises(ValueError, match="do not tile"):
        Blocks((4, 4), Cardinality(sparsity=0.5)).check(jnp.ones((8, 6)))


# ---------------------------------------------------------------------------------------------- intersections

_MASK = np.asarray(np.random.default_rng(10).random((4, 4)) < 0.6)
_TALL = np.asarray(np.random.default_rng(11).random((6, 2)) < 0.7)


def by_2_4(masks):
    return (masks.reshape(-1, 4, 4).sum(1) <= 2).all(1)


def by_2_3(masks):
    return (masks.reshape(-1, 2, 3, 2).sum(2) <= 2).all((1, 2))


def pairs(masks):
    return masks.reshape(-1, 2, 2, 2, 2).any((2, 4))


# (parts, shape, feasible over all masks as rows, whether part by part is optimal)
INTERSECTIONS = {
    "N:M in a kept set": ((Support(_MASK), NM(2, 4)), (4, 4), lambda x: by_2_4(x) & ~(x & ~_MASK.ravel()).any(1), True),
    "N:M, then a kept set": (
        (NM(2, 4), Support(_MASK)),
        (4, 4),
        lambda x: by_2_4(x) & ~(x & ~_MASK.ravel()).any(1),
        True,
    ),
    "both ways in a kept set": (
        (Support(_MASK), TransposableNM(2, 4)),
        (4, 4),
        lambda x: transposable(x, 2, 4) & ~(x & ~_MASK.ravel()).any(1),
        True,
    ),
    "cardinality in N:M": (
        (NM(2, 4), Cardinality(sparsity=0.7)),
        (4, 4),
        lambda x: by_2_4(x) & (x.sum(1) <= 4),
        True,
    ),
    "cardinality in N:M in a kept set": (
        (NM(2, 3), Cardinality(count=5), Support(_TALL)),
        (6, 2),
        lambda x: by_2_3(x) & (x.sum(1) <= 5) & ~(x & ~_TALL.ravel()).any(1),
        True,
    ),
    "runs in N:M": (
        (NM(2, 3), Cardinality(count=3, per="in", span=3)),
        (6, 2),
        lambda x: by_2_3(x) & (x[:, :6].sum(1) <= 3) & (x[:, 6:].sum(1) <= 3),
        True,
    ),
    "runs across N:M": (
        (NM(2, 3), Cardinality(count=3, per="in", span=2)),
        (6, 2),
        lambda x: by_2_3(x) & (x.reshape(-1, 3, 4).sum(2) <= 3).all(1),
        False,
    ),
    "outputs, then the leaf": (
        (Cardinality(count=3, per="out"), Cardinality(count=4)),
        (6, 2),
        lambda x: (x.reshape(-1, 6, 2).sum(1) <= 3).all(1) & (x.sum(1) <= 4),
        True,
    ),
    "inputs and outputs": (
        (Cardinality(count=1, per="in"), Cardinality(count=2, per="out")),
        (6, 2),
        lambda x: (x.reshape(-1, 6, 2).sum(1) <= 2).all(1) & (x.reshape(-1, 6, 2).sum(2) <= 1).all(1),
        False,
    ),
    "N:M, coarse first": (
        (Cardinality(sparsity=0.5), NM(2, 4)),
        (4, 4),
        lambda x: by_2_4(x) & (x.sum(1) <= 8),
        False,
    ),
    "blocks in N:M": (
        (NM(1, 2, "out"), Blocks((2, 2), Cardinality(count=2))),
        (4, 4),
        lambda x: (x.reshape(-1, 8, 2).sum(2) <= 1).all(1) & (pairs(x).sum((1, 2)) <= 2),
        True,
    ),
    "blocks across N:M": (
        (NM(2, 4), Blocks((2, 2), Cardinality(count=2))),
        (4, 4),
        lambda x: by_2_4(x) & (pairs(x).sum((1, 2)) <= 2),
        False,
    ),
    "inputs in N:M": (
        (NM(1, 2, "out"), Slices(-2, Cardinality(count=3))),
        (6, 2),
        lambda x: (x.reshape(-1, 6, 2).sum(2) <= 1).all(1) & (x.reshape(-1, 6, 2).any(2).sum(1) <= 3),
        True,
    ),
    "blocks both ways": (
        (TransposableNM(1, 2), Blocks((2, 2), Cardinality(count=2))),
        (4, 4),
        lambda x: (
            (x.reshape(-1, 8, 2).sum(2) <= 1).all(1)
            & (x.reshape(-1, 2, 2, 4).sum(2) <= 1).all((1, 2))
            & (pairs(x).sum((1, 2)) <= 2)
        ),
        True,
    ),
    "a budget both ways": (
        (TransposableNM(2, 4), Cardinality(sparsity=0.7)),
        (4, 4),
        lambda x: transposable(x, 2, 4) & (x.sum(1) <= 4),
        False,
    ),
    "a floor first": (
        (Cardinality(count=6, floor=4), NM(2, 4)),
        (4, 4),
        lambda x: by_2_4(x) & (x.sum(1) <= 6) & (x.sum(1) >= 4),
        True,
    ),
}


@pytest.mark.parametrize("name", INTERSECTIONS)
@pytest.mark.slow
def test_intersections_are_feasible_and_optimal_where_they_say(name):
    parts, shape, oracle, exact = INTERSECTIONS[name]
    constraint = Intersection(parts)
    assert constraint.exact is exact
    every = EVERY_16 if shape == (4, 4) else EVERY_12
    feasible = every[oracle(every)]
    rng = np.random.default_rng(12)
    select = jax.jit(constraint.select)
    for k in range(8):
        scores = np.abs(rng.standard_normal(shape))
        largest = feasible[feasible.sum(1) == feasible.sum(1).max()]
        known = largest[rng.integers(len(largest))].reshape(shape)
        if k >= 4 and not any(isinstance(part, Blocks | Slices) for part in parts):
            scores = np.where(~known & (rng.random(shape) < 0.2), -np.inf, scores)
            scores = np.where(known & (rng.random(shape) < 0.2), np.inf, scores)
        chosen = np.asarray(select(jnp.asarray(scores)))
        assert constraint.violation(chosen) == 0
        assert (feasible == chosen.ravel()).all(1).any()
        assert not chosen[scores == -np.inf].any()
        if exact:
            check_best(chosen, scores, feasible)


def test_what_is_already_kept_stays_within_a_coarser_budget():
    constraint = Intersection((NM(2, 4), Cardinality(count=5)))
    scores = np.random.default_rng(13).random((8, 4))
    scores[[0, 1, 4], [0, 0, 2]] = np.inf
    chosen = np.asarray(constraint.select(jnp.asarray(scores)))
    assert chosen[np.isinf(scores)].all()
    assert chosen.sum() == 5


def test_axes_by_number_promise_nothing():
    assert Intersection((NM(2, 4, -2), Cardinality(count=5, per="out"))).exact
    assert not Intersection((NM(2, 4, 0), Cardinality(count=5, per="out"))).exact
    assert not Intersection((NM(2, 4), Cardinality(count=5, per=(1,)))).exact
    assert not Intersection((Cardinality(count=5), Cardinality(count=2, per="leaf"))).exact
    for a, b in itertools.permutations((Cardinality(count=5, floor=1), Cardinality(count=4, floor=2)), 2):
        assert not Intersection((a, b)).exact


def test_a_tuple_of_one_name_is_that_name():
    assert Cardinality(sparsity=0.5, per=("out",)) == Cardinality(sparsity=0.5, per="out")
    assert Cardinality(sparsity=0.5, per=("in",), span=4) == Cardinality(sparsity=0.5, per="in", span=4)
    assert "sparsity" in inspect.signature(Cardinality).parameters


def test_a_set_that_cuts_nothing_has_no_parts():
    for idle in (Cardinality(sparsity=0.0), NM(4, 4), Slices(-1, Cardinality(sparsity=0.0)), Support(None)):
        found = parts.of(idle)
        assert found.fixed
        np.testing.assert_array_equal(found.allowed(jnp.zeros((4, 2))), np.ones((4, 2), bool))
    assert parts.of(Cardinality(sparsity=0.0, floor=2)).one.floor == 2


def test_parts_are_flat_and_choose_with_floors_last():
    mask = jnp.asarray([[True], [False], [True], [True]])
    inner = Intersection((Cardinality(count=2, floor=1), NM(2, 4)))
    found = parts.of(Intersection((inner, Intersection((Support(mask), L1Ball(1.0))))))
    assert [choice.by for choice in found.choices] == [NM(2, 4), Cardinality(count=2, floor=1)]
    assert (found.masks, found.values, found.fixed) == ((mask,), (L1Ball(1.0),), False)
    np.testing.assert_array_equal(
        found.select(jnp.asarray([[1.0], [9.0], [3.0], [2.0]]))[:, 0], [False, False, True, True]
    )


def test_by_path_tells_its_order():
    one, other = ({"a*": NM(2, 4), "*": Cardinality(count=1)}, {"*": Cardinality(count=1), "a*": NM(2, 4)})
    assert ByPath(one) == ByPath(dict(one)) != ByPath(other)
    assert hash(ByPath(one)) == hash(ByPath(dict(one)))
