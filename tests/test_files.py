"""Save and load: bit for bit, any pytree, nothing unpickled, damage is an error."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import pruneopt as po
from pruneopt.constraints import Cardinality

pytestmark = pytest.mark.default_flags


def network():
    rng = np.random.default_rng(0)
    return {
        "conv": {"kernel": jnp.asarray(rng.standard_normal((3, 3, 2, 5)), jnp.float32), "bias": jnp.ones(5)},
        "half": jnp.asarray(rng.standard_normal((7, 9)), jnp.bfloat16),
        "numpy": rng.standard_normal((4, 6)).astype(np.float16),
        "steps": jnp.asarray(7),
        "flags": np.array([True, False]),
        "key": jax.random.key(3),
        "activation": jax.nn.relu,
        "rate": 0.1,
        "empty": jnp.zeros((0, 3)),
        "layers": [jnp.asarray(rng.standard_normal((2, 2)), jnp.float32), None],
    }


def pruned():
    choice = ["conv/kernel", "half", "numpy", "layers/0"]
    return po.prune(None, network(), None, Cardinality(sparsity=0.7, floor=1), leaves=choice, progress=False)


def bits(leaf):
    if isinstance(leaf, jax.Array) and jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
        leaf = jax.random.key_data(leaf)
    return (str(leaf.dtype), leaf.shape, np.asarray(leaf).tobytes()) if hasattr(leaf, "dtype") else leaf


def test_a_round_trip_is_bit_for_bit(tmp_path):
    before = pruned()
    file = tmp_path / "net.safetensors"
    po.save(before, file)
    after = po.load(file, like=network())
    assert jax.tree.structure(after.params) == jax.tree.structure(before.params)
    for old, new in zip(jax.tree.leaves(before.params), jax.tree.leaves(after.params), strict=True):
        assert bits(old) == bits(new)
        assert type(old) is type(new)
    jax.tree.map(np.testing.assert_array_equal, before.support, after.support)
    assert jax.tree.structure(after.support) == jax.tree.structure(before.support)
    assert after.history == json.loads(json.dumps(before.history))
    assert [p.name for p in tmp_path.iterdir()] == ["net.safetensors"]


def test_the_file_is_as_small_as_promised(tmp_path):
    before = po.prune(None, {"w": jnp.asarray(np.random.default_rng(0).standard_normal((400, 500)), jnp.float32)}, None,
                      Cardinality(sparsity=0.9), progress=False)  # fmt: skip
    po.save(before, tmp_path / "f")
    promised = po.report({"w": jnp.zeros((400, 500))}, before).bytes_stored
    assert promised == 20_000 * 4 + 200_000 // 8
    assert promised <= (tmp_path / "f").stat().st_size <= promised + 4096


@pytest.mark.parametrize("place", [9, 700, -1, -400])
def test_a_flipped_byte_is_an_error(tmp_path, place):
    file = tmp_path / "net.safetensors"
    po.save(pruned(), file)
    data = bytearray(file.read_bytes())
    data[place] ^= 0x10
    file.write_bytes(data)
    with pytest.raises(ValueError, match=r"damaged|not written by|safetensors"):
        po.load(file, like=network())


@pytest.mark.parametrize("keep", [0, 5, 100, -1])
def test_a_truncated_file_is_an_error(tmp_path, keep):
    file = tmp_path / "net.safetensors"
    po.save(pruned(), file)
    file.write_bytes(file.read_bytes()[:keep])
    with pytest.raises(ValueError, match="damaged"):
        po.load(file, like=network())


def test_other_files_and_trees_are_refused(tmp_path):
    file = tmp_path / "net.safetensors"
    with pytest.raises(FileNotFoundError):
        po.load(file, like=network())
    save_file({"w": np.ones(3)}, file)
    with pytest.raises(ValueError, match="not written by pruneopt"):
        po.load(file, like=network())
    po.save(pruned(), file)
    without = {k: v for k, v in network().items() if k != "half"}
    with pytest.raises(ValueError, match="'half'"):
        po.load(file, like=without)
    with pytest.raises(ValueError, match=r"'half' has shape \(2, 2\)"):
        po.load(file, like={**network(), "half": jnp.ones((2, 2), jnp.bfloat16)})
    with pytest.raises(TypeError, match="pass what prune returned"):
        po.save(network(), file)


def test_a_tampered_history_or_description_is_an_error(tmp_path):
    file = tmp_path / "net.safetensors"
    po.save(pruned(), file)
    from safetensors import safe_open

    with safe_open(file, framework="numpy") as archive:
        metadata = archive.metadata()
    for key, value in (("leaves", "{"), ("leaves", "{}"), ("history", "[")):
        save_file(load_file(file), tmp_path / "bad", metadata={**metadata, key: value})
        with pytest.raises(ValueError, match="damaged"):
            po.load(tmp_path / "bad", like=network())


@pytest.mark.parametrize("suffix", ["safetensors", "npz"])
def test_masks_of_another_tool_come_back_in(tmp_path, suffix):
    params = {"a": jnp.arange(1.0, 7).reshape(2, 3), "b": jnp.ones(3)}
    masks = {"a": np.array([[1, 0, 1], [0, 0, 1]], np.float32)}
    file = tmp_path / f"masks.{suffix}"
    save_file(masks, file) if suffix == "safetensors" else np.savez(file, **masks)
    got = po.from_masks(params, po.load_masks(file))
    np.testing.assert_array_equal(got.params["a"], params["a"] * masks["a"])
    assert got.params["b"] is params["b"]
    assert got.kept == 3


def test_a_pickle_is_never_opened(tmp_path):
    file = tmp_path / "masks.npz"
    np.savez(file, a=np.array([{"code": "run me"}], dtype=object))
    with pytest.raises(ValueError, match="plain arrays"):
        po.load_masks(file)
