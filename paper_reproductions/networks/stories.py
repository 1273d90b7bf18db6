"""stories260K: a Llama-architecture decoder trained on TinyStories, 260,032 parameters, perplexity 4.4087.

Width 64, 5 layers, 8 query heads and 4 key/value heads of width 8, gated feed-forward of width 172, 512 tokens; the
embedding is also the output matrix. Every projection is (in, out); the forward pass is `llama.Llama`.

`folder` is the data folder (PRUNEOPT_DATA): it holds llm/ and text/.
"""

import gzip
import math
import re
import struct
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from paper_reproductions.networks import decoder
from paper_reproductions.networks.llama import Llama

BOS = 1
forward = Llama(head=8)  # logits (B, T, 512) of tokens (B, T)


def load(folder):
    """Parameters {"embedding", "layers": {"0": {"norm_attn", "wq", ...}, ...}, "norm_final"}, and the configuration."""
    params, config = {"layers": {}}, {}
    with np.load(Path(folder) / "llm" / "stories260K.npz", allow_pickle=False) as archive:
        for key in archive.files:
            group, _, name = key.partition(".")
            if group == "config":
                config[name] = int(archive[key])
            elif group == "layers":
                layer, name = name.split(".")
                array = _halves(archive[key]) if name in ("wq", "wk") else archive[key]
                params["layers"].setdefault(layer, {})[name] = jnp.asarray(array.T)  # (out, in) -> (in, out)
            else:
                params[key] = jnp.asarray(archive[key])
    return params, config


def _halves(weight):
    """Rows of (out, in) so that rotary embeddings turn the halves of a head, where the file has adjacent pairs."""
    pairs = weight.reshape(-1, forward.head // 2, 2, weight.shape[1])  # (heads, 4, 2, in)
    return pairs.swapaxes(1, 2).reshape(weight.shape)


def stacked(params):
    """The same parameters with one array for all layers: {"layers": {"wq": (5, 64, 64), ...}, ...}."""
    layers = [params["layers"][str(i)] for i in range(len(params["layers"]))]
    return {**params, "layers": jax.tree.map(lambda *leaves: jnp.stack(leaves), *layers)}


def forward_scanned(params, tokens):
    """`forward` as a scan over the layers of `stacked(params)`."""
    x = params["embedding"][tokens]
    x, _ = jax.lax.scan(lambda x, layer: (forward.layer(layer, x), None), x, params["layers"])
    return forward.logits(params, x)


def tokenizer(folder):
    """{piece: (id, score)} of the 512 pieces; the file is a length, then records of score, length and bytes."""
    packed, pieces, at = (Path(folder) / "llm" / "stories260K_tok512.bin").read_bytes(), {}, 4
    while at < len(packed):
        score, length = struct.unpack_from("<fi", packed, at)
        pieces[packed[at + 8 : at + 8 + length]] = (len(pieces), score)
        at += 8 + length
    return pieces


def encode(text, tokenizer):
    """Token ids of a text: bos, then its characters, joined pair by pair, the highest-scoring pair first."""
    pieces = []
    for character in " " + text:
        utf8 = character.encode()
        pieces += [utf8] if utf8 in tokenizer else [b"<0x%02X>" % byte for byte in utf8]

    def score(i):
        return tokenizer.get(pieces[i] + pieces[i + 1], (None, -math.inf))[1]

    scores = [score(i) for i in range(len(pieces) - 1)]  # of joining piece i with the next
    while scores and (best := max(scores)) > -math.inf:
        i = scores.index(best)
        pieces[i : i + 2] = [pieces[i] + pieces[i + 1]]
        del scores[i]
        for neighbour in {i - 1, i} & set(range(len(scores))):
            scores[neighbour] = score(neighbour)
    return [BOS, *(tokenizer[piece][0] for piece in pieces)]


def windows(folder, start=0, count=40):
    """Windows of 1,200 characters of TinyStories, encoded and cut to 513 tokens; the first 40 are for evaluation."""
    text = gzip.decompress((Path(folder) / "text" / "tinystories_sample.txt.gz").read_bytes()).decode()
    text, pieces = re.sub("\n+", "\n", text), tokenizer(folder)
    return [
        np.asarray(encode(text[i : i + 1200], pieces)[:513], np.int32) for i in range(start, start + 1200 * count, 1200)
    ]


def batches(windows, size=8):
    """Arrays (B, T) of windows of equal length, B at most `size`."""
    by_length = {}
    for window in windows:
        by_length.setdefault(len(window), []).append(window)
    return [np.stack(same[i : i + size]) for same in by_length.values() for i in range(0, len(same), size)]


def perplexity(params, windows):
    """exp of the mean loss over all predictions of the windows."""
    return decoder.perplexity(forward, params, batches(windows))
