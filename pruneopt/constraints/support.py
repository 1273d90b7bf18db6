"""A fixed support: only what a mask allows may be nonzero."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from pruneopt import _tree
from pruneopt.constraints.base import Constraint, check_cut

Tree = Any


def _is_hole(leaf: Any) -> bool:
    return leaf is None


@dataclass(frozen=True, eq=False)
class Support(Constraint):
    """w is zero wherever `mask` is False.

    mask: a tree of boolean arrays shaped like the variable; a None lets its whole leaf live.
    """

    mask: Tree

    @property
    def exact(self) -> bool:
        """True."""
        return True

    def check(self, variable: Tree) -> None:
        """Raise ValueError for a mask of another structure or shape, TypeError for one that is not boolean."""
        expected = {path: leaf.shape for path, leaf in _tree.named_leaves(variable)}
        given = {_tree.name(p): m for p, m in jax.tree_util.tree_flatten_with_path(self.mask, is_leaf=_is_hole)[0]}
        unknown = [path for path in given if given[path] is not None and path not in expected]
        if unknown:
            raise ValueError(f"mask has a leaf '{unknown[0]}' that the variable lacks; its leaves are {list(expected)}")
        for path, shape in expected.items():
            mask = given.get(path)
            if mask is None:
                continue
            if mask.shape != shape:
                raise ValueError(f"mask '{path}' has shape {mask.shape}, its leaf has {shape}; pass the leaf's shape")
            if mask.dtype != bool:
                raise TypeError(f"mask '{path}' has dtype {mask.dtype}; pass booleans, True where a weight may live")

    def select(self, scores: Tree) -> Tree:
        """The mask itself, less what is already cut."""
        return jax.tree.map(
            lambda m, s: (s > -jnp.inf) if m is None else jnp.asarray(m) & (s > -jnp.inf),
            self._holes(scores),
            scores,
            is_leaf=_is_hole,
        )

    def violation(self, support: Tree) -> int:
        """Weights that live outside the mask."""
        outside = jax.tree.map(
            lambda m, s: None if m is None else jnp.asarray(s) & ~jnp.asarray(m),
            self._holes(support),
            support,
            is_leaf=_is_hole,
        )
        return _tree.kept(outside)

    def density(self, variable: Tree) -> float:
        """Allowed over all weights."""
        cut = sum(m.size - _tree.kept(jnp.asarray(m)) for m in jax.tree.leaves(self.mask))
        return 1 - cut / _tree.size(variable)

    def relaxed(self, cut: float) -> Support:
        """Itself: a mask has no smaller version."""
        check_cut(cut)
        return self

    def _holes(self, like: Tree) -> Tree:
        """The mask in the structure of `like`, None where it says nothing."""
        given = {_tree.name(p): m for p, m in jax.tree_util.tree_flatten_with_path(self.mask)[0]}
        leaves, structure = jax.tree_util.tree_flatten_with_path(like)
        return jax.tree.unflatten(structure, [given.get(_tree.name(path)) for path, _ in leaves])
