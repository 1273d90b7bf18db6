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
from pruneopt.program.keys import Literal
from pruneopt.program.program import Atom, Equation, straightened
from pruneopt.program.remainder import SUMS, Remainder

Gone = Mapping[int, Bool[np.ndarray, " units"]]  # {class of units: which of them are deleted}
Resize = Callable[["Site", list[Any]], tuple[dict[str, Any], list[Any]]]  # (changed parameters, changed inputs)


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
            units = np.array([bool(np.any(own)) and bool(np.all(lost[own])) for own in owned], bool)
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
        self.reader, self._gone, self._rules, self._remainder = reader, gone, rules, remainder
        self._kept: dict[int, Bool[np.ndarray, " n"]] = {}
        self._last: dict[Atom, int] = {}
        program = reader.program
        self._calls: dict[int, list[Equation]] = {}
        for at, call in program.calls:
            self._calls.setdefault(at, []).append(call)
        for i, equation in sorted([*enumerate(program.equations), *program.calls], key=lambda pair: pair[0]):
            self._last.update({atom: i for atom in equation.inputs if isinstance(atom, int)})
        self._left: dict[int, list[int]] = {}  # units of which a sum takes what is left
        for i, equation in enumerate(program.equations if remainder else ()):
            if remainder and equation.primitive.name in SUMS:
                self._left[i] = [unit for unit in gone if remainder.summed(i, unit)]
                if not all(remainder.is_known(i, unit) for unit in self._left[i]):
                    raise NotImplementedError(
                        f"a derivative of its own sums ({equation.primitive.name}) what units that are gone leave, and "
                        "what that is is not known apart; its forward pass is right"
                    )
                needs = {atom for unit in self._left[i] for atom in remainder.needs(i, unit)}
                self._last.update({atom: max(i, self._last.get(atom, i)) for atom in needs})

    def kept(self, axis: int) -> Bool[np.ndarray, " n"]:
        """Which entries of an axis are left."""
        if axis not in self._kept:
            axes = self.reader.axes
            kept = np.ones(axes.size[axis], bool)
            for atom in self._gone.keys() & set(axes.atoms(axis)):
                kept &= ~np.any(axes.owned(axis, atom)[self._gone[atom]], axis=0)
            self._kept[axis] = kept
        return self._kept[axis]

    def sizes(self, ids: Ids) -> tuple[int, ...]:
        """How many entries of each axis are left; all of an axis of copies, which each reader cuts for itself."""
        return tuple(
            self.reader.axes.size[axis] if axis in self.reader.copies else int(self.kept(axis).sum()) for axis in ids
        )

    def sliced(self, value: Any, ids: Ids, but: int = -1) -> Any:
        """An array without the deleted entries of these axes, all but one of them."""
        for k, axis in enumerate(ids):
            if k != but and not (kept := self.kept(axis)).all():
                value = taken(value, np.flatnonzero(kept), k)
        return value

    def fitted(self, value: Any, own: Ids, read: Ids, but: int = -1) -> Any:
        """An array with as many copies along each axis, all but one of them, as its reader needs."""
        for k, (axis, needed) in enumerate(zip(own, read, strict=True)):
            if k != but and axis != needed and not (kept := self.kept(needed)).all():
                value = jax.lax.slice_in_dim(value, 0, int(kept.sum()), axis=k)
        return value

    def __call__(self, leaves: Mapping[str, Any], batch: Sequence[Any]) -> list[Any]:
        """The outputs, of leaves without the deleted entries."""
        reader, program = self.reader, self.reader.program
        env: dict[Atom, Any] = {var: leaves[path] for path, var in program.leaves.items()}
        env.update(zip(program.batch, batch, strict=True))
        wanted = {atom for atom in program.outputs if isinstance(atom, int)}
        for i, (equation, read) in enumerate(zip(program.equations, reader.read, strict=True)):
            self._call(env, i)
            values = [self._value(env, atom, ids) for atom, ids in zip(equation.inputs, read, strict=True)]
            results = self._scan(i, equation, values) if i in reader.inner else self._run(equation, read, values)
            for unit in self._left.get(i, ()):
                assert self._remainder is not None
                results = [results[0] + self._remainder.value(i, unit, self._gone[unit], self, env)]
            env.update(zip(equation.outputs, results, strict=True))
            for atom in {a for a in equation.inputs if isinstance(a, int) and self._last[a] == i} - wanted:
                env.pop(atom, None)
        self._call(env, len(program.equations))
        return [self._value(env, atom, ids) for atom, ids in zip(program.outputs, reader.ends, strict=True)]

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

    def _call(self, env: dict[Atom, Any], at: int) -> None:
        """Put what calls with derivatives of their own give in the place of what their bodies gave."""
        for call in self._calls.get(at, ()):
            ids = [self.reader.of(atom) for atom in call.inputs]
            values = [self._value(env, atom, one) for atom, one in zip(call.inputs, ids, strict=True)]
            shapes = [self.reader.shape(atom) for atom in call.inputs]
            if shapes == [tuple(np.shape(value)) for value in values]:
                results = call.run(values)
            else:
                results = self._derived(call, ids)(*values)
            env.update((a, r) for a, r in zip(call.outputs, results, strict=True) if isinstance(a, int))

    def _derived(self, call: Equation, ids: list[Ids]) -> Callable[..., list[Any]]:
        """A call at the sizes that are left, with its own derivative."""
        body = versions.body(call)

        def plain(*values: Any) -> list[Any]:
            return self._part(versions.plain(body), versions.constants(body), ids, call.inputs)(values)

        if call.primitive.name == "custom_jvp_call" and not call.params["num_consts"]:
            return self._with_tangents(call, ids, plain)
        rule = versions.backward_rule(call) if call.primitive.name == "custom_vjp_call" else None
        return self._with_cotangents(call, rule, ids, plain) if rule else _without_gradient(call, plain)

    def _with_tangents(self, call: Equation, ids: list[Ids], plain: Callable[..., list[Any]]) -> Any:
        """`plain` with the rule of a `custom_jvp`."""
        function = jax.custom_jvp(plain)

        @function.defjvp
        def derivative(primals: tuple[Any, ...], tangents: tuple[Any, ...]) -> Any:
            rule, held, zeros = versions.forward_rule(call)
            results = self._part(rule, held, [*ids, *ids], (*call.inputs, *call.inputs))((*primals, *tangents))
            values, moved = results[: len(zeros)], iter(results[len(zeros) :])
            return values, [jnp.zeros_like(v) if zero else next(moved) for v, zero in zip(values, zeros, strict=True)]

        return function

    def _with_cotangents(
        self, call: Equation, rule: versions.Backward, ids: list[Ids], plain: Callable[..., list[Any]]
    ) -> Any:
        """`plain` with the rule of a `custom_vjp`: its forward pass rewritten, its backward one traced anew."""
        function = jax.custom_vjp(plain)

        def forward(*values: Any) -> Any:
            results = self._part(rule.jaxpr, rule.held, ids, call.inputs)(values)
            made = sum(at is None for at in rule.forwarded)
            given = iter(results[:made])
            return results[made:], [next(given) if at is None else values[at] for at in rule.forwarded]

        def backward(residuals: list[Any], cotangents: list[Any]) -> Any:
            found = rule.function(rule.residuals.unflatten(residuals), rule.outputs.unflatten(cotangents))
            return tuple(jax.tree.leaves(found, is_leaf=lambda x: x is None))

        function.defvjp(forward, backward)
        return function

    def _part(
        self, jaxpr: Any, held: Sequence[Any], ids: list[Ids], atoms: Sequence[Atom]
    ) -> Callable[[Sequence[Any]], list[Any]]:
        """A jaxpr whose inputs are variables of the program of these axes, with what is gone of them deleted."""
        axes, copies = self.reader.axes, self.reader.copies
        with jax.ensure_compile_time_eval():
            repeated = {str(i): [k for k, axis in enumerate(one) if axis in copies] for i, one in enumerate(ids)}
            inside = Reader(straightened(jaxpr, held), self._rules.axes, self._rules.whole, repeated)
        entries = [
            (f"input {i}", inside.leaves[str(i)][k], ~self.kept(axis))
            for i, one in enumerate(ids)
            for k, axis in enumerate(one)
            if axis not in copies and axes.size[axis] != 1
        ]
        gone, left = gone_units(inside.axes, entries), None
        if self._remainder:
            zero = {str(i): self._remainder.zeros(atom, self._gone) for i, atom in enumerate(atoms)}
            start = {
                path: [frozenset(inside.axes.atoms(axis)) if every else frozenset() for axis, every in pairs]
                for path, flags in zero.items()
                for pairs in [list(zip(inside.leaves[path], flags, strict=True))]
            }
            left = self._remainder.within(inside, start)
        part = Rewritten(inside, gone, self._rules, left)
        return lambda values: part({str(i): value for i, value in enumerate(values)}, ())

    def _value(self, env: Mapping[Atom, Any], atom: Atom, read: Ids) -> Any:
        """An atom as an equation reads it: copies cut to as many as it needs, constants to what is left."""
        reader = self.reader
        if isinstance(atom, Literal):
            return atom.value
        if atom in reader.program.constants:
            return self.sliced(reader.program.constants[atom], read)
        return self.fitted(env[atom], reader.of(atom), read)

    def narrow(self, i: int, values: Sequence[Any], sizes: Mapping[int, int]) -> list[Any]:
        """The results of equation `i` where these axes have other sizes."""
        part = copy(self)
        part._kept = self._kept | {axis: np.ones(n, bool) for axis, n in sizes.items()}
        return part._run(self.reader.program.equations[i], self.reader.read[i], list(values))

    def _run(self, equation: Equation, read: tuple[Ids, ...], values: list[Any]) -> list[Any]:
        site = Site(self, equation, read)
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


def _without_gradient(call: Equation, plain: Callable[..., list[Any]]) -> Any:
    function = jax.custom_jvp(plain)

    @function.defjvp
    def derivative(primals: tuple[Any, ...], tangents: tuple[Any, ...]) -> Any:
        raise NotImplementedError(
            f"the gradient of a {call.primitive.name} that was cut to other sizes: its rule is written for the old "
            "ones; its forward pass is right"
        )

    return function


class Site(NamedTuple):
    """Where an equation stands: what is left of its inputs and outputs."""

    program: Rewritten
    equation: Equation
    read: tuple[Ids, ...]

    def shape(self, i: int) -> tuple[int, ...]:
        """Of input i before."""
        return self.program.reader.shape(self.equation.inputs[i])

    def kept(self, i: int, k: int) -> Bool[np.ndarray, " n"]:
        """Entries of axis k of input i that are left."""
        return self.program.kept(self.read[i][k])

    def out(self, i: int) -> tuple[int, ...]:
        """The shape of output i."""
        return self.program.sizes(self.program.reader.of(self.equation.outputs[i]))


def taken(value: Any, at: np.ndarray, axis: int) -> Any:
    """The entries `at`, in order, along an axis: a slice where they are evenly spaced."""
    steps = np.unique(np.diff(at))
    if not len(at) or len(steps) > 1 or (len(steps) and steps[0] < 1):
        return value.take(at, axis=axis)
    step = int(steps[0]) if len(steps) else 1
    place = tuple(slice(int(at[0]), int(at[-1]) + 1, step) if k == axis else slice(None) for k in range(value.ndim))
    return value[place]


def to_shape(name: str) -> Resize:
    """The parameter of that name is the shape of the result."""
    return lambda site, values: ({name: site.out(0)}, values)


def reshaped(site: Site, values: list[Any]) -> tuple[dict[str, Any], list[Any]]:
    """To the sizes that are left."""
    return {"new_sizes": site.out(0)}, values


def cut(site: Site, values: list[Any]) -> tuple[dict[str, Any], list[Any]]:
    """A slice of what is left: the entries that it takes are first picked, where they are no stretch."""
    p = site.equation.params
    strides = p["strides"] or (1,) * len(p["start_indices"])
    value = values[0]
    for k, (start, stop, step) in enumerate(zip(p["start_indices"], p["limit_indices"], strides, strict=True)):
        kept = site.kept(0, k)
        if not kept.all():
            at = np.arange(start, stop, step)
            value = taken(value, (np.cumsum(kept) - 1)[at[kept[at]]], k)
        else:
            value = taken(value, np.arange(start, stop, step), k)
    shape = value.shape
    return {"start_indices": (0,) * len(shape), "limit_indices": shape, "strides": None}, [value]


def split(site: Site, values: list[Any]) -> tuple[dict[str, Any], list[Any]]:
    """Into what is left of each part."""
    k = site.equation.params["axis"]
    return {"sizes": tuple(site.out(i)[k] for i in range(len(site.equation.outputs)))}, values


def dynamic_slice(site: Site, values: list[Any]) -> tuple[dict[str, Any], list[Any]]:
    """At known places of axes that are cut; axes sliced at unknown ones are whole."""
    value, *starts = values
    for k, size in enumerate(site.equation.params["slice_sizes"]):
        kept = site.kept(0, k)
        if size != len(kept) and not kept.all():
            known = site.program.reader.known(site.equation.inputs[1 + k])
            assert known is not None
            at = np.arange(size) + int(np.clip(known, 0, len(kept) - size))
            value = taken(value, (np.cumsum(kept) - 1)[at[kept[at]]], k)
            starts[k] = np.zeros((), starts[k].dtype)
    return {"slice_sizes": site.out(0)}, [value, *starts]


def gathered(site: Site, values: list[Any]) -> tuple[dict[str, Any], list[Any]]:
    """Whole slices stay whole."""
    sizes = tuple(
        values[0].shape[k] if size == n else size
        for k, (size, n) in enumerate(zip(site.equation.params["slice_sizes"], site.shape(0), strict=True))
    )
    return {"slice_sizes": sizes}, values


def convolved(site: Site, values: list[Any]) -> tuple[dict[str, Any], list[Any]]:
    """As many groups as channels are left for."""
    spec, (image, kernel, *rest) = site.equation.params["dimension_numbers"], values
    channels, inside = image.shape[spec.lhs_spec[1]], kernel.shape[spec.rhs_spec[1]]
    if not channels:  # nothing is summed
        kernel, inside = jax.lax.slice_in_dim(kernel, 0, 0, axis=spec.rhs_spec[1]), 0
    return {"feature_group_count": channels // inside if inside else 1}, [image, kernel, *rest]
