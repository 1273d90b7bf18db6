"""What a network costs: FLOPs that equal XLA's or differ by a known count, memory by hand, pruned shares of dense."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType

from pruneopt.structure import cost, differences
from pruneopt.structure.cost import flops
from pruneopt.structure.graph import trace

RNG = np.random.default_rng(0)


def normal(*shape):
    return RNG.standard_normal(shape)


def convolve(x, kernel, padding="VALID", stride=1, **options):
    spatial = "DHW"[3 - (x.ndim - 2) :]
    numbers = (f"N{spatial}C", f"{spatial}IO", f"N{spatial}C")
    return jax.lax.conv_general_dilated(
        x, kernel, (stride,) * len(spatial), padding, dimension_numbers=numbers, **options
    )


def chain(p, x):
    x = convolve(convolve(x, p["a"]), p["b"], stride=2)
    return x.reshape(x.shape[0], -1) @ p["head"]


def attention(p, x):
    q, k, v = (jnp.einsum("btd,dhe->bthe", x, p[n]) for n in "qkv")
    mixed = jnp.einsum("bhst,bthe->bshe", jnp.einsum("bshe,bthe->bhst", q, k), v)
    return jnp.einsum("bshe,hed->bsd", mixed, p["o"])


HEADS = {**{n: normal(8, 2, 4) for n in "qkv"}, "o": normal(2, 4, 8)}
CONV = {"k": normal(3, 2, 4, 6)}
NETWORKS = {
    "mlp": (lambda p, x: (x @ p["a"]) @ p["b"], {"a": normal(8, 16), "b": normal(16, 4)}, normal(5, 8)),
    "attention": (attention, HEADS, normal(3, 5, 8)),
    "experts": (lambda p, x: jnp.einsum("ebd,edf->ebf", x, p["w"]), {"w": normal(3, 4, 6)}, normal(3, 5, 4)),
    "weights on the left": (lambda p, x: p["w"] @ x, {"w": normal(7, 8)}, normal(8, 5)),
    "two leaves": (lambda p, x: x @ (p["a"] @ p["b"]), {"a": normal(8, 2), "b": normal(2, 6)}, normal(5, 8)),
    "conv": (lambda p, x: convolve(x, p["k"]), CONV, normal(2, 9, 10, 4)),
    "strided conv": (lambda p, x: convolve(x, p["k"], stride=2), CONV, normal(2, 9, 10, 4)),
    "dilated conv": (lambda p, x: convolve(x, p["k"], rhs_dilation=(2, 3)), CONV, normal(2, 9, 10, 4)),
    "grouped conv": (lambda p, x: convolve(x, p["k"], feature_group_count=2), CONV, normal(2, 9, 10, 8)),
    "depthwise conv": (
        lambda p, x: convolve(x, p["k"], feature_group_count=4),
        {"k": normal(3, 3, 1, 8).astype(np.float32)},  # in float64 XLA computes a dense one
        normal(2, 9, 10, 4).astype(np.float32),
    ),
    "batch groups": (lambda p, x: convolve(x, p["k"], batch_group_count=2), CONV, normal(4, 9, 10, 4)),
    "conv 1d": (lambda p, x: convolve(x, p["k"], stride=3), {"k": normal(5, 4, 6)}, normal(2, 19, 4)),
    "conv and dot": (
        chain,
        {"a": normal(3, 3, 2, 4), "b": normal(3, 3, 4, 6), "head": normal(54, 3)},
        normal(2, 9, 9, 2),
    ),
}


@pytest.mark.parametrize("name", NETWORKS)
def test_flops_equal_xla_on_dots_and_valid_convolutions(name):
    fn, params, batch = NETWORKS[name]
    row = differences(fn, params, batch)
    assert row.flops == row.xla > 0
    assert (row.padding, row.repeats, row.elementwise) == (0, 0, 0)


@pytest.mark.parametrize(
    "options",
    [
        {"padding": "SAME"},
        {"padding": "SAME", "stride": 2},
        {"padding": ((2, 1), (0, 5)), "rhs_dilation": (2, 1)},
        {"padding": ((1, 1), (3, 0)), "lhs_dilation": (2, 3)},
        {"padding": ((-1, 2), (0, -2))},
        {"padding": "SAME", "feature_group_count": 2},
    ],
    ids=str,
)
def test_padding_taps_are_the_whole_difference(options):
    def fn(p, x):
        return convolve(x, p["k"], **options)

    row = differences(fn, CONV, normal(2, 9, 10, 4 * options.get("feature_group_count", 1)))
    one_channel = {k: v for k, v in options.items() if k != "feature_group_count"}
    inside = convolve(np.ones((1, 9, 10, 1)), np.ones((3, 2, 1, 1)), **one_channel)  # taps on the image, for each pixel
    assert row.flops - row.padding == 2 * 2 * 4 * 6 * int(inside.sum()) == row.xla
    assert row.padding == 2 * 2 * 4 * 6 * int((3 * 2 - inside).sum())
    assert row.padding > 0 or options["padding"][0] == (-1, 2)
    assert (row.repeats, row.elementwise) == (0, 0)


@pytest.mark.parametrize(("length", "unroll"), [(6, 1), (6, 2), (7, 3), (6, 4), (6, 6), (1, 1)])
def test_a_scan_differs_by_the_bodies_that_xla_does_not_see(length, unroll):
    def fn(p, x):
        return jax.lax.scan(lambda h, w: (h @ w, None), x, p["w"], unroll=unroll)[0]

    row = differences(fn, {"w": normal(length, 8, 8)}, normal(5, 8))
    body, seen = 2 * 5 * 8 * 8, {(6, 1): 1, (6, 2): 2, (7, 3): 4}.get((length, unroll), length)
    assert row.flops == length * body
    assert row.repeats == (length - seen) * body
    assert row.elementwise == (2 if seen < length else 0)  # the loop's counter: i < n and i + 1


def test_nested_scans_and_elementwise_work_add_up():
    def fn(p, x):
        def inner(h, w):
            return jax.lax.scan(lambda g, _: (convolve(g, w, "SAME"), None), h, None, length=3)[0], None

        return jax.nn.relu(jax.lax.scan(inner, x, p["k"])[0])

    row = differences(fn, {"k": normal(4, 3, 2, 2)}, normal(2, 5, 2))
    body, padding = 2 * 2 * 5 * 3 * 4, 2 * 2 * 2 * 4
    assert (row.flops, row.padding, row.repeats) == (12 * body, padding, 11 * body)
    assert 2 * 5 * 2 <= row.elementwise < 40  # relu and two counters
    assert "repeated bodies" in str(row)


def test_flops_of_products_that_are_no_operators_go_to_their_leaf():
    def fn(p, x):
        x = jax.lax.while_loop(lambda h: (h @ p["stop"]).sum() < 0, lambda h: h @ p["loop"], x)
        x, _ = jax.lax.while_loop(
            lambda c: c[0].sum() < 0, lambda c: (jax.jit(jnp.matmul)(*c), c[1]), (x, p["carried"])
        )
        x = jax.lax.cond(x.sum() > 0, lambda h: h @ p["wide"], lambda h: (h @ p["narrow"]) @ p["narrow"].T, x)
        x = x @ (p["a"] @ p["b"]) + x @ (p["w"] + jnp.tanh(p["w"]))
        return x @ x.T

    params = {n: normal(8, 8) for n in ("loop", "carried", "wide", "w")} | {"stop": normal(8, 3)}
    params |= {"narrow": normal(8, 2), "a": normal(8, 2), "b": normal(2, 8)}
    counted = flops(fn, params, normal(5, 8))
    one = 2 * 5 * 8 * 8
    assert counted == {
        "stop": 2 * 5 * 8 * 3,
        "loop": one,
        "carried": one,
        "wide": one,
        "b": 2 * 8 * 2 * 8 + one,
        "w": one,
        "": 2 * 5 * 8 * 5,
    }
    c = cost(trace(fn, params, normal(5, 8)))
    assert (c.rows, c.flops_unread) == ((), sum(counted.values()) - counted[""])


def test_a_carry_that_meets_the_batch_is_no_longer_its_leaf():
    def fn(p, x):  # the first step multiplies the leaf, the others what became of it
        return jax.lax.while_loop(lambda h: h.sum() < 0, lambda h: h @ h + x, p["start"])

    assert flops(fn, {"start": normal(8, 8)}, normal(8, 8)) == {"": 2 * 8**3}


def test_kernels_count_their_grid_and_shards_their_devices():
    from jax.experimental import pallas as pl

    def kernel(x, w, y):
        y[...] = x[...] @ w[...]

    def fn(p, x):
        blocks = [pl.BlockSpec((2, 8), lambda i: (i, 0)), pl.BlockSpec((8, 3), lambda i: (0, 0))]
        out = {"out_specs": pl.BlockSpec((2, 3), lambda i: (i, 0)), "out_shape": jax.ShapeDtypeStruct((8, 3), x.dtype)}
        return pl.pallas_call(kernel, grid=(4,), in_specs=blocks, interpret=True, **out)(x, p["w"])

    def shards(p, x):
        mesh = jax.sharding.AbstractMesh((4,), ("d",), axis_types=(AxisType.Auto,))
        split, whole = jax.P("d"), jax.P()
        return jax.shard_map(jnp.matmul, mesh=mesh, in_specs=(split, whole), out_specs=split)(x, p["w"])

    for network in (fn, shards):
        assert flops(network, {"w": normal(8, 3)}, normal(8, 8)) == {"w": 2 * 8 * 8 * 3}


def test_a_linear_solve_counts_what_runs():
    def fn(p, x):
        return jnp.linalg.solve(p["a"], x) @ p["w"]

    assert flops(fn, {"a": normal(8, 8), "w": normal(8, 3)}, normal(8, 8)) == {"w": 2 * 8 * 8 * 3}


def test_a_whole_scan_counts_its_length():
    def fn(p, x):  # longer than what is unrolled
        return jax.lax.scan(lambda h, _: (h @ p["w"], None), x, None, length=5000)[0]

    assert flops(fn, {"w": normal(2, 2)}, normal(1, 2)) == {"w": 5000 * 8}


def test_a_fused_operator_and_a_stack_are_charged_by_weights():
    def fn(p, x):
        fused = x @ jnp.concatenate([p["q"], p["k"]], axis=1)
        return jnp.einsum("bd,df->bf", fused, p["stack"][1]) @ p["stack"][0]

    c = cost(trace(fn, {"q": normal(8, 2), "k": normal(8, 6), "stack": normal(2, 8, 8)}, normal(5, 8)))
    assert c.by_leaf == {"q": 2 * 5 * 16, "k": 2 * 5 * 48, "stack": 2 * 2 * 5 * 64}
    assert [r.parameters for r in c.rows] == [64, 64, 64]


def test_a_ragged_dot_counts_each_row_once():
    sizes = np.array([2, 0, 3])

    def fn(p, x):
        return jax.lax.ragged_dot(x, p["w"], jnp.asarray(sizes))

    w = normal(3, 4, 6)
    c = cost(trace(fn, {"w": w}, normal(5, 4)), {"w": np.arange(72).reshape(w.shape) >= 24})
    assert (c.flops, c.alive_flops) == (2 * 5 * 4 * 6, 2 * 5 * 4 * 6 * 2 // 3)
    assert (c.rows[0].alive_in, c.rows[0].alive_out) == (8, 12)


def test_activation_memory_of_a_chain_by_hand():
    def fn(p, x):
        return jax.nn.relu(x @ p["a"]).T @ p["b"]

    c = cost(trace(fn, {"a": normal(8, 16), "b": normal(5, 4)}, normal(5, 8)))
    x, hidden, out = 5 * 8, 5 * 16, 16 * 4
    # (x, xa), (xa, relu), (relu, its transpose), (transpose, out)
    assert c.activation_bytes == 8 * max(x + hidden, 2 * hidden, hidden + out) == 8 * 160
    assert c.largest_activation == 8 * hidden


def test_activation_memory_of_a_residual_block_by_hand():
    def fn(p, x):
        return x["image"] + (x["image"] @ p["a"]) @ p["b"]

    batch = {"image": normal(5, 8), "unused": normal(100)}
    params = {"a": normal(8, 16), "b": normal(16, 8)}
    c = cost(trace(fn, params, batch))
    # image, xa, xab: the image lives on; before anything runs, the batch with what is never read
    assert c.activation_bytes == 8 * max(5 * 8 + 5 * 16 + 5 * 8, 5 * 8 + 100) == 8 * 160
    assert cost(trace(fn, params, {**batch, "unused": normal(200)})).activation_bytes == 8 * 240

    def kept(p, x):
        return [fn(p, x), x["image"] @ p["a"]]

    assert cost(trace(kept, params, {"image": normal(5, 8)})).activation_bytes == 8 * (3 * 40 + 80)

    def dropped(p, x):
        _ = jnp.sin(x["image"])  # nothing reads it: it is live while it is made
        return fn(p, x)

    assert cost(trace(dropped, params, {"image": normal(5, 8)})).activation_bytes == 8 * 160


@pytest.mark.parametrize("name", [n for n in NETWORKS if n not in ("two leaves", "batch groups")])
def test_full_masks_cost_the_dense_network_and_zeros_take_their_share(name):
    fn, params, batch = NETWORKS[name]
    graph = trace(fn, params, batch)
    dense = cost(graph)
    assert cost(graph, jax.tree.map(lambda w: w == w, params)) == dense
    assert dense.alive_flops == dense.flops == sum(dense.by_leaf.values())
    assert [(r.alive_in, r.alive_out) for r in dense.rows] == [
        (r.problems * r.n_in, r.problems * r.n_out) for r in dense.rows
    ]
    path = max(params, key=lambda p: params[p].size)
    mask = RNG.random(params[path].shape) < 0.3
    pruned = cost(graph, {path: mask})
    cut, size = int((~mask).sum()), mask.size
    assert pruned.flops == dense.flops
    assert dense.flops - pruned.alive_flops == dense.by_leaf[path] * cut // size
    assert pruned.alive_parameters == dense.parameters - cut
    assert pruned.alive_bytes == dense.bytes - params[path].itemsize * cut
    empty = cost(graph, {p: np.zeros(w.shape, bool) for p, w in params.items()})
    assert (empty.alive_parameters, empty.alive_bytes) == (0, 0)
    assert empty.alive_flops == dense.flops_activations


def test_dead_inputs_and_outputs_are_counted_in_the_canonical_matrix():
    mask = np.ones((6, 2, 3), bool)  # torch's (out, in, taps), a convolution of two groups
    mask[:2] = False  # two outputs of group 0
    mask[:3, 1, 0] = False  # an input of group 0
    mask[3:, :, 2] = False  # both inputs of a tap in group 1
    numbers = ("NCH", "OIH", "NCH")

    def fn(p, x):
        return jax.lax.conv_general_dilated(x, p["k"], (1,), "VALID", dimension_numbers=numbers, feature_group_count=2)

    row = cost(trace(fn, {"k": normal(6, 2, 3)}, normal(2, 4, 7)), {"k": mask}).rows[0]
    assert (row.problems, row.n_in, row.n_out) == (2, 6, 3)
    assert (row.alive_in, row.alive_out) == (5 + 4, 1 + 3)
    assert row.alive_weights == mask.sum()


def test_tied_weights_are_counted_once_and_multiplied_twice():
    def fn(p, x):
        return (x @ p["w"] + p["b"][None]) @ p["w"]

    params = {"w": normal(8, 8), "b": normal(8), "steps": np.array([3, 4]), "key": jax.random.key(0)}
    c = cost(trace(fn, params, normal(5, 8)), {"w": np.eye(8, dtype=bool), "b": np.zeros(8, bool), "steps": None})
    assert (c.parameters, c.alive_parameters) == (72, 8)
    assert c.bytes - c.alive_bytes == 8 * 64
    assert (c.flops, c.alive_flops) == (2 * 2 * 5 * 64, 2 * 2 * 5 * 8)
    numbers = (c.parameters, c.alive_parameters, c.bytes, c.alive_bytes, c.flops, c.alive_flops, c.activation_bytes)
    assert all(type(n) is int for n in (*numbers, c.largest_activation, c.rows[0].alive_weights, *c.by_leaf.values()))


def test_the_table_says_what_is_alive():
    fn, params, batch = NETWORKS["attention"]
    text = str(cost(trace(fn, params, batch), {"q": params["q"] > 0}))
    for words in ("operator", "alive in", "8 x 8", "between activations", "if zeros were skipped", "at the peak"):
        assert words in text
    assert len(text.splitlines()) == 1 + 4 + 4


def test_masks_that_fit_no_leaf_are_refused():
    fn, params, batch = NETWORKS["mlp"]
    graph = trace(fn, params, batch)
    with pytest.raises(ValueError, match="'c' is no leaf"):
        cost(graph, {"c": np.ones((8, 16), bool)})
    with pytest.raises(ValueError, match=r"'a' has shape \(16, 8\)"):
        cost(graph, {"a": np.ones((16, 8), bool)})
    with pytest.raises(TypeError, match="'a' is float64; pass booleans"):
        cost(graph, params)
    with pytest.raises(TypeError, match="pass what structure"):
        cost(fn, params)


@pytest.mark.default_flags
@pytest.mark.slow
def test_resnet20_costs_what_its_layers_say(folder):
    from paper_reproductions.networks import resnet20

    params = resnet20.load_akamaster(folder)
    images = jnp.zeros((2, 32, 32, 3))
    graph = trace(resnet20.forward, params, images)
    c = cost(graph)

    def conv(pixels, n_in, n_out, times):
        return 2 * 2 * pixels**2 * 9 * n_in * n_out * times

    by_hand = conv(32, 3, 16, 1) + conv(32, 16, 16, 6) + conv(16, 16, 32, 1) + conv(16, 32, 32, 5)
    by_hand += conv(8, 32, 64, 1) + conv(8, 64, 64, 5) + 2 * 2 * 64 * 10
    assert c.flops == by_hand  # 40.8 million multiply-adds an image
    assert len(c.rows) == 20
    assert sum(r.parameters for r in c.rows) == 268_336
    largest = 4 * 2 * 32 * 32 * 16
    assert c.largest_activation == largest
    assert c.activation_bytes == 3 * largest  # a block's input, and what an equation reads and makes
    kernels = {r.name: np.arange(r.parameters).reshape(leaf_shape(graph, r.name)) % 2 == 0 for r in c.rows}
    pruned = cost(graph, kernels)
    assert pruned.alive_flops == sum(r.flops * r.alive_weights // r.parameters for r in pruned.rows)
    row = differences(resnet20.forward, params, images)
    assert row.repeats == 0
    assert 0 < row.elementwise < 0.05 * row.flops
    assert 0 < row.padding < 0.15 * row.flops


def leaf_shape(graph, path):
    return graph.program.shapes[graph.program.leaves[path]].shape
