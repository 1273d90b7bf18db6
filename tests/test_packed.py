"""Sparse matrices of pruned leaves: bit for bit there and back, as scipy and a decoder by hand read them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import sparse

import pruneopt as po
from pruneopt.constraints import NM, Cardinality
from tests.test_files import bits

pytestmark = pytest.mark.default_flags

RNG = np.random.default_rng(0)


def params():
    draw = lambda *shape: RNG.standard_normal(shape).astype(np.float32)  # noqa: E731
    return {
        "conv": {"kernel": jnp.asarray(draw(3, 3, 8, 5)), "bias": jnp.ones(5)},
        "half": jnp.asarray(draw(16, 6), jnp.bfloat16),
        "numpy": draw(8, 12).astype(np.float16),
        "steps": 3,
    }


LEAVES = ["conv/kernel", "half", "numpy"]


def pruned(constraint):
    return po.prune(None, params(), None, constraint, leaves=LEAVES, progress=False)


def same(before, after):
    assert jax.tree.structure(before) == jax.tree.structure(after)
    for old, new in zip(jax.tree.leaves(before), jax.tree.leaves(after), strict=True):
        assert bits(old) == bits(new)
        assert type(old) is type(new)


def shapes(tree):
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), tree)


def test_csr_is_the_matrix_and_comes_back():
    before = pruned(Cardinality(sparsity=0.8))
    packed = po.to_csr(before)
    assert list(packed) == LEAVES
    kernel = np.asarray(before.params["conv"]["kernel"]).reshape(-1, 5)
    np.testing.assert_array_equal(packed["conv/kernel"].toarray(), kernel)
    assert packed["conv/kernel"].nnz == np.count_nonzero(kernel)
    assert {str(m.dtype) for m in packed.values()} == {"float32"}
    x = RNG.standard_normal((4, 72)).astype(np.float32)
    np.testing.assert_allclose(x @ packed["conv/kernel"], x @ kernel, rtol=1e-5)
    same(before.params, po.from_csr(packed, before.params))
    only = {"half": before.params["half"]}
    same(only, po.from_csr({"half": packed["half"]}, shapes(only)))


def test_csr_with_a_row_an_output():
    before, axes = pruned(Cardinality(sparsity=0.8)).params, {"conv/kernel": (3, (2, 0, 1)), "half": (1, 0)}
    packed = po.to_csr(before, LEAVES, axes)
    kernel = np.asarray(before["conv"]["kernel"])
    np.testing.assert_array_equal(packed["conv/kernel"].toarray(), kernel.transpose(3, 2, 0, 1).reshape(5, 72))
    assert packed["half"].shape == (6, 16)
    same(before, po.from_csr(packed, before, axes))


def test_a_negative_zero_is_kept():
    leaf = {"w": jnp.asarray([[0.0, -0.0], [1.5, 0.0], [0.0, 0.0], [-0.0, 2.0]], jnp.float32)}
    assert po.to_csr(leaf)["w"].nnz == 4
    same(leaf, po.from_csr(po.to_csr(leaf), shapes(leaf)))
    same(leaf, po.unpack_nm(po.pack_nm(leaf, 1, 2), shapes(leaf)))


@pytest.mark.parametrize(("n", "m", "width"), [(2, 4, 2), (1, 2, 1), (5, 8, 3), (4, 4, 2), (1, 1, 0)])
def test_n_m_is_as_small_as_promised_and_comes_back(n, m, width):
    before = pruned(NM(n, m))
    packed = po.pack_nm(before, n, m) if n < m else po.pack_nm(before.params, n, m, LEAVES)
    assert list(packed) == LEAVES
    for path, size, itemsize in (("conv/kernel", 360, 4), ("half", 96, 2), ("numpy", 96, 2)):
        count = size * n // m
        assert packed[path].values.nbytes == count * itemsize
        assert packed[path].places.nbytes == -(-count * width // 8)
        assert packed[path].nbytes == packed[path].values.nbytes + packed[path].places.nbytes
    assert packed["half"].shape == (16, 6)
    same(before.params, po.unpack_nm(packed, before.params))


def test_places_are_read_by_hand():
    leaf = np.zeros((8, 3), np.float32)
    leaf[[1, 3, 4, 6, 0, 2, 7], [0, 0, 0, 1, 2, 2, 2]] = np.arange(1.0, 8)
    one = po.pack_nm({"w": leaf}, 2, 4)["w"]
    assert repr(one) == "PackedNM(2:4, 8 x 3 float32, 51 bytes)"
    number = int.from_bytes(one.places.tobytes(), "little")
    found = np.zeros_like(leaf)
    for k in range(12):
        row, column = divmod(k, 3)
        found[row // 2 * 4 + (number >> 2 * k & 3), column] += one.values[row, column]
    np.testing.assert_array_equal(found, leaf)


def test_groups_along_the_outputs():
    w = {"w": jnp.asarray(RNG.standard_normal((6, 8)), jnp.float32)}
    before = po.prune(None, w, None, NM(2, 4, axis="out"), progress=False).params
    packed = po.pack_nm(before, 2, 4, axes={"w": (1, 0)})
    assert packed["w"].values.shape == (4, 6)
    same(before, po.unpack_nm(packed, shapes(before), {"w": (1, 0)}))
    with pytest.raises(ValueError, match=r"'w' is not 2:4|does not divide"):
        po.pack_nm(before, 2, 4)


@pytest.mark.parametrize(
    ("call", "kind", "message"),
    [
        (lambda w: po.pack_nm({"w": w}, 2, 4), ValueError, r"'w' is not 2:4: inputs 0 to 3 of output 0 hold 4 weights"),
        (lambda w: po.pack_nm({"w": w}, 2, 3), ValueError, "m=3 does not divide the 8 inputs of 'w'"),
        (lambda w: po.pack_nm({"w": w}, 4, 2), ValueError, "n=4, m=2: N:M needs 1 <= n <= m"),
        (lambda w: po.pack_nm({"w": w}, 1.5, 2), TypeError, "n=1.5, m=2: pass whole numbers"),
        (lambda w: po.to_csr({"w": w.at[0, 0].set(jnp.inf)}), ValueError, "'w' holds a NaN or an infinity"),
        (lambda w: po.to_csr({"w": w}, axes={"w": (0, 2)}), ValueError, r"axes: 'w' has \(0, 2\)"),
        (lambda w: po.to_csr({"w": w}, axes={"v": (0, 1)}), ValueError, "axes: there is no array 'v'"),
        (lambda w: po.to_csr({"w": w}, axes={"w": ((0, 1),)}), ValueError, "'w' of 2 axes gets 1, and a matrix"),
        (lambda w: po.from_csr({"v": sparse.csr_array(w)}, {"w": w}), ValueError, "packed: like has no array 'v'"),
        (lambda w: po.from_csr(po.to_csr({"w": w}), {"w": w.T}), ValueError, r"a matrix \(8, 4\), which is no leaf of"),
        (lambda w: po.from_csr(po.to_csr({"w": w / 3}), {"w": w.astype(jnp.bfloat16)}), ValueError, "would round"),
        (lambda w: po.from_csr({}, shapes({"w": w})), ValueError, "'w' is a shape and nothing is packed for it"),
        (lambda w: po.from_csr({"w": twice()}, {"w": w}), ValueError, "'w' holds an entry twice"),
        (lambda w: po.unpack_nm(po.pack_nm({"w": w}, 4, 4), {"w": w.astype(int)}), ValueError, "like is int32; pass"),
    ],
)
def test_what_does_not_fit_is_refused(call, kind, message):
    with pytest.raises(kind, match=message):
        call(jnp.asarray(RNG.standard_normal((8, 4)), jnp.float32))


def twice():
    return sparse.csr_array((np.ones(2, np.float32), [0, 0], [0, 2, *[2] * 7]), shape=(8, 4))


@pytest.mark.parametrize(
    ("places", "message"),
    [
        (np.zeros(2, np.uint8), "a place twice, or beyond"),
        (np.full(2, 255, np.uint8), "a place twice, or beyond"),
        (np.zeros(3, np.uint8), "3 bytes of places for 6 values"),
        (np.zeros(2, np.int64), "2 bytes of places for 6 values"),
    ],
)
def test_places_that_nobody_packed_are_refused(places, message):
    one = po.PackedNM(np.ones((2, 3), np.float32), places, 2, 3)
    with pytest.raises(ValueError, match=message):
        po.unpack_nm({"w": one}, {"w": np.zeros((3, 3), np.float32)})
