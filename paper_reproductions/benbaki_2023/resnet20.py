"""ResNet-20 on CIFAR-10, one stage, 1,000 images, no retraining: test accuracy of every method on the same draws.

    python paper_reproductions/benbaki_2023/resnet20.py [--seeds 3] [--methods NAME ...]

The peers' protocol: the checkpoint under the normalisation of their published code, its batch-norm statistics
re-estimated over the 20,000 training images, cropped and mirrored at random, before anything is pruned. 268,336 weights
are: the stem, the 18 convolutions and the classifier; the two shortcuts' convolutions and all else stay. Each seed
draws 1,000 training images; every method sees those alone. Settings were chosen on 2,000 training images that no seed
draws (--validate). The 1,000 lossless test images; their standard error is 0.9 points, that over draws is printed.

Every row is scored as it is, and after its batch-norm statistics were re-estimated on its own 1,000 images, cropped
and mirrored. Q as in mlpnet.py. Data: PRUNEOPT_DATA.
"""

import dataclasses
import os
import sys
from pathlib import Path

import jax
import numpy as np

sys.path.insert(0, str(Path(__file__).parents[2]))
import pruneopt as po
from paper_reproductions.benbaki_2023 import one_stage
from paper_reproductions.networks import resnet20
from pruneopt.curvature import BlockDiagonal, Shrunk, sampled_fisher
from pruneopt.objectives import Quadratic
from pruneopt.solvers import BALANCED, BEST, CBS, GlobalADMM, Polish, SummedOBS, Then

SPARSITIES = (0.5, 0.6, 0.7, 0.8, 0.9)
PIECE = 250  # images in a batch
BLOCK = 1000  # weights of a block of WoodFisher
RIDGE = 1e-3  # of the published rows; Q's is 1e-4
TEMPERATURE, SHARE, DAMPING = 4.0, 0.8, 1.0  # of our model of the whole network
ADMM = GlobalADMM(rho=(1.0, 10.0), levels=3, iterations=4, inner=3, refit=20)
POWER = 0.25  # a layer of n weights keeps a share of them in proportion to n^-POWER


def is_pruned(path, leaf):
    return leaf.ndim > 1 and "shortcut" not in path


def prepared(folder):
    """The checkpoint with the statistics of cropped training images under the published normalisation."""
    images, _ = resnet20.cifar10(folder, "train20k", *resnet20.PUBLISHED)
    return re_estimated(resnet20.load_chita(folder), images)


def re_estimated(params, images):
    """`params` with batch-norm statistics of these images, cropped and mirrored."""
    seen = resnet20.cropped(images, *resnet20.PUBLISHED, np.random.default_rng(0))
    return po.plans.recalibrate(statistics, params, pieces(seen))


def statistics(params, images):
    return resnet20.train_forward(params, images)[1]


def pieces(*arrays):
    """Batches of PIECE examples: arrays alone, or tuples."""
    cut = [tuple(x[i : i + PIECE] for x in arrays) for i in range(0, len(arrays[0]), PIECE)]
    return cut if len(arrays) > 1 else [x for (x,) in cut]


def damped(setting):
    """The model of Q with a larger ridge."""
    q = setting.model("fisher")[0]
    return Quadratic(q.center, dataclasses.replace(q.curvature, ridge=RIDGE))


def blocks(setting):
    """WoodFisher's blocks of the empirical Fisher."""
    return Quadratic(setting.center, BlockDiagonal.of(damped(setting).curvature, by=BLOCK))


def tempered_fisher(setting):
    """The true Fisher at a temperature, which is the Gauss-Newton matrix, from one sampled label an image; shrunk."""
    network, forward = setting.network, one_stage.Tempered(resnet20.forward, TEMPERATURE)
    model = sampled_fisher(forward, network.params, setting.batches, network.leaves)
    return Quadratic(setting.center, Shrunk.checked(model, model.diagonal(setting.center), SHARE), damping=DAMPING)


METHODS = one_stage.published("damped") | {
    "WoodFisher, blocks of 1,000": one_stage.solved("blocks", SummedOBS()),
    "CBS, selection and update": one_stage.solved("damped", Then(CBS(), Polish())),
    "ADMM, tempered Fisher": one_stage.solved("tempered", ADMM),
    "layer by layer, equal shares": one_stage.layer_by_layer(BALANCED, 0.0),
    "layer by layer, balanced (ours)": one_stage.layer_by_layer(BALANCED, POWER),
    "layer by layer, best (ours)": one_stage.layer_by_layer(BEST, POWER),
}


@jax.jit
def correct(params, images, labels):
    return (resnet20.forward(params, images).argmax(axis=1) == labels).sum()


def accuracy(params, images, labels):
    return 100 * sum(int(correct(params, *batch)) for batch in pieces(images, labels)) / len(labels)


def main():
    given = one_stage.arguments(METHODS, SPARSITIES).parse_args()
    folder = os.environ["PRUNEOPT_DATA"]
    params = prepared(folder)
    network = one_stage.Network(resnet20.forward, params, is_pruned)
    images, labels = resnet20.cifar10(folder, "train20k", *resnet20.PUBLISHED)
    order = np.random.default_rng(0).permutation(len(labels))
    pool, kept = order[:15000], order[15000:17000]
    test = (images[kept], labels[kept])
    if not given.validate:
        test = resnet20.cifar10(folder, "test1k", *resnet20.PUBLISHED)
    print(f"dense: {accuracy(params, *test):.2f}", flush=True)
    models = {"fisher": one_stage.fisher, "damped": damped, "tempered": tempered_fisher, "blocks": blocks}
    settings = [
        one_stage.Setting(network, pieces(images[drawn], labels[drawn]), models)
        for drawn in one_stage.draws(pool, given)
    ]

    def score(setting, params):
        return accuracy(params, *test)

    def score_again(setting, params):
        return accuracy(re_estimated(params, np.concatenate([batch[0] for batch in setting.batches])), *test)

    one_stage.table(settings, METHODS, given, {"": score, ", re-estimated": score_again})


if __name__ == "__main__":
    main()
