"""Exported programs: a process with JAX alone runs them at other sizes; damage, and what cannot leave, are errors."""

import hashlib
import os
import re
import subprocess
import sys
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import pruneopt as po
from paper_reproductions.networks import resnet20
from tests.test_handover import halved_resnet

pytestmark = pytest.mark.default_flags

RNG = np.random.default_rng(0)
ALONE = """
import sys
import jax, jax.export, numpy as np
with np.load("inputs.npz") as archive:
    inputs = dict(archive)
found = {}
for name, batch in inputs.items():
    program = jax.export.deserialize(open(name.split("-")[0], "rb").read())
    found[name] = np.asarray(jax.jit(program.call)(batch))
np.savez("outputs.npz", **found)
assert not {"pruneopt", "optax", "scipy.optimize", "safetensors"} & set(sys.modules)
"""


def run_alone(folder, inputs):
    """{name: output} of {"file-anything": batch} in a process that knows JAX and nothing of ours."""
    np.savez(folder / "inputs.npz", **inputs)
    clean = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "PYTHONSTARTUP")}
    subprocess.run([sys.executable, "-c", ALONE], cwd=folder, env=clean | {"JAX_PLATFORMS": "cpu"}, check=True)
    with np.load(folder / "outputs.npz") as archive:
        return dict(archive)


def draw(*shape):
    return jnp.asarray(RNG.standard_normal(shape), jnp.float32)


def mlp(p, x):
    return jnp.tanh(x @ p["in"] + p["bias"]) @ p["out"]


def layers():
    return {"in": draw(4, 10), "bias": draw(10), "out": draw(10, 3)}


def normed(p, x):
    """By the batch's own mean."""
    h = x @ p["in"]
    return jnp.tanh(h - h.mean(0)) @ p["out"]


def conv(p, x):
    spec = ("NHWC", "HWIO", "NHWC")
    x = jnp.tanh(jax.lax.conv_general_dilated(x, p["a"], (1, 1), "SAME", dimension_numbers=spec))
    x = jax.lax.conv_general_dilated(x, p["b"], (2, 2), "SAME", dimension_numbers=spec)
    return x.reshape(x.shape[0], -1) @ p["c"]


def attend(p, tokens):
    x = p["table"][tokens]
    q, k, v = (jnp.einsum("btd,dhw->bthw", x, p[n]) for n in "qkv")
    mask = jnp.tril(jnp.ones((x.shape[1], x.shape[1]), bool))
    weights = jax.nn.softmax(jnp.where(mask, jnp.einsum("bthw,bshw->bhts", q, k), -1e9))
    return jnp.einsum("bhts,bshw->bthw", weights, v).reshape(*x.shape[:2], -1) @ p["o"]


def smaller_conv():
    p = {"a": draw(3, 3, 2, 8), "b": draw(3, 3, 8, 4), "c": draw(16, 3)}
    return po.shrink_units(conv, p, draw(3, 4, 4, 2), {("a", 3): np.arange(5)})


def smaller_attention():
    p = {"table": draw(9, 6), **{n: draw(6, 3, 2) for n in "qkv"}, "o": draw(6, 5)}
    return po.shrink_units(attend, p, tokens(2), {("q", 1): np.arange(2)})


def tokens(n):
    return jnp.asarray(RNG.integers(0, 9, (n, 5)), jnp.int32)


def close(a, b):
    assert np.shape(a) == np.shape(b)
    np.testing.assert_allclose(np.asarray(a), np.asarray(b), rtol=1e-5, atol=1e-5)


@pytest.mark.slow
def test_a_process_with_jax_alone_runs_it_at_other_sizes(tmp_path):
    image, text, dense = smaller_conv(), smaller_attention(), layers()
    assert po.export(image.fn, image.params, draw(3, 4, 4, 2), tmp_path / "image").any_size
    assert po.export(text.fn, text.params, tokens(2), tmp_path / "text").any_size
    assert po.export(mlp, dense, draw(2, 4), tmp_path / "dense").any_size
    inputs = {f"image-{n}": draw(n, 4, 4, 2) for n in (1, 5)} | {f"text-{n}": tokens(n) for n in (1, 7)}
    inputs |= {f"dense-{n}": draw(n, 4) for n in (1, 6)}
    outputs = run_alone(tmp_path, inputs)
    nets = {"image": (image.fn, image.params), "text": (text.fn, text.params), "dense": (mlp, dense)}
    for name, batch in inputs.items():
        fn, params = nets[name.split("-")[0]]
        close(outputs[name], fn(params, batch))


@pytest.mark.slow
def test_half_a_resnet_runs_alone(tmp_path, folder, optimised):
    small, images = halved_resnet(folder)
    exported = po.export(small.fn, small.params, images, tmp_path / "net")
    assert exported.any_size
    more = resnet20.cifar10(folder, "test1k", *resnet20.CHITA)[0]
    outputs = run_alone(tmp_path, {"net-1": more[:1], "net-32": more[:32]})
    for n in (1, 32):
        ours = np.asarray(jax.jit(small.fn)(small.params, more[:n]))
        assert np.abs(outputs[f"net-{n}"] - ours).max() <= 1e-6 * np.abs(ours).max()


def test_what_is_loaded_is_what_was_exported(tmp_path):
    params, file = layers(), tmp_path / "f"
    made = po.export(mlp, params, draw(2, 4), file)
    assert repr(made) == f"Exported(any_size=True, platforms=('cpu',), nbytes={file.stat().st_size}, why='')"
    loaded = po.load_export(file)
    assert repr(loaded) == repr(made)
    batch = draw(5, 4)
    close(loaded(batch), mlp(params, batch))
    close(jax.jit(made)(batch), mlp(params, batch))
    assert [f.name for f in tmp_path.iterdir()] == ["f"]


@pytest.mark.slow
def test_a_pruned_network_and_trees_go_through(tmp_path):
    pruned = po.prune(None, layers(), None, po.constraints.Cardinality(sparsity=0.5), progress=False)

    def fn(p, batch):
        h = mlp(p, batch["x"]) * batch["rate"] + batch["shift"]
        return {"logits": h.astype(jnp.bfloat16), "best": [h.argmax(1)]}

    batch = {"x": draw(3, 4), "rate": 0.5, "shift": np.float32(2.0)}
    made = po.export(fn, pruned, batch, tmp_path / "f")
    assert made.any_size
    more = {**batch, "x": draw(7, 4)}
    jax.tree.map(close, made(more), fn(pruned.params, more))
    small = po.shrink_units(lambda p, b: fn(p, b), pruned.params, batch, {("in", 1): np.arange(4)})
    made = po.export(small.fn, small.params, batch, tmp_path / "f")
    assert made.any_size
    jax.tree.map(close, made(more), small.fn(small.params, more))


def test_other_platforms_are_lowered_for(tmp_path):
    made = po.export(mlp, layers(), draw(2, 4), tmp_path / "f", platforms=["cpu", "cuda", "tpu"])
    assert made.platforms == po.load_export(tmp_path / "f").platforms == ("cpu", "cuda", "tpu")
    assert made(draw(3, 4)).shape == (3, 3)
    assert po.export(mlp, layers(), draw(2, 4), tmp_path / "f", platforms=["cuda"]).platforms == ("cuda",)


@pytest.mark.parametrize("n", [1, 4])
def test_a_function_that_mixes_examples_keeps_its_size(tmp_path, n):
    small = po.shrink_units(normed, layers(), draw(n, 4), {("in", 1): np.arange(6)})
    batch = draw(n, 4)
    made = po.export(small.fn, small.params, batch, tmp_path / "f")
    assert not made.any_size
    assert not po.load_export(tmp_path / "f").any_size
    assert "example by example: its output differs by" in made.why
    assert made.why.endswith("fn mixes examples")
    close(made(batch), small.fn(small.params, batch))
    with pytest.raises(ValueError, match=r"[Ss]hape"):
        made(draw(n + 1, 4))
    assert po.export(normed, layers(), batch, tmp_path / "g").any_size  # JAX traces it with a symbolic size


@pytest.mark.parametrize(
    ("fn", "batch", "why"),
    [
        (lambda p, x: jnp.mean(mlp(p, x) ** 2), (3, 4), "example by example: its output has no axis of examples"),
        (lambda p, x: {"a": mlp(p, x).sum(0)}, (3, 4), "its output 'a' has no axis of examples"),
        (lambda p, x: mlp(p, x.reshape(3, 2, 2).reshape(3, 4)), (3, 4), "traced with a symbolic size: .*; example by"),
        (lambda p, x: mlp(p, x[0]) * x[1].sum(), [(3, 4), (2, 4)], "the arrays of the batch have no first axis of one"),
    ],
)
def test_what_takes_one_size_says_why(tmp_path, fn, batch, why):
    params, batch = layers(), jax.tree.map(lambda s: draw(*s), batch, is_leaf=lambda s: isinstance(s, tuple))
    small = po.shrink_units(fn, params, batch, {("in", 1): np.arange(6)})
    made = po.export(small.fn, small.params, batch, tmp_path / "f")
    assert not made.any_size
    assert re.search(why, made.why), made.why
    jax.tree.map(close, made(batch), small.fn(small.params, batch))


def test_float64_stays_float64(tmp_path):
    with jax.enable_x64(True), jax.numpy_dtype_promotion("strict"), jax.numpy_rank_promotion("raise"):
        fn = lambda p, x: jnp.tanh(x @ p["in"]) @ p["out"]  # noqa: E731
        p = {"in": jnp.asarray(RNG.standard_normal((4, 10))), "out": jnp.asarray(RNG.standard_normal((10, 3)))}
        x = jnp.asarray(RNG.standard_normal((3, 4)))
        small = po.shrink_units(fn, p, x, {("in", 1): np.arange(6)})
        assert po.export(small.fn, small.params, x, tmp_path / "f").any_size
        more = jnp.asarray(RNG.standard_normal((8, 4)))
        found, own = po.load_export(tmp_path / "f")(more), small.fn(small.params, more)
        assert found.dtype == np.float64
        np.testing.assert_allclose(np.asarray(found), np.asarray(own), rtol=1e-12, atol=1e-12)


def test_one_size_on_request(tmp_path):
    made = po.export(mlp, layers(), draw(2, 4), tmp_path / "f", any_size=False)
    assert (made.any_size, made.why) == (False, "it was not asked for")


class Pair(NamedTuple):
    x: jax.Array


@pytest.mark.parametrize(
    ("change", "kind", "message"),
    [
        ({"params": {"in": jnp.full((4, 10), jnp.nan)}}, ValueError, "params: 'in' holds a NaN or an infinity"),
        (
            {"batch": {"x": jnp.ones((2, 4)), "name": "a"}},
            TypeError,
            "batch: 'name' is a str; an exported program takes",
        ),
        ({"fn": lambda p, x: float(x[0, 0]) * x}, ValueError, "fn cannot be exported: "),
        ({"fn": lambda p, x: "text"}, ValueError, "fn cannot be exported: "),
        ({"fn": lambda p, x: Pair(x)}, ValueError, "must be arrays in dicts, lists and tuples"),
    ],
)
def test_what_cannot_leave_is_refused(tmp_path, change, kind, message):
    words = {"fn": mlp, "batch": jnp.ones((2, 4))} | change
    with pytest.raises(kind, match=message):
        po.export(words["fn"], layers() | words.pop("params", {}), words["batch"], tmp_path / "f")
    assert not (tmp_path / "f").exists()


def test_two_gigabytes_are_too_many(tmp_path, monkeypatch):
    monkeypatch.setattr("pruneopt.delivery.export._MOST", 100)
    with pytest.raises(ValueError, match="params holds 320 bytes, and a program at most 100; pass them on by save_w"):
        po.export(mlp, layers(), draw(2, 4), tmp_path / "f")


def test_damage_is_an_error(tmp_path):
    file = tmp_path / "f"
    with pytest.raises(FileNotFoundError):
        po.load_export(file)
    po.export(mlp, layers(), draw(2, 4), file)
    whole = file.read_bytes()
    for place in (0, 50, len(whole) // 2, len(whole) - 20):
        changed = bytearray(whole)
        changed[place] ^= 0x10
        file.write_bytes(changed)
        with pytest.raises(ValueError, match="is damaged: its checksum does not match; export it again"):
            po.load_export(file)
    for bad in (b"", whole[:10], whole[:-1], whole[: len(whole) // 2], b"x" * 100):
        file.write_bytes(bad)
        with pytest.raises(ValueError, match=r"not written by pruneopt.export, or its end is missing"):
            po.load_export(file)
    for data in (b"", b"\xff" * 64, whole[: len(whole) // 2], whole[:200]):  # whoever made the checksum too
        file.write_bytes(data + hashlib.sha256(data).digest() + b"PRUNEOPT")
        with pytest.raises(ValueError, match=r"cannot be read by JAX 0\..*; export it with this JAX"):
            po.load_export(file)


def test_without_flatbuffers_it_says_what_to_install(tmp_path, monkeypatch):
    def missing(*given, **words):
        raise ImportError("no flatbuffers")

    po.export(mlp, layers(), draw(2, 4), tmp_path / "f")
    monkeypatch.setattr(jax.export.Exported, "serialize", missing)
    monkeypatch.setattr(jax.export, "deserialize", missing)
    with pytest.raises(ImportError, match=r"need flatbuffers; install pruneopt\[export\]"):
        po.export(mlp, layers(), draw(2, 4), tmp_path / "g")
    with pytest.raises(ImportError, match=r"need flatbuffers; install pruneopt\[export\]"):
        po.load_export(tmp_path / "f")
