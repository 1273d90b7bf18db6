"""What is read in any function: a table of networks, and the way from a leaf to its matrix and back.

To add a network, write a builder of (fn, params, batch) and say above it what must be read.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.extend.core import primitives
from jax.sharding import AxisType, PartitionSpec

from paper_reproductions.networks import resnet20, stories
from pruneopt.capture.statistics import capture
from pruneopt.structure.graph import Graph, trace

Shape = tuple[int, int, int, int]  # problems, n_in, n_out, uses
SQUARE: Shape = (1, 4, 4, 1)


def draw(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(sum(shape) + seed).normal(size=shape)


@dataclass(eq=False)
class Network:
    """operators: {name: shape}. refused: {paths: words of the reason}. lookups: {paths: (picked, rows)}."""

    build: Callable[[], tuple[Callable[[Any, Any], Any], Any, Any]]
    operators: dict[str, Shape]
    refused: dict[tuple[str, ...], str] = field(default_factory=dict)
    lookups: dict[tuple[str, ...], tuple[int, int]] = field(default_factory=dict)
    others: tuple[str, ...] = ()

    @functools.cached_property
    def read(self) -> tuple[Graph, Any]:
        fn, params, batch = self.build()
        return trace(fn, params, batch), params


NETWORKS: dict[str, Network] = {}
FRAMEWORKS: dict[str, Network] = {}


def reads(operators: dict[str, Shape], table: dict[str, Network] = NETWORKS, **expected: Any) -> Callable[[Any], Any]:
    """Enter a builder of (fn, params, batch) into the table."""

    def enter(build: Callable[[], Any]) -> Callable[[], Any]:
        table[build.__name__.strip("_").replace("_", "-")] = Network(build, operators, **expected)
        return build

    return enter


X = draw(3, 4)
W = draw(4, 4, seed=1)
STACK = draw(3, 4, 4)

# ------------------------------------------------------------------------------------------------- plain layers


@reads({"a": SQUARE, "b": (1, 4, 6, 1)})
def mlp():
    return lambda p, x: jnp.tanh(x @ p["a"] + p["bias"]) @ p["b"], {"a": W, "b": draw(4, 6), "bias": draw(1, 4)}, X


@reads({"layers/0/w": SQUARE, "layers/1/w": SQUARE})
def list_of_layers():
    def fn(p, x):
        for layer in p["layers"]:
            x = jnp.tanh(x @ layer["w"])
        return {"loss": x.sum(), "steps": 3}

    return fn, {"layers": [{"w": W}, {"w": draw(4, 4, seed=2)}], "unused": None}, X


@reads({"w": SQUARE})
def transposed_leaf():
    return lambda p, x: x @ p["w"].T, {"w": W}, X


@reads({"w": SQUARE})
def leaf_on_the_left():
    return lambda p, x: (p["w"] @ x.T).T, {"w": W}, X


@reads({"w": (1, 6, 4, 1)})
def reshaped_leaf():
    return lambda p, x: jnp.concatenate([x, x[:, :2]], 1) @ p["w"].reshape(6, 4), {"w": draw(2, 3, 4)}, X


@reads({"qkv[:, 0:4]": SQUARE, "qkv[:, 4:8]": SQUARE, "qkv[:, 8:12]": SQUARE})
def fused_qkv_split():
    def fn(p, x):
        q, k, v = jnp.split(p["qkv"], 3, axis=1)
        return jax.nn.softmax((x @ q) @ (x @ k).T) @ (x @ v)

    return fn, {"qkv": draw(4, 12)}, X


@reads({"qkv[:, 0:4]": SQUARE, "qkv[:, 4:8]": SQUARE, "qkv[:, 8:12]": SQUARE})
def fused_qkv_sliced():
    def fn(p, x):
        q, k, v = (x @ p["qkv"][:, i : i + 4] for i in (0, 4, 8))
        return jax.nn.softmax(q @ k.T) @ v

    return fn, {"qkv": draw(4, 12)}, X


@reads({"w[:, 0:8:2]": SQUARE, "w[:, 1:8:2]": SQUARE})
def interleaved_columns():
    return lambda p, x: (x @ p["w"][:, ::2]) * (x @ p["w"][:, 1::2]), {"w": draw(4, 8)}, X


@reads({"w[0:2]": (1, 2, 4, 1), "w[0:2] (2)": (1, 2, 4, 1)})
def equal_names_of_different_parts():
    return lambda p, x: x[:, :2] @ p["w"][0:2] + x[:, 2:] @ p["w"][::-1][0:2], {"w": W}, X


@reads({"q + k + v": (1, 4, 12, 1)})
def concatenated_leaves():
    def fn(p, x):
        q, k, v = jnp.split(x @ jnp.concatenate([p["q"], p["k"], p["v"]], axis=1), 3, axis=1)
        return jax.nn.softmax(q @ k.T) @ v

    return fn, {name: draw(4, 4, seed=i) for i, name in enumerate("qkv")}, X


@reads({"a + b": (2, 4, 4, 1)})
def stacked_leaves():
    def fn(p, x):
        return jnp.einsum("pbi,pio->pbo", x, jnp.stack([p["a"], p["b"]]))

    return fn, {"a": W, "b": draw(4, 4, seed=2)}, draw(2, 3, 4)


@reads({"w[0]": SQUARE, "w[1]": SQUARE, "w[2]": SQUARE})
def unstacked_leaf():
    def fn(p, x):
        for w in jnp.unstack(p["w"]):
            x = jnp.tanh(x @ w)
        return x

    return fn, {"w": STACK}, X


@reads({"w[:, 0]": SQUARE, "w[:, 1]": SQUARE})
def unstacked_along_another_axis():
    def fn(p, x):
        first, second = jnp.unstack(p["w"], axis=1)
        return jnp.tanh(x @ first) @ second

    return fn, {"w": draw(4, 2, 4)}, X


@reads({}, refused={("w",): "computed from w by tile"})
def tiled_leaf():
    return lambda p, x: x @ jnp.tile(p["w"], (1, 2)), {"w": W}, X


@reads({"w": SQUARE})
def swapped_halves():
    return lambda p, x: x @ jnp.concatenate([p["w"][2:], p["w"][:2]]), {"w": W}, X


NETWORKS["swapped-halves"].operators = {"w[0:2][2:4]": SQUARE}


@reads({}, refused={("w",): "its matrix holds the same weight in several places"})
def joined_with_itself():
    return lambda p, x: x @ jnp.concatenate([p["w"], p["w"]], axis=1), {"w": W}, X


@reads({"w": SQUARE}, others=())
def masked():
    params = {"w": W, "mask": (draw(4, 4) > 0).astype(np.float64)}
    return lambda p, x: x @ (p["w"] * p["mask"]), params, X


@reads({"w": SQUARE})
def masked_by_choice():
    return lambda p, x: x @ jnp.where(p["mask"], p["w"], 0.0), {"w": W, "mask": draw(4, 4) > 0}, X


@reads({"w": SQUARE})
def scaled():
    params = {"w": W, "gain": np.array([[2.0, 0.5, 4.0, 1.0]])}
    return lambda p, x: x @ (-p["w"] * p["gain"] / 2.0), params, X


@reads({"w": SQUARE, "b": SQUARE})
def cast():
    def fn(p, x):
        return (x.astype(jnp.bfloat16) @ p["w"].astype(jnp.bfloat16)).astype(x.dtype) @ p["b"]

    return fn, {"w": W, "b": W}, X


@reads({}, refused={("w",): "scaled by a function of 'w' itself, as weight normalisation does"})
def weight_norm():
    def fn(p, x):
        return x @ (p["w"] / jnp.linalg.norm(p["w"], axis=0, keepdims=True))

    return fn, {"w": W}, X


@reads({}, refused={("a", "b"): "computed from a, b by dot_general"})
def low_rank():
    return lambda p, x: x @ (p["a"] @ p["b"]), {"a": draw(4, 2), "b": draw(2, 4)}, X


@reads({"w": SQUARE, "a": (1, 4, 2, 1), "b": (1, 2, 4, 1)})
def lora_beside():
    params = {"w": W, "a": draw(4, 2), "b": draw(2, 4)}
    return lambda p, x: x @ p["w"] + (x @ p["a"]) @ p["b"], params, X


@reads({}, refused={("w",): "by tanh"})
def squashed_weights():
    return lambda p, x: x @ jnp.tanh(p["w"]), {"w": W}, X


@reads({}, refused={("a", "b"): "mul joins a, b: neither is the scale of the other"})
def product_of_two_leaves():
    return lambda p, x: x @ (p["a"] * p["b"]), {"a": W, "b": draw(4, 4, seed=2)}, X


@reads({}, refused={("w", "mask"): "puts something other than zero in place of the weights"})
def filled_with_ones():
    return lambda p, x: x @ jnp.where(p["mask"], p["w"], 1.0), {"w": W, "mask": draw(4, 4) > 0}, X


@reads({}, refused={("scale", "w"): "leaf 'w' is int8, not floating point"})
def int8():
    params = {"w": np.arange(16, dtype=np.int8).reshape(4, 4), "scale": draw(1, 4)}
    return lambda p, x: x @ (p["w"].astype(x.dtype) * p["scale"]), params, X


@reads({"b": SQUARE}, refused={(): r"its weights \(4x4\) are closed over by fn; pass them as a leaf of params"})
def closed_over():
    fixed = jnp.asarray(draw(4, 4), float)
    return lambda p, x: jnp.tanh(x @ fixed) @ p["b"], {"b": W}, X


@reads({}, refused={("w",): "the other side is a constant, no input"})
def constant_input():
    return lambda p, x: x + jnp.ones((3, 4)) @ p["w"], {"w": W}, X


# ------------------------------------------------------------------------------------------- one leaf, many uses


@reads({"w": (1, 4, 4, 2)})
def tied():
    return lambda p, x: jnp.tanh(x @ p["w"]) @ p["w"], {"w": W}, X


@reads({}, refused={("w",): "in different arrangements: no single Gram"})
def tied_the_other_way_round():
    return lambda p, x: jnp.tanh(x @ p["w"]) @ p["w"].T, {"w": W}, X


@reads({"w[0:2]": (1, 2, 4, 1), "b": SQUARE}, refused={("w",): "in different arrangements"})
def overlapping_slices():
    def fn(p, x):
        return jnp.tanh(x @ p["b"])[:, :2] @ p["w"][:2] + x[:, :2] @ p["w"][1:3]

    return fn, {"w": W, "b": W}, X


NETWORKS["overlapping-slices"].operators = {"b": SQUARE}


@reads({"table": (1, 4, 5, 1)}, lookups={("table",): (3, 5)})
def tied_embedding():
    return lambda p, ids: jnp.tanh(p["table"][ids]) @ p["table"].T, {"table": draw(5, 4)}, np.array([0, 4, 2])


@reads({"w": SQUARE}, lookups={("table",): (6, 5)}, others=("position",))
def embedding():
    def fn(p, ids):
        return (p["table"][ids] + p["position"][None]) @ p["w"]

    return fn, {"table": draw(5, 4), "position": draw(2, 4), "w": W}, np.array([[0, 4], [2, 2], [1, 1]])


@reads({"w": SQUARE}, lookups={("table",): (3, 5)})
def embedding_by_columns():
    return (
        lambda p, ids: jnp.take(p["table"], ids, axis=1).T @ p["w"],
        {"table": draw(4, 5), "w": W},
        np.array([0, 4, 2]),
    )


@reads({"w": SQUARE}, others=("scores",))
def leaf_that_is_only_added():
    return lambda p, x: x @ p["w"] + p["scores"], {"w": W, "scores": draw(3, 4)}, X


# --------------------------------------------------------------------------------------------------------- axes


@reads({"w": (1, 6, 4, 1)})
def two_contracted_axes():
    return lambda p, x: jnp.einsum("bthk,hkd->btd", x, p["w"]), {"w": draw(2, 3, 4)}, draw(3, 5, 2, 3)


@reads({"w": (1, 4, 6, 1)})
def two_output_axes():
    return lambda p, x: jnp.einsum("bd,dhk->bhk", x, p["w"]), {"w": draw(4, 2, 3)}, X


@reads({"w": (3, 4, 4, 1)})
def batched_experts():
    return lambda p, x: jnp.einsum("ecd,edf->ecf", x, p["w"]), {"w": STACK}, draw(3, 2, 4)


@reads({"w": (3, 4, 4, 1)})
def vmapped_weight_on_the_left():
    return lambda p, x: jax.vmap(lambda w, x: jnp.einsum("oi,bi->bo", w, x))(p["w"], x), {"w": STACK}, draw(3, 2, 4)


@reads({"w": (1, 4, 12, 1)})
def vmapped_over_one_input():
    """Weights that share an input are one wide matrix."""
    return lambda p, x: jax.vmap(lambda w: (w @ x.T).T)(p["w"]), {"w": STACK}, X


@reads({"w": SQUARE})
def vmapped_over_examples():
    return lambda p, x: jax.vmap(lambda row: p["w"] @ row)(x), {"w": W}, X


@reads({"w": SQUARE})
def broadcast_over_the_batch():
    def fn(p, x):
        return jnp.einsum("btd,bdf->btf", x, jnp.broadcast_to(p["w"], (3, 4, 4)))

    return fn, {"w": W}, draw(3, 2, 4)


@reads({"a + b": (1, 4, 6, 1)})
def joined_and_then_broadcast():
    def fn(p, x):
        a, b = (jnp.broadcast_to(p[n], (3, *p[n].shape)) for n in "ab")
        return jnp.einsum("btd,bdf->btf", x, jnp.concatenate([a, b], axis=2))

    return fn, {"a": W, "b": draw(4, 2)}, draw(3, 2, 4)


@reads(
    {}, refused={("a", "b"): "some of its entries are repeated by broadcasting, then joined with others by concatenate"}
)
def partly_broadcast():
    def fn(p, x):
        return jnp.einsum("btd,bdf->btf", x, jnp.concatenate([jnp.broadcast_to(p["a"], (3, 4, 4)), p["b"]], axis=2))

    return fn, {"a": W, "b": draw(3, 4, 2)}, draw(3, 2, 4)


@reads({}, refused={("w",): "repeated by broadcasting, then go through reshape"})
def broadcast_and_then_reshaped():
    return lambda p, x: x @ jnp.broadcast_to(p["w"], (2, 4, 4)).reshape(4, 8), {"w": W}, X


@reads({"w": (1, 18, 4, 1), "grouped": (2, 2, 3, 1), "depthwise": (6, 4, 1, 1)})
def convolutions():
    def fn(p, x):
        conv = partial(lax.conv_general_dilated, dimension_numbers=("NHWC", "HWIO", "NHWC"))
        x = conv(x, p["w"], (1, 1), "SAME")
        x = conv(x, p["grouped"], (2, 2), "VALID", feature_group_count=2)
        return conv(x, p["depthwise"], (1, 1), "SAME", feature_group_count=6)

    return fn, {"w": draw(3, 3, 2, 4), "grouped": draw(1, 1, 2, 6), "depthwise": draw(2, 2, 1, 6)}, draw(2, 4, 4, 2)


@reads({}, refused={("w",): "it is the image of a convolution, not the kernel"})
def leaf_as_an_image():
    def fn(p, x):
        return lax.conv_general_dilated(p["w"], x, (1, 1), "VALID", dimension_numbers=("NHWC", "HWIO", "NHWC"))

    return fn, {"w": draw(1, 4, 4, 2)}, draw(2, 2, 2, 3)


# -------------------------------------------------------------------------------------------- calls and branches


def called(wrap: Callable[[Any], Any]) -> Callable[[], Any]:
    def build():
        return lambda p, x: wrap(lambda w, x: jnp.tanh(x @ w))(p["a"], x) @ p["b"], {"a": W, "b": W}, X

    return build


def custom_jvp(layer):
    wrapped = jax.custom_jvp(layer)
    wrapped.defjvp(lambda primals, tangents: (layer(*primals), layer(*primals)))
    return wrapped


def custom_vjp(layer):
    wrapped = jax.custom_vjp(layer)
    wrapped.defvjp(lambda w, x: (layer(w, x), (w, x)), lambda kept, g: kept)
    return wrapped


def custom_vmap(layer):
    wrapped = jax.custom_batching.custom_vmap(layer)
    wrapped.def_vmap(lambda size, batched, w, x: (layer(w, x), True))
    return wrapped


def closed_call(layer):
    def call(w, x):
        bound = primitives.closed_call_p.get_bind_params({"call_jaxpr": jax.make_jaxpr(layer)(w, x)})
        return primitives.closed_call_p.bind(w, x, **bound)[0]

    return call


def sharded(layer, **options):
    mesh = jax.make_mesh((1,), ("i",), axis_types=(AxisType.Auto,))

    def shard(w, x):
        y = layer(w, x)
        return y + 0 * lax.psum(y, "i") + lax.axis_index("i").astype(y.dtype)

    rows = PartitionSpec("i")
    return jax.shard_map(shard, mesh=mesh, in_specs=(PartitionSpec(), rows), out_specs=rows, **options)


WRAPPED = {
    "jit": jax.jit,
    "nested-jit": lambda layer: jax.jit(jax.jit(layer)),
    "custom-jvp": custom_jvp,
    "custom-vjp": custom_vjp,
    "custom-vmap": custom_vmap,
    "closed-call": closed_call,
    "composite": lambda layer: lax.composite(layer, "my.layer"),
    "remat": jax.checkpoint,
    "remat-of-jit": lambda layer: jax.checkpoint(jax.jit(layer), policy=jax.checkpoint_policies.dots_saveable),
    "barrier": lambda layer: lambda w, x: layer(*lax.optimization_barrier((w, x))),
    "shard-map": sharded,
    "shard-map-unchecked": partial(sharded, check_vma=False),
    "jit-of-shard-map": lambda layer: jax.jit(sharded(layer)),
    "cond-constant": lambda layer: lambda w, x: lax.cond(True, layer, lambda w, x: x, w, x),
    "switch-constant": lambda layer: lambda w, x: lax.switch(1, [lambda w, x: x, layer], w, x),
}
for name, wrap in WRAPPED.items():
    NETWORKS[name] = Network(called(wrap), {"a": SQUARE, "b": SQUARE})


@reads({"w": SQUARE}, refused={("hidden",): "inside a cond, whose branch depends on data"})
def cond_on_data():
    def fn(p, x):
        return lax.cond(x[0, 0] > 0, lambda x: x @ p["hidden"], lambda x: x, x) @ p["w"]

    return fn, {"w": W, "hidden": W}, X


@reads({"w": SQUARE}, refused={("hidden",): "inside a while loop, whose number of steps depends on the data"})
def while_loop():
    def fn(p, x):
        return lax.while_loop(lambda x: jnp.sum(x * x) > 1, lambda x: jnp.tanh(x @ p["hidden"]), x) @ p["w"]

    return fn, {"w": W, "hidden": W}, X


@reads(
    {"w": SQUARE}, refused={("hidden",): "a shard_map over several devices, or one with a collective that has no rule"}
)
def shard_map_with_a_collective_without_a_rule():
    def fn(p, x):
        mesh = jax.make_mesh((1,), ("i",), axis_types=(AxisType.Auto,))
        inside = lambda w, x: jax.jit(lambda y: lax.ppermute(y, "i", [(0, 0)]))(x @ w)  # noqa: E731
        rows = PartitionSpec("i")
        shard = jax.shard_map(inside, mesh=mesh, in_specs=(PartitionSpec(), rows), out_specs=rows)
        return shard(p["hidden"], x) @ p["w"]

    return fn, {"w": W, "hidden": W}, X


@reads({"w[0]": SQUARE, "w[1]": SQUARE, "w[2]": SQUARE, "out": SQUARE})
def scanned():
    def fn(p, x):
        return lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, p["w"])[0] @ p["out"]

    return fn, {"w": STACK, "out": W}, X


@reads({f"w[{i}]": (1, 4, 4, 2) for i in (2, 1, 0)})
def scanned_twice_in_reverse():
    """Two views go through one stack: each layer's Grams add."""

    def fn(p, views):
        step = lambda x, w: (jnp.tanh(x @ w), x)  # noqa: E731
        return [lax.scan(step, x, p["w"], reverse=True) for x in views]

    return fn, {"w": STACK}, (X, 2 * X)


@reads({f"w[{i}]": SQUARE for i in range(3)})
def fori_over_stacked_weights():
    return lambda p, x: lax.fori_loop(0, 3, lambda i, x: jnp.tanh(x @ p["w"][i]), x), {"w": STACK}, X


@reads({"w": (1, 4, 4, 3)})
def shared_by_a_scan():
    def fn(p, x):
        return lax.scan(lambda x, _: (jnp.tanh(x @ p["w"]), None), x, None, length=3)[0]

    return fn, {"w": W}, X


@reads({"x": (1, 4, 4, 2), "h": (1, 4, 4, 2)})
def recurrent():
    """The state starts as zeros, which is an input like any other: three examples, two steps, two uses."""

    def fn(p, x):
        def step(h, x):
            return jnp.tanh(h @ p["h"] + x @ p["x"]), None

        return lax.scan(step, jnp.zeros((3, 4)), x)[0]

    return fn, {"h": W, "x": draw(4, 4)}, draw(2, 3, 4)


@reads({f"w[{i}][{j}]": SQUARE for i in range(2) for j in range(2)} | {"out": (1, 4, 4, 2)})
def nested_scan():
    def fn(p, x):
        inner = lambda x, w: (jnp.tanh(x @ w), None)  # noqa: E731
        outer = lambda x, w: (lax.scan(inner, x, w)[0] @ p["out"], None)  # noqa: E731
        return lax.scan(outer, x, p["w"])[0]

    return fn, {"w": draw(2, 2, 4, 4), "out": W}, X


@reads({f"w[{i}][:, {j}:{j + 4}]": SQUARE for i in range(2) for j in (0, 4)})
def fused_layers_of_a_stack():
    def fn(p, x):
        return lax.scan(lambda x, w: ((x @ w[:, :4]) * (x @ w[:, 4:]), None), x, p["w"])[0]

    return fn, {"w": draw(2, 4, 8)}, X


@reads({f"w[{i}]": SQUARE for i in range(3)})
def scan_over_remat_in_bf16():
    def fn(p, x):
        layer = jax.checkpoint(lambda x, w: (jnp.tanh(x @ w), None))
        return lax.scan(layer, x.astype(jnp.bfloat16), p["w"].astype(jnp.bfloat16))[0]

    return fn, {"w": STACK}, X


# ----------------------------------------------------------------------------------------------------- mixtures


@reads({"router": (1, 4, 3, 1), "up": (3, 4, 6, 1), "down": (3, 6, 4, 1)})
def mixture_of_experts_by_dispatch():
    def fn(p, x):
        chosen = jax.nn.one_hot(jnp.argmax(x @ p["router"], axis=-1), 3, dtype=x.dtype)
        slots = jnp.einsum("bd,be->ebd", x, chosen)
        hidden = jax.nn.relu(jnp.einsum("ebd,edf->ebf", slots, p["up"]))
        return jnp.einsum("ebd,be->bd", jnp.einsum("ebf,efd->ebd", hidden, p["down"]), chosen)

    return fn, {"router": draw(4, 3), "up": draw(3, 4, 6), "down": draw(3, 6, 4)}, X


@reads({"router": (1, 4, 3, 1), "up": (3, 4, 6, 1), "down": (3, 6, 4, 1)})
def mixture_of_experts_by_ragged_dot():
    def fn(p, x):
        expert = jnp.argmax(x @ p["router"], axis=-1)
        order, sizes = jnp.argsort(expert), jnp.bincount(expert, length=3).astype(jnp.int32)
        hidden = jax.nn.relu(lax.ragged_dot(x[order], p["up"], sizes))
        return lax.ragged_dot(hidden, p["down"], sizes)[jnp.argsort(order)]

    return fn, {"router": draw(4, 3), "up": draw(3, 4, 6), "down": draw(3, 6, 4)}, X


@reads({"router": (1, 4, 3, 1)}, refused={("up",): "its matrices are picked at indices from the data"})
def experts_gathered_by_the_data():
    def fn(p, x):
        return jnp.einsum("bd,bdf->bf", x, p["up"][jnp.argmax(x @ p["router"], axis=-1)])

    return fn, {"router": draw(4, 3), "up": draw(3, 4, 6)}, X


@reads({"w": SQUARE})
def random_keys_inside():
    """Keys have a dtype that NumPy does not know."""

    def fn(p, x):
        kept = jax.random.bernoulli(jax.random.key(0), 0.5, x.shape)
        return jnp.where(kept, x, 0.0) @ p["w"]

    return fn, {"w": W, "key": jax.random.key(1)}, X


# ------------------------------------------------------------------------------------------------------- the table


def check(network: Network) -> None:
    graph, _ = network.read
    assert {op.name: (op.problems, op.n_in, op.n_out, len(op.uses)) for op in graph.operators} == network.operators
    assert sorted(r.paths for r in graph.refusals) == sorted(network.refused)
    for refusal in graph.refusals:
        assert pytest.RaisesExc(Exception, match=network.refused[refusal.paths]).matches(Exception(refusal.reason))
        assert str(refusal) in " ".join(str(graph).split())
    assert {look.paths: (look.picked, look.rows) for look in graph.lookups} == network.lookups
    assert tuple(graph.others) == network.others
    for name in (*network.operators, *network.others):
        assert name.rsplit("/", 1)[-1] in str(graph)  # a long path is cut in front


def check_way_back(network: Network) -> None:
    """For one operator of each kind: leaf, matrix, leaf; masks and supports; a matrix put in is the matrix read."""
    graph, params = network.read
    kinds = {(network.operators[op.name], op.uses[0].form.weight_key, op.through): op for op in graph.operators}
    named = {
        jax.tree_util.keystr(k, simple=True, separator="/"): v for k, v in jax.tree_util.tree_leaves_with_path(params)
    }
    for i, op in enumerate(kinds.values()):
        matrix = op.to_matrix(named)
        assert matrix.shape == (op.problems, op.n_in, op.n_out)
        same = op.to_leaves(matrix, named)
        assert list(same) == list(op.paths)
        for path, leaf in same.items():
            assert leaf.dtype == named[path].dtype
            assert np.asarray(leaf).tobytes() == np.asarray(named[path]).tobytes()
        if i > 1:
            continue
        support = np.random.default_rng(i).random(matrix.shape) < 0.5
        masks = op.masks(jnp.asarray(support))
        np.testing.assert_array_equal(op.support(masks), support)
        part = {path: np.asarray(op.part_of(path)) for path in op.paths}
        assert sum(p.sum() for p in part.values()) == op.size
        assert all(np.all(np.asarray(masks[path])[~part[path]]) for path in op.paths)
        new = np.where(support, -2 * np.asarray(matrix), 0).astype(matrix.dtype)
        moved = op.to_leaves(jnp.asarray(new), named)
        scale = np.asarray(op.to_matrix({**named, **{p: np.ones_like(named[p]) for p in op.paths}}))
        np.testing.assert_array_equal(op.to_matrix({**named, **moved}), np.where(scale == 0, 0, new))
        for path in op.paths:
            np.testing.assert_array_equal(np.asarray(moved[path])[~part[path]], np.asarray(named[path])[~part[path]])


@pytest.mark.parametrize("name", NETWORKS)
def test_what_is_read(name):
    check(NETWORKS[name])


@pytest.mark.parametrize("name", [name for name, network in NETWORKS.items() if network.operators])
def test_to_the_matrix_and_back(name):
    check_way_back(NETWORKS[name])


# --------------------------------------------------------------------------------------------------- frameworks

KEY = jax.random.key(0, impl="unsafe_rbg")  # compiles fastest
IMAGES = draw(2, 8, 8, 2).astype(np.float32)
TOKENS = draw(2, 3, 8).astype(np.float32)
frameworks = partial(reads, table=FRAMEWORKS)


@frameworks(
    {
        "params/Conv_0/kernel": (1, 18, 4, 1),
        "params/Conv_1/kernel": (4, 9, 1, 1),
        "params/Dense_0/kernel": (1, 64, 4, 1),
    }
)
def linen_cnn():
    from flax import linen as nn

    class Net(nn.Module):
        @nn.compact
        def __call__(self, x):
            x = nn.relu(nn.BatchNorm(use_running_average=True)(nn.Conv(4, (3, 3), strides=2)(x)))
            x = nn.Conv(4, (3, 3), feature_group_count=4)(x)
            return nn.Dense(4)(x.reshape(x.shape[0], -1))

    net = Net()
    return net.apply, dict(jax.jit(net.init)(KEY, IMAGES)), IMAGES


HEADS = {
    f"params/MultiHeadDotProductAttention_0/{name}/kernel": (1, 8, 8, 1) for name in ("query", "key", "value", "out")
}


@frameworks(HEADS)
def linen_self_attention():
    from flax import linen as nn

    class Net(nn.Module):
        @nn.compact
        def __call__(self, x):
            return nn.MultiHeadDotProductAttention(2)(nn.LayerNorm()(x), mask=nn.make_causal_mask(x[..., 0]))

    net = Net()
    return net.apply, jax.jit(net.init)(KEY, TOKENS), TOKENS


@frameworks({f"layers/params/Dense_0/kernel[{i}]": (1, 8, 8, 1) for i in range(2)})
def linen_scan_over_layers():
    from flax import linen as nn

    class Block(nn.Module):
        @nn.compact
        def __call__(self, x, _):
            return nn.relu(nn.Dense(8)(x)), None

    stack = nn.scan(nn.remat(Block), variable_axes={"params": 0}, split_rngs={"params": True}, length=2)
    net = stack()
    variables = jax.jit(net.init)(KEY, TOKENS, None)
    return lambda p, x: net.apply(p["layers"], x, None)[0], {"layers": dict(variables)}, TOKENS


@frameworks(
    {"conv/kernel/value": (1, 18, 4, 1), "head/kernel/value": (1, 64, 4, 1)},
    lookups={("embed/embedding/value",): (128, 3)},
)
def nnx_cnn():
    from flax import nnx

    class Net(nnx.Module):
        def __init__(self, rngs):
            self.embed = nnx.Embed(3, 2, rngs=rngs)
            self.conv = nnx.Conv(2, 4, (3, 3), strides=2, rngs=rngs)
            self.drop = nnx.Dropout(0.1, deterministic=True, rngs=rngs)
            self.head = nnx.Linear(64, 4, rngs=rngs)

        def __call__(self, x):
            x = nnx.relu(self.conv(self.embed(x)))
            return self.head(self.drop(x.reshape(x.shape[0], -1)))

    graph, state = nnx.split(nnx.jit(lambda: Net(nnx.Rngs(KEY)))())
    return lambda p, x: nnx.merge(graph, p)(x), state, np.arange(128).reshape(2, 8, 8) % 3


@frameworks({"conv/weight": (1, 18, 4, 1), "mlp/layers/0/weight": (1, 64, 8, 1), "mlp/layers/1/weight": (1, 8, 4, 1)})
def equinox_cnn():
    import equinox as eqx

    class Net(eqx.Module):
        conv: eqx.nn.Conv2d
        drop: eqx.nn.Dropout
        mlp: eqx.nn.MLP

        def __init__(self, key):
            self.conv = eqx.nn.Conv2d(2, 4, 3, 2, 1, key=key)
            self.drop = eqx.nn.Dropout(0.1, inference=True)
            self.mlp = eqx.nn.MLP(64, 4, 8, 1, key=key)

        def __call__(self, x):
            return self.mlp(self.drop(jax.nn.relu(self.conv(jnp.moveaxis(x, -1, 0)))).ravel())

    return lambda net, x: jax.vmap(net)(x), eqx.filter_jit(Net)(KEY), IMAGES


@frameworks({f"{name}_proj/weight": (1, 8, 8, 1) for name in ("query", "key", "value", "output")})
def equinox_self_attention():
    import equinox as eqx

    net = eqx.nn.MultiheadAttention(2, 8, key=KEY)
    return lambda net, x: jax.vmap(lambda x: net(x, x, x))(x), net, TOKENS


def stateless(net):
    """(fn, params, batch) of a Keras model, params by variable path."""
    paths = [[v.path for v in kind] for kind in (net.trainable_variables, net.non_trainable_variables)]

    def fn(params, x):
        return net.stateless_call(*([params[path] for path in kind] for kind in paths), x, training=False)[0]

    return fn, {v.path: v.value for v in net.variables}, IMAGES


@frameworks({"net/conv/kernel": (1, 18, 4, 1), "net/depthwise/kernel": (4, 9, 2, 1), "net/head/kernel": (1, 128, 4, 1)})
def keras_sequential_cnn():
    import keras

    layers = [
        keras.Input((8, 8, 2)),
        keras.layers.Conv2D(4, 3, 2, "same", activation="relu", kernel_initializer="ones", name="conv"),
    ]
    layers += [
        keras.layers.DepthwiseConv2D(
            3, padding="same", depth_multiplier=2, depthwise_initializer="ones", name="depthwise"
        )
    ]
    layers += [keras.layers.BatchNormalization(), keras.layers.Flatten(), keras.layers.Dropout(0.1, seed=1)]
    return stateless(
        keras.Sequential([*layers, keras.layers.Dense(4, kernel_initializer="ones", name="head")], name="net")
    )


@frameworks({"left/kernel": (1, 8, 8, 1), "right/kernel": (1, 8, 8, 1), "head/kernel": (1, 8, 4, 2)})
def keras_functional():
    """Two branches that are added, and a head shared by two outputs."""
    import keras

    inputs = keras.Input((8, 8, 2))
    x = keras.layers.Reshape((16, 8))(inputs)
    left = keras.layers.Dense(8, "relu", name="left")(x)
    right = keras.layers.Dense(8, "gelu", name="right")(x)
    head = keras.layers.Dense(4, name="head")
    return stateless(keras.Model(inputs, [head(keras.layers.Add()([left, right])), head(left)]))


@frameworks({f"mlp/~/linear_{i}/w": (1, 8, 8, 1) for i in range(2)})
def haiku_style():
    """What hk.transform returns: apply(params, rng, x), params {module: {name: array}}."""

    def apply(params, rng, x):
        del rng
        for i in range(2):
            layer = params[f"mlp/~/linear_{i}"]
            x = jnp.dot(x, layer["w"]) + jnp.broadcast_to(layer["b"], x.shape)
        return x

    params = {f"mlp/~/linear_{i}": {"w": jnp.ones((8, 8)), "b": jnp.zeros(8)} for i in range(2)}
    return lambda p, x: apply(p, None, x), params, TOKENS


BLOCK = {"qkv": (1, 8, 24, 1), "out": (1, 8, 8, 1), "up": (1, 8, 16, 1), "down": (1, 16, 8, 1)}


@frameworks(
    {f"blocks/{name}[{i}]": shape for i in range(3) for name, shape in BLOCK.items()} | {"table": (1, 8, 11, 1)},
    lookups={("table",): (6, 11)},
    others=("position",),
)
def scanned_transformer():
    shapes = {"qkv": (8, 3, 2, 4), "out": (2, 4, 8), "up": (8, 16), "down": (16, 8), "scale": (8,)}
    params = {
        "blocks": {name: draw(3, *shape).astype(np.float32) for name, shape in shapes.items()},
        "table": draw(11, 8).astype(np.float32),
        "position": draw(3, 8).astype(np.float32),
    }

    @jax.checkpoint
    def block(x, p):
        h = p["scale"] * x * lax.rsqrt(jnp.mean(x * x, axis=-1, keepdims=True))
        q, k, v = jnp.moveaxis(jnp.einsum("btd,dchk->btchk", h, p["qkv"]), 2, 0)
        attended = jax.nn.dot_product_attention(q, k, v, is_causal=True)
        x = x + jnp.einsum("bthk,hkd->btd", attended, p["out"])
        return x + jax.nn.silu(x @ p["up"]) @ p["down"], None

    def fn(p, ids):
        x = lax.scan(block, p["table"][ids] + p["position"], p["blocks"])[0]
        return jax.nn.log_softmax(x @ p["table"].T)

    return fn, params, np.arange(6).reshape(2, 3)


@pytest.mark.slow
@pytest.mark.default_flags
@pytest.mark.parametrize("name", FRAMEWORKS)
def test_what_is_read_in_frameworks(name):
    check(FRAMEWORKS[name])
    check_way_back(FRAMEWORKS[name])


def paths_of(params, ndim):
    """{path: leaf} of leaves with so many axes."""
    leaves = jax.tree_util.tree_leaves_with_path(params)
    return {jax.tree_util.keystr(k, simple=True, separator="/"): v for k, v in leaves if v.ndim in ndim}


@pytest.mark.default_flags
@pytest.mark.parametrize(("checkpoint", "convolutions"), [("chita", 21), ("akamaster", 19)])
@pytest.mark.slow
def test_every_kernel_of_resnet20(folder, checkpoint, convolutions):
    params = getattr(resnet20, f"load_{checkpoint}")(folder)
    kernels = paths_of(params, (2, 4))
    assert len(kernels) == convolutions + 1
    shapes = {p: (1, int(np.prod(k.shape[:-1])), k.shape[-1], 1) for p, k in kernels.items()}
    network = Network(lambda: (resnet20.forward, params, np.zeros((2, 32, 32, 3), np.float32)), shapes)
    check(network)
    check_way_back(network)


@pytest.mark.default_flags
@pytest.mark.parametrize("kind", ["unrolled", "scanned"])
@pytest.mark.slow
def test_every_projection_of_stories(folder, kind):
    params = stories.load(folder)[0]
    shapes = {"embedding": (1, 64, 512, 1)}
    for path, leaf in paths_of(params["layers"], (2,)).items():
        layer, name = path.split("/")
        shapes[f"layers/{path}" if kind == "unrolled" else f"layers/{name}[{layer}]"] = (1, *leaf.shape, 1)
    assert len(shapes) == 1 + 5 * 7
    if kind == "scanned":
        params = stories.stacked(params)
    fn = stories.forward if kind == "unrolled" else stories.forward_scanned
    ids = np.arange(12, dtype=np.int32).reshape(2, 6)
    network = Network(lambda: (fn, params, ids), shapes, lookups={("embedding",): (12, 512)})
    check(network)
    check_way_back(network)


# ---------------------------------------------------------------------------------------------------- bad input

kept: list[Any] = []


def keeps_a_tracer(p, x):
    kept.append(x @ p["w"])
    return sum(kept)


def counts_its_calls(p, x):
    kept.append(1.0)
    return (x @ p["w"]) * float(len(kept))


def draws_with_numpy(p, x):
    return (x @ p["w"]) * np.random.default_rng().random((3, 4))


def grows(p, x):
    kept.append(None)
    for _ in kept:
        x = x @ p["w"]
    return x


TRACED = "fn is not traceable: it turns an array into a Python number or a NumPy array, or branches on its value; use "
BAD_FUNCTIONS = {
    "branches": (lambda p, x: x @ p["w"] if x.sum() > 0 else x, TRACED),
    "numpy": (lambda p, x: np.asarray(x) @ p["w"], TRACED),
    "numpy-function": (lambda p, x: np.tanh(x @ p["w"]), TRACED),
    "float": (lambda p, x: x @ p["w"] * float(x[0, 0]), TRACED),
    "range": (lambda p, x: [x @ p["w"] for _ in range(jnp.argmax(x))], TRACED),
    "item": (lambda p, x: x @ p["w"] * x[0, 0].item(), TRACED),
    "boolean-index": (lambda p, x: x[x[:, 0] > 0] @ p["w"], TRACED),
    "none": (lambda p, x: None, "fn returns None, no array; return the network's outputs or its loss"),
    "number": (lambda p, x: {"loss": 1.0}, "fn returns {'loss': 1.0}, no array; return"),
    "keeps-a-tracer": (keeps_a_tracer, "fn is not a pure function: it keeps an array from an earlier call; compute"),
    "counts": (counts_its_calls, "fn is not a pure function: two traces of it differ; it must depend on"),
    "draws": (draws_with_numpy, "fn is not a pure function: two traces of it differ; it must depend on"),
    "grows": (grows, "fn is not a pure function: two traces of it differ; it must depend on"),
}


@pytest.mark.parametrize("name", BAD_FUNCTIONS)
def test_functions_that_cannot_be_read(name):
    fn, message = BAD_FUNCTIONS[name]
    kept.clear()
    with pytest.raises(ValueError, match=re.escape(message)) as caught:
        trace(fn, {"w": W}, X)
    assert "\n" not in str(caught.value)


def test_fn_that_is_no_function():
    with pytest.raises(TypeError, match=re.escape("fn is 3; pass a function fn(params, batch) -> arrays")):
        trace(3, {"w": W}, X)


def plain(p, x):
    return jnp.tanh(x @ p["kernel"]) @ p["other"] + p["scores"] + p["table"][jnp.argmax(x, axis=1)]


PLAIN = {"kernel": W, "other": W, "scores": draw(3, 4), "table": draw(4, 4), "spare": W, "bias": np.zeros(4)}
UNREAD = {
    "scores": "'scores': it meets data in add alone, no product",
    "table": "'table': it is an embedding look-up: its rows are picked, not multiplied",
    "spare": "'spare': fn does not use it",
    "kerne": "leaves: 'kerne' matches no leaf; the paths are ['kernel',",
}


@pytest.mark.parametrize("leaf", UNREAD)
def test_leaves_that_no_operator_reads(leaf):
    with pytest.raises(ValueError, match=re.escape(UNREAD[leaf])):
        capture(plain, PLAIN, [X], leaves=leaf)


def test_leaves_that_are_refused_or_read_together():
    refused = lambda p, x: x @ p["w"] + x @ (p["a"] @ p["b"])  # noqa: E731
    params = {"w": W, "a": W, "b": W}
    assert list(capture(refused, params, [X])) == ["w"]
    words = "no operator can be captured for 'a': dot_general: its weights are computed from a, b by dot_general"
    with pytest.raises(ValueError, match=re.escape(words)):
        capture(refused, params, [X], leaves="a")
    joined = lambda p, x: x @ jnp.concatenate([p["a"], p["b"]], axis=1)  # noqa: E731
    with pytest.raises(ValueError, match=re.escape("it is read together with others, as 'a + b'; choose all of them")):
        capture(joined, params, [X], leaves="a")
    assert list(capture(joined, params, [X], leaves=["a", "b"])) == ["a + b"]


def test_the_operator_of_a_name():
    graph = trace(plain, PLAIN, X)
    assert graph.operator("kernel").paths == ("kernel",)
    words = "'kernels' is no operator; there are ['kernel', 'other']"
    with pytest.raises(ValueError, match=re.escape(words)):
        graph.operator("kernels")
    assert graph.why_not("kernal").startswith("params has no such array; there are ['kernel', ")
    assert graph.why_not("scores") == "it meets data in add alone, no product"


def test_batches_of_another_structure():
    with pytest.raises(
        ValueError, match=r"batches: batch 1 has structure .*, batch 0 has .*; give all batches the same"
    ):
        capture(lambda p, b: b["x"] @ p["w"], {"w": W}, [{"x": X}, {"x": X, "y": X}])


def test_batches_of_another_width():
    with pytest.raises(TypeError, match=r"pruneopt called fn on batch 1 of batches"):
        capture(lambda p, x: x @ p["w"], {"w": W}, [X, X[:, :3]])


def test_a_function_that_differs_between_batch_sizes():
    def fn(p, x):
        return x @ p["a"] @ p["b"] if len(x) == 3 else x @ p["b"]

    words = (
        r"fn multiplies \['b'\] for a batch of shapes \[\(2, 4\)\] and \['a', 'b'\] for the first batch; it must be one"
    )
    with pytest.raises(ValueError, match=words):
        capture(fn, {"a": W, "b": W}, [X, X[:2]])


def test_leaves_of_a_wrong_shape():
    """The shapes are JAX's own words: fn itself cannot be called."""
    with pytest.raises((TypeError, ValueError), match=r"contracting dimensions|incompatible"):
        trace(lambda p, x: x @ p["w"], {"w": draw(5, 4)}, X)


def test_a_graph_prints_one_short_line_an_operator_and_counts_the_rest():
    names = [f"decoder/block_{i:02}/attention/projection/kernel" for i in range(50)]
    params = dict.fromkeys(names, W) | {"scale": W, "table": W}

    def fn(p, x):
        for name in names:
            x = x @ p[name]
        joined = sum(p[name] for name in names) * p["scale"]
        return lax.cond(x[0, 0] > 0, lambda x: x @ joined, lambda x: x, x) @ p["table"]

    graph = trace(fn, params, X)
    lines = str(graph).splitlines()
    assert max(map(len, lines)) <= 120
    assert len(str(graph)) < 5000
    assert [line.split()[0][:15] for line in lines[1:3]] == ["decoder/block_0", "decoder/block_0"]
    assert lines[1].split()[1:] == ["dot", "4", "x", "4", "1", "1", "0.000", "16"]
    assert "and 11 more operators" in lines
    (refusal,) = [line for line in lines if line.startswith("not read: ")]
    assert refusal.startswith("not read: cond of decoder/block_00")
    assert "and 47 more: it stands inside a cond" in " ".join(map(str.strip, lines))
    assert repr(graph) == "Graph(51 operators, 1 refusal, 0.005 MFLOPs)"
    assert (
        repr(graph.operators[0]) == "Operator(decoder/block_00/a.../projection/kernel: dot, 4 x 4, 1 use, 0.000 MFLOPs)"
    )


def test_several_problems_print_as_such():
    graph = trace(lambda p, x: jnp.einsum("kni,kij->knj", x, p["e"]), {"e": np.stack([W] * 3)}, np.stack([X] * 3))
    assert repr(graph.operators[0]) == "Operator(e: dot, 3 problems of 4 x 4, 1 use, 0.000 MFLOPs)"
    assert str(graph.operators[0]) == repr(graph.operators[0])


def test_a_loop_that_multiplies_activations_alone_refuses_no_leaf_before_it():
    def fn(p, x):
        a, b, c = jax.nn.sigmoid(x @ p["wa"])[0], (x @ p["wb"])[0], (x @ p["wc"])[0]

        def step(h):
            h = a[:, None] * h + b[:, None] * c[None]
            return h + (h @ c)[:, None] + (p["inside"] @ a)[:, None] if "inside" in p else h + (h @ c)[:, None]

        return lax.while_loop(lambda h: h.sum() < 9.0, step, jnp.zeros((8, 4))).sum(1) @ p["out"]

    shapes = {"wa": (3, 8), "wb": (3, 8), "wc": (3, 4), "out": (8, 2)}
    params, x = {name: jnp.ones(shape) for name, shape in shapes.items()}, jnp.ones((5, 3))
    found = trace(fn, params, x)
    assert not found.refusals
    assert {op.paths for op in found.operators} == {(name,) for name in shapes}
    (refusal,) = trace(fn, {**params, "inside": jnp.ones((8, 8))}, x).refusals
    assert refusal.paths == ("inside",)
