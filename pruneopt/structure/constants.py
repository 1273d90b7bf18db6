"""Units whose value depends on nothing: their part of a product is added to the bias that the product meets."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Bool

from pruneopt.program.program import Atom, Equation
from pruneopt.program.zeros import Zeros
from pruneopt.structure.units import Group, Units

_LAYOUT = {"reshape", "transpose", "broadcast_in_dim", "squeeze", "copy", "convert_element_type"}
_EXACT = 1e-6  # of the largest entry: what a bias must reproduce of a product's constant part, or it is not moved


class Constants:
    """The program of `units`, asked where units are constant. batch: arrays to evaluate it on.

    That params alone decide a value is read from the program; that it is the same at every position and example, so
    that a bias can take its place, is then seen from its values, of which the batch must show two along each axis.
    """

    def __init__(self, units: Units, batch: Sequence[Any]):
        self._units, self._reader, self._batch = units, units.reader, batch
        program = self._reader.program
        self._readers: dict[Atom, list[int]] = {}
        for i, equation in enumerate(program.equations):
            for atom in {a for a in equation.inputs if isinstance(a, int)}:
                self._readers.setdefault(atom, []).append(i)
        self._outputs = {atom for atom in program.outputs if isinstance(atom, int)}
        pairs = [
            (equation.inputs[:2], i)
            for i, equation in enumerate(program.equations)
            if equation.primitive.name in ("dot_general", "conv_general_dilated")
            and all(isinstance(atom, int) for atom in equation.inputs[:2])
        ]
        times = Counter(pair for pair, _ in pairs)
        self._products = {pair: i for pair, i in pairs if times[pair] == 1}
        self._run = jax.jit(self._operands)

    def are_steady(self, zeros: Zeros, unit: int, products: Sequence[int]) -> bool:
        """Whether a class of units is constant on one side of each of these contractions, its weights on the other."""
        steady = self._steady(zeros, unit) if products else set()
        is_data = self._reader.program.is_data
        for i in products:
            _, _, left, right, _ = self._reader.contractions[i]
            if (left, right) not in self._products or is_data(left) == is_data(right):
                return False
            if (left if is_data(left) else right) not in steady:
                return False
        return True

    def move(
        self,
        values: dict[str, Any],
        live: Mapping[str, np.ndarray],
        group: Group,
        which: Bool[np.ndarray, " units"],
        products: Sequence[int],
    ) -> bool:
        """Put what these units contribute to products into the biases there, and zeros in their own leaves.

        False, and nothing is changed, where a product meets no bias that can take it exactly.
        """
        operands = self._run(values, self._batch)
        moved: dict[str, Any] = {}
        for i in products:
            found = self._into_bias(values | moved, operands, group, which, i)
            if found is None or found[0] in dict(group.members):
                return False
            moved |= [found]
        for path, new in moved.items():
            live[path][...] |= np.asarray(new != 0)
        for path, axis in group.members:
            at = (slice(None),) * axis + (self._units.places(group, path, axis)[which].ravel(),)
            moved[path] = jnp.asarray(moved.get(path, values[path])).at[at].set(0)
        values.update(moved)
        return True

    def _steady(self, zeros: Zeros, unit: int) -> set[Atom]:
        """Variables whose entries at a class of units depend on params alone."""
        reader, program = self._reader, self._reader.program
        carried = lambda ids: [axis for axis in ids if unit in reader.axes.atoms(axis)]  # noqa: E731
        found: set[Atom] = set()
        for i, (equation, read) in enumerate(zip(program.equations, reader.read, strict=True)):
            data = [(a, carried(ids)) for a, ids in zip(equation.inputs, read, strict=True) if program.is_data(a)]
            known = i not in reader.inner and all(len(axes) == 1 and atom in found for atom, axes in data)
            for out in equation.outputs:
                axes = carried(reader.of(out))
                is_zero = any(unit in zeros.along(out, axis) for axis in axes)
                if is_zero or (known and len(axes) == 1):
                    found.add(out)
        return found

    def _operands(self, leaves: Mapping[str, Any], batch: Sequence[Any]) -> dict[int, list[Any]]:
        """Both sides of every product, by the number of its equation."""
        program, found = self._reader.program, {}
        wanted = {atom for pair in self._products for atom in pair}

        def seen(equation: Equation, results: Sequence[Any]) -> None:
            found.update((a, r) for a, r in zip(equation.outputs, results, strict=True) if a in wanted)

        found.update((var, leaves[path]) for path, var in program.leaves.items() if var in wanted)
        found.update((var, value) for var, value in zip(program.batch, batch, strict=True) if var in wanted)
        found.update((var, value) for var, value in program.constants.items() if var in wanted)
        self._units.rewritten({})(leaves, batch, seen)
        pairs = {i: [found[a] for a in pair if a in found] for pair, i in self._products.items()}
        return {i: values for i, values in pairs.items() if len(values) == 2}

    def _into_bias(
        self,
        values: Mapping[str, Any],
        operands: Mapping[int, list[Any]],
        group: Group,
        which: Bool[np.ndarray, " units"],
        product: int,
    ) -> tuple[str, Any] | None:
        """(leaf, its value with what these units add to a product), or None where no leaf can take it."""
        reader = self._reader
        a, b, left, right, _ = reader.contractions[product]
        number = self._products[left, right]
        if number not in operands:
            return None
        equation, side = reader.program.equations[number], 0 if reader.program.is_data(left) else 1
        axis = (a, b)[side]
        owned = np.any(reader.axes.owned(axis, self._units.atom(group))[which], axis=0)
        sides = list(operands[number])
        k = reader.read[number][side].index(axis)
        if 1 in (n for j, n in enumerate(np.shape(sides[side])) if j != k):
            return None  # one position shows nothing of others that a longer batch has
        place = [1] * np.ndim(sides[side])
        place[k] = -1
        sides[side] = jnp.where(owned.reshape(place), sides[side], jnp.zeros((), sides[side].dtype))
        met = self._bias(equation.outputs[0], equation.run(sides)[0])
        if met is None:
            return None
        path, laid, added = met
        layout = lambda value: jnp.broadcast_to(laid(value), added.shape)  # noqa: E731
        spread = jax.linear_transpose(layout, values[path])
        times = spread(jnp.ones_like(added))[0]
        share = spread(added)[0] / jnp.where(times == 0, jnp.ones_like(times), times)
        if float(jnp.max(jnp.abs(layout(share) - added))) > _EXACT * float(jnp.max(jnp.abs(added))):
            return None
        return path, values[path] + share

    def _bias(self, atom: Atom, added: Any) -> tuple[str, Any, Any] | None:
        """(leaf, how it is laid out, what it must take there) of the leaf that alone is added to a variable."""
        program = self._reader.program
        while atom not in self._outputs and len(readers := self._readers.get(atom, [])) == 1:
            equation = program.equations[readers[0]]
            name, inputs = equation.primitive.name, equation.inputs
            if name in _LAYOUT and len(inputs) == 1:
                (atom,), (added,) = equation.outputs, equation.run([added])
            elif name in ("add", "sub") and inputs[0] != inputs[1]:
                leaf = self._leaf(inputs[1 - inputs.index(atom)])
                return None if leaf is None else (*leaf, -added if name == "sub" else added)
            else:
                return None
        return None

    def _leaf(self, atom: Atom) -> tuple[str, Any] | None:
        """(path, how it is laid out) of the leaf that a variable holds and that nothing else reads."""
        program, chain = self._reader.program, []
        while isinstance(atom, int) and len(self._readers.get(atom, [])) == 1 and atom not in self._outputs:
            if atom in program.names:

                def layout(value: Any) -> Any:
                    for equation in reversed(chain):
                        (value,) = equation.run([value])
                    return value

                return program.names[atom], layout
            equation = program.equations[program.maker[atom]] if atom in program.maker else None
            if equation is None or equation.primitive.name not in _LAYOUT or len(equation.inputs) != 1:
                return None
            chain.append(equation)
            atom = equation.inputs[0]
        return None
