"""Second-order cuts, then masked Adam, beside gradual magnitude: the same training examples seen by all.

    python paper_reproductions/benbaki_2023/retrained.py [--network mlpnet | resnet20] [--seeds 3] [--rates 0.002]

Every row sees the same examples in the same order with the same Adam (batch 64, cosine to zero): 240,000 on MLPNet,
19,200 cropped and mirrored images on ResNet-20, whose batch norm trains along. What a second-order stage reads is taken
off its Adam steps, and on ResNet-20 as many more as make its CPU seconds those of the others. CPU seconds of a run;
compilation and reading the data aside.

    gradual magnitude   cuts on the cubic schedule over the first 60 % of the steps: the largest |w| live
    gradual Fisher      the same, by w^2 v, v Adam's second moments: the diagonal Fisher at no cost
    gradual, Fisher^1/4 the same, by w^2 v^(1/4): most of the way back to magnitude
    one cut, then Adam  one second-order cut at the start, of 1,000 examples. MLPNet: their Gauss-Newton matrix,
                        GlobalADMM. ResNet-20: layer by layer, as in resnet20.py
    3 cuts and Adam     three such cuts to the densities d^(1/2), d^(3/4) and d, at 0, 20 and 40 % of the steps
    one cut, gradual    one such cut to the density d^(1/2), then gradual magnitude from there

Rates are chosen with --validate: on training images that nothing else reads.
Data: PRUNEOPT_DATA.
"""

import argparse
import os
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

sys.path.insert(0, str(Path(__file__).parents[2]))
import pruneopt as po
from paper_reproductions.benbaki_2023 import mlpnet, one_stage, resnet20
from paper_reproductions.networks import mlpnet as mlp
from paper_reproductions.networks import resnet20 as resnet
from pruneopt.constraints import Cardinality, Intersection, Support, by_size
from pruneopt.curvature import Diagonal, GaussNewton, Identity, Shrunk, sampled_fisher
from pruneopt.network.leaves import combine, partition
from pruneopt.objectives import Quadratic
from pruneopt.solvers import BALANCED, GlobalADMM, Score

BATCH, READ = 64, 1000
SHARE, DAMPING = 0.15, 0.01
ADMM = GlobalADMM(rho=(0.1, 3.0), levels=4, iterations=4, inner=4, refit=20)


@dataclass(frozen=True)
class Task:
    """A network and how it is trained and cut.

    train: loss(params, batch) -> (scalar, updates of the statistics). cut: (params, examples, sparsity, support) ->
    (params, support of the pruned leaves). spent: examples that a cut takes off the Adam steps.
    """

    network: one_stage.Network
    train: Callable
    cut: Callable
    seen: int
    piece: int  # steps between two cuts of a gradual schedule
    spent: int
    accuracy: Callable
    stretch: Callable

    @property
    def stretches(self):
        return self.seen // BATCH // self.piece


@partial(jax.jit, static_argnums=(0, 1))
def step(train, optimizer, params, state, mask, batch):
    """(params, state) after one step of masked Adam."""
    gradient, updates = jax.grad(train, has_aux=True)(params, batch)
    move, state = optimizer.update(jax.tree.map(jnp.multiply, gradient, mask), state, params)
    params = jax.tree.map(lambda p, u, m: (p + u) * m, params, move, mask)
    return jax.tree.map(_newer, updates, params, is_leaf=lambda x: x is None), state


@partial(jax.jit, static_argnums=(0, 1))
def compiled_stretch(train, optimizer, params, state, mask, images, labels):
    """A step a batch, in one program."""
    one = lambda carry, batch: (step(train, optimizer, *carry, mask, batch), None)  # noqa: E731
    return jax.lax.scan(one, (params, state), (images, labels))[0]


def stretch(train, optimizer, params, state, mask, images, labels):
    """A step a batch, one by one: convolutions in a compiled loop are many times slower on a CPU."""
    for batch in zip(images, labels, strict=True):
        params, state = step(train, optimizer, params, state, mask, batch)
    return params, state


def _newer(update, old):
    return old if update is None else update


def selected(objective, sparsity, support, solver):
    allowed = Cardinality(sparsity=sparsity)
    allowed = allowed if support is None else Intersection((Support(support), allowed))
    return po.solve(po.Problem(objective, subject_to=allowed), solver)


def gauss_newton_cut(params, examples, sparsity, support):
    """As in mlpnet.py, but with the diagonal from one sampled label an example."""
    model = GaussNewton.of(mlpnet.tempered, one_stage.cross_entropy, params, [examples])
    diagonal = sampled_fisher(mlpnet.tempered, params, [examples]).diagonal(params)
    objective = Quadratic(params, Shrunk.checked(model, diagonal, SHARE), damping=DAMPING)
    found = selected(objective, sparsity, support, ADMM)
    return found.value, found.support


def reconstruction_cut(params, examples, sparsity, support):
    """Layer by layer, as in resnet20.py."""
    allowed = by_size(params, sparsity, resnet20.POWER, leaves=resnet20.is_pruned)
    allowed = allowed if support is None else Intersection((Support(support), allowed))
    words = {"leaves": resnet20.is_pruned, "progress": False}
    found = po.plans.layerwise(resnet.forward, params, resnet20.pieces(examples[0]), allowed, BALANCED, **words)
    return found.params, found.support


def mlpnet_loss(params, batch):
    return one_stage.cross_entropy(mlp.forward(params, batch[0]), batch), jax.tree.map(lambda _: None, params)


def resnet20_loss(params, batch):
    logits, updates = resnet.train_forward(params, batch[0])
    return one_stage.cross_entropy(logits, batch), updates


def run(task, method, batches, sparsity, optimizer):
    """The pruned and trained parameters. batches: (images, labels) of each stretch."""
    params, leaves = task.network.params, task.network.leaves
    state, support, owed = optimizer.init(params), None, 0
    mask = jax.tree.map(jnp.ones_like, params)
    density, last = 1 - sparsity, 3 * task.stretches // 5
    cuts = {"one cut, then Adam": {0: sparsity}, "one cut, gradual": {0: 1 - density**0.5}}.get(method, {})
    if method == "3 cuts and Adam":
        cuts = {i * task.stretches // 5: 1 - density**power for i, power in enumerate((0.5, 0.75, 1.0))}
    for i, (images, labels) in enumerate(batches):
        chosen, rest = partition(params, leaves)
        cut = i in cuts or ("gradual" in method and i <= last)
        if i in cuts:
            first = tuple(x.reshape(-1, *x.shape[2:])[:READ] for x in (images, labels))
            params, support = task.cut(params, first, cuts[i], support)
            owed += -(-task.spent // BATCH)
        elif cut:
            goal = sparsity - (sparsity - cuts.get(0, 0.0)) * (1 - (i + 1) / (last + 1)) ** 3
            curvature: Any = Identity()
            if "Fisher" in method and i:
                power = 1.0 if method == "gradual Fisher" else 0.25
                moments = partition(state[0].nu, leaves)[0]
                curvature = Diagonal(jax.tree.map(lambda v, power=power: v**power, moments))
            found = selected(Quadratic(chosen, curvature), goal, support, Score())
            params, support = combine(found.value, rest), found.support
        if cut:
            ones = partition(jax.tree.map(jnp.ones_like, params), leaves)[1]
            mask = combine(jax.tree.map(lambda m: m.astype(jnp.float32), support), ones)
        images, labels, owed = images[owed:], labels[owed:], owed - min(owed, len(labels))
        if len(labels):
            params, state = task.stretch(task.train, optimizer, params, state, mask, images, labels)
    return jax.block_until_ready(params)


def mlpnet_task(folder, validate):
    """(task, the images that may be seen, (indices, generator) -> images and labels)."""
    images, labels = mlp.mnist(folder, "train")
    order = np.random.default_rng(0).permutation(len(labels))
    pool, kept = order[:50000], order[50000:]
    test = (images[kept], labels[kept]) if validate else mlp.mnist(folder, "test")
    network = one_stage.Network(mlp.forward, mlp.load(folder))
    score = lambda params: float(mlpnet.accuracy(params, *test))  # noqa: E731
    task = Task(network, mlpnet_loss, gauss_newton_cut, 240_000, 125, READ, score, compiled_stretch)
    return task, pool, lambda seen, rng: (images[seen], labels[seen])


def resnet20_task(folder, validate):
    """The same for ResNet-20, every image cropped and mirrored."""
    images, labels = resnet.cifar10(folder, "train20k", *resnet.PUBLISHED)
    order = np.random.default_rng(0).permutation(len(labels))
    pool, kept = order[:15000], order[15000:17000]
    test = (images[kept], labels[kept]) if validate else resnet.cifar10(folder, "test1k", *resnet.PUBLISHED)
    network = one_stage.Network(resnet.forward, resnet20.prepared(folder), resnet20.is_pruned)
    score = lambda params: resnet20.accuracy(params, *test)  # noqa: E731
    task = Task(network, resnet20_loss, reconstruction_cut, 19_200, 10, 2_240, score, stretch)
    return task, pool, lambda seen, rng: (resnet.cropped(images[seen], *resnet.PUBLISHED, rng), labels[seen])


METHODS = ("gradual magnitude", "gradual Fisher", "gradual, Fisher^1/4", "one cut, then Adam", "3 cuts and Adam",
           "one cut, gradual")  # fmt: skip
TASKS = {
    "mlpnet": (mlpnet_task, METHODS, (0.5, 0.8, 0.9, 0.95, 0.98)),
    "resnet20": (resnet20_task, METHODS, (0.8, 0.9, 0.95, 0.98)),
}


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--network", choices=TASKS, default="mlpnet")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--methods", nargs="*")
    parser.add_argument("--sparsities", nargs="*", type=float)
    parser.add_argument("--rates", nargs="*", type=float, default=[0.002])
    parser.add_argument("--validate", action="store_true", help="score on training images that nothing else reads")
    given = parser.parse_args()
    make, methods, sparsities = TASKS[given.network]
    methods, sparsities = given.methods or methods, given.sparsities or sparsities
    task, pool, examples = make(os.environ["PRUNEOPT_DATA"], given.validate)
    for rate in given.rates:
        optimizer = optax.adam(optax.cosine_decay_schedule(rate, task.seen // BATCH))
        rows = {name: np.zeros((given.seeds, len(sparsities))) for name in methods}
        seconds = {name: [] for name in methods}
        for seed in range(-1, given.seeds):  # seed -1 compiles
            rng = np.random.default_rng(seed + 100)
            seen = np.concatenate([rng.permutation(pool) for _ in range(task.seen // len(pool) + 1)])[: task.seen]
            xs, ys = (x.reshape(task.stretches, task.piece, BATCH, *x.shape[1:]) for x in examples(seen, rng))
            for j, sparsity in enumerate(sparsities[:1] if seed < 0 else sparsities):
                for name in methods:  # interleaved
                    clock = time.process_time()
                    batches = list(zip(xs, ys, strict=True))
                    found = run(task, name, batches[: 1 + len(xs) // 5] if seed < 0 else batches, sparsity, optimizer)
                    if seed >= 0:
                        seconds[name].append(time.process_time() - clock)
                        rows[name][seed, j] = task.accuracy(found)
                        print(f"{name:<22} seed {seed}  {sparsity:g}  {rows[name][seed, j]:.2f}"
                              f"  {seconds[name][-1]:.1f} s", flush=True)  # fmt: skip
        print(f"{'accuracy %':<30}" + "".join(f"{s:>14}" for s in sparsities) + "   CPU seconds")
        for name in methods:
            print(f"{name + f' {rate:g}':<30}" + one_stage.summary(rows[name])
                  + f"{np.median(seconds[name]):>9.2f}", flush=True)  # fmt: skip


if __name__ == "__main__":
    main()
