"""Which entries of leaves make an operand of a product of two activations, each head's, and what turns it."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, Int

from pruneopt.capture.products import Product
from pruneopt.capture.walk import fixed
from pruneopt.program.segment import Segment, closure
from pruneopt.structure.graph import Graph

_NEAR, _ROUNDINGS = 1e-3, 8  # of an operand, or of its dtype: how far a turned one may be from what its leaves make
Places = Mapping[tuple[str, int], np.ndarray]  # {(path, axis): for each entry of that axis its unit, -1 for none}


@dataclass(frozen=True)
class Maker:
    """The leaves that make one operand of a product, linearly: with their units times T the operand's are times T.

    axes: the axes of the operand along which weights differ, such as heads, in the order of the product's batch.
    matrices: for each index along them its matrix, 0, 1, ...; those that share weights have the same.
    entries: {path: (matrices, units, rest) places in the flat leaf}.
    """

    axes: tuple[int, ...]
    matrices: Int[np.ndarray, "..."]
    entries: Mapping[str, Int[np.ndarray, "matrices units rest"]]

    def turned(self, leaves: Mapping[str, Any], by: Float[np.ndarray, "matrices units units"]) -> dict[str, np.ndarray]:
        """The leaves whose operand is that of `leaves` times `by`, each matrix by its own."""
        changed = {}
        for path, places in self.entries.items():
            leaf = np.asarray(leaves[path])
            flat = leaf.astype(np.float64).reshape(-1)
            flat[places] = np.einsum("mur,muv->mvr", flat[places], by)
            changed[path] = flat.reshape(leaf.shape).astype(leaf.dtype)
        return changed


def makers(graph: Graph, product: Product, places: Places, batch: Any, leaves: Mapping[str, Any]) -> list[Maker]:
    """What makes the two operands of a product that contracts units, found by derivatives and tried on other weights.

    places: the members of their group. Raises ValueError where an operand is not linear in the leaves that hold its
    units, such as one that rotates them by position.
    """
    program = graph.units().reader.program
    paths = {path for path, _ in places}
    start = min(use.equation for op in graph.operators if paths & set(op.paths) for use in op.uses)
    have = {v for equation in program.equations[:start] for v in equation.outputs if program.is_data(v)}
    given = dict(zip(program.batch, jax.tree.leaves(batch), strict=True))
    found = []
    for k, operand in enumerate(product.operands):
        segment = Segment(program, closure(program, [operand], have), [operand])
        rng, inputs, own = np.random.default_rng(k), [], {}
        for at, var in enumerate(segment.inputs):
            kind = program.type_of(var)
            if (var in have or var in given) and jnp.issubdtype(kind.dtype, jnp.floating):
                inputs.append(jnp.asarray(rng.standard_normal(kind.shape), kind.dtype))  # dense, whatever the data
            else:
                inputs.append(given[var] if var in given else fixed(program, var, leaves))
            if program.names.get(var) in paths:
                own[program.names[var]] = at
        made = _made(segment, own, inputs, product.axes[k], product.units, places)
        _try(segment, own, inputs, made, product.axes[k], rng)
        found.append(made)
    return found


def _made(
    segment: Segment, own: Mapping[str, int], inputs: list[Any], axes: Sequence[int], units: Any, places: Places
) -> Maker:
    """The entries that move each head of an operand, by random combinations of what it holds."""
    at = tuple(own.values())
    shape = jax.eval_shape(segment.trace, inputs)[0].shape
    reached = partial(_reached, segment, at, inputs)
    every = reached(np.ones([1] * len(shape)))
    if not at or not all(map(np.any, every)):
        raise ValueError("no leaf of theirs makes an operand of the product")
    heads = []
    for axis in axes[:-1]:
        first = np.arange(shape[axis]).reshape([-1 if i == axis else 1 for i in range(len(shape))]) == 0
        if any(np.any(a != b) for a, b in zip(every, reached(first), strict=True)):
            heads.append(axis)
    known: dict[bytes, int] = {}
    matrices, blocks = np.zeros([shape[axis] for axis in heads], int), []
    for index in itertools.product(*(range(shape[axis]) for axis in heads)):
        mask = np.ones([1] * len(shape), bool)
        for axis, i in zip(heads, index, strict=True):
            mask = mask & (np.arange(shape[axis]).reshape([-1 if k == axis else 1 for k in range(len(shape))]) == i)
        touched = reached(mask)
        key = b"".join(x.tobytes() for x in touched)
        if key not in known:
            known[key] = len(known)
            blocks.append([_by_unit(x, path, units, places) for x, path in zip(touched, own, strict=True)])
        matrices[index] = known[key]
    if len({tuple(x.shape for x in block) for block in blocks}) > 1:
        raise ValueError("its heads are made by different numbers of weights")
    return Maker(tuple(heads), matrices, {path: np.stack([b[i] for b in blocks]) for i, path in enumerate(own)})


def _by_unit(touched: np.ndarray, path: str, units: np.ndarray, places: Places) -> np.ndarray:
    """(units, rest): the places in a flat leaf that make each unit, of those that move a head."""
    owner = np.full(touched.shape, -1)
    for (member, axis), ids in places.items():
        if member == path:
            along = np.broadcast_to(ids.reshape([-1 if k == axis else 1 for k in range(touched.ndim)]), touched.shape)
            owner = np.where(along >= 0, along, owner)
    each = [np.flatnonzero(touched & (owner == unit)) for unit in units]
    if len({len(one) for one in each}) > 1 or sum(map(len, each)) != touched.sum():
        raise ValueError(f"a head of its product is made by other entries of '{path}' than its units own")
    return np.stack(each)


def _try(segment: Segment, own: Mapping[str, int], inputs: list[Any], made: Maker, axes: Any, rng: Any) -> None:
    """Raise ValueError unless turned leaves make the turned operand."""
    (before,) = segment.trace(inputs)
    count, size = made.matrices.max() + 1, before.shape[axes[-1]]
    by = rng.standard_normal((count, size, size)) / np.sqrt(size)
    changed = made.turned({path: inputs[i] for path, i in own.items()}, by)
    moved = list(inputs)
    for path, i in own.items():
        moved[i] = jnp.asarray(changed[path])
    (after,) = segment.trace(moved)
    wanted = turned(np.asarray(before, np.float64), made, axes, by)
    near = max(_NEAR, _ROUNDINGS * float(jnp.finfo(before.dtype).eps))
    if not np.linalg.norm(np.asarray(after, np.float64) - wanted) <= near * np.linalg.norm(wanted):
        raise ValueError("an operand of its product is not linear in them, such as one that turns units by position")


def turned(operand: np.ndarray, made: Maker, axes: Sequence[int], by: np.ndarray) -> np.ndarray:
    """An operand whose units, along the last of `axes`, are times the matrix of their head."""
    x = np.moveaxis(operand, (*made.axes, axes[-1]), (*range(len(made.axes)), -1))
    shape = x.shape
    x = x.reshape(made.matrices.size, -1, shape[-1])
    x = np.einsum("hnu,huv->hnv", x, by[made.matrices.reshape(-1)]).reshape(shape)
    return np.moveaxis(x, (*range(len(made.axes)), -1), (*made.axes, axes[-1]))


def _reached(segment: Segment, at: tuple[int, ...], inputs: list[Any], mask: np.ndarray) -> list[np.ndarray]:
    """Which entries of the leaves move the masked part of the operand."""
    return [np.asarray(x) != 0 for x in _gradients(segment, at, inputs, mask)]


@partial(jax.jit, static_argnums=(0, 1))
def _gradients(segment: Segment, at: tuple[int, ...], inputs: list[Any], mask: Any) -> list[Any]:
    """The gradients, in the leaves, of a random combination of the masked entries of the operand."""

    def combined(own: list[Any]) -> Any:
        given = list(inputs)
        for i, leaf in zip(at, own, strict=True):
            given[i] = leaf
        (operand,) = segment.trace(given)
        weight = jax.random.normal(jax.random.key(0), operand.shape, operand.dtype)
        return jnp.sum(operand * weight * mask.astype(operand.dtype))

    return jax.grad(combined)([inputs[i] for i in at])
