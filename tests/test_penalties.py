"""Penalties against other libraries, their published special cases, and what they refuse."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from cases import PENALTIES, SHAPES, tree

import pruneopt as po
from pruneopt.curvature import Gram
from pruneopt.objectives import Reconstruction
from pruneopt.penalties import (
    L0,
    L1,
    MCP,
    OWL,
    SCAD,
    ElasticNet,
    GroupLasso,
    LHalf,
    LogSum,
    Partition,
    SparseGroupLasso,
)


@pytest.mark.parametrize("seed", range(4))
def test_slope_is_scikit_learns_isotonic_regression(seed):
    isotonic = pytest.importorskip("sklearn.isotonic").isotonic_regression
    rng = np.random.default_rng(seed)
    w, factors = rng.standard_normal(60), -np.sort(-rng.random(60))
    order = np.argsort(-np.abs(w))
    expected = np.empty(60)
    expected[order] = np.maximum(isotonic(np.abs(w)[order] - 0.3 * factors, increasing=False), 0)
    found = OWL(0.6, jnp.asarray(factors)).prox({"w": jnp.asarray(w)}, 0.5)["w"]
    np.testing.assert_allclose(found, np.sign(w) * expected, atol=1e-14)


def test_owl_with_equal_factors_is_l1_and_with_one_factor_the_largest_weight():
    w = tree(1)
    np.testing.assert_allclose(OWL(0.3, jnp.ones(12)).prox(w, 1.0)["a"], L1(0.3).prox(w, 1.0)["a"], atol=1e-15)
    flat = jnp.concatenate([x.reshape(-1) for x in jax.tree.leaves(w)])
    largest = OWL(0.3, jnp.zeros(12).at[0].set(1.0)).prox({"w": flat}, 1.0)["w"]
    with jax.numpy_dtype_promotion("standard"):  # Moreau: w less its projection on the L1 ball, optax's
        projected = optax.projections.projection_l1_ball(flat, 0.3)
    np.testing.assert_allclose(largest, flat - projected, atol=1e-12)


def test_slope_and_oscar_have_the_published_factors():
    quantiles = OWL.slope(1.0, 4, level=0.2).factors
    np.testing.assert_allclose(quantiles, [1.959964, 1.644854, 1.439531, 1.281552], atol=1e-6)
    np.testing.assert_allclose(OWL.oscar(1.0, 3, 0.5).factors, [2.0, 1.5, 1.0])


@pytest.mark.slow
def test_limits_are_the_simpler_penalties():
    w, groups = tree(2), Partition.slices(tree(2), axis=-1)
    for one, other in (
        (ElasticNet(0.3, 1.0), L1(0.3)),
        (SparseGroupLasso(0.3, groups, 1.0), L1(0.3)),
        (SparseGroupLasso(0.3, groups, 0.0), GroupLasso(0.3, groups)),
        (MCP(0.3, 1e9), L1(0.3)),
        (SCAD(0.3, 1e9), L1(0.3)),
        (LogSum(3e8, 1e9), L1(0.3)),
        (MCP(0.3, 1e-9), L0(0.3**2 * 1e-9 / 2)),
    ):
        for step in (0.5, 3.0):
            jax.tree.map(
                lambda x, y: np.testing.assert_allclose(x, y, atol=1e-6), one.prox(w, step), other.prox(w, step)
            )


def test_adaptive_factors_are_inverse_sizes():
    reference = {"w": jnp.asarray([[2.0, -0.5], [0.0, 1.0]])}
    penalty = L1.adaptive(0.1, reference, power=2.0)
    np.testing.assert_allclose(penalty.factors["w"], [[0.25, 4.0], [4.0, 1.0]])
    assert penalty.value(reference) == pytest.approx(0.1 * (0.5 + 2.0 + 1.0))


def test_factors_of_one_an_output_broadcast():
    w = jnp.asarray(np.random.default_rng(0).standard_normal((5, 3)))
    row = jnp.asarray([[0.1, 1.0, 2.0]])
    np.testing.assert_array_equal(L1(0.4, row).prox(w, 1.0), L1(0.4, jnp.broadcast_to(row, w.shape)).prox(w, 1.0))
    assert L1(0.4, row).value(w) == pytest.approx(0.4 * float(jnp.sum(jnp.abs(w) * row)))


def test_heads_are_spans_of_an_axis():
    w = {"w": jnp.asarray(np.random.default_rng(1).standard_normal((3, 8)))}
    groups = Partition.slices(w, axis=-1, span=4)
    np.testing.assert_array_equal(groups.labels["w"][0], [0, 0, 0, 0, 1, 1, 1, 1])
    norms = [float(jnp.linalg.norm(w["w"][:, :4])), float(jnp.linalg.norm(w["w"][:, 4:]))]
    assert GroupLasso(1.0, groups).value(w) == pytest.approx(12**0.5 * sum(norms))
    lighter = min(norms) / 12**0.5
    shrunk = GroupLasso(lighter * 1.01, groups).prox(w, 1.0)["w"]
    assert [bool(jnp.any(shrunk[:, h : h + 4])) for h in (0, 4)] == [n > min(norms) for n in norms]


def network(p, x):
    hidden = jax.nn.relu(x @ p["first"]["kernel"] + p["first"]["bias"])
    return jax.nn.relu(hidden) @ p["second"]["kernel"]


@pytest.mark.slow
@pytest.mark.default_flags
def test_coupled_channels_of_a_network_are_groups_over_all_leaves_they_tie():
    rng = np.random.default_rng(2)
    params = {
        "first": {"kernel": jnp.asarray(rng.standard_normal((4, 6)), jnp.float32), "bias": jnp.zeros(6)},
        "second": {"kernel": jnp.asarray(rng.standard_normal((6, 3)), jnp.float32)},
    }
    units = po.structure.trace(network, params, jnp.zeros((2, 4))).units()
    hidden = units.of("first/kernel", 1)
    with pytest.raises(ValueError, match="overlap"):
        Partition.units(params, units, [*hidden, *units.of("first/kernel", 0)])
    groups = Partition.units(params, units, hidden)
    assert groups.count == 6
    np.testing.assert_array_equal(groups.sizes(params), np.full(6, 4 + 1 + 3))
    weight = float(np.sort(groups.norms(params))[2]) / 8**0.5 * 1.001
    pruned = GroupLasso(weight, groups).prox(params, 1.0)
    gone = np.asarray(~jnp.any(pruned["first"]["kernel"] != 0, axis=0))
    assert gone.sum() == 3
    np.testing.assert_array_equal(gone, ~np.any(np.asarray(pruned["second"]["kernel"]) != 0, axis=1))


def problem(penalty):
    w0 = tree(1, {"w": (4, 2)})["w"]
    return po.Problem(Reconstruction(w0, Gram.checked(jnp.eye(4) + 0.1)), penalty=penalty)


CELL = {k: jnp.zeros(s) for k, s in SHAPES.items()}
HALF = {"a": jnp.ones((2, 4), bool), "b": jnp.zeros((4, 1), bool)}
REFUSALS = {
    "negative weight": (lambda: L1(-0.1), ("weight=-0.1", ">= 0", "pass")),
    "NaN weight": (lambda: GroupLasso(float("nan"), Partition.slices(CELL, 0)), ("weight=nan", ">= 0")),
    "infinite weight": (lambda: OWL(float("inf"), jnp.ones(3)), ("weight=inf",)),
    "weight that is text": (lambda: LHalf("0.1"), ("weight='0.1'",)),
    "weight True": (lambda: L0(True), ("weight=True",)),
    "ratio": (lambda: ElasticNet(0.1, 0.0), ("ratio=0.0", "(0, 1]")),
    "ratio of groups": (lambda: SparseGroupLasso(0.1, Partition.slices(CELL, 0), 1.5), ("ratio=1.5", "[0, 1]")),
    "gamma": (lambda: MCP(0.1, 0.0), ("gamma=0.0", "> 0")),
    "a": (lambda: SCAD(0.1, 1.0), ("a=1.0", "> 1")),
    "eps": (lambda: LogSum(0.1, -1.0), ("eps=-1.0", "> 0")),
    "factors that do not fit": (lambda: problem(L1(0.1, jnp.ones((3, 2)))), ("factors", "(3, 2)", "(4, 2)")),
    "negative factors": (lambda: problem(L1(0.1, -jnp.ones((1, 2)))), ("factors", "negative")),
    "NaN factors": (lambda: problem(L1(0.1, jnp.full((1, 2), jnp.nan))), ("factors", "NaN")),
    "ordered factors that rise": (lambda: problem(OWL(0.1, jnp.arange(8.0))), ("factors", "falling", "sort")),
    "too few ordered factors": (lambda: problem(OWL(0.1, jnp.ones(3))), ("factors", "(3,)", "(8,)")),
    "level": (lambda: OWL.slope(0.1, 3, level=1.5), ("level=1.5", "(0, 1)")),
    "power": (lambda: L1.adaptive(0.1, CELL, power=0.0), ("power=0.0", "> 0")),
    "reference of zeros": (lambda: L1.adaptive(0.1, CELL), ("reference", "zeros")),
    "groups of other leaves": (lambda: problem(GroupLasso(0.1, Partition.slices(CELL, 0))), ("groups", "structure")),
    "groups that overlap": (lambda: Partition.sets(CELL, [HALF, HALF]), ("overlap", "'a'", "disjoint")),
    "groups that do not cover": (lambda: Partition.sets(CELL, [HALF]), ("do not cover", "'b'", "add a group")),
    "labels outside": (
        lambda: problem(GroupLasso(0.1, Partition(np.asarray([[0, 1]]), 1))),
        ("labels outside", "[0, 1)", "cover all"),
    ),
    "negative labels": (lambda: problem(GroupLasso(0.1, Partition(np.asarray([[-1, 0]]), 1))), ("no group",)),
    "an empty group": (lambda: problem(GroupLasso(0.1, Partition(np.asarray([[0, 2]]), 3))), ("no entry", "hole")),
    "labels of another shape": (lambda: problem(GroupLasso(0.1, Partition(np.zeros(2, int), 1))), ("(2,)", "(4, 2)")),
    "labels that are not whole": (lambda: problem(GroupLasso(0.1, Partition(np.zeros((4, 2)), 1))), ("whole",)),
    "axis": (lambda: Partition.slices(CELL, 2), ("axis=2", "'a'", "pass another")),
    "axis in words": (lambda: Partition.slices(CELL, "x"), ("axis='x'", "whole number")),
    "power in words": (lambda: L1.adaptive(0.1, CELL, power="a"), ("power='a'", "> 0")),
    "ordered weights of negative size": (lambda: OWL.oscar(0.1, -3, 0.1), ("size=-3", ">= 1")),
    "ordered weights of no size": (lambda: OWL.slope(0.1, 0), ("size=0", ">= 1")),
    "span": (lambda: Partition.slices(CELL, -1, span=3), ("span=3", "'a'", "length 4")),
    "span zero": (lambda: Partition.slices(CELL, -1, span=0), ("span=0", ">= 1")),
}


@pytest.mark.parametrize("name", REFUSALS)
def test_refuses_with_a_remedy(name):
    call, words = REFUSALS[name]
    with pytest.raises(ValueError, match=r"\w") as caught:
        call()
    for word in words:
        assert word in str(caught.value), caught.value


@pytest.mark.parametrize("groups", [3, None])
def test_groups_that_are_no_partition_are_a_type_error(groups):
    for penalty in (GroupLasso, SparseGroupLasso):
        with pytest.raises(TypeError, match=f"groups is {groups}; pass a partition"):
            penalty(0.1, groups)


def test_a_reference_of_numbers_is_a_type_error():
    with pytest.raises(TypeError, match=r"reference holds 1\.0 in leaf '0'"):
        L1.adaptive(0.1, [1.0, 2.0])


@pytest.mark.parametrize("name", PENALTIES)
def test_one_compiled_prox_serves_every_weight(name):
    import dataclasses

    penalty = PENALTIES[name][0]
    traced = []

    @jax.jit
    def prox(penalty, w):
        traced.append(1)
        return penalty.prox(w, 0.5)

    for weight in (0.1, 0.2):
        heavier = dataclasses.replace(penalty, weight=weight)
        jax.tree.map(
            lambda x, y: np.testing.assert_allclose(x, y, atol=1e-14),
            prox(heavier, tree(3)),
            heavier.prox(tree(3), 0.5),
        )
    assert len(traced) == 1
