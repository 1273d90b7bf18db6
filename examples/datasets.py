"""Images for the examples: (x_train, y_train, x_test, y_test), NHWC float32 images, int32 labels.

Pixels are scaled by the mean and deviation of the training set. Nothing is unpickled; a damaged file is a ValueError.
"""

import gzip
import os
import zlib
from pathlib import Path

import numpy as np


def load(name, folder=None):
    """The data set of that name; `folder` defaults to the folder of that name in $PRUNEOPT_DATA."""
    folder = folder or Path(os.environ.get("PRUNEOPT_DATA", ".")) / name
    return digits() if name == "digits" else {"mnist": mnist, "cifar10": cifar10}[name](folder)


def digits():
    """scikit-learn's 1,797 handwritten digits: 1,297 train, 500 test, 8x8x1."""
    from sklearn.datasets import load_digits

    x, y = load_digits(return_X_y=True)
    order = np.random.default_rng(0).permutation(len(x))
    x, y = x[order].reshape(-1, 8, 8, 1), y[order]
    return normalised(x[:-500], y[:-500], x[-500:], y[-500:])


def mnist(folder):
    """The four idx files of MNIST, gzipped or not, in `folder`: 60,000 train, 10,000 test, 28x28x1."""
    names = [f"{part}-{kind}-ubyte" for part in ("train", "t10k") for kind in ("images-idx3", "labels-idx1")]
    x_train, y_train, x_test, y_test = (idx(folder, name) for name in names)
    return normalised(x_train[..., None], y_train, x_test[..., None], y_test)


def cifar10(folder):
    """CIFAR-10 in `folder`, 32x32x3: the binary version (50,000 train, 10,000 test), or .npz files of a part of it."""
    folder = Path(folder)
    if (folder / "cifar10_train20k.npz").exists():
        return normalised(*npz(folder / "cifar10_train20k.npz"), *npz(folder / "cifar10_test1k.npz"))
    if (folder / "cifar-10-batches-bin").is_dir():
        folder = folder / "cifar-10-batches-bin"
    train = [cifar_batch(folder / f"data_batch_{i}.bin") for i in range(1, 6)]
    x_train, y_train = (np.concatenate(part) for part in zip(*train, strict=True))
    return normalised(x_train, y_train, *cifar_batch(folder / "test_batch.bin"))


def idx(folder, name):
    """One idx file of unsigned bytes, `name` or `name`.gz; its magic number is (0, 0, 8, number of axes)."""
    plain, zipped = Path(folder) / name, Path(folder) / f"{name}.gz"
    try:
        raw = plain.read_bytes() if plain.exists() else gzip.decompress(zipped.read_bytes())
    except FileNotFoundError:
        advice = "get the four MNIST idx files (train- and t10k-, images and labels) and pass --data-dir FOLDER"
        raise FileNotFoundError(f"no {name}[.gz] in {folder}; {advice}") from None
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise ValueError(f"{zipped} is damaged: {error}") from None
    axes = 3 if "idx3" in name else 1
    shape = tuple(np.frombuffer(raw[4 : 4 + 4 * axes].ljust(4 * axes, b"\0"), ">u4").tolist())
    size = int(np.prod(shape, dtype=object))
    if raw[:4] != bytes([0, 0, 8, axes]) or len(raw) != 4 + 4 * axes + size:
        raise ValueError(f"{name} in {folder} is damaged: {len(raw)} bytes that start {raw[:4]!r}, shape {shape}")
    return np.frombuffer(raw, np.uint8, offset=4 + 4 * axes).reshape(shape)


def cifar_batch(path):
    """One file of CIFAR-10's binary version: rows of 1 label byte and 3 x 32 x 32 pixel bytes."""
    if not path.exists():
        advice = "get CIFAR-10's binary version (data_batch_1.bin ... test_batch.bin) and pass --data-dir FOLDER"
        raise FileNotFoundError(f"no {path.name} in {path.parent}; {advice}")
    raw = np.fromfile(path, np.uint8)
    if raw.size == 0 or raw.size % 3073:
        raise ValueError(f"{path} is damaged: {raw.size} bytes are not rows of 3073")
    rows = raw.reshape(-1, 3073)
    return rows[:, 1:].reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1), rows[:, 0]


def npz(path):
    """`images` (n, 32, 32, 3) uint8 and `labels` (n,) of an .npz archive."""
    try:
        with path.open("rb") as file, np.load(file, allow_pickle=False) as archive:
            return archive["images"], archive["labels"]
    except FileNotFoundError:
        raise FileNotFoundError(f"no {path.name} in {path.parent}; pass --data-dir FOLDER that holds it") from None
    except Exception as error:  # zipfile, zlib and NumPy each have their own
        raise ValueError(f"{path} is damaged: {error}") from None


def normalised(x_train, y_train, x_test, y_test):
    """Check the parts against each other, then shift and scale each channel by its training mean and deviation."""
    for name, x, y in (("train", x_train, y_train), ("test", x_test, y_test)):
        if x.ndim != 4 or y.shape != x.shape[:1] or not len(y) or not 0 <= y.min() <= y.max() <= 9:
            raise ValueError(f"the {name} part is damaged: images {x.shape}, labels {y.shape}, all of 0 to 9?")
    channels = [x_train[..., c] for c in range(x_train.shape[-1])]  # one at a time: float64 copies are large
    mean, deviation = (np.array([f(c) for c in channels], np.float32) for f in (np.mean, np.std))  # (c,) each
    scaled = [(x.astype(np.float32) - mean) / (deviation + 1e-6) for x in (x_train, x_test)]
    return scaled[0], y_train.astype(np.int32), scaled[1], y_test.astype(np.int32)
