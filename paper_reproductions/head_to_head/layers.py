"""One layer at a time: our presets and the peers' own code on the real layers, interleaved, on one thread.

    python paper_reproductions/head_to_head/layers.py [--rounds 5] [--obc] [--layers minilm_l2_attn_out ...]

Error: tr((W - W0)^T H (W - W0)) / tr(W0^T H W0), undamped, in float64. Budgets: one for the layer (SparseGPT: the same
fraction of every 128 inputs, its own). Every (layer, sparsity) is solved alone, nothing shared; seconds are CPU
seconds, warm, medians over rounds in which everybody takes a turn; ours are those of the solver, and of `po.solve` with
its checks in float64 in brackets. Ratios are geometric means over 50, 60, 70, 80, 90 % and 2:4.

Data: PRUNEOPT_DATA. Peers: PEERS, a folder with a module `peer_layer_methods` whose functions sparsegpt, alps and
obc_all, obc_nm take H (in, in), W0 (out, in) and a sparsity or (n, m); without it only ours are printed.
"""

import argparse
import os
import sys
import time
from pathlib import Path

# One thread: read when JAX is imported.
os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_cpu_multi_thread_eigen=false"
if hasattr(os, "sched_setaffinity"):
    os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})

import jax
import jax.numpy as jnp
import numpy as np

sys.path.insert(0, str(Path(__file__).parents[2]))
import pruneopt as po
from pruneopt.constraints import NM, Cardinality
from pruneopt.curvature import Gram
from pruneopt.objectives import Reconstruction
from pruneopt.solvers import auto

LAYERS = ("minilm_l2_attn_out", "minilm_l4_ffn_out", "mlpnet_fc1", "resnet20_l3_conv")
SPECS = (0.5, 0.6, 0.7, 0.8, 0.9, (2, 4))
OURS = tuple(auto.PRESETS)


def peers():
    """The peers' module, or None."""
    if not os.environ.get("PEERS"):
        print("PEERS is unset: ours alone")
        return None
    sys.path.insert(0, os.environ["PEERS"])
    import peer_layer_methods
    import torch

    torch.set_num_threads(1)
    return peer_layer_methods


def error(h, w0, w):
    d = w.astype(np.float64) - w0
    return np.sum((d @ h) * d) / np.sum((w0 @ h) * w0)


def seconds(fn):
    clock = time.process_time()
    result = fn()
    return time.process_time() - clock, result


def ours(preset, problem):
    """The solver alone, from a fresh copy of the Gram so that no factor is shared."""
    f = problem.objective
    fresh = Reconstruction(f.center, Gram(jnp.array(f.curvature.matrix)), f.damping)
    task = po.Problem(fresh, subject_to=problem.subject_to)
    spent, outcome = seconds(lambda: jax.block_until_ready(preset.run(task, None, jax.random.key(0)).value))
    return spent, np.asarray(outcome).T


def measure(archive, spec, module, rounds):
    """{name: (error, median CPU seconds)}."""
    h, w0, n = archive["H"], archive["W0"], int(archive["n_samples"])
    objective = Reconstruction(jnp.asarray(w0.T), Gram.checked(jnp.asarray(h / n)))
    constraint = NM(*spec) if isinstance(spec, tuple) else Cardinality(sparsity=spec)
    problem = po.Problem(objective, subject_to=constraint)
    turns = {name: lambda p=auto.PRESETS[name]: ours(p, problem) for name in OURS}
    turns |= {
        f"{name}, checked": lambda p=auto.PRESETS[name]: seconds(lambda: np.asarray(po.solve(problem, p).value).T)
        for name in OURS
    }
    if module is not None:
        turns["sparsegpt"] = lambda: seconds(lambda: module.sparsegpt(h, w0, spec))
        turns["alps"] = lambda: seconds(lambda: module.alps(h, w0, spec))
    h64, w64 = h.astype(np.float64), w0.astype(np.float64)
    errors = {name: error(h64, w64, turn()[1]) for name, turn in turns.items()}  # the first turn compiles
    spent = {name: [] for name in turns}
    for i in range(rounds):
        for name, turn in turns.items():
            if name != "alps" or i < 2:  # it takes seconds
                spent[name].append(turn()[0])
    return {name: (errors[name], float(np.median(spent[name]))) for name in turns}


def mean(ratios):
    return float(np.exp(np.mean(np.log(ratios))))


def main():
    words = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    words.add_argument("--rounds", type=int, default=5)
    words.add_argument("--obc", action="store_true", help="also OBC (half a minute a layer; not the 1536-input one)")
    words.add_argument("--layers", nargs="+", default=LAYERS)
    options = words.parse_args()
    module, rows, obc = peers(), {}, {}
    for layer in options.layers:
        with np.load(Path(os.environ["PRUNEOPT_DATA"]) / "layers" / f"{layer}.npz", allow_pickle=False) as archive:
            archive = dict(archive)
        for spec in SPECS:
            rows[layer, spec] = found = measure(archive, spec, module, options.rounds)
            cells = "  ".join(f"{name} {e:.4g} {1e3 * s:.4g} ms" for name, (e, s) in found.items())
            print(f"{layer} {spec}: {cells}", flush=True)
        if options.obc and module is not None and layer != "minilm_l4_ffn_out":
            h, w0, n = archive["H"], archive["W0"], int(archive["n_samples"])
            found = [*module.obc_all(h, w0, SPECS[:-1], n), module.obc_nm(h, w0, SPECS[-1], n)]
            obc |= {
                (layer, s): error(h.astype(np.float64), w0.astype(np.float64), w)
                for s, w in zip(SPECS, found, strict=True)
            }
    if module is None:
        return
    summary(rows, obc)
    if singular := [layer for layer in options.layers if layer == "mlpnet_fc1"]:
        print(f"\nwithout {singular[0]}, whose Gram is singular:")
        summary({key: row for key, row in rows.items() if key[0] not in singular}, obc)


def summary(rows, obc):
    """Ratios of our errors and times to the peers' over the rows {(layer, spec): {name: (error, seconds)}}."""
    layers = {layer for layer, _ in rows}
    print("\nours / theirs: error, mean and largest, of SparseGPT, ALPS, OBC; time, mean [checked] and largest layer")
    print(f"{'':<10}{'SparseGPT':>14}{'ALPS':>14}{'OBC':>8}{'time: SparseGPT':>22}{'ALPS':>8}")
    for name in OURS:
        by = {peer: [row[name][0] / row[peer][0] for row in rows.values()] for peer in ("sparsegpt", "alps")}
        times = {key: row[name][1] / row["sparsegpt"][1] for key, row in rows.items()}
        checked = mean([row[f"{name}, checked"][1] / row["sparsegpt"][1] for row in rows.values()])
        slowest = max(mean([t for (at, _), t in times.items() if at == layer]) for layer in layers)
        against = max((rows[key][name][0] / e for key, e in obc.items() if key in rows), default=float("nan"))
        alps = mean([row[name][1] / row["alps"][1] for row in rows.values()])
        gpt, meng = (f"{mean(by[peer]):.3f} {max(by[peer]):.3f}" for peer in ("sparsegpt", "alps"))
        took = f"{mean(list(times.values())):.3f} [{checked:.3f}] {slowest:.2f}"
        print(f"{name:<10}{gpt:>14}{meng:>14}{against:>8.3f}{took:>22}{alps:>8.3f}")


if __name__ == "__main__":
    main()
