"""Products of two activations that contract units, such as the width of queries and keys: terms and operands."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, Int

from pruneopt import _tree
from pruneopt.capture.walk import fixed
from pruneopt.program.segment import Segment, closure
from pruneopt.structure.graph import Graph


class Product(NamedTuple):
    """A product of two variables that contracts units. sums: the axes of each that are no batch and not contracted;
    axes: the batch axes of each and then the contracted one; units: the unit of each entry along it, -1 for none.
    """

    operands: tuple[int, int]
    sums: tuple[tuple[int, ...], ...]
    axes: tuple[tuple[int, ...], ...]
    units: Int[np.ndarray, " entries"]


def products(graph: Graph, group: str) -> list[Product]:
    """The products of two activations, contracted along one axis each, whose terms are the units of a group."""
    found = graph.units()
    reader, atom, made = found.reader, found.atom(found.group(group)), []
    program = reader.program
    for equation in program.equations:
        if equation.primitive.name != "dot_general" or any(map(program.is_parametric, equation.inputs[:2])):
            continue
        contracted, batch = equation.params["dimension_numbers"]
        left, right = equation.inputs[:2]
        if not isinstance(left, int) or not isinstance(right, int) or len(contracted[0]) != 1:
            continue
        axis = reader.of(left)[contracted[0][0]]
        if atom not in reader.axes.atoms(axis):
            continue
        owned = np.asarray(reader.axes.owned(axis, atom))
        axes = tuple((*batch[k], *contracted[k]) for k in (0, 1))
        sums = tuple(
            tuple(i for i in range(len(program.shapes[v].shape)) if i not in axes[k])
            for k, v in enumerate((left, right))
        )
        made.append(Product((left, right), sums, axes, np.where(owned.any(0), owned.argmax(0), -1)))
    return made


def energies(graph: Graph, found: list[Product], size: int, batch: Any, leaves: Mapping[str, Any]) -> Any:
    """For each unit the squared norm of what it adds to these products, over the entries of all: (size,)."""
    values = operands(graph, found, batch, leaves)
    total = jnp.zeros(size, _tree.wide(jnp.float32))
    for one in found:
        each = _energy(values[one.operands[0]], values[one.operands[1]], one.sums, one.axes)
        owner = np.where(one.units >= 0, one.units, size)
        total = total + jax.ops.segment_sum(each, owner, size + 1)[:-1].astype(total.dtype)
    return total


def operands(graph: Graph, found: list[Product], batch: Any, leaves: Mapping[str, Any]) -> dict[int, Any]:
    """The arrays that meet in these products."""
    program = graph.units().reader.program
    wanted = list(dict.fromkeys(v for one in found for v in one.operands))
    segment = Segment(program, closure(program, wanted, set()), wanted)
    given = dict(zip(program.batch, jax.tree.leaves(batch), strict=True))
    inputs = {v: given[v] if v in given else fixed(program, v, leaves) for v in segment.inputs}
    return dict(zip(wanted, segment.run(inputs), strict=True))


@partial(jax.jit, static_argnums=(2, 3))
def _energy(left: Any, right: Any, sums: Any, axes: Any) -> Float[jax.Array, " entries"]:
    """sum over the batch of ||left_u||^2 ||right_u||^2: the outer product of the two is what u adds."""
    parts = []
    for x, over, kept in zip((left, right), sums, axes, strict=True):
        square = jnp.square(x.astype(_tree.wide(x.dtype))).sum(over)
        order = np.argsort(np.argsort(kept))  # where each kept axis stands once the others are summed
        parts.append(jnp.transpose(square, tuple(order)))
    whole = parts[0] * parts[1]
    return whole.reshape(-1, whole.shape[-1]).sum(0)
