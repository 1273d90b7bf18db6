"""A saliency of your own as an objective: the sum of the scores of what is removed."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from pruneopt import _tree
from pruneopt.network.leaves import check_finite, check_like
from pruneopt.objectives.base import Objective, check_center

Tree = Any


@dataclass(frozen=True, eq=False, repr=False)
class Scores(Objective):
    """f(w) = sum of s_i over the weights that w removes: w_i = 0 where w0_i is not.

    scores: s, a tree shaped like center (larger = keep), or a function of the params that returns one; it may be like
        `params`, the leaves that are decided are taken by path. center: w0; None in a method, where the plan puts the
        network's in: prune(..., method=Scores(lambda params: ...)).

    Under a constraint whose selection is exact `Score` is optimal, and proven so, where no score is negative and no
    weight is zero already (which keeps its rank, but is never a loss). `Problem` raises ValueError for scores of
    another shape, a NaN or an infinity.
    """

    scores: Tree | Callable[[Tree], Tree]
    center: Tree = None

    constant = 0.0

    def at(self, params: Tree, chosen: Tree) -> Scores:
        """The objective at a network's params, of which `chosen` are decided. Raises ValueError for a missing leaf."""
        tree = self.scores(params) if callable(self.scores) else self.scores
        named = dict(_tree.named_leaves(tree))
        if missing := [path for path, _ in _tree.named_leaves(chosen) if path not in named]:
            raise ValueError(f"scores: there are none for leaf '{missing[0]}'; the paths given are {list(named)[:8]}")
        return Scores(_tree.map_named(lambda path, _: named[path], chosen), chosen)

    def check(self) -> None:
        """Raise unless scores are numbers shaped like the center."""
        if self.center is None or callable(self.scores):
            raise TypeError("Scores needs its scores and center as arrays in a problem; pass Scores(scores, center)")
        check_center(self.center)
        check_like(self.scores, self.center, "scores")
        check_finite(self.scores, "scores")

    def value(self, w: Tree) -> float:
        """f(w), in float64."""
        return _tree.dropped(self.saliency(), jax.tree.map(lambda x: np.asarray(x) != 0, w))

    @cached_property
    def is_separable(self) -> bool:
        """Whether no score is negative where there is a weight: more kept is then never worse."""
        return all(bool(jnp.all(s >= 0)) for s in jax.tree.leaves(self.saliency()))

    def saliency(self) -> Tree:
        """What removing each weight costs: its score, nothing where it is zero already."""
        return jax.tree.map(
            lambda s, w: jnp.where(jnp.asarray(w) != 0, s, jnp.zeros_like(s)), self.ranking(), self.center
        )

    def ranking(self) -> Tree:
        """The scores, in float32, or float64 where they are."""
        return jax.tree.map(lambda s: jnp.asarray(s).astype(_tree.wide(s.dtype)), self.scores)
