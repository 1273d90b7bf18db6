"""Llama-architecture decoders in GGUF files: what the format's own library writes comes back as arrays and logits."""

import jax.numpy as jnp
import numpy as np
import pytest

from paper_reproductions.networks import decoder, llama

pytestmark = pytest.mark.default_flags
RNG = np.random.default_rng(0)
WIDTH, HIDDEN, HEADS, GROUPS, WORDS = 16, 24, 4, 2, 9


def normal(*shape):
    return RNG.standard_normal(shape).astype(np.float32) / 4


def made():
    """The parameters of one layer, (in, out) as `llama.load` has them."""
    head = WIDTH // HEADS
    layer = {"norm_attn": 1 + normal(WIDTH), "norm_ffn": 1 + normal(WIDTH), "wo": normal(WIDTH, WIDTH)}
    layer |= {"wq": normal(WIDTH, WIDTH), **{n: normal(WIDTH, GROUPS * head) for n in ("wk", "wv")}}
    layer |= {"w1": normal(WIDTH, HIDDEN), "w2": normal(HIDDEN, WIDTH), "w3": normal(WIDTH, HIDDEN)}
    return {"embedding": normal(WORDS, WIDTH), "layers": {"0": layer}, "norm_final": 1 + normal(WIDTH)}


def pairs(w, heads):
    """Rows of (out, in) as the format has them: the two halves of each head interleaved."""
    first, second = np.split(w.T.reshape(heads, -1, w.shape[0]), 2, axis=1)
    return np.ascontiguousarray(np.stack([first, second], axis=2).reshape(w.shape[1], w.shape[0]))


def written(path, params, architecture="llama", extra=()):
    gguf = pytest.importorskip("gguf", reason="pip install gguf")
    writer, layer = gguf.GGUFWriter(path, architecture), params["layers"]["0"]
    writer.add_block_count(1)
    writer.add_embedding_length(WIDTH)
    writer.add_context_length(77)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(GROUPS)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(500.0)
    tensors = {"token_embd": params["embedding"], "output_norm": params["norm_final"]}
    tensors |= {"blk.0.attn_q": pairs(layer["wq"], HEADS), "blk.0.attn_k": pairs(layer["wk"], GROUPS)}
    names = {"attn_v": "wv", "attn_output": "wo", "ffn_gate": "w1", "ffn_down": "w2", "ffn_up": "w3"}
    tensors |= {f"blk.0.{theirs}": np.ascontiguousarray(layer[ours].T) for theirs, ours in names.items()}
    tensors |= {"blk.0.attn_norm": layer["norm_attn"], "blk.0.ffn_norm": layer["norm_ffn"]}
    for name, array in [*tensors.items(), *extra]:
        writer.add_tensor(f"{name}.weight", array)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def test_arrays_and_logits_come_back(tmp_path):
    params, path = made(), tmp_path / "small.gguf"
    written(path, params)
    network = decoder.load(path)
    for name, array in params["layers"]["0"].items():
        np.testing.assert_array_equal(network.params["layers"]["0"][name], array)
    tokens = jnp.asarray(RNG.integers(0, WORDS, (2, 7)))
    expected = llama.Llama(WIDTH // HEADS, 1e-5, 500.0)(params, tokens)
    np.testing.assert_allclose(network.forward(network.params, tokens), expected, rtol=1e-5, atol=1e-5)
    assert decoder.positions(path) == 77


def test_what_has_no_place_is_refused(tmp_path):
    path = tmp_path / "other.gguf"
    written(path, made(), architecture="gpt2")
    with pytest.raises(ValueError, match="of the architecture 'gpt2', not 'llama'"):
        decoder.load(path)
    path = tmp_path / "more.gguf"
    written(path, made(), extra=[("blk.0.rope_freqs", normal(4))])
    with pytest.raises(ValueError, match=r"no place for: \['blk.0.rope_freqs.weight'\]"):
        decoder.load(path)
