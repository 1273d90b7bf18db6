"""Fewer units of products of two activations, such as narrower queries and keys, and the best product that is left."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, Int

from pruneopt import _linalg, _tree
from pruneopt.capture.makers import Maker, makers
from pruneopt.capture.products import Product, operands, products
from pruneopt.constraints.coupled import Coupled
from pruneopt.constraints.members import Members
from pruneopt.network.batches import Batches, Source
from pruneopt.program.program import Program
from pruneopt.solution import Pruned
from pruneopt.structure.defaults import network_of
from pruneopt.structure.graph import Graph
from pruneopt.structure.traced import Traced

Tree = Any
Leaves = Mapping[str, Any]


@_tree.on_host
def refit_products(
    fn: Callable[[Tree, Any], Any],
    params: Tree,
    batches: Source,
    units: Coupled,
    *,
    damping: float = 1e-6,
) -> Pruned:
    """For each group and each of its products Q K^T, min ||Q K^T - Q L R^T K^T||^2 over L and R of r columns.

    Q and K are the operands, positions by units, as the dense network makes them; r is how many units live. What makes
    the operands takes L and R in, on the first r units; the others go. With H_Q and H_K the Grams of the operands,
    summed over all batches, the answer is the first r eigenvectors of H_K^(1/2) H_Q H_K^(1/2). Sums of Grams stand for
    sums over examples of their products: for one example no choice of units and no refit of those that stay is better
    (Eckart and Young 1936), but for the damping; for more it is close.

    units: groups that products contract (`plans.UNIT_METHODS`: "unit_products" ranks them), each with a budget of its
        own. Heads that share keys share R. damping: relative, of the mean diagonal of H_K.
    Returns a Pruned, whose "layers" count units and have the relative_error of their products. Raises ValueError for
    groups that no product of two activations contracts, operands that are not linear in the leaves that hold them, such
    as those that turn with the position, or that are zero in all batches.
    """
    clock, named, stream = time.perf_counter(), dict(_tree.named_leaves(params)), Batches(batches)
    traced, counts = Traced(network_of(fn, params, batches, None)), units.counts()
    first = traced.of(stream.first)
    alive = {group.name: np.arange(group.size) < counts[group.name] for group in units.groups}
    for group in units.groups:
        if not products(first, group.name):
            raise ValueError(f"group '{group.name}' is contracted in no product of two activations; take it out")
    narrower = [group for group in units.groups if counts[group.name] < group.size]
    found = {group.name: _parts(first, group, stream.first, named) for group in narrower}
    grams = _grams(traced, found, stream, named)
    now, layers = dict(named), []
    for group in units.groups:
        begun, lost, whole = time.perf_counter(), 0.0, 0.0
        for (product, makes), sums in zip(found.get(group.name, []), grams.get(group.name, []), strict=True):
            which = _matrices(first.units().reader.program, product, makes)
            with _about(group):
                turns, gone, of = _turns(which, sums, counts[group.name], damping)
            for made, by in zip(makes, turns, strict=True):
                now |= made.turned(now, _at_units(by, product, alive[group.name]))
            lost, whole = lost + gone, whole + of
        entry = {"layer": group.name, "kept": counts[group.name], "size": group.size}
        entry |= {"relative_error": lost / whole if whole else 0.0, "seconds": {"solve": time.perf_counter() - begun}}
        layers.append(entry)
    owned = {path for group in units.groups for path, _ in group.places}
    everything = _tree.map_named(lambda path, x: jnp.ones(np.shape(x), bool) if path in owned else None, params)
    support = units.with_units({name: jnp.asarray(mask) for name, mask in alive.items()}, everything)
    for path, mask in _tree.named_leaves(support):
        now[path] = _tree.masked(_tree.like(jnp.asarray(now[path]), named[path]), mask)
    values = _tree.map_named(lambda path, _: now[path], params)
    scope = units.scope(by_layer=True)
    kept = _tree.kept(support)
    record = {"stage": 0, "cut": 1.0, "method": "refit_products", "scope": scope, "kept": kept, "layers": layers}
    record |= {"sparsity": 1 - kept / _tree.size(support), "seconds": time.perf_counter() - clock}
    return Pruned(values, support, {}, [record], scope)


def _parts(graph: Graph, group: Members, batch: Any, named: Leaves) -> list[tuple[Product, list[Maker]]]:
    """The products that contract a group, each with what makes its operands."""
    found, taken = [], dict[str, np.ndarray]()
    for product in products(graph, group.name):
        if np.any(product.units < 0):
            raise ValueError(
                f"group '{group.name}': a product contracts more than its units; pass the group that it has"
            )
        with _about(group):
            made = makers(graph, product, group.places, batch, named)
            _check_apart(made, taken)
        found.append((product, made))
    return found


@contextmanager
def _about(group: Members) -> Iterator[None]:
    """Errors inside say which group they are about, and what else there is."""
    try:
        yield
    except ValueError as error:
        raise ValueError(
            f"group '{group.name}': {error}; choose its units by scores: prune(method='unit_products')"
        ) from error


def _check_apart(makes: list[Maker], taken: dict[str, np.ndarray]) -> None:
    """Raise ValueError where weights make more than one operand."""
    for made in makes:
        for path, places in made.entries.items():
            taken[path] = np.concatenate([taken.get(path, np.zeros(0, int)), places.reshape(-1)])
            if len(np.unique(taken[path])) < len(taken[path]):
                raise ValueError(f"entries of '{path}' make several operands")


def _grams(
    traced: Traced, found: Mapping[str, list[tuple[Product, list[Maker]]]], stream: Batches, named: Leaves
) -> dict[str, list[list[Any]]]:
    """For each product of each group the Grams of its operands, (heads, units, units), in one pass over the data: head
    by head along the axes on which either differs, summed over all positions.
    """
    sums: dict[str, list[list[Any]]] = {name: [[0.0, 0.0] for _ in parts] for name, parts in found.items()}
    for batch in stream:
        graph = traced.of(batch)
        here = {name: products(graph, name) for name in found}
        arrays = operands(graph, [product for one in here.values() for product in one], batch, named)
        for name, one in here.items():
            for product, (_, makes), totals in zip(one, found[name], sums[name], strict=True):
                split = _heads(product, makes)
                for side, (operand, axes) in enumerate(zip(product.operands, product.axes, strict=True)):
                    x = np.asarray(arrays[operand], np.float64)
                    x = np.moveaxis(x, (*(axes[i] for i in split), axes[-1]), (*range(len(split)), -1))
                    x = x.reshape(int(np.prod(x.shape[: len(split)])), -1, x.shape[-1])
                    totals[side] = totals[side] + x.transpose(0, 2, 1) @ x
    return sums


def _heads(product: Product, makes: list[Maker]) -> list[int]:
    """Along which of a product's batch axes the weights of either operand differ."""
    return sorted({axes.index(a) for made, axes in zip(makes, product.axes, strict=True) for a in made.axes})


def _matrices(program: Program, product: Product, makes: list[Maker]) -> list[Int[np.ndarray, " heads"]]:
    """For each operand the matrix of its weights that each head has."""
    split, found = _heads(product, makes), []
    for made, axes, operand in zip(makes, product.axes, product.operands, strict=True):
        shape = program.shapes[operand].shape
        sizes = [shape[axes[i]] for i in split]
        own = [n if axes[i] in made.axes else 1 for i, n in zip(split, sizes, strict=True)]
        found.append(np.broadcast_to(made.matrices.reshape(own), sizes).reshape(-1))
    return found


def _turns(
    which: list[Int[np.ndarray, " heads"]],
    grams: list[Float[np.ndarray, "heads units units"]],
    count: int,
    damping: float,
) -> tuple[list[Float[np.ndarray, "matrices units count"]], float, float]:
    """L and R of each matrix, what is lost of the products, and their squared norm.

    Of the operand whose matrices are shared by more heads, R = S^(-1/2) V s^(1/2) and, of each head of the other, L =
    S^(1/2) V s^(-1/2); S its damped Gram, V the first eigenvectors of S^(1/2) (sum of the others' Grams) S^(1/2) and
    s the roots of their eigenvalues, so that both operands come out alike.
    """
    shared = int(len(set(which[1])) <= len(set(which[0])))
    mine, other = which[shared], which[1 - shared]
    turns = [np.zeros((one.max() + 1, grams[0].shape[-1], count)) for one in which]
    lost, whole = 0.0, 0.0
    for matrix in sorted(set(mine)):
        heads = np.flatnonzero(mine == matrix)
        if not np.all(grams[shared][heads] == grams[shared][heads[:1]]) or len(set(other[heads])) < len(heads):
            raise ValueError("both operands of a product share weights between heads")
        s, others = grams[shared][heads[0]], grams[1 - shared][heads].sum(0)
        if not (np.any(s) and np.any(others)):
            raise ValueError("an operand of its product is zero in all batches; check the data, or take it out")
        s = s + damping * np.mean(np.diagonal(s)) * np.eye(len(s))
        values, vectors = _linalg.eigh(s)
        root = np.sqrt(np.maximum(values, np.finfo(float).tiny))
        half, inverse = (vectors * root) @ vectors.T, (vectors / root) @ vectors.T
        energy, v = _linalg.eigh(half @ others @ half)
        energy, v = np.maximum(energy[::-1], 0.0), v[:, ::-1][:, :count]
        each = np.sqrt(np.sqrt(np.maximum(energy[:count], np.finfo(float).tiny)))
        turns[shared][matrix] = inverse @ v * each
        for h in heads:
            turns[1 - shared][other[h]] = half @ v / each
        lost, whole = lost + float(energy[count:].sum()), whole + float(energy.sum())
    return turns, lost, whole


def _at_units(
    by: Float[np.ndarray, "matrices units count"], product: Product, alive: np.ndarray
) -> Float[np.ndarray, "matrices units units"]:
    """Columns at the units that live, zero elsewhere."""
    whole = np.zeros((*by.shape[:2], by.shape[1]))
    whole[:, :, np.flatnonzero(alive[product.units])] = by
    return whole
