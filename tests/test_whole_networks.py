"""Trained public networks pruned layer by layer, through the public API alone."""

import jax
import numpy as np
import pytest

import pruneopt as po
from paper_reproductions.networks import minilm, resnet20, stories
from pruneopt.constraints import NM, Cardinality

pytestmark = [pytest.mark.slow, pytest.mark.default_flags, pytest.mark.usefixtures("optimised")]


@pytest.mark.parametrize("name", ["chita", "akamaster"])
def test_resnet20_at_half_of_its_weights(folder, name):
    """Magnitude leaves 77 % (chita) and 87 % (akamaster) at one budget a layer; dense 90.7 % and 91.5 %."""
    params = getattr(resnet20, f"load_{name}")(folder)
    images, labels = resnet20.cifar10(folder, "test1k", *getattr(resnet20, name.upper()))
    train, _ = resnet20.cifar10(folder, "train20k", *getattr(resnet20, name.upper()))
    forward = jax.jit(resnet20.forward)

    def accuracy(pruned):
        return float(np.mean(np.argmax(forward(pruned.params, images), -1) == labels))

    half = Cardinality(sparsity=0.5)
    words = {"leaves": ["*kernel"], "progress": False}
    layers = po.prune(resnet20.forward, params, [train[:128], train[128:192]], half, method="wanda_refit", **words)
    assert len(layers.history[0]["layers"]) == len(layers.solutions) == (22 if name == "chita" else 20)
    weights = po.prune(None, params, None, Cardinality(sparsity=0.5, per="leaf"), **words)
    assert accuracy(layers) > accuracy(weights) + 0.005
    assert accuracy(layers) > 0.87


def test_stories_scanned_and_unrolled_are_pruned_alike(folder):
    params, _ = stories.load(folder)
    batches = [b[:, :128] for b in stories.batches(stories.windows(folder, 60000, 8))]
    words = {"method": "wanda", "progress": False, "leaves": ["layers/*w*"]}
    one = po.prune(stories.forward, params, batches, NM(2, 4), **words)
    other = po.prune(stories.forward_scanned, stories.stacked(params), batches, NM(2, 4), **words)
    assert one.kept == other.kept == sum(w.size for p, w in flat(params).items() if "/w" in p) // 2
    stacked = stories.stacked(jax.tree.map(np.asarray, one.params))["layers"]
    for name in ("wq", "wk", "wv", "wo", "w1", "w2", "w3"):
        different = np.mean((np.asarray(stacked[name]) != 0) != (np.asarray(other.params["layers"][name]) != 0))
        assert different < 0.005, name  # ties in rounding


def test_minilm_keeps_its_embeddings(folder):
    try:
        where = minilm.locate()
    except FileNotFoundError as error:
        pytest.skip(str(error))
    params, vocab = minilm.load(where), minilm.vocabulary(where)
    lines = [line for line in minilm.wikitext(folder, "valid") if len(line) > 200]
    ids, mask = minilm.tokenize(lines[:48], vocab, 64)
    batches = [{"ids": ids[i : i + 16], "mask": mask[i : i + 16]} for i in (0, 16)]
    test = {"ids": ids[32:], "mask": mask[32:]}
    embed = jax.jit(minilm.embed)
    dense = embed(params, test)

    def cosine(pruned):
        return float(np.mean(np.sum(np.asarray(embed(pruned.params, test) * dense), axis=1)))

    words = {"leaves": ["layers/*/kernel"], "progress": False}
    weights = {"weights": lambda batch: batch["mask"]}
    layers = po.plans.layerwise(minilm.hidden, params, batches, NM(2, 4), "wanda", **words, **weights)
    assert len(layers.solutions) == 36
    assert cosine(layers) > cosine(po.prune(None, params, None, NM(2, 4), **words)) + 0.05


def flat(params):
    named = jax.tree_util.tree_leaves_with_path(params)
    return {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in named}
