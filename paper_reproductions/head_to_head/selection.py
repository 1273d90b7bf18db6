"""Global magnitude pruning of a large tree beside numpy.partition: time ratios, and peak memory over the weights'.

    python paper_reproductions/head_to_head/selection.py [--millions 100] [--rounds 7]

Each round runs, in turn: numpy.partition of |w| (|w| given); the whole job in NumPy (|w|, partition, mask, product);
pruneopt's selection of the same scores; pruneopt's whole `prune`, which also checks its input, verifies feasibility and
objective and proves optimality. Medians and their ratios to the first.
"""

import argparse
import gc
import resource
import statistics
import threading
import time

import jax
import jax.numpy as jnp
import numpy as np

import pruneopt as po

parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
parser.add_argument("--millions", type=int, default=100)
parser.add_argument("--rounds", type=int, default=7)
parser.add_argument("--sparsity", type=float, default=0.9)
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


def resident():
    """Bytes in memory now."""
    with open("/proc/self/statm") as status:
        return int(status.read().split()[1]) * resource.getpagesize()


def measured(job):
    """(seconds, peak bytes above those at the start)."""
    start, peak, running = resident(), 0, True

    def watch():
        nonlocal peak
        while running:
            peak = max(peak, resident() - start)
            time.sleep(0.001)

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    clock = time.perf_counter()
    result = job()
    seconds = time.perf_counter() - clock
    running = False
    watcher.join()
    del result
    gc.collect()
    return seconds, peak


for job in JOBS.values():
    measured(job)
rounds = [{name: measured(job) for name, job in JOBS.items()} for _ in range(args.rounds)]
first = statistics.median(r["numpy.partition of |w|"][0] for r in rounds)
print(f"{n / 1e6:.0f} million float32 weights in {len(weights)} leaves, sparsity {args.sparsity}, {args.rounds} rounds")
print(f"{'':24} {'seconds':>8} {'/ partition':>12} {'peak / weights, theirs included':>32}")
for name in JOBS:
    seconds = statistics.median(r[name][0] for r in rounds)
    peak = statistics.median(r[name][1] for r in rounds) / (4 * n)
    print(f"{name:24} {seconds:8.3f} {seconds / first:12.2f} {1 + peak:32.2f}")
