"""Public checkpoints: a folder with config.json, safetensors files and a tokenizer. Nothing is ever unpickled."""

import json
from pathlib import Path

import jax.numpy as jnp
import numpy as np
from safetensors import SafetensorError, safe_open

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"


def config(folder):
    """The dictionary in config.json."""
    path = Path(folder) / "config.json"
    if not path.is_file():
        raise FileNotFoundError(f"{path} not found; pass a folder with config.json and {SINGLE} or its shards")
    return json.loads(path.read_text(encoding="utf-8"))


class Tensors:
    """The arrays of one file, or of the shards that the index names; read when taken, each once.

    A leading "model." of a name is dropped. `take` checks shapes; `finish` raises for what nobody took.
    """

    def __init__(self, folder, dtype=jnp.float32):
        self._dtype, self._taken = dtype, set()
        folder = Path(folder)
        if (folder / INDEX).is_file():
            shards = json.loads((folder / INDEX).read_text(encoding="utf-8"))["weight_map"]
            for shard in set(shards.values()):
                if Path(shard).name != shard:
                    raise ValueError(f"{folder / INDEX} names the shard {shard!r}, which is not in its folder")
                if not (folder / shard).is_file():
                    raise FileNotFoundError(f"{folder / shard} not found, but {INDEX} names it; get all shards")
        elif (folder / SINGLE).is_file():
            shards = dict.fromkeys(_names(folder / SINGLE), SINGLE)
        else:
            raise FileNotFoundError(
                f"{folder} has neither {SINGLE} nor {INDEX}; pickled checkpoints (.bin, .pt) are not read: "
                "get or make the safetensors version"
            )
        self._files = {name.removeprefix("model."): (folder / shard, name) for name, shard in shards.items()}

    def __contains__(self, name):
        return name in self._files

    def take(self, name, *shape):
        """The array of that name, which must have that shape."""
        if name not in self._files:
            raise ValueError(f"the checkpoint has no '{name}'; it is not what config.json says")
        path, stored = self._files[name]
        try:
            with safe_open(path, framework="numpy") as archive:
                array = archive.get_tensor(stored)
        except SafetensorError as error:
            raise ValueError(f"{path} is damaged: {error}") from error
        if array.shape != shape:
            raise ValueError(f"'{name}' has shape {array.shape}, but config.json says {shape}")
        self._taken.add(name)
        return jnp.asarray(array).astype(self._dtype)

    def matrix(self, name, n_out, n_in):
        """A stored (out, in) matrix as (in, out)."""
        return self.take(f"{name}.weight", n_out, n_in).T

    def finish(self, *ignored):
        """Raise ValueError if an array is left whose name does not end in one of `ignored`."""
        if left := sorted(name for name in self._files.keys() - self._taken if not name.endswith(ignored)):
            raise ValueError(f"the checkpoint holds arrays that this architecture has no place for: {left[:5]}")


def _names(path):
    try:
        with safe_open(path, framework="numpy") as archive:
            return list(archive.keys())
    except SafetensorError as error:
        raise ValueError(f"{path} is damaged: {error}") from error


def encoder(folder):
    """A function from a text to its token ids (n,) int32, the checkpoint's first token (bos) before them.

    Reads tokenizer.json, or vocab.json and merges.txt, with the package `tokenizers`.
    """
    try:
        import tokenizers
    except ImportError as error:
        raise ImportError("text needs the package tokenizers (pip install tokenizers), or pass ids as .npy") from error
    folder = Path(folder)
    if (folder / "tokenizer.json").is_file():
        tokenizer = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    elif (folder / "vocab.json").is_file() and (folder / "merges.txt").is_file():
        tokenizer = tokenizers.ByteLevelBPETokenizer(str(folder / "vocab.json"), str(folder / "merges.txt"))
    else:
        raise FileNotFoundError(f"{folder} has neither tokenizer.json nor vocab.json and merges.txt; pass ids as .npy")
    first = config(folder)["bos_token_id"]
    return lambda text: np.asarray([first, *tokenizer.encode(text, add_special_tokens=False).ids], np.int32)
