"""What lies on disk: whole or not there, bound to what it belongs to, and checked when it comes back.

A file is a safetensors file: arrays, and text in its header. Its checksum covers to whom it belongs, texts, and each
array's name, dtype, shape and bytes. Nothing is ever pickled.
"""

from __future__ import annotations

import dataclasses
import enum
import functools
import hashlib
import json
import os
import re
import secrets
import types
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from safetensors import SafetensorError, safe_open

Tensors = Mapping[str, np.ndarray]
_PARTIAL = re.compile(r"\.[0-9a-f]{16}\.part$")
_FORMAT_KEY, _FORMAT, _OWNER, _CHECKSUM = "format", "pruneopt 2", "belongs_to", "sha256"
# The names that the format has for dtypes: https://github.com/huggingface/safetensors#format
_NAMES = {"bool": "BOOL", "bfloat16": "BF16", "complex64": "C64"}
_NAMES |= {f"{kind}{n}": f"{kind[0].upper()}{n}" for kind in ("int", "uint") for n in (8, 16, 32, 64)}
_NAMES |= {f"float{n}": f"F{n}" for n in (16, 32, 64)}


class Damaged(ValueError):
    """A file that is not what was written. The message says why; the caller says which file, and what to do."""


class Foreign(Damaged):
    """A file that somebody else wrote."""


def write(file: str | os.PathLike[str], chunks: Iterable[Any]) -> None:
    """Write `chunks`, bytes or buffers, to `file`, whole or not at all, whatever was there before.

    They go to a new file beside it, whose name nothing has, are forced to the disk, and take the name of `file` in one
    step; a symbolic link of that name is replaced, not followed. Raises OSError, and leaves nothing behind.
    """
    target = Path(file)
    if target.is_dir():
        raise IsADirectoryError(f"file '{file}' is a folder; pass the name of a file in it")
    if not target.parent.is_dir():
        raise FileNotFoundError(f"file '{file}': the folder '{target.parent}' does not exist; make it first")
    partial = target.with_name(f"{target.name}.{secrets.token_hex(8)}.part")
    descriptor = os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_EXCL | getattr(os, "O_BINARY", 0), 0o666)
    try:
        with os.fdopen(descriptor, "wb") as stream:
            for chunk in chunks:
                stream.write(chunk)
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(partial, target)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise
    if hasattr(os, "O_DIRECTORY"):  # the new name too outlives a power cut, where a folder can be forced to the disk
        folder = os.open(target.parent, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


def is_partial(file: Path) -> bool:
    """Whether a kill left this file behind in the middle of `write`."""
    return _PARTIAL.search(file.name) is not None and not file.is_symlink()


def write_tensors(
    file: str | os.PathLike[str], tensors: Tensors, texts: Mapping[str, str], belongs_to: str = ""
) -> None:
    """Write arrays of NumPy's own dtypes and texts as one safetensors file that belongs to an identity (a digest)."""
    arrays = {name: np.asarray(array) for name, array in tensors.items()}
    said = {_FORMAT_KEY: _FORMAT, _OWNER: belongs_to, _CHECKSUM: _checksum(belongs_to, texts, arrays)}
    write_plain(file, arrays, {**texts, **said})


def has_name(dtype: np.dtype) -> bool:
    """Whether a safetensors file can hold arrays of that dtype as they are."""
    return dtype.name in _NAMES


def write_plain(file: str | os.PathLike[str], tensors: Tensors, texts: Mapping[str, str]) -> None:
    """Write arrays of dtypes that the format has, and texts, as a safetensors file with nothing of our own in it."""
    arrays = {name: np.asarray(tensors[name]) for name in sorted(tensors)}
    arrays = {name: array.astype(array.dtype.newbyteorder("<"), copy=False) for name, array in arrays.items()}
    arrays = dict(sorted(arrays.items(), key=lambda row: -row[1].dtype.itemsize))  # so each starts at its alignment
    header: dict[str, Any] = {"__metadata__": dict(texts)}
    end = 0
    for name, array in arrays.items():
        start, end = end, end + array.nbytes
        header[name] = {
            "dtype": _NAMES[array.dtype.name],
            "shape": list(array.shape),
            "data_offsets": [start, end],
        }
    described = json.dumps(header).encode()
    described += b" " * (-len(described) % 8)
    write(file, [len(described).to_bytes(8, "little"), described, *map(_raw, arrays.values())])


def read_tensors(file: str | os.PathLike[str], belongs_to: str = "") -> tuple[dict[str, np.ndarray], dict[str, str]]:
    """(arrays, texts) of a file that `write_tensors` wrote for that identity. Raises Foreign, Damaged, or OSError."""
    arrays, texts = read_any(file)
    if texts.pop(_FORMAT_KEY, None) != _FORMAT:
        raise Foreign("it was not written by this pruneopt")
    owner, checksum = texts.pop(_OWNER, ""), texts.pop(_CHECKSUM, "")
    if _checksum(owner, texts, arrays) != checksum:
        raise Damaged("its checksum does not match")
    if owner != belongs_to:
        raise Foreign("it belongs elsewhere")
    return arrays, texts


def read_any(file: str | os.PathLike[str]) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    """(arrays, texts) of any safetensors file. Raises Damaged, or OSError (FileNotFoundError where there is none)."""
    with open(file, "rb"):  # the reader below tells a missing file from a damaged one by its text alone
        pass
    try:
        with safe_open(file, framework="numpy") as archive:
            return {name: archive.get_tensor(name) for name in archive.keys()}, archive.metadata() or {}  # noqa: SIM118
    except (SafetensorError, AttributeError, TypeError, ValueError) as error:
        raise Damaged(f"{error}") from error


def read_json(text: str | bytes, kind: type) -> Any:
    """A value of that kind from JSON. Raises Damaged."""
    try:
        value = json.loads(text)
    except ValueError as error:
        raise Damaged(f"{error}") from error
    if not isinstance(value, kind):
        raise Damaged(f"it holds a {type(value).__name__} where a {kind.__name__} belongs")
    return value


def _checksum(belongs_to: str, texts: Mapping[str, str], arrays: Tensors) -> str:
    return digest([belongs_to, sorted(texts.items()), dict(sorted(arrays.items()))])


def _raw(array: np.ndarray) -> memoryview:
    """An array's bytes, row by row."""
    return np.ascontiguousarray(array).reshape(-1).view(np.uint8).data


# ---------------------------------------------------------------------------------------------------------- identities


def digest(value: Any) -> str:
    """A checksum that tells a value from every other: each part is written with its type, its length and its content.

    Arrays count by dtype, shape and bytes, wherever they lie; dataclasses and other objects by their fields; mappings
    in their order; functions by their code, defaults and what they closed over, not by the globals that they read.
    Raises TypeError for an object that has no value of its own.
    """
    found = hashlib.sha256()
    inside: list[int] = []  # what is being written: a part that holds itself is named by how deep it lies

    def put(content: Any) -> None:
        found.update(len(content).to_bytes(8, "little"))
        found.update(content)

    def add(item: Any) -> None:
        if id(item) in inside:
            put(b"itself")
            put(str(inside.index(id(item))).encode())
            return
        kind, content, parts = _parts(item)
        put(kind.encode())
        put(content)
        found.update(len(parts).to_bytes(8, "little"))
        inside.append(id(item))
        for part in parts:
            add(part)
        inside.pop()

    add(value)
    return found.hexdigest()


def _parts(x: Any) -> tuple[str, Any, list[Any]]:
    """(kind, content, parts) of a value."""
    kind = f"{type(x).__module__}.{type(x).__qualname__}"
    if isinstance(x, bytes):
        return kind, x, []
    if x is None or isinstance(x, (bool, int, float, complex, str, np.dtype)):
        return kind, repr(x).encode(), []
    if isinstance(x, (jax.Array, np.ndarray, np.generic)):
        return _array_parts(x)
    if isinstance(x, enum.Enum):
        return kind, x.name.encode(), []
    if isinstance(x, type):
        return kind, f"{x.__module__}.{x.__qualname__}".encode(), []
    if dataclasses.is_dataclass(x):
        return kind, b"", [part for f in dataclasses.fields(x) for part in (f.name, getattr(x, f.name))]
    if isinstance(x, Mapping):
        return kind, b"", [part for entry in x.items() for part in entry]
    if isinstance(x, (list, tuple)):
        return kind, b"", list(x)
    if isinstance(x, (set, frozenset)):
        return kind, "".join(sorted(map(digest, x))).encode(), []
    if isinstance(x, types.CodeType):
        return kind, x.co_code, [x.co_consts, x.co_names]
    if isinstance(x, types.FunctionType):
        return kind, b"", [x.__code__, x.__defaults__, x.__kwdefaults__, list(x.__closure__ or ())]
    if isinstance(x, types.CellType):
        return kind, b"", _cell(x)
    if isinstance(x, types.MethodType):
        return kind, b"", [x.__func__, x.__self__]
    if isinstance(x, functools.partial):
        return kind, b"", [x.func, x.args, x.keywords]
    if hasattr(x, "__wrapped__"):
        return kind, b"", [x.__wrapped__]
    if name := getattr(x, "__qualname__", getattr(x, "__name__", None)):
        return kind, f"{getattr(x, '__module__', '')}.{name}".encode(), []
    if hasattr(x, "__dict__"):
        return kind, b"", [vars(x)]
    raise TypeError(f"a {kind}, which has no value that could tell it from another")


def _array_parts(x: Any) -> tuple[str, Any, list[Any]]:
    if isinstance(x, jax.Array) and jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
        return "key", str(jax.random.key_impl(x)).encode(), [jax.random.key_data(x)]
    array = np.asarray(x)
    said = f"array {array.dtype} {array.shape}"
    return (said, b"", list(array.flat)) if array.dtype == object else (said, _raw(array), [])


def _cell(cell: types.CellType) -> list[Any]:
    try:
        return [cell.cell_contents]
    except ValueError:  # empty
        return []
