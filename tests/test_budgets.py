"""One budget, one meaning: of operators of many problems, of a tree layer by layer, of matrices in any layout."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import pruneopt as po
from pruneopt.constraints import NM, Blocks, ByPath, Cardinality, Intersection, Slices, Support, by_size
from pruneopt.plans import Iterative, LayerMethod, layerwise
from pruneopt.solvers import BlockOBS, GreedyOBS, Score

RNG = np.random.default_rng(0)


def draw(*shape):
    return RNG.standard_normal(shape)


DEPTHWISE, IMAGES = {"kernel": draw(3, 3, 1, 16)}, draw(4, 6, 6, 16)
GROUPED, WIDE = {"kernel": draw(3, 3, 2, 6)}, draw(4, 5, 5, 6)


def grouped(p, x):
    numbers, groups = ("NHWC", "HWIO", "NHWC"), x.shape[-1] // p["kernel"].shape[2]
    return jax.lax.conv_general_dilated(
        x, p["kernel"], (1, 1), "VALID", dimension_numbers=numbers, feature_group_count=groups
    )


def windows(x, groups):
    """The rows of each group's matrix, window first, channels last: (groups, positions, 9 * channels)."""
    n, h, w, c = x.shape
    seen = [np.asarray(x)[:, i : i + h - 2, j : j + w - 2] for i in range(3) for j in range(3)]
    rows = np.stack(seen, 3).reshape(n, h - 2, w - 2, 9, groups, c // groups)
    return np.moveaxis(rows, 4, 0).reshape(groups, -1, 9 * c // groups)


def layer(params, x, constraint, solver=None, fn=grouped, **words):
    row = LayerMethod(solver or Score(), damping=0.0, target="layer")
    return layerwise(fn, params, [x], constraint, row, progress=False, **words)


def largest(scores, count):
    """A mask of the `count` largest, the first of equal ones."""
    order = np.argsort(-np.asarray(scores).reshape(-1), kind="stable")
    return np.isin(np.arange(scores.size), order[:count]).reshape(scores.shape)


@pytest.mark.parametrize(("sparsity", "kept"), [(0.5, 72), (0.8, 28), (0.9, 14)])
@pytest.mark.parametrize("per", ["tree", "leaf"])
def test_a_depthwise_kernel_has_one_budget(sparsity, kept, per):
    pruned = layer(DEPTHWISE, IMAGES, Cardinality(sparsity=sparsity, per=per))
    squares = np.stack([np.mean(x**2, axis=0) for x in windows(IMAGES, 16)])  # (16, 9)
    scores = np.moveaxis(np.asarray(DEPTHWISE["kernel"]) ** 2, 3, 0).reshape(16, 9) * squares
    mask = np.moveaxis(largest(scores, kept).reshape(16, 3, 3, 1), 0, 3)
    assert pruned.kept == kept
    np.testing.assert_array_equal(np.asarray(pruned.support["kernel"]), mask)


@pytest.mark.parametrize("solver", [BlockOBS(), GreedyOBS(), po.solvers.BALANCED], ids=["block", "greedy", "ADMM"])
def test_solvers_keep_each_problems_share(solver):
    by_score = layer(GROUPED, WIDE, Cardinality(sparsity=0.9))
    pruned = layer(GROUPED, WIDE, Cardinality(sparsity=0.9), solver)
    assert pruned.kept == by_score.kept == 10
    shares = [np.asarray(p.support["kernel"]).reshape(18, 3, 2).sum((0, 2)) for p in (pruned, by_score)]
    np.testing.assert_array_equal(*shares)


def test_scopes_of_outputs_inputs_and_groups_hold_in_each_problem():
    for constraint, axis in ((Cardinality(count=2, per="out"), 0), (Cardinality(count=1, per="in"), 2)):
        mask = np.asarray(layer(GROUPED, WIDE, constraint).support["kernel"]).reshape(18, 3, 2)
        np.testing.assert_array_equal(mask.sum(axis), constraint.count)
    mask = np.asarray(layer(GROUPED, WIDE, NM(1, 2)).support["kernel"]).reshape(9, 2, 6)
    np.testing.assert_array_equal(mask.sum(1), 1)
    both = layer(GROUPED, WIDE, Intersection((NM(1, 2), Cardinality(sparsity=0.7))))
    assert both.kept == 32
    assert (np.asarray(both.support["kernel"]).reshape(9, 2, 6).sum(1) <= 1).all()
    blocks = layer(GROUPED, WIDE, Blocks((2, 1), Cardinality(sparsity=0.8)))
    alive = np.asarray(blocks.support["kernel"]).reshape(9, 2, 6).sum(1)
    assert set(np.unique(alive)) == {0, 2}
    assert (alive > 0).sum() == 10  # of 54


def test_slices_of_a_depthwise_kernel_are_whole_channels():
    pruned = layer(DEPTHWISE, IMAGES, Slices(-1, Cardinality(sparsity=0.5)))
    alive = np.asarray(pruned.support["kernel"]).reshape(9, 16).sum(0)
    assert sorted(alive) == [0] * 8 + [9] * 8


def test_a_floor_counts_once_for_all_problems():
    pruned = layer(DEPTHWISE, IMAGES, Cardinality(count=5, floor=5))
    assert pruned.kept == 5
    with pytest.raises(ValueError, match="floor=6 keeps 6 weights"):
        layer(DEPTHWISE, IMAGES, Cardinality(count=5, floor=6))
    with pytest.raises(ValueError, match="collapse"):
        layer(DEPTHWISE, IMAGES, Cardinality(sparsity=0.999))
    assert layer(DEPTHWISE, IMAGES, Cardinality(sparsity=0.999, floor=0)).kept == 0


def test_what_was_cut_before_counts():
    within = {"kernel": np.arange(144).reshape(3, 3, 1, 16) % 3 > 0}
    pruned = layer(DEPTHWISE, IMAGES, Intersection((Support(within), Cardinality(sparsity=0.5))))
    assert pruned.kept == 72
    assert not np.any(np.asarray(pruned.support["kernel"]) & ~within["kernel"])


MLP = {"a": draw(7, 5), "b": draw(5, 11), "c": draw(11, 3)}


def mlp(p, x):
    return jnp.tanh(jnp.tanh(x @ p["a"]) @ p["b"]) @ p["c"]


@pytest.mark.parametrize("sparsity", [0.5, 0.77, 0.9])
def test_a_tree_budget_is_one_total_layer_by_layer(sparsity):
    pruned = layer(MLP, draw(20, 7), Cardinality(sparsity=sparsity), fn=mlp)
    sizes = np.asarray([35, 55, 33])
    total = int((1 - sparsity) * 123 + 1e-9)
    counts = total * sizes // 123
    counts[np.argsort(-(total * sizes % 123), kind="stable")[: total - counts.sum()]] += 1
    assert pruned.kept == total
    assert [entry["kept"] for entry in pruned.history[0]["layers"]] == list(counts)
    assert pruned.scope == "one budget for the tree, shared out uniformly by layer"
    assert {entry["scope"] for entry in pruned.history[0]["layers"]} == {pruned.scope}


def test_counts_floors_patterns_and_stages_of_a_tree_budget():
    x = draw(20, 7)
    assert layer(MLP, x, Cardinality(count=60), fn=mlp).kept == 60
    floored = layer(MLP, x, Cardinality(count=12, floor=4), fn=mlp)
    assert [entry["kept"] for entry in floored.history[0]["layers"]] == [4, 4, 4]
    pattern = layer(MLP, x, ByPath({"c": Cardinality(count=7), "*": Cardinality(sparsity=0.5)}), fn=mlp)
    assert [entry["kept"] for entry in pattern.history[0]["layers"]] == [18, 27, 7]
    assert layer(MLP, x, by_size(MLP, 0.77), fn=mlp).kept == 28
    staged = po.prune(mlp, MLP, [x], Cardinality(sparsity=0.77), method="wanda", schedule=Iterative(2), progress=False)
    assert staged.kept == 28
    assert staged.scope == "one budget for the tree, shared out uniformly by layer"


def test_layers_of_a_stacked_leaf_share_its_budget():
    stack, x = {"w": draw(3, 5, 5)}, draw(20, 5)

    def fn(p, x):
        return jax.lax.scan(lambda h, w: (jnp.tanh(h @ w), None), x, p["w"])[0]

    pruned = layer(stack, x, Cardinality(count=20, per="leaf"), fn=fn)
    assert [entry["kept"] for entry in pruned.history[0]["layers"]] == [7, 7, 6]
    np.testing.assert_array_equal(np.asarray(pruned.support["w"]).sum((1, 2)), [7, 7, 6])


def test_numbered_axes_are_those_of_the_leaf():
    turned, x = {"w": draw(3, 7)}, draw(20, 7)  # (n_out, n_in)

    def fn(p, x):
        return x @ p["w"].T

    mask = np.asarray(layer(turned, x, Cardinality(count=2, per=0), fn=fn).support["w"])
    np.testing.assert_array_equal(mask.sum(1), 2)
    mask = np.asarray(layer(turned, x, Slices(0, Cardinality(count=2)), fn=fn).support["w"])
    assert sorted(mask.sum(1)) == [0, 7, 7]
    mask = np.asarray(layer(turned, x, Support({"w": turned["w"] > 0}), fn=fn).support["w"])
    np.testing.assert_array_equal(mask, turned["w"] > 0)
    for constraint in (Cardinality(count=2, per=0), NM(1, 3, axis=0), Slices(0, Cardinality(count=2))):
        with pytest.raises(ValueError, match="neither the inputs nor the outputs"):
            layer(GROUPED, WIDE, constraint)
    with pytest.raises(ValueError, match="more axes than a layer's matrix"):
        layer(GROUPED, WIDE, Blocks((3, 3, 1, 1), Cardinality(count=2)))
