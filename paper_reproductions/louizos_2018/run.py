"""L0 regularisation of LeNet-300-100 on MNIST (Louizos, Welling and Kingma 2018, table 1): which neurons are left.

    PRUNEOPT_DATA=data python paper_reproductions/louizos_2018/run.py [--steps 18000] [--seeds 1]

A hard-concrete gate for each input of each layer (784 pixels, 300 and 100 neurons), each weight at the price 0.1 / N,
Adam at 1e-3, batches of 100. The paper trains 200 epochs, 120,000 steps, in which a gate can move further: so the gates
are trained at 1e-3 and at seven times that, and the dense network for as many steps beside.
"""

import argparse
import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))
sys.path.insert(0, str(Path(__file__).parents[1] / "networks"))

import jax.numpy as jnp
import numpy as np
import optax
from lenet300 import WEIGHTS, accuracy, init, living, train
from mlpnet import mnist

from pruneopt import training

GATE_RATES = {"dense": 0.0, "gates at 1e-3": 1e-3, "gates at 7e-3": 7e-3}


def main(words=None):
    """{(name, seed): (sizes of the layers left, test error in percent, CPU seconds)}."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=18_000)
    parser.add_argument("--seeds", type=int, default=1)
    args = parser.parse_args(words)
    x, y = map(jnp.asarray, mnist(os.environ["PRUNEOPT_DATA"], "train"))
    test = [jnp.asarray(part) for part in mnist(os.environ["PRUNEOPT_DATA"], "test")]
    found = {}
    print(f"{args.steps} steps of 100 images; claimed: 219-214-100 at an error of 1.4 % (0.1 / N for every weight)")
    for seed in range(args.seeds):
        for name, rate in GATE_RATES.items():
            optimizer = training.freeze(optax.adam(1e-3))
            if rate:
                optimizer = training.l0(
                    optax.adam(1e-3), 0.1 / len(y), per="in", gate_optimizer=optax.adam(rate), key=seed
                )
            params, state, seconds = train(optimizer, init(seed), x, y, args.steps, seed)
            done = optimizer.finish(params, state)
            sizes, _ = living({k: v["kernel"] for k, v in done.support.items()})
            error = 100 - float(accuracy(done.params, *test))
            found[name, seed] = sizes, error, seconds
            kept = sum(int(np.sum(v["kernel"])) for v in done.support.values())
            print(f"{name:14} seed {seed}: {'-'.join(map(str, sizes)):12} error {error:.2f} %, "
                  f"{kept:,} of {WEIGHTS:,} weights, {seconds:.0f} CPU s")  # fmt: skip
    return found


if __name__ == "__main__":
    main()
