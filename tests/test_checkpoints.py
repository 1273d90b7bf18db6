"""Decoder checkpoints in safetensors: tiny random ones against a forward pass by hand in NumPy; bad folders."""

import gzip
import json
import math

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import save_file

import pruneopt as po
from paper_reproductions.networks import checkpoint, decoder, llama

pytestmark = pytest.mark.default_flags


@pytest.fixture(autouse=True)
def double():
    with jax.enable_x64(True):
        yield


LLAMA = {
    "model_type": "llama",
    "vocab_size": 23,
    "hidden_size": 12,
    "intermediate_size": 10,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 6,
    "rms_norm_eps": 1e-3,
    "rope_theta": 50.0,
    "bos_token_id": 1,
}
OPT = {
    "model_type": "opt",
    "vocab_size": 23,
    "hidden_size": 12,
    "word_embed_proj_dim": 12,
    "ffn_dim": 10,
    "num_hidden_layers": 2,
    "num_attention_heads": 3,
    "max_position_embeddings": 9,
    "do_layer_norm_before": True,
    "bos_token_id": 2,
}
STRETCHED = {
    "rope_type": "llama3",
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
VARIANTS = {
    "llama": LLAMA,
    "llama, tied": LLAMA | {"tie_word_embeddings": True, "num_key_value_heads": 4},
    "llama, one group": LLAMA
    | {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": None, "rope_scaling": STRETCHED},
    "llama, linear": LLAMA | {"rope_scaling": {"type": "linear", "factor": 2.5}},
    "opt": OPT,
    "opt, norms last, narrow": OPT | {"do_layer_norm_before": False, "word_embed_proj_dim": 5},
    "opt, no last norm": OPT | {"_remove_final_layer_norm": True},
}
IDS = np.random.default_rng(1).integers(0, 23, (2, 7))


def shapes(c):
    """{name: shape} as such checkpoints are stored."""
    width, words = c["hidden_size"], c["vocab_size"]
    if c["model_type"] == "llama":
        head = c["head_dim"] or width // c["num_attention_heads"]
        heads, groups, hidden = c["num_attention_heads"] * head, c["num_key_value_heads"] * head, c["intermediate_size"]
        found = {"model.embed_tokens.weight": (words, width), "model.norm.weight": (width,)}
        if not c.get("tie_word_embeddings"):
            found["lm_head.weight"] = (words, width)
        for i in range(c["num_hidden_layers"]):
            parts = {"self_attn.q_proj": (heads, width), "self_attn.k_proj": (groups, width)}
            parts |= {"self_attn.v_proj": (groups, width), "self_attn.o_proj": (width, heads)}
            parts |= {
                "mlp.gate_proj": (hidden, width),
                "mlp.up_proj": (hidden, width),
                "mlp.down_proj": (width, hidden),
            }
            parts |= {"input_layernorm": (width,), "post_attention_layernorm": (width,)}
            found |= {f"model.layers.{i}.{name}.weight": shape for name, shape in parts.items()}
        return found
    narrow, first = c["word_embed_proj_dim"], "model.decoder"
    found = {f"{first}.embed_tokens.weight": (words, narrow)}
    found[f"{first}.embed_positions.weight"] = (c["max_position_embeddings"] + 2, width)
    if narrow != width:
        found |= {f"{first}.project_in.weight": (width, narrow), f"{first}.project_out.weight": (narrow, width)}
    layers = {f"{first}.layers.{i}": {} for i in range(c["num_hidden_layers"])}
    for name in layers:
        for part in ("q_proj", "k_proj", "v_proj", "out_proj"):
            found |= {f"{name}.self_attn.{part}.weight": (width, width), f"{name}.self_attn.{part}.bias": (width,)}
        found |= {f"{name}.fc1.weight": (c["ffn_dim"], width), f"{name}.fc1.bias": (c["ffn_dim"],)}
        found |= {f"{name}.fc2.weight": (width, c["ffn_dim"]), f"{name}.fc2.bias": (width,)}
        for norm in ("self_attn_layer_norm", "final_layer_norm"):
            found |= {f"{name}.{norm}.weight": (width,), f"{name}.{norm}.bias": (width,)}
    if c["do_layer_norm_before"] and not c.get("_remove_final_layer_norm"):
        found |= {f"{first}.final_layer_norm.weight": (width,), f"{first}.final_layer_norm.bias": (width,)}
    return found


def write(folder, config, dtype=np.float32, shards=1, **changes):
    """The folder's arrays by their stored names, random, norms near one; written to `shards` files."""
    rng = np.random.default_rng(0)
    arrays = {
        name: (rng.standard_normal(shape) * 0.4 + ("norm" in name and name.endswith("weight"))).astype(dtype)
        for name, shape in shapes(config).items()
    } | changes
    (folder / "config.json").write_text(json.dumps(config))
    if shards == 1:
        save_file(arrays, folder / "model.safetensors")
        return arrays
    where = {name: f"model-{i % shards + 1:05}-of-{shards:05}.safetensors" for i, name in enumerate(arrays)}
    for shard in set(where.values()):
        save_file({name: arrays[name] for name in arrays if where[name] == shard}, folder / shard)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": where}))
    return arrays


# ------------------------------------------------------------------------------------- by hand, one token at a time


def softmax(x):
    e = np.exp(x - x.max())
    return e / e.sum()


def attend(q, k, v):
    """One head: q, k, v (T, d)."""
    rows = [softmax(q[t] @ k[: t + 1].T / math.sqrt(q.shape[1])) @ v[: t + 1] for t in range(len(q))]
    return np.stack(rows)


def turned(x, c):
    """Rotary embedding of one head (T, d), entry j and j + d/2 as one complex number."""
    d = x.shape[1]
    found = np.empty_like(x)
    for t in range(len(x)):
        for j in range(d // 2):
            f, rope = c["rope_theta"] ** (-2 * j / d), c.get("rope_scaling", {})
            if rope.get("type") == "linear":
                f /= rope["factor"]
            elif rope:
                length, turns = rope["original_max_position_embeddings"], 2 * math.pi / f
                if turns > length / rope["low_freq_factor"]:
                    f /= rope["factor"]
                elif turns > length / rope["high_freq_factor"]:
                    s = (length / turns - rope["low_freq_factor"]) / (
                        rope["high_freq_factor"] - rope["low_freq_factor"]
                    )
                    f = (1 - s) * f / rope["factor"] + s * f
            z = (x[t, j] + 1j * x[t, j + d // 2]) * np.exp(1j * t * f)
            found[t, j], found[t, j + d // 2] = z.real, z.imag
    return found


def llama_by_hand(a, c, ids):
    def rms(x, scale):
        return x / np.sqrt(np.mean(x**2, axis=1, keepdims=True) + c["rms_norm_eps"]) * scale

    x = a["model.embed_tokens.weight"][ids]  # (T, width)
    for i in range(c["num_hidden_layers"]):
        w = {
            name.split(f"layers.{i}.")[-1].removesuffix(".weight"): v for name, v in a.items() if f"layers.{i}." in name
        }
        h, out = rms(x, w["input_layernorm"]), []
        head = w["self_attn.q_proj"].shape[0] // c["num_attention_heads"]
        for n in range(c["num_attention_heads"]):
            g = n // (c["num_attention_heads"] // c["num_key_value_heads"])
            q = h @ w["self_attn.q_proj"][n * head : (n + 1) * head].T
            k, v = (h @ w[f"self_attn.{p}_proj"][g * head : (g + 1) * head].T for p in "kv")
            out.append(attend(turned(q, c), turned(k, c), v))
        x = x + np.concatenate(out, axis=1) @ w["self_attn.o_proj"].T
        h = rms(x, w["post_attention_layernorm"])
        gate = h @ w["mlp.gate_proj"].T
        x = x + (gate / (1 + np.exp(-gate)) * (h @ w["mlp.up_proj"].T)) @ w["mlp.down_proj"].T
    last = "model.embed_tokens.weight" if c.get("tie_word_embeddings") else "lm_head.weight"
    return rms(x, a["model.norm.weight"]) @ a[last].T


def opt_by_hand(a, c, ids):
    a = {name.removeprefix("model.decoder."): x for name, x in a.items()}

    def linear(name, x):
        return x @ a[f"{name}.weight"].T + a[f"{name}.bias"]

    def norm(name, x):
        scaled = (x - x.mean(1, keepdims=True)) / np.sqrt(x.var(1, keepdims=True) + 1e-5)
        return scaled * a[f"{name}.weight"] + a[f"{name}.bias"]

    def sublayer(name, x, f):
        return x + f(norm(name, x)) if c["do_layer_norm_before"] else norm(name, x + f(x))

    x = a["embed_tokens.weight"][ids]
    if "project_in.weight" in a:
        x = x @ a["project_in.weight"].T
    x = x + a["embed_positions.weight"][2 : 2 + len(ids)]
    for i in range(c["num_hidden_layers"]):

        def attention(h, at=f"layers.{i}.self_attn"):
            head = c["hidden_size"] // c["num_attention_heads"]
            q, k, v = (linear(f"{at}.{p}_proj", h) for p in "qkv")
            heads = [slice(n * head, (n + 1) * head) for n in range(c["num_attention_heads"])]
            return linear(f"{at}.out_proj", np.concatenate([attend(q[:, s], k[:, s], v[:, s]) for s in heads], axis=1))

        def feed_forward(h, at=f"layers.{i}"):
            return linear(f"{at}.fc2", np.maximum(linear(f"{at}.fc1", h), 0))

        x = sublayer(f"layers.{i}.self_attn_layer_norm", x, attention)
        x = sublayer(f"layers.{i}.final_layer_norm", x, feed_forward)
    if "final_layer_norm.weight" in a:
        x = norm("final_layer_norm", x)
    if "project_out.weight" in a:
        x = x @ a["project_out.weight"].T
    return x @ a["embed_tokens.weight"].T


def by_hand(arrays, config, ids):
    arrays = {name: np.asarray(x, np.float64) for name, x in arrays.items()}
    run = llama_by_hand if config["model_type"] == "llama" else opt_by_hand
    return np.stack([run(arrays, config, row) for row in ids])


@pytest.mark.parametrize("name", VARIANTS)
def test_logits_are_those_by_hand(tmp_path, name):
    config = VARIANTS[name]
    arrays = write(tmp_path, config)
    found = decoder.load(tmp_path, jnp.float64)
    expected = by_hand(arrays, config, IDS)
    np.testing.assert_allclose(jax.jit(found.forward)(found.params, IDS), expected, rtol=0, atol=1e-10)
    assert np.abs(expected).max() > 1
    count = sum(int(np.prod(s)) for s in shapes(config).values())
    assert sum(leaf.size for leaf in jax.tree.leaves(found.params)) == count


@pytest.mark.parametrize("config", [LLAMA, OPT], ids=["llama", "opt"])
def test_every_projection_is_read_and_nothing_else_is_chosen(tmp_path, config):
    write(tmp_path, config)
    found = decoder.load(tmp_path, jnp.float64)
    grams = po.structure.capture(found.forward, found.params, [IDS], leaves=found.projections)
    projections = 7 if config is LLAMA else 6
    assert len(grams) == projections * config["num_hidden_layers"]
    assert not [name for name in grams if "embed" in name or "norm" in name or "bias" in name]


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16], ids=["float16", "bfloat16"])
def test_shards_and_half_precision(tmp_path, dtype):
    arrays = write(tmp_path, LLAMA, dtype, shards=3)
    assert len(list(tmp_path.glob("*.safetensors"))) == 3
    found = decoder.load(tmp_path)
    assert {leaf.dtype for leaf in jax.tree.leaves(found.params)} == {np.dtype(np.float32)}
    np.testing.assert_allclose(
        jax.jit(found.forward)(found.params, IDS), by_hand(arrays, LLAMA, IDS), rtol=0, atol=1e-4
    )


def test_a_tied_copy_and_old_buffers_are_passed_over(tmp_path):
    config = VARIANTS["llama, tied"]
    extra = {"lm_head.weight": np.zeros((23, 12), np.float32)}
    extra |= {f"model.layers.{i}.self_attn.rotary_emb.inv_freq": np.ones(3, np.float32) for i in range(2)}
    arrays = write(tmp_path, config, **extra)
    found = decoder.load(tmp_path, jnp.float64)
    np.testing.assert_allclose(
        jax.jit(found.forward)(found.params, IDS), by_hand(arrays, config, IDS), rtol=0, atol=1e-10
    )


def test_forward_of_fewer_heads_and_units(tmp_path):
    write(tmp_path, LLAMA)
    found = decoder.load(tmp_path, jnp.float64)
    layer = found.params["layers"]["0"]
    cut = dict(layer, wq=layer["wq"][:, :12], wk=layer["wk"][:, :6], wv=layer["wv"][:, :6], wo=layer["wo"][:12])
    masked = dict(layer, wo=layer["wo"].at[12:].set(0.0))
    small, same = ({**found.params, "layers": {**found.params["layers"], "0": part}} for part in (cut, masked))
    forward = jax.jit(found.forward)
    np.testing.assert_allclose(forward(small, IDS), forward(same, IDS), rtol=0, atol=1e-12)


# ------------------------------------------------------------------------------------------------------- perplexity


def test_perplexity_reads_contiguous_segments_each_by_itself(tmp_path):
    arrays = write(tmp_path, OPT)
    found = decoder.load(tmp_path)
    ids = np.random.default_rng(2).integers(0, 23, 30).astype(np.int32)
    parts = decoder.segments(ids, 8)
    np.testing.assert_array_equal(parts, [ids[:8], ids[8:16], ids[16:24]])
    losses = []
    for segment in parts:
        logits = by_hand(arrays, OPT, segment[None, :-1])[0]
        losses += [-np.log(softmax(row)[word]) for row, word in zip(logits, segment[1:], strict=True)]
    measured = decoder.perplexity(found.forward, found.params, [parts[:2], parts[2:]])
    assert measured == pytest.approx(math.exp(np.mean(losses)), rel=1e-5)


def test_calibration_segments_start_anywhere():
    parts = decoder.sampled(np.arange(100), 200, 30, seed=1)
    assert parts.shape == (200, 30)
    assert {0, 70} <= set(parts[:, 0].tolist()) <= set(range(71))
    np.testing.assert_array_equal(np.diff(parts, axis=1), 1)
    np.testing.assert_array_equal(parts, decoder.sampled(np.arange(100), 200, 30, seed=1))


def test_text_is_joined_as_the_rows_of_wikitext():
    assert decoder.joined(" \n = A = \n \n b c \n") == "\n\n = A = \n\n\n\n\n b c \n"


def test_ids_come_from_npy_or_a_tokenizer(tmp_path):
    write(tmp_path, OPT)
    np.save(tmp_path / "ids.npy", np.arange(5)[None])
    np.testing.assert_array_equal(decoder.token_ids(tmp_path, tmp_path / "ids.npy"), np.arange(5, dtype=np.int32))
    tokenizers = pytest.importorskip("tokenizers")
    (tmp_path / "a.txt").write_text("ab\n")
    with pytest.raises(FileNotFoundError, match=r"neither tokenizer\.json nor vocab\.json"):
        decoder.token_ids(tmp_path, tmp_path / "a.txt")
    vocabulary = {"a": 0, "b": 1, "ab": 2, "Ċ": 3}
    (tmp_path / "vocab.json").write_text(json.dumps(vocabulary))
    (tmp_path / "merges.txt").write_text("#version: 0.2\na b\n")
    assert decoder.token_ids(tmp_path, tmp_path / "a.txt").tolist() == [2, 2, 3]  # bos is 2 here
    tokenizers.ByteLevelBPETokenizer(vocabulary, [("a", "b")]).save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "vocab.json").unlink()
    assert decoder.token_ids(tmp_path, tmp_path / "a.txt").tolist() == [2, 2, 3]
    shard = tmp_path / "c4.json.gz"
    shard.write_bytes(gzip.compress(b"".join(b'{"text": "%s"}\n' % t for t in (b"a", b"aaaaa", b"bbbbbb", b"ba"))))
    parts = decoder.calibration(tmp_path, shard, 2, 4)
    assert {tuple(set(p[p != 2].tolist())) for p in parts} == {(0,), (1,)}  # each from a document of its own
    with pytest.raises(ValueError, match="has 2 documents longer than 4 tokens, not 3"):
        decoder.calibration(tmp_path, shard, 3, 4)


# -------------------------------------------------------------------------------------------------------- bad input


def test_pickles_are_refused(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(LLAMA))
    (tmp_path / "pytorch_model.bin").write_bytes(b"\x80\x02}q\x00.")
    with pytest.raises(FileNotFoundError, match=r"pickled checkpoints .* are not read"):
        decoder.load(tmp_path)


def test_a_folder_without_config(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"config\.json not found; pass a folder"):
        decoder.load(tmp_path)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"model_type": "bert"}, "families known here are llama, opt"),
        ({"hidden_size": 16}, r"'embed_tokens.weight' has shape \(23, 12\), but config.json says \(23, 16\)"),
        ({"num_hidden_layers": 3}, "no 'layers.2.input_layernorm.weight'"),
        ({"num_hidden_layers": 1}, "no place for"),
        ({"hidden_act": "gelu"}, "'gelu'"),
        ({"rope_scaling": {"type": "yarn", "factor": 2.0}}, "'yarn' is unknown here; it is one of default"),
    ],
)
def test_what_config_and_arrays_disagree_on(tmp_path, change, words):
    write(tmp_path, LLAMA)
    (tmp_path / "config.json").write_text(json.dumps(LLAMA | change))
    with pytest.raises(ValueError, match=words):
        decoder.load(tmp_path)


def test_opt_of_another_architecture(tmp_path):
    write(tmp_path, OPT)
    for change in ({"activation_function": "gelu"}, {"enable_bias": False}):
        (tmp_path / "config.json").write_text(json.dumps(OPT | change))
        with pytest.raises(ValueError, match="activation_function 'relu' and enable_bias true"):
            decoder.load(tmp_path)


def test_shards_that_are_missing_outside_or_damaged(tmp_path):
    write(tmp_path, LLAMA, shards=2)
    shard = tmp_path / "model-00002-of-00002.safetensors"
    whole = shard.read_bytes()
    shard.write_bytes(whole[:100])
    with pytest.raises(ValueError, match=r"00002-of-00002\.safetensors is damaged"):
        decoder.load(tmp_path)
    shard.unlink()
    with pytest.raises(FileNotFoundError, match=r"00002-of-00002\.safetensors not found, but .* names it"):
        decoder.load(tmp_path)
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"a": "../a.safetensors"}}))
    with pytest.raises(ValueError, match="not in its folder"):
        checkpoint.Tensors(tmp_path)
    index.unlink()
    (tmp_path / "model.safetensors").write_bytes(b"no header")
    with pytest.raises(ValueError, match=r"model\.safetensors is damaged"):
        checkpoint.Tensors(tmp_path)


def test_texts_shorter_than_a_segment():
    for cut in (lambda ids: decoder.segments(ids, 8), lambda ids: decoder.sampled(ids, 2, 8)):
        with pytest.raises(ValueError, match="the text has 7 tokens, fewer than one segment of 8"):
            cut(np.arange(7))


def test_stretched_frequencies_between_kept_and_divided():
    plain, stretched = llama.Llama(128, theta=5e5), llama.Llama(128, theta=5e5, stretch=(8.0, 1.0, 4.0, 8192.0))
    ratio = plain.frequencies() / stretched.frequencies()
    assert ratio[0] == 1
    assert ratio[-1] == pytest.approx(8)
    assert np.all(np.diff(ratio) >= -1e-12)
