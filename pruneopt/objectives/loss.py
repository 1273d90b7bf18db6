"""The true loss over batches."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

from pruneopt import _tree
from pruneopt.constraints.base import Constraint
from pruneopt.constraints.laid import as_multiplied
from pruneopt.network import calls
from pruneopt.network.batches import Batches, Source
from pruneopt.network.leaves import Choice, Rest, partition
from pruneopt.network.network import Network
from pruneopt.objectives.base import Objective, check_center
from pruneopt.structure.defaults import settled

Tree = Any


@dataclass(frozen=True, eq=False, repr=False)
class Loss(Objective):
    """f(w) = mean over examples of fn(params with w in place of the chosen leaves, batch).

    fn: (params, batch) -> scalar, a mean over the batch's examples; or (scalar, updates) with has_updates=True,
        where `updates` is `params` with None at every leaf or subtree that the step does not replace
        (running statistics). params: the whole tree. batches: re-iterable or a function that returns an iterator.
    leaves: which leaves are decided (default: the prunable ones); the others stay as given.

    Raises ValueError for a loss that is not scalar, an empty tree, unusable batches.
    """

    fn: calls.Loss
    params: Tree
    batches: Source
    leaves: Choice = None
    has_updates: bool = False
    center: Tree = field(init=False, repr=False)
    rest: Rest = field(init=False, repr=False)
    stream: Batches = field(init=False, repr=False)

    def __post_init__(self) -> None:
        stream = Batches(self.batches)
        leaves = settled(self.leaves, self.fn, self.params, stream)
        center, rest = partition(self.params, leaves)
        object.__setattr__(self, "leaves", leaves)
        object.__setattr__(self, "center", center)
        object.__setattr__(self, "rest", rest)
        object.__setattr__(self, "stream", stream)
        calls.check_scalar(self.fn, center, rest, self.stream, self.has_updates)

    def __repr__(self) -> str:
        return f"Loss({getattr(self.fn, '__name__', type(self.fn).__name__)}; {_tree.shapes(self.center)})"

    def check(self) -> None:
        """Raise unless the chosen leaves are finite floating arrays."""
        check_center(self.center)

    def on_matrices(self, constraint: Constraint) -> Constraint:
        """Its inputs and outputs are those of the matrices that fn multiplies in the first batch."""
        network = Network(self.fn, self.params, self.leaves, self.stream, self.center, self.rest)
        return as_multiplied(constraint, network)

    def value(self, w: Tree) -> float:
        """The mean loss, in the network's own precision, summed over batches in float64."""
        return calls.mean_value(self.fn, w, self.rest, self.stream, self.has_updates)

    def finite_value(self, w: Tree) -> float:
        """`value`, or ValueError where it is not finite, naming the batch, by another pass."""
        value = self.value(w)
        if math.isfinite(value):
            return value
        for index, batch in enumerate(self.stream):
            where = f"{self.stream.name}: batch {index}"
            calls.check_value(self.fn, w, self.rest, batch, where, self.has_updates)
        raise ValueError(f"fn returns {value} at the given params over all of {self.stream.name}; scale fn down")

    def gradient(self, w: Tree) -> Tree:
        """The gradient of the mean loss in the chosen leaves."""
        return calls.mean_gradient(self.fn, w, self.rest, self.stream, self.has_updates)
