"""Transformers: grouped queries, rotary, ALiBi, norms of every kind, cross attention, experts, a step with a cache."""

import jax
import jax.numpy as jnp
import numpy as np

from paper_reproductions.networks import minilm as bert
from paper_reproductions.networks.llama import Llama
from paper_reproductions.networks.opt import OPT
from paper_reproductions.networks.small.made import (
    Network,
    dense,
    drawn,
    fast_norm,
    images,
    layer,
    layer_norm,
    norm,
    rms_norm,
    tokens,
)
from paper_reproductions.networks.transformer import causal_attention

HEAD = 4


def kernels(n_in, n_out):
    """Shapes of a dense layer whose matrix is called kernel."""
    return {"kernel": (n_in, n_out), "bias": (n_out,)}


def heads(x, width=HEAD):
    """(B, T, heads, width)."""
    return x.reshape(*x.shape[:2], -1, width)


def attend(q, k, v, mask=None):
    """(B, T, heads * width) of (B, T, heads, width); the scores of what is masked are minus infinity."""
    scores = jnp.einsum("bthd,bshd->bhts", q, k) / 2.0
    scores = scores if mask is None else jnp.where(mask, scores, -jnp.inf)
    return jnp.einsum("bhts,bshd->bthd", jax.nn.softmax(scores), v).reshape(*q.shape[:2], -1)


def llama():
    """Grouped queries, rotary, RMS norms, gated feed-forward, tied embeddings: SmolLM's layout."""
    block = {"norm_attn": (12,), "wq": (12, 16), "wk": (12, 8), "wv": (12, 8), "wo": (16, 12)} | {
        "norm_ffn": (12,),
        "w1": (12, 10),
        "w2": (10, 12),
        "w3": (12, 10),
    }
    params = {"embedding": (11, 12), "layers": {"0": block, "1": block}, "norm_final": (12,)}
    return Network(Llama(HEAD), drawn(params), tokens(2, 5))


def opt():
    """Learned positions, layer norms in two passes, biases, tied embeddings."""
    attention = {"norm": norm(8)} | {name: kernels(8, 8) for name in ("query", "key", "value", "output")}
    ffn = {"norm": norm(8), "up": kernels(8, 10), "down": kernels(10, 8)}
    params = {
        "embedding": {"word": (11, 8), "position": (9, 8)},
        "layers": {"0": {"attention": attention, "ffn": ffn}},
        "norm_final": norm(8),
    }
    return Network(OPT(HEAD), drawn(params), tokens(2, 5))


def minilm():
    """BERT: embeddings summed, norms after each sublayer, a masked mean."""
    attention = {"norm": norm(64)} | {name: kernels(64, 64) for name in ("query", "key", "value", "output")}
    ffn = {"norm": norm(64), "up": kernels(64, 12), "down": kernels(12, 64)}
    params = {
        "embeddings": {"word": (11, 64), "position": (9, 64), "type": (2, 64), "norm": norm(64)},
        "layers": {"0": {"attention": attention, "ffn": ffn}},
    }
    mask = jnp.asarray([[1.0, 1, 1, 1, 0], [1, 1, 1, 0, 0]])
    return Network(bert.embed, drawn(params), {"ids": tokens(2, 5), "mask": mask})


def gpt():
    """Queries, keys and values in one matrix; layer norms of fast variance."""

    def fn(p, ids):
        x = p["word"][ids] + p["position"][: ids.shape[1]]
        for block in p["layers"]:
            q, k, v = map(heads, jnp.split(dense(block["qkv"], fast_norm(block["norm1"], x)), 3, axis=-1))
            x = x + dense(block["out"], causal_attention(q, k, v))
            x = x + dense(block["down"], jax.nn.gelu(dense(block["up"], fast_norm(block["norm2"], x))))
        return fast_norm(p["norm"], x) @ p["word"].T

    block = {"norm1": norm(8), "qkv": layer(8, 24), "out": layer(8, 8)} | {
        "norm2": norm(8),
        "up": layer(8, 10),
        "down": layer(10, 8),
    }
    return Network(
        fn, drawn({"word": (11, 8), "position": (9, 8), "layers": [block, block], "norm": norm(8)}), tokens(2, 5)
    )


def alibi():
    """Slopes of the heads as numbers that fn closed over."""
    slopes = jnp.asarray(2.0 ** -np.arange(1, 4))

    def fn(p, ids):
        x, t = p["word"][ids], jnp.arange(ids.shape[1], dtype=slopes.dtype)
        q, k, v = (heads(rms_norm(p["norm"], x) @ p[name]) for name in "qkv")
        scores = jnp.einsum("bthd,bshd->bhts", q, k) + slopes[:, None, None] * (t[None] - t[:, None])
        scores = jnp.where(jnp.tri(ids.shape[1], dtype=bool), scores, -1e9)
        x = x + jnp.einsum("bhts,bshd->bthd", jax.nn.softmax(scores), v).reshape(*x.shape[:2], -1) @ p["o"]
        return rms_norm(p["final"], x) @ p["head"]

    shapes = {"word": (11, 6), "norm": (6,), "final": (6,), "head": (6, 11)} | dict.fromkeys("qkv", (6, 12))
    return Network(fn, drawn({**shapes, "o": (12, 6)}), tokens(2, 5))


def interleaved():
    """Rotary embedding of adjacent pairs, as in GPT-J: strided slices, stacked again."""

    def turned(x):
        angle = jnp.outer(jnp.arange(x.shape[1], dtype=x.dtype), jnp.asarray([1.0, 0.1]))[:, None]
        even, odd = x[..., ::2], x[..., 1::2]
        both = even * jnp.cos(angle) - odd * jnp.sin(angle), odd * jnp.cos(angle) + even * jnp.sin(angle)
        return jnp.stack(both, -1).reshape(x.shape)

    def fn(p, ids):
        x = p["word"][ids]
        q, k, v = (heads(fast_norm(p["norm"], x) @ p[name]) for name in "qkv")
        x = x + attend(turned(q), turned(k), v) @ p["o"] + dense(p["down"], jax.nn.gelu(dense(p["up"], x)))
        return x @ p["head"]

    shapes = {"word": (11, 6), "norm": norm(6), "up": layer(6, 9), "down": layer(9, 6), "head": (6, 11)}
    return Network(fn, drawn({**shapes, **dict.fromkeys("qkv", (6, 12)), "o": (12, 6)}), tokens(2, 5))


def translator():
    """Encoder and decoder with cross attention; sinusoidal positions; layer norms of both kinds."""
    positions = jnp.asarray(np.random.default_rng(3).normal(size=(8, 8)))

    def block(p, x, to, mask):
        q, k, v = heads(dense(p["q"], x)), heads(dense(p["k"], to)), heads(dense(p["v"], to))
        return dense(p["o"], attend(q, k, v, mask))

    def fn(p, pair):
        source, target = (p["word"][ids] + positions[: ids.shape[1]] for ids in pair)
        source = source + block(p["encode"], fast_norm(p["norm0"], source), fast_norm(p["norm0"], source), None)
        source = source + dense(p["down0"], jax.nn.relu(dense(p["up0"], source)))
        causal = jnp.tri(target.shape[1], dtype=bool)
        h = fast_norm(p["norm1"], target)
        target = target + block(p["decode"], h, h, causal)
        target = target + block(p["cross"], fast_norm(p["norm2"], target), source, None)
        return (target + dense(p["down1"], jax.nn.relu(dense(p["up1"], target)))) @ p["word"].T

    attention = {"q": layer(8, 8), "k": layer(8, 8), "v": layer(8, 8), "o": layer(8, 8)}
    shapes = {"word": (11, 8)} | dict.fromkeys(("encode", "decode", "cross"), attention)
    shapes |= {f"norm{i}": norm(8) for i in range(3)}
    shapes |= {f"up{i}": layer(8, 10) for i in range(2)} | {f"down{i}": layer(10, 8) for i in range(2)}
    return Network(fn, drawn(shapes), (tokens(2, 5), tokens(2, 4)))


def experts():
    """A gate over experts whose products are all computed."""

    def fn(p, x):
        h = x @ p["embed"]
        gate = jax.nn.softmax(rms_norm(p["norm"], h) @ p["gate"])
        best, at = jax.lax.top_k(gate, 2)
        weight = jnp.zeros_like(gate).at[jnp.arange(len(x))[:, None], at].set(best)
        hidden = jax.nn.silu(jnp.einsum("td,edf->etf", h, p["up"])) * jnp.einsum("td,edf->etf", h, p["side"])
        return (h + jnp.einsum("etf,efd,te->td", hidden, p["down"], weight)) @ p["head"]

    shapes = {"embed": (5, 6), "norm": (6,), "gate": (6, 3), "up": (3, 6, 8), "side": (3, 6, 8), "down": (3, 8, 6)}
    return Network(fn, drawn({**shapes, "head": (6, 4)}), images(4, 5))


def ragged():
    """Rows sorted by their expert, multiplied by `ragged_dot`."""

    def fn(p, x):
        h = x @ p["embed"]
        chosen = jnp.argmax(h @ p["gate"], -1)
        order = jnp.argsort(chosen)
        sizes = jnp.bincount(chosen, length=3).astype(jnp.int32)
        hidden = jax.nn.gelu(jax.lax.ragged_dot(h[order], p["up"], sizes))
        back = jax.lax.ragged_dot(hidden, p["down"], sizes)
        return (h + jnp.zeros_like(back).at[order].set(back)) @ p["head"]

    shapes = {"embed": (5, 6), "gate": (6, 3), "up": (3, 6, 8), "down": (3, 8, 6), "head": (6, 4)}
    return Network(fn, drawn(shapes), images(4, 5))


def vision():
    """Patches by a convolution, a class token, learned positions, layer norms in two passes."""

    def fn(p, x):
        patches = jax.lax.conv_general_dilated(
            x, p["patch"], (2, 2), "VALID", dimension_numbers=("NHWC", "HWIO", "NHWC")
        )
        h = patches.reshape(len(x), -1, patches.shape[-1])
        h = jnp.concatenate([jnp.broadcast_to(p["class"], (len(x), 1, h.shape[-1])), h], 1) + p["position"]
        q, k, v = (heads(dense(p[name], layer_norm(p["norm1"], h))) for name in "qkv")
        h = h + dense(p["o"], attend(q, k, v))
        h = h + dense(p["down"], jax.nn.gelu(dense(p["up"], layer_norm(p["norm2"], h))))
        return dense(p["head"], layer_norm(p["norm3"], h)[:, 0])

    shapes = {"patch": (2, 2, 1, 8), "class": (1, 1, 8), "position": (5, 8), "o": layer(8, 8), "head": layer(8, 3)}
    shapes |= {name: layer(8, 8) for name in "qkv"} | {f"norm{i}": norm(8) for i in (1, 2, 3)}
    return Network(fn, drawn({**shapes, "up": layer(8, 10), "down": layer(10, 8)}), images(2, 4, 4, 1))


def mixer():
    """Products along tokens, then along channels."""

    def fn(p, x):
        h = x @ p["embed"]
        mixed = jnp.swapaxes(fast_norm(p["norm1"], h), 1, 2)
        h = h + jnp.swapaxes(dense(p["back"], jax.nn.gelu(dense(p["tokens"], mixed))), 1, 2)
        h = h + dense(p["down"], jax.nn.gelu(dense(p["up"], fast_norm(p["norm2"], h))))
        return dense(p["head"], fast_norm(p["norm3"], h).mean(1))

    shapes = {"embed": (5, 6), "tokens": layer(4, 7), "back": layer(7, 4), "up": layer(6, 9), "down": layer(9, 6)}
    return Network(
        fn, drawn({**shapes, "head": layer(6, 3), **{f"norm{i}": norm(6) for i in (1, 2, 3)}}), images(2, 4, 5)
    )


def pooling():
    """Learned queries attend to the inputs, as in Perceiver; routing of capsules by their agreement."""

    def fn(p, x):
        k, v = (jnp.einsum("btc,chd->bthd", x, p[name]) for name in "kv")
        weights = jax.nn.softmax(jnp.einsum("nhd,bthd->bhnt", p["query"], k))
        h = jnp.tanh(jnp.einsum("bhnt,bthd,hdf->bnf", weights, v, p["o"]))
        votes = jnp.einsum("bnf,nfcg->bncg", h, p["votes"])
        mean = votes.mean(1, keepdims=True)
        agreed = jax.nn.softmax((votes * mean).sum(-1, keepdims=True), 2)
        return (agreed * votes).sum(1).reshape(len(x), -1) @ p["head"]

    shapes = {"k": (5, 3, 4), "v": (5, 3, 4), "query": (2, 3, 4), "o": (3, 4, 7)}
    return Network(fn, drawn({**shapes, "votes": (2, 7, 3, 4), "head": (12, 3)}), images(2, 6, 5))


def cached():
    """One step of decoding: keys and values of earlier tokens stand in the batch."""

    def fn(p, batch):
        x = p["word"][batch["token"]]
        h = rms_norm(p["norm"], x)
        q, k, v = ((h @ p[name]).reshape(len(x), 1, -1, HEAD) for name in "qkv")
        at = batch["position"]
        keys, values = (
            jax.lax.dynamic_update_slice_in_dim(batch["cache"][name], new, at, 1)
            for name, new in (("keys", k), ("values", v))
        )
        seen = jnp.arange(keys.shape[1]) <= at
        x = x + attend(q, keys, values, seen)[:, 0] @ p["o"]
        x = x + (jax.nn.silu(x @ p["gate"]) * (x @ p["up"])) @ p["down"]
        return rms_norm(p["final"], x) @ p["word"].T, {"keys": keys, "values": values}

    shapes = {"word": (11, 6), "norm": (6,), "final": (6,), "up": (6, 9), "gate": (6, 9), "down": (9, 6)}
    params = drawn({**shapes, **dict.fromkeys("qkv", (6, 12)), "o": (12, 6)})
    cache = {"keys": images(2, 5, 3, HEAD), "values": images(2, 5, 3, HEAD, seed=2)}
    return Network(fn, params, {"token": tokens(2), "position": jnp.asarray(3, jnp.int32), "cache": cache})
