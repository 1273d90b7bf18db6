"""Decoders from a folder, whatever their family, and the perplexity of a text as SparseGPT and ALPS measure it."""

import gzip
import json
import math
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from paper_reproductions.networks import checkpoint, gguf_llama, llama, opt

FAMILIES = {"llama": llama, "opt": opt}


class Decoder(NamedTuple):
    """forward(params, tokens (B, T)) -> logits (B, T, vocabulary); `projections`: patterns of what papers prune."""

    params: Any
    forward: Any
    projections: list[str]


def load(folder, dtype=jnp.float32):
    """The decoder in a folder with config.json and safetensors (families: opt, llama), or in a .gguf file (llama)."""
    if is_gguf(folder):
        return Decoder(*gguf_llama.load(folder, dtype), llama.PROJECTIONS)
    family = checkpoint.config(folder).get("model_type")
    if family not in FAMILIES:
        raise ValueError(f"model_type is {family!r}; the families known here are {', '.join(FAMILIES)}")
    return Decoder(*FAMILIES[family].load(folder, dtype), FAMILIES[family].PROJECTIONS)


def is_gguf(model):
    """Whether a model is a file, not a folder."""
    return Path(model).suffix == ".gguf"


def positions(model):
    """The longest text that a model was trained on, in tokens."""
    return gguf_llama.positions(model) if is_gguf(model) else checkpoint.config(model)["max_position_embeddings"]


def encoder(model):
    """A function from a text to its token ids (n,) int32."""
    return gguf_llama.encoder(model) if is_gguf(model) else checkpoint.encoder(model)


def token_ids(folder, path):
    """Token ids (n,) int32 of a file: .npy holds ids, anything else is text, joined as the papers join WikiText."""
    path = Path(path)
    if path.suffix == ".npy":
        return np.load(path, allow_pickle=False).astype(np.int32).reshape(-1)
    raw = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    return encoder(folder)(joined(raw.decode()))


def joined(text):
    """Lines with two more line ends between them, blank ones emptied: the rows of WikiText-2-raw joined by "\\n\\n"."""
    return "\n\n".join(line if line.strip() else "" for line in text.splitlines(keepends=True))


def segments(ids, length):
    """Contiguous segments (count, length) of a text; the rest is dropped."""
    count = len(ids) // length
    if not count:
        raise ValueError(f"the text has {len(ids)} tokens, fewer than one segment of {length}; pass a longer text")
    return ids[: count * length].reshape(count, length)


def calibration(folder, path, count, length, seed=0):
    """Segments (count, length) of a file, drawn as SparseGPT draws its calibration set.

    Of a shard of C4 (.json.gz, one {"text": ...} a line), from documents longer than a segment; else of `token_ids`.
    """
    if not str(path).endswith(".json.gz"):
        return sampled(token_ids(folder, path), count, length, seed)
    with gzip.open(path) as lines:
        documents = list(lines)
    encode, rng, found = encoder(folder), np.random.default_rng(seed), []
    for i in rng.permutation(len(documents)):
        ids = encode(json.loads(documents[i])["text"])
        if len(ids) > length:
            start = rng.integers(0, len(ids) - length)
            found.append(ids[start : start + length])
        if len(found) == count:
            return np.stack(found)
    raise ValueError(f"{path} has {len(found)} documents longer than {length} tokens, not {count}; pass a larger shard")


def sampled(ids, count, length, seed=0):
    """Segments (count, length) that start anywhere, drawn with replacement."""
    if len(ids) < length:
        raise ValueError(f"the text has {len(ids)} tokens, fewer than one segment of {length}; pass a longer text")
    starts = np.random.default_rng(seed).integers(0, len(ids) - length + 1, count)
    return np.stack([ids[start : start + length] for start in starts])


@partial(jax.jit, static_argnums=0)
def total_loss(forward, params, tokens):
    """Summed next-token loss of tokens (B, T)."""
    log_probabilities = jax.nn.log_softmax(forward(params, tokens[:, :-1]).astype(jnp.float32))  # (B, T - 1, words)
    return -jnp.take_along_axis(log_probabilities, tokens[:, 1:, None], axis=-1).sum()


def perplexity(forward, params, batches):
    """exp of the mean loss over the predictions of batches of segments (B, T), each segment read by itself."""
    total = sum(float(total_loss(forward, params, tokens)) for tokens in batches)
    return math.exp(total / sum(tokens.shape[0] * (tokens.shape[1] - 1) for tokens in batches))
