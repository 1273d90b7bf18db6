"""What each transformation adds to a training step of plain Adam, on LeNet-300-100 with batches of 100 and of 1,000.

    python training_overhead.py [--rounds 7] [--batches 100 1000]

Every row trains 100 steps a round (one projection at the default intervals), rows in turn; the figure is the median
over rounds of a row's CPU time over plain Adam's of the same round, in brackets the ratio of the least times.
"""

import argparse
import os
import time

os.environ.setdefault("XLA_FLAGS", "--xla_cpu_multi_thread_eigen=false intra_op_parallelism_threads=1")

import jax
import jax.numpy as jnp
import numpy as np
import optax

from pruneopt import training as t
from pruneopt.constraints import NM, Cardinality
from pruneopt.penalties import L1

parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
parser.add_argument("--rounds", type=int, default=7)
parser.add_argument("--steps", type=int, default=100)
parser.add_argument("--batches", type=int, nargs="*", default=[100, 1000])
args = parser.parse_args()
goal, never = Cardinality(sparsity=0.95, floor=1), 1_000_000
ROWS = {
    "adam": lambda adam: adam,
    "freeze": lambda adam: t.freeze(adam, {f"fc{i}/kernel": jnp.ones(s, bool) for i, s in enumerate(SHAPES, 1)}),
    "proximal, L1": lambda adam: t.proximal(adam, L1(1e-5), 1e-3, metric=t.adam_metric()),
    "gradual, every 100": lambda adam: t.gradual(adam, goal, end=10_000),
    "rigl, every 100": lambda adam: t.rigl(adam, goal, end=never),
    "SET, every 100": lambda adam: t.sparse_evolution(adam, goal, end=never),
    "hard threshold, every 100": lambda adam: t.hard_threshold(adam, goal, end=never),
    "ADMM, every 50": lambda adam: t.admm(adam, goal, end=never // 1000, metric=t.adam_metric()),
    "straight-through 2:4": lambda adam: t.straight_through(adam, NM(2, 4), leaves=["fc1/kernel", "fc2/kernel"]),
    "straight-through 95 %, every 100": lambda adam: t.straight_through(adam, goal, every=100),
    "l0, a gate an input": lambda adam: t.l0(adam, 1e-6, per="in"),
    "l0, a gate a weight": lambda adam: t.l0(adam, 1e-6),
    "lagrangian, a gate a weight": lambda adam: t.lagrangian(adam, goal, end=never),
}
SHAPES = ((784, 300), (300, 100), (100, 10))


def loss(params, x, y):
    for i in (1, 2):
        x = jax.nn.relu(x @ params[f"fc{i}"]["kernel"] + params[f"fc{i}"]["bias"])
    logits = x @ params["fc3"]["kernel"] + params["fc3"]["bias"]
    return optax.softmax_cross_entropy_with_integer_labels(logits, y).mean()


def compiled(optimizer, x, y):
    rng = np.random.default_rng(0)
    params = {
        f"fc{i}": {"kernel": jnp.asarray(rng.normal(0, 0.05, s), jnp.float32), "bias": jnp.zeros(s[1])}
        for i, s in enumerate(SHAPES, 1)
    }

    def step(params, state):
        updates, state = optimizer.update(jax.grad(loss)(params, x, y), state, params)
        return optax.apply_updates(params, updates), state

    state = optimizer.init(params)
    return jax.jit(step, donate_argnums=(0, 1)).lower(params, state).compile(), params, state


for batch in args.batches:
    rng = np.random.default_rng(1)
    x, y = jnp.asarray(rng.standard_normal((batch, 784)), jnp.float32), jnp.asarray(rng.integers(0, 10, batch))
    runs = {name: compiled(make(optax.adam(1e-3)), x, y) for name, make in ROWS.items()}
    seconds = {name: [] for name in ROWS}
    for _ in range(args.rounds + 1):
        for name, (step, params, state) in runs.items():
            clock = time.process_time()
            for _ in range(args.steps):
                params, state = step(params, state)
            jax.block_until_ready(params)
            seconds[name].append(time.process_time() - clock)
            runs[name] = (step, params, state)
    base = np.array(seconds["adam"][1:])
    print(f"batches of {batch}: plain Adam {1e3 * np.median(base) / args.steps:.2f} ms a step, one thread")
    for name, times in seconds.items():
        if name != "adam":
            ratio, least = np.median(np.array(times[1:]) / base), min(times[1:]) / base.min()
            print(f"    {name:34} {100 * (ratio - 1):+6.1f} %  [{100 * (least - 1):+6.1f} %]")
