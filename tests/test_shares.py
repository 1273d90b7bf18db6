"""Budgets shared out among leaves: their formulas, exact totals, full leaves."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import pruneopt as po
from pruneopt.constraints import by_size, erdos_renyi

SHAPES = {"a": (784, 300), "b": (300, 100), "c": (100, 10), "conv": (3, 3, 16, 32), "bias": (10,)}


def tensors():
    return {k: jnp.zeros(shape, jnp.float32) for k, shape in SHAPES.items()}


def test_erdos_renyi_budgets_are_their_formula():
    shapes = {"a": (784, 300), "b": (300, 100), "c": (100, 10), "conv": (3, 3, 16, 32), "bias": (10,)}
    p = {k: jax.ShapeDtypeStruct(s, jnp.float32) for k, s in shapes.items()}
    p = {k: jnp.zeros(s.shape, s.dtype) for k, s in p.items()}
    for sparsity, full in ((0.0, "abc"), (0.5, "bc"), (0.9, "c"), (0.95, "")):
        budgets = erdos_renyi(p, sparsity)
        budgets.check({k: v for k, v in p.items() if k != "bias"})
        counts = {k: c.count for k, c in budgets.of.items()}
        sizes = {k: int(np.prod(shapes[k])) for k in counts}
        assert sum(counts.values()) == int(np.floor((1 - sparsity) * sum(sizes.values()) + 1e-9))
        free = [k for k in counts if counts[k] < sizes[k]]
        assert all((k in full) == (k not in free) for k in "abc")
        ratio = [counts[k] / sum(shapes[k]) for k in free]
        np.testing.assert_allclose(ratio, np.mean(ratio) if free else [], rtol=0.02)
        assert all(sum(shapes[k]) * np.mean(ratio) >= sizes[k] for k in counts if k not in free and free)


@pytest.mark.parametrize("power", [0.0, 0.25, 0.65, 1.0])
@pytest.mark.parametrize("sparsity", [0.0, 0.5, 0.9, 0.98])
def test_budgets_by_size_are_their_formula(power, sparsity):
    budgets = by_size(tensors(), sparsity, power)
    budgets.check({k: v for k, v in tensors().items() if k != "bias"})
    counts = {k: c.count for k, c in budgets.of.items()}
    sizes = {k: int(np.prod(SHAPES[k])) for k in counts}
    assert sum(counts.values()) == int(np.floor((1 - sparsity) * sum(sizes.values()) + 1e-9))
    free = [k for k in counts if counts[k] < sizes[k]]
    scale = [counts[k] / sizes[k] ** (1 - power) for k in free]
    np.testing.assert_allclose(scale, np.mean(scale) if free else [], rtol=0.02)
    assert all(np.mean(scale) * sizes[k] ** (1 - power) >= sizes[k] - 1 for k in counts if k not in free and free)


def test_a_network_is_pruned_to_the_budgets_and_a_path_is_taken_literally():
    params = {"a[0]": jnp.ones((8, 4)) * jnp.arange(1.0, 5.0)[None], "a0": jnp.ones((4, 2))}
    pruned = po.prune(None, params, None, by_size(params, 0.5, 1.0), progress=False)
    assert {k: int(v.sum()) for k, v in pruned.support.items()} == {"a[0]": 12, "a0": 8}


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: erdos_renyi(tensors(), 1.5), "sparsity=1.5"),
        (lambda: by_size(tensors(), -0.1), "sparsity=-0.1"),
        (lambda: by_size(tensors(), 0.99999), "would keep none"),
        (lambda: by_size(tensors(), 0.5, power=2), "power=2 is outside"),
    ],
)
def test_bad_input_is_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_every_leaf_keeps_a_weight():
    leaves = {"small": jnp.ones((2, 2)), "large": jnp.ones((60, 60))}
    for power in (0.0, 0.5):
        counts = {k: c.count for k, c in by_size(leaves, 0.999, power).of.items()}
        assert counts == {"small": 1, "large": 2}
