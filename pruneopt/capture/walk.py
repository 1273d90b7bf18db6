"""Evaluating a program demand by demand: up to an operator's input, for every batch, live variables alone."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from copy import copy
from dataclasses import dataclass
from typing import Any

import jax

from pruneopt.program.program import Program
from pruneopt.program.segment import Segment, closure
from pruneopt.structure.operators import Operator, Use

Env = dict[int, Any]


@dataclass(frozen=True, eq=False)
class Cut:
    """Operators whose first product has the same input rows. inputs: the data variables that they read.

    further: later products with the same weights, in order; their Grams add.
    """

    inputs: tuple[int, ...]
    operators: tuple[int, ...]
    use: Use
    further: tuple[tuple[int, Use], ...]

    @property
    def demands(self) -> list[tuple[int, ...]]:
        """All variables that are read, product by product."""
        return [self.inputs, *(use.inputs for _, use in self.further)]


def cuts(operators: Sequence[Operator]) -> list[Cut]:
    """The operators' first products in order, those with the same rows together."""
    together: dict[Any, list[int]] = {}
    for i in sorted(range(len(operators)), key=lambda i: operators[i].uses[0].equation):
        use = operators[i].uses[0]
        together.setdefault((use.inputs, use.form.row_key), []).append(i)
    found = []
    for (inputs, _), ops in together.items():
        further = sorted(((i, u) for i in ops for u in operators[i].uses[1:]), key=lambda pair: pair[1].equation)
        found.append(Cut(inputs, tuple(ops), operators[ops[0]].uses[0], tuple(further)))
    return found


class Walk:
    """Where the evaluation of a program stands: what is live, and what its later demands will read.

    `advance` moves on; a copy looks ahead. The batches' environments are given and taken, never kept.
    """

    def __init__(self, program: Program, demands: Iterable[tuple[int, ...]]):
        self._program = program
        self._left: Counter[int] = Counter()
        wanted = [tuple(v for v in demand if program.is_data(v)) for demand in demands]
        for demand in wanted:
            self._left.update(demand)
        for equation in closure(program, [v for demand in wanted for v in demand], set()):
            self._left.update({a for a in equation.inputs if isinstance(a, int) and program.is_data(a)})
        self._have = {v for v in program.batch if self._left[v]}

    def ahead(self) -> Walk:
        """A copy that can advance while this one stays."""
        twin = copy(self)
        twin._left, twin._have = Counter(self._left), set(self._have)
        return twin

    def start(self, batch: Any) -> Env:
        """The environment of a batch before anything is evaluated."""
        given = zip(self._program.batch, jax.tree.leaves(batch), strict=True)
        return {v: x for v, x in given if v in self._have}

    def advance(self, demand: tuple[int, ...]) -> Callable[[Env, Mapping[str, Any]], Env]:
        """Move to `demand`. Returns the step (environment, leaves) -> environment, in which its variables are live."""
        program = self._program
        wanted = [v for v in demand if program.is_data(v)]
        equations = closure(program, wanted, self._have)
        made: set[int] = set()
        for equation in equations:
            if any(v in program.data for v in equation.outputs):
                self._left.subtract({a for a in equation.inputs if isinstance(a, int) and program.is_data(a)})
                made.update(equation.outputs)
        live = sorted(v for v in made | self._have if self._left[v] > 0)
        new = [v for v in live if v in made]
        segment = Segment(program, equations, new)
        self._have = set(live)
        kept = [v for v in live if v not in made]

        def step(env: Env, leaves: Mapping[str, Any]) -> Env:
            given = {v: env[v] if v in env else fixed(program, v, leaves) for v in segment.inputs}
            return {**{v: env[v] for v in kept}, **dict(zip(new, segment.run(given), strict=True))}

        return step

    def release(self, demand: tuple[int, ...]) -> None:
        """The demand is met: its variables live on only where something else reads them."""
        self._left.subtract(v for v in demand if self._program.is_data(v))


def fixed(program: Program, var: int, leaves: Mapping[str, Any]) -> Any:
    """A constant or a leaf."""
    if var in program.constants:
        return program.constants[var]
    return leaves[program.names[var]]


def values(program: Program, env: Env, demand: tuple[int, ...]) -> list[Any]:
    """The arrays of a demand."""
    return [env[v] if v in env else program.constants[v] for v in demand]
