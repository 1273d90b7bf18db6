"""Whole units cut within a budget of FLOPs, no retraining: test accuracy of ResNet-20 and MLPNet.

    python paper_reproductions/head_to_head/structured.py [--networks resnet20 mlpnet] [--seeds 3] [--images 1000]
        [--shares 0.7 0.51 0.33] [--rows ...]
    python paper_reproductions/head_to_head/structured.py --choose

Each seed draws training images: for the Grams, and 500 others on which the tables of errors are measured. Rows:
magnitude, uniform: each group keeps the same share of its units, by the norms of the weights that make and read them;
reconstructed, uniform: the operator that consumes a group chooses its units and is refitted, and so is every other, in
one pass, towards what the dense network computes there and in the stream that it is added to; reconstructed, allocated:
the same at widths that `allocation.allocate` finds on `plans.unit_tables`, with the loss that the tables predict and
the one measured.
As it is; with batch-norm statistics estimated anew on 2,000 cropped training images; and settled on them first
(`plans.settle`: true statistics, scale and bias make up for the change). FLOPs are those of the shrunk program.
--choose: the KL divergence from the dense network on 1,000 other training images, as the network is, at half of each
group's units, of each setting (METHOD and IMAGES are the choice): damping, an intercept or none, Grams of plain or of
cropped images; and for each network the setting that the others choose. No test image is read for it. Data:
PRUNEOPT_DATA.
"""

import argparse
import os
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

sys.path.insert(0, str(Path(__file__).parents[2]))
import pruneopt as po
from paper_reproductions.networks import mlpnet, resnet20
from pruneopt import _tree
from pruneopt.solvers import GreedyUnits

METHOD, IMAGES = po.plans.LAYER_METHODS["units"], "plain"
PIECE, MEASURED, ANEW = 250, 500, 2000
ROWS = ("magnitude, uniform", "reconstructed, uniform", "reconstructed, allocated")


class ResNet20:
    """A checkpoint under its own normalisation; the channels inside its blocks are cut."""

    forward = staticmethod(resnet20.forward)

    def __init__(self, folder, load=resnet20.load_chita, pixels=resnet20.CHITA):
        self.params, self.pixels = load(folder), pixels
        self.train, _ = resnet20.cifar10(folder, "train20k", *pixels)
        self.test = resnet20.cifar10(folder, "test1k", *pixels)
        self.groups = [f"{s}/{b}/conv1/kernel[3]" for s in resnet20.STAGES for b in resnet20.BLOCKS]

    def seen(self, images, rng):
        return resnet20.cropped(images, *self.pixels, rng)

    def anew(self, params, images):
        return po.plans.recalibrate(lambda p, x: resnet20.train_forward(p, x)[1], params, pieces(images))

    def settled(self, params, images):
        return po.plans.settle(self.forward, params, pieces(images))


class MLPNet:
    """784-40-20-10 without biases; both hidden layers are cut, so that FLOPs are products of their widths."""

    forward = staticmethod(mlpnet.forward)

    def __init__(self, folder):
        self.params = mlpnet.load(folder)
        self.train, _ = mlpnet.mnist(folder, "train")
        self.test = mlpnet.mnist(folder, "test")
        self.groups = ["fc1[1]", "fc2[1]"]

    def seen(self, images, rng):
        return images

    def anew(self, params, images):
        return params

    settled = anew


def pieces(images):
    return [images[i : i + PIECE] for i in range(0, len(images), PIECE)]


def accuracy(network, fn, params):
    run, (images, labels) = jax.jit(fn), network.test
    right = [np.asarray(run(params, x).argmax(1)) for x in pieces(images)]
    return 100 * float(np.mean(np.concatenate(right) == labels))


def loss(network, params, images):
    """The KL divergence from the dense network, as the tables have it."""
    run = jax.jit(network.forward)
    return float(np.mean([po.plans.kl(run(network.params, x), run(params, x)) for x in pieces(images)]))


def by_magnitude(network, units):
    scores = jax.tree.map(lambda w: jnp.square(w) if w.ndim > 1 else jnp.zeros_like(w), network.params)
    support = units.select(scores)
    return po.from_masks(network.params, dict(_tree.named_leaves(support)))


def reconstructed(network, calibration, units, method=METHOD):
    """All operators refitted in one pass; those that consume a group choose its units."""
    words = {"leaves": lambda _, w: w.ndim > 1, "progress": False}
    return po.plans.layerwise(network.forward, network.params, calibration, units, method, **words)


def _nearest(widths, share):
    """The number of the width next to this share of the largest."""
    return min(range(len(widths)), key=lambda i: abs(widths[i] - share * widths[-1]))


def uniform(tables, share):
    """The largest equal share of every group's units within the budget."""
    limit, best = share * tables.largest("flops"), None
    for k in range(1, 17):
        levels = {group: _nearest(tables.levels[group], k / 16) for group in tables.groups}
        if tables.spent(levels)["flops"] <= limit:
            best = levels
    return {g: tables.label(g, level) for g, level in best.items()}


def run(network, seed, given):
    rng = np.random.default_rng(seed)
    order = rng.permutation(len(network.train))
    drawn = network.train[order[: given.images]]
    calibration = pieces(network.seen(drawn, rng) if IMAGES == "cropped" else drawn)
    measured = network.train[order[-MEASURED:]]
    graph = po.structure.trace(network.forward, network.params, network.train[:1])
    units, clock = po.constraints.coupled(graph.units(), {}, network.groups), time.perf_counter()
    tables = po.plans.unit_tables(
        network.forward, network.params, calibration, units, pieces(measured), method=METHOD, progress=False
    )
    print(f"seed {seed}: {tables!r}, {time.perf_counter() - clock:.0f} s", flush=True)
    found = {}
    for share in given.shares:
        clock = time.perf_counter()
        choice = po.allocation.allocate(tables, {"flops": share * tables.largest("flops")})
        widths = {"uniform": uniform(tables, share), "allocated": {g: choice[g] for g in tables.groups}}
        for name in given.rows:
            cut = po.constraints.Coupled(units.groups, widths[name.split(", ")[1]])
            if name.startswith("magnitude"):
                pruned = by_magnitude(network, cut)
            else:
                pruned = reconstructed(network, calibration, cut)
            small = po.shrink(network.forward, pruned.params, network.train[:4], pruned)
            cost = po.structure.cost(po.structure.trace(small.fn, small.params, network.train[:1]))
            dense = po.structure.cost(graph).flops
            seen = network.seen(network.train[order[:ANEW]], rng)
            fresh = network.anew(pruned.params, seen)
            settled = network.anew(network.settled(pruned.params, seen), seen)
            found[name, share] = (
                cost.flops / dense,
                accuracy(network, small.fn, small.params),
                accuracy(network, network.forward, fresh),
                accuracy(network, network.forward, settled),
            )
        print(
            f"  {share}: widths {list(widths['allocated'].values())}, gap {choice.gap:.1e}, predicted loss "
            f"{choice.error:.4f}, measured {loss(network, pruned.params, measured):.4f}, "
            f"{time.perf_counter() - clock:.0f} s",
            flush=True,
        )
    return found


NETWORKS = {
    "resnet20": ResNet20,
    "akamaster": lambda folder: ResNet20(folder, resnet20.load_akamaster, resnet20.AKAMASTER),
    "mlpnet": MLPNet,
}


def choose(names, seed, images):
    """The table behind METHOD and IMAGES."""
    rows = [(d, c, i) for d in (1e-3, 1e-2) for c in (False, True) for i in ("plain", "cropped")]
    found = {}
    for name in names:
        network, rng = NETWORKS[name](os.environ["PRUNEOPT_DATA"]), np.random.default_rng(seed)
        order = rng.permutation(len(network.train))
        plain, others = network.train[order[:images]], network.train[order[-1000:]]
        graph = po.structure.trace(network.forward, network.params, network.train[:1])
        half = po.constraints.Cardinality(sparsity=0.5, per="leaf")
        units = po.constraints.coupled(graph.units(), half, network.groups)
        given = {"plain": plain, "cropped": network.seen(plain, rng)}
        for damping, is_centred, seen in rows:
            method = po.plans.LayerMethod(GreedyUnits(), "", damping, "stream", (), is_centred)
            pruned = reconstructed(network, pieces(given[seen]), units, method)
            found[name, (damping, is_centred, seen)] = loss(network, pruned.params, others)
        print(name, *(f"{row}: {found[name, row]:.4f}" for row in rows), sep="\n  ", flush=True)
    for name in names:
        logs = {row: np.mean([np.log(found[n, row]) for n in names if n != name]) for row in rows}
        best = min(logs, key=logs.__getitem__)
        print(f"{name}: the others choose {best}, {found[name, best]:.4f} here")


def main():
    words = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    words.add_argument("--networks", nargs="+", default=["resnet20", "mlpnet"])
    words.add_argument("--seeds", type=int, default=3)
    words.add_argument("--images", type=int, default=1000)
    words.add_argument("--shares", nargs="+", type=float, default=[0.7, 0.51, 0.33])
    words.add_argument("--rows", nargs="+", default=ROWS, choices=ROWS)
    words.add_argument("--choose", action="store_true")
    given = words.parse_args()
    if given.choose:
        choose(list(NETWORKS), 0, given.images)
        return
    for name in given.networks:
        network = NETWORKS[name](os.environ["PRUNEOPT_DATA"])
        print(f"{name}: dense {accuracy(network, network.forward, network.params):.2f} %")
        every = [run(network, seed, given) for seed in range(given.seeds)]
        print(f"{'':<26} {'budget':>7} {'FLOPs':>7} {'as it is':>14} {'estimated anew':>16} {'settled, then anew':>19}")
        for key in every[0]:
            flops, *scores = np.array([one[key] for one in every]).T
            spread = [x.std(ddof=1) / len(x) ** 0.5 if len(x) > 1 else 0.0 for x in scores]
            cells = [f"{x.mean():>8.2f} ±{s:<5.2f}" for x, s in zip(scores, spread, strict=True)]
            print(f"{key[0]:<26} {key[1]:>7.2f} {flops.mean():>7.3f} {'  '.join(cells)}")


if __name__ == "__main__":
    main()
