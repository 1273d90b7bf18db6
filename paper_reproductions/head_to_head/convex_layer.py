"""The lasso of every output of a layer: `ActiveSet` beside celer and skglm, interleaved, on both cores.

    python paper_reproductions/head_to_head/convex_layer.py [--rounds 3] [--shares 0.3 0.1 0.05 0.02] [--layer ...]

minimise 1/2 tr((W - W0)^T (H + lambda I) (W - W0)) + sum_o a_o ||w_o||_1, lambda 1 % of mean(diag H), a_o a share of
the least weight at which output o is zero. Ours in one call of `po.solve`, its checks in float64 included; the others
one output after the other on the square root of H as their design, which is not timed, at tolerance 1e-6 of their own
stopping tests. CPU seconds, and wall seconds in brackets, warm, medians over rounds in which everybody takes a turn.
The excess is how far the objective of all outputs together is above the bound that our evidence proves, over its size,
in float64 (ours with the weights rounded to float32).

Data: PRUNEOPT_DATA. Peers: `pip install celer skglm`; without them only ours is printed.
"""

import argparse
import os
import sys
import time
import warnings
from pathlib import Path

import jax.numpy as jnp
import numpy as np

sys.path.insert(0, str(Path(__file__).parents[2]))
import pruneopt as po
from pruneopt.curvature import Gram
from pruneopt.objectives import Reconstruction
from pruneopt.penalties import L1


def peers(f, top):
    """{name: share -> W}, for the packages that are installed."""
    h = np.asarray(f.curvature.matrix, np.float64) + float(f.ridge()) * np.eye(len(f.center))
    design = np.asfortranarray(np.linalg.cholesky(h).T * len(h) ** 0.5)  # X^T X / n = H
    targets = design @ np.asarray(f.center, np.float64)
    found = {}

    def each(lasso):
        def solve(share):
            columns = [lasso(share * a).fit(design, y).coef_ for a, y in zip(top[0], targets.T, strict=True)]
            return np.stack(columns, axis=1)

        return solve

    try:
        import celer

        found["celer"] = each(lambda a: celer.Lasso(alpha=a, fit_intercept=False, tol=1e-6))
    except ImportError:
        print("celer is not installed")
    try:
        import skglm

        # Its tolerance is on the violation of the optimality condition, in units of the gradient.
        found["skglm"] = each(lambda a: skglm.Lasso(alpha=a, fit_intercept=False, tol=1e-6 * a))
    except ImportError:
        print("skglm is not installed")
    return found


def main():
    words = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    words.add_argument("--rounds", type=int, default=3)
    words.add_argument("--shares", nargs="+", type=float, default=[0.3, 0.1, 0.05, 0.02])
    words.add_argument("--layer", default="minilm_l4_ffn_out")
    options = words.parse_args()
    warnings.simplefilter("ignore")  # celer's of convergence
    path = Path(os.environ["PRUNEOPT_DATA"]) / "layers" / f"{options.layer}.npz"
    with np.load(path, allow_pickle=False) as layer:
        h, w0 = layer["H"] / int(layer["n_samples"]), layer["W0"].T
    f = Reconstruction(jnp.asarray(w0), Gram.checked(jnp.asarray(h)), damping=0.01)
    top = np.abs(f.slope(jnp.zeros_like(f.center))).max(0, keepdims=True)

    def problem(share):
        return po.Problem(f, penalty=L1(share, jnp.asarray(top, jnp.float32)))

    proven = {}

    def ours(share):
        solution = po.solve(problem(share), po.solvers.ActiveSet())
        proven[share] = solution.bound
        return solution.value

    turns = {"ours": ours} | peers(f, top)
    for turn in turns.values():  # compiles
        turn(0.9)
    for share in options.shares:
        spent, found = {name: [] for name in turns}, {}
        for _ in range(options.rounds):
            for name, turn in turns.items():
                clock, wall = time.process_time(), time.perf_counter()
                found[name] = turn(share)
                spent[name].append((time.process_time() - clock, time.perf_counter() - wall))
        task = problem(share)
        cells = []
        for name, w in found.items():
            (cpu, wall), excess = np.median(spent[name], axis=0), task.value(w) / proven[share] - 1
            ratio = cpu / np.median(spent["ours"], axis=0)[0]
            cells.append(f"{name} {cpu:6.2f} s [{wall:.1f}], {ratio:5.1f} x ours, excess {max(excess, 0):.0e}")
        print(f"{share:<5} " + " | ".join(cells), f"| kept {np.mean(np.asarray(found['ours']) != 0):.2%}", flush=True)


if __name__ == "__main__":
    main()
