"""Curvatures known by their products with vectors, streamed over the data, and what can be made of products."""

from __future__ import annotations

import abc
from collections.abc import Callable, Iterator, Sequence
from functools import cached_property, partial
from typing import Any, ClassVar, NoReturn

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float

from pruneopt import _linalg, _tree
from pruneopt.curvature.base import Curvature, check_memory, check_ridge
from pruneopt.curvature.diagonal import Diagonal
from pruneopt.network import calls
from pruneopt.network.batches import Batches, explained
from pruneopt.network.leaves import Rest, as_key, check_like

Tree = Any
_COLUMNS = 16  # products in one pass over the data
_LARGEST = 1e15  # of a direction: from there a curvature of 1e23 overflows float32, from less the data are to blame


class Streamed(Curvature):
    """A curvature of the mean over all examples of `batches`, whatever their sizes, that gives products alone.

    One product is a pass over the data. `dense`, `block` and the exact `diagonal` take a pass for every 16 columns.
    A subclass has the fields `chosen`, `rest` and `batches`, and defines its loss and the mean product over one batch.
    """

    chosen: Tree
    rest: Rest
    batches: Batches
    name: ClassVar[str]
    instead: ClassVar[str]

    @property
    @abc.abstractmethod
    def mean_loss(self) -> calls.Loss:
        """The loss whose curvature this is, of params and a batch."""

    @abc.abstractmethod
    def on_batch(self, chosen: Tree, rest: Rest, batch: Any, rows: Float[Array, "k p"]) -> Float[Array, "k p"]:
        """The products with k vectors, laid out as `layout`, of the curvature on one batch."""

    @property
    def layout(self) -> _tree.Layout:
        """Where the leaves lie in a vector."""
        return _tree.Layout.of(self.chosen)

    def mv(self, direction: Tree) -> Tree:
        """H d, in one pass. Raises ValueError for other shapes, and for a NaN or an infinity, naming the batch."""
        check_like(direction, self.chosen, "direction")
        row = self.layout.vector(direction, self._dtype)[None]
        return self.layout.tree(self._products(row)[0], direction)

    def diagonal(self, like: Tree) -> Tree:
        """The exact diagonal, p products, kept for later calls; `hutchinson` estimates it from a few."""
        return self.layout.tree(jnp.asarray(self._exact_diagonal), _tree.wide_shapes(like))

    @cached_property
    def _exact_diagonal(self) -> Float[np.ndarray, " p"]:
        p = self.layout.size
        found = np.empty(p, self._dtype)
        for at, rows in self.columns(np.arange(p)):
            found[at] = rows[np.arange(len(at)), at]
        return found

    def hutchinson(self, probes: int = 8, key: jax.Array | None = None) -> Diagonal:
        """The mean over probes of v * (H v), v of random signs: unbiased, and exact where H is diagonal.

        The variance of an entry is the sum of its row's squared off-diagonal entries over `probes`. The same probes
        serve every batch. key: defaults to seed 0. Source: Bekas, Kokiopoulou, Saad 2007, section 2.
        """
        if isinstance(probes, bool) or not hasattr(probes, "__index__") or probes < 1:
            raise ValueError(f"probes={probes!r} is not a whole number >= 1; pass the number of random sign vectors")
        keys = jax.random.split(as_key(key), probes)
        total = jnp.zeros(self.layout.size, self._dtype)
        for start in range(0, probes, _COLUMNS):
            signs = _signs(keys[start : start + _COLUMNS], total)
            total = total + jnp.sum(signs * self._products(signs), axis=0)
        return Diagonal(self.layout.tree(total / jnp.asarray(probes, total.dtype), _tree.wide_shapes(self.chosen)))

    def form(self, w: Tree, center: Tree, ridge: float) -> float:
        """<d, (H + ridge I) d>, d = w - center, with the function, its data and d in float64.

        A function that cannot be traced in float64, because it fixes float32 within, is taken in its own precision.
        """
        with jax.enable_x64(True):
            d = self.layout.host(w) - self.layout.host(center)
            return float(d @ np.asarray(self._products(jnp.asarray(d)[None]))[0] + ridge * d @ d)

    def columns(self, indices: np.ndarray) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """(indices, the columns of H there as rows), a few at a time; the last ones again where they do not divide."""
        size = min(_COLUMNS, len(indices))
        for start in range(0, len(indices), size):
            at = indices[max(0, min(start, len(indices) - size)) :][:size]
            rows = np.zeros((size, self.layout.size), self._dtype)
            rows[np.arange(size), at] = 1
            yield at, np.asarray(self._products(jnp.asarray(rows)))

    def block(self, which: str | slice | Sequence[int], memory: int = 1 << 31) -> Float[np.ndarray, "k k"]:
        """The square of H on some entries of the vector: a leaf by its path, a slice, or indices. k products.

        Raises ValueError where it would take more than `memory` bytes.
        """
        at = np.arange(self.layout.size)[self.layout.place(which)]
        check_memory("block", (len(at), len(at)), self._dtype, memory, "ask for fewer entries, or use mv")
        found = np.empty((len(at), len(at)), self._dtype)
        where = {int(index): i for i, index in enumerate(at)}
        for columns, rows in self.columns(at):
            found[[where[int(c)] for c in columns]] = rows[:, at]
        return found

    def dense(self, memory: int = 1 << 31) -> Float[np.ndarray, "p p"]:
        """H. Raises ValueError where it would take more than `memory` bytes."""
        p = self.layout.size
        check_memory("dense()", (p, p), self._dtype, memory, f"use mv, block or hutchinson, or {self.instead}")
        return self.block(slice(0, p), memory)

    def solve(self, b: Tree, ridge: float = 0.0, memory: int = 1 << 31) -> Tree:
        """(H + ridge I)^-1 b from the dense matrix, factored in float64.

        Raises ValueError for an indefinite or singular matrix, with its least eigenvalue, or above `memory` bytes.
        """
        check_ridge(ridge)
        h = np.asarray(self.dense(memory), np.float64)
        h = (h + h.T) / 2 + ridge * np.eye(len(h))
        try:
            found = _linalg.cholesky_solve(_linalg.cholesky(h), self.layout.host(b))
        except np.linalg.LinAlgError:
            least = float(_linalg.eigvalsh(h)[0])
            raise ValueError(
                f"ridge={ridge!r}: the {self.name} + ridge I is not positive definite, its least eigenvalue is "
                f"{least:.3g}; pass ridge > {ridge - least:.3g}, or {self.instead}"
            ) from None
        return jax.tree.map(jnp.asarray, self.layout.tree(found, b))

    @property
    def _dtype(self) -> Any:
        return _tree.widest(self.chosen)

    def _products(self, rows: Float[Array, "k p"]) -> Float[Array, "k p"]:
        """Mean over the examples, in the dtype of `rows`; in float64 all that is floating becomes float64.

        A function that fixes its dtype within, as the carry of a scan may, has no float64: it is then taken as it is.
        """
        if rows.dtype != jnp.float64:
            return self._products_of(rows, lambda tree: tree)
        try:
            return self._products_of(rows, _tree.float64)
        except TypeError:
            with jax.enable_x64(False):
                found = self._products_of(_narrowed(rows), _narrowed)
            return jnp.asarray(found, jnp.float64)

    def _products_of(self, rows: Float[Array, "k p"], cast: Callable[[Tree], Tree]) -> Float[Array, "k p"]:
        chosen, rest = cast(self.chosen), cast(self.rest)
        total, n = jnp.zeros_like(rows), 0.0
        for batch in self.batches:
            size = self.batches.weight(batch)
            total, n = _added(total, self.on_batch(chosen, rest, cast(batch), rows), size), n + size
        mean, finite = _mean(total, n)
        if not finite:
            self._blame(rows, cast)
        return mean

    def _blame(self, rows: Float[Array, "k p"], cast: Callable[[Tree], Tree]) -> NoReturn:
        """Raise ValueError for products that are not finite: `rows`, or the first batch that makes them so."""
        if not bool(jnp.all(jnp.abs(rows) < _LARGEST)):
            raise ValueError(
                f"direction: it holds a NaN or entries above {_LARGEST:g}, and its product with the {self.name} is not "
                f"finite: a solver that diverges along an indefinite matrix asks for that; {self.instead}"
            )
        chosen, rest = cast(self.chosen), cast(self.rest)
        for index, batch in enumerate(self.batches):
            if not bool(jnp.all(jnp.isfinite(self.on_batch(chosen, rest, cast(batch), rows)))):
                calls.check_value(self.mean_loss, chosen, rest, cast(batch), f"batches: batch {index}")
                raise ValueError(
                    f"batches: batch {index}: the {self.name} of fn holds a NaN or an infinity{explained(batch)}; "
                    "repair that batch, or the loss there"
                )
        raise ValueError(f"the {self.name} of fn overflows, summed over batches; scale fn down")


@partial(jax.jit, donate_argnums=0)
def _added(total: Float[Array, "k p"], part: Float[Array, "k p"], size: float) -> Float[Array, "k p"]:
    return total + part * jnp.asarray(size).astype(total.dtype)


@jax.jit
def _mean(total: Float[Array, "k p"], n: float) -> tuple[Float[Array, "k p"], Bool[Array, ""]]:
    mean = total / jnp.asarray(n).astype(total.dtype)
    return mean, jnp.all(jnp.isfinite(mean))


def over_rows(product: Any, layout: _tree.Layout, like: Tree, rows: Float[Array, "k p"]) -> Float[Array, "k p"]:
    """product(tree) -> tree for each row, one after another: the memory of one. Traceable.

    One row alone stands in no loop, in which convolutions on a CPU take seven times as long.
    """
    one = lambda row: layout.vector(product(layout.tree(row, like)), row.dtype)  # noqa: E731
    return one(rows[0])[None] if len(rows) == 1 else jax.lax.map(one, rows)


@jax.jit
def _signs(keys: Array, like: Float[Array, " p"]) -> Float[Array, "k p"]:
    """Random signs, a row a key; one draw for the whole tree: compiling the generator for each leaf takes seconds."""
    draw = jax.lax.map(lambda key: jax.random.bits(key, like.shape, jnp.uint8), keys) < 128
    return jnp.where(draw, jnp.ones((), like.dtype), -jnp.ones((), like.dtype))


def _narrowed(tree: Tree) -> Tree:
    """Arrays in float64 in float32."""
    is_wide = lambda x: _tree.is_array(x) and x.dtype == np.float64  # noqa: E731
    return jax.tree.map(lambda x: np.asarray(x, np.float32) if is_wide(x) else x, tree)
