"""Save and load: bit for bit, any pytree, nothing unpickled, damage is an error."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import pruneopt as po
from pruneopt import _store
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
    assert after.scope == before.scope != ""
    assert [p.name for p in tmp_path.iterdir()] == ["net.safetensors"]


def test_the_file_is_as_small_as_promised(tmp_path):
    before = po.prune(None, {"w": jnp.asarray(np.random.default_rng(0).standard_normal((400, 500)), jnp.float32)}, None,
                      Cardinality(sparsity=0.9), progress=False)  # fmt: skip
    po.save(before, tmp_path / "f")
    promised = po.report(None, {"w": jnp.zeros((400, 500))}, before).bytes_stored
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


def test_masks_with_a_nan_are_refused(tmp_path):
    mask = np.array([1.0, np.nan], np.float32)
    save_file({"a": mask}, tmp_path / "m.safetensors")
    np.savez(tmp_path / "m.npz", a=mask)
    for name in ("m.safetensors", "m.npz"):
        with pytest.raises(ValueError, match="mask 'a' holds a NaN or an infinity, which says neither"):
            po.load_masks(tmp_path / name)
    with pytest.raises(FileNotFoundError):
        po.load_masks(tmp_path / "none.npz")
    with pytest.raises(FileNotFoundError):
        po.load_masks(tmp_path / "none")


def test_half_precision_masks_of_another_tool(tmp_path):
    from safetensors.flax import save_file as save_jax

    save_jax({"a": jnp.asarray([1, 0, 2], jnp.bfloat16)}, tmp_path / "m")
    np.testing.assert_array_equal(po.load_masks(tmp_path / "m")["a"], [True, False, True])


# ------------------------------------------------------------------------------------ save writes what load gives back


TWO = {"a/b": jnp.ones((2, 2)), "a": {"b": jnp.zeros((2, 2))}}
NONE = {"a/b": None, "a": {"b": None}}
REFUSED = {
    "two leaves of one path": (TWO, NONE, "params has two leaves whose path is 'a/b'; rename one"),
    "two masks of one path": ({"w": np.ones(2)}, TWO, "support has two leaves whose path is 'a/b'"),
    "a mask without a leaf": ({"w": np.ones(2)}, {"v": np.ones(2, bool)}, "support has a mask 'v' where params has no"),
    "a mask of a number": ({"w": 1.0}, {"w": np.ones((), bool)}, "support has a mask 'w' where params has no array"),
    "another shape": ({"w": np.ones(2)}, {"w": np.ones(3, bool)}, r"support: 'w' is bool \(3,\); pass booleans"),
    "no booleans": ({"w": np.ones(2)}, {"w": np.ones(2)}, "support: 'w' is float64"),
    "not zero": ({"w": np.ones(2)}, {"w": np.zeros(2, bool)}, "'w' is not zero off its support; pass Pruned"),
    "a hidden NaN": ({"w": np.full(2, np.nan)}, {"w": np.zeros(2, bool)}, "'w' is not zero off its support"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_would_not_come_back_is_refused(tmp_path, name):
    params, support, words = REFUSED[name]
    with pytest.raises(ValueError, match=words):
        po.save(po.Pruned(params, support), tmp_path / "x")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("dtype", ["O", "u1,f4"])
def test_objects_and_records_are_refused(tmp_path, dtype):
    with pytest.raises(TypeError, match=r"params: 'w' has dtype .*, which cannot be stored"):
        po.save(po.Pruned({"w": np.zeros(2, dtype)}, {"w": None}), tmp_path / "x")
    assert not list(tmp_path.iterdir())


STORED = [">f4", ">i8", "c8", "c16", ">c8", "U3", "M8[s]", "f2", "float8_e4m3fn", "float4_e2m1fn", "int4", "bool"]


@pytest.mark.parametrize("dtype", STORED)
def test_every_dtype_comes_back_bit_for_bit(tmp_path, dtype):
    array = np.array([[0, 1, 0], [1, 0, 1]]).astype(jnp.dtype(dtype))
    mask = np.array(array).astype(bool) if array.dtype.kind not in "UM" else None
    po.save(po.Pruned({"w": array, "x": array[0, 0]}, {"w": mask, "x": None}), tmp_path / "x")
    after = po.load(tmp_path / "x", {"w": array, "x": 0}).params["w"]
    assert bits(after) == bits(array)
    assert after.dtype == array.dtype


def test_64_bits_are_not_rounded_behind_ones_back(tmp_path):
    with jax.enable_x64(True):
        po.save(po.Pruned({"w": jnp.arange(3.0)}, {"w": None}), tmp_path / "x")
    with pytest.raises(ValueError, match="'w' is float64 but JAX is in 32-bit mode and would round it; enable 64 bits"):
        po.load(tmp_path / "x", {"w": jnp.zeros(3)})


def test_a_history_of_arrays_comes_back_as_lists(tmp_path):
    history = [{"a": np.arange(3), "b": jnp.ones(()), "c": np.float32(0.5), "d": (1, None)}]
    po.save(po.Pruned({"w": np.ones(2)}, {"w": None}, history=history), tmp_path / "x")
    found = po.load(tmp_path / "x", {"w": np.ones(2)}).history
    assert found == [{"a": [0, 1, 2], "b": 1.0, "c": 0.5, "d": [1, None]}]


def test_abstract_shapes_are_enough_to_load_into(tmp_path):
    def arrays():
        return {name: leaf for name, leaf in network().items() if name not in ("activation", "rate")}

    before = po.prune(None, arrays(), None, Cardinality(sparsity=0.7, floor=1), leaves=["conv/kernel"], progress=False)
    po.save(before, tmp_path / "x")
    shapes = jax.eval_shape(arrays)
    after = po.load(tmp_path / "x", shapes)
    assert jax.tree.structure(after.params) == jax.tree.structure(before.params)
    for old, new in zip(jax.tree.leaves(before.params), jax.tree.leaves(after.params), strict=True):
        assert bits(old) == bits(new)
    jax.tree.map(np.testing.assert_array_equal, before.support, after.support)
    wrong = {**shapes, "steps": jax.ShapeDtypeStruct((2,), int)}
    with pytest.raises(ValueError, match=r"like: 'steps' has shape \(2,\), the file has \(\)"):
        po.load(tmp_path / "x", wrong)
    with pytest.raises(ValueError, match="like has two leaves whose path is 'a/b'"):
        po.load(tmp_path / "x", TWO)


# ------------------------------------------------------------------------------------------------------ crafted files


def crafted(file, change):
    """The file with other arrays and texts, and a checksum that fits them."""
    tensors, texts = _store.read_tensors(file)
    leaves = json.loads(texts["leaves"])
    change(tensors, leaves)
    _store.write_tensors(file, tensors, {**texts, "leaves": json.dumps(leaves)})


def put(name, value):
    return lambda tensors, leaves: tensors.update({name: value})


def say(path, **words):
    return lambda tensors, leaves: leaves[path].update(words)


CRAFTED = {
    "fewer values": put("values:conv/kernel", np.ones(3, np.float32)),
    "values of another dtype": put("values:conv/kernel", np.ones(27, np.float64)),
    "a shorter mask": put("mask:conv/kernel", np.zeros(2, np.uint8)),
    "a fuller mask": put("mask:conv/kernel", np.full(12, 255, np.uint8)),
    "a mask of numbers": put("mask:conv/kernel", np.zeros(12, np.float32)),
    "an array of another shape": put("array:conv/bias", np.ones(4, np.float32)),
    "an array that nothing describes": put("array:more", np.ones(4, np.float32)),
    "an array that is not there": lambda tensors, leaves: tensors.pop("array:flags"),
    "another shape": say("conv/bias", shape=[6]),
    "a negative shape": say("conv/bias", shape=[-5]),
    "no shape": say("conv/bias", shape="five"),
    "a real shape": say("conv/bias", shape=[5.0]),
    "another dtype": say("conv/bias", dtype="int32"),
    "no dtype": say("conv/bias", dtype="float33"),
    "objects": say("conv/bias", dtype="O"),
    "no kind": say("conv/bias", numpy="maybe"),
    "no such key": say("key", key="dice"),
    "no description": lambda tensors, leaves: leaves.update({"conv/bias": None}),
}


@pytest.mark.parametrize("name", CRAFTED)
def test_a_crafted_file_with_a_valid_checksum_is_damaged(tmp_path, name):
    file = tmp_path / "net.safetensors"
    po.save(pruned(), file)
    crafted(file, lambda tensors, leaves: None)
    po.load(file, like=network())
    crafted(file, CRAFTED[name])
    with pytest.raises(ValueError, match="is damaged: "):
        po.load(file, like=network())


@pytest.mark.parametrize("key", ["leaves", "history"])
@pytest.mark.parametrize("text", ["", "{", "1"])
def test_facts_that_are_no_json_are_damage(tmp_path, key, text):
    file = tmp_path / "net.safetensors"
    po.save(pruned(), file)
    tensors, texts = _store.read_tensors(file)
    _store.write_tensors(file, tensors, {**texts, key: text})
    with pytest.raises(ValueError, match="is damaged: "):
        po.load(file, like=network())


def test_a_pickle_is_never_opened(tmp_path):
    file = tmp_path / "masks.npz"
    np.savez(file, a=np.array([{"code": "run me"}], dtype=object))
    with pytest.raises(ValueError, match="plain arrays"):
        po.load_masks(file)
