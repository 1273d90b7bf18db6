"""ALPS (Meng et al. 2024): one layer at a time, the support and the weights judged apart; or a decoder's perplexity.

    python paper_reproductions/meng_2024/run.py [--layers minilm_l2_attn_out ...] [--levels 0.5 0.7 2:4 ...]
    python paper_reproductions/meng_2024/run.py --model opt-1.3b --test wiki.test.raw --calibrate c4-train.json.gz

The paper's studies of one layer, on the four layers of PRUNEOPT_DATA. Error: ||X W - X W0||^2 / ||X W0||^2, undamped,
in float64. First the best weights on each method's support, by an exact refit (its table 1, left); then the support of
magnitude with its own weights, with ALPS's conjugate gradients and with exact ones, and their seconds (table 1, right);
then each method's own weights, ADMM-Grad (Boza 2024) among them (table 7). Ratios are geometric means over the layers.
Budgets: Wanda one an output, SparseGPT the same fraction of every 128 inputs (and one a layer, as a row of its own
name), the others one a layer. Seconds are CPU seconds, warm.

With --model: the perplexities of frantar_2023/run.py at 70 %, which takes the same words.
"""

import argparse
import os
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

sys.path.insert(0, str(Path(__file__).parents[2]))
import pruneopt as po
from paper_reproductions.frantar_2023 import run as frantar
from pruneopt.constraints import NM, Cardinality, Support
from pruneopt.curvature import Gram
from pruneopt.objectives import Reconstruction
from pruneopt.plans import LAYER_METHODS
from pruneopt.solvers import ConjugateGradients, Polish
from pruneopt.solvers.base import Start

LAYERS = ("minilm_l2_attn_out", "minilm_l4_ffn_out", "mlpnet_fc1", "resnet20_l3_conv")
LEVELS = {"0.5": 0.5, "0.6": 0.6, "0.7": 0.7, "0.8": 0.8, "0.9": 0.9, "2:4": (2, 4)}
# The row of `plans.LAYER_METHODS` and the scope of its budget.
ROWS = {
    "Wanda": ("wanda", "out"),
    "SparseSwaps": ("sparse_swaps", "out"),
    "SparseGPT": ("sparsegpt", "in"),
    "SparseGPT, layer's budget": ("sparsegpt", "tree"),
    "ALPS": ("alps", "tree"),
    "fast": ("fast", "tree"),
    "balanced": ("balanced", "tree"),
    "best": ("best", "tree"),
}
METHODS = ("magnitude", "ADMM-Grad", *ROWS)


def budget(level, per):
    amount = LEVELS[level]
    if isinstance(amount, tuple):
        return NM(*amount)
    return Cardinality(sparsity=amount, per=per, span=128 if per == "in" else 1)


def error(h, w0, w):
    """Relative error in float64; h (n_in, n_in), w (n_in, n_out)."""
    d = np.asarray(w, np.float64) - w0
    return float(np.sum(d * (h @ d)) / np.sum(w0 * (h @ w0)))


def admm_grad(h, w0, level):
    """Boza 2024, algorithm 2: ADMM with rho = 1 on inputs of unit norm, the mask grown in 15 of 20 steps, by a cube."""
    scale = np.sqrt(np.diagonal(h))[:, None] + 1e-8
    gram = h / (scale * scale.T) + 0.1 * np.eye(len(h))
    dense = scale * w0
    inverse, target = np.linalg.inv(gram + np.eye(len(h))), gram @ dense
    w, u, constraint = dense, np.zeros_like(dense), budget(level, "tree")
    for step in range(20):
        if step < 15:
            cut = 1 - (1 - (step + 1) / 15) ** 3
            now = constraint if cut == 1 else constraint.relaxed(cut)
            mask = np.asarray(now.select(jnp.asarray((w + u) ** 2, jnp.float32)))
        z = (w + u) * mask
        u = u + w - z
        w = inverse @ (target + z - u)
    return (w + u) * mask / scale, mask


class Layer:
    """One layer: `error` of weights, and `problem` with a constraint and a damping."""

    def __init__(self, name):
        with np.load(Path(os.environ["PRUNEOPT_DATA"]) / "layers" / f"{name}.npz", allow_pickle=False) as archive:
            h, w0, n = archive["H"], archive["W0"].T, int(archive["n_samples"])
        self.h, self.w0 = h.astype(np.float64), w0.astype(np.float64)
        self._gram, self._center = Gram.checked(jnp.asarray(h / n)), jnp.asarray(w0)

    def problem(self, constraint, damping=0.0):
        return po.Problem(Reconstruction(self._center, self._gram, damping), subject_to=constraint)

    def solve(self, method, level):
        """Weights and support."""
        if method == "magnitude":
            mask = np.asarray(budget(level, "tree").select(jnp.abs(self._center)))
            return self.w0 * mask, mask
        if method == "ADMM-Grad":
            return admm_grad(self.h, self.w0, level)
        row, per = LAYER_METHODS[ROWS[method][0]], ROWS[method][1]
        solution = po.solve(self.problem(budget(level, per), row.damping), row.solver)
        return np.asarray(solution.value), np.asarray(solution.support)

    def error(self, w):
        return error(self.h, self.w0, w)

    def refitted(self, mask):
        """The error of the best weights on a support."""
        return self.error(po.solve(self.problem(Support(jnp.asarray(mask))), Polish()).value)


def seconds(run):
    """CPU seconds of the second call of two, and what it returned."""
    for _ in range(2):
        clock = time.process_time()
        found = jax.block_until_ready(run())
        spent = time.process_time() - clock
    return spent, found


def refinements(layer, level):
    """{post-processing: (error, CPU seconds)} on the support of magnitude."""
    values, mask = layer.solve("magnitude", level)
    start, key = Start(jnp.asarray(values, jnp.float32), jnp.asarray(mask)), jax.random.key(0)
    task = layer.problem(Support(jnp.asarray(mask)), 0.01)
    exact = layer.problem(Support(jnp.asarray(mask)))
    few, quick = seconds(lambda: ConjugateGradients(10).run(task, start, key).value)
    all_, best = seconds(lambda: Polish().run(exact, start, key).value)
    return {
        "none": (layer.error(values), 0.0),
        "10 conjugate gradients": (layer.error(quick), few),
        "exact": (layer.error(best), all_),
    }


def mean(ratios):
    return float(np.exp(np.mean(np.log(ratios))))


def over_alps(title, found, levels):
    """Geometric means over layers of errors over those of ALPS."""
    print(f"\n{title}\n{'':<27}" + "".join(f"{level:>9}" for level in levels))
    layers = {layer for layer, _, _ in found}
    for method in METHODS:
        cells = [mean([found[at, level, method] / found[at, level, "ALPS"] for at in layers]) for level in levels]
        print(f"{method:<27}" + "".join(f"{cell:>9.3f}" for cell in cells))


def main(words=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="a folder with config.json and safetensors: perplexities instead")
    parser.add_argument("--layers", nargs="+", choices=LAYERS, default=LAYERS)
    parser.add_argument("--levels", nargs="+", default=None)
    options, rest = parser.parse_known_args(words)
    if options.model:
        return frantar.main(["--model", options.model, "--levels", *(options.levels or ["70%"]), *rest])
    if rest:
        parser.error(f"{rest} goes with --model")
    levels = options.levels or tuple(LEVELS)
    if wrong := [level for level in levels if level not in LEVELS]:
        parser.error(f"--levels {wrong} is none of {', '.join(LEVELS)}")
    own, best, after = {}, {}, {}
    for name in options.layers:
        layer = Layer(name)
        for level in levels:
            for method in METHODS:
                values, mask = layer.solve(method, level)
                own[name, level, method], best[name, level, method] = layer.error(values), layer.refitted(mask)
            after[name, level] = refinements(layer, level)
            cells = "  ".join(f"{m} {own[name, level, m]:.4g} {best[name, level, m]:.4g}" for m in METHODS)
            print(f"{name} {level}: {cells}", flush=True)
    over_alps("best weights on each method's support, error over ALPS's", best, levels)
    print("\nthe support of magnitude: error over the exact one's; mean CPU seconds a layer, in the order of --layers")
    for kind in ("none", "10 conjugate gradients", "exact"):
        ratios = [mean([after[at, x][kind][0] / after[at, x]["exact"][0] for at in options.layers]) for x in levels]
        spent = [np.mean([after[at, x][kind][1] for x in levels]) for at in options.layers]
        print(f"{kind:<24}" + "".join(f"{r:>9.3f}" for r in ratios) + "  " + "".join(f"{s:>8.3f}" for s in spent))
    over_alps("each method's own weights, error over ALPS's", own, levels)
    return own, best, after


if __name__ == "__main__":
    main()
