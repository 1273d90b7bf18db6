"""A folder that remembers which layers a run has finished, so that the same call continues after a kill."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from pruneopt import _tree

_RUN = "run.json"


class RunFolder:
    """Finished layers on disk, each written whole or not at all.

    folder: made where it does not exist. identity: {argument: value} of the call; a folder that holds another run, or
    damaged files, raises ValueError naming the argument that differs.
    """

    def __init__(self, folder: str | os.PathLike[str], identity: Mapping[str, Any]):
        self._folder = Path(folder)
        if self._folder.exists() and not self._folder.is_dir():
            raise ValueError(f"run_dir='{folder}' is a file; pass a folder")
        self._folder.mkdir(parents=True, exist_ok=True)
        mine = {name: digest(value) for name, value in identity.items()}
        file = self._folder / _RUN
        if not file.exists():
            if any(self._folder.iterdir()):
                raise ValueError(f"run_dir='{folder}' holds other files; pass a new or empty folder")
            _write(file, json.dumps(mine).encode())
            return
        try:
            theirs = json.loads(file.read_text())
            if not isinstance(theirs, dict):
                raise ValueError("no object")
        except ValueError as error:
            raise ValueError(f"run_dir='{folder}': {_RUN} is damaged; delete the folder and start again") from error
        if changed := [name for name in mine if mine[name] != theirs.get(name)]:
            raise ValueError(
                f"run_dir='{folder}' holds a run with other {', '.join(changed)}; repeat that call or pass a new folder"
            )

    def load(self, index: int, shape: tuple[int, ...]) -> tuple[dict[str, np.ndarray], dict[str, Any]] | None:
        """(arrays, facts) of a finished layer, its value and support of `shape`, or None."""
        file = self._file(index)
        if not file.exists():
            return None
        try:
            with safe_open(file, framework="numpy") as archive:
                arrays = {name: archive.get_tensor(name) for name in archive.keys()}  # noqa: SIM118
                if any(arrays[name].shape != shape for name in ("value", "support")):
                    raise ValueError(f"its arrays are not {shape}")
                return arrays, json.loads((archive.metadata() or {})["facts"])
        except (SafetensorError, KeyError, ValueError) as error:
            raise ValueError(
                f"run_dir: '{file}' is damaged ({error}); delete it, and the layer is solved again"
            ) from error

    def store(self, index: int, arrays: Mapping[str, Any], facts: Mapping[str, Any]) -> None:
        """Remember a finished layer."""
        partial = self._file(index).with_suffix(".part")
        tensors = {name: np.ascontiguousarray(value) for name, value in arrays.items()}
        save_file(tensors, partial, metadata={"facts": json.dumps(facts)})
        os.replace(partial, self._file(index))

    def _file(self, index: int) -> Path:
        return self._folder / f"layer-{index:05d}.safetensors"


def _write(file: Path, content: bytes) -> None:
    partial = file.with_suffix(".part")
    partial.write_bytes(content)
    os.replace(partial, file)


def digest(value: Any) -> str:
    """A checksum of a value: arrays by their bytes, dataclasses by their fields, pytrees by their leaves."""
    found = hashlib.sha256()

    def add(item: Any) -> None:
        if isinstance(item, (jax.Array, np.ndarray)) and _tree.is_array(item):
            array = np.asarray(item)
            found.update(f"{array.dtype}{array.shape}".encode())
            found.update(np.ascontiguousarray(array).tobytes())
        elif dataclasses.is_dataclass(item) and not isinstance(item, type):
            found.update(type(item).__name__.encode())
            for field in dataclasses.fields(item):
                found.update(field.name.encode())
                add(getattr(item, field.name))
        elif isinstance(item, Mapping):
            for key in item:
                found.update(repr(key).encode())
                add(item[key])
        elif isinstance(item, (list, tuple)):
            found.update(f"{len(item)}".encode())
            for part in item:
                add(part)
        elif isinstance(item, (str, int, float, bool, type(None))):
            found.update(repr(item).encode())
        elif (leaves := jax.tree.leaves(item)) and leaves != [item]:
            add(leaves)
        else:  # functions and other objects have no value of their own
            found.update(type(item).__qualname__.encode())

    add(value)
    return found.hexdigest()
