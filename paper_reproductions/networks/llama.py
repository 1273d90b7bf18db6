"""Llama-architecture decoders: rotary embeddings, grouped key/value heads, RMS norms, gated feed-forward.

`load` reads a folder with config.json and safetensors (Llama 1, 2, 3, 3.1 and what has their layout). Projections are
(in, out); head counts and widths come from the arrays, so a network with fewer heads or hidden units runs too.
"""

import math
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np

from paper_reproductions.networks import checkpoint
from paper_reproductions.networks.transformer import causal_attention, rms_norm, rotate

PROJECTIONS = ["layers/*/w*"]  # what papers prune: all but embeddings, norms and the output matrix


@dataclass(frozen=True)
class Llama:
    """The forward pass, with the numbers that no array tells: forward(params, tokens) -> logits.

    head: width of one attention head. theta: base of the rotary frequencies, theta ** (-2j / head).
    stretch: (factor, low, high, length) of Llama 3.1: frequencies of fewer than `low` turns in `length` positions are
    divided by `factor`, those of more than `high` are kept, those between are blended. A factor alone divides all.
    """

    head: int
    epsilon: float = 1e-5
    theta: float = 10000.0
    stretch: tuple[float, ...] = ()

    def __call__(self, params, tokens):
        """Logits (B, T, vocabulary) of tokens (B, T); without "unembedding" the embedding is the output matrix."""
        x = params["embedding"][tokens]  # (B, T, width)
        for i in range(len(params["layers"])):
            x = self.layer(params["layers"][str(i)], x)
        return self.logits(params, x)

    def layer(self, layer, x):
        """One block on (B, T, width)."""
        h = rms_norm(layer["norm_attn"], x, self.epsilon)
        q, k, v = ((h @ layer[name]).reshape(*x.shape[:2], -1, self.head) for name in ("wq", "wk", "wv"))
        frequencies = self.frequencies()
        x = x + causal_attention(rotate(q, frequencies), rotate(k, frequencies), v) @ layer["wo"]
        h = rms_norm(layer["norm_ffn"], x, self.epsilon)
        return x + (jax.nn.silu(h @ layer["w1"]) * (h @ layer["w3"])) @ layer["w2"]

    def logits(self, params, x):
        """The last norm and the output matrix."""
        x = rms_norm(params["norm_final"], x, self.epsilon)
        return x @ (params["unembedding"] if "unembedding" in params else params["embedding"].T)

    def frequencies(self):
        """The angle by which each pair of entries turns from one position to the next, (head / 2,)."""
        f = self.theta ** (-np.arange(0, self.head, 2) / self.head)
        if len(self.stretch) < 2:
            return f / self.stretch[0] if self.stretch else f
        factor, low, high, length = self.stretch
        kept = np.clip((f * length / (2 * math.pi) - low) / (high - low), 0, 1)
        return f * (kept + (1 - kept) / factor)


def load(folder, dtype=jnp.float32):
    """Parameters {"embedding", "layers": {"0": {"norm_attn", "wq", ...}}, "norm_final", "unembedding"}, and `Llama`."""
    config, tensors = checkpoint.config(folder), checkpoint.Tensors(folder, dtype)
    width, hidden, heads = (config[key] for key in ("hidden_size", "intermediate_size", "num_attention_heads"))
    head, groups = config.get("head_dim") or width // heads, config.get("num_key_value_heads") or heads
    if config.get("hidden_act", "silu") != "silu":
        raise ValueError(f"hidden_act is {config['hidden_act']!r}; this is the architecture with 'silu'")

    def layer(name):
        return {
            "norm_attn": tensors.take(f"{name}.input_layernorm.weight", width),
            "wq": tensors.matrix(f"{name}.self_attn.q_proj", heads * head, width),
            "wk": tensors.matrix(f"{name}.self_attn.k_proj", groups * head, width),
            "wv": tensors.matrix(f"{name}.self_attn.v_proj", groups * head, width),
            "wo": tensors.matrix(f"{name}.self_attn.o_proj", width, heads * head),
            "norm_ffn": tensors.take(f"{name}.post_attention_layernorm.weight", width),
            "w1": tensors.matrix(f"{name}.mlp.gate_proj", hidden, width),
            "w2": tensors.matrix(f"{name}.mlp.down_proj", width, hidden),
            "w3": tensors.matrix(f"{name}.mlp.up_proj", hidden, width),
        }

    params = {
        "embedding": tensors.take("embed_tokens.weight", config["vocab_size"], width),
        "layers": {str(i): layer(f"layers.{i}") for i in range(config["num_hidden_layers"])},
        "norm_final": tensors.take("norm.weight", width),
    }
    tied = config.get("tie_word_embeddings", False)
    if not tied:
        params["unembedding"] = tensors.matrix("lm_head", config["vocab_size"], width)
    tensors.finish("rotary_emb.inv_freq", *(["lm_head.weight"] if tied else []))
    theta, stretch = _rotary(config)
    return params, Llama(head, config["rms_norm_eps"], theta, stretch)


def _rotary(config):
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    theta = float(config.get("rope_theta") or rope.get("rope_theta") or 10000.0)
    kind = rope.get("rope_type", rope.get("type", "default"))
    keys = {
        "default": (),
        "linear": ("factor",),
        "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
    }
    if kind not in keys:
        raise ValueError(f"rotary embedding of type {kind!r} is unknown here; it is one of {', '.join(keys)}")
    return theta, tuple(float(rope[key]) for key in keys[kind])
