"""What a constraint is: a set of allowed supports."""

from __future__ import annotations

import abc
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from pruneopt import _tree
from pruneopt.constraints.parts import Parts
from pruneopt.structure.layout import Slot

Tree = Any


class Constraint(abc.ABC):
    """A set C of supports (trees of boolean masks) over the leaves of a variable.

    Floors aside, every set here is closed downwards: a support inside a feasible one is feasible.
    Subclasses are final frozen dataclasses; a set never refers to the variable that it will constrain.
    """

    @property
    @abc.abstractmethod
    def exact(self) -> bool:
        """Whether `select` is optimal: no feasible support of its size has a larger sum of scores."""

    @property
    def allows_empty(self) -> bool:
        """Whether a leaf may lose all its weights without an error (layer collapse)."""
        return False

    @property
    def bounds_values(self) -> bool:
        """Whether it restricts the values too, and not the support alone; then it has a `project`."""
        return False

    def project(self, values: Tree, support: Tree = None, metric: Tree = None) -> Tree:
        """The nearest values that it allows and that vanish off `support`; None: that live where they like.

        metric: of what is near, for a set that knows one; None is the Euclidean norm. Which weights live is for
        `select` to choose: a choice leaves values as they are, only what is fixed does not. Traceable by JAX.
        """
        check_no_metric(self, metric)
        return values if support is None else _tree.masked(values, support)

    def value_violation(self, values: Tree) -> float:
        """By how much the values break it; 0 where they do not, to rounding."""
        return 0.0

    def largest_product(self, u: Tree) -> float:
        """max <u, w> over its values w (or more, where that is hard to say), in float64; inf where there is none."""
        return math.inf if any(np.any(x) for x in jax.tree.leaves(u)) else 0.0

    @abc.abstractmethod
    def described(self, ndim: int | None = None) -> Parts:
        """What it is made of, as data; `ndim` is the number of axes of every leaf, where it is known."""

    @abc.abstractmethod
    def check(self, variable: Tree) -> None:
        """Raise ValueError unless the constraint makes sense for these leaves. Looks at shapes only."""

    @abc.abstractmethod
    def select(self, scores: Tree) -> Tree:
        """The best support for additive `scores` (larger = keep), with as many units as are allowed.

        +inf marks what is already kept and counts against the budget, -inf (and NaN) what is already cut and is
        never kept. Ties: larger score, then leaf order, then index. Traceable by JAX.
        """

    @abc.abstractmethod
    def violation(self, support: Tree) -> int:
        """By how many units (weights, blocks, slices) `support` breaks the constraint; 0 if and only if feasible."""

    @abc.abstractmethod
    def density(self, variable: Tree) -> float:
        """The largest fraction of units that may live, in [0, 1]."""

    @abc.abstractmethod
    def relaxed(self, cut: float) -> Constraint:
        """The looser constraint that asks for the fraction `cut` in (0, 1] of the removals; `relaxed(1)` is self."""

    def select_stage(self, scores: Tree, cuts: Sequence[float], stage: Any) -> Tree:
        """`relaxed(cuts[stage]).select(scores)` for a traced `stage`: schedules inside compiled training steps."""
        looser = [self.relaxed(cut) for cut in cuts]
        distinct = [c for i, c in enumerate(looser) if c not in looser[:i]]
        which = jnp.asarray([distinct.index(c) for c in looser], jnp.int32)[stage]
        return lax.switch(which, [c.select for c in distinct], scores)

    @property
    def is_oriented(self) -> bool:
        """Whether it speaks of inputs and outputs, so that it needs to know the matrix of a leaf."""
        return False

    @property
    def shares(self) -> bool:
        """Whether several matrices have one budget, so that how much each keeps is a choice."""
        return False

    @abc.abstractmethod
    def scope(self, by_layer: bool = False) -> str:
        """What shares one budget, in words; layer by layer, or solved as a whole."""

    def mapped(self, fn: Callable[[Constraint], Constraint]) -> Constraint:
        """`fn` of this set, or of each of the sets that it is made of."""
        return fn(self)

    def restricted(self, slots: Sequence[Slot]) -> Sequence[Constraint]:
        """This constraint on each of these stacks of matrices by itself; what they share is shared out.

        A budget over several is spent in proportion to their weights, to the unit: largest remainders first.
        """
        return [self for _ in slots]

    def implied(self, support: Tree) -> Tree:
        """`support` without what it makes useless: entries of units that a part of it has cut already."""
        return support

    def portion(self, support: Any, problem: int) -> Constraint:
        """This constraint on one problem of a stack, whose shared budgets are spent as in `support`, a mask of it."""
        return self


_REMEDY = (
    "pass fn and a batch to prune, layout=po.structure.layout(fn, params, batch) in training, an axis number or "
    "per='leaf', or leave it out with leaves="
)


def check_orientation(what: str, variable: Tree, remedy: str = _REMEDY) -> None:
    """Raise ValueError for a leaf whose shape does not tell inputs from outputs; a matrix and an HWIO kernel do."""
    for path, leaf in _tree.named_leaves(variable):
        if not isinstance(leaf, Slot) and len(leaf.shape) not in (2, 4):
            raise ValueError(
                f"{what} speaks of inputs and outputs, but {_tree.called(path)} of shape {tuple(leaf.shape)} does not "
                f"tell which of its axes they are; {remedy}"
            )


def matrix_axis(slot: Slot, axis: Any, argument: str) -> str:
    """Which of "in" and "out" a numbered axis of a leaf is. Raises ValueError where it is neither."""
    kind = slot.kind_of(int(axis))
    if kind not in ("in", "out"):
        raise ValueError(
            f"{argument}={axis!r}: that axis of leaf '{slot.name}' is neither the inputs nor the outputs of its "
            f"matrices {slot.shape}; pass {argument}='in' or {argument}='out'"
        )
    return kind


def check_constraints(name: str, parts: Any) -> None:
    """Raise TypeError unless all of `parts` are constraints."""
    for part in parts:
        if not isinstance(part, Constraint):
            raise TypeError(f"{name} holds {part!r}; pass constraints such as Cardinality(sparsity=0.9)")


def check_no_metric(constraint: Constraint, metric: Tree) -> None:
    """Raise ValueError for a metric, of a set that projects in the Euclidean norm."""
    if metric is not None:
        raise ValueError(f"metric is given, but {constraint!r} projects in the Euclidean norm alone; pass metric=None")


def check_cut(cut: float) -> None:
    """Raise ValueError unless 0 < cut <= 1."""
    if not 0 < cut <= 1:
        raise ValueError(f"cut={cut!r} is outside (0, 1]; pass the fraction of the removals to make")
