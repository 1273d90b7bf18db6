"""Stacked layers taken apart: loops over leaves of (layers, ...) as a straight program of one leaf for each layer."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from pruneopt import _tree
from pruneopt.network.batches import Batches
from pruneopt.network.leaves import is_floating, partition
from pruneopt.network.readable import readable
from pruneopt.program import versions
from pruneopt.program.flatten import UNROLL_LIMIT, traced
from pruneopt.program.program import Equation
from pruneopt.program.versions import CALLS, DERIVATIVES, plain

Tree = Any

_ENTRYWISE = frozenset({"convert_element_type", "copy", "exp", "neg", "tanh"})


class Unstacked(NamedTuple):
    """A function whose stacked leaves are lists of layers.

    fn: takes `params`, or another tree of that structure, and a batch. params: each leaf of `layers` as the list of its
    layers, '{path}/0' the first. layers: {path of a leaf that was stacked: how many layers it held}.
    """

    fn: Callable[[Tree, Any], Any]
    params: Tree
    layers: Mapping[str, int]

    def __repr__(self) -> str:
        return f"Unstacked({', '.join(f'{path}: {n} layers' for path, n in self.layers.items())})"

    def split(self, tree: Tree) -> Tree:
        """A tree of the structure of the stacked params, such as masks, with lists of layers in it."""
        return _split(tree, self.layers)


def unstack(fn: Callable[[Tree, Any], Any], params: Tree, batch: Any) -> Unstacked:
    """The same function with its loops over stacked layers as a straight program, and each layer a leaf of its own.

    A network whose layers are scanned (`jax.lax.scan`, Flax's `nn.scan`, `fori_loop`) holds a weight of all of them in
    one array of (layers, ...), so that its layers have one width, also once they are shrunk. Unstacked, each layer is
    pruned and cut to a width of its own. The program is then as long as there are layers and compiles for longer. A
    leaf that is used as one array elsewhere, such as the weights of a vmapped ensemble, stays stacked.

    Raises ValueError where no leaf holds layers, or fn cannot be read.
    """
    batch = readable(next(iter(Batches([batch]))))
    candidates = {
        path: leaf.shape[0]
        for path, leaf in _tree.named_leaves(params)
        if is_floating(path, leaf) and leaf.ndim and 1 < leaf.shape[0] <= UNROLL_LIMIT
    }
    structure, reading = jax.tree.structure(params), _Reading()
    leaves = structure.flatten_up_to(_split(params, candidates))
    arrays = {i: leaf for i, leaf in enumerate(leaves) if isinstance(leaf, list) or hasattr(leaf, "dtype")}
    every = lambda arrays: [arrays.get(i, leaf) for i, leaf in enumerate(leaves)]  # noqa: E731
    jax.eval_shape(lambda arrays, batch: reading.of(fn, structure, every(arrays), batch), arrays, batch)
    apart = {path: n for path, n in candidates.items() if path in reading.taken.keys() - reading.joined}
    deep = {n for path, n in apart.items() if reading.taken[path] > 1}  # as many as there are layers with a matrix
    layers = {path: n for path, n in apart.items() if n in deep}
    if not layers:
        raise ValueError(
            "no loop of fn takes leaves of (layers, ...) apart; where each layer has leaves of its own, nothing needs "
            "to be unstacked"
        )

    def straight(params: Tree, batch: Any) -> Any:
        return _Reading().of(fn, structure, structure.flatten_up_to(params), readable(batch))

    return Unstacked(straight, _split(params, layers), layers)


class _Layers(list[Any]):
    """The arrays that a program sees stacked as one. sources: the leaves that they are made of."""

    def __init__(self, layers: Sequence[Any], sources: frozenset[str]):
        super().__init__(layers)
        self.sources = sources


class _Reading:
    """One evaluation of a function. taken: {leaf taken apart: axes of a layer}. joined: leaves used as one array."""

    def __init__(self):
        self.taken: dict[str, int] = {}
        self.joined: set[str] = set()

    def of(self, fn: Callable[[Tree, Any], Any], structure: Any, leaves: Sequence[Any], batch: Any) -> Any:
        """What fn returns of the leaves of its params, a list of layers in place of some."""
        whole = structure.unflatten(map(_abstract, leaves))
        paths = [path for path, _ in _tree.named_leaves(whole)]
        values = [
            _Layers(leaf, frozenset([path])) if isinstance(leaf, list) else leaf
            for path, leaf in zip(paths, leaves, strict=True)
        ]
        chosen, rest = partition(whole, is_floating)
        closed, returned = traced(fn, chosen, rest, batch)
        is_chosen = [is_floating(path, leaf) for path, leaf in _tree.named_leaves(whole)]
        first = [value for value, it_is in zip(values, is_chosen, strict=True) if it_is]
        inputs = [*first, *(values[i] for i in sorted(rest.arrays)), *jax.tree.leaves(batch)]
        return returned.tree(map(self._whole, self._run(closed.jaxpr, closed.consts, inputs)))

    def _run(self, jaxpr: Any, constants: Sequence[Any], inputs: Sequence[Any]) -> list[Any]:
        """The outputs of a plain jaxpr; known numbers, such as a loop's counter, are computed at once."""
        env: dict[Any, Any] = dict(zip(jaxpr.constvars, constants, strict=True))
        env.update(zip(jaxpr.invars, inputs, strict=True))

        def read(atom: Any) -> Any:
            return atom.val if hasattr(atom, "val") else env[atom]

        for eqn in jaxpr.eqns:
            env.update(zip(eqn.outvars, self._equation(eqn, [read(atom) for atom in eqn.invars]), strict=True))
        return [read(atom) for atom in jaxpr.outvars]

    def _equation(self, eqn: Any, values: list[Any]) -> list[Any]:
        name = eqn.primitive.name
        if not any(isinstance(value, _Layers) for value in values):
            return _bound(eqn, values)
        if name in CALLS and name not in DERIVATIVES:
            body = versions.called(eqn)
            return self._run(plain(body), versions.constants(body), values)
        if name == "scan":
            return self._loop(eqn, values)
        if name in _ENTRYWISE:
            return [_Layers([_bound(eqn, [layer])[0] for layer in values[0]], values[0].sources)]
        if name in ("dynamic_slice", "slice") and (layer := self._picked(eqn, values)) is not None:
            return [layer]
        return _bound(eqn, [self._whole(value) for value in values])

    def _loop(self, eqn: Any, values: list[Any]) -> list[Any]:
        """A scan, step by step where its steps are layers: they take matrices apart, or pick them by their number."""
        loop = versions.scan(eqn)
        n, k = loop.shared, loop.carry
        shared, carry, stacked = values[:n], [self._whole(value) for value in values[n : n + k]], values[n + k :]
        if any(isinstance(value, _Layers) and np.ndim(value[0]) > 1 for value in stacked):
            return self._stepped(loop, shared, carry, stacked)
        stacked = [self._whole(value) for value in stacked]
        numbered = [value for value in shared if isinstance(value, _Layers) and len(value) == loop.length]
        if numbered:
            trial = _Reading()
            jax.eval_shape(lambda: trial._kept(loop, shared, carry, stacked))
            if any(value.sources & trial.joined for value in numbered):
                return self._stepped(loop, shared, carry, stacked)
        return self._kept(loop, shared, carry, stacked)

    def _stepped(self, loop: versions.Scan, shared: list[Any], carry: list[Any], stacked: list[Any]) -> list[Any]:
        """One step after another."""
        k, steps = loop.carry, []
        for i in range(loop.length)[::-1] if loop.reverse else range(loop.length):
            out = self._step(loop, [*shared, *carry, *(self._layer(value, i) for value in stacked)])
            carry = out[:k]
            steps.append(out[k:])
        steps = steps[::-1] if loop.reverse else steps
        return [*carry, *(jnp.stack(column) for column in zip(*steps, strict=True))]

    def _kept(self, loop: versions.Scan, shared: list[Any], carry: list[Any], stacked: list[Any]) -> list[Any]:
        """A loop as it was, whose steps all see the same layers."""
        k = loop.carry

        def step(carry: list[Any], each: list[Any]) -> tuple[list[Any], list[Any]]:
            out = self._step(loop, [*shared, *carry, *each])
            return out[:k], out[k:]

        carry, every = jax.lax.scan(step, carry, stacked, length=loop.length, reverse=loop.reverse, unroll=loop.unroll)
        return [*carry, *every]

    def _step(self, loop: versions.Scan, values: list[Any]) -> list[Any]:
        return [self._whole(x) for x in self._run(plain(loop.body), versions.constants(loop.body), values)]

    def _layer(self, value: Any, i: int) -> Any:
        if not isinstance(value, _Layers):
            return jax.lax.index_in_dim(value, i, keepdims=False)
        self._take(value)
        return value[i]

    def _take(self, value: _Layers) -> None:
        self.taken |= dict.fromkeys(value.sources, np.ndim(value[0]))

    def _picked(self, eqn: Any, values: Sequence[Any]) -> Any:
        """The layer that a slice of known place takes, or None."""
        layers, starts, params = values[0], values[1:], versions.parameters(eqn)
        if not isinstance(layers, _Layers):
            return None
        if eqn.primitive.name == "slice":
            starts = params["start_indices"]
            sizes = tuple(stop - start for start, stop in zip(starts, params["limit_indices"], strict=True))
        else:
            sizes = tuple(params["slice_sizes"])
        if not _is_known(starts) or sizes != (1, *np.shape(layers[0])):
            return None
        self._take(layers)
        return layers[int(np.clip(starts[0], 0, len(layers) - 1))][None]

    def _whole(self, value: Any) -> Any:
        if not isinstance(value, _Layers):
            return value
        self.joined |= value.sources
        return jnp.stack(value)


def _bound(eqn: Any, values: Sequence[Any]) -> list[Any]:
    """The results of an equation; numbers made of known numbers are known, such as the counter of a loop."""
    known = _is_known(values) and all(out.aval.shape == () for out in eqn.outvars if hasattr(out.aval, "shape"))
    with jax.ensure_compile_time_eval() if known else contextlib.nullcontext():
        return Equation(eqn.primitive, versions.parameters(eqn), (), (), (), eqn.ctx).run(values)


def _is_known(values: Sequence[Any]) -> bool:
    return bool(values) and not any(isinstance(value, Tracer) for value in values)


def _split(tree: Tree, layers: Mapping[str, int]) -> Tree:
    return _tree.map_named(lambda path, leaf: list(leaf) if path in layers else leaf, tree)


def _abstract(leaf: Any) -> Any:
    """An array of a leaf's type, without memory of its own; of a list of layers, of their stack."""
    if isinstance(leaf, list):
        shapes = {np.shape(layer) for layer in leaf}
        if len(shapes) != 1:
            raise ValueError(
                f"layers of one leaf have shapes {sorted(shapes)}; a network that is cut runs through the fn of its "
                "SmallerNetwork"
            )
        return np.broadcast_to(np.zeros((), leaf[0].dtype), (len(leaf), *shapes.pop()))
    if is_floating("", leaf):
        return np.broadcast_to(np.zeros((), leaf.dtype), leaf.shape)
    return leaf
