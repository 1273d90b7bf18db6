"""Padding masks follow the time axis through fn: Grams by hand in NumPy that drop the padded positions."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import pruneopt as po
from pruneopt.structure import capture

RNG = np.random.default_rng(0)
B, T, D, H = 3, 4, 2, 3
LENGTHS = np.array([4, 1, 2])
MASK = (np.arange(T) < LENGTHS[:, None]).astype(float)
X = RNG.normal(size=(B, T, D))
P = {"wi": RNG.normal(size=(D, H)), "wh": RNG.normal(size=(H, H)), "out": RNG.normal(size=(H, 2))}
JOINED = {"w": RNG.normal(size=(D + H, H)), "out": P["out"]}


def step(p):
    return lambda h, x: (jnp.tanh(x @ p["wi"] + h @ p["wh"]),) * 2


def zeros(x):
    return jnp.zeros((x.shape[0], H), x.dtype)


def recurrent(p, batch, reverse=False, flip=False):
    x = jnp.swapaxes(batch["x"], 0, 1)
    x = x[::-1] if flip else x
    hs = lax.scan(step(p), zeros(batch["x"]), x, reverse=reverse)[1]
    hs = hs[::-1] if flip else hs
    return jnp.swapaxes(hs, 0, 1) @ p["out"]


def by_fori(p, batch):
    x = batch["x"]

    def one(t, carry):
        h, hs = carry
        h = jnp.tanh(h @ p["wh"] + x[:, t] @ p["wi"])
        return h, lax.dynamic_update_slice(hs, h[:, None], (0, t, 0))

    _, hs = lax.fori_loop(0, T, one, (zeros(x), jnp.zeros((x.shape[0], T, H), x.dtype)))
    return hs @ p["out"]


def by_concatenation(p, batch):
    def one(h, x):
        h = jnp.tanh(jnp.concatenate([x, h], axis=1) @ p["w"])
        return h, h

    hs = lax.scan(one, zeros(batch["x"]), jnp.swapaxes(batch["x"], 0, 1))[1]
    return hs.reshape(-1, H) @ p["out"]  # time and examples folded, time first


def states(x, p, reverse=False):
    """h_(t-1) and h_t (B, T, H) of the recurrence, by hand."""
    before, after, h = np.zeros((B, T, H)), np.zeros((B, T, H)), np.zeros((B, H))
    for t in range(T)[::-1] if reverse else range(T):
        before[:, t] = h
        h = np.tanh(x[:, t] @ p["wi"] + h @ p["wh"])
        after[:, t] = h
    return before, after


def gram(rows, weights):
    rows, weights = rows.reshape(-1, rows.shape[-1]), np.asarray(weights).reshape(-1)
    return (rows * weights[:, None]).T @ rows / weights.sum(), weights.sum()


def check(fn, params, want, x=X, mask=MASK, **more):
    found = capture(fn, params, [{"x": x, "mask": mask, **more}], weights=lambda b: b["mask"])
    for name, (rows, weights) in want.items():
        matrix, count = gram(rows, weights)
        assert found[name].count[0] == pytest.approx(count, rel=1e-12), name
        np.testing.assert_allclose(found[name].gram[0], matrix, rtol=1e-10, atol=1e-13)


NETWORKS = {
    "scan": (recurrent, False),
    "scan in reverse": (lambda p, b: recurrent(p, b, reverse=True), True),
    "a flipped input": (lambda p, b: recurrent(p, b, flip=True), True),
    "fori_loop": (by_fori, False),
}


@pytest.mark.parametrize("filler", [0.0, 50.0])
@pytest.mark.parametrize("name", NETWORKS)
def test_loops_over_time_drop_the_padded_positions(name, filler):
    fn, reverse = NETWORKS[name]
    x = np.where(MASK[..., None] > 0, X, filler)
    before, after = states(x, P, reverse)
    check(fn, P, {"wi": (x, MASK), "wh": (before, MASK), "out": (after, MASK)}, x)


@pytest.mark.slow
def test_masks_do_not_depend_on_the_filler():
    def pruned(filler, target):
        data = [{"x": np.where(MASK[..., None] > 0, X, filler), "mask": MASK}]
        row = po.plans.LayerMethod(po.solvers.Score(), target=target)
        set_, weights = po.constraints.Cardinality(sparsity=0.5), lambda b: b["mask"]
        return po.plans.layerwise(recurrent, P, data, set_, row, weights=weights, progress=False).support

    for target in ("layer", "network"):
        jax.tree.map(np.testing.assert_array_equal, pruned(0.0, target), pruned(1e3, target))


def test_inputs_joined_with_states_and_folded_positions():
    p = {"wi": JOINED["w"][:D], "wh": JOINED["w"][D:]}
    before, after = states(X, p)
    check(by_concatenation, JOINED, {"w": (np.concatenate([X, before], -1), MASK), "out": (after, MASK)})


def test_what_a_loop_hands_on_counts_if_any_of_its_positions_does():
    def last(p, b):
        return lax.scan(step(p), zeros(b["x"]), jnp.swapaxes(b["x"], 0, 1))[0] @ p["out"]

    _, after = states(X, P)
    check(last, P, {"out": (after[:, -1], np.array([1.0, 0.0, 1.0]))}, mask=MASK * np.array([[1.0], [0.0], [1.0]]))


def test_one_position_has_its_own_weight():
    check(lambda p, b: b["x"][:, 2] @ p["wi"], {"wi": P["wi"]}, {"wi": (X[:, 2], MASK[:, 2])})
    check(lambda p, b: b["x"][:, jnp.array([3, 0])] @ p["wi"], {"wi": P["wi"]}, {"wi": (X[:, [3, 0]], MASK[:, [3, 0]])})
    pick = lambda p, b: b["x"][jnp.arange(B), b["n"] - 1] @ p["wi"]  # noqa: E731
    check(pick, {"wi": P["wi"]}, {"wi": (X[np.arange(B), LENGTHS - 1], np.ones(B))}, n=LENGTHS)


def attention(p, batch):
    """A class token before the others, heads, windows folded and unfolded, scores masked by what the batch says."""
    token = jnp.broadcast_to(p["token"][None], (batch["x"].shape[0], 1, D))
    x = jnp.concatenate([token, batch["x"]], axis=1)
    q, k = x @ p["q"], x @ p["k"]
    scores = jnp.einsum("btd,bsd->bts", q, k)
    x = jax.nn.softmax(scores, axis=-1) @ (x @ p["v"])
    return x.reshape(-1, D) @ p["o"]


def test_attention_with_a_class_token():
    p = {n: RNG.normal(size=(D, D)) for n in "qkvo"} | {"token": RNG.normal(size=(1, D))}
    x = np.concatenate([np.broadcast_to(p["token"], (B, 1, D)), X], axis=1)
    scores = np.exp(np.einsum("btd,bsd->bts", x @ p["q"], x @ p["k"]))
    y = scores / scores.sum(-1, keepdims=True) @ (x @ p["v"])
    mask = np.concatenate([MASK.max(axis=1, keepdims=True), MASK], axis=1)
    check(attention, p, {"q": (x, mask), "k": (x, mask), "v": (x, mask), "o": (y, mask)})


def test_windows_of_time():
    p = {"w": RNG.normal(size=(D, D)), "c": RNG.normal(size=(3, D, D))}
    fold = lambda p, b: jnp.swapaxes(b["x"].reshape(B, 2, 2, D), 1, 2) @ p["w"]  # noqa: E731
    check(fold, {"w": p["w"]}, {"w": (X, MASK)})

    def conv(padding, stride=1):
        spec = ("NWC", "WIO", "NWC")
        return lambda p, b: lax.conv_general_dilated(b["x"], p["c"], (stride,), padding, dimension_numbers=spec)

    padded = np.pad(X, ((0, 0), (2, 0), (0, 0)))
    rows = np.concatenate([padded[:, i : i + T] for i in range(3)], axis=-1)
    check(conv([(2, 0)]), {"c": p["c"]}, {"c": (rows, MASK)})
    for moved in (conv("VALID"), conv("SAME", 2)):
        with pytest.raises(ValueError, match=r"axis 1 cannot be followed to 'c'.*window"):
            check(moved, {"c": p["c"]}, {})


def python_loop(p, b):
    h = zeros(b["x"])
    for t in range(T):
        h = step(p)(h, b["x"][:, t])[0]
    return h @ p["out"]


REFUSED = {
    "a loop in Python": (python_loop, P, {}, "different positions meet in add"),
    "a shift": (lambda p, b: (b["x"][:, 1:] + b["x"][:, :-1]) @ p["wi"], P, {}, "different positions meet in add"),
    "sorted": (lambda p, b: jnp.sort(b["x"], axis=1) @ p["wi"], P, {}, "sort moves it"),
    "ordered": (
        lambda p, b: jnp.take_along_axis(b["x"], jnp.argsort(b["x"][..., :1], axis=1), axis=1) @ p["wi"],
        P,
        {},
        "",
    ),
    "another length": (lambda p, b: b["z"] @ p["wi"], P, {"z": RNG.normal(size=(B, 5, D))}, "another length"),
    "time first": (lambda p, b: b["z"] @ p["wi"], P, {"z": X.swapaxes(0, 1)}, "another length"),
    "pairs": (lambda p, b: (b["x"][:, None] * b["x"][:, :, None]) @ p["wi"], P, {}, "pairs"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_followed_is_refused(name):
    fn, params, more, words = REFUSED[name]
    with pytest.raises(ValueError, match=rf"weights: their axis \d cannot be followed to '.*': .*{words}.*leaves="):
        check(fn, params, {}, **more)


def test_padding_may_be_anything_where_fn_keeps_it_apart():
    x = np.where(MASK[..., None] > 0, X, np.nan)
    check(lambda p, b: b["x"] @ p["wi"], {"wi": P["wi"]}, {"wi": (np.nan_to_num(x), MASK)}, x)
