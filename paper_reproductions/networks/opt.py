"""OPT decoders (Zhang et al. 2022): learned positions, layer norms, biases, ReLU; the embedding is the output matrix.

`load` reads a folder with config.json and safetensors, OPT-350m's variant included: norms after each sublayer, and
embeddings narrower than the network. Kernels are (in, out); head counts and widths come from the arrays.
"""

from dataclasses import dataclass

import jax
import jax.numpy as jnp

from paper_reproductions.networks import checkpoint
from paper_reproductions.networks.transformer import causal_attention, dense, layer_norm

PROJECTIONS = ["layers/*/kernel"]  # what papers prune: all but embeddings, norms and biases
EPSILON = 1e-5
OFFSET = 2  # the position table starts with two rows that no token uses


@dataclass(frozen=True)
class OPT:
    """The forward pass, with what no array tells: forward(params, tokens) -> logits.

    head: width of one attention head. norm_first: norms stand before each sublayer; after it in OPT-350m.
    """

    head: int
    norm_first: bool = True

    def __call__(self, params, tokens):
        """Logits (B, T, vocabulary) of tokens (B, T)."""
        table = params["embedding"]
        x = table["word"][tokens]
        if "project_in" in table:
            x = x @ table["project_in"]  # (B, T, narrow) -> (B, T, width)
        x = x + table["position"][OFFSET : OFFSET + tokens.shape[1]]
        for i in range(len(params["layers"])):
            layer = params["layers"][str(i)]
            x = self._sublayer(layer["attention"], x, self._attention)
            x = self._sublayer(layer["ffn"], x, _feed_forward)
        if "norm_final" in params:
            x = layer_norm(params["norm_final"], x, EPSILON)
        if "project_out" in table:
            x = x @ table["project_out"]
        return x @ table["word"].T

    def _sublayer(self, part, x, function):
        if self.norm_first:
            return x + function(part, layer_norm(part["norm"], x, EPSILON))
        return layer_norm(part["norm"], x + function(part, x), EPSILON)

    def _attention(self, part, x):
        q, k, v = (dense(part[name], x).reshape(*x.shape[:2], -1, self.head) for name in ("query", "key", "value"))
        return dense(part["output"], causal_attention(q, k, v))


def _feed_forward(part, x):
    return dense(part["down"], jax.nn.relu(dense(part["up"], x)))


def load(folder, dtype=jnp.float32):
    """Parameters {"embedding": {"word", ...}, "layers": {"0": {"attention", "ffn"}, ...}, "norm_final"}, and `OPT`."""
    config, tensors = checkpoint.config(folder), checkpoint.Tensors(folder, dtype)
    width, hidden, vocabulary = (config[key] for key in ("hidden_size", "ffn_dim", "vocab_size"))
    narrow = config.get("word_embed_proj_dim") or width
    if config.get("activation_function", "relu") != "relu" or not config.get("enable_bias", True):
        raise ValueError("this is the architecture with activation_function 'relu' and enable_bias true")

    def norm(name):
        return {"scale": tensors.take(f"{name}.weight", width), "bias": tensors.take(f"{name}.bias", width)}

    def projection(name, n_in, n_out):
        return {"kernel": tensors.matrix(name, n_out, n_in), "bias": tensors.take(f"{name}.bias", n_out)}

    def layer(name):
        torch_names = {"query": "q_proj", "key": "k_proj", "value": "v_proj", "output": "out_proj"}
        attention = {ours: projection(f"{name}.self_attn.{s}", width, width) for ours, s in torch_names.items()}
        ffn = {"up": projection(f"{name}.fc1", width, hidden), "down": projection(f"{name}.fc2", hidden, width)}
        return {
            "attention": attention | {"norm": norm(f"{name}.self_attn_layer_norm")},
            "ffn": ffn | {"norm": norm(f"{name}.final_layer_norm")},
        }

    positions = config["max_position_embeddings"] + OFFSET
    params = {
        "embedding": {
            "word": tensors.take("decoder.embed_tokens.weight", vocabulary, narrow),
            "position": tensors.take("decoder.embed_positions.weight", positions, width),
        },
        "layers": {str(i): layer(f"decoder.layers.{i}") for i in range(config["num_hidden_layers"])},
    }
    if narrow != width:
        params["embedding"]["project_in"] = tensors.matrix("decoder.project_in", width, narrow)
        params["embedding"]["project_out"] = tensors.matrix("decoder.project_out", narrow, width)
    norm_first = config.get("do_layer_norm_before", True)
    if norm_first and not config.get("_remove_final_layer_norm", False):
        params["norm_final"] = norm("decoder.final_layer_norm")
    tensors.finish("lm_head.weight")  # a copy of the embedding
    return params, OPT(width // config["num_attention_heads"], norm_first)
