"""A network's graphs: traced once for each signature of its batches, the same operators in the same order."""

from __future__ import annotations

from typing import Any

import jax

from pruneopt import _tree
from pruneopt.network.leaves import is_default
from pruneopt.network.network import Network
from pruneopt.program.flatten import flatten
from pruneopt.structure.graph import Graph, read
from pruneopt.structure.operators import Operator


class Traced:
    """The graphs of one network for batches of different shapes.

    keep_derivatives: leave custom derivatives in the programs, which are then to be differentiated.
    """

    def __init__(self, network: Network, keep_derivatives: bool = False):
        self._network, self._keep = network, keep_derivatives
        self._known: dict[Any, Graph] = {}

    @property
    def first(self) -> Graph:
        """The graph of the first batch."""
        return next(iter(self._known.values()))

    def of(self, batch: Any) -> Graph:
        """The graph for batches of this shape. Raises ValueError where it differs from the first batch's."""
        key = _shape_of(batch)
        if key not in self._known:
            fn: Any = self._network.fn
            graph = read(flatten(fn, self._network.params, batch, keep_derivatives=self._keep))
            first = next(iter(self._known.values()), graph)
            if [op.name for op in graph.operators] != [op.name for op in first.operators]:
                raise ValueError(
                    f"fn multiplies {[op.name for op in graph.operators]} for a batch of shapes "
                    f"{[s for s, _ in key[1]]} and {[op.name for op in first.operators]} for the first batch; it must "
                    "be one network"
                )
            self._known[key] = graph
        return self._known[key]

    def chosen(self, graph: Graph) -> list[Operator]:
        """The operators all of whose leaves are chosen.

        Raises ValueError for a leaf named by the user that no operator reads.
        """
        paths = {path for path, _ in _tree.named_leaves(self._network.chosen)}
        chosen = [op for op in graph.operators if paths.issuperset(op.paths)]
        unread = paths - {p for op in chosen for p in op.paths}
        if unread and (not is_default(self._network.leaves) or not chosen):
            reasons = "; ".join(f"'{p}': {graph.why_not(p)}" for p in sorted(unread)[:8])
            raise ValueError(f"leaves: no operator can be captured for {reasons}")
        return chosen


def _shape_of(batch: Any) -> Any:
    leaves, structure = jax.tree.flatten(batch)
    return structure, tuple((tuple(t.shape), str(t.dtype)) for t in map(jax.typeof, leaves))
