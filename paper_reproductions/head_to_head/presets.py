"""The constants of the layer presets, chosen by leave-one-network-out: errors over ALPS's on layers of six networks.

    python paper_reproductions/head_to_head/presets.py [--presets fast balanced best] [--networks ...] [--specs ...]

Every layer is solved alone at each of 50 to 90 % and 2:4; the error tr((W - W0)^T H (W - W0)) is undamped, in float64,
and so is that of `ALPS`, the published method. A candidate's score is the geometric mean over all specs and layers of
a network, networks alike. For each network: the candidate that the others choose, its score here, the worst ratio of a
layer and how many of them ALPS wins; and the candidate that all choose. Data: PRUNEOPT_DATA, MiniLM's as in
structured_minilm.py. Layers of a network that is not there are left out, and that is said.
"""

import argparse
import os
import sys
import time
from dataclasses import replace
from itertools import product
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

sys.path.insert(0, str(Path(__file__).parents[2]))
import pruneopt as po
from paper_reproductions.networks import minilm, mlpnet, resnet20, stories
from pruneopt import _tree
from pruneopt.capture.statistics import capture
from pruneopt.constraints import NM, Cardinality
from pruneopt.curvature import Gram
from pruneopt.objectives import Reconstruction
from pruneopt.solvers import ALPS

SPECS = (0.5, 0.6, 0.7, 0.8, 0.9, (2, 4))


def from_file(*names):
    """Layers of the folder: {name: (H, W0 (in, out))}."""
    found = {}
    for name in names:
        with np.load(Path(os.environ["PRUNEOPT_DATA"]) / "layers" / f"{name}.npz", allow_pickle=False) as archive:
            found[name] = np.float32(archive["H"] / archive["n_samples"]), archive["W0"].T
    return found


def from_network(fn, params, batches, leaves, weights=None):
    """Layers of a network: the inputs of the operators that read these leaves."""
    seen = capture(fn, params, batches, leaves=leaves, weights=weights)
    graph = po.structure.trace(fn, params, batches[0])
    named = dict(_tree.named_leaves(params))
    of = {name: np.asarray(graph.operator(name).to_matrix(named)[0]) for name in seen}
    return {name: (np.asarray(s.gram[0], np.float32), of[name]) for name, s in seen.items()}


def of_mlpnet(folder):
    images, _ = mlpnet.mnist(folder, "train")
    return from_network(mlpnet.forward, mlpnet.load(folder), [images[:20000]], ["fc1", "fc2"])


def of_resnet(load, pixels):
    def layers(folder):
        images, _ = resnet20.cifar10(folder, "train20k", *pixels)
        leaves = [
            "conv1/kernel",
            *(f"stage{s}/{b}/conv{c}/kernel" for s, b, c in ((1, 1, 2), (2, 0, 1), (2, 2, 2), (3, 1, 1))),
        ]
        return from_network(resnet20.forward, load(folder), [images[i : i + 250] for i in range(0, 2000, 250)], leaves)

    return layers


def of_minilm(folder):
    where = minilm.locate()
    lines = [line for line in minilm.wikitext(folder, "valid") if len(line) > 200][:256]
    ids, mask = minilm.tokenize(lines, minilm.vocabulary(where), 128)
    batches = [{"ids": ids[i : i + 32], "mask": mask[i : i + 32]} for i in range(0, len(ids), 32)]
    leaves = ["layers/0/attention/query/kernel", "layers/3/attention/value/kernel", "layers/1/ffn/up/kernel",
              "layers/5/attention/output/kernel"]  # fmt: skip
    known = from_file("minilm_l2_attn_out", "minilm_l4_ffn_out")
    return known | from_network(minilm.embed, minilm.load(where), batches, leaves, lambda b: jnp.asarray(b["mask"]))


def of_stories(folder):
    windows = stories.windows(folder, 40 * 1200, 40)  # behind those that evaluate
    leaves = ["layers/0/wq", "layers/1/wo", "layers/2/w1", "layers/3/w2", "layers/4/wv"]
    return from_network(stories.forward, stories.load(folder)[0], stories.batches(windows), leaves)


NETWORKS = {
    "MiniLM": of_minilm,
    "MLPNet": of_mlpnet,
    "ResNet-20 (CHITA)": of_resnet(resnet20.load_chita, resnet20.CHITA),
    "ResNet-20 (akamaster)": of_resnet(resnet20.load_akamaster, resnet20.AKAMASTER),
    "stories260K": of_stories,
    "SmolLM2": lambda folder: from_file("smollm2_l1_q", "smollm2_l4_k", "smollm2_l8_o", "smollm2_l28_o"),
}

# What is chosen from: every product of these fields around a preset.
FIELDS = {
    "fast": {
        "rho": [(0.8, 0.8), (1.0, 1.0), (1.3, 1.3)],
        "damping": [0.001, 0.003, 0.01],
        "floor": [0.1, 0.2],
    },
    "balanced": {
        "rho,levels,iterations": [((0.5, 1.1), 3, 4), ((0.7, 1.2), 2, 6), ((0.5, 1.1), 2, 6), ((0.4, 1.4), 3, 4)],
        "damping": [0.001, 0.01],
        "floor": [0.05, 0.1],
    },
    "best": {
        "rho": [(0.3, 1.6), (0.45, 2.3), (0.2, 1.2)],
        "damping": [0.001, 0.003],
        "floor": [0.05, 0.1],
        "relaxation": [1.2, 1.4],
    },
}


def candidates(preset):
    """Settings around a preset, without exchanges, which few layers are small enough for."""
    base = replace(po.solvers.auto.PRESETS[preset], refine="never")
    for values in product(*FIELDS[preset].values()):
        words = {}
        for names, value in zip(FIELDS[preset], values, strict=True):
            names = names.split(",")
            words |= dict(zip(names, value if len(names) > 1 else (value,), strict=True))
        yield replace(base, **words)


def said(candidate, preset):
    """Its fields that are chosen."""
    names = [name for names in FIELDS[preset] for name in names.split(",")]
    return ", ".join(f"{name} {getattr(candidate, name)}" for name in names)


def error(h, w0, w):
    d = w - w0
    return np.sum((h @ d) * d) / np.sum((h @ w0) * w0)


class Layers:
    """All layers, with ALPS's error at every spec."""

    def __init__(self, networks, specs):
        self.tasks, self.peer = {}, {}
        for network in networks:
            try:
                found = NETWORKS[network](os.environ["PRUNEOPT_DATA"])
            except FileNotFoundError as missing:
                print(f"{network} is left out: {missing}")
                continue
            for name, (h, w0) in found.items():
                objective = Reconstruction(jnp.asarray(w0), Gram.checked(jnp.asarray(h)))
                exact = np.asarray(h, np.float64), np.asarray(w0, np.float64)
                for spec in specs:
                    if isinstance(spec, tuple) and len(w0) % spec[1]:
                        continue
                    constraint = NM(*spec) if isinstance(spec, tuple) else Cardinality(sparsity=spec)
                    self.tasks[network, name, spec] = po.Problem(objective, subject_to=constraint), exact
        for key in self.tasks:
            self.peer[key] = self.error(ALPS(), key)
        many = len({key[:2] for key in self.tasks})
        print(f"{many} layers of {len({key[0] for key in self.tasks})} networks, {len(specs)} specs", flush=True)

    def error(self, solver, key):
        task, exact = self.tasks[key]
        value = solver.run(task, None, jax.random.key(0)).value
        return error(*exact, np.asarray(value, np.float64))

    def ratios(self, solver):
        """{(network, layer, spec): error over ALPS's}."""
        return {key: self.error(solver, key) / self.peer[key] for key in self.tasks}


def by_network(ratios):
    """{network: geometric mean}."""
    names = dict.fromkeys(key[0] for key in ratios)
    return {n: float(np.exp(np.mean([np.log(r) for key, r in ratios.items() if key[0] == n]))) for n in names}


def choose(layers, preset):
    """Prints every candidate, and what leaving out each network chooses."""
    table = {}
    for candidate in candidates(preset):
        clock = time.process_time()
        table[candidate] = ratios = layers.ratios(candidate)
        took = time.process_time() - clock
        cells = " ".join(f"{mean:.3f}" for mean in by_network(ratios).values())
        print(
            f"{preset}: {said(candidate, preset)}: {cells}, worst {max(ratios.values()):.3f}, {took:.0f} s", flush=True
        )
    means = {candidate: by_network(ratios) for candidate, ratios in table.items()}
    networks = list(next(iter(means.values())))
    score = lambda c, names: float(np.mean([np.log(means[c][n]) for n in names]))  # noqa: E731
    lost, left = 0, []
    for network in networks:
        best = min(means, key=lambda c, out=network: score(c, [n for n in networks if n != out]))
        here = [r for key, r in table[best].items() if key[0] == network]
        lost, left = lost + sum(r > 1 for r in here), [*left, means[best][network]]
        print(f"without {network}: {said(best, preset)}: {means[best][network]:.3f} there, worst {max(here):.3f}")
    print(f"left out in turn: {np.exp(np.mean(np.log(left))):.3f}, {lost} of {len(layers.tasks)} lost to ALPS")
    best = min(means, key=lambda c: score(c, networks))
    print(f"all choose {said(best, preset)}: {np.exp(score(best, networks)):.3f}", flush=True)


def main():
    words = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    words.add_argument("--presets", nargs="+", default=list(FIELDS), choices=list(FIELDS))
    words.add_argument("--networks", nargs="+", default=list(NETWORKS), choices=list(NETWORKS))
    words.add_argument("--specs", nargs="+", type=float, default=None, help="sparsities; 2:4 goes along where all do")
    given = words.parse_args()
    layers = Layers(given.networks, given.specs or SPECS)
    for preset in given.presets:
        choose(layers, preset)


if __name__ == "__main__":
    main()
