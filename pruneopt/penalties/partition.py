"""Which weights live and die together under a group penalty: a partition of all entries."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from pruneopt import _tree
from pruneopt.network.leaves import check_like
from pruneopt.structure.units import Group, Units

Tree = Any


@jax.tree_util.register_dataclass
@dataclass(frozen=True, eq=False)
class Partition:
    """Every entry in exactly one of `count` groups.

    labels: a tree like the variable, whole numbers in [0, count) that broadcast to the leaves; equal numbers, in one
        leaf or in several, are one group. count: of groups.
    """

    labels: Tree = field(repr=False)
    count: int = field(metadata={"static": True})

    @staticmethod
    def slices(variable: Tree, axis: int, span: int = 1) -> Partition:
        """A group for each index along `axis` of each leaf: filters and neurons (-1), inputs or rows (-2).

        span: so many indices in a row make one group: heads of width `span` along an axis of all heads.
        Raises ValueError for an axis that a leaf has not, or a span that does not divide it.
        """
        if isinstance(span, bool) or not isinstance(span, int) or span < 1:
            raise ValueError(f"span={span!r} is not a whole number >= 1; pass how many indices make one group")
        if isinstance(axis, bool) or not hasattr(axis, "__index__"):
            raise ValueError(f"axis={axis!r} is not a whole number; pass an axis, such as -1 for outputs")
        count = 0

        def label(path: str, leaf: Any) -> np.ndarray:
            nonlocal count
            if not -len(leaf.shape) <= axis < len(leaf.shape):
                raise ValueError(f"axis={axis} does not exist in leaf '{path}' of shape {leaf.shape}; pass another")
            n = leaf.shape[axis]
            if n % span:
                raise ValueError(f"span={span} does not divide axis {axis} of leaf '{path}', of length {n}")
            shape = [1] * len(leaf.shape)
            shape[axis] = n
            labels = count + np.arange(n, dtype=np.int32) // span
            count += n // span
            return labels.reshape(shape)

        labels = _tree.map_named(label, variable)
        return Partition(labels, count)

    @staticmethod
    def units(variable: Tree, units: Units, groups: Sequence[Group]) -> Partition:
        """A group for each unit of `groups`, found by `structure`: coupled channels, over all leaves that they tie.

        units, groups: `graph.units` and some of `graph.units.groups`. Raises ValueError for entries of two units, or
        of none.
        """
        places = []
        count = 0
        for group in groups:
            for path, axis in group.members:
                places.append((path, axis, units.places(group, path, axis) if group.size else None, count))
            count += group.size
        leaves = dict(_tree.named_leaves(variable))
        found = {path: np.full(leaf.shape, -1, np.int32) for path, leaf in leaves.items()}
        for path, axis, entries, first in places:
            if path not in found:
                raise ValueError(
                    f"groups: '{path}' is tied to a group but is no leaf of the variable; add it to leaves="
                )
            for unit, where in enumerate(entries):
                at = (slice(None),) * axis + (where,)
                if np.any((found[path][at] >= 0) & (found[path][at] != first + unit)):
                    raise ValueError(
                        f"groups overlap in leaf '{path}': some entries are in two; pass groups that share none"
                    )
                found[path][at] = first + unit
        return Partition(_covering(found, variable), count)

    @staticmethod
    def sets(variable: Tree, masks: Sequence[Tree]) -> Partition:
        """A group for each tree of boolean masks. Raises ValueError where they overlap or leave an entry out."""
        found = {path: np.full(leaf.shape, -1, np.int32) for path, leaf in _tree.named_leaves(variable)}
        for i, mask in enumerate(masks):
            check_like(mask, variable, f"masks[{i}]")
            for path, one in _tree.named_leaves(mask):
                if np.any(found[path][np.asarray(one, bool)] >= 0):
                    raise ValueError(
                        f"groups overlap in leaf '{path}': masks[{i}] repeats entries; pass disjoint masks"
                    )
                found[path][np.asarray(one, bool)] = i
        return Partition(_covering(found, variable), len(masks))

    def check(self, variable: Tree) -> None:
        """Raise ValueError unless the labels cover these leaves and every group has an entry."""
        if jax.tree.structure(self.labels) != jax.tree.structure(variable):
            check_like(self.labels, variable, "groups")
        for (path, label), leaf in zip(_tree.named_leaves(self.labels), jax.tree.leaves(variable), strict=True):
            shape = np.shape(label)
            if len(shape) != len(leaf.shape) or any(a not in (1, b) for a, b in zip(shape, leaf.shape, strict=True)):
                raise ValueError(f"groups: labels of leaf '{path}' have shape {shape}, which is not {leaf.shape}")
            if not jnp.issubdtype(jnp.asarray(label).dtype, jnp.integer):
                raise ValueError(f"groups: labels of leaf '{path}' are {jnp.asarray(label).dtype}; pass whole numbers")
            if np.min(label) < 0 or np.max(label) >= self.count:
                raise ValueError(
                    f"groups: leaf '{path}' has labels outside [0, {self.count}), entries in no group; cover all"
                )
        if np.min(self.sizes(variable)) == 0:
            raise ValueError(f"groups: some of the {self.count} have no entry; number them from 0 without a hole")

    def sizes(self, variable: Tree) -> np.ndarray:
        """Entries of each group."""
        return self.sums([np.ones(leaf.shape) for leaf in jax.tree.leaves(variable)])

    def sums(self, leaves: list[np.ndarray]) -> np.ndarray:
        """The sum over each group of arrays in the leaves' shapes, in float64 on the host."""
        total = np.zeros(self.count)
        for x, label in zip(leaves, jax.tree.leaves(self.labels), strict=True):
            total += np.bincount(np.broadcast_to(label, x.shape).reshape(-1), x.reshape(-1), self.count)
        return total

    def norms(self, w: Tree) -> Float[Array, " g"]:
        """The Euclidean norm of each group. Traceable by JAX."""
        leaves = jax.tree.leaves(w)
        dtype = jnp.result_type(*leaves)
        total = jnp.zeros(self.count, dtype)
        for x, label in zip(leaves, jax.tree.leaves(self.labels), strict=True):
            places, square = jnp.asarray(label), jnp.square(x.astype(dtype))
            shared = tuple(i for i, n in enumerate(places.shape) if n == 1)
            square = jnp.sum(square, axis=shared, keepdims=True)  # of one group, before any scatter
            total = total + jax.ops.segment_sum(square.reshape(-1), places.reshape(-1), self.count)
        return jnp.sqrt(total)

    def spread(self, values: Float[Array, " g"], w: Tree) -> Tree:
        """Each group's number at its entries, broadcasting to the leaves of `w`."""
        return jax.tree.map(lambda x, label: values[jnp.asarray(label)].astype(x.dtype), w, self.labels)


def _covering(found: dict[str, np.ndarray], variable: Tree) -> Tree:
    for path, label in found.items():
        if np.any(label < 0):
            raise ValueError(
                f"groups do not cover leaf '{path}': {np.sum(label < 0)} of its entries are in none; add a group for "
                "them, or leave the leaf out with leaves="
            )
    return _tree.map_named(lambda path, _: found[path], variable)
