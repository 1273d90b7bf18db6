"""Weights under other names and in other layouts, bit for bit, read back by others' code and by hand."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import pruneopt as po
from paper_reproductions.networks import resnet20
from tests.test_files import bits

pytestmark = pytest.mark.default_flags


def network():
    rng = np.random.default_rng(0)
    draw = lambda *shape: jnp.asarray(rng.standard_normal(shape), jnp.float32)  # noqa: E731
    return {
        "conv": {"kernel": draw(3, 2, 4, 6), "bias": draw(6)},
        "depthwise": draw(3, 3, 1, 6),
        "line": draw(5, 4, 3),
        "heads": draw(6, 2, 4).astype(jnp.bfloat16),
        "half": rng.standard_normal((7, 5)).astype(np.float16),
        "steps": jnp.asarray(3),
        "one": draw(4, 1),
        "activation": jax.nn.relu,
    }


AXES = {
    "conv/kernel": (3, 2, 0, 1),
    "depthwise": (3, 2, 0, 1),
    "line": (2, 1, 0),
    "heads": ((1, 2), 0),
    "half": (1, 0),
    "one": (1, 0),
}


def dotted(path):
    return path.replace("kernel", "weight").replace("/", ".")


def by_hand(file):
    """{name: (dtype, shape, bytes)} by the format's own text, and its metadata."""
    data = file.read_bytes()
    n = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + n])
    said = header.pop("__metadata__", {})
    body = data[8 + n :]
    return {k: (v["dtype"], v["shape"], body[slice(*v["data_offsets"])]) for k, v in header.items()}, said


def test_what_is_written_is_the_plain_format_in_the_asked_layout(tmp_path):
    params = network()
    po.save_weights(params, tmp_path / "f", dotted, AXES)
    found, said = by_hand(tmp_path / "f")
    kernel, heads = np.asarray(params["conv"]["kernel"]), np.asarray(params["heads"])
    expected = {
        "conv.weight": ("F32", [6, 4, 3, 2], kernel.transpose(3, 2, 0, 1).tobytes()),
        "conv.bias": ("F32", [6], np.asarray(params["conv"]["bias"]).tobytes()),
        "depthwise": ("F32", [6, 1, 3, 3], np.asarray(params["depthwise"]).transpose(3, 2, 0, 1).tobytes()),
        "line": ("F32", [3, 4, 5], np.asarray(params["line"]).transpose(2, 1, 0).tobytes()),
        "heads": ("BF16", [8, 6], heads.reshape(6, 8).T.tobytes()),
        "half": ("F16", [5, 7], params["half"].T.tobytes()),
        "steps": ("I32", [], np.int32(3).tobytes()),
        "one": ("F32", [1, 4], np.asarray(params["one"]).T.tobytes()),
    }
    assert found == expected
    assert said == {"format": "pt"}
    assert (tmp_path / "f").stat().st_size % 2 == 0


@pytest.mark.parametrize("like", [network, lambda: jax.tree.map(
    lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype) if isinstance(x, jax.Array) else x, network())])  # fmt: skip
@pytest.mark.parametrize(("names", "axes"), [(None, None), (dotted, AXES)])
def test_a_round_trip_is_bit_for_bit(tmp_path, like, names, axes):
    params = network()
    po.save_weights(params, tmp_path / "f", names, axes)
    after = po.load_weights(tmp_path / "f", like(), names, axes)
    assert jax.tree.structure(after) == jax.tree.structure(params)
    for old, new in zip(jax.tree.leaves(params), jax.tree.leaves(after), strict=True):
        assert bits(old) == bits(new)
        assert type(old) is type(new)


def test_a_leaf_may_be_left_out(tmp_path):
    params = network()
    names = {path: path for path in (*AXES, "conv/bias")} | {"steps": None}
    po.save_weights(params, tmp_path / "f", names)
    assert "steps" not in load_file(tmp_path / "f")
    other = {**network(), "steps": jnp.asarray(9)}
    assert int(po.load_weights(tmp_path / "f", other, names)["steps"]) == 9
    with pytest.raises(ValueError, match="'steps' is a shape and its name None, so that it has no numbers"):
        po.load_weights(tmp_path / "f", {**other, "steps": jax.ShapeDtypeStruct((), jnp.int32)}, names)


@pytest.mark.parametrize(
    ("change", "kind", "message"),
    [
        ({"names": lambda path: "same"}, ValueError, "names gives 'conv/bias', .* the one name 'same'; give each"),
        ({"names": {"conv/kernal": "a"}}, ValueError, "no array 'conv/kernal'; there are .*conv/kernel"),
        ({"names": {"conv/kernel": "a"}}, ValueError, "names has no name for 'conv/bias'; add one, or None"),
        ({"names": lambda path: 3}, TypeError, "names gives 'conv/bias' the name 3; give a text"),
        ({"names": lambda path: "__metadata__"}, TypeError, "the name '__metadata__'; give a text"),
        ({"axes": {"lines": (0,)}}, ValueError, "axes: there is no array 'lines'; there are .*line"),
        ({"axes": {"line": (1, 0)}}, ValueError, r"axes: 'line' has \(1, 0\), but the leaf's axes are 0 to 2"),
        ({"axes": {"line": "abc"}}, TypeError, "axes: 'line' has 'abc'; pass whole numbers"),
        ({"line": jnp.full((5, 4, 3), jnp.nan)}, ValueError, "'line' holds a NaN or an infinity"),
        ({"half": np.full((7, 5), np.inf, np.float16)}, ValueError, "'half' holds a NaN or an infinity"),
        ({"key": jax.random.key(0)}, TypeError, "'key' has dtype key.*which safetensors lacks"),
        ({"wide": np.ones(2, np.complex128)}, TypeError, "'wide' has dtype complex128, which safetensors lacks"),
    ],
)
def test_what_cannot_be_handed_over_is_refused(tmp_path, change, kind, message):
    words = {word: change[word] for word in ("names", "axes") if word in change}
    params = network() | {k: v for k, v in change.items() if k not in words}
    with pytest.raises(kind, match=message):
        po.save_weights(params, tmp_path / "f", **words)
    assert not (tmp_path / "f").exists()


@pytest.mark.parametrize(
    ("written", "message"),
    [
        ({"a": np.ones((2, 3))}, "no array 'b' for 'b'; there are no others|no array 'b' for 'b'"),
        ({"a": np.ones((2, 3)), "b": np.ones(2), "c": np.ones(1)}, "holds 'c', for which like has no leaf"),
        ({"a": np.ones((3, 2)), "b": np.ones(2)}, r"'a' has shape \(2, 3\), and its array in file .* \(3, 2\)"),
        ({"a": np.ones((2, 3)), "b": np.ones(2, np.float16)}, "'b' is float32, and its array .* float16; cast"),
    ],
)
def test_another_network_s_file_is_refused(tmp_path, written, message):
    file, like = tmp_path / "f", {"a": jnp.ones((2, 3)), "b": jnp.ones(2)}
    save_file({k: v if v.dtype == np.float16 else v.astype(np.float32) for k, v in written.items()}, file)
    with pytest.raises(ValueError, match=message):
        po.load_weights(file, like)


def test_damage_is_an_error(tmp_path):
    file, like = tmp_path / "f", {"a": jnp.ones((20, 30))}
    with pytest.raises(FileNotFoundError):
        po.load_weights(file, like)
    po.save_weights(like, file)
    whole = file.read_bytes()
    hostile = b'{"a":{"dtype":"F32","shape":[20,30],"data_offsets":[0,99999999999]}}'
    for bad in (whole[:-1], whole[:50], b"", b"\xff" * 8 + whole[8:], len(hostile).to_bytes(8, "little") + hostile):
        file.write_bytes(bad)
        with pytest.raises(ValueError, match=r"file '.*' is damaged or not a safetensors file"):
            po.load_weights(file, like)
    save_file({"a": np.ones((20, 30))}, file)
    with pytest.raises(ValueError, match=r"'a' is float64.*32-bit mode"):
        po.load_weights(file, {"a": jax.ShapeDtypeStruct((20, 30), np.float64)})


def mixed(p, x):
    """Every kind of product: convolutions, depthwise and on a line, heads, a matrix stored (out, in), a tied table."""
    spec = ("NHWC", "HWIO", "NHWC")
    h = jax.lax.conv_general_dilated(p["table"][x["ids"]], p["conv"], (1, 1), "SAME", dimension_numbers=spec)
    h = jax.lax.conv_general_dilated(h, p["depthwise"], (1, 1), "SAME", dimension_numbers=spec, feature_group_count=6)
    h = h.mean(2)
    h = jax.lax.conv_general_dilated(h, p["line"], (1,), "SAME", dimension_numbers=("NWC", "WIO", "NWC"))
    q = jnp.einsum("btd,dhw->bthw", h, p["query"])
    h = jnp.tanh(jnp.einsum("bthw,hwd->btd", q, p["mix"]))
    h = h + jax.lax.conv_transpose(h, p["up"], (2,), "SAME", dimension_numbers=("NWC", "WIO", "NWC"))[:, ::2]
    h, _ = jax.lax.scan(lambda h, w: (jnp.tanh(h @ w), None), h, p["stacked"])
    h = h @ p["own"].T + p["bias"]
    return h @ p["table"].T + jnp.squeeze(h @ p["single"], -1)[..., None] * p["scale"]


def mixed_params():
    rng = np.random.default_rng(1)
    shapes = {"table": (9, 4), "conv": (3, 3, 4, 6), "depthwise": (3, 3, 1, 6), "line": (3, 6, 5), "query": (5, 2, 3)}
    shapes |= {"mix": (2, 3, 5), "up": (3, 5, 5), "stacked": (2, 5, 5), "own": (4, 5), "bias": (4,), "single": (4, 1)}
    return {k: jnp.asarray(rng.standard_normal(s), jnp.float32) for k, s in (shapes | {"scale": ()}).items()}


def test_torch_axes_come_from_the_program():
    ids = {"ids": jnp.zeros((2, 4, 4), jnp.int32)}
    assert po.torch_axes(mixed, mixed_params(), ids) == {
        "conv": (3, 2, 0, 1),
        "depthwise": (3, 2, 0, 1),
        "line": (2, 1, 0),
        "query": ((1, 2), 0),
        "mix": (2, (0, 1)),
        "stacked": (0, 2, 1),
        "own": (0, 1),
        "table": (0, 1),
        "single": (1, 0),
    }


def torch_name(path):
    """resnet20's paths as PyTorch would have them."""
    ends = {"scale": "weight", "kernel": "weight", "mean": "running_mean", "var": "running_var"}
    *rest, last = path.split("/")
    return ".".join([*rest, ends.get(last, last)])


def halved_resnet(folder):
    params = resnet20.load_chita(folder)
    images = resnet20.cifar10(folder, "test1k", *resnet20.CHITA)[0][:8]
    inner = {(f"{s}/{b}/conv1/kernel", 3) for s in resnet20.STAGES for b in resnet20.BLOCKS}
    width = {"stage1": 16, "stage2": 32, "stage3": 64}
    kept = {(path, axis): np.arange(0, width[path[:6]], 2) for path, axis in inner}
    return po.shrink_units(resnet20.forward, params, images, kept), images


@pytest.mark.slow
def test_a_smaller_resnet_runs_in_torch(tmp_path, folder, optimised):
    torch = pytest.importorskip("torch")
    from safetensors.torch import load_file as load_torch

    small, images = halved_resnet(folder)
    axes = po.torch_axes(resnet20.forward, resnet20.load_chita(folder), images)
    po.save_weights(small.params, tmp_path / "f", torch_name, axes)
    w = load_torch(tmp_path / "f")
    F = torch.nn.functional

    def norm(name, x):
        p = [w[f"{name}.{k}"] for k in ("running_mean", "running_var", "weight", "bias")]
        return F.batch_norm(x, *p, False, 0.0, resnet20.EPSILON)

    def conv(name, x, stride=1):
        kernel = w[f"{name}.weight"]
        return F.conv2d(x, kernel, stride=stride, padding=kernel.shape[-1] // 2)

    x = F.relu(norm("norm1", conv("conv1", torch.from_numpy(images).permute(0, 3, 1, 2))))
    for stage in resnet20.STAGES:
        for b in resnet20.BLOCKS:
            at, stride = f"{stage}.{b}", 2 if b == "0" and stage != "stage1" else 1
            y = F.relu(norm(f"{at}.norm1", conv(f"{at}.conv1", x, stride)))
            y = norm(f"{at}.norm2", conv(f"{at}.conv2", y))
            if f"{at}.shortcut.conv.weight" in w:
                x = norm(f"{at}.shortcut.norm", conv(f"{at}.shortcut.conv", x, stride))
            x = F.relu(x + y)
    logits = F.linear(x.mean((2, 3)), w["classifier.weight"], w["classifier.bias"]).numpy()
    ours = np.asarray(small.fn(small.params, images))
    assert np.abs(logits - ours).max() <= 1e-4 * np.abs(ours).max()
    back = po.load_weights(tmp_path / "f", small.params, torch_name, axes)
    assert all(bits(a) == bits(b) for a, b in zip(*map(jax.tree.leaves, (back, small.params)), strict=True))


@pytest.mark.slow
def test_torch_reads_the_same_bits(tmp_path):
    torch = pytest.importorskip("torch")
    from safetensors.torch import load_file as load_torch
    from safetensors.torch import save_file as save_torch

    params = network()
    po.save_weights(params, tmp_path / "f", dotted, AXES)
    read = load_torch(tmp_path / "f")
    whole = read["heads"].contiguous().view(torch.int16).numpy()
    assert whole.tobytes() == np.asarray(params["heads"]).reshape(6, 8).T.tobytes()
    assert tuple(read["conv.weight"].shape) == (6, 4, 3, 2)
    save_torch({k: v.contiguous() for k, v in read.items()}, tmp_path / "g")
    back = po.load_weights(tmp_path / "g", network(), dotted, AXES)
    assert all(bits(a) == bits(b) for a, b in zip(*map(jax.tree.leaves, (back, params)), strict=True))


def small_and_pruned():
    rng = np.random.default_rng(2)
    params = {"a": jnp.asarray(rng.standard_normal((4, 6)), jnp.float32), "b": jnp.ones((6, 3), jnp.bfloat16)}
    fn = lambda p, x: jnp.tanh(x @ p["a"]) @ p["b"].astype(jnp.float32)  # noqa: E731
    small = po.shrink_units(fn, params, jnp.ones((2, 4)), {("a", 1): np.arange(3)})
    return small, po.prune(None, params, None, po.constraints.Cardinality(sparsity=0.5), progress=False)


def same(before, after):
    assert all(bits(a) == bits(b) for a, b in zip(*map(jax.tree.leaves, (before, after)), strict=True))


def test_msgpack_takes_what_comes_out():
    serialization = pytest.importorskip("flax.serialization")
    small, pruned = small_and_pruned()
    for tree in (small.params, {"params": pruned.params, "support": pruned.support}):
        empty = jax.tree.map(jnp.zeros_like, tree)
        same(tree, serialization.from_bytes(empty, serialization.to_bytes(tree)))


@pytest.mark.filterwarnings("ignore")  # its own
def test_orbax_takes_what_comes_out(tmp_path):
    checkpoint = pytest.importorskip("orbax.checkpoint")
    small, pruned = small_and_pruned()
    for i, tree in enumerate((small.params, pruned)):
        with checkpoint.StandardCheckpointer() as saver:
            saver.save(tmp_path / str(i), tree)
            saver.wait_until_finished()
            shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), tree)
            same(tree, saver.restore(tmp_path / str(i), shapes))
