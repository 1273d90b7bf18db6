"""MLPNet on MNIST: 784-40-20-10, ReLU, no biases; the checkpoint of CHITA and WoodFisher (93.97 % on the test set).

`folder` is the data folder (PRUNEOPT_DATA): it holds checkpoints/mlpnet_mnist.npz and mnist/.
"""

import gzip
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

MEAN, STD = 0.1307, 0.3081


def load(folder):
    """The three weight matrices, each (in, out), float32."""
    with np.load(Path(folder) / "checkpoints" / "mlpnet_mnist.npz", allow_pickle=False) as archive:
        return {f"fc{i}": jnp.asarray(archive[f"module.fc{i}._layer.weight"].T) for i in (1, 2, 3)}


def forward(params, images):
    """Logits (B, 10) of normalised images (B, 784)."""
    x = jax.nn.relu(images @ params["fc1"])  # (B, 40)
    x = jax.nn.relu(x @ params["fc2"])  # (B, 20)
    return x @ params["fc3"]  # (B, 10)


def mnist(folder, split):
    """Normalised images (n, 784) float32 and labels (n,) int32; `split` is "train" or "test"."""
    prefix = {"train": "train", "test": "t10k"}[split]

    def idx(name, header):
        packed = (Path(folder) / "mnist" / f"{prefix}-{name}-ubyte.gz").read_bytes()
        return np.frombuffer(gzip.decompress(packed), np.uint8, offset=header)

    images = idx("images-idx3", 16).reshape(-1, 784) / np.float32(255)
    return (images - np.float32(MEAN)) / np.float32(STD), idx("labels-idx1", 8).astype(np.int32)
