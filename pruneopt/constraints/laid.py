"""A constraint on the matrices that a network multiplies, whatever the layout of its leaves."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import jax

from pruneopt import _tree
from pruneopt.constraints import parts
from pruneopt.constraints.base import Constraint
from pruneopt.network.network import Network
from pruneopt.structure.layout import Layout, Slot, layout_of
from pruneopt.structure.traced import Traced

Tree = Any


@dataclass(frozen=True)
class Laid(Constraint):
    """`constraint` on the matrices (n_in, n_out) that `layout` makes of the leaves.

    Its inputs and outputs are then the network's: of an attention kernel (d_model, heads, head_dim) d_model and
    heads * head_dim, of a leaf read as x @ W.T its last and its first axis. `laid` makes it.
    """

    constraint: Constraint
    layout: Layout = field(repr=False)

    def __post_init__(self) -> None:
        if self.constraint.bounds_values:
            raise ValueError(
                f"constraint={self.constraint!r} bounds values, whatever their layout; pass it beside Laid(...), in an "
                "Intersection"
            )

    @property
    def exact(self) -> bool:
        """As `constraint`."""
        return self.constraint.exact

    @property
    def allows_empty(self) -> bool:
        """As `constraint`."""
        return self.constraint.allows_empty

    def scope(self, by_layer: bool = False) -> str:
        """As `constraint`."""
        return self.constraint.scope(by_layer)

    def described(self, ndim: int | None = None) -> parts.Parts:
        """A choice of its own: what it fixes or counts, it does on its matrices and not on the leaves."""
        inner = parts.of(self.constraint)
        units, floor = any(c.units for c in inner.choices), max((c.floor for c in inner.choices), default=0)
        return parts.Parts(
            choices=(parts.Choice(self, units=units, floor=floor),) if inner.choices or inner.masks else (),
        )

    def check(self, variable: Tree) -> None:
        """Raise ValueError for leaves whose matrices are not known, and what `constraint` refuses of these."""
        self.constraint.check(OrderedDict(self.layout.of(variable)))

    def select(self, scores: Tree) -> Tree:
        """`constraint`'s choice; traceable by JAX."""
        return self._through(self.constraint.select, scores)

    def select_stage(self, scores: Tree, cuts: Sequence[float], stage: Any) -> Tree:
        """As `constraint` does."""
        return self._through(lambda stacks: self.constraint.select_stage(stacks, cuts, stage), scores)

    def violation(self, support: Tree) -> int:
        """Of the masks of the matrices."""
        named = dict(_tree.named_leaves(support))
        slots = self.layout.of(support)
        return self.constraint.violation(OrderedDict((name, slot.stack(named)) for name, slot in slots.items()))

    def density(self, variable: Tree) -> float:
        """As `constraint`."""
        return self.constraint.density(OrderedDict(self.layout.of(variable)))

    def relaxed(self, cut: float) -> Laid:
        """The relaxed constraint on the same matrices."""
        return Laid(self.constraint.relaxed(cut), self.layout)

    def restricted(self, slots: Sequence[Slot]) -> Sequence[Constraint]:
        """Of `constraint`: these are the network's matrices."""
        return self.constraint.restricted(slots)

    def _through(self, select: Callable[[Tree], Tree], scores: Tree) -> Tree:
        """Masks of the leaves, chosen among the matrices."""
        named, slots = dict(_tree.named_leaves(scores)), self.layout.of(scores)
        chosen = select(OrderedDict((name, slot.stack(named)) for name, slot in slots.items()))
        masks: dict[str, jax.Array] = {}
        for name, slot in slots.items():
            masks |= slot.leaves(chosen[name], masks)
        return _tree.map_named(lambda path, _: masks[path], scores)


def laid(constraint: Constraint, layout: Layout | None) -> Constraint:
    """`constraint` with inputs and outputs as `layout` reads them; parts that speak of neither stay as they are.

    Raises TypeError for a layout that is none.
    """
    if layout is None:
        return constraint
    if not isinstance(layout, Layout):
        raise TypeError(f"layout is {layout!r}; pass po.structure.layout(fn, params, batch)")
    return constraint.mapped(lambda part: Laid(part, layout) if part.is_oriented else part)


def as_multiplied(constraint: Constraint, network: Network) -> Constraint:
    """`constraint` on the matrices that a network multiplies in its first batch; traced only where it speaks of them.

    As it is where there is no function or no batch to trace. Raises as `structure.trace`.
    """
    if not constraint.is_oriented or network.fn is None or network.source is None:
        return constraint
    graph = Traced(network).of(network.batches.first)
    return laid(constraint, layout_of(graph, network.params))
