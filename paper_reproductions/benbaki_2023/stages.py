"""CHITA in stages: each models the loss on fresh examples; no optimiser but the stages' own models.

    python paper_reproductions/benbaki_2023/stages.py [--network mlpnet | resnet20] [--seeds 3] [--methods NAME ...]
                                                      [--sparsities S ...] [--ridge R] [--validate]

MLPNet: 15 stages of 16,000 images, 240,000 in all. ResNet-20: 8 of 2,400 cropped and mirrored ones, 19,200 in all,
batch norm by its running statistics; scored with these, and with statistics re-estimated on the last stage's images.
As in the published code a stage reads its images in groups of 16 (some of which measure the stage in `plans.staged`),
models the loss with the gradient term and halves what is left to remove: sparsities 0.1 + (s - 0.1) c (1 - 2^-t). The
mean gradient g of a group of 16 has the second moments of the Fisher over 16, so the rows are 4 g, and the published
ridge of 1e-3 on the groups' moments is 0.016.

Rows: the steps from refits (`Pursuit`), iterative hard thresholding (`CHITA`) under the same model, and for MLPNet the
published code (mazumder-lab+CHITA in PEERS; torch, numba and scikit-learn): its solver on gradients from PyTorch's loop
over the groups, as its pruner computes them. All take turns at each sparsity, on one thread (the process is bound to
one CPU). CPU seconds of all stages; compilation, reading and choosing the data aside. Data: PRUNEOPT_DATA.
"""

import argparse
import contextlib
import importlib.util
import io
import os
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

if __name__ == "__main__":  # before NumPy counts the cores
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})
    os.environ["OPENBLAS_NUM_THREADS"] = os.environ["OMP_NUM_THREADS"] = "1"

import jax
import jax.numpy as jnp
import numpy as np

sys.path.insert(0, str(Path(__file__).parents[2]))
import pruneopt as po
from paper_reproductions.benbaki_2023 import mlpnet, one_stage, resnet20
from paper_reproductions.networks import mlpnet as mlp
from paper_reproductions.networks import resnet20 as resnet
from pruneopt.constraints import Cardinality
from pruneopt.curvature import empirical_fisher
from pruneopt.objectives import Quadratic
from pruneopt.plans import Method, Stage, staged
from pruneopt.solvers import CHITA, Pursuit

GROUP = 16  # images
RIDGE = 1e-3 * GROUP


@dataclass(frozen=True)
class Grouped:
    """The mean cross-entropy of images, or of groups of them, times `scale`."""

    forward: Callable
    image: tuple  # its shape
    scale: float = 1.0

    def __call__(self, params, batch):
        images, labels = batch[0].reshape(-1, *self.image), batch[1].reshape(-1)
        return self.scale * one_stage.cross_entropy(self.forward(params, images), (images, labels))


@dataclass(frozen=True)
class Task:
    """A network, its stages, the groups of 16 of each and how many of them measure it, and the scores of a result.

    pool: the images that may be seen. examples: (their indices, generator) -> images and labels.
    """

    network: one_stage.Network
    stages: int
    groups: int
    judged: int
    pool: Any
    examples: Callable
    held_out: Any
    scores: Callable
    sparsities: tuple


@dataclass(frozen=True)
class Halving:
    """Sparsity 0.1 after the first stage, then each removes half of what is left to remove; the last ends at s."""

    count: int

    def stages(self, density):
        s = 1 - density
        return [Stage(min(1.0, r / s)) for r in reached(s, self.count)[:-1]] + [Stage(1.0)]


def reached(s, count):
    """The sparsities after each of `count` stages."""
    return [0.1 + (s - 0.1) * (1 - 0.5**t) / (1 - 0.5 ** (count - 1)) for t in range(count)]


@dataclass(frozen=True)
class Model:
    """<g, d> + 1/2 <d, (F + ridge I) d> from gradients of groups."""

    ridge: float

    def __call__(self, network, key):
        loss = replace(network.fn, scale=GROUP**0.5)
        fisher = empirical_fisher(loss, *network.given[1:], ridge=self.ridge)
        mean = np.mean(np.asarray(fisher.gradients), axis=0) / GROUP**0.5
        center = network.chosen
        return Quadratic(center, fisher, fisher.layout.tree(jnp.asarray(mean), center))


def ours(solver, task, groups, sparsity, ridge):
    """The stages of `plans.staged`, as published none of them shortened; a step may be, on the held-out images."""
    network = task.network
    loss = Grouped(network.forward, task.held_out[0].shape[1:])
    pruned = staged(
        loss, network.params, lambda stage: [tuple(x[task.judged :] for x in groups[stage])],
        Cardinality(sparsity=sparsity), [task.held_out], method=Method(Model(ridge), solver, "CHITA++"),
        schedule=Halving(task.stages), rise=1e9, leaves=network.leaves, progress=False,
    )  # fmt: skip
    assert len(pruned.history) == task.stages
    return jax.block_until_ready(pruned.params)


def published_code():
    """(task, groups, sparsity, ridge) -> params by the solver in PEERS, or None where it cannot be imported."""
    folder = Path(os.environ.get("PEERS", "")) / "mazumder-lab+CHITA"
    if not folder.is_dir() or any(importlib.util.find_spec(name) is None for name in ("torch", "numba", "sklearn")):
        return None
    sys.path.append(str(folder))
    module = importlib.import_module("CHITA_opt.L0_card_const")
    return partial(theirs, module.Active_IHTCDLS_PP)


def theirs(solver, task, groups, sparsity, ridge):
    """The published stages on MLPNet: 50 iterations, the gradient term, gradients of groups in float64."""
    import torch
    from torch.nn import functional

    leaves, structure = jax.tree.flatten(task.network.params)
    weights = [torch.tensor(np.array(x), requires_grad=True) for x in leaves]
    sizes = [w.numel() for w in weights]
    for stage, s in enumerate(reached(sparsity, task.stages)):
        images, labels = (torch.from_numpy(x) for x in groups[stage])
        rows = torch.zeros(task.groups, sum(sizes))
        for i in range(task.groups):
            named = jax.tree.unflatten(structure, weights)
            x = functional.relu(images[i] @ named["fc1"])
            x = functional.relu(x @ named["fc2"])
            functional.cross_entropy(x @ named["fc3"], labels[i].long()).backward()
            rows[i] = torch.cat([w.grad.reshape(-1) for w in weights])
            for w in weights:
                w.grad = None
        g = rows.numpy().astype(np.float64)
        w0 = torch.cat([w.detach().reshape(-1) for w in weights]).numpy().astype(np.float64)
        with contextlib.redirect_stdout(io.StringIO()):
            found = solver(
                g @ w0, g, w0, int((1 - s) * w0.size), alpha=g.sum(axis=0) / GROUP, beta_tilde1=0 * w0,
                beta_tilde2=w0.copy(), lambda2=ridge / GROUP * task.groups / 2,
                iht_max_itr=50, ftol=1e-7, act_max_itr=50, kimp=1.5,
            )[0]  # fmt: skip
        with torch.no_grad():
            for w, part in zip(weights, np.split(found, np.cumsum(sizes)[:-1]), strict=True):
                w.copy_(torch.from_numpy(part).reshape(w.shape))
    return jax.tree.unflatten(structure, [jnp.asarray(w.detach().numpy()) for w in weights])


METHODS = {
    "CHITA, each step refitted": partial(ours, Pursuit(8, 1e-3)),
    "CHITA, 50 iterations": partial(ours, CHITA(50)),
    "published code": published_code(),
}


def mlpnet_task(folder, validate):
    images, labels = mlp.mnist(folder, "train")
    order = np.random.default_rng(0).permutation(len(labels))
    pool, held, kept = order[:50000], order[50000:51000], order[51000:]
    test = (images[kept], labels[kept]) if validate else mlp.mnist(folder, "test")
    scores = lambda params, groups: {"": float(mlpnet.accuracy(params, *test))}  # noqa: E731
    network = one_stage.Network(mlp.forward, mlp.load(folder))
    examples = lambda seen, rng: (images[seen], labels[seen])  # noqa: E731
    return Task(network, 15, 1000, 5, pool, examples, (images[held], labels[held]), scores, (0.5, 0.8, 0.9, 0.95, 0.98))


def resnet20_task(folder, validate):
    images, labels = resnet.cifar10(folder, "train20k", *resnet.PUBLISHED)
    order = np.random.default_rng(0).permutation(len(labels))
    pool, kept, held = order[:15000], order[15000:17000], order[17000:17160]
    test = (images[kept], labels[kept]) if validate else resnet.cifar10(folder, "test1k", *resnet.PUBLISHED)
    network = one_stage.Network(resnet.forward, resnet20.prepared(folder), resnet20.is_pruned)

    def scores(params, groups):
        last = resnet20.pieces(groups[-1][0].reshape(-1, *images.shape[1:]))
        again = po.plans.recalibrate(resnet20.statistics, params, last)
        return {"": resnet20.accuracy(params, *test), ", re-estimated": resnet20.accuracy(again, *test)}

    examples = lambda seen, rng: (resnet.cropped(images[seen], *resnet.PUBLISHED, rng), labels[seen])  # noqa: E731
    return Task(network, 8, 150, 10, pool, examples, (images[held], labels[held]), scores, (0.5, 0.7, 0.8, 0.9))


TASKS = {"mlpnet": mlpnet_task, "resnet20": resnet20_task}


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--network", choices=TASKS, default="mlpnet")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--methods", nargs="*")
    parser.add_argument("--sparsities", nargs="*", type=float)
    parser.add_argument("--ridge", type=float, default=RIDGE)
    parser.add_argument("--validate", action="store_true", help="score on training images that nothing else reads")
    given = parser.parse_args()
    task = TASKS[given.network](os.environ["PRUNEOPT_DATA"], given.validate)
    usable = [name for name, method in METHODS.items() if method and (given.network == "mlpnet" or method.func is ours)]
    methods, sparsities = given.methods or usable, given.sparsities or task.sparsities
    seconds, found = np.zeros((len(methods), given.seeds, len(sparsities))), {}
    for seed in range(-1, given.seeds):  # seed -1 compiles
        rng = np.random.default_rng(seed + 100)
        count = task.stages * task.groups * GROUP
        seen = np.concatenate([rng.permutation(task.pool) for _ in range(count // len(task.pool) + 1)])[:count]
        cut = lambda x: x.reshape(task.stages, task.groups, GROUP, *x.shape[1:])  # noqa: E731
        groups = list(zip(*(cut(x) for x in task.examples(seen, rng)), strict=True))
        for j, s in enumerate(sparsities[:1] if seed < 0 else sparsities):
            for i, name in enumerate(methods):
                clock = time.process_time()
                run = task if seed >= 0 else replace(task, stages=2)
                pruned = METHODS[name](run, groups, s, given.ridge)
                if seed >= 0:
                    seconds[i, seed, j] = time.process_time() - clock
                    for label, score in task.scores(pruned, groups).items():
                        found.setdefault(name + label, np.zeros(seconds.shape[1:]))[seed, j] = score
                        print(
                            f"seed {seed}, {s}: {name + label} {score:.2f} %, {seconds[i, seed, j]:.1f} s", flush=True
                        )
    print(f"{'accuracy %':<40}" + "".join(f"{s:>14}" for s in sparsities))
    for name, rows in found.items():
        print(f"{name:<40}" + one_stage.summary(rows))
    print("CPU seconds of each sparsity, medians")
    for name, times in zip(methods, seconds, strict=True):
        print(f"{name:<40}" + "".join(f"{s:>14.1f}" for s in np.median(times, 0)))


if __name__ == "__main__":
    main()
