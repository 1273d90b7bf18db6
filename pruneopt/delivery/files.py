"""Save a pruned network and load it again, as safetensors: arrays and JSON, nothing is ever unpickled.

A pruned leaf is stored as the values of its support and one bit a weight; other arrays as they are. Leaves that are not
arrays (functions, flags) are not stored: loading takes a tree `like` the saved one and fills in its arrays.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from pruneopt import _tree
from pruneopt.solution import Pruned

Tree = Any
_FORMAT = "pruneopt 1"
_VALUES, _MASK, _ARRAY = "values:", "mask:", "array:"


def save(pruned: Pruned, file: str | os.PathLike[str]) -> None:
    """Write values, masks and history of `pruned` to `file` (safetensors), all or nothing.

    Raises TypeError for a Pruned of another type, OSError where the file cannot be written.
    """
    if not isinstance(pruned, Pruned):
        raise TypeError(f"pruned is a {type(pruned).__name__}; pass what prune returned")
    tensors, leaves = _tensors(pruned)
    said = {"leaves": json.dumps(leaves), "history": json.dumps(pruned.history, default=_plain)}
    metadata = {"format": _FORMAT, **said, "sha256": _digest(tensors, said)}
    target = Path(file)
    partial = target.with_name(target.name + ".part")
    try:
        if not target.parent.is_dir():
            raise FileNotFoundError(f"file '{file}': the folder '{target.parent}' does not exist; make it first")
        save_file(tensors, partial, metadata=metadata)
        os.replace(partial, target)
    finally:
        partial.unlink(missing_ok=True)


def load(file: str | os.PathLike[str], like: Tree) -> Pruned:
    """The Pruned in `file`, in the structure of `like` (the network's parameters, pruned or not).

    Kept weights are bit-identical to the saved ones, pruned ones exactly zero; leaves that are not arrays come from
    `like`. `solutions` is empty: problems are not stored.
    Raises ValueError for a damaged file, one that `save` did not write, or one that does not fit `like`;
    FileNotFoundError where there is none.
    """
    tensors, metadata = _read(file)
    if metadata.get("format") != _FORMAT:
        raise ValueError(f"file '{file}' was not written by pruneopt.save; load masks of other tools with load_masks")
    said = {name: metadata.get(name, "") for name in ("leaves", "history")}
    if _digest(tensors, said) != metadata.get("sha256"):
        raise ValueError(f"file '{file}' is damaged: its checksum does not match; save it again")
    described = json.loads(metadata["leaves"])
    arrays, masks = {}, {}
    for path, about in described.items():
        arrays[path], masks[path] = _restored(path, about, tensors)
    return Pruned(
        _filled(like, arrays, file),
        _tree.map_named(lambda path, leaf: masks.get(path), like),
        history=json.loads(metadata["history"]),
    )


def load_masks(file: str | os.PathLike[str]) -> dict[str, np.ndarray]:
    """{name: boolean mask} from a safetensors or npz file of any tool; nonzero means kept.

    Pass the result to `pruneopt.from_masks(params, masks)`, renamed to the paths of `params` where they differ.
    Raises ValueError for a damaged file or one with pickled objects.
    """
    if str(file).endswith(".npz"):
        try:
            with np.load(file, allow_pickle=False) as archive:
                return {name: archive[name] != 0 for name in archive.files}
        except FileNotFoundError:
            raise
        except Exception as error:
            raise ValueError(f"file '{file}' is not a readable npz of plain arrays: {error}") from error
    return {name: value != 0 for name, value in _read(file)[0].items()}


def stored_bytes(pruned: Pruned) -> int:
    """Bytes of the arrays that `save` writes."""
    return sum(t.nbytes for t in _tensors(pruned)[0].values())


def _tensors(pruned: Pruned) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    masks = dict(_tree.named_leaves(pruned.support))
    tensors: dict[str, np.ndarray] = {}
    leaves: dict[str, Any] = {}
    for path, leaf in _tree.named_leaves(pruned.params):
        if not isinstance(leaf, (jax.Array, np.ndarray)):
            continue
        about: dict[str, Any] = {"numpy": isinstance(leaf, np.ndarray)}
        if isinstance(leaf, jax.Array) and jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            about["key"] = str(jax.random.key_impl(leaf))
            leaf = jax.random.key_data(leaf)
        array = np.asarray(leaf)
        about |= {"dtype": str(array.dtype), "shape": list(array.shape)}
        raw = array.view(f"u{array.dtype.itemsize}") if array.dtype.kind not in "biuf" else array
        if path in masks:
            mask = np.asarray(masks[path])
            tensors[_VALUES + path] = np.ascontiguousarray(raw[mask])
            tensors[_MASK + path] = np.packbits(mask.reshape(-1))
        else:
            tensors[_ARRAY + path] = np.ascontiguousarray(raw)
        leaves[path] = about
    return tensors, leaves


def _restored(path: str, about: Mapping[str, Any], tensors: Mapping[str, np.ndarray]) -> tuple[Any, Any]:
    dtype, shape, mask = jnp.dtype(about["dtype"]), tuple(about["shape"]), None
    if _ARRAY + path in tensors:
        array = tensors[_ARRAY + path].view(dtype).reshape(shape)
    else:
        bits = np.unpackbits(tensors[_MASK + path], count=int(np.prod(shape, dtype=np.int64)))
        mask = bits.astype(bool).reshape(shape)
        array = np.zeros(shape, dtype)
        array[mask] = tensors[_VALUES + path].view(dtype)
        mask = jnp.asarray(mask)
    if "key" in about:
        return jax.random.wrap_key_data(jnp.asarray(array), impl=about["key"]), None
    return (array if about["numpy"] else jnp.asarray(array)), mask


def _filled(like: Tree, arrays: dict[str, Any], file: Any) -> Tree:
    wanted = {p: leaf for p, leaf in _tree.named_leaves(like) if isinstance(leaf, (jax.Array, np.ndarray))}
    if missing := sorted(wanted.keys() ^ arrays.keys()):
        where = "like" if missing[0] in arrays else f"file '{file}'"
        raise ValueError(f"{where} lacks the array '{missing[0]}'; pass like= the tree that was pruned")
    for path, leaf in wanted.items():
        if arrays[path].shape != leaf.shape:
            raise ValueError(f"like: '{path}' has shape {leaf.shape}, the file has {arrays[path].shape}")
    return _tree.map_named(lambda path, leaf: arrays.get(path, leaf), like)


def _read(file: str | os.PathLike[str]) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    if not Path(file).is_file():
        raise FileNotFoundError(f"file '{file}' does not exist")
    try:
        with safe_open(file, framework="numpy") as archive:
            return {name: archive.get_tensor(name) for name in archive.keys()}, archive.metadata() or {}  # noqa: SIM118
    except SafetensorError as error:
        raise ValueError(f"file '{file}' is damaged or not a safetensors file: {error}") from error


def _digest(tensors: Mapping[str, np.ndarray], said: Mapping[str, str]) -> str:
    digest = hashlib.sha256(json.dumps(said, sort_keys=True).encode())
    for name in sorted(tensors):
        digest.update(name.encode())
        digest.update(np.ascontiguousarray(tensors[name]).data)
    return digest.hexdigest()


def _plain(value: Any) -> Any:
    """What JSON cannot say of a history: NumPy and JAX scalars as numbers, anything else as text."""
    return value.item() if hasattr(value, "item") and getattr(value, "size", 0) == 1 else str(value)
