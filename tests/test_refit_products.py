"""Narrower queries and keys: the product that is left is the best of its rank, or the network is refused."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import pruneopt as po
from pruneopt.capture.products import products

pytestmark = pytest.mark.default_flags
RNG = np.random.default_rng(0)
HEADS, WIDTH, INTO = 3, 6, 10


@pytest.fixture(autouse=True)
def double():
    with jax.enable_x64(True):
        yield


def normal(*shape):
    return RNG.standard_normal(shape)


def attended(q, k, v, o):
    s = jax.nn.softmax(jnp.einsum("bthw,bshw->bhts", q, k) / jnp.sqrt(1.0 * WIDTH))
    return jnp.einsum("bhts,bshw->bthw", s, v).reshape(*v.shape[:2], -1) @ o


def plain(p, x):
    """Kernels of two axes and flat biases, as PyTorch has them; width that values share is apart."""
    made = (x @ p[n] + p[n + "b"] for n in "qkv")
    return attended(*(y.reshape(*x.shape[:2], HEADS, -1) for y in made), p["o"])


def tensors(p, x):
    """Kernels of three axes, as Flax has them."""
    return attended(*(jnp.einsum("btd,dhw->bthw", x, p[n]) + p[n + "b"] for n in "qkv"), p["o"])


def fused(p, x):
    """Queries and keys in one kernel."""
    q, k = jnp.split(x @ p["qk"] + p["qkb"], 2, axis=-1)
    v = x @ p["v"]
    return attended(*(y.reshape(*x.shape[:2], HEADS, -1) for y in (q, k, v)), p["o"])


def grouped(p, x):
    """Two heads of queries on each of three of keys, repeated."""
    q = (x @ p["q"]).reshape(*x.shape[:2], 2 * HEADS, WIDTH)
    k, v = (jnp.repeat((x @ p[n]).reshape(*x.shape[:2], HEADS, WIDTH), 2, axis=2) for n in "kv")
    return attended(q, k, v, p["o"])


def folded(p, x):
    """The same with an axis for the heads of a group."""
    q = (x @ p["q"]).reshape(*x.shape[:2], HEADS, 2, WIDTH)
    k, v = ((x @ p[n]).reshape(*x.shape[:2], HEADS, WIDTH) for n in "kv")
    s = jax.nn.softmax(jnp.einsum("bthgw,bshw->bhgts", q, k))
    return jnp.einsum("bhgts,bshw->bthgw", s, v).reshape(*x.shape[:2], -1) @ p["o"]


def squashed(p, x):
    q, k, v = ((x @ p[n] + p[n + "b"]).reshape(*x.shape[:2], HEADS, -1) for n in "qkv")
    return attended(jnp.tanh(q), k, v, p["o"])


def twice(p, x):
    """The same layer on two inputs."""
    return plain(p, x) + plain(p, jnp.tanh(x))


WIDE = HEADS * WIDTH
FLAT = lambda: {n: normal(INTO, WIDE) for n in "qkv"} | {n + "b": normal(WIDE) for n in "qkv"} | {"o": normal(WIDE, 4)}  # noqa: E731
NETWORKS = {
    "plain": (plain, FLAT),
    "tensors": (
        tensors,
        lambda: (
            {n: normal(INTO, HEADS, WIDTH) for n in "qkv"}
            | {n + "b": normal(HEADS, WIDTH) for n in "qkv"}
            | {"o": normal(WIDE, 4)}
        ),
    ),
    "fused": (
        fused,
        lambda: {"qk": normal(INTO, 2 * WIDE), "qkb": normal(2 * WIDE), "v": normal(INTO, WIDE), "o": normal(WIDE, 4)},
    ),
    "grouped": (
        grouped,
        lambda: {"q": normal(INTO, 2 * WIDE), **{n: normal(INTO, WIDE) for n in "kv"}, "o": normal(2 * WIDE, 4)},
    ),
    "folded": (
        folded,
        lambda: {"q": normal(INTO, 2 * WIDE), **{n: normal(INTO, WIDE) for n in "kv"}, "o": normal(2 * WIDE, 4)},
    ),
    "squashed": (squashed, FLAT),
    "twice": (twice, FLAT),
}


def built(name, count):
    fn, make = NETWORKS[name]
    params = jax.tree.map(jnp.asarray, make())
    x = jnp.asarray(normal(1, 30, INTO))
    graph = po.structure.trace(fn, params, x)
    names = [graph.units().name(group) for group in graph.units().groups if group.size == WIDTH and not group.blocked]
    (name,) = [name for name in names if products(graph, name)]
    return fn, params, x, po.constraints.coupled(graph.units(), {name: count}, [name])


def product_of(name, fn, params, x):
    """Q K^T of each head, read off the program that NumPy repeats."""
    p = {n: np.asarray(a) for n, a in params.items()}
    flat = lambda n: (x @ p[n].reshape(INTO, -1) + p.get(n + "b", np.zeros(1)).reshape(-1))[0]  # noqa: E731
    if name == "fused":
        q, k = np.split((x @ p["qk"] + p["qkb"])[0], 2, axis=-1)
    else:
        q, k = flat("q"), flat("k")
    width = k.shape[-1] // HEADS
    q, k = (np.asarray(y).reshape(30, -1, width) for y in (q, k))
    k = np.repeat(k, q.shape[1] // k.shape[1], axis=1)
    return np.einsum("thw,shw->hts", q, k)


@pytest.mark.parametrize("name", ["plain", "tensors", "fused"])
@pytest.mark.parametrize("count", [1, 4])
def test_each_head_has_the_best_product_of_its_rank(name, count):
    """For one example the least error is the tail of the singular values of Q K^T (Eckart and Young 1936)."""
    fn, params, x, units = built(name, count)
    pruned = po.plans.refit_products(fn, params, [x], units)
    before, after = (product_of(name, fn, p, np.asarray(x)) for p in (params, pruned.params))
    tail = sum(np.sum(np.linalg.svd(head, compute_uv=False)[count:] ** 2) for head in before)
    assert np.sum((before - after) ** 2) == pytest.approx(tail, rel=1e-3)
    assert pruned.history[0]["layers"][0]["relative_error"] == pytest.approx(tail / np.sum(before**2), rel=1e-3)
    assert units.violation(pruned.support) == 0
    small = po.shrink(fn, pruned.params, x, pruned)
    np.testing.assert_allclose(small.fn(small.params, x), fn(pruned.params, x), rtol=1e-6)


@pytest.mark.parametrize("name", ["grouped", "folded"])
def test_heads_that_share_keys_share_their_best_subspace(name):
    """The queries of a group stacked: one matrix whose best product of that rank is theirs together."""
    fn, params, x, units = built(name, 3)
    pruned = po.plans.refit_products(fn, params, [x], units)
    before, after = (product_of(name, fn, p, np.asarray(x)) for p in (params, pruned.params))
    stacked = before.reshape(HEADS, 2 * 30, 30)
    tail = sum(np.sum(np.linalg.svd(group, compute_uv=False)[3:] ** 2) for group in stacked)
    assert np.sum((before - after) ** 2) == pytest.approx(tail, rel=1e-3)
    small = po.shrink(fn, pruned.params, x, pruned)
    np.testing.assert_allclose(small.fn(small.params, x), fn(pruned.params, x), rtol=1e-6)


def test_all_units_leave_the_network_as_it_is():
    fn, params, x, units = built("plain", WIDTH)
    pruned = po.plans.refit_products(fn, params, [x], units)
    jax.tree.map(np.testing.assert_array_equal, pruned.params, params)


def test_batches_of_any_length_are_summed():
    fn, params, _, units = built("plain", 3)
    x = [jnp.asarray(normal(2, n, INTO)) for n in (5, 9)]
    several = po.plans.refit_products(fn, params, x, units)
    joined = jnp.concatenate([part.reshape(1, -1, INTO) for part in x], axis=1)
    one = po.plans.refit_products(fn, params, [joined], units)
    np.testing.assert_allclose(several.params["q"], one.params["q"], rtol=1e-6, atol=1e-8)


def test_inputs_that_the_data_leave_at_zero_are_turned_too():
    """On other data, in which they are not zero, the heads are those of the turned weights, not of a mixture."""
    fn, params, x, units = built("plain", 3)
    dead = x.at[..., 2].set(0.0)
    pruned = po.plans.refit_products(fn, params, [dead], units)
    w, u = (np.asarray(p["k"]).reshape(INTO, HEADS, WIDTH) for p in (params, pruned.params))
    for head in range(HEADS):
        live = np.delete(np.arange(INTO), 2)
        turn = np.linalg.lstsq(w[live, head], u[live, head], rcond=None)[0]
        np.testing.assert_allclose(w[:, head] @ turn, u[:, head], atol=1e-6)


def test_half_precision_leaves_are_read():
    fn, params, x, units = built("plain", 3)
    half = jax.tree.map(lambda a: a.astype(jnp.bfloat16), params)
    pruned = po.plans.refit_products(fn, half, [x.astype(jnp.bfloat16)], units)
    exact = po.plans.refit_products(fn, params, [x], units)
    error, wanted = (p.history[0]["layers"][0]["relative_error"] for p in (pruned, exact))
    assert {a.dtype for a in jax.tree.leaves(pruned.params)} == {jnp.dtype(jnp.bfloat16)}
    assert error == pytest.approx(wanted, rel=0.05)


def test_operands_of_zero_are_refused():
    fn, params, x, units = built("plain", 3)
    silent = params | {n: jnp.zeros_like(params[n]) for n in ("kb", "qb")}
    with pytest.raises(ValueError, match="zero in all batches"):
        po.plans.refit_products(fn, silent, [0 * x], units)


def test_operands_that_are_not_linear_are_refused():
    fn, params, x, units = built("squashed", 3)
    with pytest.raises(ValueError, match=r"not linear .*unit_products"):
        po.plans.refit_products(fn, params, [x], units)


def test_weights_that_make_several_operands_are_refused():
    fn, params, x, units = built("twice", 3)
    with pytest.raises(ValueError, match=r"entries of .* make several operands"):
        po.plans.refit_products(fn, params, [x], units)


def test_groups_that_no_product_contracts_are_refused():
    fn, params, x, _ = built("plain", 3)
    heads = po.constraints.coupled(po.structure.trace(fn, params, x).units(), {}, ["k[1]"])
    with pytest.raises(ValueError, match="contracted in no product"):
        po.plans.refit_products(fn, params, [x], heads)
