"""Captured statistics equal float64 NumPy ones made by hand: loops over examples, pixels and taps, no JAX in them."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from pruneopt.capture.statistics import capture
from pruneopt.capture.sums import _sums
from pruneopt.program import forms
from pruneopt.structure.graph import trace

EXACT = {"rtol": 1e-12, "atol": 1e-13}


def draw(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(sum(shape) + seed).normal(size=shape)


@dataclass
class Case:
    """fn and, for each operator, the rows of its inputs by hand.

    rows(params, batch): {operator: (problems, positions, n_in), or a list with one matrix a problem}.
    units: the same for the incoming activations, where these are not the rows.
    """

    fn: Callable[[Any, Any], Any]
    params: dict[str, Any]
    batches: list[Any]
    rows: Callable[[Any, Any], dict[str, Any]]
    units: Callable[[Any, Any], dict[str, Any]] | None = None
    positions: dict[str, tuple[int, ...]] = field(default_factory=dict)


def flat(x: np.ndarray) -> np.ndarray:
    """One problem, one row a position."""
    return x.reshape(1, -1, x.shape[-1])


# ------------------------------------------------------------------------------------------- convolutions by hand


def windows(x, window, strides, padding, groups=1, x_dilation=(1, 1), dilation=(1, 1)):
    """The patches of images (n, height, width, channels): (groups, positions, taps x channels of a group)."""
    n, height, width, channels = x.shape
    spread = np.zeros((n, (height - 1) * x_dilation[0] + 1, (width - 1) * x_dilation[1] + 1, channels))
    for i, j in itertools.product(range(height), range(width)):
        spread[:, i * x_dilation[0], j * x_dilation[1]] = x[:, i, j]
    reach = [(k - 1) * d + 1 for k, d in zip(window, dilation, strict=True)]
    if padding == "SAME":
        sizes = [-(-m // s) for m, s in zip(spread.shape[1:3], strides, strict=True)]
        missing = [
            max((o - 1) * s + r - m, 0) for o, s, r, m in zip(sizes, strides, reach, spread.shape[1:3], strict=True)
        ]
        padding = [(m // 2, m - m // 2) for m in missing]
    elif padding == "VALID":
        padding = [(0, 0), (0, 0)]
    padded = np.pad(spread, [(0, 0), *(np.maximum(p, 0) for p in padding), (0, 0)])
    (top, bottom), (left, right) = np.minimum(padding, 0)  # negative padding crops
    padded = padded[:, -top : padded.shape[1] + bottom, -left : padded.shape[2] + right]
    tops = range(0, padded.shape[1] - reach[0] + 1, strides[0])
    lefts = range(0, padded.shape[2] - reach[1] + 1, strides[1])
    found = [[] for _ in range(groups)]
    for image, top, left in itertools.product(padded, tops, lefts):
        for g, patches in enumerate(found):
            own = slice(g * channels // groups, (g + 1) * channels // groups)
            taps = itertools.product(range(window[0]), range(window[1]))
            patches.append([image[top + a * dilation[0], left + b * dilation[1], own] for a, b in taps])
    return np.asarray(found).reshape(groups, -1, window[0] * window[1] * channels // groups)


def convolution(window, strides=(1, 1), padding="VALID", groups=1, x_dilation=(1, 1), dilation=(1, 1), layout="NHWC"):
    """Images (n, 5, 6, 4), six output channels (eight if depthwise); two batches."""
    kernel = draw(*window, 4 // groups, 8 if groups == 4 else 6)
    specs = {"NHWC": ("NHWC", "HWIO", "NHWC"), "NCHW": ("NCHW", "OIHW", "NCHW")}[layout]

    def fn(params, x):
        return lax.conv_general_dilated(
            x, params["w"], strides, padding, x_dilation, dilation, specs, feature_group_count=groups
        )

    def images(x):
        return x if layout == "NHWC" else x.transpose(0, 2, 3, 1)

    def rows(params, x):
        return {"w": windows(images(x), window, strides, padding, groups, x_dilation, dilation)}

    def units(params, x):
        x = images(x)
        return {"w": np.moveaxis(x.reshape(-1, groups, 4 // groups), 1, 0)}

    x = np.maximum(draw(4, 5, 6, 4), 0)
    x = x if layout == "NHWC" else x.transpose(0, 3, 1, 2)
    w = kernel if layout == "NHWC" else kernel.transpose(3, 2, 0, 1)
    return Case(fn, {"w": w}, [x[:2], x[2:]], rows, units)


# ------------------------------------------------------------------------------------------------ other networks


def dense():
    def fn(params, x):
        return jnp.tanh(x @ params["a"] + params["bias"]) @ params["b"]

    params = {"a": draw(4, 5), "b": draw(5, 3), "bias": draw(1, 5)}

    def rows(p, x):
        return {"a": flat(x), "b": flat(np.tanh(x @ p["a"] + p["bias"]))}

    return Case(fn, params, [draw(4, 4), draw(2, 4)], rows)


def transposed():
    fn = lambda params, x: jnp.einsum("oi,bti->bto", params["w"], x)  # noqa: E731
    return Case(fn, {"w": draw(3, 4)}, [draw(2, 3, 4), draw(2, 3, 4, seed=1)], lambda p, x: {"w": flat(x)})


def two_contracted():
    def fn(params, x):
        return jnp.einsum("bthk,hkd->btd", x, params["w"])

    def rows(params, x):
        return {"w": [[[x[b, t, h, k] for h in range(2) for k in range(3)] for b in range(len(x)) for t in range(4)]]}

    return Case(fn, {"w": draw(2, 3, 5)}, [draw(2, 4, 2, 3), draw(2, 4, 2, 3, seed=1)], rows)


def two_outputs():
    fn = lambda params, x: jnp.einsum("btd,dhk->bthk", x, params["w"])  # noqa: E731
    return Case(fn, {"w": draw(5, 2, 3)}, [draw(2, 4, 5), draw(2, 4, 5, seed=1)], lambda p, x: {"w": flat(x)})


def experts():
    fn = lambda params, x: jnp.einsum("ecd,edf->ecf", x, params["w"])  # noqa: E731
    return Case(fn, {"w": draw(3, 4, 5)}, [draw(3, 2, 4), draw(3, 4, 4)], lambda p, x: {"w": x})


def ragged():
    """Rows go to three experts in order; the last rows to none, and the second expert of the second batch gets none."""

    def fn(params, batch):
        return lax.ragged_dot(batch["x"], params["w"], batch["sizes"])

    def rows(params, batch):
        ends = np.cumsum(batch["sizes"])
        return {"w": [batch["x"][end - size : end] for end, size in zip(ends, batch["sizes"], strict=True)]}

    batches = [
        {"x": draw(7, 4), "sizes": np.array([3, 2, 1], np.int32)},
        {"x": draw(7, 4, seed=1), "sizes": np.array([5, 0, 2], np.int32)},
    ]
    return Case(fn, {"w": draw(3, 4, 5)}, batches, rows, lambda p, batch: {"w": flat(batch["x"])})


def vmapped():
    def fn(params, x):
        return jax.vmap(lambda w, x: jnp.tanh(x) @ w, in_axes=(2, 1))(params["w"], x)

    def rows(params, x):
        return {"w": np.tanh(np.moveaxis(x, 1, 0))}

    return Case(fn, {"w": draw(4, 5, 3)}, [draw(4, 3, 4), draw(4, 3, 4, seed=1)], rows)


def vmapped_convolution():
    def fn(params, x):
        conv = partial(lax.conv_general_dilated, window_strides=(1, 1), padding="VALID")
        return jax.vmap(partial(conv, dimension_numbers=("NHWC", "HWIO", "NHWC")), in_axes=(0, 0))(x, params["w"])

    def rows(params, x):
        return {"w": np.concatenate([windows(part, (2, 2), (1, 1), "VALID") for part in x])}

    def units(params, x):
        return {"w": x.reshape(2, -1, 2)}

    return Case(fn, {"w": draw(2, 2, 2, 2, 3)}, [draw(2, 2, 4, 3, 2), draw(2, 2, 4, 3, 2, seed=1)], rows, units)


def broadcast():
    """A weight broadcast over the examples and multiplied example by example is one matrix."""

    def fn(params, x):
        w = jnp.broadcast_to(params["w"], (x.shape[0], 4, 5))
        return jnp.einsum("btd,bdf->btf", x, w)

    return Case(fn, {"w": draw(4, 5)}, [draw(2, 3, 4), draw(2, 3, 4, seed=1)], lambda p, x: {"w": flat(x)})


def tied():
    def fn(params, x):
        return jnp.tanh(x @ params["w"]) @ params["w"]

    def rows(params, x):
        return {"w": flat(np.concatenate([x, np.tanh(x @ params["w"])]))}

    return Case(fn, {"w": draw(4, 4)}, [draw(4, 4), draw(2, 4)], rows)


def chained(params, x, order, of=lambda w, i: w[i]):
    """{layer: what enters it} where each layer is tanh(x @ w)."""
    found = {}
    for i in order:
        found[f"w[{i}]"] = flat(x)
        x = np.tanh(x @ of(params["w"], i))
    return found


def scanned(reverse=False):
    def fn(params, x):
        return lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, params["w"], reverse=reverse)[0]

    order = range(3)[::-1] if reverse else range(3)
    return Case(fn, {"w": draw(3, 4, 4)}, [draw(4, 4), draw(4, 4, seed=1)], lambda p, x: chained(p, x, order))


def fori():
    def fn(params, x):
        return lax.fori_loop(0, 3, lambda i, x: jnp.tanh(x @ params["w"][2 - i]), x)

    return Case(fn, {"w": draw(3, 4, 4)}, [draw(4, 4), draw(4, 4, seed=1)], lambda p, x: chained(p, x, (2, 1, 0)))


def siamese():
    """One stack of layers, applied to two views of each example."""

    def fn(params, batch):
        step = lambda x, w: (jnp.tanh(x @ w), None)  # noqa: E731
        return [lax.scan(step, view, params["w"])[0] for view in batch]

    def rows(params, batch):
        first, second = (chained(params, view, range(2)) for view in batch)
        return {name: np.concatenate([first[name], second[name]], axis=1) for name in first}

    batches = [(draw(4, 4), draw(4, 4, seed=1)), (draw(4, 4, seed=2), draw(4, 4, seed=3))]
    return Case(fn, {"w": draw(2, 4, 4)}, batches, rows)


def recurrent():
    """Weights shared by the steps of a scan over time; outputs are stacked."""

    def fn(params, x):
        def step(h, x):
            h = jnp.tanh(h @ params["h"] + x @ params["x"])
            return h, h

        h, all_h = lax.scan(step, jnp.zeros((x.shape[0], 4), x.dtype), jnp.swapaxes(x, 0, 1))
        return jnp.concatenate([h[None], all_h]) @ params["out"]

    def rows(params, x):
        h, seen = np.zeros((len(x), 4)), []
        for t in range(x.shape[1]):
            seen.append(h)
            h = np.tanh(h @ params["h"] + x[:, t] @ params["x"])
        out = np.concatenate([h, *seen[1:], h])
        return {"h": flat(np.concatenate(seen)), "x": flat(x), "out": flat(out)}

    params = {"h": draw(4, 4), "x": draw(5, 4), "out": draw(4, 3)}
    return Case(fn, params, [draw(4, 3, 5), draw(4, 3, 5, seed=1)], rows)


CASES: dict[str, Callable[[], Case]] = {
    "dense": dense,
    "transposed-weight": transposed,
    "conv-valid": partial(convolution, (3, 2)),
    "conv-1x1-strided": partial(convolution, (1, 1), strides=(2, 2), padding="SAME"),
    "conv-same-strided": partial(convolution, (3, 3), strides=(2, 1), padding="SAME"),
    "conv-dilated": partial(convolution, (2, 3), dilation=(2, 1), padding=((1, 0), (2, 1))),
    "conv-grouped-same": partial(convolution, (2, 3), padding="SAME", groups=2),
    "conv-depthwise": partial(convolution, (2, 2), strides=(2, 2), groups=4),
    "conv-transposed": partial(convolution, (3, 2), padding=((2, 1), (0, 1)), x_dilation=(2, 3)),
    "conv-cropped": partial(convolution, (2, 2), padding=((-1, 0), (0, -1))),
    "conv-nchw": partial(convolution, (3, 3), strides=(2, 1), padding="SAME", layout="NCHW"),
    "conv-nchw-grouped": partial(convolution, (2, 2), groups=2, dilation=(1, 2), layout="NCHW"),
    "two-contracted-axes": two_contracted,
    "two-output-axes": two_outputs,
    "batched-experts": experts,
    "ragged-experts": ragged,
    "vmapped": vmapped,
    "vmapped-conv": vmapped_convolution,
    "broadcast-weight": broadcast,
    "tied": tied,
    "scanned": scanned,
    "scanned-in-reverse": partial(scanned, reverse=True),
    "fori-loop": fori,
    "siamese-scan": siamese,
    "recurrent": recurrent,
}


def joined(case: Case, what: Callable[[Any, Any], dict[str, Any]], batches: list[Any]) -> dict[str, list[np.ndarray]]:
    """{operator: one matrix a problem}, all batches below each other."""
    parts = [what(case.params, batch) for batch in batches]
    return {
        name: [np.concatenate([np.asarray(p[name][i]) for p in parts]) for i in range(len(parts[0][name]))]
        for name in parts[0]
    }


def grams(rows: list[np.ndarray], weights: list[np.ndarray] | None = None) -> tuple[np.ndarray, np.ndarray]:
    """(count, Gram) of each problem, summed row by row."""
    weights = weights or [np.ones(len(r)) for r in rows]
    count = np.array([w.sum() for w in weights])
    total = [sum((w * np.outer(x, x) for x, w in zip(r, v, strict=True))) for r, v in zip(rows, weights, strict=True)]
    return count, np.stack([t / max(c, 1) for t, c in zip(total, count, strict=True)])


@pytest.mark.parametrize("name", CASES)
def test_everything_equals_the_reference(name):
    case = CASES[name]()
    found = capture(
        case.fn, case.params, case.batches, leaves="*w" if "w" in case.params else None, means=True, activations=True
    )
    rows = joined(case, case.rows, case.batches)
    units = joined(case, case.units or case.rows, case.batches)
    assert sorted(found) == sorted(rows)
    for op, statistics in found.items():
        count, gram = grams(rows[op])
        np.testing.assert_array_equal(statistics.count, count)
        assert statistics.gram.dtype == np.float64
        np.testing.assert_allclose(statistics.gram, gram, **EXACT)
        np.testing.assert_allclose(statistics.mean, [r.mean(axis=0) for r in rows[op]], **EXACT)
        np.testing.assert_allclose(statistics.absolute, [np.abs(r).mean(axis=0) for r in rows[op]], **EXACT)
        np.testing.assert_allclose(statistics.zeros, [(u == 0).mean(axis=0) for u in units[op]], **EXACT)
        np.testing.assert_allclose(statistics.unit_mean, [u.mean(axis=0) for u in units[op]], **EXACT)
        np.testing.assert_allclose(statistics.unit_variance, [u.var(axis=0) for u in units[op]], **EXACT)
        assert statistics.output_gradient is None


def kernel_matrix(w: np.ndarray, groups: int) -> np.ndarray:
    """An HWIO kernel as (groups, n_in, n_out)."""
    n_out = w.shape[-1] // groups
    return np.stack([w[..., g * n_out : (g + 1) * n_out].reshape(-1, n_out) for g in range(groups)])


@pytest.mark.parametrize("name", [n for n in CASES if n.startswith("conv") and "nchw" not in n])
def test_the_reference_itself_makes_the_convolution(name):
    case = CASES[name]()
    rows, x = case.rows(case.params, case.batches[0])["w"], case.batches[0]
    by_hand = np.concatenate(list(rows @ kernel_matrix(case.params["w"], len(rows))), axis=-1)
    y = np.asarray(case.fn(case.params, x))
    np.testing.assert_allclose(y.reshape(by_hand.shape), by_hand, rtol=1e-12, atol=1e-13)


# Networks that are one product, the rows of their output in the order of the rows by hand.
PRODUCTS = {
    "transposed-weight": lambda y: y.reshape(1, -1, 3),
    "conv-same-strided": lambda y: y.reshape(1, -1, 6),
    "conv-grouped-same": lambda y: np.moveaxis(y.reshape(-1, 2, 3), 1, 0),
    "conv-nchw": lambda y: np.moveaxis(y, 1, -1).reshape(1, -1, 6),
    "two-contracted-axes": lambda y: y.reshape(1, -1, 5),
    "two-output-axes": lambda y: y.reshape(1, -1, 6),
    "batched-experts": lambda y: y,
    "vmapped": lambda y: y,
    "vmapped-conv": lambda y: y.reshape(2, -1, 3),
    "broadcast-weight": lambda y: y.reshape(1, -1, 5),
}


@pytest.mark.parametrize("name", PRODUCTS)
def test_a_changed_matrix_is_what_fn_multiplies_by(name):
    case = CASES[name]()
    x = case.batches[0]
    op = trace(case.fn, case.params, x).operator("w")
    matrix = draw(op.problems, op.n_in, op.n_out, seed=5)
    params = op.to_leaves(jnp.asarray(matrix), case.params)
    y = np.asarray(case.fn(params, x))
    np.testing.assert_allclose(PRODUCTS[name](y), case.rows(case.params, x)["w"] @ matrix, **EXACT)
    if name != "vmapped-conv":  # whose product is rearranged before it is returned
        np.testing.assert_array_equal(op.uses[0].form.output_rows(y), PRODUCTS[name](y))


@pytest.mark.default_flags
@pytest.mark.parametrize("name", ["dense", "conv-same-strided", "ragged-experts", "scanned"])
def test_grams_in_single_precision(name):
    case = CASES[name]()
    single = lambda tree: jax.tree.map(lambda x: x.astype(np.float32) if x.dtype == np.float64 else x, tree)  # noqa: E731
    found = capture(case.fn, single(case.params), list(map(single, case.batches)))
    for op, rows in joined(case, case.rows, case.batches).items():
        gram = grams(rows)[1]
        assert found[op].gram.dtype == np.float32
        np.testing.assert_allclose(found[op].gram, gram, rtol=1e-5, atol=1e-5 * np.abs(gram).max())


@pytest.mark.default_flags
def test_bf16_inputs_accumulate_in_float32():
    x = jnp.asarray(1 + draw(700, 3) / 8, jnp.bfloat16)
    batches = [x[:350], x[350:]]
    found = capture(
        lambda p, x: x @ p["w"], {"w": jnp.ones((3, 2), jnp.bfloat16)}, batches, means=True, activations=True
    )
    exact = np.asarray(x, np.float64)
    assert found["w"].gram.dtype == np.float32
    np.testing.assert_allclose(found["w"].gram, grams([exact])[1], rtol=5e-6)  # bf16 sums would be off by 4e-3

    np.testing.assert_allclose(found["w"].mean[0], exact.mean(axis=0), rtol=5e-6)
    np.testing.assert_allclose(found["w"].unit_variance[0], exact.var(axis=0), rtol=1e-4)


@pytest.mark.default_flags
def test_the_variance_of_units_far_from_zero():
    x = (1000 + draw(60, 4)).astype(np.float32)
    found = capture(lambda p, x: x @ p["a"], {"a": np.ones((4, 2), np.float32)}, [x[:40], x[40:]], activations=True)
    np.testing.assert_allclose(found["a"].unit_variance[0], x.astype(np.float64).var(axis=0), rtol=1e-3)
    np.testing.assert_allclose(found["a"].unit_mean[0], x.astype(np.float64).mean(axis=0), rtol=1e-6)


# ------------------------------------------------------------------------------------------------------ batches


@pytest.mark.parametrize("name", ["conv-grouped-same", "tied"])
def test_how_the_data_are_cut_does_not_matter(name):
    case = CASES[name]()
    data = np.concatenate(case.batches)
    ask = partial(capture, case.fn, case.params, means=True, activations=True)
    whole, cut = ask([data]), ask([data[: len(data) // 2], data[len(data) // 2 :]])
    for op, statistics in ask(case.batches).items():
        for other in (whole[op], cut[op]):
            for kind in ("count", "gram", "mean", "absolute", "zeros", "unit_mean", "unit_variance"):
                np.testing.assert_allclose(getattr(statistics, kind), getattr(other, kind), **EXACT)


def test_batches_may_come_from_a_function():
    case = dense()
    listed, made = (capture(case.fn, case.params, b) for b in (case.batches, lambda: iter(case.batches)))
    assert all(np.array_equal(listed[op].gram, made[op].gram) for op in listed)


def test_loops_that_differ_in_a_constant_deep_inside():
    """Equal equations are evaluated once; these two only look equal, in print too."""

    def grown(x, step):
        inner = jax.jit(lambda x: x + jnp.asarray(step))
        return lax.while_loop(lambda x: jnp.min(x) < 3, inner, x)

    one, two = np.ones((2, 4)), np.full((2, 4), 2.0)
    found = capture(
        lambda p, x: grown(x, one) @ p["a"] + grown(x, two) @ p["b"], {"a": draw(4, 4), "b": draw(4, 4)}, [0 * one]
    )
    np.testing.assert_array_equal(found["a"].gram, np.full((1, 4, 4), 9.0))
    np.testing.assert_array_equal(found["b"].gram, np.full((1, 4, 4), 16.0))


def test_only_what_is_asked_for():
    case = dense()
    found = capture(case.fn, case.params, case.batches, leaves="b", gram=False, means=True)
    assert list(found) == ["b"]
    assert found["b"].gram is None
    assert found["b"].zeros is None
    assert found["b"].mean.shape == (1, 5)


# ----------------------------------------------------------------------------------------------- position weights


def blocked(monkeypatch, entries: int) -> None:
    monkeypatch.setattr(forms, "_BLOCK", entries)
    _sums.clear_cache()


@pytest.fixture(params=[2**20, 1], ids=["one-block", "a-block-an-image"])
def blocks(request, monkeypatch):
    """Convolutions in one block, and in one for each image."""
    blocked(monkeypatch, request.param)
    yield
    _sums.clear_cache()


@pytest.mark.usefixtures("blocks")
@pytest.mark.parametrize(("name", "per"), [("conv-grouped-same", "pixel"), ("conv-nchw", "example")])
def test_weights_on_convolutions(name, per):
    case = CASES[name]()
    pixels = {"conv-grouped-same": (5, 6), "conv-nchw": (3, 6)}[name]

    def weights(batch):
        shape = (len(batch), *pixels) if per == "pixel" else (len(batch),)
        return np.abs(draw(*shape)) * (draw(*shape, seed=1) > 0)

    found = capture(case.fn, case.params, case.batches, weights=weights, means=True)["w"]
    rows = joined(case, case.rows, case.batches)["w"]
    spread = [np.repeat(weights(b).ravel(), 1 if per == "pixel" else np.prod(pixels)) for b in case.batches]
    each = [np.concatenate(spread)] * len(rows)
    count, gram = grams(rows, each)
    np.testing.assert_allclose(found.count, count, **EXACT)
    np.testing.assert_allclose(found.gram, gram * np.maximum(count, 1)[:, None, None] / count[:, None, None], **EXACT)
    mean = [(r * w[:, None]).sum(axis=0) / w.sum() for r, w in zip(rows, each, strict=True)]
    absolute = [(np.abs(r) * w[:, None]).sum(axis=0) / w.sum() for r, w in zip(rows, each, strict=True)]
    np.testing.assert_allclose(found.mean, mean, **EXACT)
    np.testing.assert_allclose(found.absolute, absolute, **EXACT)


@pytest.mark.usefixtures("blocks")
@pytest.mark.parametrize("name", ["conv-transposed", "conv-depthwise"])
def test_blocks_of_convolutions_add_up(name):
    case = CASES[name]()
    found = capture(case.fn, case.params, case.batches, means=True)["w"]
    rows = joined(case, case.rows, case.batches)["w"]
    np.testing.assert_allclose(found.gram, grams(rows)[1], **EXACT)
    np.testing.assert_allclose(found.mean, [r.mean(axis=0) for r in rows], **EXACT)


def masked_network():
    """Tokens (B, T, 4), heads, flattened tokens, and one pooled row an example."""

    def fn(params, batch):
        x = jnp.einsum("btd,dhk->bthk", batch["x"], params["split"])
        x = jnp.tanh(jnp.einsum("bthk,hkd->btd", x, params["join"]))
        flat = jnp.tanh(x.reshape(-1, 4) @ params["flat"]).reshape(x.shape)
        return flat.sum(axis=1) @ params["pooled"]

    params = {"split": draw(4, 2, 3), "join": draw(2, 3, 4), "flat": draw(4, 4), "pooled": draw(4, 3)}
    mask = (np.arange(5) < np.array([[5], [2], [0], [4]])).astype(np.float64)
    return fn, params, {"x": draw(4, 5, 4), "mask": mask}


def test_an_attention_mask_reaches_every_operator():
    fn, params, batch = masked_network()
    halves = [jax.tree.map(lambda x: x[:2], batch), jax.tree.map(lambda x: x[2:], batch)]
    found = capture(fn, params, halves, weights=lambda b: b["mask"], means=True)
    total = dict.fromkeys(params, 0.0)
    count = dict(total)
    for b in halves:
        for x, mask in zip(b["x"], b["mask"], strict=True):
            heads = np.einsum("td,dhk->thk", x, params["split"]).reshape(5, 6)
            joined = np.tanh(heads @ params["join"].reshape(6, 4))
            pooled = np.tanh(joined @ params["flat"]).sum(axis=0)
            for name, rows in {"split": x, "join": heads, "flat": joined}.items():
                for row, w in zip(rows, mask, strict=True):
                    total[name], count[name] = total[name] + w * np.outer(row, row), count[name] + w
            any_token = mask.max()
            total["pooled"] = total["pooled"] + any_token * np.outer(pooled, pooled)
            count["pooled"] += any_token
    for name in params:
        assert found[name].count == count[name]
        np.testing.assert_allclose(found[name].gram[0], total[name] / count[name], **EXACT)


@pytest.mark.parametrize("kind", ["tokens", "rows"])
def test_weights_on_experts(kind):
    case = {"tokens": experts, "rows": ragged}[kind]()
    weights = lambda b: np.arange(1.0, 8.0) if kind == "rows" else 1.0 + np.arange(b[..., 0].size).reshape(b.shape[:2])  # noqa: E731
    found = capture(case.fn, case.params, case.batches, weights=weights)["w"]
    each: list[Any] = [[], [], []]
    for b in case.batches:
        w = weights(b)
        ends = np.cumsum(b["sizes"]) if kind == "rows" else None
        for e in range(3):
            each[e] += list(w[e] if ends is None else w[ends[e] - b["sizes"][e] : ends[e]])
    count, gram = grams(joined(case, case.rows, case.batches)["w"], [np.asarray(e) for e in each])
    np.testing.assert_allclose(found.count, count, **EXACT)
    np.testing.assert_allclose(found.gram, gram, **EXACT)


def test_an_expert_without_rows_has_a_gram_of_zeros():
    case = ragged()
    found = capture(case.fn, case.params, case.batches[1:], means=True)["w"]
    assert found.count.tolist() == [5, 0, 2]
    assert not np.any(found.gram[1])
    assert np.all(np.isfinite(found.mean))


def test_inputs_of_zeros_are_normal():
    case = dense()
    found = capture(case.fn, case.params, [np.zeros((3, 4))], means=True, activations=True)
    assert not np.any(found["a"].gram)
    assert np.all(found["a"].zeros == 1)
    assert np.all(found["a"].unit_variance == 0)


@pytest.mark.parametrize("shape", [(2,), (5,), (3, 4)])
def test_weights_that_fit_no_position(shape):
    case = dense()
    with pytest.raises(
        ValueError, match=r"weights have shape \(.*\), with which no array of the batch begins \(\[\(4, 4\)\]\); pass"
    ):
        capture(case.fn, case.params, case.batches, weights=lambda b: np.ones(shape))


# ----------------------------------------------------------------------------------------------- output gradients


def relu_network(params, batch):
    """Half the hidden units are at exactly zero, where jax.nn.relu has slope 0 and the plain maximum 1/2."""
    x, y = batch
    h = jax.nn.relu(x @ params["a"])
    return 0.5 * jnp.mean(jnp.sum((h @ params["b"] - y) ** 2, axis=-1))


def test_output_gradients_with_relu_at_exact_zeros():
    params = {"a": np.concatenate([draw(4, 3), np.zeros((4, 3))], axis=1), "b": draw(6, 2)}
    batches = [(draw(4, 4), draw(4, 2)), (draw(2, 4, seed=1), draw(2, 2, seed=1))]
    found = capture(relu_network, params, batches, gram=False, output_gradients=True)
    a, b = np.zeros((6, 6)), np.zeros((2, 2))
    for x, y in (pair for batch in batches for pair in zip(*batch, strict=True)):
        hidden = x @ params["a"]
        error = np.maximum(hidden, 0) @ params["b"] - y
        back = np.where(hidden > 0, params["b"] @ error, 0)
        a, b = a + np.outer(back, back) / 6, b + np.outer(error, error) / 6
    np.testing.assert_allclose(found["a"].output_gradient[0], a, **EXACT)
    np.testing.assert_allclose(found["b"].output_gradient[0], b, **EXACT)
    assert not np.any(a[3:])  # a slope of 1/2 at zero would show here


def mixed_network(params, bump, x):
    """A convolution, heads and tied weights; bump: what is added to each operator's output."""
    x = lax.conv_general_dilated(x, params["conv"], (2, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))
    x = jnp.tanh(x + bump["conv"])
    x = jnp.tanh(jnp.einsum("bhwc,cgk->bgkhw", x, params["heads"]) + bump["heads"])
    x = jnp.tanh(jnp.einsum("bgkhw,gkd->bd", x, params["join"]) + bump["join"])
    x = jnp.tanh(x @ params["tied"] + bump["tied1"]) @ params["tied"] + bump["tied2"]
    return jnp.mean(jnp.sum(x**4, axis=-1))


@pytest.mark.slow
def test_output_gradients_against_plain_autodiff():
    params = {"conv": draw(2, 2, 3, 4), "heads": draw(4, 2, 3), "join": draw(2, 3, 5), "tied": draw(5, 5)}
    shapes = {"conv": (2, 4, 4), "heads": (2, 3, 2, 4), "join": (5,), "tied1": (5,), "tied2": (5,)}
    none = {name: np.zeros((1, *shape)) for name, shape in shapes.items()}
    x = draw(4, 4, 4, 3)
    found = capture(
        lambda p, x: mixed_network(p, dict.fromkeys(shapes, 0.0), x), params, [x[:2], x[2:]], output_gradients=True
    )
    slopes = jax.jit(jax.grad(mixed_network, argnums=1))
    rows: dict[str, list] = {name: [] for name in params}
    for example in x:
        g = {k: np.asarray(v)[0] for k, v in slopes(params, none, example[None]).items()}
        rows["conv"] += list(g["conv"].reshape(-1, 4))
        rows["heads"] += list(np.moveaxis(g["heads"], (0, 1), (2, 3)).reshape(-1, 6))
        rows["join"] += [g["join"]]
        rows["tied"] += [g["tied1"], g["tied2"]]
    for name, gradients in rows.items():
        np.testing.assert_allclose(found[name].output_gradient[0], grams([np.asarray(gradients)])[1][0], **EXACT)


def test_output_gradients_need_a_loss():
    case = dense()
    with pytest.raises(ValueError, match=r"output_gradients=True needs a loss: fn\(params, batch\) -> one number"):
        capture(case.fn, case.params, case.batches, output_gradients=True)
