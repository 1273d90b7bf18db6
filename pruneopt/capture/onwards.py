"""A network from one operator on: what its outputs are of other weights there, without what comes before."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax

from pruneopt.capture.walk import fixed
from pruneopt.program.segment import Segment, closure
from pruneopt.structure.graph import Graph


class Onwards:
    """One batch, evaluated up to the first product of an operator; `outputs` goes on from there.

    graph: of this batch. leaves: {path: array} of params, with which what comes before is evaluated.
    """

    def __init__(self, graph: Graph, operator: str, batch: Any, leaves: Mapping[str, Any]):
        self._program = program = graph.program
        start = graph.operator(operator).uses[0].equation
        made = {v for equation in program.equations[:start] for v in equation.outputs if program.is_data(v)}
        self._segment = Segment(program, closure(program, program.outputs, made), program.outputs)
        live = [v for v in self._segment.inputs if v in made]
        before = Segment(program, closure(program, live, set()), live)
        self._given = dict(zip(program.batch, jax.tree.leaves(batch), strict=True))
        inputs = {v: self._given[v] if v in self._given else fixed(program, v, leaves) for v in before.inputs}
        self._given |= dict(zip(live, before.run(inputs), strict=True))

    def outputs(self, leaves: Mapping[str, Any]) -> Any:
        """What the network returns with these leaves from the operator on."""
        given = {
            v: self._given[v] if v in self._given else fixed(self._program, v, leaves) for v in self._segment.inputs
        }
        return self._program.returned.tree(self._segment.run(given))
