"""MLPNet on MNIST with 240,000 training examples seen: second-order cuts, then masked Adam, beside gradual magnitude.

    python paper_reproductions/benbaki_2023/retrained.py [--seeds 3] [--rates 0.002] [--validate]

Every row sees the same 240,000 examples in the same order with the same Adam (batch 64, cosine to zero); what a
second-order stage reads is taken off its Adam steps. CPU seconds of a run; compilation and reading the data aside.

    gradual magnitude   cuts on the cubic schedule over the first 60 % of the steps: the largest |w| live
    gradual Fisher      the same, by w^2 v, v Adam's second moments: the diagonal Fisher at no cost
    gradual, Fisher^1/4 the same, by w^2 v^(1/4): most of the way back to magnitude
    ADMM, then Adam     one cut at the start: the Gauss-Newton matrix of 1,000 examples, GlobalADMM
    ADMM in 3 stages    three such cuts to the densities d^(1/2), d^(3/4) and d, at 0, 20 and 40 % of the steps

Rates are chosen with --validate: on 10,000 training images that nothing else reads.
Data: PRUNEOPT_DATA.
"""

import argparse
import os
import sys
import time
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax

sys.path.insert(0, str(Path(__file__).parents[2]))
import pruneopt as po
from paper_reproductions.benbaki_2023.mlpnet import accuracy, cross_entropy, loss, tempered
from paper_reproductions.networks import mlpnet
from pruneopt.constraints import Cardinality, Intersection, Support
from pruneopt.curvature import Diagonal, GaussNewton, Identity, Shrunk, sampled_fisher
from pruneopt.objectives import Quadratic
from pruneopt.solvers import GlobalADMM, Score

SEEN, BATCH, PIECE = 240_000, 64, 125  # examples, a batch, steps in one compiled stretch
STRETCHES = SEEN // BATCH // PIECE  # 30
SHARE, DAMPING = 0.15, 0.01
ADMM = GlobalADMM(rho=(0.1, 3.0), levels=4, iterations=4, inner=4, refit=20)


@partial(jax.jit, static_argnums=0)
def stretch(optimizer, params, state, mask, images, labels):
    """PIECE steps of masked Adam."""

    def step(carry, batch):
        params, state = carry
        gradient = jax.tree.map(jnp.multiply, jax.grad(loss)(params, batch), mask)
        move, state = optimizer.update(gradient, state, params)
        return (jax.tree.map(lambda p, u, m: (p + u) * m, params, move, mask), state), None

    return jax.lax.scan(step, (params, state), (images, labels))[0]


def cut(objective, sparsity, support, solver):
    allowed = Cardinality(sparsity=sparsity)
    return po.solve(
        po.Problem(objective, subject_to=allowed if support is None else Intersection((Support(support), allowed))),
        solver,
    )


def gauss_newton(params, batch):
    """As in mlpnet.py, but with the diagonal from one sampled label an example."""
    model = GaussNewton.of(tempered, cross_entropy, params, [batch])
    diagonal = sampled_fisher(tempered, params, [batch]).diagonal(params)
    return Quadratic(params, Shrunk.checked(model, diagonal, SHARE), damping=DAMPING)


def run(method, params, batches, sparsity, optimizer):
    """The pruned and trained weights. batches: (images, labels) of each of STRETCHES stretches."""
    state, support = optimizer.init(params), None
    mask = jax.tree.map(jnp.ones_like, params)
    density, last = 1 - sparsity, 3 * STRETCHES // 5
    stages = {0: 1 - density**0.5, STRETCHES // 5: 1 - density**0.75, 2 * STRETCHES // 5: sparsity}
    for i, (images, labels) in enumerate(batches):
        if method.startswith("gradual") and i <= last:
            goal = sparsity - sparsity * (1 - (i + 1) / (last + 1)) ** 3
            curvature = Identity()
            if method != "gradual magnitude" and i:
                power = 1.0 if method == "gradual Fisher" else 0.25
                curvature = Diagonal(jax.tree.map(lambda v: v**power, state[0].nu))  # noqa: B023
            solution = cut(Quadratic(params, curvature), goal, support, Score())
        elif (method == "ADMM, then Adam" and i == 0) or (method == "ADMM in 3 stages" and i in stages):
            read = 1000 // BATCH + 1  # batches that the model reads: they are taken off the stretch
            first = (images[:read].reshape(-1, 784)[:1000], labels[:read].reshape(-1)[:1000])
            images, labels = images[read:], labels[read:]
            goal = sparsity if method == "ADMM, then Adam" else stages[i]
            solution = cut(gauss_newton(params, first), goal, support, ADMM)
        else:
            solution = None
        if solution is not None:
            params, support = solution.value, solution.support
            mask = jax.tree.map(lambda m: m.astype(jnp.float32), support)
        params, state = stretch(optimizer, params, state, mask, images, labels)
    return jax.block_until_ready(params)


METHODS = ("gradual magnitude", "gradual Fisher", "gradual, Fisher^1/4", "ADMM, then Adam", "ADMM in 3 stages")


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--methods", nargs="*", default=list(METHODS))
    parser.add_argument("--sparsities", nargs="*", type=float, default=[0.5, 0.8, 0.9, 0.95, 0.98])
    parser.add_argument("--rates", nargs="*", type=float, default=[0.002])
    parser.add_argument(
        "--validate", action="store_true", help="score on 10,000 training images instead of the test set"
    )
    given = parser.parse_args()
    folder = os.environ["PRUNEOPT_DATA"]
    params, (images, labels) = mlpnet.load(folder), mlpnet.mnist(folder, "train")
    order = np.random.default_rng(0).permutation(len(labels))
    pool, kept = order[:50000], order[50000:]
    test = (images[kept], labels[kept]) if given.validate else mlpnet.mnist(folder, "test")
    print(f"{'accuracy %':<30}" + "".join(f"{s:>14}" for s in given.sparsities) + "   CPU seconds")
    for rate in given.rates:
        optimizer = optax.adam(optax.cosine_decay_schedule(rate, SEEN // BATCH))
        rows = {name: np.zeros((given.seeds, len(given.sparsities))) for name in given.methods}
        seconds = {name: [] for name in given.methods}
        for seed in range(-1, given.seeds):  # seed -1 compiles
            rng = np.random.default_rng(seed + 100)
            seen = np.concatenate([rng.permutation(pool) for _ in range(SEEN // len(pool) + 1)])[:SEEN]
            shape = (STRETCHES, PIECE, BATCH)
            xs, ys = images[seen].reshape(*shape, 784), labels[seen].reshape(shape)
            for j, sparsity in enumerate(given.sparsities[:1] if seed < 0 else given.sparsities):
                for name in given.methods:  # interleaved
                    clock = time.process_time()
                    found = run(name, params, zip(xs, ys, strict=True), sparsity, optimizer)
                    if seed >= 0:
                        seconds[name].append(time.process_time() - clock)
                        rows[name][seed, j] = float(accuracy(found, *test))
        for name in given.methods:
            error = np.std(rows[name], 0, ddof=1) / given.seeds**0.5 if given.seeds > 1 else 0 * rows[name][0]
            print(f"{name + f' {rate:g}':<30}" + "".join(
                f"{m:>8.2f} ±{e:4.2f}" for m, e in zip(rows[name].mean(0), error, strict=True)
            ) + f"{np.median(seconds[name]):>9.2f}", flush=True)  # fmt: skip


if __name__ == "__main__":
    main()
