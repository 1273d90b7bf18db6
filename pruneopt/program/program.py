"""A function as a straight-line program: calls inlined, loops over layers unrolled, repeated work shared."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Hashable, Iterable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from pruneopt.program import versions
from pruneopt.program.keys import Literal, frozen, type_key, value_key
from pruneopt.program.versions import Parameters

Tree = Any


Atom = int | Literal


class Equation(NamedTuple):
    """outputs = primitive(inputs). key: equal for equations that do the same to inputs of the same shapes."""

    primitive: Any
    params: Parameters
    inputs: tuple[Atom, ...]
    outputs: tuple[int, ...]
    key: Hashable
    context: Any

    def run(self, inputs: Iterable[Any]) -> list[Any]:
        """Evaluate on arrays or tracers."""
        bound = self.primitive.get_bind_params(self.params)
        with self.context.manager if self.context is not None else contextlib.nullcontext():
            out = self.primitive.bind(*inputs, **bound)
        return list(out) if self.primitive.multiple_results else [out]


class Loop(NamedTuple):
    """A scan that was unrolled. steps: each step's equations, first and past the last one; stop: past those that stack
    its outputs; carried: what its last step hands on.
    """

    steps: tuple[tuple[int, int], ...]
    stop: int
    carried: tuple[Atom, ...]


class Call(NamedTuple):
    """A call with a derivative of its own that was read as its body. at: how many equations stand before its end."""

    at: int
    equation: Equation


class Outputs(NamedTuple):
    """What a function returns: the paths of its arrays, and the tree that holds them; ... stands for an array."""

    paths: tuple[str, ...] = ()
    structure: Any = None
    leaves: tuple[Any, ...] = ()

    def tree(self, arrays: Iterable[Any]) -> Any:
        """These arrays in the tree that the function returns."""
        given = iter(arrays)
        return self.structure.unflatten([next(given) if leaf is ... else leaf for leaf in self.leaves])


@dataclass(eq=False)
class Program:
    """Equations in order, over variables that are numbers.

    shapes: {variable: its type}. leaves: {path: variable} of the arrays of params; names: the inverse. constants:
    {variable: array}, closed over by the function or loop counters. data, parametric: variables that depend on the
    batch, on params. maker: {variable: index of the equation that makes it}. outputs: the arrays that the function
    returns. loops: the scans that were unrolled, inner ones first. masks: whether the leaf of a path holds zeros and
    ones alone. lost: whether a product's own derivative was lost, since its call was inlined. calls: those with a
    derivative of their own, inner ones first. unroll: whether loops over weights are read step by step. source: reads
    the function anew for `rolled`; None where it was read so. returned: what `outputs` are. own: traces of functions of
    ours.
    """

    equations: list[Equation] = field(default_factory=list)
    shapes: dict[int, Any] = field(default_factory=dict)
    leaves: dict[str, int] = field(default_factory=dict)
    names: dict[int, str] = field(default_factory=dict)
    batch: list[int] = field(default_factory=list)
    constants: dict[int, Any] = field(default_factory=dict)
    data: set[int] = field(default_factory=set)
    parametric: set[int] = field(default_factory=set)
    maker: dict[int, int] = field(default_factory=dict)
    outputs: list[Atom] = field(default_factory=list)
    masks: Callable[[str], bool] = lambda path: False
    keep_derivatives: bool = False
    unroll: bool = True
    returned: Outputs = field(default_factory=Outputs)
    lost: bool = False
    loops: list[Loop] = field(default_factory=list)
    calls: list[Call] = field(default_factory=list)
    source: Callable[[], Program] | None = None
    own: dict[Hashable, Any] = field(default_factory=dict)
    _known: dict[Hashable, tuple[int, ...]] = field(default_factory=dict)
    _types: dict[int, Hashable] = field(default_factory=dict)
    _read: dict[int, tuple[Any, Parameters, Hashable]] = field(default_factory=dict)

    def rolled(self) -> Program:
        """The same function with loops whole, and with variables of their own for what `calls` give."""
        return self if self.source is None else self.source()

    def new(self, aval: Any) -> int:
        """A new variable."""
        var = len(self.shapes)
        self.shapes[var] = aval
        return var

    def constant(self, value: Any) -> int:
        """The variable that holds `value`, an array or number; the same one when the same value comes again."""
        key = ("constant", value_key(value))
        if key not in self._known:
            var = self.new(jax.typeof(value))
            self.constants[var] = value
            self._known[key] = (var,)
        return self._known[key][0]

    def text(self) -> list[Any]:
        """What the program does, the same in every process: its equations, with the parameters that have a plain text,
        and the constants that it closed over.
        """
        lines: list[Any] = []
        for eqn in self.equations:
            plain = {name: text for name, value in eqn.params.items() if " at 0x" not in (text := repr(value))}
            lines.append([eqn.primitive.name, [str(atom) for atom in eqn.inputs], list(eqn.outputs), plain])
        return [*lines, list(self.constants.values()), [str(atom) for atom in self.outputs]]

    def is_data(self, atom: Atom) -> bool:
        """Whether `atom` depends on the batch."""
        return isinstance(atom, int) and atom in self.data

    def is_parametric(self, atom: Atom) -> bool:
        """Whether `atom` depends on params and not on the batch."""
        return isinstance(atom, int) and atom in self.parametric and atom not in self.data

    def emit(self, eqn: Any, inputs: tuple[Atom, ...], context: Any) -> tuple[Atom, ...]:
        """Add the equation of a jaxpr with these inputs, or find the one that already computes it."""
        if id(eqn) not in self._read:  # an equation of a loop comes again at each step
            self._read[id(eqn)] = eqn, versions.parameters(eqn), frozen(eqn.params)
        _, params, text = self._read[id(eqn)]
        key = (eqn.primitive.name, text, tuple(map(self._type_key, inputs)))
        identity = (key, tuple(a.key if isinstance(a, Literal) else a for a in inputs))
        if not eqn.effects and identity in self._known:
            return self._known[identity]
        equation = Equation(eqn.primitive, params, inputs, (), key, context)
        if not eqn.effects and self._is_counter(eqn, inputs):
            values = equation.run([a.value if isinstance(a, Literal) else self.constants[a] for a in inputs])
            outputs = tuple(self.constant(value) for value in values)
        else:
            outputs = self._add(equation, eqn.outvars)
        self._known[identity] = outputs
        return outputs

    def _add(self, equation: Equation, outvars: Iterable[Any]) -> tuple[int, ...]:
        """New variables for what an equation gives."""
        outputs = tuple(self.new(v.aval) for v in outvars)
        for var in outputs:
            self.maker[var] = len(self.equations)
        for kind in (self.data, self.parametric):
            if any(isinstance(a, int) and a in kind for a in equation.inputs):
                kind.update(outputs)
        self.equations.append(equation._replace(outputs=outputs))
        return outputs

    def alias(self, atom: Atom) -> int:
        """A variable of its own that holds the same value."""
        type_ = self.type_of(atom)
        (eqn,) = jax.make_jaxpr(jnp.copy)(jax.ShapeDtypeStruct(type_.shape, type_.dtype)).jaxpr.eqns
        key = (eqn.primitive.name, (), (self._type_key(atom),))
        return self._add(Equation(eqn.primitive, versions.parameters(eqn), (atom,), (), key, None), eqn.outvars)[0]

    def type_of(self, atom: Atom) -> Any:
        """Shape and dtype."""
        return jax.typeof(atom.value) if isinstance(atom, Literal) else self.shapes[atom]

    def _type_key(self, atom: Atom) -> Hashable:
        if isinstance(atom, Literal):
            return type_key(jax.typeof(atom.value))
        if atom not in self._types:
            self._types[atom] = type_key(self.shapes[atom])
        return self._types[atom]

    def _is_counter(self, eqn: Any, inputs: tuple[Atom, ...]) -> bool:
        """Whether the equation computes small whole numbers from known ones, such as the index of a loop."""
        return (
            all(isinstance(a, Literal) or a in self.constants for a in inputs)
            and all(v.aval.size <= 16 and _is_whole(v.aval.dtype) for v in eqn.outvars)
            and all(math.prod(self.type_of(a).shape) <= 16 for a in inputs)
        )


def _is_whole(dtype: Any) -> bool:
    """Whether a dtype is boolean or a whole number (random keys have dtypes that NumPy does not know)."""
    return jnp.issubdtype(dtype, jnp.integer) or dtype == np.bool_
