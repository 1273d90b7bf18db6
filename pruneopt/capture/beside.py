"""What stands beside an operator's output in the sum that takes it up: the stream of a residual network."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from pruneopt.capture.walk import fixed
from pruneopt.program.program import Program
from pruneopt.program.segment import Segment, closure
from pruneopt.structure.operators import Use

_AFFINE = frozenset({"add", "convert_element_type", "div", "mul", "neg", "sub"})
_SUMS = {"add": 1.0, "add_any": 1.0, "sub": -1.0}
_LEAST = 1e-3  # of the largest scale: an output that counts for less is not asked to make up for anything


class Beside(NamedTuple):
    """scaled = a y + b, the output y of a product times and plus what no batch moves, and the variable that it is added
    to or, with sign -1, subtracted from or by.
    """

    output: int
    scaled: int
    other: int
    sign: float

    def missing(self, program: Program, leaves: Mapping[str, Any], dense: Any, pruned: Any) -> jax.Array:
        """How far the output must move so that the sum is the dense network's; dense, pruned: values of `other`."""
        zero = jnp.zeros(program.shapes[self.output].shape, program.shapes[self.output].dtype)
        segment = Segment(program, closure(program, [self.scaled], {self.output}), [self.scaled])
        at = [
            segment.run({v: y if v == self.output else fixed(program, v, leaves) for v in segment.inputs})[0]
            for y in (zero, zero + jnp.ones((), zero.dtype))
        ]
        scale = (at[1] - at[0]).astype(pruned.dtype)
        is_live = jnp.abs(scale) > _LEAST * jnp.max(jnp.abs(scale))
        apart = jnp.asarray(self.sign, pruned.dtype) * (dense - pruned)
        return jnp.where(
            is_live, apart / jnp.where(is_live, scale, jnp.ones((), scale.dtype)), jnp.zeros((), pruned.dtype)
        )


def beside(program: Program, use: Use) -> Beside | None:
    """What a product's output is added to, through a norm by fixed statistics, a bias, a scale; None for other uses."""
    readers: dict[int, list[int]] = {}
    for i, equation in enumerate(program.equations):
        for atom in dict.fromkeys(a for a in equation.inputs if isinstance(a, int)):
            readers.setdefault(atom, []).append(i)
    (output,) = program.equations[use.equation].outputs
    var = output
    while len(readers.get(var, ())) == 1 and var not in program.outputs:
        equation = program.equations[readers[var][0]]
        name = equation.primitive.name
        data = [a for a in equation.inputs if isinstance(a, int) and program.is_data(a)]
        if name in _SUMS and len(data) == 2:
            (other,) = [a for a in data if a != var] or [var]
            alike = program.shapes[other].shape == program.shapes[output].shape
            if other == var or not alike or _depends(program, other, output):
                return None
            return Beside(output, var, other, _SUMS[name])
        divides = name == "div" and equation.inputs[0] != var
        made = equation.outputs[0]
        if name not in _AFFINE or len(data) != 1 or divides or program.shapes[made].shape != program.shapes[var].shape:
            return None
        var = made
    return None


def _depends(program: Program, var: int, on: int) -> bool:
    """Whether one variable is computed from another."""
    seen, left = set(), [var]
    while left:
        at = left.pop()
        if at == on:
            return True
        if at in seen or at not in program.maker:
            continue
        seen.add(at)
        left += [a for a in program.equations[program.maker[at]].inputs if isinstance(a, int)]
    return False
