"""Which leaves are pruned where the user does not say: those that fn multiplies, whatever their names."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import test_graph
from jax import lax

import pruneopt as po
from pruneopt.constraints import Cardinality
from pruneopt.network.leaves import Default, is_prunable, partition
from pruneopt.program.weights import multiplied
from pruneopt.structure import default_leaves, trace

RNG = np.random.default_rng(0)
N, D, H = 3, 4, 2


def draw(*shape):
    return RNG.normal(size=shape) / 2


def chosen(fn, params, batch):
    """Paths of the default choice."""
    return {path for path, _ in po._tree.named_leaves(partition(params, default_leaves(fn, params, batch))[0])}


VIT = {
    "patch_embed": {"kernel": draw(2, 2, 1, D)},  # a convolution; the name says embed
    "cls_token": draw(1, 1, D),
    "position": draw(1, 5, D),
    "gain": draw(1, 1, D),  # scale of a layer
    "q": draw(D, H, D // H),
    "k": draw(D, H, D // H),
    "v": draw(D, H, D // H),
    "o": draw(H, D // H, D),
    "probe": draw(1, 1, D),  # a learned query, multiplied by kernels alone before it meets data
    "probe_q": draw(D, D),
    "head": draw(D, 3),
}


def vit(p, images):
    x = lax.conv_general_dilated(images, p["patch_embed"]["kernel"], (2, 2), "VALID", dimension_numbers=_NHWC)
    x = x.reshape(len(images), -1, D)
    x = jnp.concatenate([jnp.broadcast_to(p["cls_token"], (len(images), 1, D)), x], axis=1) + p["position"]
    q, k, v = (jnp.einsum("btd,dhk->bthk", x, p[name]) for name in "qkv")
    attended = jnp.einsum("bhts,bshk->bthk", jax.nn.softmax(jnp.einsum("bthk,bshk->bhts", q, k)), v)
    x = x + p["gain"] * jnp.einsum("bthk,hkd->btd", attended, p["o"])
    pooled = jax.nn.softmax(jnp.einsum("btd,qd->bqt", x, (p["probe"] @ p["probe_q"])[0])) @ x
    return jnp.mean((pooled[:, 0] @ p["head"]) ** 2)


_NHWC = ("NHWC", "HWIO", "NHWC")
IMAGES = draw(N, 4, 4, 1)

SSM = {"A_log": draw(D, 2), "skip": draw(1, D), "dt": draw(D, D), "B": draw(D, 2), "C": draw(D, 2), "out": draw(D, 1)}


def selective_scan(p, x):
    """h_t = exp(dt A) h_{t-1} + dt B x, y = C h, A = -exp(A_log), as Mamba has it; x (examples, time, D)."""
    decay = -jnp.exp(p["A_log"])[None]

    def step(h, x):
        dt = jax.nn.softplus(x @ p["dt"])
        h = jnp.exp(dt[..., None] * decay) * h + (dt * x)[..., None] * (x @ p["B"])[:, None]
        return h, jnp.einsum("bdn,bn->bd", h, x @ p["C"]) + p["skip"] * x

    _, y = lax.scan(step, jnp.zeros((len(x), D, 2), x.dtype), jnp.moveaxis(x, 1, 0))
    return jnp.mean((y @ p["out"]) ** 2)


MLP = {"norm_in": draw(D, 5), "upscale": {"theta": draw(5, 5)}, "bias_free": draw(5, 2), "offsets": draw(1, 2)}


def mlp(p, x):
    x = jnp.tanh(jax.jit(jnp.matmul)(x, p["norm_in"]))
    return jnp.mean((jnp.tanh(x @ p["upscale"]["theta"]) @ p["bias_free"] + p["offsets"]) ** 2)


VIT_CHOSEN = {"patch_embed/kernel", "q", "k", "v", "o", "probe_q", "head"}
CASES = {
    "vit": (vit, VIT, IMAGES, VIT_CHOSEN, {"cls_token", "position", "gain", "probe"}),
    "selective scan": (selective_scan, SSM, draw(N, 6, D), {"dt", "B", "C", "out"}, {"A_log", "skip"}),
    "odd names": (mlp, MLP, draw(N, D), {"norm_in", "upscale/theta", "bias_free"}, {"offsets"}),
}


@pytest.mark.parametrize("case", CASES)
def test_what_fn_multiplies_is_chosen_and_the_rest_is_said(case):
    fn, params, batch, wanted, left_out = CASES[case]
    choice = default_leaves(fn, params, batch)
    assert isinstance(choice, Default)
    assert (set(choice.paths), set(choice.left_out)) == (wanted, left_out)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.slow
def test_every_method_chooses_them(case):
    """By magnitude, by derivatives and layer by layer, which takes those that it can read."""
    fn, params, batch, wanted, left_out = CASES[case]
    for method in ("magnitude", "taylor", "wanda") if case == "odd names" else ("magnitude",):
        pruned = po.prune(fn, params, [batch], Cardinality(sparsity=0.5), method=method, progress=False)
        assert {path for path, _ in po._tree.named_leaves(pruned.support)} == wanted
        assert set(pruned.history[-1]["left_out"]) == left_out
        assert f"left out: {min(left_out)}" in repr(pruned)


def test_the_user_s_choice_wins():
    pruned = po.prune(vit, VIT, [IMAGES], Cardinality(sparsity=0.5), leaves="cls_token", progress=False)
    assert [path for path, _ in po._tree.named_leaves(pruned.support)] == ["cls_token"]
    assert "left_out" not in pruned.history[0]


@pytest.mark.slow
def test_without_fn_shape_and_name_choose():
    assert default_leaves(None, VIT) is default_leaves(vit, VIT) is is_prunable
    pruned = po.prune(None, VIT, None, Cardinality(sparsity=0.5), progress=False)
    assert {path for path, _ in po._tree.named_leaves(pruned.support)} == set(VIT) - {"patch_embed"}


def test_tables_that_are_looked_up_are_chosen_by_shape_and_name():
    def fn(p, ids):
        x = p["table"][ids] + p["embedding"][ids]
        return (x @ p["kernel"]) @ p["embedding"].T

    params = {"table": draw(6, D), "embedding": draw(6, D), "kernel": draw(D, D)}
    assert chosen(fn, params, np.arange(4)) == {"table", "kernel"}


def test_a_function_without_products_says_nothing():
    assert default_leaves(lambda p, x: jnp.sum((p["w"] - x) ** 2), {"w": draw(3, 4)}, draw(3, 4)) is is_prunable


def exponents(p, x):
    return x @ jnp.exp(p["w"])


def normalised(p, x):
    return x @ (p["w"] / jnp.linalg.norm(p["w"], axis=0, keepdims=True))


def low_rank(p, x):
    return x @ (p["w"] + p["a"] @ p["b"])


def masked(p, x):
    return x @ (p["w"] * p["mask"])


def entry_by_entry(p, x):
    return jnp.einsum("ti,ti->ti", x, p["w"]) @ p["a"]


def in_a_while(p, x):
    def body(state):
        i, h = state
        return i + 1, jnp.tanh(h @ p["w"]) * p["a"]

    return lax.while_loop(lambda state: state[0] < jnp.sum(x > 0), body, (0, x))[1]


def in_a_branch(p, x):
    return lax.cond(jnp.sum(x) > 0, lambda x: x @ p["w"], lambda x: x * p["a"], x)


COMPUTED = {
    "exponents": (exponents, {"v": draw(D, D)}, set()),
    "weight normalisation": (normalised, {}, {"w"}),
    "low rank": (low_rank, {"a": draw(D, 2), "b": draw(2, D)}, {"w", "a", "b"}),
    "masked": (masked, {"mask": np.eye(D)}, {"w"}),
    "entry by entry": (entry_by_entry, {"a": draw(D, 2)}, {"a"}),
    "while": (in_a_while, {"a": draw(1, D)}, {"w"}),
    "branch": (in_a_branch, {"a": draw(1, D)}, {"w"}),
}


@pytest.mark.parametrize("case", COMPUTED)
def test_a_matrix_computed_from_leaves(case):
    fn, more, wanted = COMPUTED[case]
    found = multiplied(fn, {"w": draw(D, D), **more}, draw(D, D))
    assert found.matrices == wanted


@pytest.mark.parametrize("name", test_graph.NETWORKS)
def test_what_the_graph_reads_is_multiplied(name):
    """Every leaf of an operator that sums over inputs, and no leaf that neither operators nor refusals name."""
    fn, params, batch = test_graph.NETWORKS[name].build()
    graph, found = trace(fn, params, batch), multiplied(fn, params, batch)
    assert {path for op in graph.operators if op.n_in > 1 for path in op.paths} <= found.matrices | found.looked_up
    named = {path for part in (graph.operators, graph.refusals) for entry in part for path in entry.paths}
    assert found.matrices <= named
