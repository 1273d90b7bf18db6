"""Files whole or not there, and digests that nothing else has."""

import dataclasses
import errno
import functools
import json
import os

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from safetensors.numpy import load_file

import pruneopt as po
from pruneopt import _store
from pruneopt.constraints import Blocks, Cardinality

HALF = Cardinality(sparsity=0.5)


@dataclasses.dataclass(frozen=True)
class Other:
    shape: tuple
    budget: object


def adder(n):
    return lambda x: x + n


DISTINCT = {
    "blocks (1, 12)": Blocks((1, 12), HALF),
    "blocks (11, 2)": Blocks((11, 2), HALF),
    "another class": Other((1, 12), HALF),
    "another budget": Blocks((1, 12), Cardinality(sparsity=0.25)),
    "text": "12",
    "number": 12,
    "real": 12.0,
    "true": True,
    "one": 1,
    "none": None,
    "list": ["a", "b"],
    "joined": ["ab"],
    "nested": [["a"], "b"],
    "deeper": ["a", ["b"]],
    "empty": [],
    "tuple": ("a", "b"),
    "mapping": {"a": "b"},
    "mapping of two": {"a": 1, "b": 2},
    "another order": {"b": 2, "a": 1},
    "array": np.arange(4),
    "array (2, 2)": np.arange(4).reshape(2, 2),
    "int32": np.arange(4, dtype=np.int32),
    "two halves": [np.arange(2), np.arange(2, 4)],
    "key 0": jax.random.key(0),
    "key 1": jax.random.key(1),
    "another key": jax.random.key(0, impl="rbg"),
    "bfloat16": jnp.zeros(3, jnp.bfloat16),
    "float16": jnp.zeros(3, jnp.float16),
    "plus 1": adder(1),
    "plus 2": adder(2),
    "minus": lambda x: x - 1,
    "partial": functools.partial(adder, 1),
    "partial 2": functools.partial(adder, 2),
    "compiled": jax.jit(adder(1)),
    "compiled 2": jax.jit(adder(2)),
    "method": HALF.select,
    "other method": Cardinality(sparsity=0.25).select,
    "function": np.linalg.norm,
    "ufunc": np.add,
    "ufunc 2": np.subtract,
    "class": Cardinality,
    "set": {1, 2},
    "set 2": {1, 3},
    "status": po.solution.Status.OPTIMAL,
    "status 2": po.solution.Status.FEASIBLE,
    "optimiser": optax.adam(1e-3),
    "optimiser 2": optax.adam(1e-2),
    "dtype": np.dtype(np.float32),
    "bytes": b"12",
}


def test_no_two_values_have_one_digest():
    found = {name: _store.digest(value) for name, value in DISTINCT.items()}
    assert len(set(found.values())) == len(found)
    assert found == {name: _store.digest(value) for name, value in DISTINCT.items()}


def test_equal_values_have_one_digest_wherever_they_lie():
    assert _store.digest(np.arange(6.0).reshape(2, 3)) == _store.digest(jnp.arange(6.0).reshape(2, 3))
    assert _store.digest(np.asfortranarray(np.arange(6.0).reshape(2, 3))) == _store.digest(
        jnp.arange(6.0).reshape(2, 3)
    )
    assert _store.digest(adder(1)) == _store.digest(adder(1))
    assert _store.digest(Blocks((1, 12), HALF)) == _store.digest(Blocks((1, 12), Cardinality(sparsity=0.5)))


def test_what_holds_itself_has_a_digest():
    loop = [1]
    loop.append(loop)
    assert _store.digest(loop) != _store.digest([1, [1]])


def test_an_object_without_a_value_is_refused():
    with pytest.raises(TypeError, match=r"a builtins\.object, which has no value"):
        _store.digest([object()])


# --------------------------------------------------------------------------------------------------------- writing


def test_a_file_is_written_whole_or_not_at_all(tmp_path):
    file = tmp_path / "x"
    _store.write(file, [b"old"])

    def broken():
        yield b"new"
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        _store.write(file, broken())
    assert file.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [file]
    _store.write(file, [b"ne", b"w"])
    assert file.read_bytes() == b"new"
    assert list(tmp_path.iterdir()) == [file]


@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_a_full_disk_is_an_oserror_and_leaves_nothing(tmp_path, monkeypatch, call):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    file = tmp_path / "x"
    file.write_bytes(b"old")
    monkeypatch.setattr(os, call, full)
    with pytest.raises(OSError, match="No space left"):
        _store.write(file, [b"new"])
    assert file.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [file]


def test_a_full_device_is_an_oserror(tmp_path, monkeypatch):
    if not os.path.exists("/dev/full"):
        pytest.skip("no /dev/full on this system")
    opened = os.open
    monkeypatch.setattr(os, "open", lambda path, flags, *mode: opened("/dev/full", os.O_WRONLY))
    with pytest.raises(OSError, match="No space left"):
        _store.write(tmp_path / "x", [b"new"])
    assert not list(tmp_path.iterdir())


def test_places_that_cannot_be_written_are_oserrors(tmp_path):
    (tmp_path / "file").write_bytes(b"mine")
    (tmp_path / "folder").mkdir()
    for place in ("file/x", "nowhere/x"):
        with pytest.raises(FileNotFoundError, match="does not exist; make it first"):
            _store.write(tmp_path / place, [b"new"])
    with pytest.raises(IsADirectoryError, match="is a folder; pass the name of a file in it"):
        _store.write(tmp_path / "folder", [b"new"])


def test_files_and_links_of_the_user_are_never_written_through(tmp_path):
    mine = tmp_path / "mine"
    mine.write_bytes(b"mine")
    (tmp_path / "x.part").write_bytes(b"mine too")
    (tmp_path / "y.part").symlink_to(mine)
    (tmp_path / "z").symlink_to(mine)
    for name in "xyz":
        _store.write(tmp_path / name, [b"new"])
        assert (tmp_path / name).read_bytes() == b"new"
    assert mine.read_bytes() == b"mine"
    assert (tmp_path / "x.part").read_bytes() == b"mine too"
    assert (tmp_path / "y.part").readlink() == mine


def test_a_file_opens_in_the_formats_own_library(tmp_path):
    arrays = {
        "a": np.arange(6, dtype=np.int8).reshape(2, 3),
        "b": np.float64(2.5),
        "c": np.zeros((0, 4), np.float32),
        "d": np.array([True, False]),
        "e": np.arange(8, dtype=np.uint16)[::2],
    }
    _store.write_tensors(tmp_path / "x", arrays, {"said": "ä"}, "me")
    found = load_file(tmp_path / "x")
    assert found.keys() == arrays.keys()
    for name, array in arrays.items():
        assert found[name].dtype == array.dtype
        np.testing.assert_array_equal(found[name], array)
    again, texts = _store.read_tensors(tmp_path / "x", "me")
    assert again.keys() == arrays.keys()
    assert texts == {"said": "ä"}
    with pytest.raises(_store.Foreign, match="belongs elsewhere"):
        _store.read_tensors(tmp_path / "x", "you")


def test_every_flipped_byte_is_found(tmp_path):
    file = tmp_path / "x"
    _store.write_tensors(file, {"a": np.arange(3.0), "b": np.ones(2, np.uint8)}, {"said": "something"}, "me")
    whole = file.read_bytes()
    length = 8 + int.from_bytes(whole[:8], "little")
    spaces = {i for i in range(8, length) if whole[i:length].strip() == b""}  # they say nothing
    missed = []
    for place in range(len(whole)):
        file.write_bytes(whole[:place] + bytes([whole[place] ^ 0x04]) + whole[place + 1 :])
        try:
            _store.read_tensors(file, "me")
            missed.append(place)
        except _store.Damaged:
            pass
    assert set(missed) <= spaces


CRAFTED = {
    "dtype": ["F16", "F7", "I64"],
    "shape": [[4], [-3], [3, 1], "3"],
    "data_offsets": [[0, 10**9], [8, 32], [24, 0]],
}


@pytest.mark.parametrize(("key", "value"), [(key, value) for key, values in CRAFTED.items() for value in values])
def test_a_crafted_header_is_damage(tmp_path, key, value):
    file = tmp_path / "x"
    _store.write_tensors(file, {"a": np.arange(3.0)}, {}, "me")
    whole = file.read_bytes()
    length = int.from_bytes(whole[:8], "little")
    header = json.loads(whole[8 : 8 + length])
    header["a"][key] = value
    crafted = json.dumps(header).encode()
    file.write_bytes(len(crafted).to_bytes(8, "little") + crafted + whole[8 + length :])
    with pytest.raises(_store.Damaged):
        _store.read_tensors(file, "me")
