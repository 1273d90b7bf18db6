"""RigL on LeNet-300-100 and MNIST (Evci et al. 2020, appendix, table of compressed MNIST networks): error 1.44 %.

    PRUNEOPT_DATA=data python paper_reproductions/evci_2020/run.py [--steps 20000] [--seeds 1]

The published protocol: random masks, 99 % zeros in the first layer, 89.1 % in the second, the last dense; momentum
0.9 (Nesterov), L2 penalty 1e-4, batches of 100, learning rate 0.2, divided by 3 at 3/8 and again at 19/40 of training;
every 100 steps 0.3 of each layer's weights, decaying on a cosine, move to the largest gradients. Then inputs and
neurons without weights are cut away. The paper trains 200 epochs, 120,000 steps, its masks change for 50,000. Beside:
SET, the first masks kept (static), gradual magnitude pruning to the same counts, and the dense network, for as many
steps.
"""

import argparse
import os
import sys
from itertools import pairwise
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))
sys.path.insert(0, str(Path(__file__).parents[1] / "networks"))

import jax.numpy as jnp
import numpy as np
import optax
from lenet300 import SIZES, accuracy, init, living, loss, train
from mlpnet import MEAN, STD, mnist

from pruneopt import training
from pruneopt.constraints import ByPath, Cardinality

SPARSITIES = (0.99, 0.891)  # of the first two layers


def penalised(params, batch):
    """Cross-entropy + 1e-4 / 2 |w|^2 over the kernels."""
    return loss(params, batch) + 0.5e-4 * sum(jnp.sum(v["kernel"] ** 2) for v in params.values())


def optimizers(steps, seed):
    """{name: optimiser} at equal steps."""
    rate = optax.piecewise_constant_schedule(0.2, {3 * steps // 8: 1 / 3, 19 * steps // 40: 1 / 3})
    sgd = optax.sgd(rate, momentum=0.9, nesterov=True)
    goal = ByPath({f"fc{i}/kernel": Cardinality(sparsity=s, per="leaf") for i, s in enumerate(SPARSITIES, 1)})
    knobs = {"leaves": list(goal.of), "end": 5 * steps // 12}
    rng = np.random.default_rng(seed)
    scores = [jnp.asarray(rng.random(shape), jnp.float32) for shape in pairwise(SIZES[:3])]
    return {
        "RigL": training.rigl(sgd, goal, key=seed, **knobs),
        "SET": training.sparse_evolution(sgd, goal, key=seed, **knobs),
        "static": training.freeze(sgd, goal.select(dict(zip(goal.of, scores, strict=True)))),
        "gradual magnitude": training.gradual(sgd, goal, begin=steps // 60, **knobs),
        "dense": training.freeze(sgd),
    }


def main(words=None):
    """{(name, seed): (sizes of the layers left, zeros between them, test error in percent, CPU seconds)}."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=20_000)
    parser.add_argument("--seeds", type=int, default=1)
    args = parser.parse_args(words)
    (x, y), test = (
        (jnp.asarray(images * STD + MEAN), jnp.asarray(labels))  # pixels in [0, 1], as in the published code
        for images, labels in (mnist(os.environ["PRUNEOPT_DATA"], part) for part in ("train", "test"))
    )
    found = {}
    print(f"{args.steps} steps of 100 images; claimed for RigL: 408-100-69, 87.0 % zeros, error 1.44 %")
    for seed in range(args.seeds):
        for name, optimizer in optimizers(args.steps, seed).items():
            params, state, seconds = train(optimizer, init(seed), x, y, args.steps, seed, objective=penalised)
            done = optimizer.finish(params, state)
            masks = {k: np.ones(v["kernel"].shape, bool) for k, v in params.items()}
            masks |= {k: np.asarray(v["kernel"]) for k, v in done.support.items() if v["kernel"] is not None}
            sizes, zeros = living(masks)
            error = 100 - float(accuracy(done.params, *test))
            found[name, seed] = sizes, zeros, error, seconds
            kept = sum(int(m.sum()) for m in masks.values())
            print(f"{name:18} seed {seed}: {'-'.join(map(str, sizes)):12} {100 * zeros:.1f} % zeros, "
                  f"error {error:.2f} %, {kept:,} weights, {seconds:.0f} CPU s")  # fmt: skip
    return found


if __name__ == "__main__":
    main()
