"""MLPNet on MNIST, one stage, 1,000 examples, no retraining: test accuracy of every method on the same draws.

    python paper_reproductions/benbaki_2023/mlpnet.py [--seeds 3] [--examples 1000] [--methods NAME ...]

Each seed draws 1,000 of the 60,000 training images; every method sees those alone. Settings were chosen on training
images that no seed draws from (--validate: the last 40,000 of a fixed permutation) and are the same for all
sparsities and seeds. Prints the mean over seeds, its standard error and the CPU seconds that a seed takes for all
sparsities, then the common objective Q(w) = ||G (w - w0)||^2 / 2n + (1e-4 / 2) ||w - w0||^2, G the per-example
gradients of the first seed's examples, in float64.

Data: PRUNEOPT_DATA.
"""

import dataclasses
import os
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

sys.path.insert(0, str(Path(__file__).parents[2]))
from paper_reproductions.benbaki_2023 import one_stage
from paper_reproductions.networks import mlpnet
from pruneopt.curvature import BlockDiagonal, GaussNewton, Kronecker, Shrunk, softmax_fisher
from pruneopt.objectives import Quadratic
from pruneopt.solvers import BALANCED, BEST, CBS, GlobalADMM, Polish, Score, SummedOBS, Then

SPARSITIES = (0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 0.98)
BLOCK = 1000  # weights of a block of WoodFisher
CBS_RIDGE = 0.01
TEMPERATURE, SHARE, DAMPING = 4.0, 0.15, 0.01  # of our model: softmax(z / TEMPERATURE), shrinkage, ridge
POWER = 0.65  # of a layer's n weights a share in proportion to n^-POWER is kept
ADMM = GlobalADMM(rho=(0.1, 10.0), levels=8, iterations=8, inner=6, refit=60)
tempered = one_stage.Tempered(mlpnet.forward, TEMPERATURE)


def gauss_newton(setting):
    """The Gauss-Newton matrix of the cross-entropy at a temperature, shrunk, and its exact diagonal."""
    params, ((images, labels),) = setting.network.params, setting.batches
    model = GaussNewton.of(tempered, one_stage.cross_entropy, params, setting.batches)
    parts = [(images[i : i + 100], labels[i : i + 100]) for i in range(0, len(labels), 100)]
    diagonals = [softmax_fisher(tempered, params, [part]).diagonal(params) for part in parts]
    mean = jax.tree.map(lambda *d: sum(d) / len(d), *diagonals)
    return Quadratic(params, Shrunk.checked(model, mean, SHARE), damping=DAMPING)


def blocks(setting):
    """WoodFisher's blocks of the empirical Fisher."""
    return Quadratic(setting.center, BlockDiagonal.of(one_stage.fisher(setting).curvature, by=BLOCK))


def ridged(setting):
    """The empirical Fisher with the ridge of CBS."""
    return Quadratic(setting.center, dataclasses.replace(one_stage.fisher(setting).curvature, ridge=CBS_RIDGE))


def kronecker(setting):
    network = setting.network
    factors = Kronecker.of(network.loss, network.params, setting.batches, ridge=one_stage.RIDGE)
    return Quadratic(setting.center, factors)


MODELS = {
    "fisher": one_stage.fisher,
    "gauss-newton": gauss_newton,
    "blocks": blocks,
    "ridged": ridged,
    "kronecker": kronecker,
}
METHODS = one_stage.published("fisher") | {
    "WoodFisher, blocks of 1,000": one_stage.solved("blocks", SummedOBS()),
    "K-FAC, OBD": one_stage.solved("kronecker", Score()),
    "K-FAC, OBS": one_stage.solved("kronecker", SummedOBS()),
    "CBS, selection": one_stage.solved("ridged", CBS()),
    "CBS, selection and update": one_stage.solved("ridged", Then(CBS(), Polish())),
    "ADMM, empirical Fisher": one_stage.solved("fisher", Then(ADMM, Polish())),
    "ADMM, Gauss-Newton (ours)": one_stage.solved("gauss-newton", ADMM),
    "layer by layer, balanced (ours)": one_stage.layer_by_layer(BALANCED, POWER, 0.1),
    "layer by layer, best (ours)": one_stage.layer_by_layer(BEST, POWER, 0.1),
}


@jax.jit
def accuracy(params, images, labels):
    return 100 * jnp.mean(jnp.argmax(mlpnet.forward(params, images), axis=1) == labels)


def main():
    given = one_stage.arguments(METHODS, SPARSITIES).parse_args()
    folder = os.environ["PRUNEOPT_DATA"]
    network = one_stage.Network(mlpnet.forward, mlpnet.load(folder))
    images, labels = mlpnet.mnist(folder, "train")
    order = np.random.default_rng(0).permutation(len(labels))
    pool, kept = order[:20000], order[20000:]
    test = (images[kept], labels[kept]) if given.validate else mlpnet.mnist(folder, "test")
    settings = [
        one_stage.Setting(network, [(jnp.asarray(images[drawn]), jnp.asarray(labels[drawn]))], MODELS)
        for drawn in one_stage.draws(pool, given)
    ]
    one_stage.table(settings, METHODS, given, {"": lambda setting, params: float(accuracy(params, *test))})


if __name__ == "__main__":
    main()
