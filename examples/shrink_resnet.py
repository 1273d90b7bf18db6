"""Cut half of the inner channels of a trained ResNet-20 out of arrays and program: accuracy, FLOPs, measured time.

    python examples/shrink_resnet.py           # reads checkpoints/ and cifar10/ in the folder $PRUNEOPT_DATA
    python examples/shrink_resnet.py --toy     # random weights and images: to see that it runs

The channels between the two convolutions of a block belong to that block alone; those of the residual stream belong to
all blocks of a stage. The second convolution chooses which of its channels live, by elimination, and is refitted to
what the dense network computes there; so are all others, in one pass over 1,000 images. Nothing is retrained.
"""

import argparse
import os
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1]))
import pruneopt as po
from paper_reproductions.networks import resnet20

parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
parser.add_argument("--share", type=float, default=0.5, help="of the channels that is kept, in multiples of 8")
parser.add_argument("--repeats", type=int, default=20, help="turns of each program behind the medians")
parser.add_argument("--toy", action="store_true", help="random weights, few images: to see that it runs")
args = parser.parse_args()
rng = np.random.default_rng(0)


def random_network():
    """Parameters of the shapes that a ResNet-20 with shortcuts of 1x1 convolutions has."""

    def unit(size, n, m):
        norm = {"scale": np.ones(m), "bias": np.zeros(m), "mean": np.zeros(m), "var": np.ones(m)}
        return {"kernel": rng.normal(0, (size * size * n) ** -0.5, (size, size, n, m))}, norm

    params, n = {"classifier": {"kernel": rng.normal(size=(64, 10)), "bias": np.zeros(10)}}, 16
    params["conv1"], params["norm1"] = unit(3, 3, 16)
    for stage, m in zip(resnet20.STAGES, (16, 32, 64), strict=True):
        params[stage] = {}
        for block in resnet20.BLOCKS:
            params[stage][block] = parts = {}
            parts["conv1"], parts["norm1"] = unit(3, n, m)
            parts["conv2"], parts["norm2"] = unit(3, m, m)
            if n != m:
                conv, norm = unit(1, n, m)
                parts["shortcut"] = {"conv": conv, "norm": norm}
            n = m
    return jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.float32), params)


if args.toy:
    params, sizes, repeats = random_network(), (1, 4), 2
    images, labels = rng.normal(size=(8, 32, 32, 3)).astype(np.float32), np.arange(8)
    calibration = [images]
else:
    folder, sizes, repeats = os.environ["PRUNEOPT_DATA"], (1, 32, 256), args.repeats
    params = resnet20.load_chita(folder)
    images, labels = resnet20.cifar10(folder, "test1k", *resnet20.CHITA)
    train, _ = resnet20.cifar10(folder, "train20k", *resnet20.CHITA)
    cropped = resnet20.cropped(train[:2000], *resnet20.CHITA, rng)  # statistics of other images cost 3 points
    calibration = [cropped[i : i + 250] for i in range(0, 2000, 250)]


def recalibrated(params):
    """With batch-norm statistics estimated anew: those of the dense network fit no other."""
    return po.plans.recalibrate(lambda p, x: resnet20.train_forward(p, x)[1], params, calibration)


def accuracy(fn, params):
    """Percent right."""
    run = jax.jit(fn)
    chunks = [run(params, images[i : i + 250]).argmax(1) for i in range(0, len(images), 250)]
    return 100 * np.mean(np.concatenate(chunks) == labels)


inner = {
    f"{stage}/{block}/conv1/kernel[3]": params[stage][block]["conv1"]["kernel"].shape[3]
    for stage in resnet20.STAGES
    for block in resnet20.BLOCKS
}
widths = {name: max(8, round(args.share * size / 8) * 8) for name, size in inner.items()}
graph = po.structure.trace(resnet20.forward, params, images[:4])
channels = po.constraints.coupled(graph.units(), widths, list(inner))
method = po.plans.LayerMethod(po.solvers.GreedyUnits(), damping=0.01, dampings=(), target="stream")
pruned = po.plans.layerwise(
    resnet20.forward, params, calibration[:4], channels, method, leaves=lambda path, leaf: leaf.ndim > 1
)
small = po.shrink(resnet20.forward, pruned.params, images[:4], pruned)
print(small)
print(graph.explain("stage2/1/conv1/kernel"))
print(po.report(resnet20.forward, params, small, images[:256], sizes=sizes, repeats=repeats))
# The network takes its widths from its arrays, so that its own training-mode function runs on the smaller ones too.
for title, smaller in (("cut", small.params), ("statistics estimated anew", recalibrated(small.params))):
    print(
        f"test accuracy, {title}: {accuracy(small.fn, smaller):.1f} %, dense {accuracy(resnet20.forward, params):.1f} %"
    )
