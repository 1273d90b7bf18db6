"""What is read in any function: a table of networks, and the way from a leaf to its matrix and back.

To add a network, write a builder of (fn, params, batch) and say above it what must be read.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.sharding import AxisType, PartitionSpec

from pruneopt.structure.capture import capture
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
        return jnp.einsum("bi,pio->pbo", x, jnp.stack([p["a"], p["b"]]))

    return fn, {"a": W, "b": draw(4, 4, seed=2)}, X


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
    from jax._src import core

    def call(w, x):
        return core.call_p.bind(w, x, call_jaxpr=jax.make_jaxpr(layer)(w, x).jaxpr)[0]

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
        assert str(refusal) in str(graph)
    assert {look.paths: (look.picked, look.rows) for look in graph.lookups} == network.lookups
    assert tuple(graph.others) == network.others
    for name in (*network.operators, *network.others):
        assert name in str(graph)


def check_way_back(network: Network) -> None:
    graph, params = network.read
    named = {
        jax.tree_util.keystr(k, simple=True, separator="/"): v for k, v in jax.tree_util.tree_leaves_with_path(params)
    }
    for i, op in enumerate(graph.operators):
        matrix = op.to_matrix(named)
        assert matrix.shape == (op.problems, op.n_in, op.n_out)
        same = op.to_leaves(matrix, named)
        assert list(same) == list(op.paths)
        for path, leaf in same.items():
            assert leaf.dtype == named[path].dtype
            assert np.asarray(leaf).tobytes() == np.asarray(named[path]).tobytes()
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
