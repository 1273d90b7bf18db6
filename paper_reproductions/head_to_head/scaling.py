"""How a preset scales with the width of a layer: seconds, memory, the share of the device's multiplication rate.

    python paper_reproductions/head_to_head/scaling.py [--sizes 384 768 1536 3072 4096] [--preset balanced]

Layers of n inputs and n outputs whose covariances are shaped like a real one's (minilm_l4_ffn_out): its variances and
the eigenvalues of its correlations, interpolated to n, with random orthogonal eigenvectors; normal weights.
Each size and number of threads runs in a process of its own, one after the other. "rate" is that of a float32 product
of n x n matrices in the same process; "share" is the part of it that the solver reaches, counting 2 (products n^2 m +
0.67 inverses n^3) operations; "memory" is the rise of a warm run's peak over what the process held before it, over
what H and W take, by the system's count of resident pages; "compile" is the first run less a warm one, and "again" the
first run at another sparsity less a warm one. With PEERS the PyTorch SparseGPT of the module `peer_layer_methods` runs
beside it, on the same threads.

Data: PRUNEOPT_DATA.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--sizes", type=int, nargs="+", default=(384, 768, 1536, 3072, 4096))
parser.add_argument("--preset", default="balanced", choices=("fast", "balanced", "best"))
parser.add_argument("--sparsity", type=float, default=0.5)
parser.add_argument("--rounds", type=int, default=3)
parser.add_argument("--only", nargs=2, type=int, metavar=("N", "THREADS"), help="this process alone; 0: memory")
args = parser.parse_args()


def resident(key):
    """VmHWM (peak) or VmRSS (now) of this process in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(key))


def covariance(n):
    """The covariance (n, n) in float32, shaped like that of a real layer."""
    import numpy as np

    with np.load(Path(os.environ["PRUNEOPT_DATA"]) / "layers" / "minilm_l4_ffn_out.npz", allow_pickle=False) as archive:
        h = archive["H"].astype(np.float64) / int(archive["n_samples"])
    scale = np.sqrt(np.diagonal(h))
    eigenvalues = np.linalg.eigvalsh(h / np.outer(scale, scale))
    at, have = np.linspace(0, 1, n), np.linspace(0, 1, len(h))
    eigenvalues = np.exp(np.interp(at, have, np.log(np.maximum(eigenvalues, 1e-9))))
    rng = np.random.default_rng(0)
    q = np.linalg.qr(rng.standard_normal((n, n)).astype(np.float32))[0]
    mixed = (q * eigenvalues.astype(np.float32)) @ q.T
    scale = rng.permutation(np.interp(at, have, np.sort(scale))).astype(np.float32)
    scale /= np.sqrt(np.diagonal(mixed))
    return mixed * np.outer(scale, scale), rng.standard_normal((n, n)).astype(np.float32)


def one(n, threads):
    """Everything about one size."""
    if hasattr(os, "sched_setaffinity") and 0 < threads < len(os.sched_getaffinity(0)):
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[-threads:])
    if threads == 1:
        os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_cpu_multi_thread_eigen=false"
    import jax
    import jax.numpy as jnp

    sys.path.insert(0, str(Path(__file__).parents[2]))
    import pruneopt as po
    from pruneopt.solvers import auto

    preset = auto.PRESETS[args.preset]
    h, w = covariance(n)
    gram, center = jnp.asarray(h), jnp.asarray(w)
    product = jax.jit(lambda a, b: jnp.matmul(a, b, precision="highest"))

    def timed(fn):
        clock = time.perf_counter()
        jax.block_until_ready(fn())
        return time.perf_counter() - clock

    def solve(sparsity):
        objective = po.objectives.Reconstruction(center, po.curvature.Gram(jnp.array(gram)))
        problem = po.Problem(objective, subject_to=po.constraints.Cardinality(sparsity=sparsity))
        return preset.run(problem, None, jax.random.key(0)).value

    first = timed(lambda: solve(args.sparsity))
    if not threads:
        few = po.objectives.Reconstruction(center[:8, :8], po.curvature.Gram(gram[:8, :8]))
        preset.run(po.Problem(few, subject_to=po.constraints.NM(2, 4)), None, jax.random.key(0))  # forgets the factors
        Path("/proc/self/clear_refs").write_text("5")  # and the compiler's memory
        before = resident("VmRSS")
        timed(lambda: solve(args.sparsity))
        print(json.dumps({"memory": (resident("VmHWM") - before) / (8.0 * n * n)}))
        return
    another = timed(lambda: solve(0.7))
    timed(lambda: product(gram, center))
    runs, products = [], []
    for _ in range(args.rounds):
        products.append(timed(lambda: product(gram, center)))
        runs.append(timed(lambda: solve(args.sparsity)))
    seconds = statistics.median(runs)
    rate = 2 * n**3 / statistics.median(products)
    count = preset.levels * preset.iterations_at(n, n) + preset.refit + 1 + 0.67 * (preset.levels + 1)
    found = {
        "device": jax.devices()[0].device_kind,
        "seconds": seconds,
        "compile": first - seconds,
        "again": another - seconds,
        "rate": rate,
        "achieved": 2 * count * n**3 / seconds,
    }
    if os.environ.get("PEERS"):
        sys.path.insert(0, os.environ["PEERS"])
        import numpy as np
        import peer_layer_methods
        import torch

        torch.set_num_threads(threads)
        found["sparsegpt"] = timed(lambda: np.asarray(peer_layer_methods.sparsegpt(h, w.T.copy(), args.sparsity)))
    print(json.dumps(found))


def child(n, threads):
    """What a process of its own says of one size."""
    command = [sys.executable, __file__, "--only", str(n), str(threads), "--preset", args.preset]
    command += ["--sparsity", str(args.sparsity), "--rounds", str(args.rounds)]
    # Memory: whatever is freed goes back to the system at once.
    words = os.environ | ({} if threads else {"MALLOC_MMAP_THRESHOLD_": "65536"})
    return json.loads(subprocess.run(command, capture_output=True, text=True, check=True, env=words).stdout)


def main():
    print(f"{args.preset} at {args.sparsity:.0%}, n inputs and n outputs, medians of {args.rounds} warm runs")
    titles = ("n", "threads", "seconds", "SparseGPT", "GFLOP/s", "rate", "share", "memory", "compile", "again")
    print("".join(f"{title:>11}" for title in titles))
    for n in args.sizes:
        memory = child(n, 0)["memory"] if Path("/proc/self/clear_refs").exists() else float("nan")
        for threads in (1, 2):
            row = child(n, threads)
            cells = [f"{n:>11}{threads:>11}{row['seconds']:>11.3f}{row.get('sparsegpt', float('nan')):>11.3f}"]
            share = row["achieved"] / row["rate"]
            cells += [f"{row['achieved'] / 1e9:>11.0f}{row['rate'] / 1e9:>11.0f}{share:>11.2f}"]
            cells += [f"{memory:>11.2f}{row['compile']:>11.2f}{row['again']:>11.2f}"]
            print("".join(cells), flush=True)
    print(f"device: {row['device']}; memory in units of (H + W); compile and again in seconds")


if args.only:
    one(*args.only)
else:
    main()
