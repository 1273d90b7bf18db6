"""Block-diagonal curvature: blocks by leaf, by output, by input or of B entries; nothing between them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from pruneopt import _linalg, _tree
from pruneopt.curvature.base import Curvature, check_ridge, is_semidefinite
from pruneopt.curvature.low_rank import LowRank
from pruneopt.curvature.streamed import Streamed

Tree = Any
Inverter = Callable[[np.ndarray], np.ndarray | None]


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class BlockDiagonal(Curvature):
    """H = diag(H_1, ..., H_k) + ridge I over disjoint sets of entries of the vector.

    stacks: blocks of one size together, (k, b, b) each. entries: where their rows lie in the vector, (k, b).
    Made by `of` in float64 on the host: an inverse from float32 blocks would lose what a small ridge needs.
    Source: WoodFisher (Singh and Alistarh 2020, section 4) for runs of B weights.
    """

    stacks: tuple[Float[Array | np.ndarray, "k b b"], ...]
    entries: tuple[Int[Array | np.ndarray, "k b"], ...]
    layout: _tree.Layout = field(metadata={"static": True})
    ridge: float = field(default=0.0, metadata={"static": True})

    @staticmethod
    def of(curvature: LowRank | Streamed, by: str | int = "leaf", memory: int = 1 << 32) -> BlockDiagonal:
        """The diagonal blocks of a curvature, its ridge kept.

        by: "leaf"; "out" or "in", the weights of one output (last axis) or of one input (the other axes) of a leaf;
            or B, runs of B entries of a leaf, the last one shorter.
        Raises ValueError for another `by`, or blocks of more than `memory` bytes.
        """
        if isinstance(by, bool) or not (by in ("leaf", "out", "in") or (isinstance(by, int) and by >= 1)):
            raise ValueError(f'by={by!r} is no choice of blocks; pass "leaf", "out", "in" or their size >= 1')
        layout = curvature.layout
        entries = tuple(rows for path in layout.paths for rows in _blocks(layout, path, by))
        needed = sum(8 * rows.size * rows.shape[1] for rows in entries)
        if needed > memory:
            raise ValueError(
                f"by={by!r}: the blocks take {needed:,} bytes, above memory={memory:,}; pass a smaller size of blocks, "
                "such as by=512, or pass memory= to allow it"
            )
        if isinstance(curvature, LowRank):
            return BlockDiagonal(tuple(_of_low_rank(curvature, entries)), entries, layout, curvature.ridge)
        return BlockDiagonal(tuple(_of_products(curvature, entries)), entries, layout)

    @cached_property
    def semidefinite(self) -> bool:
        """Whether every block is, checked, and the ridge is not negative. Blocks of an indefinite Hessian may be."""
        return self.ridge >= 0 and all(is_semidefinite(h) for h, _ in self._each())

    def mv(self, direction: Tree) -> Tree:
        """H d."""
        return _product(self, direction)

    def diagonal(self, like: Tree) -> Tree:
        """The blocks' diagonals plus the ridge."""
        parts = [np.diagonal(stack, axis1=1, axis2=2) + self.ridge for stack in self.stacks]
        return self.layout.tree(jnp.asarray(self._joined(parts)), _tree.wide_shapes(like))

    def form(self, w: Tree, center: Tree, ridge: float) -> float:
        """<d, (H + ridge I) d>, d = w - center, in float64."""
        d = self.layout.host(w) - self.layout.host(center)
        inner = (np.einsum("ki,kij,kj->", d[at], np.asarray(h, np.float64), d[at]) for h, at in self._stacked())
        return float(sum(inner) + (self.ridge + ridge) * (d @ d))

    def block(self, which: str | slice | Sequence[int]) -> Float[np.ndarray, "k k"]:
        """The square of H on some entries of the vector: a leaf by its path, a slice, or indices."""
        wanted = np.arange(self.layout.size)[self.layout.place(which)]
        place = np.full(self.layout.size, -1)
        place[wanted] = np.arange(len(wanted))
        found = self.ridge * np.eye(len(wanted))
        for h, at in self._each():
            inside = place[at] >= 0
            found[np.ix_(place[at][inside], place[at][inside])] += h[np.ix_(inside, inside)]
        return found

    def solve(self, b: Tree, ridge: float = 0.0) -> Tree:
        """(H + ridge I)^-1 b, block by block, in float64. Raises ValueError for a block that is not positive."""
        flat = self.layout.host(b)
        found = np.empty_like(flat)
        for inverse, at in self._inverses(ridge, _linalg.inverse_on_host):
            found[at] = inverse @ flat[at]
        return jax.tree.map(jnp.asarray, self.layout.tree(found, b))

    def inverse_diagonal(self, ridge: float = 0.0) -> Tree:
        """diag((H + ridge I)^-1), as float64 NumPy arrays. Raises ValueError for a block that is not positive."""
        found = np.empty(self.layout.size)
        for half, at in self._inverses(ridge, _linalg.inverse_factor_on_host):
            found[at] = np.einsum("ij,ij->j", half, half)  # V^T V is the inverse, and V is cheaper
        return self.layout.tree(found)

    def _stacked(self) -> Iterator[tuple[Any, np.ndarray]]:
        for h, at in zip(self.stacks, self.entries, strict=True):
            yield h, np.asarray(at)

    def _each(self) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """(block, where it lies)."""
        for stack, rows in self._stacked():
            yield from zip(np.asarray(stack, np.float64), rows, strict=True)

    def _inverses(self, ridge: float, invert: Inverter) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """(what `invert` makes of a block, where it lies)."""
        check_ridge(ridge)
        for h, at in self._each():
            damped = h.copy()
            damped[np.diag_indices(len(h))] += self.ridge + ridge
            inverse = invert(damped)
            if inverse is None:
                least = _linalg.eigvalsh(h)[0] + self.ridge
                raise ValueError(
                    f"ridge={ridge!r}: the block of entries {at[0]} to {at[-1]} is not positive definite, its least "
                    f"eigenvalue is {least:.3g}; pass a larger ridge"
                )
            yield inverse, at

    def _joined(self, parts: Sequence[Any]) -> np.ndarray:
        found = np.empty(self.layout.size, np.result_type(*parts))
        for part, at in zip(parts, self.entries, strict=True):
            found[np.asarray(at)] = part
        return found


def _blocks(layout: _tree.Layout, path: str, by: str | int) -> Iterator[np.ndarray]:
    """Entries of a leaf's blocks, (k, b), those of one size together."""
    place, shape = layout.places[path], dict(zip(layout.paths, layout.shapes, strict=True))[path]
    index = np.arange(place.start, place.stop)
    if by == "leaf" or len(shape) == 0:
        yield index[None]
    elif isinstance(by, str):
        matrix = index.reshape(-1, shape[-1])  # (in, out)
        yield np.ascontiguousarray(matrix.T) if by == "out" else matrix
    else:
        whole = len(index) - len(index) % by
        yield from (part for part in (index[:whole].reshape(-1, by), index[None, whole:]) if part.size)


def _of_low_rank(h: LowRank, entries: Sequence[np.ndarray]) -> Iterator[np.ndarray]:
    gradients = np.asarray(h.gradients)
    for rows in entries:
        stack = np.empty((len(rows), rows.shape[1], rows.shape[1]))
        for at, out in zip(rows, stack, strict=True):
            run = at[-1] - at[0] == len(at) - 1  # a slice is copied once, not gathered
            part = gradients[:, at[0] : at[-1] + 1] if run else gradients[:, at]
            part = part.astype(np.float64)
            np.divide(part.T @ part, h.n, out=out)
        yield stack


def _of_products(h: Streamed, entries: Sequence[np.ndarray]) -> Iterator[np.ndarray]:
    for rows in entries:
        stack = np.empty((len(rows), rows.shape[1], rows.shape[1]))
        at = {int(e): (k, i) for k, row in enumerate(rows) for i, e in enumerate(row)}
        for columns, found in h.columns(rows.reshape(-1)):
            for column, values in zip(columns, found, strict=True):
                k, i = at[int(column)]
                stack[k, i] = values[rows[k]]
        yield (stack + np.swapaxes(stack, 1, 2)) / 2


@jax.jit
def _product(h: BlockDiagonal, direction: Tree) -> Tree:
    dtype = _tree.widest(direction)
    d = h.layout.vector(direction, dtype)
    found = jnp.asarray(h.ridge, dtype) * d
    for stack, at in zip(h.stacks, h.entries, strict=True):
        part = jnp.einsum("kij,kj->ki", stack.astype(dtype), d[at], precision=jax.lax.Precision.HIGHEST)
        found = found.at[at].add(part)
    return h.layout.tree(found, direction)
