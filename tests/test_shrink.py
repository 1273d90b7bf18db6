"""Smaller programs against the masked network, and against the same network written by hand at the smaller sizes."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import pruneopt as po
from paper_reproductions.networks import resnet20
from tests.test_units import EXPECTED, FLAT, MLP, NETWORKS, arrays, case, mlp


def halved(found, group, path, axis):
    """Booleans of the entries to keep where every second unit goes."""
    kept = np.ones(found.type_of(path).shape[axis], bool)
    kept[found.places(group, path, axis)[1::2].ravel()] = False
    return kept


def deleted(tree, found, groups):
    """Zeros in every second unit's entries of these groups."""
    tree = dict(tree)
    for group in groups:
        for path, axis in group.members:
            index = (slice(None),) * axis + (found.places(group, path, axis)[1::2].ravel(),)
            tree[path] = jnp.asarray(tree[path]).at[index].set(0.0)
    return tree


def conv(x, kernel, groups=1):
    spec = ("NHWC", "HWIO", "NHWC")
    return jax.lax.conv_general_dilated(x, kernel, (1, 1), "SAME", dimension_numbers=spec, feature_group_count=groups)


def alibi(p, x):
    """Slopes of the heads as numbers that fn closed over."""
    slopes, t = jnp.asarray(2.0 ** -np.arange(1, 4)), jnp.arange(x.shape[1], dtype=x.dtype)
    q, k, v = ((x @ p[n]).reshape(*x.shape[:2], 3, -1) for n in "qkv")
    bias = slopes[:, None, None] * (t[None] - t[:, None])[None]
    scores = jnp.einsum("bthd,bshd->bhts", q, k) + bias[None]
    return jnp.einsum("bhts,bshd->bthd", jax.nn.softmax(scores), v).reshape(*x.shape[:2], -1) @ p["o"]


def sinusoidal(p, x):
    positions = jnp.asarray(np.random.default_rng(3).normal(size=(3, 6)))
    return jax.nn.relu((x @ p["e"] + positions[None]) @ p["w"]) @ p["o"]


def grouped(p, x):
    return conv(jnp.tanh(conv(jnp.tanh(conv(x, p["a"])), p["g"], 4)), p["b"])


def normed(fast):
    def fn(p, x):
        h = x @ p["e"]
        for i in "12":
            mean = h.mean(-1, keepdims=True) if fast else jnp.zeros((), h.dtype)
            n = (h - mean) * jax.lax.rsqrt((h * h).mean(-1, keepdims=True) - mean**2 + 1e-5) * p[f"g{i}"][None]
            h = h + jnp.tanh(n @ p[f"u{i}"]) @ p[f"d{i}"]
        return h @ p["o"]

    return fn


def density(p, x):
    h = x @ p["a"]
    return (jax.nn.sigmoid(h[:, :1]) * jnp.tanh(h[:, 1:])) @ p["b"]


def ensemble(p, x):
    return jax.vmap(lambda p, x: conv(jnp.tanh(conv(x, p["a"])), p["b"]), (0, None))(p, x)


def selective(p, x):
    """h = a h + b, y = h . c, over time: the channels and the states of Mamba."""
    a, b, c = jax.nn.sigmoid(x @ p["wa"]), x @ p["wb"], x @ p["wc"]

    def step(h, abc):
        h = abc[0][:, None] * h + abc[1][:, None] * abc[2][None]
        return h, h @ abc[2]

    return jax.lax.scan(step, jnp.zeros((8, 4), x.dtype), (a, b, c))[1] @ p["out"]


def pairs(p, x):
    h = x @ p["a"]
    return (h[:, ::2] * jnp.tanh(h[:, 1::2])) @ p["b"]


def split(p, x):
    h = x @ p["a"]
    gate, nothing, value = jnp.split(h, [4, 4], axis=-1)
    return jnp.concatenate([jnp.tanh(gate) * value, nothing], -1) @ p["b"]


def messages(p, x):
    """A graph network: sums over the neighbours."""
    h = jnp.tanh(x @ p["a"])
    return jnp.zeros_like(h).at[jnp.array([1, 2, 3, 0, 0])].add(h[jnp.array([0, 1, 2, 3, 1])]) @ p["b"]


NORM = {"e": (5, 6), "g1": (6,), "u1": (6, 8), "d1": (8, 6), "g2": (6,), "u2": (6, 7), "d2": (7, 6), "o": (6, 3)}
OTHERS = {
    "alibi": (alibi, {"q": (5, 12), "k": (5, 12), "v": (5, 12), "o": (12, 4)}, (2, 3, 5), 3),
    "sinusoidal": (sinusoidal, {"e": (5, 6), "w": (6, 8), "o": (8, 2)}, (2, 3, 5), 2),
    "grouped": (grouped, {"a": (1, 1, 3, 8), "g": (3, 3, 2, 12), "b": (1, 1, 12, 5)}, (2, 6, 6, 3), 3),
    "fast norm": (normed(True), NORM, FLAT, 3),
    "RMS norm": (normed(False), NORM, FLAT, 3),
    "one entry": (density, {"a": (5, 9), "b": (8, 3)}, FLAT, 1),
    "ensemble": (ensemble, {"a": (3, 3, 3, 2, 4), "b": (3, 3, 3, 4, 5)}, (1, 6, 6, 2), 1),
    "selective scan": (selective, {"wa": (5, 8), "wb": (5, 8), "wc": (5, 4), "out": (8, 2)}, (6, 5), 2),
    "strided": (pairs, {"a": (5, 12), "b": (6, 3)}, FLAT, 1),
    "an empty part": (split, {"a": (5, 8), "b": (4, 3)}, FLAT, 1),
    "scatter-add": (messages, {"a": (5, 6), "b": (6, 3)}, FLAT, 1),
}


@pytest.mark.parametrize("name", OTHERS)
@pytest.mark.cases(1)
def test_more_kinds_of_units_are_free_and_cut_exactly(name):
    fn, shapes, batch, count = OTHERS[name]
    params, batch = arrays(**shapes), arrays(x=batch)["x"]
    found = po.structure.trace(fn, params, batch).units()
    free = [group for group in found.groups if not group.blocked and group.size > 1]
    assert len(free) == count
    for group in free:
        path, axis = group.members[0]
        small = po.shrink_units(fn, params, batch, {(path, axis): halved(found, group, path, axis)})
        zeroed = deleted(params, found, [group])
        assert small.error < 1e-12
        assert sum(leaf.size for leaf in jax.tree.leaves(small.params)) < sum(v.size for v in params.values())
        np.testing.assert_allclose(small.fn(small.params, batch), fn(zeroed, batch), rtol=1e-12, atol=1e-12)


DEAR = {"attention", "conv", "residual", "scanned"}


@pytest.mark.parametrize("name", [pytest.param(n, marks=[pytest.mark.slow] * (n in DEAR)) for n in NETWORKS])
class TestUnits:
    def test_every_free_group_is_cut_exactly(self, name):
        fn, params, batch = case(name)
        found = po.structure.trace(fn, params, batch).units()
        free = [group for group in found.groups if not group.blocked and group.size > 1]
        assert {group.members for group in free} == EXPECTED[name]
        for group in free:
            path, axis = group.members[0]
            small = po.shrink_units(fn, params, batch, {(path, axis): halved(found, group, path, axis)})
            zeroed = deleted(params, found, [group])
            assert small.error < 1e-12
            larger = jnp.concatenate([batch, 2 * batch])
            np.testing.assert_allclose(small.fn(small.params, larger), fn(zeroed, larger), rtol=1e-12, atol=1e-12)
            for leaf, whole in zip(jax.tree.leaves(small.expand()), jax.tree.leaves(zeroed), strict=True):
                np.testing.assert_array_equal(leaf, whole)

    def test_gradients_are_those_of_the_masked_network(self, name):
        fn, params, batch = case(name)
        found = po.structure.trace(fn, params, batch).units()
        group = next(g for g in found.groups if g.members in EXPECTED[name])
        path, axis = group.members[0]
        small = po.shrink_units(fn, params, batch, {(path, axis): halved(found, group, path, axis)})

        def loss(run):
            return lambda p: jnp.sum(jnp.sin(run(p, batch)))

        mine = small.expand(jax.jit(jax.grad(loss(small.fn)))(small.params))
        dense = deleted(jax.grad(loss(fn))(deleted(params, found, [group])), found, [group])
        for leaf, whole in zip(jax.tree.leaves(mine), jax.tree.leaves(dense), strict=True):
            np.testing.assert_allclose(leaf, whole, rtol=1e-10, atol=1e-12)


class TestSupport:
    """Which units a support leaves without effect."""

    @pytest.fixture(autouse=True)
    def network(self, flags):
        self.params = arrays(**MLP) | {"b1": jnp.zeros(8).at[3].set(1.0)}
        self.batch = arrays(x=FLAT)["x"]

    def masks(self, **gone):
        masks = {"w1": np.ones((5, 8), bool), "w2": np.ones((8, 3), bool)}
        for name, index in gone.items():
            masks[name][index] = False
        return masks

    def kept(self, masks, fn=mlp):
        small = po.shrink(fn, self.params, self.batch, masks)
        masked = po.apply(self.params, masks)
        np.testing.assert_allclose(small.fn(small.params, self.batch), fn(masked, self.batch), rtol=1e-12)
        return small.kept["w1"][1].tolist() if "w1" in small.kept else list(range(8))

    def test_a_unit_that_nothing_consumes_goes(self):
        assert self.kept(self.masks(w2=[1, 3])) == [0, 2, 4, 5, 6, 7]

    def test_a_unit_that_is_zero_goes(self):
        assert self.kept(self.masks(w1=(slice(None), [0, 5]))) == [1, 2, 3, 4, 6, 7]

    def test_what_prune_returned_is_taken_and_left_as_it_was(self):
        pruned = po.from_masks(self.params, self.masks(w2=[1, 3]))
        assert self.kept(pruned.support) == [0, 2, 4, 5, 6, 7]
        masks = self.masks(w2=[1, 3])
        self.kept(masks)
        np.testing.assert_array_equal(masks["w1"], True)  # its columns went with the units, not in the masks given

    @pytest.mark.default_flags
    def test_bfloat16_is_compared_in_float32(self):
        self.params = {name: leaf.astype(jnp.bfloat16) for name, leaf in self.params.items()}
        self.batch = self.batch.astype(jnp.bfloat16)
        small = po.shrink(mlp, self.params, self.batch, self.masks(w2=[1, 3]))
        assert small.error < 1e-6
        assert small.fn(small.params, self.batch).dtype == jnp.bfloat16

    def test_a_constant_unit_goes_into_the_bias_of_what_reads_it(self):
        """tanh(bias) of unit 3 reaches the output."""
        masks = self.masks(w1=(slice(None), [3]))
        assert self.kept(masks) == [0, 1, 2, 4, 5, 6, 7]
        small = po.shrink(mlp, self.params, self.batch, masks)
        added = np.tanh(1.0) * np.asarray(self.params["w2"][3])
        np.testing.assert_allclose(small.params["b2"], np.asarray(self.params["b2"]) + added, rtol=1e-12)

    def test_a_zero_unit_whose_function_is_not_zero_at_zero_goes_into_a_bias(self):
        def fn(p, x):
            return jax.nn.sigmoid(x @ p["w1"] + p["b1"][None]) @ p["w2"] - p["b2"][None]

        assert self.kept(self.masks(w1=(slice(None), [0])), fn) == list(range(1, 8))

    @pytest.mark.slow
    def test_a_chain_of_constants_goes_from_bias_to_bias(self):
        shapes = {"w1": (5, 6), "b1": (6,), "w2": (6, 4), "b2": (4,), "w3": (4, 3), "b3": (3,)}

        def fn(p, x):
            h = jnp.tanh(x @ p["w1"] + p["b1"][None])
            return jax.nn.sigmoid(h @ p["w2"] + p["b2"][None]) @ p["w3"] + p["b3"][None]

        params = arrays(**shapes)
        masks = {name: np.ones(shapes[name], bool) for name in ("w1", "w2", "w3")}
        masks["w1"][:, [0, 1]] = False
        masks["w2"][2:, 3] = False  # unit 3 of the second layer hears constants alone
        small = po.shrink(fn, params, self.batch, masks)
        assert [small.params[name].shape for name in shapes] == [(5, 4), (4,), (4, 3), (3,), (3, 3), (3,)]
        np.testing.assert_allclose(
            small.fn(small.params, self.batch), fn(po.apply(params, masks), self.batch), rtol=1e-12
        )

    def test_a_constant_that_no_bias_can_take_stays_and_is_listed(self):
        def without_bias(p, x):
            return jnp.tanh(x @ p["w1"] + p["b1"][None]) @ p["w2"]

        small = po.shrink(without_bias, self.params, self.batch, self.masks(w1=(slice(None), [3, 0])))
        assert small.kept["w1"][1].tolist() == [1, 2, 3, 4, 5, 6, 7]  # unit 0 has no bias: it is zero
        (((path, axis), entries),) = small.constant.items()
        assert (path, axis, entries.tolist()) == ("b1", 0, [3])
        assert "1 constant units stay" in repr(small)

    @pytest.mark.slow
    def test_a_constant_channel_at_the_border_of_padding_stays(self):
        """A convolution with padding adds less at the border, which no bias can."""

        def fn(p, x, padding="SAME"):
            numbers = ("NHWC", "HWIO", "NHWC")
            h = jnp.tanh(jax.lax.conv_general_dilated(x, p["k1"], (1, 1), padding, dimension_numbers=numbers) + p["b1"])
            return jax.lax.conv_general_dilated(h, p["k2"], (1, 1), padding, dimension_numbers=numbers) + p["b2"]

        params = arrays(k1=(3, 3, 2, 4), b1=(1, 1, 1, 4), k2=(3, 3, 4, 3), b2=(1, 1, 1, 3))
        masks = {"k1": np.ones((3, 3, 2, 4), bool)}
        masks["k1"][..., 1] = False
        image = arrays(x=(2, 6, 6, 2))["x"]
        assert "k1" not in po.shrink(fn, params, image, masks).kept
        inside = po.shrink(lambda p, x: fn(p, x, "VALID"), params, image, masks)
        assert inside.kept["k1"][3].tolist() == [0, 2, 3]

    def test_a_constant_that_may_differ_at_positions_the_batch_lacks_stays(self):
        """One token shows the first position's embedding alone: no bias can hold those of longer batches."""

        def fn(p, x):
            h = jnp.tanh(x @ p["w1"] + p["position"][: x.shape[1]][None])
            return h @ p["w2"] + p["b2"][None, None]

        params = arrays(w1=(5, 8), position=(6, 8), w2=(8, 3), b2=(3,))
        masks = {"w1": np.ones((5, 8), bool)}
        masks["w1"][:, 3] = False
        tokens = arrays(x=(4, 6, 5))["x"]
        for length in (1, 6):
            small = po.shrink(fn, params, tokens[:, :length], masks)
            assert "w1" not in small.kept
            np.testing.assert_allclose(
                small.fn(small.params, tokens), fn(po.apply(params, masks), tokens), rtol=1e-12, atol=1e-12
            )

    def test_widths_in_multiples(self):
        small = po.shrink(mlp, self.params, self.batch, self.masks(w2=[1, 3, 6]), multiple=4)
        assert small.params["w1"].shape == (5, 8)
        small = po.shrink(mlp, self.params, self.batch, self.masks(w2=[1, 3, 6]), multiple=3)
        assert small.params["w1"].shape == (5, 6)
        np.testing.assert_array_equal(np.flatnonzero(~np.asarray(small.params["w2"]).any(1)), [1])
        with pytest.raises(ValueError, match=r"multiple=0 is not a whole number"):
            po.shrink(mlp, self.params, self.batch, self.masks(), multiple=0)

    def test_places_of_maxima_are_counted_not_refused(self):
        def fn(p, x):
            y = mlp(p, x)
            return y, jnp.argmax(y, -1)

        small = po.shrink(fn, self.params, self.batch, self.masks(w2=[1, 3]))
        assert small.flipped == 0
        alone = po.shrink(lambda p, x: jnp.argmax(mlp(p, x), -1), self.params, self.batch, self.masks(w2=[1, 3]))
        assert alone.flipped == 0
        assert 0 <= alone.error < 1e-12

    def test_params_with_keys_and_flags(self):
        params = {"net": self.params, "key": jax.random.key(0), "count": 3, "steps": np.int32(2), "name": "mlp"}

        def fn(p, x):
            noise = jax.random.normal(p["key"], (x.shape[0], 1), x.dtype)
            return mlp(p["net"], x) + noise * p["count"]

        masks = {
            "net": self.masks(w2=[1, 3]) | {"b1": None, "b2": None},
            **dict.fromkeys(("key", "count", "steps", "name")),
        }
        small = po.shrink(fn, params, self.batch, masks)
        assert small.params["net"]["w1"].shape == (5, 6)

    def test_partial_masks_survive(self):
        masks = self.masks(w2=[1])
        masks["w1"][0, ::2] = False
        small = po.shrink(mlp, self.params, self.batch, masks)
        assert np.count_nonzero(np.asarray(small.params["w1"]) == 0) == 4
        np.testing.assert_array_equal(small.expand()["w1"][0, ::2], 0.0)

    def test_what_hangs_on_units_that_went_goes_too(self):
        shapes = {"w1": (5, 6), "w2": (6, 4), "w3": (4, 3)}

        def fn(p, x):
            return jnp.tanh(jnp.tanh(x @ p["w1"]) @ p["w2"]) @ p["w3"]

        params = arrays(**shapes)
        masks = {name: np.ones(shape, bool) for name, shape in shapes.items()}
        masks["w1"][:, [0, 1]] = False  # units 0 and 1 are zero
        masks["w2"][2:, 3] = False  # unit 3 of the second layer hears them alone
        small = po.shrink(fn, params, self.batch, masks)
        assert [small.params[name].shape for name in shapes] == [(5, 4), (4, 3), (3, 3)]

    @pytest.mark.default_flags  # optax mixes whole numbers and floats
    @pytest.mark.slow
    def test_the_optimisers_state_is_cut_along(self):
        optimizer = optax.adam(1e-2)
        small = po.shrink(mlp, self.params, self.batch, self.masks(w2=[1, 3]))
        state = small.shrink_like(optimizer.init(self.params))
        grads = jax.grad(lambda p: jnp.sum(small.fn(p, self.batch) ** 2))(small.params)
        updates, _ = optimizer.update(grads, state)
        assert jax.tree.map(jnp.shape, updates) == jax.tree.map(jnp.shape, small.params)


class TestDerivatives:
    @pytest.fixture(autouse=True)
    def network(self, flags):
        self.params, self.batch = arrays(**MLP), arrays(x=FLAT)["x"]

    def same(self, fn, params=None):
        """The gradient of the cut program is that of fn at the smaller sizes."""
        small = po.shrink_units(fn, params or self.params, self.batch, {("w1", 1): [0, 2, 3, 7]})
        mine, hand = (jax.grad(lambda p, f=f: jnp.sum(f(p, self.batch) ** 2))(small.params) for f in (small.fn, fn))
        for leaf, whole in zip(jax.tree.leaves(mine), jax.tree.leaves(hand), strict=True):
            np.testing.assert_allclose(leaf, whole, rtol=1e-12)
        return mine

    def test_of_relu_is_zero_at_zero(self):
        def fn(p, x):
            return jax.nn.relu(0.0 * (x @ p["w1"]) + p["b1"][None]) @ p["w2"]

        params = self.params | {"b1": jnp.zeros(8)}
        np.testing.assert_array_equal(self.same(fn, params)["b1"], 0.0)

    def test_of_a_custom_jvp(self):
        @jax.custom_jvp
        def clipped(x, y):
            return jnp.minimum(x, 0.5) * y

        @clipped.defjvp
        def rule(primals, tangents):
            return clipped(*primals), 3.0 * tangents[0] + 2.0 * tangents[1] * primals[0]

        self.same(lambda p, x: clipped(x @ p["w1"], jax.nn.softplus(x @ p["w1"])) @ p["w2"] + p["b1"].sum())

    def test_of_a_custom_vjp_with_residuals(self):
        @jax.custom_vjp
        def scaled(x, y):
            return jnp.sin(x) * y.sum()

        def forward(x, y):
            return scaled(x, y), {"cos": jnp.cos(x), "y": y, "x": x}

        def backward(kept, g):
            return 2 * g * kept["cos"] * kept["y"].sum(), jnp.zeros_like(kept["y"]) + (g * jnp.sin(kept["x"])).sum()

        scaled.defvjp(forward, backward)
        self.same(lambda p, x: scaled(x @ p["w1"], p["b1"]) @ p["w2"])

    def test_of_a_straight_through_sign(self):
        @jax.custom_vjp
        def sign(x):
            return jnp.sign(x)

        sign.defvjp(lambda x: (jnp.sign(x), x), lambda x, g: (jnp.where(jnp.abs(x) < 1, g, 0.0),))
        found = self.same(lambda p, x: sign(x @ p["w1"]) @ p["w2"])
        assert np.any(np.asarray(found["w1"]) != 0)


@pytest.mark.default_flags
@pytest.mark.slow
@pytest.mark.usefixtures("optimised")
def test_resnet20_with_half_of_its_inner_channels(folder):
    """The inner channels of each block halved; the network's own function runs on the smaller leaves too."""
    params = resnet20.load_chita(folder)
    images = jnp.asarray(np.random.default_rng(0).normal(size=(4, 32, 32, 3)), jnp.float32)
    found = po.structure.trace(resnet20.forward, params, images).units()
    assert {path for g in found.groups if not g.blocked for path, _ in g.members} == {*found.paths} - {
        "classifier/bias"
    }
    inner = [
        g for g in found.groups if any("norm1" in p for p, _ in g.members) and "conv1/kernel" not in dict(g.members)
    ]
    kept = {g.members[0]: halved(found, g, *g.members[0]) for g in inner}
    small = po.shrink_units(resnet20.forward, params, images, kept)
    assert (len(inner), sum(x.size for x in jax.tree.leaves(small.params))) == (9, 139738)
    np.testing.assert_allclose(
        small.fn(small.params, images), resnet20.forward(small.params, images), rtol=1e-4, atol=1e-4
    )


class TestRefusals:
    @pytest.fixture(autouse=True)
    def network(self, flags):
        self.params, self.batch = arrays(**MLP), arrays(x=FLAT)["x"]

    def test_units_that_are_outputs_or_inputs(self):
        with pytest.raises(ValueError, match=r"(?s)units of 'w2' cannot be cut.*it is an output of fn"):
            po.shrink_units(mlp, self.params, self.batch, {("w2", 1): [0, 1]})
        with pytest.raises(ValueError, match=r"(?s)units of 'w1' cannot be cut.*it is an axis of the batch"):
            po.shrink_units(mlp, self.params, self.batch, {("w1", 0): [0, 1]})

    def test_entries_that_are_no_units(self):
        fn, params, batch = case("fused")
        with pytest.raises(ValueError, match="no whole units"):
            po.shrink_units(fn, params, batch, {("both", 1): [0, 1, 2, 3, 4, 5, 6]})
        with pytest.raises(ValueError, match="entries 0 to 7"):
            po.shrink_units(mlp, self.params, self.batch, {("w1", 1): [0, 8]})
        with pytest.raises(ValueError, match="params has no array 'w9'"):
            po.shrink_units(mlp, self.params, self.batch, {("w9", 1): [0]})

    def test_what_is_cut_follows_another_function_or_not(self):
        small = po.shrink_units(mlp, self.params, self.batch, {("w1", 1): [0, 2]})
        with pytest.raises(ValueError, match="cannot be cut"):
            small.of(lambda p, x: x @ p["w1"], self.batch)
