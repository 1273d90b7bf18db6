"""Jaxprs and their parts compared: keys that are equal where two equations do the same."""

from __future__ import annotations

from collections.abc import Hashable
from typing import Any, NamedTuple

import jax
import numpy as np

from pruneopt import _tree
from pruneopt.program.versions import bodies, constants, plain


class Literal(NamedTuple):
    """A number that stands in the program's text."""

    value: Any
    key: Hashable


def literal(value: Any, aval: Any) -> Literal:
    """A literal of exactly the dtype that the equation expects."""
    array = np.asarray(value, aval.dtype) if not hasattr(value, "dtype") else value
    return Literal(array, (aval.dtype, np.asarray(array).tobytes()))


def frozen(value: Any) -> Hashable:
    """A key of an equation's parameters: equal where the equations do the same. Objects compare by identity."""
    if isinstance(value, dict):
        return tuple((k, frozen(v)) for k, v in sorted(value.items()))
    if isinstance(value, (tuple, list)):
        return (type(value).__name__, *map(frozen, value))
    if hasattr(plain(value), "eqns"):
        return ("jaxpr", _body_key(plain(value)), tuple(map(value_key, constants(value))))
    if callable(value) and not isinstance(value, type):
        return _Same(value)
    try:
        hash(value)
    except TypeError:
        return _Same(value)
    return value


def _body_key(jaxpr: Any) -> Hashable:
    """A key of a plain jaxpr. Its text would not do: it hides the constants of jaxprs inside."""
    numbers: dict[Any, int] = {}

    def at(atom: Any) -> Hashable:
        return literal(atom.val, atom.aval).key if hasattr(atom, "val") else numbers.setdefault(atom, len(numbers))

    heads = tuple((at(v), str(v.aval)) for v in (*jaxpr.constvars, *jaxpr.invars))
    equations = tuple(
        (
            e.primitive.name,
            frozen(e.params),
            tuple(map(at, e.invars)),
            tuple((at(v), str(v.aval)) for v in e.outvars),
        )
        for e in jaxpr.eqns
    )
    return heads, equations, tuple(map(at, jaxpr.outvars))


def value_key(value: Any) -> Hashable:
    """A key of a constant: small ones by what they hold, others by identity."""
    small = is_array_of_numbers(value) and value.size <= 16
    return type_key(jax.typeof(value)), np.asarray(value).tobytes() if small else _Same(value)


class _Same:
    """Equal to itself alone; keeps its object alive, so that no other takes its address."""

    def __init__(self, value: Any):
        self.value = value

    def __hash__(self) -> int:
        return id(self.value)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Same) and self.value is other.value


def type_key(aval: Any) -> Hashable:
    """A key of a shape and dtype."""
    return (tuple(aval.shape), aval.dtype, bool(getattr(aval, "weak_type", False)))


def is_array_of_numbers(value: Any) -> bool:
    """Whether NumPy can hold `value` (no random key, no reference)."""
    return _tree.is_array(value) or isinstance(value, np.generic)


def signature(body: Any) -> list[Any]:
    """What a jaxpr does, for telling two traces apart: its numbers, shapes, primitives and their plain parameters."""
    numbers = [a.val for e in plain(body).eqns for a in e.invars if hasattr(a, "val")] + list(constants(body))
    equations = [
        (
            e.primitive.name,
            [str(v.aval) for v in e.outvars],
            [(k, v) for k, v in e.params.items() if _is_plain(v)],
            *map(signature, bodies(e)),
        )
        for e in plain(body).eqns
    ]
    return [[np.asarray(n).tobytes() if is_array_of_numbers(n) else str(n) for n in numbers], equations]


def _is_plain(value: Any) -> bool:
    return isinstance(value, (int, float, str)) or (type(value) is tuple and all(map(_is_plain, value)))
