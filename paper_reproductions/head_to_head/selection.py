"""Global magnitude pruning of a large tree beside numpy.partition: time ratios, and peak memory over the weights'.

    python paper_reproductions/head_to_head/selection.py [--millions 100] [--rounds 7]

Each round runs, in turn: numpy.partition of |w| (|w| given); the whole job in NumPy (|w|, partition, mask, product);
pruneopt's selection of the same scores; pruneopt's whole `prune`, which also checks its input, verifies feasibility and
objective and proves optimality. Medians and their ratios to the first.
"""

import argparse
import gc
import statistics
import subprocess
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

import pruneopt as po

parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
parser.add_argument("--millions", type=int, default=100)
parser.add_argument("--rounds", type=int, default=7)
parser.add_argument("--sparsity", type=float, default=0.9)
parser.add_argument("--peak-of", help="measure the peak memory of this job alone")
args = parser.parse_args()

rows = args.millions * 1000 // 4
rng = np.random.default_rng(0)
weights = {
    f"layer{i}": jnp.asarray(rng.standard_normal((rows * share // 8, 1000), dtype=np.float32))
    for i, share in enumerate((8, 8, 8, 4, 2, 2))
}
n = sum(w.size for w in weights.values())
constraint = po.constraints.Cardinality(sparsity=args.sparsity)
kept = constraint.kept_of(n)
scores, flat = {}, np.zeros(0)
if not args.peak_of:  # what the first and third job are given
    scores = jax.block_until_ready(jax.tree.map(jnp.square, weights))
    flat = np.concatenate([np.abs(np.ravel(w)) for w in weights.values()])


def numpy_job():
    magnitude = {name: np.abs(np.asarray(w)) for name, w in weights.items()}
    threshold = np.partition(np.concatenate([m.ravel() for m in magnitude.values()]), n - kept)[n - kept]
    return {name: np.asarray(w) * (magnitude[name] >= threshold) for name, w in weights.items()}


JOBS = {
    "numpy.partition of |w|": lambda: np.partition(flat, n - kept),
    "NumPy, whole job": numpy_job,
    "pruneopt, selection": lambda: jax.block_until_ready(constraint.select(scores)),
    "pruneopt, prune": lambda: po.prune(None, weights, None, constraint, progress=False),
}


def seconds(job):
    """Of one call, its result dropped."""
    clock = time.perf_counter()
    result = job()
    taken = time.perf_counter() - clock
    del result
    gc.collect()
    return taken


def memory(name):
    """VmRSS (held now) or VmHWM (the most held) of this process, in bytes; Linux."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * int(next(line for line in lines if line.startswith(name)).split()[1])


if args.peak_of:  # in a process of its own: what one job adds to the weights, both counted
    Path("/proc/self/clear_refs").write_text("5")  # the most held starts anew
    before = memory("VmRSS")
    JOBS[args.peak_of]()
    print(1 + (memory("VmHWM") - before) / (4 * n))
    sys.exit()

for job in JOBS.values():
    seconds(job)
rounds = [{name: seconds(job) for name, job in JOBS.items()} for _ in range(args.rounds)]
first = statistics.median(r["numpy.partition of |w|"] for r in rounds)
print(f"{n / 1e6:.0f} million float32 weights in {len(weights)} leaves, sparsity {args.sparsity}, {args.rounds} rounds")
print(f"{'':24} {'seconds':>8} {'/ partition':>12} {'peak memory / weights':>22}")
for name in JOBS:
    median = statistics.median(r[name] for r in rounds)
    if name in ("numpy.partition of |w|", "pruneopt, selection"):  # parts of a job
        print(f"{name:24} {median:8.3f} {median / first:12.2f}")
        continue
    child = [sys.executable, __file__, "--peak-of", name, "--millions", str(args.millions)]
    peak = float(subprocess.run(child, capture_output=True, text=True, check=True).stdout)
    print(f"{name:24} {median:8.3f} {median / first:12.2f} {peak:22.2f}")
