"""A run folder: what it gives back is what this run, at this place, has stored, or an error names the file."""

import errno
import json
import os

import jax.numpy as jnp
import numpy as np
import pytest

import pruneopt as po
from pruneopt import _store
from pruneopt.constraints import Blocks, Cardinality
from pruneopt.plans.layerwise import layerwise
from pruneopt.plans.run_folder import RunFolder
from pruneopt.solvers import Score

RNG = np.random.default_rng(0)
WEIGHTS = {name: jnp.asarray(RNG.standard_normal((12, 12)), jnp.float32) for name in "abc"}
X = RNG.standard_normal((32, 12)).astype(np.float32)
HALF = Cardinality(sparsity=0.5)

pytestmark = pytest.mark.default_flags


def mlp(p, x):
    return jnp.tanh(jnp.tanh(x @ p["a"]) @ p["b"]) @ p["c"]


def run(folder, constraint=HALF, **words):
    return layerwise(mlp, WEIGHTS, [X], constraint, Score(), run_dir=folder, progress=False, **words)


@pytest.fixture(scope="module")
def kept(tmp_path_factory):
    """A finished run, and what it returned."""
    folder = tmp_path_factory.mktemp("kept") / "run"
    return folder, run(folder)


@pytest.fixture
def folder(tmp_path, kept):
    """A copy of it."""
    mine = tmp_path / "run"
    mine.mkdir()
    for file in kept[0].iterdir():
        (mine / file.name).write_bytes(file.read_bytes())
    return mine


def layer(folder, i):
    return folder / f"layer-{i:05d}.safetensors"


def assert_continues(folder, first):
    again = run(folder)
    assert all(s.stats["resumed"] for s in again.solutions.values())
    for name in WEIGHTS:
        np.testing.assert_array_equal(again.params[name], first.params[name])


@pytest.mark.slow
def test_it_continues_after_files_that_a_kill_left(folder, kept):
    for name in ("run.part", "mine.part", "layer-00001.safetensors.0123456789abcdef.part"):
        (folder / name).write_bytes(b"half")
    (folder / "link.0123456789abcdef.part").symlink_to(folder / "mine.part")
    assert_continues(folder, kept[1])
    left = {file.name for file in folder.iterdir() if file.suffix == ".part"}
    assert left == {"run.part", "mine.part", "link.0123456789abcdef.part"}
    assert (folder / "mine.part").read_bytes() == b"half"


@pytest.mark.parametrize("name", ["run.part", "run.json.0123456789abcdef.part"])
def test_it_starts_where_a_kill_left_no_more_than_a_part(tmp_path, name, kept):
    (tmp_path / name).write_bytes(b"{")
    run(tmp_path)
    assert_continues(tmp_path, kept[1])


def test_a_kill_while_a_layer_is_written_loses_that_layer_alone(tmp_path, monkeypatch, kept):
    replace, files = os.replace, []

    def killed(source, target):
        files.append(target)
        if len(files) == 3:  # the folder's own file, then layers
            raise KeyboardInterrupt
        replace(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", killed)
        with pytest.raises(KeyboardInterrupt):
            run(tmp_path)
    assert sorted(file.name for file in tmp_path.iterdir()) == ["layer-00000.safetensors", "run.json"]
    again = run(tmp_path)
    assert [bool(s.stats.get("resumed")) for s in again.solutions.values()] == [True, False, False]
    assert_continues(tmp_path, kept[1])


def test_files_of_two_layers_that_changed_places(folder):
    one, two = layer(folder, 0).read_bytes(), layer(folder, 1).read_bytes()
    layer(folder, 0).write_bytes(two)
    layer(folder, 1).write_bytes(one)
    with pytest.raises(ValueError, match=r"layer-00000.* is damaged \(it is another run's, or another layer's\)"):
        run(folder)


def test_the_layer_of_another_run(folder, tmp_path):
    run(tmp_path / "other", Cardinality(sparsity=0.25))
    layer(folder, 1).write_bytes(layer(tmp_path / "other", 1).read_bytes())
    with pytest.raises(ValueError, match=r"layer-00001.* is damaged \(it is another run's"):
        run(folder)


@pytest.mark.parametrize("place", [9, 300, -1, -200])
def test_a_flipped_byte(folder, place):
    content = bytearray(layer(folder, 2).read_bytes())
    content[place] ^= 0x10
    layer(folder, 2).write_bytes(content)
    with pytest.raises(ValueError, match=r"layer-00002.* is damaged .*; delete it, and the layer is solved again"):
        run(folder)


def test_blocks_of_equal_text_are_not_one_run(tmp_path):
    RunFolder(tmp_path, {"constraint": Blocks((1, 12), HALF)})
    with pytest.raises(ValueError, match="holds a run with other constraint; repeat that call"):
        RunFolder(tmp_path, {"constraint": Blocks((11, 2), HALF)})


def forged(folder, i, change):
    """A layer's file with other contents, and a checksum that fits them."""
    identity = json.loads((folder / "run.json").read_text())["sha256"]
    owner = _store.digest([identity, i])
    arrays, texts = _store.read_tensors(layer(folder, i), owner)
    facts = json.loads(texts["facts"])
    texts["facts"] = change(arrays, facts) or json.dumps(facts)
    _store.write_tensors(layer(folder, i), arrays, texts, owner)


FORGED = {
    "supports above the budget": lambda a, f: a.update(support=np.ones_like(a["support"])),
    "weights off the support": lambda a, f: a.update(value=np.ones_like(a["value"])),
    "a NaN": lambda a, f: a.update(value=a["value"] + np.float32(np.nan)),
    "another shape": lambda a, f: a.update(value=a["value"][:, 1:]),
    "another dtype": lambda a, f: a.update(value=a["value"].astype(np.float64)),
    "a support of numbers": lambda a, f: a.update(support=a["support"].astype(np.float32)),
    "no support": lambda a, f: a.pop("support") is None,
    "one array more": lambda a, f: a.update(more=np.ones(3)),
    "no JSON": lambda a, f: "{",
    "another JSON": lambda a, f: "[]",
    "no facts": lambda a, f: "{}",
    "no problems": lambda a, f: f.update(problems=[]),
    "an unknown status": lambda a, f: f["problems"][0].update(status="GOOD"),
    "an objective that is no number": lambda a, f: f["problems"][0].update(objective="low"),
    "no layer": lambda a, f: f.update(layer=3),
}


@pytest.mark.parametrize("name", FORGED)
def test_a_layer_that_cannot_be_what_was_stored(folder, name):
    forged(folder, 1, FORGED[name])
    with pytest.raises(ValueError, match=r"layer-00001.* is damaged .*; delete it, and the layer is solved again"):
        run(folder)
    layer(folder, 1).unlink()
    run(folder)


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"{}", b'{"arguments": [], "sha256": ""}', None])
def test_a_damaged_identity(folder, content):
    file = folder / "run.json"
    if content is None:  # one digit of one digest
        text = file.read_text()
        at = text.index('"target": "') + len('"target": "')
        content = (text[:at] + ("1" if text[at] == "0" else "0") + text[at + 1 :]).encode()
    file.write_bytes(content)
    with pytest.raises(ValueError, match=r"run\.json is damaged .*; delete the folder and start again"):
        run(folder)


def test_disks_and_folders_that_take_nothing(tmp_path, monkeypatch):
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(OSError, match="file"):
        run(tmp_path / "file" / "run")

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    store = RunFolder(tmp_path / "run", {"a": 1})
    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        store.store(0, {"value": np.ones(3)}, {})
    assert [file.name for file in (tmp_path / "run").iterdir()] == ["run.json"]


def test_a_value_that_nothing_tells_from_another(tmp_path):
    with pytest.raises(TypeError, match=r"run_dir: solver holds a builtins\.object, .*; leave run_dir out"):
        RunFolder(tmp_path / "run", {"solver": object()})
    assert not (tmp_path / "run").exists()


def test_a_run_with_one_argument_more_is_another(tmp_path):
    RunFolder(tmp_path, {"a": 1, "b": 2})
    with pytest.raises(ValueError, match="holds a run with other b"):
        RunFolder(tmp_path, {"a": 1})


def test_prune_is_not_disturbed_by_a_file_of_the_user(tmp_path):
    mine = tmp_path / "net.part"
    mine.write_bytes(b"mine")
    po.save(po.Pruned(WEIGHTS, dict.fromkeys("abc")), tmp_path / "net")
    assert mine.read_bytes() == b"mine"
    assert sorted(file.name for file in tmp_path.iterdir()) == ["net", "net.part"]
