"""CHITA in 15 stages on MLPNet: at most 240,000 training examples seen, no optimiser but the stages' own models.

    python paper_reproductions/benbaki_2023/stages.py [--seeds 3] [--methods NAME ...] [--validate]

As the published code, each stage reads 16,000 fresh images in 1,000 groups of 16 (here 995, for the 1,000 images on
which `plans.staged` measures each stage), models the loss with the gradient term and halves what is left to remove:
sparsities 0.1 + (s - 0.1) c (1 - 2^-t), t = 0 ... 14. The mean gradient g of a group of 16 has the second moments of
the Fisher over 16, so the rows are 4 g, and the published ridge of 1e-3 on the groups' moments is 0.016.

Rows: the steps from refits (`Pursuit`), iterative hard thresholding (`CHITA`) under the same model, and the published
code (mazumder-lab+CHITA in PEERS; torch, numba and scikit-learn), which has 1,000 groups a stage: its solver on
gradients from PyTorch's loop over the groups, as its pruner computes them. All take turns at each sparsity, on one
thread (the process is bound to one CPU). CPU seconds of all stages; compilation, reading and choosing the data aside.
Data: PRUNEOPT_DATA.
"""

import argparse
import contextlib
import importlib.util
import io
import os
import sys
import time
from functools import partial
from pathlib import Path

if hasattr(os, "sched_setaffinity"):
    os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})
os.environ["OPENBLAS_NUM_THREADS"] = os.environ["OMP_NUM_THREADS"] = "1"

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

STAGES, GROUPS, GROUP = 15, 1000, 16
JUDGED = 5  # groups of each stage that measure it, in ours
RIDGE = 0.016


class Halving:
    """Sparsity 0.1 after the first stage, then each removes half of what is left to remove; the last ends at s."""

    def stages(self, density):
        s = 1 - density
        return [Stage(min(1.0, r / s)) for r in reached(s)[:-1]] + [Stage(1.0)]


def reached(s):
    """The sparsities after each stage."""
    last = STAGES - 1
    return [0.1 + (s - 0.1) * (1 - 0.5**t) / (1 - 0.5**last) for t in range(STAGES)]


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


def ours(solver, params, groups, held, sparsity):
    """The stages of `plans.staged`."""
    pruned = staged(
        loss, params, lambda stage: [tuple(x[JUDGED:] for x in groups[stage])], Cardinality(sparsity=sparsity), [held],
        method=Method(model, solver, "Benbaki et al. 2023, section 3.4"), schedule=Halving(), rise=10.0, progress=False,
    )  # fmt: skip
    assert len(pruned.history) == STAGES
    return jax.block_until_ready(pruned.params)


def published_code():
    """(params, groups, held, sparsity) -> params by the solver in PEERS, or None where it cannot be imported."""
    folder = Path(os.environ.get("PEERS", "")) / "mazumder-lab+CHITA"
    if not folder.is_dir() or any(importlib.util.find_spec(name) is None for name in ("torch", "numba", "sklearn")):
        return None
    sys.path.append(str(folder))
    module = importlib.import_module("CHITA_opt.L0_card_const")
    return partial(theirs, module.Active_IHTCDLS_PP)


def theirs(solver, params, groups, held, sparsity):
    """The published stages: ridge 1e-3, 50 iterations, the gradient term, gradients of groups in float64."""
    import torch
    from torch.nn import functional

    leaves, structure = jax.tree.flatten(params)
    weights = [torch.tensor(np.array(x), requires_grad=True) for x in leaves]
    sizes = [w.numel() for w in weights]
    for stage, s in enumerate(reached(sparsity)):
        images, labels = (torch.from_numpy(x) for x in groups[stage])
        rows = torch.zeros(GROUPS, sum(sizes))
        for i in range(GROUPS):
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
                g @ w0, g, w0, int((1 - s) * w0.size), alpha=g.sum(axis=0) / GROUP, lambda2=1e-3 * GROUPS / 2,
                beta_tilde1=0 * w0, beta_tilde2=w0.copy(), iht_max_itr=50, ftol=1e-7, act_max_itr=50, kimp=1.5,
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


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--methods", nargs="*", default=[name for name, method in METHODS.items() if method])
    parser.add_argument("--sparsities", nargs="*", type=float, default=[0.5, 0.8, 0.9, 0.95, 0.98])
    parser.add_argument("--validate", action="store_true", help="score on 9,000 training images, not the test set")
    given = parser.parse_args()
    folder = os.environ["PRUNEOPT_DATA"]
    params, (images, labels) = mlpnet.load(folder), mlpnet.mnist(folder, "train")
    order = np.random.default_rng(0).permutation(len(labels))
    pool, held, kept = order[:50000], order[50000:51000], order[51000:]
    test = (images[kept], labels[kept]) if given.validate else mlpnet.mnist(folder, "test")
    shape = (len(given.methods), given.seeds, len(given.sparsities))
    found, seconds = np.zeros(shape), np.zeros(shape)
    for seed in range(-1, given.seeds):  # seed -1 compiles
        rng = np.random.default_rng(seed + 100)
        seen = np.concatenate([rng.permutation(pool) for _ in range(5)])[: STAGES * GROUPS * GROUP]
        groups = [(images[at], labels[at]) for at in seen.reshape(STAGES, GROUPS, GROUP)]
        for j, s in enumerate(given.sparsities[:1] if seed < 0 else given.sparsities):
            for i, name in enumerate(given.methods):
                clock = time.process_time()
                pruned = METHODS[name](params, groups, (images[held], labels[held]), s)
                if seed >= 0:
                    seconds[i, seed, j] = time.process_time() - clock
                    found[i, seed, j] = float(accuracy(pruned, *test))
                    print(
                        f"seed {seed}, {s}: {name} {found[i, seed, j]:.2f} % in {seconds[i, seed, j]:.1f} s", flush=True
                    )
    print(f"{'accuracy %':<30}" + "".join(f"{s:>14}" for s in given.sparsities) + "   CPU s of each sparsity")
    for name, rows, times in zip(given.methods, found, seconds, strict=True):
        print(f"{name:<30}" + one_stage.summary(rows) + "   " + " ".join(f"{s:.1f}" for s in np.median(times, 0)))


if __name__ == "__main__":
    main()
