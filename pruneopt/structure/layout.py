"""How the leaves of params become the matrices (n_in, n_out) that a network multiplies."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Shaped

from pruneopt import _tree
from pruneopt.structure.graph import Graph, trace
from pruneopt.structure.operators import Operator

Tree = Any


@dataclass(frozen=True, eq=False)
class Slot:
    """One place for weights: `problems` matrices (n_in, n_out), y = x W, made of one or several leaves.

    name: for messages. paths: its leaves. shape: (n_in, n_out), or (problems, n_in, n_out) of several problems.
    operators: what reads them, stacked in this order; none for a leaf taken as it lies, whose last axis is n_out.
    again: whether another slot holds the same weights. It stands for its leaf in a tree of shapes.
    """

    name: str
    paths: tuple[str, ...]
    shape: tuple[int, ...]
    dtype: Any
    leaf_shapes: tuple[tuple[int, ...], ...]
    operators: tuple[Operator, ...] = field(default=(), repr=False)
    again: bool = False

    @classmethod
    def of(cls, operators: Sequence[Operator], leaves: Mapping[str, Any], name: str = "") -> Slot:
        """The matrices of operators that read the same leaves, all of one shape, as one stack."""
        one, problems = operators[0], sum(op.problems for op in operators)
        shape = (one.n_in, one.n_out) if problems == 1 else (problems, one.n_in, one.n_out)
        shapes = tuple(tuple(np.shape(leaves[path])) for path in one.paths)
        return cls(name or one.name, one.paths, shape, one.dtype, shapes, tuple(operators))

    @classmethod
    def plain(cls, path: str, leaf: Any) -> Slot:
        """A leaf that lies as its matrix does: inputs first, the output last."""
        shape = tuple(leaf.shape)
        return cls(path, (path,), (math.prod(shape[:-1]), shape[-1]), leaf.dtype, (shape,))

    @property
    def ndim(self) -> int:
        """2, or 3 for several problems."""
        return len(self.shape)

    @property
    def problems(self) -> int:
        """How many matrices."""
        return self.shape[0] if self.ndim == 3 else 1

    @property
    def size(self) -> int:
        """Number of weights."""
        return math.prod(self.shape)

    def resized(self, shape: tuple[int, ...]) -> Slot:
        """The same place with a unit for each block of weights."""
        return replace(self, shape=shape)

    def kind_of(self, axis: int) -> str:
        """What an axis of the leaf is in the matrices: "in", "out", "problem", or "" where it is none of them alone."""
        shape = self.leaf_shapes[0]
        if len(self.paths) > 1 or not -len(shape) <= axis < len(shape):
            return ""
        at = np.unravel_index(self._read_places(), shape)[axis % len(shape)]
        along = [n for n in range(3) if at.shape[n] > 1 and np.any(np.diff(at, axis=n))]
        if len(along) > 1 or (len(along) == 1 and len(np.unique(at)) < at.shape[along[0]]):
            return ""
        return ("problem", "in", "out")[along[0]] if along else "problem"

    def stack(self, leaves: Mapping[str, Any]) -> Shaped[Array, "*problems n_in n_out"]:
        """The matrices of leaves {path: array}, such as scores or masks. Traceable by JAX."""
        if self._order is not None:
            return jnp.transpose(jnp.asarray(leaves[self.paths[0]]), self._order).reshape(self.shape)
        flat = [jnp.asarray(leaves[path]).reshape(-1) for path in self.paths]
        return jnp.concatenate(flat)[self._places]

    def leaves(self, stack: Shaped[Array, "*problems n_in n_out"], elsewhere: Mapping[str, Any]) -> dict[str, Any]:
        """{path: leaf}: the entries of `stack` where they stand, those of `elsewhere` where this slot reads none."""
        if self._order is not None:
            (shape,), order = self.leaf_shapes, self._order
            back = np.argsort(order)
            return {self.paths[0]: jnp.transpose(stack.reshape([shape[a] for a in order]), back.tolist())}
        given = stack.reshape(-1)
        found = {}
        for path, shape, source in zip(self.paths, self.leaf_shapes, self._sources, strict=True):
            new = given[np.maximum(source, 0)].reshape(shape)
            held = elsewhere.get(path)
            is_read = source.reshape(shape) >= 0
            found[path] = new if is_read.all() or held is None else jnp.where(is_read, new, held)
        return found

    def _read_places(self) -> np.ndarray:
        """(problems, n_in, n_out): where each entry stands among the leaves, laid flat one after the other."""
        if not self.operators:
            shape = self.leaf_shapes[0]
            return np.arange(math.prod(shape)).reshape(1, -1, shape[-1])
        return np.concatenate([op.places() for op in self.operators])

    @cached_property
    def _places(self) -> np.ndarray:
        """The same, kept for stacks that are no leaf in another order of its axes."""
        return self._read_places().reshape(self.shape)

    @cached_property
    def _sources(self) -> list[np.ndarray]:
        """For each leaf, flat: which entry of the stack each of its entries is; -1 for none."""
        sizes = [math.prod(shape) for shape in self.leaf_shapes]
        source = np.full(sum(sizes), -1)
        source[self._places.reshape(-1)] = np.arange(self.size)
        return np.split(source, np.cumsum(sizes)[:-1])

    @cached_property
    def _order(self) -> tuple[int, ...] | None:
        """The order of the leaf's axes in which its entries lie in the stack one after the other, if there is one."""
        if len(self.paths) > 1 or math.prod(self.leaf_shapes[0]) != self.size or len(self.leaf_shapes[0]) > 6:
            return None
        places, shape = self._read_places().reshape(-1), self.leaf_shapes[0]
        index = np.arange(self.size).reshape(shape)
        few = np.unique(np.linspace(0, self.size - 1, 64).astype(int))
        for order in itertools.permutations(range(len(shape))):
            laid = np.transpose(index, order).reshape(-1)
            if np.array_equal(laid[few], places[few]) and np.array_equal(laid, places):
                return order
        return None

    def read(self) -> dict[str, Any]:
        """{path: which entries of the leaf stand here}."""
        if self._order is not None:
            return {self.paths[0]: np.True_}
        rows = zip(self.paths, self.leaf_shapes, self._sources, strict=True)
        return {path: source.reshape(shape) >= 0 for path, shape, source in rows}


@dataclass(frozen=True, eq=False)
class Layout:
    """The matrices of a network's leaves, from its trace.

    refused: the leaves of products that could not be read. why_not: path -> why no product reads it.
    """

    slots: tuple[Slot, ...]
    refused: frozenset[str] = field(repr=False)
    why_not: Callable[[str], str] = field(repr=False)

    def of(self, tree: Tree) -> dict[str, Slot]:
        """{name: slot} of the leaves of `tree`, arrays or shapes with holes, in their order.

        A leaf in no product at all lies as its matrix does if it has two axes, or four as a convolution's kernel.
        Raises ValueError for any other, for one of a product that could not be read, for one whose entries are read
        twice or in part, and for one read together with leaves that `tree` lacks.
        """
        named = dict(_tree.named_leaves(tree))
        found: dict[str, Slot] = {}
        for path, leaf in named.items():
            slots = self._reading.get(path, ())
            if slots:
                self._check(path, slots, named)
            elif len(leaf.shape) in (2, 4) and path not in self.refused:
                slots = (Slot.plain(path, leaf),)
            else:
                raise ValueError(
                    f"leaf '{path}' of shape {tuple(leaf.shape)} has no inputs and outputs: {self.why_not(path)}; "
                    "leave it out with leaves=, give it a budget per='leaf', or pass fn=None for matrices as they lie"
                )
            found |= {slot.name: slot for slot in slots}
        return found

    @cached_property
    def _reading(self) -> dict[str, list[Slot]]:
        found: dict[str, list[Slot]] = {}
        for slot in self.slots:
            for path in slot.paths:
                found.setdefault(path, []).append(slot)
        return found

    @cached_property
    def _times(self) -> dict[str, tuple[int, int]]:
        """{path: how often its entries are read, at least and at most}."""
        times: dict[str, Any] = {}
        for slot in self.slots:
            for path, where in slot.read().items():
                times[path] = times.get(path, 0) + where.astype(np.int32)
        return {path: (int(count.min()), int(count.max())) for path, count in times.items()}

    def _check(self, path: str, slots: Sequence[Slot], named: Mapping[str, Any]) -> None:
        for slot in slots:
            if missing := [p for p in slot.paths if p not in named]:
                raise ValueError(
                    f"leaf '{path}' is multiplied together with '{missing[0]}', as '{slot.name}'; choose "
                    "both in leaves="
                )
            if named[path].shape != (shape := slot.leaf_shapes[slot.paths.index(path)]):
                raise ValueError(f"layout: leaf '{path}' has shape {named[path].shape}, where it was traced {shape}")
        least, most = self._times[path]
        if most > 1 or least < 1:
            how = "more than one matrix" if most > 1 else "matrices that leave some of its entries out"
            raise ValueError(
                f"leaf '{path}' is read as {how} ({', '.join(slot.name for slot in slots)}), so its inputs and outputs "
                "are not one thing; give it a budget per='tree' or per='leaf', or leave it out with leaves="
            )


def layout(fn: Callable[[Tree, Any], Any], params: Tree, batch: Any) -> Layout:
    """How each leaf of params becomes the matrices that fn multiplies, read from its trace on one example batch.

    For constraints that speak of inputs and outputs, where fn is not given otherwise: `training.*(..., layout=...)`,
    `constraint.laid(layout)`. Raises as `trace`.
    """
    return layout_of(trace(fn, params, batch), params)


def layout_of(graph: Graph, params: Tree) -> Layout:
    """The layout of a graph. Layers of a stacked leaf, all of one shape, are the problems of one slot."""
    leaves, groups = dict(_tree.named_leaves(params)), {}
    for op in graph.operators:
        groups.setdefault(op.paths, []).append(op)
    slots = []
    for paths, operators in groups.items():
        if len(paths) == 1 and len({(op.n_in, op.n_out) for op in operators}) == 1 and not _overlap(operators):
            slots.append(Slot.of(operators, leaves, paths[0]))
        else:
            slots += [Slot.of([op], leaves) for op in operators]
    return Layout(tuple(slots), frozenset(p for refusal in graph.refusals for p in refusal.paths), graph.why_not)


def slots_of(operators: Sequence[Operator], leaves: Mapping[str, Any]) -> list[Slot]:
    """One slot an operator; one whose weights are those of an earlier one says so."""
    found, held = [], {}
    for op in operators:
        slot = Slot.of([op], leaves)
        whole = sum(math.prod(shape) for shape in slot.leaf_shapes)
        held[op.paths] = held.get(op.paths, 0) + op.size
        found.append(replace(slot, again=held[op.paths] > whole))
    return found


def _overlap(operators: Sequence[Operator]) -> bool:
    """Whether operators that read one leaf share some of its entries."""
    if len(operators) == 1:
        return False
    places = np.concatenate([op.places().reshape(-1) for op in operators])
    return len(np.unique(places)) < len(places)
