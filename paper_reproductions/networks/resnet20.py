"""ResNet-20 on CIFAR-10, two trained checkpoints with one network; batch norm by running or by the batch's statistics.

`load_chita` has 1x1 convolutions as shortcuts (90.7 % on split "test1k"), `load_akamaster` has shortcuts without
parameters (91.5 %). Each checkpoint needs its own normalisation, `CHITA` or `AKAMASTER`; the constants in CHITA's
published code, `PUBLISHED`, are not the ones its checkpoint was trained with (54.1 %).

Both were trained on `cropped` images, and so are their batch-norm statistics: re-estimated on cropped training images
CHITA's checkpoint has 90.8 % with `PUBLISHED`; on images that are not cropped 87.3 % (87.8 % with `CHITA`).

Parameter names: conv1/kernel, norm1/scale, stage2/0/conv1/kernel, stage2/0/norm1/scale,
stage2/0/shortcut/conv/kernel, stage2/0/shortcut/norm/scale, classifier/kernel, classifier/bias, ...
Convolution kernels are HWIO. Widths come from the arrays, so a network with fewer channels runs too.

`folder` is the data folder (PRUNEOPT_DATA): it holds checkpoints/ and cifar10/.
"""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

# Mean and standard deviation of each checkpoint's input, per channel, for pixels in [0, 1].
CHITA = ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
PUBLISHED = ((0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010))
AKAMASTER = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))

EPSILON, MOMENTUM = 1e-5, 0.9
STAGES = ("stage1", "stage2", "stage3")
BLOCKS = ("0", "1", "2")


def load_chita(folder):
    """The checkpoint of CHITA, WoodFisher and M-FAC: 272,474 parameters."""
    return _load(Path(folder) / "checkpoints" / "resnet20_cifar10_chita.npz", "fc")


def load_akamaster(folder):
    """The checkpoint of akamaster/pytorch_resnet_cifar10: 269,722 parameters."""
    return _load(Path(folder) / "checkpoints" / "resnet20_cifar10_akamaster.npz", "linear")


def forward(params, images):
    """Logits (B, 10) of normalised images (B, 32, 32, 3)."""
    return _network(params, images, lambda path, norm, x: _norm(norm, x))


def train_forward(params, images):
    """(logits, updates): batch norm by the batch's own statistics. updates: running ones a step on, None elsewhere."""
    moved = {}

    def norm(path, norm, x):
        own = {"mean": x.mean(axis=(0, 1, 2)), "var": x.var(axis=(0, 1, 2))}
        n = x.size // x.shape[-1]
        for key, seen in (("mean", own["mean"]), ("var", own["var"] * (n / (n - 1)))):  # unbiased, as in PyTorch
            moved[f"{path}/{key}"] = jax.lax.stop_gradient(MOMENTUM * norm[key] + (1 - MOMENTUM) * seen)
        return _norm(norm | own, x)

    logits = _network(params, images, norm)
    text = lambda path: jax.tree_util.keystr(path, simple=True, separator="/")  # noqa: E731
    return logits, jax.tree_util.tree_map_with_path(lambda path, _: moved.get(text(path)), params)


def cifar10(folder, split, mean, std):
    """Normalised images (n, 32, 32, 3) float32 and labels (n,) int32; split "train20k", "test1k" or "test10k_jpeg"."""
    with np.load(Path(folder) / "cifar10" / f"cifar10_{split}.npz", allow_pickle=False) as archive:
        images, labels = archive["images"] / np.float32(255), archive["labels"].astype(np.int32)
    return (images - np.asarray(mean, np.float32)) / np.asarray(std, np.float32), labels


def cropped(images, mean, std, rng):
    """Each normalised image moved by up to 4 pixels, black coming in, half of them mirrored: as in training."""
    black = -np.asarray(mean, np.float32) / np.asarray(std, np.float32)
    wide = np.broadcast_to(black, (len(images), 40, 40, 3)).copy()
    wide[:, 4:-4, 4:-4] = images
    windows = np.lib.stride_tricks.sliding_window_view(wide, (32, 32), axis=(1, 2))  # (n, 9, 9, 3, 32, 32)
    down, right = rng.integers(0, 9, (2, len(images)))
    moved = windows[np.arange(len(images)), down, right].transpose(0, 2, 3, 1)
    return np.where(rng.random(len(images))[:, None, None, None] < 0.5, moved, moved[:, :, ::-1])


def _network(params, images, norm):
    x = jax.nn.relu(norm("norm1", params["norm1"], _convolve(params["conv1"], images)))  # (B, 32, 32, 16)
    for stage in STAGES:
        for block in BLOCKS:
            stride = 2 if block == "0" and stage != "stage1" else 1
            x = _block(params[stage][block], x, stride, norm, f"{stage}/{block}")
    x = x.mean(axis=(1, 2))  # (B, 8, 8, 64) -> (B, 64)
    return x @ params["classifier"]["kernel"] + params["classifier"]["bias"]  # (B, 10)


def _block(block, x, stride, norm, path):
    y = jax.nn.relu(norm(f"{path}/norm1", block["norm1"], _convolve(block["conv1"], x, stride)))
    y = norm(f"{path}/norm2", block["norm2"], _convolve(block["conv2"], y))
    if "shortcut" in block:
        parts = block["shortcut"]
        x = norm(f"{path}/shortcut/norm", parts["norm"], _convolve(parts["conv"], x, stride))
    elif stride > 1:  # every second pixel, channels padded with zeros equally on both sides
        missing = y.shape[-1] - x.shape[-1]
        x = jnp.pad(x[:, ::stride, ::stride], ((0, 0), (0, 0), (0, 0), (missing // 2, missing - missing // 2)))
    return jax.nn.relu(x + y)


def _convolve(conv, x, stride=1):
    margin = conv["kernel"].shape[0] // 2  # 3x3: 1, 1x1: 0. "SAME" would shift the strided ones by a pixel.
    return jax.lax.conv_general_dilated(
        x,
        conv["kernel"],  # (h, w, in, out)
        window_strides=(stride, stride),
        padding=((margin, margin), (margin, margin)),
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
    )


def _norm(norm, x):
    return (x - norm["mean"]) * (norm["scale"] / jnp.sqrt(norm["var"] + EPSILON)) + norm["bias"]


def _load(path, classifier):
    with np.load(path, allow_pickle=False) as archive:
        arrays = {key.removeprefix("module."): archive[key] for key in archive.files}

    def conv(name):
        return {"kernel": jnp.asarray(arrays[f"{name}.weight"].transpose(2, 3, 1, 0))}  # OIHW -> HWIO

    def norm(name):
        torch_names = {"scale": "weight", "bias": "bias", "mean": "running_mean", "var": "running_var"}
        return {ours: jnp.asarray(arrays[f"{name}.{theirs}"]) for ours, theirs in torch_names.items()}

    def block(name):
        parts = {part: conv(f"{name}.{part}") for part in ("conv1", "conv2")}
        parts |= {f"norm{i}": norm(f"{name}.bn{i}") for i in (1, 2)}
        if f"{name}.downsample.0.weight" in arrays:
            parts["shortcut"] = {"conv": conv(f"{name}.downsample.0"), "norm": norm(f"{name}.downsample.1")}
        return parts

    stages = {stage: {b: block(f"layer{stage[-1]}.{b}") for b in BLOCKS} for stage in STAGES}
    weight, bias = arrays[f"{classifier}.weight"], arrays[f"{classifier}.bias"]
    head = {"kernel": jnp.asarray(weight.T), "bias": jnp.asarray(bias)}  # (64, 10), (10,)
    return {"conv1": conv("conv1"), "norm1": norm("bn1"), **stages, "classifier": head}
