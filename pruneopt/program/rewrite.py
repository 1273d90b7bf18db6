"""A program with entries of its axes deleted: the same equations at the sizes that are left."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from copy import copy
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Bool

from pruneopt.program import versions
from pruneopt.program.axes import Axes, AxisRule, Ids, Reader
from pruneopt.program.flatten import straightened
from pruneopt.program.keys import Literal
from pruneopt.program.live import live
from pruneopt.program.program import Atom, Equation
from pruneopt.program.remainder import SUMS, Remainder
from pruneopt.program.resize import Gone, Left, Resize, Site

Seen = Callable[[Equation, Sequence[Any]], None]


class Misaligned(ValueError):
    """Entries that are to go and are not whole units of a program."""


def gone_units(axes: Axes, entries: Sequence[tuple[str, int, Bool[np.ndarray, " n"]]]) -> dict[int, np.ndarray]:
    """{class: units deleted} of (name, axis, its deleted entries).

    Raises Misaligned where an axis loses part of a unit, or two axes of one class disagree.
    """
    found: dict[int, np.ndarray] = {}
    for name, axis, lost in entries:
        explained = np.zeros(len(lost), bool)
        for atom in dict.fromkeys(axes.atoms(axis)):
            owned = axes.owned(axis, atom)
            units = np.any(owned, axis=1) & ~np.any(owned[:, ~lost], axis=1)
            if np.any(units != found.setdefault(atom, units)):
                raise Misaligned(f"the entries cut from {name} are not those of what it is tied to")
            explained |= np.any(owned[units], axis=0)
        if np.any(explained != lost):
            raise Misaligned(f"the entries cut from {name} are no whole units here")
    return {atom: units for atom, units in found.items() if units.any()}


class Rules(NamedTuple):
    """Columns of the table of primitives: which axes they tie, why some stay whole, how they take other sizes."""

    axes: Mapping[str, AxisRule]
    whole: Mapping[str, str]
    resize: Mapping[str, Resize]


class Rewritten:
    """A program whose units `gone` are deleted from every array.

    Numbers that fn computed from shapes stay as they were traced. A function with a derivative of its own keeps it: its
    rule is rewritten like its body, or traced anew; where neither can be, its gradient is refused by name.
    """

    def __init__(self, reader: Reader, gone: Gone, rules: Rules, remainder: Remainder | None = None):
        self.reader, self.left, self._gone, self._rules = reader, Left(reader, gone), gone, rules
        self._remainder = remainder
        self._rest: dict[int, list[int]] = {}  # units of which a sum takes what is left
        needs: dict[int, set[int]] = {}
        for i, equation in enumerate(reader.program.equations if remainder else ()):
            if remainder and equation.primitive.name in SUMS and (units := [u for u in gone if remainder.summed(i, u)]):
                if not all(remainder.is_known(i, unit) for unit in units):
                    raise NotImplementedError(
                        f"a derivative of its own sums ({equation.primitive.name}) what units that are gone leave, and "
                        "what that is is not known apart; its forward pass is right"
                    )
                self._rest[i], needs[i] = units, {atom for unit in units for atom in remainder.needs(i, unit)}
        self._live = live(reader, self.left, needs)

    def __call__(self, leaves: Mapping[str, Any], batch: Sequence[Any], seen: Seen | None = None) -> list[Any]:
        """The outputs, of leaves without the deleted entries. seen: called with each equation and what it gave."""
        reader, program = self.reader, self.reader.program
        env = _Values(self)
        env.update((var, leaves[path]) for path, var in program.leaves.items())
        env.update(zip(program.batch, batch, strict=True))
        wanted = {atom for atom in program.outputs if isinstance(atom, int)}
        for at, step in enumerate(self._live.steps):
            i, equation = step.number, step.equation
            read = reader.read[i] if i >= 0 else tuple(reader.of(atom) for atom in equation.inputs)
            if step.takes >= 0:
                results = [self._value(env, equation.inputs[step.takes], read[step.takes])]
            else:
                values = [self._value(env, atom, ids) for atom, ids in zip(equation.inputs, read, strict=True)]
                results = self._step(i, equation, read, values)
            for unit in self._rest.get(i, ()):
                assert self._remainder is not None
                results = [results[0] + self._remainder.value(i, unit, self._gone[unit], self, env)]
            env.update(zip(equation.outputs, results, strict=True))
            if seen is not None:
                seen(equation, results)
            for atom in {a for a in step.reads if self._live.last[a] == at} - wanted:
                env.pop(atom, None)
        return [self._value(env, atom, ids) for atom, ids in zip(program.outputs, reader.ends, strict=True)]

    def _step(self, i: int, equation: Equation, read: tuple[Ids, ...], values: list[Any]) -> list[Any]:
        if i < 0:
            return self._call(equation, values)
        return self._scan(i, equation, values) if i in self.reader.inner else self._run(equation, read, values)

    def _inside(self, i: int) -> Rewritten:
        """The body of a loop."""
        left = self._remainder.inner[i] if self._remainder else None
        return Rewritten(self.reader.inner[i], self._gone, self._rules, left)

    def _scan(self, i: int, equation: Equation, values: list[Any]) -> list[Any]:
        """A loop whose body is rewritten."""
        loop, body = versions.scan(equation), self._inside(i)
        n, k = loop.shared, loop.carry

        def step(carry: list[Any], sliced: list[Any]) -> tuple[list[Any], list[Any]]:
            inputs = [*values[:n], *carry, *sliced]
            results = body({str(j): value for j, value in enumerate(inputs)}, ())
            return results[:k], results[k:]

        carry, stacked = jax.lax.scan(
            step, values[n : n + k], values[n + k :], loop.length, reverse=loop.reverse, unroll=loop.unroll
        )
        return [*carry, *stacked]

    def _call(self, call: Equation, values: list[Any]) -> list[Any]:
        """What a call with a derivative of its own gives, in the place of what its body would."""
        if [self.reader.shape(atom) for atom in call.inputs] == [tuple(np.shape(value)) for value in values]:
            return call.run(values)
        return list(self._derived(call)(*values))

    def _derived(self, call: Equation) -> Callable[..., list[Any]]:
        """A call at the sizes that are left, with its own derivative."""
        body = versions.body(call)
        inside = self._part(versions.plain(body), versions.constants(body), self._sides(call.inputs))
        plain = lambda *values: _run(inside, values)  # noqa: E731
        if call.primitive.name == "custom_jvp_call" and not call.params["num_consts"]:
            return self._with_tangents(call, plain)
        rule = versions.backward_rule(call) if call.primitive.name == "custom_vjp_call" else None
        return self._with_cotangents(call, rule, plain) if rule else _without_gradient(call, plain)

    def _with_tangents(self, call: Equation, plain: Callable[..., list[Any]]) -> Any:
        """`plain` with the rule of a `custom_jvp`."""
        function, sides = jax.custom_jvp(plain), self._sides(call.inputs)

        @function.defjvp
        def derivative(primals: tuple[Any, ...], tangents: tuple[Any, ...]) -> Any:
            rule, held, zeros = versions.forward_rule(call)
            results = _run(self._part(rule, held, [*sides, *sides]), (*primals, *tangents))
            values, moved = results[: len(zeros)], iter(results[len(zeros) :])
            return values, [jnp.zeros_like(v) if zero else next(moved) for v, zero in zip(values, zeros, strict=True)]

        return function

    def _with_cotangents(self, call: Equation, rule: versions.Backward, plain: Callable[..., list[Any]]) -> Any:
        """`plain` with the rule of a `custom_vjp`: both passes rewritten."""
        function, sides, program = jax.custom_vjp(plain), self._sides(call.inputs), self.reader.program
        front = self._part(rule.jaxpr, rule.held, sides)
        made = sum(at is None for at in rule.forwarded)
        own = front._sides(front.reader.program.outputs[:made], front.reader.ends)
        kinds = [var.aval for var in rule.jaxpr.outvars[:made]]
        given, types = iter(own), iter(kinds)
        behind = [next(given) if at is None else sides[at] for at in rule.forwarded]
        avals = [next(types) if at is None else program.type_of(call.inputs[at]) for at in rule.forwarded]
        behind += [side._replace(zero=(True,) * len(side.kept)) for side in self._sides(call.outputs)]
        avals += [program.type_of(atom) for atom in call.outputs]

        def forward(*values: Any) -> Any:
            results = _run(front, values)
            given = iter(results[:made])
            return results[made:], [next(given) if at is None else values[at] for at in rule.forwarded]

        def backward(residuals: list[Any], cotangents: list[Any]) -> Any:
            absent: list[bool] = []

            def dense(*arrays: Any) -> list[Any]:
                split = rule.residuals.num_leaves
                found = rule.function(rule.residuals.unflatten(arrays[:split]), rule.outputs.unflatten(arrays[split:]))
                leaves = jax.tree.leaves(found, is_leaf=lambda x: x is None)
                absent[:] = [leaf is None for leaf in leaves]
                return [leaf for leaf in leaves if leaf is not None]

            shapes = [jax.ShapeDtypeStruct(aval.shape, aval.dtype) for aval in avals]
            closed = jax.make_jaxpr(dense)(*shapes)
            part = self._part(versions.plain(closed), versions.constants(closed), behind)
            results = iter(zip(_run(part, [*residuals, *cotangents]), part.reader.program.outputs, strict=True))
            sizes = [self.left.sizes(self.reader.of(atom)) for atom in call.inputs]
            return tuple(
                None if missing else part.cut_copies(*next(results), size)
                for missing, size in zip(absent, sizes, strict=True)
            )

        function.defvjp(forward, backward)
        return function

    def cut_copies(self, value: Any, atom: Atom, sizes: tuple[int, ...]) -> Any:
        """An output with as many copies along its axes as these sizes say."""
        for k, (axis, n) in enumerate(zip(self.reader.of(atom), sizes, strict=True)):
            if value.shape[k] > n and axis in self.reader.copies:
                value = jax.lax.slice_in_dim(value, 0, n, axis=k)
        return value

    def _sides(self, atoms: Sequence[Atom], read: Sequence[Ids] | None = None) -> list[_Side]:
        """What is left of variables, by their axes or by those that read them."""
        reader, sides = self.reader, []
        for atom, ids in zip(atoms, read or [reader.of(atom) for atom in atoms], strict=False):
            kept = tuple(None if axis in reader.copies else self.left.kept(axis) for axis in ids)
            zero = self._remainder.zeros(atom, self._gone) if self._remainder else [False] * len(ids)
            sides.append(_Side(kept, tuple(zero)))
        return sides

    def _part(self, jaxpr: Any, held: Sequence[Any], sides: Sequence[_Side]) -> Rewritten:
        """A jaxpr of whose inputs this is left, with what is gone of them deleted."""
        with jax.ensure_compile_time_eval():
            repeated = {str(i): [k for k, kept in enumerate(s.kept) if kept is None] for i, s in enumerate(sides)}
            inside = Reader(straightened(jaxpr, held), self._rules.axes, self._rules.whole, repeated)
        axes = [inside.leaves[str(i)] for i in range(len(sides))]
        entries = [
            (f"input {i}", axis, ~kept)
            for i, side in enumerate(sides)
            for axis, kept in zip(axes[i], side.kept, strict=True)
            if kept is not None and len(kept) != 1
        ]
        zero = {
            str(i): [
                frozenset(inside.axes.atoms(a)) if z else frozenset() for a, z in zip(axes[i], s.zero, strict=True)
            ]
            for i, s in enumerate(sides)
        }
        left = self._remainder.within(inside, zero) if self._remainder else None
        return Rewritten(inside, gone_units(inside.axes, entries), self._rules, left)

    def _value(self, env: Mapping[Atom, Any], atom: Atom, read: Ids) -> Any:
        """An atom as an equation reads it: copies cut to as many as it needs, constants to what is left."""
        reader = self.reader
        if isinstance(atom, Literal):
            return atom.value
        if atom in reader.program.constants:
            return self.left.sliced(reader.program.constants[atom], read)
        return self.left.fitted(env[atom], reader.of(atom), read)

    def narrow(self, i: int, values: Sequence[Any], sizes: Mapping[int, int]) -> list[Any]:
        """The results of equation `i` where these axes have other sizes."""
        part = copy(self)
        part.left = self.left.resized(sizes)
        return part._run(self.reader.program.equations[i], self.reader.read[i], list(values))

    def _run(self, equation: Equation, read: tuple[Ids, ...], values: list[Any]) -> list[Any]:
        site = Site(self.left, equation, read)
        sizes = [site.out(i) for i in range(len(equation.outputs))]
        before = [self.reader.shape(atom) for atom in (*equation.inputs, *equation.outputs)]
        if before == [*(tuple(np.shape(v)) for v in values), *sizes]:
            return equation.run(values)
        name, params = equation.primitive.name, dict(equation.params)
        if name in self._rules.resize:
            changed, values = self._rules.resize[name](site, values)
            params |= changed
        results = equation._replace(params=type(equation.params)(name, params)).run(values)
        for result, size in zip(results, sizes, strict=True):
            if tuple(result.shape) != size:
                raise ValueError(
                    f"{name} gives {tuple(result.shape)} where its units leave {size}; please report this program"
                )
        return results


class _Side(NamedTuple):
    """An input of a part: for each axis what is left of it, None for copies, and if it is zero where it is gone."""

    kept: tuple[Bool[np.ndarray, " n"] | None, ...]
    zero: tuple[bool, ...]


def _run(part: Rewritten, values: Sequence[Any]) -> list[Any]:
    return part({str(i): value for i, value in enumerate(values)}, ())


class _Values(dict[Atom, Any]):
    """Arrays of variables; of those that are not computed, being zero everywhere, zeros."""

    def __init__(self, program: Rewritten):
        self._program = program

    def __missing__(self, atom: int) -> Any:
        reader = self._program.reader
        return jnp.zeros(self._program.left.sizes(reader.of(atom)), reader.program.type_of(atom).dtype)


def _without_gradient(call: Equation, plain: Callable[..., list[Any]]) -> Any:
    function = jax.custom_jvp(plain)

    @function.defjvp
    def derivative(primals: tuple[Any, ...], tangents: tuple[Any, ...]) -> Any:
        raise NotImplementedError(
            f"the gradient of a {call.primitive.name} that was cut to other sizes: its rule is written for the old "
            "ones; its forward pass is right"
        )

    return function
