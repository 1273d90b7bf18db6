"""Position weights followed through the program, from the axes of the batch to the positions of each operator."""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from pruneopt.capture.tracks import Index, Rules, Where, spans
from pruneopt.program.keys import Literal
from pruneopt.program.program import Loop, Program
from pruneopt.structure.operators import Use

_HOPS = 8  # equations between a product with a constant, such as a first state of zeros, and what it is added to


def checked_weights(weights: Any) -> Any:
    """Weights of positions as they are. Raises ValueError for a NaN, an infinity or a negative one."""
    values = np.asarray(weights)
    if not np.all(np.isfinite(values)) or np.any(values < 0):
        raise ValueError("weights hold a NaN, an infinity or a negative number; pass weights >= 0, 0 where padded")
    return weights


class Positions:
    """Which entry of the weights each position of a product has.

    The axes of the weights are the first axes of the batch's arrays: (B,), (B, T). An axis is followed through all that
    moves, cuts, folds or joins it; what an index picks stands where the index does. In a step of an unrolled loop that
    reads one position of it, all that the step computes is at that position; what the loop hands on afterwards is at
    none. Where an axis was summed over, or never was, a position counts as the heaviest of them does.
    """

    def __init__(self, program: Program, shape: tuple[int, ...]):
        self._program, self._shape = program, shape
        of = lambda atom: tuple(program.type_of(atom).shape)  # noqa: E731
        self._rules = Rules(of, self._value)
        leaves = {var: of(var) for var in program.batch}
        if not shape or not any(s[: len(shape)] == shape for s in leaves.values()):
            raise ValueError(
                f"weights have shape {shape}, with which no array of the batch begins ({list(leaves.values())[:8]}); "
                "pass one weight an example (B,), or one a position (B, T) of arrays (B, T, ...)"
            )
        self._where = {var: _begun(s, shape) for var, s in leaves.items()}
        self._at: dict[int, dict[int, int]] = {}  # {equation: {axis: the position that its step reads}}
        self._read()

    def _value(self, atom: Any) -> Any:
        return atom.value if isinstance(atom, Literal) else self._program.constants.get(atom)

    def _of(self, atom: Any) -> Where:
        return self._where.get(atom, Where()) if isinstance(atom, int) else Where()

    def _read(self) -> None:
        program, starts, stops = self._program, {}, {}
        for loop in program.loops:
            for step in loop.steps:
                starts.setdefault(step[0], []).append(step)
            stops.setdefault(loop.stop, []).append(loop)
        within: list[tuple[int, dict[int, int]]] = []  # (past its last equation, the positions it reads)
        for i, equation in enumerate(program.equations):
            within = [(stop, at) for stop, at in within if i < stop]
            for loop in stops.get(i, ()):
                self._leave(loop)
            for start, stop in sorted(starts.get(i, ()), key=lambda step: -step[1]):
                within.append((stop, self._positions(start, stop)))
            at = {axis: place for _, found in within for axis, place in found.items()}
            if at:
                self._at[i] = at
            inputs = [_pinned(self._of(atom), at) for atom in equation.inputs]
            self._where.update(zip(equation.outputs, self._rules.of(equation, inputs), strict=True))
        for loop in stops.get(len(program.equations), ()):
            self._leave(loop)

    def _positions(self, start: int, stop: int) -> dict[int, int]:
        """{axis: the one position of it that a step slices}."""
        found: dict[int, set[int]] = {}
        for equation in self._program.equations[start:stop]:
            whole = self._of(equation.inputs[0]) if equation.primitive.name in ("dynamic_slice", "slice") else Where()
            if whole.tracks:
                (part,) = self._rules.of(equation, [whole, *[Where()] * (len(equation.inputs) - 1)])
                wide = {axis for axis, index in whole.tracks if spans(index)}
                for axis, index in part.tracks:
                    if axis in wide and axis >= 0 and not spans(index):
                        found.setdefault(axis, set()).add(int(index.reshape(-1)[0]))
        return {axis: places.pop() for axis, places in found.items() if len(places) == 1}

    def _leave(self, loop: Loop) -> None:
        """What a loop hands on stands at none of the positions that its steps read."""
        axes = {axis for start, stop in loop.steps for i in range(start, stop) for axis in self._at.get(i, ())}
        for atom in loop.carried:
            where = self._of(atom)
            ended = {axis for axis, index in where.tracks if axis in axes and not spans(index)}
            if ended:
                kept = tuple(track for track in where.tracks if track[0] not in ended)
                self._where[atom] = where._replace(tracks=kept, gone=where.gone | ended)  # type: ignore[index]

    def spread(self, name: str, use: Use, weights: Any) -> Float[Array, "problems positions"]:
        """The weights of a product's positions, one row for all problems where they share it.

        Raises ValueError, naming the operator, where an axis of the weights cannot be followed to it.
        """
        output = self._program.equations[use.equation].outputs[0]
        problems, positions = use.form.output_axes
        rows, n, shape = (*problems, *positions), len(problems), self._program.type_of(output).shape
        where = self._of(output) if self._of(output).known else self._met(output)
        found = []
        for axis in range(len(self._shape)):
            index = self._index(where, axis, self._at.get(use.equation, {}).get(axis), rows)
            if isinstance(index, str):
                raise ValueError(
                    f"weights: their axis {axis} cannot be followed to '{name}': {index}; leave its leaf out of "
                    "leaves=, or give one weight an example"
                )
            if index.ndim:
                index = np.transpose(index, (*rows, *(k for k in range(index.ndim) if k not in rows)))
            found.append(index.reshape(index.shape[: len(rows)] if index.ndim else [1] * len(rows)))
        own = any(size > 1 for index in found for size in index.shape[:n])
        full = [*(shape[k] if own else 1 for k in problems), *(shape[k] for k in positions)]
        return _taken(jnp.asarray(weights), [np.broadcast_to(i, full).reshape(math.prod(full[:n]), -1) for i in found])

    def _index(self, where: Where, axis: int, step: int | None, rows: tuple[int, ...]) -> Index | str:
        """The index along an axis of the weights of each entry of a product's output, -1 for no one position; or why
        there is none. step: the position that its loop reads. rows: the output's axes that are positions.
        """
        mine = [index for a, index in where.tracks if a == axis]
        wide, pins = [i for i in mine if spans(i)], [i for i in mine if not spans(i)]
        if len(wide) > 1:
            return "its positions are pairs of them"
        if wide:
            return wide[0] if set(spans(wide[0])) <= set(rows) else "it is an axis of its outputs"
        if step is not None or pins:
            return np.asarray(step) if step is not None else pins[0]
        if axis in dict(where.lost):
            return dict(where.lost)[axis]
        if any(a == ~axis and set(spans(index)) & set(rows) for a, index in where.tracks):
            return "its positions run along that axis of an array of another length"
        return np.asarray(-1)

    def _met(self, var: int) -> Where:
        """Where what a product of constants is added to stands."""
        for _ in range(_HOPS):
            shape = self._program.type_of(var).shape
            read = (e for e in self._program.equations if var in e.inputs and len(e.outputs) == 1)
            next_ = (e.outputs[0] for e in read if self._program.type_of(e.outputs[0]).shape == shape)
            var = next(next_, -1)
            if var < 0 or self._of(var).known:
                break
        return self._of(var)


def _begun(shape: tuple[int, ...], weights: tuple[int, ...]) -> Where:
    """The tracks of an array of the batch: the axes that it has in common with the weights, from the first one on."""
    tracks, fits = [], True
    for axis, (n, m) in enumerate(zip(shape, weights, strict=False)):
        fits &= n == m
        index = np.arange(n).reshape([n if k == axis else 1 for k in range(len(shape))])
        tracks.append((axis if fits else ~axis, index))
    return Where(tuple(tracks))


def _pinned(where: Where, at: dict[int, int]) -> Where:
    """Single positions along the axes that a step reads are the step's own."""
    pin = lambda axis, index: axis in at and not spans(index)  # noqa: E731
    if not any(pin(*track) for track in where.tracks):
        return where
    found = {}
    for axis, index in where.tracks:
        new = np.full_like(index, at[axis]) if pin(axis, index) else index
        found[axis, new.shape, new.tobytes()] = (axis, new)
    return where._replace(tracks=tuple(found.values()))


@jax.jit
def _taken(weights: Array, index: list[Array]) -> Array:
    """weights[index], with the largest along an axis where an index is -1."""
    for axis in range(weights.ndim):
        weights = jnp.concatenate([weights, jnp.max(weights, axis=axis, keepdims=True)], axis=axis)
    return weights[tuple(jnp.where(i < 0, n - 1, i) for i, n in zip(index, weights.shape, strict=True))]
