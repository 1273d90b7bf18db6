"""LeNet-300-100 on MNIST, sparse while training: every transformation for the same steps, dense and masked Adam beside.

    PRUNEOPT_DATA=data python sparse_training.py                  # 95 %, 3 seeds, 4,000 steps of 100 images
    PRUNEOPT_DATA=data python sparse_training.py --only rigl,admm --steps 1000 --seeds 1

Knobs may be set on the last 10,000 training images (--tune); the table is of the test set. Seconds are of the whole
training loop, compilation aside, on one thread.
"""

import argparse
import os
import sys
import time
from pathlib import Path

os.environ.setdefault("XLA_FLAGS", "--xla_cpu_multi_thread_eigen=false intra_op_parallelism_threads=1")
sys.path.append(str(Path(__file__).parents[1] / "networks"))

import jax
import jax.numpy as jnp
import numpy as np
import optax
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
    "gradual magnitude": lambda p: t.gradual(adam(), goal, begin=S // 8, end=END),
    "L1 prox and a cut": lambda p: t.proximal(adam(), L1(3e-5), schedule, metric=t.adam_metric()),
    "Lagrangian gates": lambda p: t.lagrangian(
        adam(),
        goal,
        end=END,
        ascent=2e-3,
        gate_optimizer=optax.adam(2e-2),
        open_=0.9,
    ),
    "RigL": lambda p: t.rigl(adam(), erdos_renyi(p, args.sparsity), end=END),
    "SET": lambda p: t.sparse_evolution(adam(), erdos_renyi(p, args.sparsity), end=END),
    "ADMM": lambda p: t.admm(adam(), goal, begin=S // 8, end=END, metric=t.adam_metric()),
    "ADMM by magnitude": lambda p: t.admm(adam(), goal, begin=S // 8, end=END),
    "hard thresholding": lambda p: t.hard_threshold(adam(), goal, begin=S // 8, end=END),
    "straight-through": lambda p: t.straight_through(adam(), goal, every=100, end=END),
}


def init(seed):
    """Weights (in, out) after Glorot and Bengio 2010, biases 0."""
    rng, params = np.random.default_rng(seed), {}
    for i, (n, m) in enumerate(((784, 300), (300, 100), (100, 10)), 1):
        params[f"fc{i}"] = {"kernel": rng.normal(0, (2 / (n + m)) ** 0.5, (n, m)), "bias": np.zeros(m)}
    return jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), params)


def forward(params, x):
    for i in (1, 2):
        x = jax.nn.relu(x @ params[f"fc{i}"]["kernel"] + params[f"fc{i}"]["bias"])
    return x @ params["fc3"]["kernel"] + params["fc3"]["bias"]


def loss(params, batch):
    return optax.softmax_cross_entropy_with_integer_labels(forward(params, batch[0]), batch[1]).mean()


@jax.jit
def accuracy(params, x, y):
    return 100 * jnp.mean(forward(params, x).argmax(1) == y)


def train(optimizer, params, x, y, steps, seed):
    """(params, state, seconds of the loop)."""

    def step(params, state, index):
        gradient = jax.grad(loss)(params, (x[index], y[index]))
        updates, state = optimizer.update(gradient, state, params)
        return optax.apply_updates(params, updates), state

    rng, state = np.random.default_rng(seed), optimizer.init(params)
    indices = [jnp.asarray(rng.integers(0, len(y), 100)) for _ in range(steps)]
    step = jax.jit(step, donate_argnums=(0, 1)).lower(params, state, indices[0]).compile()
    clock = time.perf_counter()
    for index in indices:
        params, state = step(params, state, index)
    jax.block_until_ready(params)
    return params, state, time.perf_counter() - clock


def run(name, data, seed):
    """(accuracy, weights kept, seconds) of one row."""
    x, y, x_test, y_test = data
    params = init(seed)
    optimizer = ROWS[name](params)
    if (
        name == "L1 prox and a cut"
    ):  # the prox reaches no sparsity by itself: cut to it and retrain, equally long in all
        params, state, first = train(optimizer, params, x, y, END, seed)
        masks = goal.select({k: {"kernel": jnp.abs(v["kernel"])} for k, v in params.items()})
        optimizer = t.freeze(optax.adam(lambda step: schedule(step + END)), masks)
        params = jax.tree.map(lambda w: w, params)
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
          f"{266_200 - int(np.ceil(args.sparsity * 266_200 - 1e-9))} of 266,200 weights")  # fmt: skip
    print(f"{'':20} {'accuracy %':>16} {'kept':>8} {'seconds':>8}")
    for name in names:
        scores, kept, seconds = (np.array(column) for column in zip(*found[name], strict=True))
        error = scores.std(ddof=1) / len(scores) ** 0.5 if len(scores) > 1 else float("nan")
        counts = ", ".join(f"{k:,}" for k in sorted(set(kept.tolist())))
        print(f"{name:20} {scores.mean():8.2f} ± {error:5.2f} {counts:>8} {np.median(seconds):8.1f}")


if __name__ == "__main__":
    main()
