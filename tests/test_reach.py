"""What cutting whole units can save at most, counted by hand."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import pruneopt as po

RNG = np.random.default_rng(0)


def drawn(**shapes):
    return {name: jnp.asarray(RNG.normal(size=shape)) for name, shape in shapes.items()}


def reached(fn, params, batch):
    return po.structure.reach(po.structure.trace(fn, params, batch).units())


def test_of_a_perceptron():
    found = reached(
        lambda p, x: jnp.tanh(x @ p["w1"]) @ p["w2"], drawn(w1=(5, 8), w2=(8, 3)), jnp.asarray(RNG.normal(size=(4, 5)))
    )
    assert found.flops == 2 * 4 * (5 * 8 + 8 * 3)
    assert found.left == 2 * 4 * (5 + 3)
    assert found.because == {"it is an axis of the batch": 2 * 4 * 5, "it is an output of fn": 2 * 4 * 3}
    assert "at most 8 times fewer FLOPs" in str(found)


def test_of_convolutions_heads_and_loops():
    def fn(p, x):
        spec = {"window_strides": (1, 1), "padding": "SAME", "dimension_numbers": ("NHWC", "HWIO", "NHWC")}
        h = jax.lax.conv_general_dilated(x, p["kernel"], **spec).mean((1, 2))
        h = jax.lax.scan(lambda h, w: (jnp.tanh(h @ w), None), h, p["layers"])[0]
        return (h.reshape(-1, 2, 3) * p["scale"][None, :, None]).sum(1) @ p["out"]

    params = drawn(kernel=(3, 3, 2, 6), layers=(5, 6, 6), scale=(2,), out=(3, 4))
    found = reached(fn, params, jnp.asarray(RNG.normal(size=(4, 8, 8, 2))))
    assert found.flops == 2 * 4 * (8 * 8 * 9 * 2 * 6 + 5 * 6 * 6 + 3 * 4)
    assert found.left == 2 * 4 * (8 * 8 * 9 * 2 + 5 + 4)


def test_what_is_blocked_stays_and_says_why():
    found = reached(lambda p, x: jnp.sort(x @ p["w"]), drawn(w=(5, 8)), jnp.asarray(RNG.normal(size=(4, 5))))
    assert found.left == found.flops == 2 * 4 * 5 * 8
    assert "at most 1 times fewer" in str(found)
    assert "because" in str(found)


class TestBadInput:
    """Of the cuts themselves."""

    @pytest.fixture(autouse=True)
    def network(self, flags):
        self.params, self.x = drawn(w1=(5, 8), w2=(8, 3)), jnp.asarray(RNG.normal(size=(4, 5)))

    @staticmethod
    def fn(p, x):
        return jnp.tanh(x @ p["w1"]) @ p["w2"]

    def test_a_group_of_another_network(self):
        with pytest.raises(ValueError, match=r"params has no array 'up'; there are"):
            po.shrink_units(self.fn, self.params, self.x, {("up", 1): [0]})
        with pytest.raises(ValueError, match=r"leaf 'w1' has 2 axes"):
            po.shrink_units(self.fn, self.params, self.x, {("w1", 2): [0]})

    def test_masks_of_another_network(self):
        with pytest.raises(ValueError, match="w1"):
            po.shrink(self.fn, self.params, self.x, {"w1": np.ones((5, 9), bool), "w2": None})

    def test_a_function_that_looks_at_shapes_keeps_to_the_dense_ones(self):
        def strict(p, x):
            if p["w1"].shape != (5, 8):
                raise TypeError("wrong shape")
            return self.fn(p, x)

        small = po.shrink_units(strict, self.params, self.x, {("w1", 1): [0, 3]})
        np.testing.assert_allclose(
            small.fn(small.params, self.x[:2]), strict(small.expand(), self.x[:2]), rtol=1e-12, atol=1e-14
        )
        assert not small.runs_as_is(self.x)

    def test_a_function_that_looks_at_numbers(self):
        def branching(p, x):
            return self.fn(p, x) if p["w1"][0, 0] > 0 else x

        with pytest.raises(ValueError, match="fn is not traceable"):
            po.shrink_units(branching, self.params, self.x, {("w1", 1): [0, 3]})

    def test_another_batch(self):
        small = po.shrink_units(self.fn, self.params, self.x, {("w1", 1): [0, 3]})
        with pytest.raises((TypeError, ValueError)):
            small.fn(small.params, {"x": self.x})
