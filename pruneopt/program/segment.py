"""A stretch of a program as one compiled function, shared by all stretches that do the same."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import jax

from pruneopt.program.keys import Literal
from pruneopt.program.program import Atom, Equation, Program

_ROUNDS = frozenset({"convert_element_type", "reduce_precision"})  # they change an entry's type, never its place


class Segment:
    """outputs = equations(inputs). Equal to every segment that does the same to inputs of the same shapes.

    inputs: variables that the equations read and do not make, in order of first use.
    """

    def __init__(self, program: Program, equations: Sequence[Equation], outputs: Sequence[Atom]):
        numbers: dict[int, int] = {}
        made = {var for equation in equations for var in equation.outputs}
        reads = [*(a for equation in equations for a in equation.inputs), *outputs]
        self.inputs = tuple(dict.fromkeys(a for a in reads if isinstance(a, int) and a not in made))
        for var in (*self.inputs, *(v for equation in equations for v in equation.outputs)):
            numbers[var] = len(numbers)
        self.outputs = tuple(outputs)

        def local(atoms: Sequence[Atom]) -> tuple[Atom, ...]:
            return tuple(a if isinstance(a, Literal) else numbers[a] for a in atoms)

        self._steps = tuple((e, local(e.inputs), local(e.outputs)) for e in equations)
        self._results = local(self.outputs)
        named = lambda atoms: tuple(a.key if isinstance(a, Literal) else a for a in atoms)  # noqa: E731
        self._key = (
            tuple((e.key, named(reads), made) for e, reads, made in self._steps),
            named(self._results),
            tuple((tuple(t.shape), str(t.dtype)) for t in map(program.type_of, self.inputs)),
        )
        self._hash = hash(self._key)

    def __hash__(self) -> int:
        return self._hash

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Segment) and self._hash == other._hash and self._key == other._key

    def trace(self, inputs: Sequence[Any]) -> list[Any]:
        """Evaluate on arrays or tracers, in the order of `inputs`."""
        env: dict[Atom, Any] = dict(enumerate(inputs))
        for equation, reads, made in self._steps:
            values = equation.run([a.value if isinstance(a, Literal) else env[a] for a in reads])
            env.update(zip(made, values, strict=True))
        return [a.value if isinstance(a, Literal) else env[a] for a in self._results]

    def moved(self, inputs: Sequence[Any]) -> list[Any]:
        """As `trace`, for equations that move entries: numbers of any dtype, kept as they are."""
        env: dict[Atom, Any] = dict(enumerate(inputs))
        for equation, reads, made in self._steps:
            values = [a.value if isinstance(a, Literal) else env[a] for a in reads]
            values = values[:1] if equation.primitive.name in _ROUNDS else equation.run(values)
            env.update(zip(made, values, strict=True))
        return [a.value if isinstance(a, Literal) else env[a] for a in self._results]

    def run(self, env: Mapping[int, Any]) -> list[Any]:
        """Evaluate on the arrays of `env`, compiled."""
        if not self._steps:
            return [a.value if isinstance(a, Literal) else env[a] for a in self.outputs]
        return _run(self, [env[a] for a in self.inputs])


@partial(jax.jit, static_argnums=0)
def _run(segment: Segment, inputs: list[Any]) -> list[Any]:
    return segment.trace(inputs)


def closure(program: Program, outputs: Sequence[Atom], have: set[int] | Mapping[int, Any]) -> list[Equation]:
    """The equations that compute `outputs` from variables in `have`, leaves, constants and the batch, in order."""
    wanted: set[int] = set()
    stack = [a for a in outputs if isinstance(a, int)]
    while stack:
        var = stack.pop()
        if var in have or var not in program.maker or program.maker[var] in wanted:
            continue
        wanted.add(program.maker[var])
        stack += [a for a in program.equations[program.maker[var]].inputs if isinstance(a, int)]
    return [program.equations[i] for i in sorted(wanted)]
