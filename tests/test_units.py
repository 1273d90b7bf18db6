"""Which axes must be cut together: groups written by hand, and zeroing a unit against deleting it."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from paper_reproductions.networks.small.attention import cached
from pruneopt.program.flatten import flatten
from pruneopt.structure import graph
from pruneopt.structure.units import Units

HEAD = 4


def arrays(**shapes):
    random = np.random.default_rng(0)
    return {name: jnp.asarray(random.normal(size=shape)) for name, shape in shapes.items()}


def read(fn, params, batch):
    return graph.trace(fn, params, batch).units()


def free(found):
    """The members of the groups that are not blocked."""
    return {group.members for group in found.groups if not group.blocked}


def blocked(found, path, axis):
    """The reasons of an axis that is one group."""
    (group,) = found.of(path, axis)
    return "; ".join(group.blocked)


def mlp(p, x):
    h = jnp.tanh(x @ p["w1"] + p["b1"][None])
    return h @ p["w2"] + p["b2"][None]


def residual(p, x):
    h = x @ p["embed"]
    for i in "12":
        h = h + jax.nn.sigmoid(h @ p[f"up{i}"] + p[f"bias{i}"][None]) @ p[f"down{i}"]
    return h @ p["head"]


def conv_net(p, x):
    """3x3 convolution, batch norm, pooling, 3x3 convolution, flatten, dense."""
    spec = {"window_strides": (1, 1), "padding": "SAME", "dimension_numbers": ("NHWC", "HWIO", "NHWC")}
    y = jax.lax.conv_general_dilated(x, p["conv1"], **spec)
    scale = p["scale"] / jnp.sqrt(p["var"] + 1e-5)
    y = jax.nn.relu((y - p["mean"][None, None, None]) * scale[None, None, None] + p["bias"][None, None, None])
    y = jax.lax.reduce_window(y, -jnp.inf, jax.lax.max, (1, 2, 2, 1), (1, 2, 2, 1), "VALID")
    y = jax.nn.relu(jax.lax.conv_general_dilated(y, p["conv2"], **spec))
    return y.reshape(y.shape[0], -1) @ p["dense"]


def depthwise(p, x):
    spec = {"window_strides": (1, 1), "padding": "SAME", "dimension_numbers": ("NHWC", "HWIO", "NHWC")}
    y = jax.lax.conv_general_dilated(x, p["point"], **spec)
    y = jax.lax.conv_general_dilated(y, p["depth"], **spec, feature_group_count=y.shape[-1])
    return jnp.tanh(y).mean((1, 2)) @ p["dense"]


def attention(p, x):
    h = x @ p["embed"]
    q, k, v = ((h @ p[name]).reshape(*x.shape[:2], -1, HEAD) for name in "qkv")
    scores = jnp.einsum("bthd,bshd->bhts", q, k) / HEAD**0.5
    masked = jnp.where(jnp.tri(x.shape[1], dtype=bool)[None, None], scores, -jnp.inf)
    mixed = jnp.einsum("bhts,bshd->bthd", jax.nn.softmax(masked), v)
    return (h + mixed.reshape(*x.shape[:2], -1) @ p["o"]) @ p["head"]


def fused(p, x):
    """Gate and value in one matrix, cut apart by slices."""
    both = x @ p["both"]
    n = both.shape[-1] // 2
    return (jax.nn.silu(both[:, :n]) * both[:, n:]) @ p["out"]


def scanned(p, x):
    def step(h, layer):
        return h + jnp.tanh(h @ layer["up"]) @ layer["down"], None

    h, _ = jax.lax.scan(step, x @ p["embed"], {"up": p["up"], "down": p["down"]})
    return h @ p["head"]


MLP = {"w1": (5, 8), "b1": (8,), "w2": (8, 3), "b2": (3,)}
RESIDUAL = {"embed": (5, 6), "up1": (6, 8), "bias1": (8,), "down1": (8, 6)} | {
    "up2": (6, 7),
    "bias2": (7,),
    "down2": (7, 6),
    "head": (6, 3),
}
CONV = {"conv1": (3, 3, 2, 4), "scale": (4,), "var": (4,), "mean": (4,), "bias": (4,), "conv2": (3, 3, 4, 5)} | {
    "dense": (45, 3)
}
DEPTHWISE = {"point": (1, 1, 2, 4), "depth": (3, 3, 1, 8), "dense": (8, 3)}
ATTENTION = {"embed": (5, 6), "q": (6, 12), "k": (6, 12), "v": (6, 12), "o": (12, 6), "head": (6, 3)}
SCANNED = {"embed": (5, 6), "up": (3, 6, 8), "down": (3, 8, 6), "head": (6, 3)}
FLAT, IMAGES, TOKENS = (4, 5), (2, 6, 6, 2), (2, 3, 5)
NETWORKS = {
    "mlp": (mlp, MLP, FLAT),
    "residual": (residual, RESIDUAL, FLAT),
    "conv": (conv_net, CONV, IMAGES),
    "depthwise": (depthwise, DEPTHWISE, IMAGES),
    "attention": (attention, ATTENTION, TOKENS),
    "fused": (fused, {"both": (5, 8), "out": (4, 3)}, FLAT),
    "scanned": (scanned, SCANNED, FLAT),
}


def case(name):
    fn, shapes, batch = NETWORKS[name]
    params = arrays(**shapes)
    if "var" in params:
        params["var"] = jnp.abs(params["var"])
    return fn, params, arrays(x=batch)["x"]


EXPECTED = {
    "mlp": {(("b1", 0), ("w1", 1), ("w2", 0))},
    "residual": {
        (("bias1", 0), ("down1", 0), ("up1", 1)),
        (("bias2", 0), ("down2", 0), ("up2", 1)),
        (("down1", 1), ("down2", 1), ("embed", 1), ("head", 0), ("up1", 0), ("up2", 0)),
    },
    "conv": {
        (("bias", 0), ("conv1", 3), ("conv2", 2), ("mean", 0), ("scale", 0), ("var", 0)),
        (("conv2", 3), ("dense", 0)),
    },
    "depthwise": {(("dense", 0), ("depth", 3), ("point", 3)), (("dense", 0), ("depth", 3))},
    "attention": {
        (("embed", 1), ("head", 0), ("k", 0), ("o", 1), ("q", 0), ("v", 0)),
        (("k", 1), ("o", 0), ("q", 1), ("v", 1)),  # heads
        (("o", 0), ("v", 1)),  # the width of values
        (("k", 1), ("q", 1)),  # the width of queries
    },
    "fused": {(("both", 1), ("out", 0))},
    "scanned": {(("down", 1), ("up", 2)), (("down", 2), ("embed", 1), ("head", 0), ("up", 1))},
}


@pytest.mark.parametrize("name", NETWORKS)
class TestNetwork:
    def test_free_groups_are_those_written_by_hand(self, name):
        assert free(read(*case(name))) == EXPECTED[name]

    @pytest.mark.slow
    def test_zeroing_a_unit_is_deleting_it(self, name):
        fn, params, batch = case(name)
        found = read(fn, params, batch)
        widths = ((("o", 0), ("v", 1)), (("k", 1), ("q", 1)))  # attention's reshapes have that number, as HEAD
        for group in found.groups:
            if group.blocked or group.members in widths:
                continue
            zeroed, smaller = dict(params), dict(params)
            for path, axis in group.members:
                at = found.places(group, path, axis)[1]
                index = (slice(None),) * axis + (at,)
                zeroed[path] = zeroed[path].at[index].set(0.0)
                smaller[path] = jnp.delete(smaller[path], at, axis=axis)
            np.testing.assert_allclose(fn(smaller, batch), fn(zeroed, batch), rtol=1e-12, atol=1e-12)
            assert np.any(np.asarray(fn(params, batch)) != np.asarray(fn(zeroed, batch)))

    def test_every_axis_is_explained(self, name):
        fn, params, batch = case(name)
        read_graph = graph.trace(fn, params, batch)
        for path, leaf in params.items():
            text = read_graph.explain(path)
            assert text.startswith(f"{path}: ")
            assert all(f"axis {k} (" in text for k in range(leaf.ndim))
            assert ("units can be cut" in text) or "blocked: " in text


class TestBlocked:
    def test_batch_outputs_and_windows(self):
        found = read(*case("conv"))
        assert blocked(found, "conv1", 2) == "it is an axis of the batch"
        assert blocked(found, "conv1", 0) == "it is the window of a convolution"
        assert blocked(found, "dense", 1) == "it is an output of fn"
        height, width, channel = found.of("dense", 0)
        assert (height.size, width.size, channel.size) == (3, 3, 5)
        assert "a window slides over it in conv_general_dilated" in height.blocked
        assert width.blocked
        assert not channel.blocked
        np.testing.assert_array_equal(found.places(channel, "dense", 0)[2], np.arange(9) * 5 + 2)

    def test_heads_own_columns_and_so_does_the_width_of_queries(self):
        found = read(*case("attention"))
        heads, width = found.of("q", 1)
        assert (heads.size, width.size) == (3, 4)
        assert not heads.blocked
        assert not width.blocked
        np.testing.assert_array_equal(found.places(heads, "o", 0)[2], [8, 9, 10, 11])

    @pytest.mark.parametrize("norm", ["fast", "rms", "two passes"])
    def test_sums_over_what_is_known_block_nothing(self, norm):
        def fn(p, x):
            h = x @ p["w1"]
            mean = 0.0 if norm == "rms" else h.mean(-1, keepdims=True)
            var = h.var(-1, keepdims=True) if norm == "two passes" else (h**2).mean(-1, keepdims=True) - mean**2
            h = (h - mean) * jax.lax.rsqrt(var + 1e-5) * p["scale"][None]
            return jax.nn.gelu(h @ p["w2"]) @ p["w3"]

        found = read(fn, arrays(w1=(5, 6), scale=(6,), w2=(6, 8), w3=(8, 3)), arrays(x=FLAT)["x"])
        assert free(found) == {(("w2", 1), ("w3", 0)), (("scale", 0), ("w1", 1), ("w2", 0))}

    def test_positions_beyond_the_batch_are_unknown(self):
        def fn(p, x):
            return jnp.tanh(x @ p["w1"] + p["position"][: x.shape[1]][None]) @ p["w2"]

        found = read(fn, arrays(w1=(5, 6), position=(8, 6), w2=(6, 3)), arrays(x=TOKENS)["x"])
        reached, beyond = found.of("position", 0)
        assert (reached.size, beyond.size) == (3, 5)
        assert "it is an axis of the batch" in reached.blocked
        assert beyond.blocked == ("this batch does not reach it, a longer one may",)
        assert free(found) == {(("position", 1), ("w1", 1), ("w2", 0))}

    def test_a_softmax_and_an_argmax_block_their_axis(self):
        def fn(p, x):
            h = x @ p["w1"]
            return jax.nn.softmax(h) @ p["w2"], jnp.argmax(x @ p["w3"], -1), jnp.sort(x @ p["w4"])[:, 0]

        found = read(fn, arrays(w1=(5, 6), w2=(6, 3), w3=(5, 7), w4=(5, 8)), arrays(x=FLAT)["x"])
        assert "reduced by max" in blocked(found, "w1", 1)
        assert "argmax" in blocked(found, "w3", 1)
        assert "sorted by sort" in blocked(found, "w4", 1)

    def test_a_tied_embedding(self):
        def fn(p, tokens):
            h = p["table"][tokens]
            return (h + jnp.tanh(h @ p["up"]) @ p["down"]) @ p["table"].T

        params = arrays(table=(11, 6), up=(6, 8), down=(8, 6))
        read_graph = graph.trace(fn, params, jnp.array([[1, 2, 3]]))
        found = read_graph.units()
        rows = blocked(found, "table", 0)
        assert "picked by an index" in rows
        assert "output of fn" in rows
        assert free(found) == {(("down", 0), ("up", 1)), (("down", 1), ("table", 1), ("up", 0))}
        text = read_graph.explain("table")
        assert "looked up: 3 of 11 rows" in text
        assert "axis 0 (row and out, 11)" in text
        assert "tied to up axis 0: contracted in dot_general" in text

    def test_stacked_layers_and_shared_masks(self):
        found = read(*case("scanned"))
        assert "it stacks layers" in blocked(found, "up", 0)

        def fn(p, x):
            for i in "12":
                x = x + jnp.where(jnp.ones((4, 8), bool), x @ p[f"up{i}"], 0.0) @ p[f"down{i}"]
            return x

        found = read(fn, arrays(up1=(5, 8), down1=(8, 5), up2=(5, 8), down2=(8, 5)), arrays(x=FLAT)["x"])
        assert free(found) == {(("down1", 0), ("up1", 1)), (("down2", 0), ("up2", 1))}

    @pytest.mark.parametrize("name", ["qr", "fft"])
    def test_an_unknown_primitive_is_named_with_its_leaves(self, name):
        def fn(p, x):
            h = x @ p["w1"]
            h = jnp.linalg.qr(h)[0] if name == "qr" else jnp.fft.fft(h).real
            return h @ p["w2"], x @ p["w3"]

        shapes = {"w1": (5, 4), "w2": (4, 3), "w3": (5, 3)}
        found = read(fn, arrays(**shapes), arrays(x=FLAT)["x"])
        assert all(set(refusal.paths) <= {"w1", "w2"} for refusal in found.refusals)
        assert {path for refusal in found.refusals for path in refusal.paths} == {"w1", "w2"}
        assert any(name in refusal.primitive for refusal in found.refusals)
        assert "has no rule" in blocked(found, "w1", 1)
        assert "has no rule" in blocked(found, "w2", 0)

    def test_a_loop_left_whole_is_named(self):
        def fn(p, x):
            h = jax.lax.while_loop(lambda h: jnp.sum(h) < 0, lambda h: h + 1.0, x @ p["w1"])
            return h @ p["w2"]

        found = read(fn, arrays(w1=(5, 4), w2=(4, 3)), arrays(x=FLAT)["x"])
        assert [r.primitive for r in found.refusals] == ["while"]
        assert "while" in blocked(found, "w1", 1)

    def test_zeros_that_are_no_deletion(self):
        spec = {"window_strides": (1, 1), "padding": "SAME", "dimension_numbers": ("NHWC", "HWIO", "NHWC")}

        def fn(p, x):
            image = x[:, None, None] @ p["w1"]
            gated = jax.lax.conv_general_dilated(jax.nn.sigmoid(image), jnp.exp(p["w2"]), **spec)
            normed = x @ (p["v"] / jnp.sqrt(jnp.sum(p["v"] ** 2, 0, keepdims=True))) @ p["w4"]
            h = (x @ p["heads"]).reshape(4, 2, 3) * p["width"][None, None]
            return gated, normed, h.reshape(4, 6).var(-1)

        shapes = {"w1": (5, 4), "w2": (1, 1, 4, 3), "v": (5, 8), "w4": (8, 2), "heads": (5, 6), "width": (3,)}
        found = read(fn, arrays(**shapes), arrays(x=FLAT)["x"])
        assert "zeroing it in its leaves is no deletion" in blocked(found, "w1", 1)
        assert "div of a unit at zero" in blocked(found, "v", 1)
        assert "deleting it is right all the same" in blocked(found, "v", 1)
        for group in found.of("heads", 1):
            assert "is not known apart" in group.blocked[0]
        assert free(found) == set()

    def test_sums_at_an_index_are_zero_where_what_is_summed_is(self):
        def fn(p, x):
            h = jnp.tanh(x @ p["w1"])
            h = jax.ops.segment_sum(h, jnp.array([0, 1, 1, 0]), 2)
            return h * jax.lax.rsqrt((h * h).mean(-1, keepdims=True) + 1e-5) @ p["w2"]

        assert free(read(fn, arrays(w1=(5, 6), w2=(6, 3)), arrays(x=FLAT)["x"])) == {(("w1", 1), ("w2", 0))}

    def test_parts_that_do_not_line_up(self):
        def fn(p, x):
            h = x @ p["w1"]
            return (h.reshape(-1, 2, 3) + jnp.swapaxes(h.reshape(-1, 3, 2), 1, 2)).reshape(-1, 6) @ p["w2"]

        found = read(fn, arrays(w1=(5, 6), w2=(6, 3)), arrays(x=FLAT)["x"])
        assert all("do not line up" in "; ".join(group.blocked) for group in found.of("w1", 1))

    def test_a_leaf_that_is_not_used(self):
        def fn(p, x):
            return x @ p["w"]

        read_graph = graph.trace(fn, arrays(w=(5, 3), other=(2,)), arrays(x=FLAT)["x"])
        assert blocked(read_graph.units(), "other", 0) == "fn does not use it"
        assert "no operator reads it: fn does not use it" in read_graph.explain("other")


class TestConcatenated:
    def test_queries_keys_and_values_in_one_matrix(self):
        def fn(p, x):
            h = x @ jnp.concatenate([p["q"], p["k"], p["v"]], 1)
            q, k, v = jnp.split(h, 3, axis=-1)
            return (q * jnp.tanh(k) * v) @ p["o"]

        found = read(fn, arrays(q=(5, 4), k=(5, 4), v=(5, 4), o=(4, 3)), arrays(x=FLAT)["x"])
        assert free(found) == {(("k", 1), ("o", 0), ("q", 1), ("v", 1))}
        (inputs,) = found.of("q", 0)
        assert inputs.members == (("k", 0), ("q", 0), ("v", 0))

    def test_inputs_joined_are_parts_of_the_next_axis(self):
        def fn(p, x):
            return jnp.concatenate([x @ p["a"], jnp.tanh(x @ p["b"])], -1) @ p["o"]

        found = read(fn, arrays(a=(5, 4), b=(5, 2), o=(6, 3)), arrays(x=FLAT)["x"])
        left, right = found.of("o", 0)
        assert (left.members, right.members) == ((("a", 1), ("o", 0)), (("b", 1), ("o", 0)))
        np.testing.assert_array_equal(found.places(right, "o", 0), [[4], [5]])


class TestState:
    """What fn carries from call to call in the batch is cut along, and so is what it becomes."""

    @pytest.mark.slow
    def test_keys_and_values_of_a_step_of_decoding(self):
        fn, params, batch = cached()
        with jax.numpy_rank_promotion("allow"), jax.numpy_dtype_promotion("standard"):
            program = flatten(fn, params, batch)
            assert len(free(Units(program))) == 2  # the stream and the feed-forward
            held = jax.tree.leaves(batch)
            found = Units(program, {0: 1, 1: 2})
            heads, width = found.of("v", 1)
            assert free(found) - free(Units(program)) == {
                (("k", 1), ("o", 0), ("q", 1), ("v", 1)),
                (("o", 0), ("v", 1)),
                (("k", 1), ("q", 1)),
            }
            for group, at in ((heads, 1), (width, 2)):
                lost = {path: [np.zeros(n, bool) for n in leaf.shape] for path, leaf in params.items()}
                zeroed, smaller = dict(params), dict(params)
                for path, axis in group.members:
                    index = (slice(None),) * axis + (found.places(group, path, axis)[at],)
                    lost[path][axis][found.places(group, path, axis)[at]] = True
                    zeroed[path] = zeroed[path].at[index].set(0.0)
                    smaller[path] = jnp.delete(smaller[path], found.places(group, path, axis)[at], axis=axis)
                gone = found.gone(lost)
                cut = found.carried(gone, held)
                k = 2 if group is heads else 3
                names = ("keys", "values") if group is heads else ("values",)
                at_unit, old = (slice(None),) * k + (at,), dict(batch["cache"])
                old |= {name: old[name].at[at_unit].set(0.0) for name in names}
                want, new = fn(zeroed, {**batch, "cache": old})
                results = found.rewritten(gone)(smaller, cut)
                np.testing.assert_allclose(results[0], want, rtol=1e-12, atol=1e-12)
                for name, result, whole in zip(("keys", "values"), results[1:], new.values(), strict=True):
                    left = jnp.delete(whole, at, axis=k) if name in names else whole
                    np.testing.assert_allclose(result, left, rtol=1e-12, atol=1e-12)

    def test_a_hidden_state(self):
        def fn(p, x, bias=0.0):
            h = jnp.tanh(x["h"] @ p["w"] + x["x"] @ p["u"] + bias)
            return h @ p["o"], h

        params, batch = arrays(w=(5, 5), o=(5, 3), u=(4, 5)), arrays(h=(2, 5), x=(2, 4))
        assert not any(("o", 0) in members for members in free(Units(flatten(fn, params, batch))))
        assert free(Units(flatten(fn, params, batch), {0: 1})) == {(("o", 0), ("u", 1), ("w", 0), ("w", 1))}
        moved = Units(flatten(lambda p, x: fn(p, x, 1.0), params, batch), {0: 1})
        assert "carried to the next call is not zero there" in blocked(moved, "o", 0)


class TestAsked:
    def test_explanation_of_a_layer(self):
        text = graph.trace(*case("mlp")).explain("w1")
        assert text.splitlines() == [
            "w1: 5 x 8, float64",
            "  read by 'w1': dot 5 x 8, 1 use",
            "  axis 0 (in, 5)",
            "    blocked: it is an axis of the batch",
            "  axis 1 (out, 8)",
            "    tied to b1 axis 0: added in add",
            "    tied to w2 axis 0: contracted in dot_general",
            "    units can be cut",
        ]

    def test_unknown_paths_and_axes_are_refused(self):
        read_graph = graph.trace(*case("mlp"))
        found = read_graph.units()
        with pytest.raises(ValueError, match=r"params has no array 'w11'; there are \['w1'"):
            read_graph.explain("w11")
        with pytest.raises(ValueError, match=r"params has no array 'w11'; there are \['w1'"):
            found.of("w11", 0)
        with pytest.raises(ValueError, match="has 2 axes, so axis=2 is none"):
            found.of("w1", 2)
        (group,) = found.of("w1", 1)
        with pytest.raises(ValueError, match="no member of that group"):
            found.places(group, "w1", 0)
