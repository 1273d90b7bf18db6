"""What stands beside an operator's output in the sum that takes it up: the stream of a residual network."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from pruneopt.capture.affine import affine_steps, readers_of
from pruneopt.capture.walk import fixed
from pruneopt.program.program import Program
from pruneopt.program.segment import Segment, closure
from pruneopt.structure.operators import Use

_SUMS = frozenset({"add", "add_any", "sub"})
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
    readers, shape = readers_of(program), program.shapes[program.equations[use.equation].outputs[0]].shape
    (output,) = program.equations[use.equation].outputs
    var = output
    for var in affine_steps(program, readers, output):
        if program.shapes[var].shape != shape:
            return None
    if len(readers.get(var, ())) != 1 or var in program.outputs:
        return None
    equation = program.equations[readers[var][0]]
    data = [a for a in equation.inputs if isinstance(a, int) and program.is_data(a)]
    if equation.primitive.name not in _SUMS or len(data) != 2 or data[0] == data[1]:
        return None
    (other,) = [a for a in data if a != var]
    if program.shapes[other].shape != shape or _depends(program, other, output):
        return None
    sign = -1.0 if equation.primitive.name == "sub" else 1.0
    return Beside(output, var, other, sign)


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
