"""The examples at toy size, and their loaders on small files, whole and damaged."""

import gzip
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

pytestmark = pytest.mark.default_flags
EXAMPLES = Path(__file__).parents[1] / "examples"


@pytest.fixture
def datasets(monkeypatch):
    monkeypatch.syspath_prepend(str(EXAMPLES))
    monkeypatch.delitem(sys.modules, "datasets", raising=False)
    import datasets

    yield datasets
    del sys.modules["datasets"]


def run(*args, example="prune_cnn.py", **environment):
    command = [sys.executable, str(EXAMPLES / example), *map(str, args)]
    clean = {k: v for k, v in os.environ.items() if k != "PRUNEOPT_DATA"}
    return subprocess.run(command, capture_output=True, text=True, timeout=600, env=clean | environment)


def write_idx(folder, zipped=False, cut=0, magic=(0, 0, 8)):
    """MNIST's four files with 12 train and 5 test images of 28 x 28; `cut` bytes short, with that magic number."""
    for part, n in (("train", 12), ("t10k", 5)):
        images = np.arange(n * 28 * 28, dtype=np.uint32).astype(np.uint8).reshape(n, 28, 28)
        for kind, array in (("images-idx3", images), ("labels-idx1", np.arange(n, dtype=np.uint8) % 10)):
            raw = bytes([*magic, array.ndim]) + np.array(array.shape, ">u4").tobytes() + array.tobytes()
            raw = raw[: len(raw) - cut]
            name = f"{part}-{kind}-ubyte" + (".gz" if zipped else "")
            (folder / name).write_bytes(gzip.compress(raw) if zipped else raw)


def write_cifar(folder):
    """CIFAR-10's six binary files with 4 rows each: row i of label i, red 10 i, green 10 i + 1, blue 10 i + 2."""
    folder.mkdir(exist_ok=True)
    pixels = 10 * np.arange(4)[:, None] + np.repeat(np.arange(3), 1024)  # (4, 3072)
    rows = np.concatenate([np.arange(4)[:, None], pixels], axis=1).astype(np.uint8)  # (4, 3073)
    for name in ("data_batch_1", "data_batch_2", "data_batch_3", "data_batch_4", "data_batch_5", "test_batch"):
        rows.tofile(folder / f"{name}.bin")


def write_npz(folder, n=6, **changes):
    images = np.random.default_rng(0).integers(0, 256, (n, 32, 32, 3), np.uint8)
    for name in ("cifar10_train20k", "cifar10_test1k"):
        np.savez(folder / f"{name}.npz", **({"images": images, "labels": np.arange(n) % 10} | changes))


def check(parts, n_train, n_test, shape):
    x, y, x_test, y_test = parts
    assert x.shape == (n_train, *shape)
    assert x_test.shape == (n_test, *shape)
    assert y.shape == (n_train,)
    assert y_test.shape == (n_test,)
    assert x.dtype == x_test.dtype == np.float32
    assert y.dtype == y_test.dtype == np.int32
    np.testing.assert_allclose(x.mean((0, 1, 2)), 0, atol=1e-4)
    np.testing.assert_allclose(x.std((0, 1, 2)), 1, atol=1e-4)


@pytest.mark.slow
def test_prune_cnn_prints_its_table_and_draws_its_picture(tmp_path):
    out = tmp_path / "new" / "picture.png"
    done = run("--toy", "--out", out)
    assert done.returncode == 0, done.stderr
    rows = {line[:17].strip(): line[17:].replace("±", "").split() for line in done.stdout.splitlines()[3:12]}
    names = [
        "dense",
        "threshold 0.01",
        "random",
        "magnitude",
        "taylor",
        "obd",
        "filters, shrunk",
        "gradual magnitude",
        "coarse, then fine",
    ]
    assert list(rows) == names
    for name, (before, after, error, sparsity, kept, flops, stored, *latencies) in rows.items():
        assert 0 <= float(before) <= 100
        assert 0 <= float(after) <= 100
        assert 0 <= float(error) < 50
        assert all(float(ms) > 0 for ms in latencies)
        if name in ("dense", "threshold 0.01"):
            assert float(sparsity) < 50
        elif name == "filters, shrunk":  # 2 of 4, 4 of 8 and 8 of 16 channels and neurons, the ten outputs whole
            convolutions = 9 * (1 * 2 + 2 * 2 + 2 * 4 + 4 * 4) + 4 * (2 + 2 + 4 + 4)
            assert int(kept.replace(",", "")) == convolutions + 4 * 4 * 8 + 8 + 8 * 10 + 10
            assert float(flops) < 0.5 * float(rows["dense"][5])
        else:
            assert sparsity == "90.0"
            assert int(kept.replace(",", "")) < 500
            assert float(flops) < 0.5 * float(rows["dense"][5])
            assert float(stored) < 0.5 * float(rows["dense"][6])
    assert rows["dense"][3] == "0.0"
    assert float(rows["dense"][1]) > 50, "the dense network has learned nothing"
    assert "scattered zeros make nothing faster" in done.stdout
    assert out.read_bytes().startswith(b"\x89PNG")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("example", "parameters", "last"),
    [
        ("shrink_resnet.py", "parameters 274,042 -> 139,738", "test accuracy, statistics estimated anew: "),
        ("shrink_transformer.py", "parameters 260,032 -> 202,432", "perplexity: dense "),
    ],
)
def test_shrink_prints_what_was_cut_and_measured(example, parameters, last):
    assert len((EXAMPLES / example).read_text().splitlines()) < 100
    done = run("--toy", example=example)
    assert done.returncode == 0, done.stderr
    assert parameters in done.stdout
    assert "units can be cut" in done.stdout
    assert len(re.findall(r"^ +\d+ (?:dense|masked|shrunk) ", done.stdout, re.MULTILINE)) == 6
    assert done.stdout.splitlines()[-1].startswith(last)


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (("--epochs", "7"), "a multiple of 5"),
        (("--runs", "1"), "--runs 2 or more"),
        (("--data", "mnist", "--data-dir", "nowhere"), "pass --data-dir"),
        (("--data", "cifar10"), "pass --data-dir"),
    ],
)
@pytest.mark.slow
def test_prune_cnn_says_what_to_pass(args, words):
    done = run(*args)
    assert done.returncode != 0
    assert words in done.stderr


@pytest.mark.slow
@pytest.mark.parametrize("mode", [(), ("--groups",)])
def test_train_with_l1_prints_and_draws(tmp_path, mode):
    out = tmp_path / "new" / "picture.png"
    done = run("--toy", "--out", out, *mode, example="train_with_l1.py")
    assert done.returncode == 0, done.stderr
    first, second, *outputs, picture = done.stdout.splitlines()
    assert first.startswith("with the penalty")
    assert "test accuracy" in second
    assert ("90.0 % zeros" in second) is (mode == ())
    assert len(outputs) == (5 if mode else 6)
    assert picture.startswith("picture: ")
    assert "train: 100%" in done.stderr
    assert out.read_bytes().startswith(b"\x89PNG")


def test_digits(datasets):
    check(datasets.digits(), 1297, 500, (8, 8, 1))


@pytest.mark.parametrize("zipped", [False, True])
def test_mnist(datasets, tmp_path, zipped):
    write_idx(tmp_path, zipped)
    parts = datasets.mnist(tmp_path)
    check(parts, 12, 5, (28, 28, 1))
    np.testing.assert_array_equal(parts[3], np.arange(5))
    first = parts[0][0, 0, :, 0]  # pixels 0, 1, 2, ... before scaling
    np.testing.assert_allclose(np.diff(first), first[1] - first[0], atol=1e-5)


@pytest.mark.parametrize("subfolder", ["", "cifar-10-batches-bin"])
def test_cifar10_binary(datasets, tmp_path, subfolder):
    write_cifar(tmp_path / subfolder)
    _, y, x_test, y_test = parts = datasets.cifar10(tmp_path)
    check(parts, 20, 4, (32, 32, 3))
    np.testing.assert_array_equal(y, np.tile(np.arange(4), 5))
    np.testing.assert_array_equal(y_test, np.arange(4))
    # Each channel is 10 i plus a constant, so after scaling the three are equal, constant within an image and rising.
    np.testing.assert_allclose(x_test, np.broadcast_to(x_test[:, :1, :1, :1], x_test.shape), atol=1e-5)
    assert np.all(np.diff(x_test[:, 0, 0, 0]) > 0)


def test_cifar10_npz(datasets, tmp_path):
    write_npz(tmp_path)
    check(datasets.cifar10(tmp_path), 6, 6, (32, 32, 3))


def test_missing_files_say_which_to_get(datasets, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"train-images-idx3-ubyte.*four MNIST idx files.*--data-dir"):
        datasets.mnist(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"data_batch_1\.bin.*binary version.*--data-dir"):
        datasets.cifar10(tmp_path)
    write_npz(tmp_path)
    (tmp_path / "cifar10_test1k.npz").unlink()
    with pytest.raises(FileNotFoundError, match=r"cifar10_test1k\.npz.*--data-dir"):
        datasets.cifar10(tmp_path)


@pytest.mark.parametrize("damage", [{"cut": 1}, {"cut": 10_000}, {"magic": (0, 0, 9)}, {"cut": -1}])
def test_damaged_idx(datasets, tmp_path, damage):
    write_idx(tmp_path, **(damage if damage.get("cut") != -1 else {}))
    if damage.get("cut") == -1:
        with open(tmp_path / "train-images-idx3-ubyte", "ab") as file:
            file.write(b"\0")
    with pytest.raises(ValueError, match=r"train-images-idx3-ubyte.* damaged"):
        datasets.mnist(tmp_path)


@pytest.mark.parametrize("keep", [0, 5, 40])
def test_damaged_gzip(datasets, tmp_path, keep):
    write_idx(tmp_path, zipped=True)
    path = tmp_path / "train-images-idx3-ubyte.gz"
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(ValueError, match="damaged"):
        datasets.mnist(tmp_path)


def test_idx_images_without_their_labels(datasets, tmp_path):
    write_idx(tmp_path)
    (tmp_path / "train-labels-idx1-ubyte").write_bytes((tmp_path / "t10k-labels-idx1-ubyte").read_bytes())
    with pytest.raises(ValueError, match=r"train part is damaged: .*\(12, 28, 28, 1\), labels \(5,\)"):
        datasets.mnist(tmp_path)


def test_damaged_cifar10_binary(datasets, tmp_path):
    write_cifar(tmp_path)
    path = tmp_path / "data_batch_3.bin"
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(ValueError, match=r"data_batch_3\.bin is damaged: 12291 bytes"):
        datasets.cifar10(tmp_path)
    np.full(3073, 10, np.uint8).tofile(path)  # label 10
    with pytest.raises(ValueError, match="train part is damaged"):
        datasets.cifar10(tmp_path)


def test_damaged_npz(datasets, tmp_path):
    write_npz(tmp_path)
    path = tmp_path / "cifar10_train20k.npz"
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(ValueError, match=r"cifar10_train20k\.npz is damaged"):
        datasets.cifar10(tmp_path)
    write_npz(tmp_path, labels=np.array([{}] * 6))  # objects, which only unpickling could read
    with pytest.raises(ValueError, match=r"damaged.*allow_pickle"):
        datasets.cifar10(tmp_path)
    write_npz(tmp_path, images=np.zeros((6, 3072), np.uint8))
    with pytest.raises(ValueError, match="damaged"):
        datasets.cifar10(tmp_path)


@pytest.mark.slow
def test_the_ten_lines_of_the_readme_print_what_it_shows(tmp_path):
    text = (EXAMPLES.parent / "README.md").read_text()
    code, shown = re.search(r"```python\n(.*?)```.*?```\n(.*?)```", text, re.DOTALL).groups()
    command = [sys.executable, "-W", "ignore", "-c", code]
    found = subprocess.run(command, capture_output=True, text=True, timeout=600, cwd=tmp_path)
    assert found.returncode == 0, found.stderr
    for line, other in zip(found.stdout.splitlines(), shown.splitlines(), strict=True):
        words, others = line.split(), other.split()
        assert [w for w in words if number(w) is None] == [w for w in others if number(w) is None]
        digits, expected = ([n for n in map(number, side) if n is not None] for side in (words, others))
        if "sparsity" in line or "kernel" in line:  # seconds stand last
            digits, expected = digits[:-1], expected[:-1]
        np.testing.assert_allclose(digits, expected, rtol=0.1)
    assert (tmp_path / "pruned.safetensors").exists()


def number(word):
    """The number that a word of a table is, None for other words."""
    try:
        return float(word.strip("%,").replace(",", ""))
    except ValueError:
        return None
