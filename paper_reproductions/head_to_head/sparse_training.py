"""LeNet-300-100 on MNIST, sparse while training: every transformation for the same steps, dense and masked Adam beside.

    PRUNEOPT_DATA=data python sparse_training.py                  # 95 %, 3 seeds, 4,000 steps of 100 images
    PRUNEOPT_DATA=data python sparse_training.py --only rigl,admm --steps 1000 --seeds 1

Knobs may be set on the last 10,000 training images (--tune); the table is of the test set. Seconds are CPU seconds of
the whole training loop, compilation aside, on one thread.
"""

import argparse
import os
import sys
from pathlib import Path

sys.path.append(str(Path(__file__).parents[1] / "networks"))

import jax.numpy as jnp
import numpy as np
import optax
from lenet300 import WEIGHTS, accuracy, init, train
from mlpnet import mnist

from pruneopt import training as t
from pruneopt.constraints import Cardinality, erdos_renyi
from pruneopt.penalties import L1

parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
parser.add_argument("--sparsity", type=float, default=0.95)
parser.add_argument("--steps", type=int, default=4000)
parser.add_argument("--seeds", type=int, default=3)
parser.add_argument("--only", default="", help="names, separated by commas")
parser.add_argument(
    "--tune", action="store_true", help="judge on 10,000 held-out training images instead of the test set"
)
args = parser.parse_args()
S, RATE = args.steps, 1.2e-3
END = 3 * S // 4  # the last change of the support; the rest is retraining in every row
schedule = optax.cosine_decay_schedule(RATE, S)
goal = Cardinality(sparsity=args.sparsity, floor=1)


def adam():
    return optax.adam(schedule)


# name: params -> optimiser.
ROWS = {
    "dense": lambda p: t.freeze(adam()),
    "gradual magnitude": lambda p: t.gradual(adam(), goal, end=END),
    "L1 prox and a cut": lambda p: t.proximal(adam(), L1(2e-4), schedule, metric=t.adam_metric()),
    "Lagrangian gates": lambda p: t.lagrangian(adam(), goal, end=END, ascent=1e-2, gate_optimizer=optax.adam(5e-2)),
    "RigL": lambda p: t.rigl(adam(), erdos_renyi(p, args.sparsity), end=END, every=50),
    "SET": lambda p: t.sparse_evolution(adam(), erdos_renyi(p, args.sparsity), end=END, drop=0.5),
    "ADMM": lambda p: t.admm(adam(), goal, begin=S // 8, end=END, every=20, metric=t.adam_metric()),
    "hard thresholding": lambda p: t.hard_threshold(adam(), goal, begin=S // 8, end=END, every=200, hold=150),
}


def run(name, data, seed):
    """(accuracy, weights kept, seconds) of one row."""
    x, y, x_test, y_test = data
    params = init(seed)
    optimizer = ROWS[name](params)
    if name == "L1 prox and a cut":  # the prox meets no count: cut to it and retrain, equally long in all
        params, state, first = train(optimizer, params, x, y, END, seed)
        masks = goal.select({k: {"kernel": jnp.abs(v["kernel"])} for k, v in params.items()})
        optimizer = t.freeze(optax.adam(lambda step: schedule(step + END)), masks)
        params, state, second = train(optimizer, params, x, y, S - END, seed + 100)
        seconds = first + second
    else:
        params, state, seconds = train(optimizer, params, x, y, S, seed)
    done = optimizer.finish(params, state)
    return float(accuracy(done.params, x_test, y_test)), done.kept, seconds


def main():
    x, y = map(jnp.asarray, mnist(os.environ["PRUNEOPT_DATA"], "train"))
    if args.tune:
        data = (x[:50_000], y[:50_000], x[50_000:], y[50_000:])
    else:
        data = (x, y, *map(jnp.asarray, mnist(os.environ["PRUNEOPT_DATA"], "test")))
    names = [name for name in ROWS if not args.only or name in args.only.split(",")]
    found = {name: [] for name in names}
    for seed in range(args.seeds):  # interleaved, so that the machine's mood is shared
        for name in names:
            found[name].append(run(name, data, seed))
            print(f"{name:20} seed {seed}: {found[name][-1]}", file=sys.stderr)
    where = "held-out images" if args.tune else "test images"
    print(f"{S} steps of 100 images, {args.seeds} seeds, sparsity {args.sparsity}, {where}; asked to keep "
          f"{int((1 - args.sparsity) * WEIGHTS + 1e-9):,} of {WEIGHTS:,} weights")  # fmt: skip
    print(f"{'':20} {'accuracy %':>16} {'kept':>8} {'seconds':>8}")
    for name in names:
        scores, kept, seconds = (np.array(column) for column in zip(*found[name], strict=True))
        error = scores.std(ddof=1) / len(scores) ** 0.5 if len(scores) > 1 else float("nan")
        counts = ", ".join(f"{k:,}" for k in sorted(set(kept.tolist())))
        print(f"{name:20} {scores.mean():8.2f} ± {error:5.2f} {counts:>8} {np.median(seconds):8.1f}")


if __name__ == "__main__":
    main()
