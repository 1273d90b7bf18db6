"""CHITA in 15 stages on MLPNet: at most 240,000 training examples seen, no optimiser but the stages' own models.

    python paper_reproductions/benbaki_2023/stages.py [--seeds 3] [--methods NAME ...] [--validate]

As the published code, each stage reads 16,000 fresh images in 1,000 groups of 16 (here 995, for the 1,000 images on
which `plans.staged` measures each stage), models the loss with the gradient term and halves what is left to remove:
sparsities 0.1 + (s - 0.1) c (1 - 2^-t), t = 0 ... 14. The mean gradient g of a group of 16 has the second moments of
the Fisher over 16, so the rows are 4 g, and the published ridge of 1e-3 on the groups' moments is 0.016.

Rows: the steps from refits (`Pursuit`), and iterative hard thresholding (`CHITA`), under the same model.
CPU seconds of all stages; compilation and reading the data aside. Data: PRUNEOPT_DATA.
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
from paper_reproductions.benbaki_2023 import one_stage
from paper_reproductions.benbaki_2023.mlpnet import accuracy
from paper_reproductions.networks import mlpnet
from pruneopt.constraints import Cardinality
from pruneopt.curvature import empirical_fisher
from pruneopt.objectives import Quadratic
from pruneopt.plans import Method, Stage, staged
from pruneopt.solvers import CHITA, Pursuit

STAGES, GROUPS, GROUP = 15, 995, 16
RIDGE = 0.016


class Halving:
    """Sparsity 0.1 after the first stage, then each removes half of what is left to remove; the last ends at s."""

    def stages(self, density):
        s, last = 1 - density, STAGES - 1
        reached = [0.1 + (s - 0.1) * (1 - 0.5**t) / (1 - 0.5**last) for t in range(STAGES)]
        return [Stage(min(1.0, r / s)) for r in reached[:-1]] + [Stage(1.0)]


def loss(params, batch):
    """The cross-entropy of images, or of groups of them."""
    images, labels = batch[0].reshape(-1, 784), batch[1].reshape(-1)
    return one_stage.cross_entropy(mlpnet.forward(params, images), (images, labels))


def scaled(params, batch):
    return jnp.sqrt(jnp.float32(GROUP)) * loss(params, batch)


def model(fn, params, batches, leaves, key):
    """<g, d> + 1/2 <d, (F + ridge I) d> from gradients of groups."""
    fisher = empirical_fisher(scaled, params, batches, leaves, ridge=RIDGE)
    mean = np.mean(np.asarray(fisher.gradients), axis=0) / GROUP**0.5
    return Quadratic(params, fisher, fisher.layout.tree(jnp.asarray(mean), params))


METHODS = {"CHITA, each step refitted": Pursuit(8, 1e-3), "CHITA, 50 iterations": CHITA(50)}


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--methods", nargs="*", default=list(METHODS))
    parser.add_argument("--sparsities", nargs="*", type=float, default=[0.5, 0.8, 0.9, 0.95, 0.98])
    parser.add_argument("--validate", action="store_true", help="score on 9,000 training images, not the test set")
    given = parser.parse_args()
    folder = os.environ["PRUNEOPT_DATA"]
    params, (images, labels) = mlpnet.load(folder), mlpnet.mnist(folder, "train")
    order = np.random.default_rng(0).permutation(len(labels))
    pool, held, kept = order[:50000], order[50000:51000], order[51000:]
    test = (images[kept], labels[kept]) if given.validate else mlpnet.mnist(folder, "test")
    print(f"{'accuracy %':<30}" + "".join(f"{s:>14}" for s in given.sparsities) + "   CPU s of each sparsity")
    for name in given.methods:
        row = Method(model, METHODS[name], "Benbaki et al. 2023, section 3.4")
        found, seconds = np.zeros((given.seeds, len(given.sparsities))), np.zeros((given.seeds, len(given.sparsities)))
        for seed in range(-1, given.seeds):  # seed -1 compiles
            rng = np.random.default_rng(seed + 100)
            seen = np.concatenate([rng.permutation(pool) for _ in range(5)])
            for j, s in enumerate(given.sparsities[:1] if seed < 0 else given.sparsities):

                def batches(stage):
                    at = seen[stage * GROUPS * GROUP :][: GROUPS * GROUP].reshape(GROUPS, GROUP)  # noqa: B023
                    return [(images[at], labels[at])]

                clock = time.process_time()
                pruned = staged(
                    loss, params, batches, Cardinality(sparsity=s), [(images[held], labels[held])],
                    method=row, schedule=Halving(), rise=10.0, progress=False,
                )  # fmt: skip
                jax.block_until_ready(pruned.params)
                if seed >= 0:
                    assert len(pruned.history) == STAGES
                    seconds[seed, j] = time.process_time() - clock
                    found[seed, j] = float(accuracy(pruned.params, *test))
        error = np.std(found, 0, ddof=1) / given.seeds**0.5 if given.seeds > 1 else 0 * found[0]
        print(f"{name:<30}" + "".join(f"{m:>8.2f} ±{e:4.2f}" for m, e in zip(found.mean(0), error, strict=True))
              + "   " + " ".join(f"{s:.1f}" for s in np.median(seconds, 0)), flush=True)  # fmt: skip


if __name__ == "__main__":
    main()
