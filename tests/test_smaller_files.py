"""Smaller networks in files: bit for bit, the same outputs, nothing unpickled; damage and other networks are errors."""

import json
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import pruneopt as po
from tests.test_files import bits
from tests.test_handover import halved_resnet, same

pytestmark = pytest.mark.default_flags

BATCH = jnp.asarray(np.random.default_rng(3).standard_normal((3, 4)), jnp.float32)


def mlp(params, x):
    x = jnp.tanh(x @ params["in"] + params["bias"] + params["shift"][params["steps"]])
    return x * params["sign"] @ params["out"].astype(jnp.float32)


def dense():
    rng = np.random.default_rng(4)
    return {
        "in": jnp.asarray(rng.standard_normal((4, 20)), jnp.float32),
        "bias": rng.standard_normal(20).astype(np.float32),
        "shift": jnp.asarray(rng.standard_normal((2, 20)), jnp.float32),
        "out": jnp.asarray(rng.standard_normal((20, 5)), jnp.bfloat16),
        "steps": jnp.asarray(1),
        "sign": jnp.asarray(rng.integers(1, 4, 20), jnp.int32),
    }


def abstract():
    return jax.tree.map(lambda x: jax.eval_shape(lambda: x) if isinstance(x, jax.Array) else x, dense())


def smaller():
    return po.shrink_units(mlp, dense(), BATCH, {("in", 1): np.arange(3, 14)})


@pytest.fixture
def file(tmp_path):
    po.save(smaller(), tmp_path / "f")
    return tmp_path / "f"


@pytest.mark.parametrize("like", [dense, abstract])
def test_a_round_trip_is_bit_for_bit(file, like):
    before, after = smaller(), po.load_smaller(file, mlp, like())
    assert jax.tree.structure(after.params) == jax.tree.structure(before.params)
    same(before.params, after.params)
    assert all(type(a) is type(b) for a, b in zip(*map(jax.tree.leaves, (before.params, after.params)), strict=True))
    assert repr(after) == repr(before)
    assert after.error == before.error
    assert after.kept.keys() == before.kept.keys() == {"in", "bias", "shift", "sign", "out"}
    for path, axes in before.kept.items():
        assert [k.tolist() for k in axes] == [k.tolist() for k in after.kept[path]]
    for batch in (BATCH, BATCH[:1]):
        assert bits(jax.jit(before.fn)(before.params, batch)) == bits(jax.jit(after.fn)(after.params, batch))
    same(before.expand(), after.expand())
    same(before.shrink_like(dense()), after.shrink_like(dense()))


def test_what_the_check_found_and_what_stayed_come_back(tmp_path):
    def fn(params, x):
        h = jax.nn.relu(x @ params["w"] + params["b"])
        return jnp.argmax(h @ params["v"], -1), h @ params["v"]

    rng = np.random.default_rng(8)
    params = {"w": rng.normal(size=(4, 6)), "b": rng.random(6) + 0.1, "v": rng.normal(size=(6, 3))}
    params = jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), params)
    masks = {name: np.ones(x.shape, bool) for name, x in params.items()}
    masks["w"][:, 2] = False
    before = po.shrink(fn, params, BATCH, masks)
    po.save(replace(before, flipped=3), tmp_path / "f")
    after = po.load_smaller(tmp_path / "f", fn, params)
    assert repr(after) == repr(replace(before, flipped=3))
    assert [(key, x.tolist()) for key, x in after.constant.items()] == [(("b", 0), [2])]


def test_zeros_inside_smaller_leaves_cost_a_bit(tmp_path):
    params = {"a": jnp.asarray(np.random.default_rng(5).standard_normal((64, 64)), jnp.float32), "b": jnp.ones((64, 4))}
    params["a"] = params["a"].at[0, 0].set(-0.0)
    masks = {"a": np.random.default_rng(6).random((64, 64)) < 0.1, "b": np.ones((64, 4), bool)}
    masks["a"][0, 0], masks["a"][:, 32:] = True, False
    small = po.shrink(lambda p, x: jnp.tanh(x @ p["a"]) @ p["b"], params, jnp.ones((2, 64)), masks)
    assert small.params["a"].shape == (64, 32)
    po.save(small, tmp_path / "f")
    kept = int((np.asarray(small.params["a"]).view(np.int32) != 0).sum())
    held = kept * 4 + 64 * 32 // 8 + small.params["b"].size * 4
    assert held <= (tmp_path / "f").stat().st_size <= held + 2048
    same(small.params, po.load_smaller(tmp_path / "f", small.fn, params).params)


@pytest.mark.slow
def test_a_file_without_a_cut_and_one_cut_to_nothing_come_back(tmp_path):
    for keep in (np.arange(20), np.arange(0)):
        small = po.shrink_units(mlp, dense(), BATCH, {("in", 1): keep})
        po.save(small, tmp_path / "f")
        after = po.load_smaller(tmp_path / "f", mlp, abstract())
        same(small.params, after.params)
        assert bits(small.fn(small.params, BATCH)) == bits(after.fn(after.params, BATCH))


@pytest.mark.parametrize("place", [9, 700, -1, -40])
def test_a_flipped_byte_is_an_error(file, place):
    data = bytearray(file.read_bytes())
    data[place] ^= 0x10
    file.write_bytes(data)
    with pytest.raises(ValueError, match=r"damaged|not written by|safetensors"):
        po.load_smaller(file, mlp, dense())


@pytest.mark.parametrize("keep", [0, 5, 100, -1])
def test_a_truncated_file_is_an_error(file, keep):
    file.write_bytes(file.read_bytes()[:keep])
    with pytest.raises(ValueError, match="damaged"):
        po.load_smaller(file, mlp, dense())


def test_other_files_and_networks_are_refused(file, tmp_path):
    with pytest.raises(FileNotFoundError):
        po.load_smaller(tmp_path / "none", mlp, dense())
    with pytest.raises(ValueError, match="holds a SmallerNetwork, not a Pruned; read it with load_smaller"):
        po.load(file, dense())
    po.save(po.prune(None, {"w": jnp.ones((4, 4))}, None, po.constraints.Cardinality(sparsity=0.5)), tmp_path / "p")
    with pytest.raises(ValueError, match="holds a Pruned, not a SmallerNetwork; read it with load"):
        po.load_smaller(tmp_path / "p", mlp, dense())
    po.save_weights({"w": jnp.ones(3)}, tmp_path / "w")
    with pytest.raises(ValueError, match=r"not written by pruneopt.save; .* weights with load_weights"):
        po.load_smaller(tmp_path / "w", mlp, dense())
    with pytest.raises(ValueError, match=r"'out' has shape \(20, 6\), the file has \(20, 5\)"):
        po.load_smaller(file, mlp, {**dense(), "out": jnp.ones((20, 6), jnp.bfloat16)})
    with pytest.raises(ValueError, match="lacks the array 'shift'"):
        po.load_smaller(file, mlp, {k: v for k, v in dense().items() if k != "shift"})
    other = po.load_smaller(file, lambda p, x: jnp.sort(mlp(p, x) @ p["out"].astype(jnp.float32).T), dense())
    with pytest.raises(ValueError, match=r"units of .*axis 1 of 'in'.* cannot be cut"):
        other.fn(other.params, BATCH)


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("check", "[]"),
        ("check", '["x"]'),
        ("check", "3"),
        ("check", '[0.0, "1"]'),
        ("constant", "[]"),
        ("constant", '{"0:none": [0]}'),
        ("constant", '{"1:in": [20]}'),
        ("constant", '{"1:in": [1.5]}'),
        ("constant", '{"x:in": []}'),
        ("dense", "{}"),
        ("dense", "["),
        ("dense", None),
        ("leaves", "{}"),
        ("leaves", "["),
    ],
)
def test_a_hostile_description_is_an_error(file, tmp_path, text, value):
    from pruneopt import _store

    tensors, texts = _store.read_tensors(file)
    shapes = json.loads(texts["dense"]) | {"in": [4, 21]}
    _store.write_tensors(tmp_path / "g", tensors, texts | {text: json.dumps(shapes) if value is None else value})
    with pytest.raises(ValueError, match="damaged"):
        po.load_smaller(tmp_path / "g", mlp, dense())


@pytest.mark.parametrize("name", ["lost:7:in", "lost:x:in", "lost:1:none", "lost:in", "lost:0:in", "array:none"])
def test_a_hostile_array_is_an_error(file, tmp_path, name):
    from pruneopt import _store

    tensors, texts = _store.read_tensors(file)
    _store.write_tensors(tmp_path / "g", tensors | {name: np.full(1, 255, np.uint8)}, texts)
    with pytest.raises(ValueError, match="damaged"):
        po.load_smaller(tmp_path / "g", mlp, dense())


@pytest.mark.slow
def test_half_a_resnet_comes_back(tmp_path, folder, optimised):
    small, images = halved_resnet(folder)
    po.save(small, tmp_path / "f")
    from paper_reproductions.networks import resnet20

    like = jax.eval_shape(lambda: resnet20.load_chita(folder))
    after = po.load_smaller(tmp_path / "f", resnet20.forward, like)
    same(small.params, after.params)
    assert bits(jax.jit(small.fn)(small.params, images)) == bits(jax.jit(after.fn)(after.params, images))
