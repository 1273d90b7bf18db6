"""Pruned leaves as sparse matrices: scipy's CSR, and N:M as values and indices in as few bits as they need."""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np
from jaxtyping import Bool, Shaped, UInt8
from scipy import sparse

from pruneopt import _tree
from pruneopt.delivery.files import as_leaf, is_set
from pruneopt.delivery.handover import Axes, check_axes, laid, laid_back
from pruneopt.network.leaves import Choice, partition
from pruneopt.solution import Pruned

Tree = Any
Matrix = Shaped[np.ndarray, "rows columns"]


@dataclass(frozen=True, eq=False)
class PackedNM:
    """A matrix (n_in, n_out) of which every m consecutive inputs of an output hold at most n weights: these, and where.

    values: (n_in / m * n, n_out), those of a group in their order; a group with fewer is filled with zeros.
    places: for each value, row by row, its place in its group, ceil(log2 m) bits each, the lowest bit first.
    """

    values: Shaped[np.ndarray, "kept n_out"]
    places: UInt8[np.ndarray, " bytes"]
    n: int
    m: int

    @property
    def shape(self) -> tuple[int, int]:
        """(n_in, n_out)."""
        return self.values.shape[0] // self.n * self.m, self.values.shape[1]

    @property
    def nbytes(self) -> int:
        """Of values and places."""
        return self.values.nbytes + self.places.nbytes

    def __repr__(self) -> str:
        return (
            f"PackedNM({self.n}:{self.m}, {self.shape[0]} x {self.shape[1]} {self.values.dtype}, {self.nbytes:,} bytes)"
        )


@_tree.on_host
def to_csr(
    params: Tree | Pruned, leaves: Choice = None, axes: Mapping[str, Axes] | None = None
) -> dict[str, sparse.csr_array]:
    """{path: the leaf's matrix in compressed rows}, bit for bit; scipy has no 16-bit floats, which become float32.

    A row is an input and a column an output: a leaf (..., n_out) is the matrix (all before, n_out).
    leaves: which; by default those with a mask of a Pruned, else as `prune` chooses without a function.
    axes: {path: order of two} of leaves that lie otherwise, as in `save_weights`: (1, 0) for (out, in),
        (3, (0, 1, 2)) for an HWIO kernel with a row an output.
    Raises ValueError for axes that make no matrix, a NaN or an infinity.
    """
    found = {}
    for path, matrix in _matrices(params, leaves, axes).items():
        kept = is_set(matrix)
        data = matrix[kept].astype(np.float32 if matrix.dtype.itemsize < 4 else matrix.dtype)
        ends = np.concatenate([[0], np.cumsum(kept.sum(axis=1))])
        found[path] = sparse.csr_array((data, np.nonzero(kept)[1], ends), shape=matrix.shape)
    return found


def from_csr(packed: Mapping[str, Any], like: Tree, axes: Mapping[str, Axes] | None = None) -> Tree:
    """`like` with the leaves that `to_csr` made these matrices of, in the dtypes of `like`.

    like: the parameters, or `jax.eval_shape` of them where every leaf has a matrix.
    Raises ValueError for a matrix of another shape, with an entry twice, or one that the leaf's dtype cannot hold.
    """

    def dense(path: str, matrix: Any, dtype: Any) -> Matrix:
        given: Any = sparse.csr_array(matrix)
        if not given.has_canonical_format:
            raise ValueError(f"packed: '{path}' holds an entry twice, or out of order; call its sum_duplicates()")
        data = given.data.astype(dtype)
        if data.astype(given.dtype).tobytes() != given.data.tobytes():
            raise ValueError(
                f"packed: '{path}' holds a {given.dtype} that {dtype} would round; pass like in {given.dtype}"
            )
        full = np.zeros(given.shape, dtype)
        full[np.repeat(np.arange(given.shape[0]), np.diff(given.indptr)), given.indices] = data
        return full

    return _filled(packed, like, axes, dense)


@_tree.on_host
def pack_nm(
    params: Tree | Pruned, n: int, m: int, leaves: Choice = None, axes: Mapping[str, Axes] | None = None
) -> dict[str, PackedNM]:
    """{path: the leaf's matrix (n_in, n_out) by its n:m values and their places}, bit for bit, along the inputs.

    leaves, axes: as in `to_csr`; axes that say (out, in) group along the outputs.
    Raises ValueError for a leaf whose inputs m does not divide or with a group of more than n weights; as `to_csr`.
    """
    try:
        n, m = operator.index(n), operator.index(m)
    except TypeError as error:
        raise TypeError(f"n={n!r}, m={m!r}: pass whole numbers, such as n=2, m=4") from error
    if not 1 <= n <= m <= 2**16:
        raise ValueError(f"n={n}, m={m}: N:M needs 1 <= n <= m <= 65,536, such as n=2, m=4")
    return {path: _packed(path, matrix, n, m) for path, matrix in _matrices(params, leaves, axes).items()}


def unpack_nm(packed: Mapping[str, PackedNM], like: Tree, axes: Mapping[str, Axes] | None = None) -> Tree:
    """`like` with the leaves that `pack_nm` packed; otherwise as `from_csr`.

    Raises ValueError for values and places that `pack_nm` did not make.
    """

    def dense(path: str, one: PackedNM, dtype: Any) -> Matrix:
        if one.values.dtype != dtype:
            raise ValueError(
                f"packed: '{path}' is {one.values.dtype}, like is {dtype}; pass like in {one.values.dtype}"
            )
        return _unpacked(path, one)

    return _filled(packed, like, axes, dense)


def _matrices(params: Tree | Pruned, leaves: Choice, axes: Mapping[str, Axes] | None) -> dict[str, Matrix]:
    """{path: matrix} of the chosen leaves."""
    if isinstance(params, Pruned):
        masked = {path for path, _ in _tree.named_leaves(params.support)}
        params, leaves = params.params, (lambda path, leaf: path in masked) if leaves is None else leaves
    chosen = dict(_tree.named_leaves(partition(params, leaves)[0]))
    check_axes(axes, {path: leaf.ndim for path, leaf in _tree.named_leaves(params) if _tree.is_array(leaf)})
    found = {}
    for path, leaf in chosen.items():
        array = np.asarray(leaf)
        if not np.all(np.isfinite(array)):
            raise ValueError(f"params: '{path}' holds a NaN or an infinity; repair it before you pack it")
        found[path] = laid(array, _order(path, array.ndim, axes))
    return found


def _order(path: str, ndim: int, axes: Mapping[str, Axes] | None) -> Axes:
    """The two axes of a leaf's matrix: (inputs, output) by default."""
    order = (axes or {}).get(path, (tuple(range(ndim - 1)), ndim - 1))
    if len(order) != 2 or not ndim:
        raise ValueError(
            f"axes: '{path}' of {ndim} axes gets {len(order) if ndim else 0}, and a matrix has two; join some, such as "
            "((0, 1), 2), or leave it out"
        )
    return order


def _filled(
    packed: Mapping[str, Any], like: Tree, axes: Mapping[str, Axes] | None, dense: Callable[[str, Any, Any], Matrix]
) -> Tree:
    """`like` with the leaves of these matrices."""
    leaves = {path: leaf for path, leaf in _tree.named_leaves(like) if hasattr(leaf, "shape")}
    if unknown := [path for path in packed if path not in leaves]:
        raise ValueError(f"packed: like has no array '{unknown[0]}'; pass like= the tree that was packed")
    found = {}
    for path, one in packed.items():
        leaf, matrix = leaves[path], dense(path, one, np.dtype(leaves[path].dtype))
        back = laid_back(matrix, _order(path, len(leaf.shape), axes), tuple(leaf.shape))
        if back is None:
            raise ValueError(
                f"packed: '{path}' is a matrix {matrix.shape}, which is no leaf of shape {tuple(leaf.shape)}"
            )
        kind = None if isinstance(leaf, np.ndarray) else ""
        found[path] = _tree.placed(as_leaf(path, back.copy(), kind, "packed"), leaf)
    shapes = [p for p, leaf in leaves.items() if p not in found and isinstance(leaf, jax.ShapeDtypeStruct)]
    if shapes:
        raise ValueError(f"like: '{shapes[0]}' is a shape and nothing is packed for it; give its array")
    return _tree.map_named(lambda path, leaf: found.get(path, leaf), like)


def _packed(path: str, matrix: Matrix, n: int, m: int) -> PackedNM:
    n_in, n_out = matrix.shape
    if n_in % m:
        raise ValueError(f"m={m} does not divide the {n_in} inputs of '{path}'; leave it out, or give its axes")
    groups, kept = matrix.reshape(-1, m, n_out), is_set(matrix).reshape(-1, m, n_out)
    most = kept.sum(axis=1)
    if np.any(most > n):
        group, column = np.argwhere(most > n)[0]
        raise ValueError(
            f"params: '{path}' is not {n}:{m}: inputs {group * m} to {group * m + m - 1} of output {column} hold "
            f"{most[group, column]} weights; prune it with NM({n}, {m})"
        )
    at = np.sort(np.argsort(~kept, axis=1, kind="stable")[:, :n], axis=1)
    values = np.take_along_axis(groups, at, axis=1).reshape(-1, n_out)
    return PackedNM(values, np.packbits(_bits_of(at.reshape(-1, 1), m), bitorder="little"), n, m)


def _bits_of(places: np.ndarray, m: int) -> Bool[np.ndarray, "values bits"]:
    return (places >> np.arange((m - 1).bit_length()) & 1).astype(bool)


def _unpacked(path: str, one: PackedNM) -> Matrix:
    width, count = (one.m - 1).bit_length(), one.values.size
    if one.places.dtype != np.uint8 or one.places.size != -(-count * width // 8) or len(one.values) % one.n:
        raise ValueError(f"packed: '{path}' holds {one.places.size} bytes of places for {count} values; pack it again")
    bits = np.unpackbits(one.places, count=count * width, bitorder="little").reshape(count, width)
    at = (bits.astype(np.int64) << np.arange(width)).sum(axis=1).reshape(-1, one.n, one.values.shape[1])
    if np.any(at >= one.m) or np.any(np.diff(at, axis=1) <= 0):
        raise ValueError(f"packed: '{path}' holds a place twice, or beyond its group of {one.m}; pack it again")
    full = np.zeros((len(at), one.m, at.shape[2]), one.values.dtype)
    np.put_along_axis(full, at, one.values.reshape(at.shape), axis=1)
    return full.reshape(one.shape)
