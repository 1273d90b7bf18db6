"""MLPNet on MNIST, one stage, 1,000 examples, no retraining: test accuracy of every method on the same draws.

    python paper_reproductions/benbaki_2023/mlpnet.py [--seeds 3] [--methods NAME ...]

Each seed draws 1,000 of the 60,000 training images; every method sees those alone. Settings were chosen on training
images that no seed draws from (--validate: the last 40,000 of a fixed permutation) and are the same for all
sparsities and seeds. Prints the mean over seeds, its standard error and the CPU seconds that a seed takes for all
sparsities, then the common objective Q(w) = ||G (w - w0)||^2 / 2n + (1e-4 / 2) ||w - w0||^2, G the per-example
gradients of the first seed's examples, in float64.

Data: PRUNEOPT_DATA.
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
from paper_reproductions.networks import mlpnet
from pruneopt.constraints import Cardinality, Support
from pruneopt.curvature import (
    BlockDiagonal,
    Diagonal,
    GaussNewton,
    Identity,
    Kronecker,
    Shrunk,
    empirical_fisher,
    softmax_fisher,
)
from pruneopt.objectives import Quadratic
from pruneopt.solvers import CBS, CHITA, GlobalADMM, Polish, Pursuit, Score, SummedOBS, Then

SPARSITIES = (0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 0.98)
N = 1000
RIDGE = 1e-4  # of Q
BLOCK = 1000  # weights of a block of WoodFisher
TEMPERATURE, SHARE, DAMPING = 4.0, 0.15, 0.01  # of our model: softmax(z / TEMPERATURE), shrinkage, ridge
ADMM = GlobalADMM(rho=(0.1, 10.0), levels=8, iterations=8, inner=6, refit=60)


def loss(params, batch):
    return cross_entropy(mlpnet.forward(params, batch[0]), batch)


def cross_entropy(logits, batch):
    return jnp.mean(jax.nn.logsumexp(logits, axis=-1) - jnp.take_along_axis(logits, batch[1][:, None], axis=-1)[:, 0])


def tempered(params, batch):
    return mlpnet.forward(params, batch[0]) / TEMPERATURE


def gauss_newton(params, batch):
    """The Gauss-Newton matrix of the cross-entropy at a temperature, shrunk, and its exact diagonal."""
    model = GaussNewton.of(tempered, cross_entropy, params, [batch])
    parts = [(batch[0][i : i + 100], batch[1][i : i + 100]) for i in range(0, len(batch[1]), 100)]
    diagonals = [softmax_fisher(tempered, params, [part]).diagonal(params) for part in parts]
    mean = jax.tree.map(lambda *d: sum(d) / len(d), *diagonals)
    return Quadratic(params, Shrunk.checked(model, mean, SHARE), damping=DAMPING)


def magnitude(params, sparsity):
    problem = po.Problem(Quadratic(params, Identity()), subject_to=Cardinality(sparsity=sparsity))
    return po.solve(problem, Score())


class Setting:
    """One seed: its examples and the models at the trained weights, each made once and timed."""

    def __init__(self, params, batch):
        self.params, self.batch, self._made = params, batch, {}

    def model(self, name):
        """(objective, seconds that it took the first time)."""
        if name not in self._made:
            clock = time.process_time()
            if name == "gauss-newton":
                made = gauss_newton(self.params, self.batch)
            elif name == "blocks":
                fisher = empirical_fisher(loss, self.params, [self.batch], ridge=RIDGE)
                made = Quadratic(self.params, BlockDiagonal.of(fisher, by=BLOCK))
            elif name == "kronecker":
                made = Quadratic(self.params, Kronecker.of(loss, self.params, [self.batch], ridge=RIDGE))
            else:
                made = Quadratic(self.params, empirical_fisher(loss, self.params, [self.batch], ridge=RIDGE))
            self._made[name] = made, time.process_time() - clock
        return self._made[name]


def solved(model, solver):
    return lambda setting, sparsity: po.solve(
        po.Problem(setting.model(model)[0], subject_to=Cardinality(sparsity=sparsity)), solver
    )


def refitted_magnitude(setting, sparsity):
    mask = magnitude(setting.params, sparsity).support
    return po.solve(po.Problem(setting.model("fisher")[0], subject_to=Support(mask)), Polish())


def diagonal(setting, sparsity):
    curvature = setting.model("fisher")[0].curvature
    f = Quadratic(setting.params, Diagonal(curvature.diagonal(setting.params)))
    return po.solve(po.Problem(f, subject_to=Cardinality(sparsity=sparsity)), Score())


METHODS = {  # name: (model that it reads, (setting, sparsity) -> Solution)
    "magnitude": (None, lambda setting, sparsity: magnitude(setting.params, sparsity)),
    "diagonal Fisher": ("fisher", diagonal),
    "magnitude, refit (CHITA's LS)": ("fisher", refitted_magnitude),
    "M-FAC": ("fisher", solved("fisher", SummedOBS())),
    "WoodFisher, blocks of 1,000": ("blocks", solved("blocks", SummedOBS())),
    "K-FAC, OBD": ("kronecker", solved("kronecker", Score())),
    "K-FAC, OBS": ("kronecker", solved("kronecker", SummedOBS())),
    "CBS, selection": ("fisher", solved("fisher", CBS())),
    "CBS, selection and update": ("fisher", solved("fisher", Then(CBS(), Polish()))),
    "CHITA, 50 iterations": ("fisher", solved("fisher", CHITA(50))),
    "CHITA, each step refitted": ("fisher", solved("fisher", Pursuit())),
    "ADMM, empirical Fisher": ("fisher", solved("fisher", Then(ADMM, Polish()))),
    "ADMM, Gauss-Newton (ours)": ("gauss-newton", solved("gauss-newton", ADMM)),
}


@jax.jit
def accuracy(params, images, labels):
    return 100 * jnp.mean(jnp.argmax(mlpnet.forward(params, images), axis=1) == labels)


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--methods", nargs="*", default=list(METHODS))
    parser.add_argument("--sparsities", nargs="*", type=float, default=list(SPARSITIES))
    parser.add_argument(
        "--validate", action="store_true", help="score on 40,000 training images instead of the test set"
    )
    given = parser.parse_args()
    folder = os.environ["PRUNEOPT_DATA"]
    params, (images, labels) = mlpnet.load(folder), mlpnet.mnist(folder, "train")
    order = np.random.default_rng(0).permutation(len(labels))
    pool, kept = order[:20000], order[20000:]
    test = (images[kept], labels[kept]) if given.validate else mlpnet.mnist(folder, "test")
    settings = []
    for seed in range(given.seeds):
        drawn = np.random.default_rng(seed + 1).choice(pool, N, replace=False)
        settings.append(Setting(params, (jnp.asarray(images[drawn]), jnp.asarray(labels[drawn]))))
    print(f"{'accuracy %':<32}" + "".join(f"{s:>14}" for s in given.sparsities) + "   CPU s")
    found = {}
    for name in given.methods:
        reads, method = METHODS[name]
        rows, seconds = [], []
        for i, setting in enumerate(settings):
            prepared = setting.model(reads)[1] if reads else 0.0
            clock = time.process_time()
            solutions = [method(setting, s) for s in given.sparsities]
            seconds.append(prepared + time.process_time() - clock)
            rows.append([float(accuracy(s.value, *test)) for s in solutions])
            if i == 0:
                found[name] = solutions
        mean, error = (
            np.mean(rows, 0),
            np.std(rows, 0, ddof=1) / len(rows) ** 0.5 if len(rows) > 1 else np.zeros(len(rows[0])),
        )
        print(f"{name:<32}" + "".join(f"{m:>8.2f} ±{e:4.2f}" for m, e in zip(mean, error, strict=True))
              + f"{np.median(seconds):>9.1f}", flush=True)  # fmt: skip
    q = settings[0].model("fisher")[0]
    print(f"\n{'Q, the first seed':<32}" + "".join(f"{s:>12}" for s in given.sparsities))
    for name, solutions in found.items():
        print(f"{name:<32}" + "".join(f"{q.value(s.value):>12.2e}" for s in solutions), flush=True)


if __name__ == "__main__":
    main()
