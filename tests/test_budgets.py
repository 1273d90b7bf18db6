"""One budget, one meaning: of operators of many problems, of a tree layer by layer, of matrices in any layout."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import pruneopt as po
from pruneopt import training
from pruneopt.constraints import (
    NM,
    Blocks,
    ByPath,
    Cardinality,
    Intersection,
    Slices,
    Support,
    TransposableNM,
    by_size,
    laid,
)
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


@pytest.mark.parametrize(
    "solver",
    [
        pytest.param(BlockOBS(), id="block", marks=pytest.mark.slow),
        pytest.param(GreedyOBS(), id="greedy"),
        pytest.param(po.solvers.BALANCED, id="ADMM", marks=pytest.mark.slow),
    ],
)
def test_solvers_keep_each_problems_share(solver):
    by_score = layer(GROUPED, WIDE, Cardinality(sparsity=0.9))
    pruned = layer(GROUPED, WIDE, Cardinality(sparsity=0.9), solver)
    assert pruned.kept == by_score.kept == 10
    shares = [np.asarray(p.support["kernel"]).reshape(18, 3, 2).sum((0, 2)) for p in (pruned, by_score)]
    np.testing.assert_array_equal(*shares)


@pytest.mark.slow
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


@pytest.mark.parametrize("sparsity", [0.77, *(pytest.param(s, marks=pytest.mark.slow) for s in (0.5, 0.9))])
@pytest.mark.slow
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


@pytest.mark.slow
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


@pytest.mark.slow
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


# Matrices as the network multiplies them, in every method and in training.
D, HEADS, DIM = 8, 2, 6
LEAVES = {
    "query": draw(D, HEADS, DIM),  # (n_in, heads, head_dim): n_out = heads * head_dim
    "out": draw(HEADS, DIM, D),  # (heads, head_dim, n_out): n_in = heads * head_dim
    "turned": draw(12, D),  # (n_out, n_in), as PyTorch stores it
    "stack": draw(3, D, D),  # (layers, n_in, n_out)
    "members": draw(4, D, 2),  # an ensemble: (members, n_in, n_out)
    "fused": draw(D, 3 * D),  # q, k, v side by side
    "grouped": draw(1, 1, 4, 6),  # two groups
}
POSITIONS = draw(2, 3, D)


def attention(p, x):
    h = jnp.einsum("btd,dhk->bthk", x, p["query"])
    x = x + jnp.einsum("bthk,hkd->btd", h, p["out"])
    x = x + (x @ p["turned"].T)[..., :D]
    x = jax.lax.scan(lambda h, w: (jnp.tanh(h @ w), None), x, p["stack"])[0]
    each = jax.vmap(lambda w, i: jnp.sin(i * x) @ w)(p["members"], jnp.arange(4.0))
    q, k, v = (x @ w for w in jnp.split(p["fused"], 3, axis=1))
    image = grouped({"kernel": p["grouped"]}, x[:, :, None])
    return jnp.mean((q * k + v) ** 2) + jnp.mean(each**2) + jnp.mean(image**2)


def matrices(name, leaf):
    """The leaf by hand as (problems, n_in, n_out)."""
    leaf = np.asarray(leaf)
    match name:
        case "query":
            return leaf.reshape(1, D, HEADS * DIM)
        case "out":
            return leaf.reshape(1, HEADS * DIM, D)
        case "turned":
            return leaf.T[None]
        case "fused":
            return np.moveaxis(leaf.reshape(D, 3, D), 1, 0)
        case "grouped":
            return np.moveaxis(leaf.reshape(4, 2, 3), 1, 0)
    return leaf


def best(scores, n, groups):
    """The n largest of each group of the last axis; `groups` lays the matrices out as (..., group)."""
    rows = groups(scores)
    order = np.argsort(-rows, axis=-1, kind="stable")[..., :n]
    mask = np.zeros(rows.shape, bool)
    np.put_along_axis(mask, order, True, -1)
    return mask


GROUPS = {
    "NM": (NM(2, 4), 2, lambda m: np.moveaxis(m.reshape(m.shape[0], -1, 4, m.shape[2]), 2, 3)),
    "out": (Cardinality(count=3, per="out"), 3, lambda m: np.swapaxes(m, 1, 2)),
    "in": (Cardinality(count=2, per="in"), 2, lambda m: m),
    "span": (Cardinality(count=3, per="in", span=2), 3, lambda m: m.reshape(m.shape[0], -1, 2 * m.shape[2])),
}


@pytest.mark.parametrize("scope", ["out", *(pytest.param(s, marks=pytest.mark.slow) for s in ("NM", "in", "span"))])
@pytest.mark.slow
def test_matrices_are_the_networks_whatever_the_layout(scope):
    constraint, n, groups = GROUPS[scope]
    masks = po.prune(attention, LEAVES, [POSITIONS], constraint, progress=False).support
    layout = po.structure.layout(attention, LEAVES, POSITIONS)
    trained = optax_masks(constraint, layout)
    for name, leaf in LEAVES.items():
        wanted = best(np.abs(matrices(name, leaf)), n, groups)
        np.testing.assert_array_equal(groups(matrices(name, masks[name])), wanted, err_msg=name)
        np.testing.assert_array_equal(np.asarray(trained[name]), np.asarray(masks[name]), err_msg=name)
    violated = laid(constraint, layout).violation({name: np.ones(leaf.shape, bool) for name, leaf in LEAVES.items()})
    assert violated == sum(
        groups(matrices(k, v)).size - groups(matrices(k, v))[..., 0].size * n for k, v in LEAVES.items()
    )


def optax_masks(constraint, layout):
    optimizer = training.straight_through(optax.sgd(0.1), constraint, layout=layout)
    params = jax.tree.map(jnp.asarray, LEAVES)
    return optimizer.finish(params, optimizer.init(params)).support


@pytest.mark.slow
def test_layerwise_and_whole_network_methods_cut_the_same_matrices():
    leaves = {"query": LEAVES["query"], "out": LEAVES["out"]}

    def fn(p, x):
        return jnp.einsum("bthk,hkd->btd", jnp.einsum("btd,dhk->bthk", x, p["query"]), p["out"])

    x = np.eye(D)[None]  # the first layer's Gram is the identity, so that its score is |w|
    whole = po.prune(fn, leaves, [x], Cardinality(count=3, per="out"), progress=False)
    layers = layer(leaves, x, Cardinality(count=3, per="out"), fn=fn)
    np.testing.assert_array_equal(np.asarray(whole.support["query"]), np.asarray(layers.support["query"]))
    assert whole.scope == layers.scope == "one budget for each output"


@pytest.mark.parametrize(
    "constraint",
    [
        NM(2, 4),
        NM(2, 4, axis="out"),
        Cardinality(count=2, per="out"),
        Cardinality(sparsity=0.5, per="in"),
        TransposableNM(1, 2),
        Blocks((2, 1), Cardinality(sparsity=0.5)),
        ByPath({"query": NM(2, 4), "*": Cardinality(sparsity=0.5)}),
        Intersection((NM(2, 4), Cardinality(sparsity=0.7))),
    ],
    ids=repr,
)
def test_ambiguous_leaves_are_refused_without_a_trace(constraint):
    leaves = {"query": jnp.asarray(LEAVES["query"])}
    words = r"leaf 'query' of shape \(8, 2, 6\) does not tell .* pass fn and a batch to prune, layout=po.structure"
    with pytest.raises(ValueError, match=words):
        po.prune(None, leaves, None, constraint, progress=False)
    with pytest.raises(ValueError, match=words):
        training.straight_through(optax.sgd(0.1), constraint).init(leaves)
    with pytest.raises(ValueError, match=words):
        po.Problem(po.objectives.Quadratic(leaves), subject_to=constraint)


@pytest.mark.slow
def test_budgets_that_need_no_orientation_are_taken_without_a_trace():
    leaves = {"query": jnp.asarray(LEAVES["query"])}
    for constraint, kept in (
        (Cardinality(sparsity=0.5), 48),
        (Cardinality(sparsity=0.5, per="leaf"), 48),
        (Cardinality(count=3, per=0), 24),
        (NM(2, 4, axis=0), 48),
        (Slices(0, Cardinality(count=2)), 24),
        (Blocks((2, 1, 1), Cardinality(sparsity=0.5)), 48),
    ):
        assert po.prune(None, leaves, None, constraint, progress=False).kept == kept


@pytest.mark.slow
def test_what_a_layout_cannot_tell_is_refused():
    tied, x = {"w": draw(4, 4), "b": draw(2, 2, 2)}, draw(3, 4)

    def fn(p, x):
        return (x @ p["w"]) @ p["w"].T

    with pytest.raises(ValueError, match=r"leaf 'w' of shape \(4, 4\) has no inputs and .* in different arrangements"):
        po.prune(fn, tied, [x], NM(2, 4), leaves=["w"], progress=False)
    with pytest.raises(ValueError, match=r"leaf 'b' of shape .* has no inputs and outputs: fn does not use it"):
        po.prune(fn, tied, [x], Cardinality(count=1, per="out"), leaves=["b"], progress=False)
    with pytest.raises(ValueError, match="matrices that leave some of its entries out"):
        po.prune(lambda p, x: x @ p["w"][:, :2], tied, [x], NM(2, 4), leaves=["w"], progress=False)
    two = {"q": draw(4, 4), "k": draw(4, 4)}

    def joined(p, x):
        return x @ jnp.concatenate([p["q"], p["k"]], axis=1)

    with pytest.raises(ValueError, match="leaf 'q' is multiplied together with 'k'"):
        po.prune(joined, two, [x], NM(2, 4), leaves=["q"], progress=False)
    mask = np.concatenate(
        [po.prune(joined, two, [x], Cardinality(count=1, per="in"), progress=False).support[n] for n in ("q", "k")],
        axis=1,
    )
    np.testing.assert_array_equal(mask, best(np.abs(np.concatenate([two["q"], two["k"]], 1)), 1, lambda m: m))
    with pytest.raises(TypeError, match=r"layout is 3; pass po.structure.layout"):
        training.gradual(optax.sgd(0.1), NM(2, 4), end=3, layout=3)
    layout = po.structure.layout(lambda p, x: x @ p["w"], tied, x)
    with pytest.raises(ValueError, match=r"layout: leaf 'w' has shape \(8, 4\), where it was traced \(4, 4\)"):
        laid(NM(2, 4), layout).check({"w": np.zeros((8, 4))})
    with pytest.raises(ValueError, match=r"spans all inputs, but leaf 'k' of shape \(2, 2, 4, 8\) is no matrix"):
        Blocks((-1, 1), Cardinality(count=3)).check({"k": np.zeros((2, 2, 4, 8))})
    with pytest.raises(ValueError, match=r"per='in' speaks of inputs and outputs, .* pass per='weight'"):
        training.l0(optax.sgd(0.1), 1e-3, per="in").init({"query": jnp.asarray(LEAVES["query"])})


def test_a_loss_tells_its_problems_matrices():
    leaves = {"turned": jnp.asarray(LEAVES["turned"])}
    loss = po.objectives.Loss(lambda p, x: jnp.mean((x @ p["turned"].T) ** 2), leaves, [POSITIONS])
    problem = po.Problem(loss, subject_to=Cardinality(count=2, per="out"))
    assert problem.violation({"turned": np.ones((12, 8), bool)}) == 12 * 6


@pytest.mark.default_flags
@pytest.mark.slow
def test_flax_attention_kernels_by_hand():
    nn = pytest.importorskip("flax.linen")
    model, x = nn.MultiHeadDotProductAttention(4), jnp.ones((1, 5, 32))
    params = model.init(jax.random.key(0), x, x)["params"]

    def fn(p, x):
        return model.apply({"params": p}, x, x)

    pruned = po.prune(fn, params, [x], NM(2, 4), progress=False)
    for name in ("query", "key", "value", "out"):
        shape = (32, 32)  # (d_model, heads * head_dim), and (heads * head_dim, d_model)
        w, mask = (np.asarray(tree[name]["kernel"]).reshape(shape) for tree in (params, pruned.support))
        wanted = best(np.abs(w)[None], 2, GROUPS["NM"][2])
        np.testing.assert_array_equal(GROUPS["NM"][2](mask[None]), wanted, err_msg=name)
    optimizer = training.straight_through(optax.sgd(0.1), NM(2, 4), layout=po.structure.layout(fn, params, x))
    state = optimizer.init(params)
    done = optimizer.finish(params, state)
    assert done.scope == "2 of every 4 along the inputs"
    np.testing.assert_array_equal(np.asarray(done.support["query"]["kernel"]), pruned.support["query"]["kernel"])
