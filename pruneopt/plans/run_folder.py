"""A folder that remembers which layers a run has finished, so that the same call continues after a kill."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from pruneopt import _store

_RUN = "run.json"
Expected = Mapping[str, tuple[tuple[int, ...], Any]]  # {name: shape and dtype of an array}


class RunFolder:
    """Finished layers on disk, each written whole or not at all, and bound to the run and to its place in it.

    folder: made where it does not exist. identity: {argument: value} of the call. Raises ValueError for a folder that
    holds another run, naming the arguments that differ, damaged files, or other files; TypeError for a value that
    nothing tells from another; OSError where the folder cannot be made or written.
    """

    def __init__(self, folder: str | os.PathLike[str], identity: Mapping[str, Any]):
        self._folder = Path(folder)
        if self._folder.exists() and not self._folder.is_dir():
            raise ValueError(f"run_dir='{folder}' is a file; pass a folder")
        mine = {name: _digest(name, value) for name, value in identity.items()}
        self._run = _store.digest(mine)
        self._folder.mkdir(parents=True, exist_ok=True)
        file = self._folder / _RUN
        if not file.exists():
            # What a kill leaves is named .part; nothing of that name is read, and none but our own is removed.
            if any(entry.suffix != ".part" for entry in self._folder.iterdir()):
                raise ValueError(f"run_dir='{folder}' holds other files; pass a new or empty folder")
            _store.write(file, [json.dumps({"arguments": mine, "sha256": self._run}).encode()])
        try:
            said = _store.read_json(file.read_bytes(), dict)
            theirs = said.get("arguments")
            if not isinstance(theirs, dict) or said.get("sha256") != _store.digest(theirs):
                raise _store.Damaged("its checksum does not match")
        except _store.Damaged as error:
            raise ValueError(
                f"run_dir='{folder}': {_RUN} is damaged ({error}); delete the folder and start again"
            ) from error
        if changed := [name for name in {**mine, **theirs} if mine.get(name) != theirs.get(name)]:
            raise ValueError(
                f"run_dir='{folder}' holds a run with other {', '.join(changed)}; repeat that call or pass a new folder"
            )
        for entry in self._folder.iterdir():
            if _store.is_partial(entry):
                entry.unlink(missing_ok=True)

    def load(self, index: int, expected: Expected) -> tuple[dict[str, np.ndarray], dict[str, Any]] | None:
        """(arrays, facts) of a finished layer, or None. Raises ValueError, naming the file, where it is damaged."""
        file = self._file(index)
        if not file.exists():
            return None
        try:
            arrays, texts = _store.read_tensors(file, self._owner(index))
            found = {name: (array.shape, array.dtype) for name, array in arrays.items()}
            wanted = {name: (shape, np.dtype(dtype)) for name, (shape, dtype) in expected.items()}
            if found != wanted:
                raise _store.Damaged(f"its arrays are {found}, not {wanted}")
            return arrays, _store.read_json(texts.get("facts", ""), dict)
        except _store.Foreign as error:
            raise self.damaged(index, "it is another run's, or another layer's") from error
        except _store.Damaged as error:
            raise self.damaged(index, str(error)) from error

    def damaged(self, index: int, why: str) -> ValueError:
        """The error for a layer whose file is not what was stored."""
        return ValueError(
            f"run_dir: '{self._file(index)}' is damaged ({why}); delete it, and the layer is solved again"
        )

    def store(self, index: int, arrays: Mapping[str, Any], facts: Mapping[str, Any]) -> None:
        """Remember a finished layer. Raises OSError where it cannot be written."""
        tensors = {name: np.asarray(value) for name, value in arrays.items()}
        _store.write_tensors(self._file(index), tensors, {"facts": json.dumps(facts)}, self._owner(index))

    def _owner(self, index: int) -> str:
        return _store.digest([self._run, index])

    def _file(self, index: int) -> Path:
        return self._folder / f"layer-{index:05d}.safetensors"


def _digest(name: str, value: Any) -> str:
    try:
        return _store.digest(value)
    except TypeError as error:
        raise TypeError(f"run_dir: {name} holds {error}; leave run_dir out, or write it as a dataclass") from error
