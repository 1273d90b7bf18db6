"""A fixed support: only what a mask allows may be nonzero."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from pruneopt import _tree
from pruneopt.constraints import parts
from pruneopt.constraints.base import Constraint, check_cut
from pruneopt.structure.layout import Slot

Tree = Any


@dataclass(frozen=True, eq=False)
class Support(Constraint):
    """w is zero wherever `mask` is False.

    mask: a tree of boolean arrays shaped like the variable; a None lets its whole leaf live.
    """

    mask: Tree

    def __repr__(self) -> str:
        return f"Support(mask over {len(self._named())} leaves)"

    @property
    def exact(self) -> bool:
        """True."""
        return True

    def described(self, ndim: int | None = None) -> parts.Parts:
        """The mask."""
        return parts.Parts(masks=(self.mask,))

    def check(self, variable: Tree) -> None:
        """Raise ValueError for a mask of another structure or shape, TypeError for one that is not boolean."""
        expected = {path: leaf.shape for path, leaf in _tree.named_leaves(variable)}
        given = self._named()
        for path, mask in given.items():
            if not hasattr(mask, "dtype"):
                raise TypeError(f"mask '{path}' is a {type(mask).__name__}; pass a boolean array of the leaf's shape")
        unknown = [path for path in given if path not in expected]
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
        masks = self._named()

        def one(path: str, s: Any) -> Any:
            alive = s > -jnp.inf
            return alive & jnp.asarray(masks[path]) if path in masks else alive

        return _tree.map_named(one, scores)

    def project(self, values: Tree, support: Tree = None, metric: Tree = None) -> Tree:
        """The values within the mask: the nearest ones in every norm that adds up over weights."""
        return super().project(_tree.masked(values, parts.of(self).allowed(values)), support, metric)

    def largest_product(self, u: Tree) -> float:
        """0 where u vanishes within the mask, else inf."""
        return super().largest_product(parts.of(self).cut(u))

    def violation(self, support: Tree) -> int:
        """Weights that live outside the mask."""
        masks = self._named()
        return sum(
            _tree.kept(jnp.asarray(s) & ~jnp.asarray(masks[path]))
            for path, s in _tree.named_leaves(support)
            if path in masks
        )

    def density(self, variable: Tree) -> float:
        """Allowed over all weights."""
        cut = _tree.size(self.mask) - _tree.kept(self.mask)
        return 1 - cut / _tree.size(variable)

    def relaxed(self, cut: float) -> Support:
        """Itself: a mask has no smaller version."""
        check_cut(cut)
        return self

    def scope(self, by_layer: bool = False) -> str:
        """A mask has no budget."""
        return "a given support"

    def restricted(self, slots: Sequence[Slot]) -> list[Constraint]:
        """The masks of these leaves in the matrices' form; where there is none, all of it may live."""
        return [self._on(slot) for slot in slots]

    def portion(self, support: Any, problem: int) -> Support:
        """The mask of one problem."""
        return self if self.mask is None else Support(self.mask[problem])

    def _on(self, slot: Slot) -> Support:
        masks = {path: mask for path, mask in self._named().items() if path in slot.paths}
        if not masks:
            return Support(None)
        shapes = dict(zip(slot.paths, slot.leaf_shapes, strict=True))
        Support(masks).check({path: jax.ShapeDtypeStruct(shapes[path], np.float32) for path in masks})
        return Support(slot.stack({path: np.ones(shape, bool) for path, shape in shapes.items()} | masks))

    def _named(self) -> dict[str, Any]:
        return dict(_tree.named_leaves(self.mask))
