"""Transposable N:M sparsity: N:M along the inputs and along the outputs at once."""

from __future__ import annotations

import itertools
import operator
from dataclasses import dataclass, replace
from functools import cache, partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Bool, Float, Int, Shaped

from pruneopt import _tree
from pruneopt.constraints.base import Constraint, check_cut, check_orientation
from pruneopt.constraints.parts import Choice, Parts

Tree = Any

# Weights to work on at a time: few enough to stay in a CPU's cache, many enough to fill its vectors.
_ENTRIES = 1 << 16


@dataclass(frozen=True)
class TransposableNM(Constraint):
    """At most `n` of every `m` consecutive weights along the inputs and along the outputs are nonzero.

    So W and W^T are both N:M sparse, and the backward pass of training runs on sparse tensor cores too. `m` must
    divide the last two axes of every leaf (JAX's layout (..., n_in, n_out)).

    `select` maximises the sum of the scores over each m x m tile: a transportation problem with unit capacities. It
    keeps fewer than n m weights of a tile where that gives the larger sum. A tile with negative scores is raised by
    its least score first, so that keeping more is never worse. Optimal up to the rounding of a sum, for every m: by a
    table of all maximal masks for m <= 4, else by cancelling cycles (Klein 1967) from the greedy choice on, many
    tiles side by side: about m^3 operations a tile and cycle, and O(2^16) entries beyond masks and scores.
    Source of the problem: Hubara et al. 2021, section 4; for large m TSENOR (Meng, Makni, Mazumder 2025).
    """

    n: int
    m: int

    def __post_init__(self) -> None:
        for name in ("n", "m"):
            if hasattr(getattr(self, name), "__index__"):
                object.__setattr__(self, name, operator.index(getattr(self, name)))
        if not (isinstance(self.n, int) and isinstance(self.m, int) and 1 <= self.n <= self.m):
            raise ValueError(f"n={self.n!r}, m={self.m!r}: N:M needs whole numbers 1 <= n <= m, such as n=2, m=4")

    @property
    def exact(self) -> bool:
        """True."""
        return True

    def described(self, ndim: int | None = None) -> Parts:
        """Tiles of m x m weights; nothing where n = m."""
        if self.n == self.m:
            return Parts()
        return Parts(choices=(Choice(self, (self.m, self.m), group=(self.n, self.m)),))

    def check(self, variable: Tree) -> None:
        """Raise ValueError for a leaf whose inputs and outputs are not known, or `m` does not divide."""
        check_orientation(repr(self), variable)
        for path, leaf in _tree.named_leaves(variable):
            if leaf.shape[-2] % self.m or leaf.shape[-1] % self.m:
                raise ValueError(
                    f"m={self.m} does not divide the {leaf.shape[-2]} inputs and {leaf.shape[-1]} outputs of leaf "
                    f"'{path}'; leave that leaf out with leaves=, or choose another m"
                )

    def select(self, scores: Tree) -> Tree:
        """The best mask of each tile; traceable by JAX."""
        return jax.tree.map(lambda leaf: _select(jnp.asarray(leaf), self.n, self.m), scores)

    def violation(self, support: Tree) -> int:
        """Weights above n, summed over the rows and the columns of all tiles."""
        over = 0
        for leaf in jax.tree.leaves(support):
            tiles = _tiles(jnp.asarray(leaf), self.m)
            for axis in (1, 2):
                kept = np.asarray(jnp.sum(tiles, axis=axis, dtype=jnp.int32))
                over += int(np.maximum(kept.astype(np.int64) - self.n, 0).sum())
        return over

    @property
    def is_oriented(self) -> bool:
        """True."""
        return True

    def scope(self, by_layer: bool = False) -> str:
        """n of every m both ways."""
        return f"{self.n} of every {self.m} along the inputs and along the outputs"

    def density(self, variable: Tree) -> float:
        """n / m."""
        return self.n / self.m

    def relaxed(self, cut: float) -> TransposableNM:
        """n' : m with n' = m - floor(cut (m - n))."""
        check_cut(cut)
        return replace(self, n=self.m - int((self.m - self.n) * cut + 1e-9))


def _tiles(leaf: Shaped[Array, "... i o"], m: int) -> Shaped[Array, "t m m"]:
    *_, i, o = leaf.shape
    return jnp.swapaxes(leaf.reshape(-1, i // m, m, o // m, m), 2, 3).reshape(-1, m, m)


def _untiled(tiles: Shaped[Array, "t m m"], shape: tuple[int, ...]) -> Shaped[Array, "..."]:
    m, (i, o) = tiles.shape[-1], shape[-2:]
    return jnp.swapaxes(tiles.reshape(-1, i // m, o // m, m, m), 2, 3).reshape(shape)


@partial(jax.jit, static_argnums=(1, 2))
def _select(scores: Float[Array, "... i o"], n: int, m: int) -> Bool[Array, "... i o"]:
    tiles = _tiles(scores.astype(_tree.wide(scores.dtype)), m)
    count = tiles.shape[0]
    chunk = min(count, max(1, _ENTRIES // m**2))
    padded = jnp.pad(tiles, ((0, -count % chunk), (0, 0), (0, 0)), constant_values=-jnp.inf)
    masks = lax.map(partial(_select_tiles, n), padded.reshape(-1, chunk, m, m))
    return _untiled(masks.reshape(-1, m, m)[:count], scores.shape)


def _select_tiles(n: int, scores: Float[Array, "t m m"]) -> Bool[Array, "t m m"]:
    cells = jnp.moveaxis(scores, 0, -1)  # tiles side by side, one in each lane of a vector
    live, forced = cells > -jnp.inf, cells == jnp.inf
    free = live & ~forced
    finite = jnp.where(free, cells, 0)
    top = jnp.max(jnp.abs(finite), axis=(0, 1), keepdims=True)
    small = jnp.where(top > 1, 2.0**-8, 1.0).astype(cells.dtype)  # XLA may multiply by 1 / top: not to be subnormal
    scaled = (finite * small) / jnp.where(top > 0, top * small, 1)
    value = jnp.where(free, scaled - jnp.min(scaled, axis=(0, 1), keepdims=True, initial=0), 0)  # in [0, 2]
    if scores.shape[-1] <= 4:
        best = _from_table(value, forced, n) & live
    else:
        greedy = _filled(jnp.zeros_like(live), live, n, jnp.where(forced, jnp.inf, value))
        best = _improved(value, forced, live, greedy, n)
    return jnp.moveaxis(_filled(best, live, n), -1, 0)


def _filled(
    mask: Bool[Array, "m m t"], live: Bool[Array, "m m t"], n: int, first: Float[Array, "m m t"] | None = None
) -> Bool[Array, "m m t"]:
    """`mask` with every live cell that still fits, tried in the order of `first`, largest first, or of the cells."""
    m, _, t = mask.shape
    wanted = (live & ~mask).reshape(m * m, t)
    place = jnp.arange(m * m, dtype=jnp.int32)[:, None]
    if first is not None:
        place = jnp.argsort(first.reshape(m * m, t), axis=0, descending=True, stable=True).astype(jnp.int32)
        wanted = jnp.take_along_axis(wanted, place, axis=0)
    index = jnp.arange(m, dtype=jnp.int32)[:, None]

    def step(sums, cell):
        rows, columns = sums
        place, wanted = cell
        row, column = index == (place // m)[None], index == (place % m)[None]
        fits = wanted & ~jnp.any((row & (rows >= n)) | (column & (columns >= n)), axis=0)
        add = lambda sums, here: sums + (here & fits[None]).astype(jnp.int32)  # noqa: E731
        return (add(rows, row), add(columns, column)), fits

    sums = jnp.sum(mask, axis=1, dtype=jnp.int32), jnp.sum(mask, axis=0, dtype=jnp.int32)
    _, taken = lax.scan(step, sums, (place, wanted))
    if first is not None:
        taken = jnp.zeros_like(taken).at[place, jnp.arange(t)[None]].set(taken)
    return mask | taken.reshape(m, m, t)


@cache
def _table(n: int, m: int) -> np.ndarray:
    """Every maximal mask as a row of m^2 booleans: larger ones first, then those of earlier cells."""
    rows = [np.isin(range(m), c) for k in range(n + 1) for c in itertools.combinations(range(m), k)]
    masks = [np.zeros((0, m), bool)]
    for _ in range(m):
        masks = [np.vstack([x, row]) for x in masks for row in rows if (x.sum(0) + row <= n).all()]
    table = np.array(masks)
    room = (table.sum(2)[:, :, None] < n) & (table.sum(1)[:, None, :] < n)
    table = table[~(room & ~table).any((1, 2))].reshape(-1, m * m)
    return table[np.lexsort((*~table.T[::-1], -table.sum(1)))]


def _from_table(value: Float[Array, "m m t"], forced: Bool[Array, "m m t"], n: int) -> Bool[Array, "m m t"]:
    """The first mask of the largest sum among those that drop the fewest forced cells."""
    m, _, t = value.shape
    dtype = value.dtype
    table = _table(n, m)
    # A price on dropping, not a prize for keeping: where all forced cells fit it is zero and costs no precision.
    price = jnp.where(forced, jnp.asarray(-(2 * m * m + 1), dtype), 0)
    terms = jnp.concatenate([value.reshape(m * m, t), price.reshape(m * m, t)])
    sums = jnp.matmul(jnp.asarray(np.hstack([table, ~table]), dtype), terms, precision=lax.Precision.HIGHEST)
    largest = jnp.max(sums, axis=0, keepdims=True)
    tied = sums >= largest - 8 * float(jnp.finfo(dtype).eps) * jnp.abs(largest)
    number = jnp.arange(len(table), dtype=jnp.int32)[:, None]
    return jnp.asarray(table.T)[:, jnp.min(jnp.where(tied, number, len(table) - 1), axis=0)].reshape(m, m, t)


def _improved(
    value: Float[Array, "m m t"],
    forced: Bool[Array, "m m t"],
    live: Bool[Array, "m m t"],
    chosen: Bool[Array, "m m t"],
    n: int,
) -> Bool[Array, "m m t"]:
    """`chosen` until no augmenting cycle is left: then no mask that keeps its forced cells has a larger sum.

    The residual graph has a node for each row and column, and a hub. Row i -> column j gains value_ij where that cell
    is not chosen, column j -> row i loses it where it is; the hub leads to rows with room, and from columns with
    room; back from rows, and to columns, with a unit to give up. Bellman-Ford finds cycles that gain; those of one
    pass share no node and are taken together. A tile is done when its potentials stand still.
    """
    m, _, t = value.shape
    eps = float(jnp.finfo(value.dtype).eps)

    def start():
        return tuple((jnp.zeros((k, t), value.dtype), jnp.full((k, t), 2 * m + 1, jnp.int32)) for k in (m, m, 1))

    def step(state):
        chosen, nodes, _ = state
        one_pass = partial(_one_pass, value=value, barred=(~live | chosen, ~chosen | forced), chosen=chosen, n=n)
        before, nodes = lax.fori_loop(0, 3, lambda _, last: (last[1], one_pass(last[1])), (nodes, nodes))
        moved = jnp.any(jnp.concatenate([a[0] != b[0] for a, b in zip(before, nodes, strict=True)]), axis=0)
        change, cyclic = _cycles(*(parent for _, parent in nodes))
        gain = jnp.sum(jnp.where(change, jnp.where(chosen, -value, value), 0), axis=(0, 1))
        gains = gain > 4 * m * eps  # above the rounding of this sum, so that no tile can go round in circles
        nodes = jax.tree.map(lambda new, old: jnp.where(gains[None], new, old), start(), nodes)
        return chosen ^ (change & gains[None, None]), nodes, gains | (moved & ~cyclic)

    state = (chosen, start(), jnp.ones((t,), bool))
    return lax.while_loop(lambda state: jnp.any(state[2]), step, state)[0]


# (potential, parent) of some nodes of each tile. Nodes are numbered: rows, columns, the hub; 2 m + 1 is none.
_Node = tuple[Float[Array, "k t"], Int[Array, "k t"]]


def _one_pass(
    nodes: tuple[_Node, _Node, _Node],
    value: Float[Array, "m m t"],
    barred: tuple[Bool[Array, "m m t"], Bool[Array, "m m t"]],
    chosen: Bool[Array, "m m t"],
    n: int,
) -> tuple[_Node, _Node, _Node]:
    """A pass of Bellman-Ford over columns, hub and rows; barred: the cells with no way to the column, to the row."""
    rows, columns, center = nodes
    m = value.shape[0]
    index, none = jnp.arange(m, dtype=jnp.int32), jnp.asarray(-jnp.inf, value.dtype)
    from_row, from_column = index[:, None, None], m + index[None, :, None]
    from_hub = jnp.full((1, 1, 1), 2 * m, jnp.int32)
    in_row, in_column = (jnp.sum(chosen, axis=a, dtype=jnp.int32)[None] for a in (1, 0))
    to_column, to_row = (jnp.where(b, none, sign * value) for b, sign in zip(barred, (1, -1), strict=True))
    columns = _raised(
        columns,
        (rows[0][:, None] + to_column, from_row, 0),
        (jnp.where(in_column > 0, center[0][None], none), from_hub, 0),
    )
    center = _raised(
        center,
        (jnp.where(in_row > 0, rows[0][None], none), jnp.swapaxes(from_row, 0, 1), 1),
        (jnp.where(in_column < n, columns[0][None], none), from_column, 1),
    )
    rows = _raised(
        rows,
        (columns[0][None] + to_row, from_column, 1),
        (jnp.where(in_row < n, center[0][None], none), from_hub, 0),
    )
    return rows, columns, center


def _raised(node: _Node, *ways: tuple[Float[Array, "a b t"], Int[Array, "a b 1"], int]) -> _Node:
    """The larger of a node's potential and what the best of each way (gains, sources, axis of sources) leads to."""
    potential, parent = node
    eps = float(jnp.finfo(potential.dtype).eps)
    last = jnp.asarray(jnp.iinfo(jnp.int32).max, jnp.int32)
    for gains, source, axis in ways:
        gain = jnp.max(gains, axis=axis)
        first = jnp.min(jnp.where(gains == jnp.expand_dims(gain, axis), source, last), axis=axis)
        better = gain > potential + 8 * eps
        potential, parent = jnp.where(better, gain, potential), jnp.where(better, first, parent)
    return potential, parent


def _cycles(
    row_from: Int[Array, "m t"], column_from: Int[Array, "m t"], hub_from: Int[Array, "1 t"]
) -> tuple[Bool[Array, "m m t"], Bool[Array, "t"]]:
    """The cells that cycles of parents change, and the tiles that have any."""
    m, t = row_from.shape
    index = jnp.arange(m, dtype=jnp.int32)
    ancestor = jnp.concatenate([row_from, column_from, hub_from, jnp.full((1, t), 2 * m + 1, jnp.int32)])
    for _ in range((2 * m).bit_length()):  # of the 2^k-th generation, past which only cycles have any
        ancestor = jnp.take_along_axis(ancestor, ancestor, axis=0)
    cyclic = jnp.any(ancestor[None] == jnp.arange(2 * m, dtype=jnp.int32)[:, None, None], axis=1)
    change = (cyclic[None, m:] & (column_from[None] == index[:, None, None])) | (
        cyclic[:m, None] & (row_from[:, None] == m + index[None, :, None])
    )
    return change, jnp.any(cyclic, axis=0)
