"""Lottery tickets of LeNet-300-100 on MNIST (Frankle and Carbin 2019, section 2), and the same masks reinitialised.

    PRUNEOPT_DATA=data python paper_reproductions/frankle_2019/run.py [--steps 4000] [--rounds 15] [--seeds 1]

Glorot initialisation, Adam at 1.2e-3, batches of 60; each round prunes a fifth of every layer's weights and rewinds to
the initial weights. At each level of LEVELS the same masks are trained from other initial weights too. 5,000 of the
training images are held out: early stopping is at their least loss, looked at every 100 steps. The paper trains 50,000
steps and prunes the output layer at half the rate.
"""

import argparse
import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))
sys.path.insert(0, str(Path(__file__).parents[1] / "networks"))

import jax
import jax.numpy as jnp
import optax
from lenet300 import WEIGHTS, accuracy, init, loss, train
from mlpnet import mnist

import pruneopt as po
from pruneopt import plans, training
from pruneopt.constraints import Cardinality

LEVELS = (3, 7, 9, 15)  # rounds after which 51.2, 21.0, 13.4, 3.5 % of the weights are left
held_out_loss = jax.jit(loss)


def main(words=None):
    """{(rounds, "ticket" or "reinitialised", seed): (share left, early stopping, accuracy there, at the end)}."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=4000)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--seeds", type=int, default=1)
    args = parser.parse_args(words)
    x, y = map(jnp.asarray, mnist(os.environ["PRUNEOPT_DATA"], "train"))
    test = [jnp.asarray(part) for part in mnist(os.environ["PRUNEOPT_DATA"], "test")]
    held, x, y = (x[-5000:], y[-5000:]), x[:-5000], y[:-5000]
    found = {}

    def trained(params, support, seed):
        """(params, step of the least held-out loss, test accuracy there, at the end, seconds)."""
        best = [float("inf"), 0, 0.0]

        def watch(step, params):
            if (now := float(held_out_loss(params, held))) < best[0]:
                best[:] = now, step, float(accuracy(params, *test))

        optimizer = training.freeze(optax.adam(1.2e-3), support)
        params, _, seconds = train(optimizer, params, x, y, args.steps, seed, batch=60, watch=watch)
        return params, best[1], best[2], float(accuracy(params, *test)), seconds

    def say(rounds, kind, seed, support, result):
        left = 1.0 if support is None else po.Pruned(None, support).kept / WEIGHTS
        found[rounds, kind, seed] = left, *result[1:4]
        print(f"seed {seed}, {100 * left:5.1f} % left, {kind:13}: early stopping at {result[1]:5} "
              f"with {result[2]:.2f} %, {result[3]:.2f} % at the end, {result[4]:.0f} CPU s")  # fmt: skip

    for seed in range(args.seeds):
        done = []

        def train_ticket(params, support, seed=seed, done=done):
            done.append((support, trained(params, support, seed)))
            say(len(done) - 1, "ticket", seed, *done[-1])
            return done[-1][1][0]

        goal = Cardinality(sparsity=1 - 0.8**args.rounds, per="leaf")
        plans.lottery(init(seed), train_ticket, goal, rounds=args.rounds, progress=False)
        for rounds in LEVELS:
            if rounds < len(done):
                support = done[rounds][0]
                start = po.apply(init(1000 + seed), support)
                say(rounds, "reinitialised", seed, support, trained(start, support, seed))
    return found


if __name__ == "__main__":
    main()
