"""Kronecker factors (K-FAC): for each operator the Gram of its inputs times that of its output gradients."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from pruneopt import _linalg, _tree
from pruneopt.capture.statistics import capture
from pruneopt.curvature.base import Curvature, check_memory, check_ridge, is_semidefinite
from pruneopt.network import calls
from pruneopt.network.batches import Source
from pruneopt.network.leaves import Choice
from pruneopt.structure.defaults import loss_network
from pruneopt.structure.graph import trace

Tree = Any
_SINGULAR = 1e-14  # of the largest eigenvalue: 45 roundings of float64, to which `eigh` does not know them


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Kronecker(Curvature):
    """H = A (x) S + ridge I for each operator y = x W of n_in inputs and n_out outputs: H W = A W S + ridge W.

    A = 1/n sum of x x^T over the positions of n examples; S = mean over positions of g g^T, g the gradient of an
    example's loss in y. With one position an example and x independent of g it is the Fisher; over several positions,
    their gradients are taken as uncorrelated (Grosse and Martens 2016, section 3). Nothing between operators.

    inputs: A, (problems, n_in, n_in) each; outputs: S, (problems, n_out, n_out). entries: where each weight of the
    operator's matrices lies in the vector, (problems, n_in, n_out). `form`, `solve` and `inverse_diagonal` are in
    float64 on the host. Source: Martens and Grosse 2015.
    """

    inputs: tuple[Float[Array, "problems n_in n_in"], ...]
    outputs: tuple[Float[Array, "problems n_out n_out"], ...]
    entries: tuple[Int[Array | np.ndarray, "problems n_in n_out"], ...]
    layout: _tree.Layout = field(metadata={"static": True})
    ridge: float = field(default=0.0, metadata={"static": True})

    @staticmethod
    def of(loss: calls.Loss, params: Tree, batches: Source, leaves: Choice = None, *, ridge: float = 0.0) -> Kronecker:
        """The factors of loss(params, batch), a mean over examples, captured in one pass over the data.

        The labels of the loss make it the empirical Fisher's; for the true one, draw them from the model.
        Raises ValueError for a leaf that no operator reads, or reads scaled or twice, or that is looked up by index
        too; as `capture`.
        """
        check_ridge(ridge)
        network = loss_network(loss, params, batches, leaves)
        chosen, stream = network.chosen, network.batches
        layout = _tree.Layout.of(chosen)
        found = capture(loss, params, stream, leaves=network.leaves, output_gradients=True)
        n = sum(map(stream.examples, stream))
        graph = trace(loss, params, next(iter(stream)))
        looked_up = {path for look in graph.lookups for path in look.paths} & set(layout.paths)
        if looked_up:
            raise ValueError(
                f"leaves: '{min(looked_up)}' is looked up by index too, as a tied embedding is, which the factors of "
                "its product do not see; leave it out of leaves="
            )
        entries = tuple(_entries(graph.operator(name), params, layout) for name in found)
        if not np.array_equal(np.sort(np.concatenate([e.reshape(-1) for e in entries])), np.arange(layout.size)):
            raise ValueError("leaves: some weights stand in no operator, or in several; choose leaves read once each")
        grams: dict[str, Any] = {name: statistics.gram for name, statistics in found.items()}
        slopes: dict[str, Any] = {name: statistics.output_gradient for name, statistics in found.items()}
        each = {name: (s.count / n)[:, None, None].astype(grams[name].dtype) for name, s in found.items()}  # positions
        inputs = tuple(gram * each[name] for name, gram in grams.items())
        return Kronecker(inputs, tuple(slopes.values()), entries, layout, float(ridge))

    @cached_property
    def semidefinite(self) -> bool:
        """Whether all factors are, checked, and the ridge is not negative."""
        factors = (m for stack in self.inputs + self.outputs for m in np.asarray(stack))
        return self.ridge >= 0 and all(map(is_semidefinite, factors))

    def mv(self, direction: Tree) -> Tree:
        """A D S + ridge D for each operator."""
        return _product(self, direction)

    def diagonal(self, like: Tree) -> Tree:
        """diag(A) diag(S)^T plus the ridge."""
        of = lambda m: np.diagonal(m, axis1=1, axis2=2)  # noqa: E731
        parts = [of(a)[:, :, None] * of(s)[:, None] for a, s in zip(self.inputs, self.outputs, strict=True)]
        return self.layout.tree(jnp.asarray(self._joined(parts) + self.ridge), _tree.wide_shapes(like))

    def form(self, w: Tree, center: Tree, ridge: float) -> float:
        """<d, (H + ridge I) d>, d = w - center, in float64."""
        d = self.layout.host(w) - self.layout.host(center)
        total = (self.ridge + ridge) * (d @ d)
        for a, s, at in zip(self.inputs, self.outputs, self.entries, strict=True):
            part = d[np.asarray(at)]
            total += np.sum(part * (np.asarray(a, np.float64) @ part @ np.asarray(s, np.float64)))
        return float(total)

    def dense(self, memory: int = 1 << 31) -> Float[np.ndarray, "p p"]:
        """H. Raises ValueError where it would take more than `memory` bytes."""
        p = self.layout.size
        check_memory("dense()", (p, p), np.float64, memory, "use mv, block or solve")
        return self.block(slice(0, p))

    def block(self, which: str | slice | Sequence[int]) -> Float[np.ndarray, "k k"]:
        """The square of H on some entries of the vector: a leaf by its path, a slice, or indices."""
        wanted = np.arange(self.layout.size)[self.layout.place(which)]
        place = np.full(self.layout.size, -1)
        place[wanted] = np.arange(len(wanted))
        found = self.ridge * np.eye(len(wanted))
        for a, s, at in zip(self.inputs, self.outputs, self.entries, strict=True):
            for a_, s_, at_ in zip(np.asarray(a, float), np.asarray(s, float), np.asarray(at), strict=True):
                i, j = np.nonzero(place[at_] >= 0)
                to = place[at_[i, j]]
                found[np.ix_(to, to)] += a_[np.ix_(i, i)] * s_[np.ix_(j, j)]
        return found

    def solve(self, b: Tree, ridge: float = 0.0) -> Tree:
        """(H + ridge I)^-1 b = U ((U^T B V) / (a s^T + r)) V^T with A = U a U^T, S = V s V^T, r = self.ridge + ridge.

        Raises ValueError for r = 0 where a factor is singular.
        """
        flat = self.layout.host(b)
        found = np.empty_like(flat)
        for at, u, v, bend in self._bends(ridge):
            found[at] = u @ ((np.swapaxes(u, 1, 2) @ flat[at] @ v) / bend) @ np.swapaxes(v, 1, 2)
        return jax.tree.map(jnp.asarray, self.layout.tree(found, b))

    def inverse_diagonal(self, ridge: float = 0.0) -> Tree:
        """diag((H + ridge I)^-1) = U^2 (1 / (a s^T + r)) (V^2)^T, as float64 NumPy arrays. As `solve`."""
        found = np.empty(self.layout.size)
        for at, u, v, bend in self._bends(ridge):
            found[at] = u**2 @ (1 / bend) @ np.swapaxes(v**2, 1, 2)
        return self.layout.tree(found)

    @cached_property
    def _spectra(self) -> list[tuple[Any, Any]]:
        """Eigenvalues and eigenvectors of A and S of each operator, in float64; made once."""
        spectrum = lambda m: _linalg.eigh(np.asarray(m, np.float64))  # noqa: E731
        return [(spectrum(a), spectrum(s)) for a, s in zip(self.inputs, self.outputs, strict=True)]

    def _bends(self, ridge: float) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]]:
        """(entries, U, V, the eigenvalues of H + ridge I) of each operator."""
        check_ridge(ridge)
        for ((a, u), (s, v)), at in zip(self._spectra, self.entries, strict=True):
            bend = np.maximum(a, 0)[:, :, None] * np.maximum(s, 0)[:, None] + self.ridge + ridge
            if np.min(bend) <= _SINGULAR * np.max(bend):
                raise ValueError(
                    f"ridge={ridge!r}, with which the Kronecker factors have no inverse; pass ridge > 0, such as 1e-3 "
                    "times the mean of the diagonal"
                )
            yield np.asarray(at), u, v, bend

    def _joined(self, parts: Sequence[np.ndarray]) -> np.ndarray:
        found = np.empty(self.layout.size, np.result_type(*parts))
        for part, at in zip(parts, self.entries, strict=True):
            found[np.asarray(at)] = part
        return found


def _entries(op: Any, params: Tree, layout: _tree.Layout) -> np.ndarray:
    """Where each weight of an operator's matrices lies in the vector: its matrix of a tree that holds the places.

    Raises ValueError where it is more than a rearrangement, such as a scale.
    """
    with jax.enable_x64(True):
        wide = {p: jnp.asarray(x, jnp.float64) for p, x in _tree.named_leaves(params) if p in op.paths + op.scaled_by}
        indices = dict(
            zip(layout.paths, jax.tree.leaves(layout.tree(np.arange(layout.size, dtype=np.float64))), strict=True)
        )
        found = np.asarray(op.to_matrix(wide | {p: jnp.asarray(x) for p, x in indices.items() if p in op.paths}))
    if op.scaled_by or not np.array_equal(found, np.rint(found)):
        raise ValueError(f"leaves: '{op.name}' is scaled or rounded on its way to the product; leave it out of leaves=")
    return found.astype(np.int64)


@jax.jit
def _product(h: Kronecker, direction: Tree) -> Tree:
    dtype = _tree.widest(direction)
    d = h.layout.vector(direction, dtype)
    found = jnp.asarray(h.ridge, dtype) * d
    for a, s, at in zip(h.inputs, h.outputs, h.entries, strict=True):
        half = jnp.matmul(a.astype(dtype), d[at], precision=jax.lax.Precision.HIGHEST)
        found = found.at[at].add(jnp.matmul(half, s.astype(dtype), precision=jax.lax.Precision.HIGHEST))
    return h.layout.tree(found, direction)
