"""Cut heads and neurons of a small language model out of arrays and program: perplexity, FLOPs, measured time.

    python examples/shrink_transformer.py          # stories260K; reads llm/ and text/ in the folder $PRUNEOPT_DATA
    python examples/shrink_transformer.py --toy    # random weights and tokens: to see that it runs

A key/value head goes with the query heads that it serves, a neuron with its gate. What counts is how much of a unit
reaches the residual stream on calibration text: the mean square of its activation times the norms of its output rows.
"""

import argparse
import os
import sys
from pathlib import Path

import jax.numpy as jnp
import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1]))
import pruneopt as po
from paper_reproductions.networks import decoder, stories

parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
parser.add_argument("--heads", type=int, default=3, help="key/value heads that each layer keeps, of 4")
parser.add_argument("--neurons", type=int, default=128, help="that each layer keeps, of 172; a multiple of 8")
parser.add_argument("--repeats", type=int, default=20, help="turns of each program behind the medians")
parser.add_argument("--toy", action="store_true", help="random weights, few tokens: to see that it runs")
args = parser.parse_args()
rng, head = np.random.default_rng(0), stories.forward.head


def random_network():
    """Parameters of the shapes that stories260K has."""
    shapes = {"wq": (64, 64), "wk": (64, 32), "wv": (64, 32), "wo": (64, 64)}
    shapes |= {"w1": (64, 172), "w3": (64, 172), "w2": (172, 64)}
    draw = lambda *shape: jnp.asarray(rng.normal(0, 0.1, shape), jnp.float32)  # noqa: E731
    norms = {"norm_attn": jnp.ones(64), "norm_ffn": jnp.ones(64)}
    layers = {str(i): norms | {name: draw(*shape) for name, shape in shapes.items()} for i in range(5)}
    return {"embedding": draw(512, 64), "layers": layers, "norm_final": jnp.ones(64)}


if args.toy:
    params, sizes, repeats = random_network(), (1, 2), 2
    test = calibration = [rng.integers(0, 512, (2, 24)).astype(np.int32)]
else:
    folder, sizes, repeats = os.environ["PRUNEOPT_DATA"], (1, 8), args.repeats
    params, _ = stories.load(folder)
    test = stories.batches(stories.windows(folder)[:16])
    calibration = stories.batches(stories.windows(folder, start=1200 * 40, count=16))

# The mean square of every input of wo (heads x width) and w2 (neurons), over all positions of the calibration text.
found = po.structure.capture(stories.forward, params, calibration, leaves=["layers/*/wo", "layers/*/w2"])
kept = {}
for i, layer in params["layers"].items():
    reach = {
        name: np.asarray(jnp.diagonal(found[f"layers/{i}/{name}"].gram[0])) * np.sum(np.square(layer[name]), axis=1)
        for name in ("wo", "w2")
    }
    groups = reach["wo"].reshape(layer["wk"].shape[1] // head, -1).sum(axis=1)  # of a key/value head's query heads
    best = np.sort(np.argsort(-groups)[: args.heads])
    kept[f"layers/{i}/wk", 1] = (head * best[:, None] + np.arange(head)).ravel()
    kept[f"layers/{i}/w1", 1] = np.sort(np.argsort(-reach["w2"])[: args.neurons])

small = po.shrink_units(stories.forward, params, test[0], kept)
print(small)
print(po.structure.trace(stories.forward, params, test[0]).explain("layers/0/wk"))
print(po.report(stories.forward, params, small, test[0], sizes=sizes, repeats=repeats))
dense, cut = decoder.perplexity(stories.forward, params, test), decoder.perplexity(small.fn, small.params, test)
print(f"perplexity: dense {dense:.2f}, cut {cut:.2f}, without retraining")
