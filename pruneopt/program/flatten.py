"""A function read as a straight-line program: traced, its calls inlined, its loops unrolled where that is wanted."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from pruneopt import _tree
from pruneopt.network.leaves import combine, is_floating, partition
from pruneopt.network.readable import readable
from pruneopt.program import versions
from pruneopt.program.forms import PRODUCTS
from pruneopt.program.keys import Literal, literal, signature, type_key
from pruneopt.program.program import Atom, Call, Equation, Loop, Outputs, Program
from pruneopt.program.versions import CALLS, DERIVATIVES, SIZE_ONE_COLLECTIVES, bodies, holds, plain

Tree = Any

_NOT_TRACEABLE = (
    jax.errors.ConcretizationTypeError,
    jax.errors.TracerArrayConversionError,
    jax.errors.TracerIntegerConversionError,
    jax.errors.NonConcreteBooleanIndexError,
)
_KEEPS = "fn is not a pure function: it keeps an array from an earlier call; compute all from params and batch"
UNROLL_LIMIT = 4096  # steps of one loop over layers; beyond it the loop stays whole and its products are named


def flatten(
    fn: Callable[[Tree, Any], Any], params: Tree, batch: Any, *, keep_derivatives: bool = False, unroll: bool = True
) -> Program:
    """The straight-line program of fn(params, batch).

    keep_derivatives: leave calls with a derivative of their own whole where they hold no product, so that the program
        can be differentiated as the function would be.
    unroll: read loops over weights step by step, as capture needs it; else as `Program.rolled`.

    Raises ValueError for a function that JAX cannot trace, that returns no array, or whose two traces differ.
    """
    chosen, rest = partition(params, is_floating)
    closed, returned = traced(fn, chosen, rest, readable(batch))
    straight = partial(_straight, closed, params, chosen, rest, keep_derivatives)
    program = straight(unroll)
    program.returned = returned
    if unroll:
        program.source = lambda: replace(straight(False), returned=returned)
    return program


def _straight(closed: Any, params: Tree, chosen: Tree, rest: Any, keep_derivatives: bool, unroll: bool) -> Program:
    """The program of a closed jaxpr whose inputs are the floating leaves of params, the others, and the batch."""
    program = Program(keep_derivatives=keep_derivatives, unroll=unroll)
    paths = [path for path, _ in _tree.named_leaves(chosen)]
    everything = [path for path, _ in _tree.named_leaves(params)]
    inputs: list[Atom] = []
    for i, var in enumerate(closed.jaxpr.invars):
        number = program.new(var.aval)
        inputs.append(number)
        if i < len(paths):
            program.leaves[paths[i]] = number
        elif i < len(paths) + len(rest.arrays):
            program.leaves[everything[list(rest.arrays)[i - len(paths)]]] = number
        else:
            program.batch.append(number)
            program.data.add(number)
    program.parametric.update(program.leaves.values())
    program.names = {var: path for path, var in program.leaves.items()}
    program.masks = partial(is_mask, dict(_tree.named_leaves(params)))
    constants = tuple(program.constant(value) for value in closed.consts)
    program.outputs = list(_inline(program, closed.jaxpr, constants, tuple(inputs), True))
    return program


def straightened(jaxpr: Any, constants: Sequence[Any], data: Iterable[int] = ()) -> Program:
    """The straight-line program of a plain jaxpr; its inputs are the leaves "0", "1", ...; data: those of the batch."""
    program = Program(unroll=False)
    inputs = tuple(program.new(var.aval) for var in jaxpr.invars)
    program.leaves = {str(i): var for i, var in enumerate(inputs)}
    program.names = {var: path for path, var in program.leaves.items()}
    program.parametric.update(inputs)
    program.data.update(inputs[i] for i in data)
    held = tuple(program.constant(value) for value in constants)
    program.outputs = list(_inline(program, jaxpr, held, inputs, True))
    return program


def is_mask(leaves: Mapping[str, Any], path: str) -> bool:
    """Whether a leaf is an array of zeros and ones with a one in it."""
    leaf = leaves[path]
    return _tree.is_array(leaf) and bool(np.all((leaf == 0) | (leaf == 1)) and np.any(leaf == 1))


def traced(fn: Callable[[Tree, Any], Any], chosen: Tree, rest: Any, batch: Any) -> tuple[Any, Outputs]:
    """The closed jaxpr of fn and what its outputs are, with the errors of functions that have none."""
    if not callable(fn):
        raise TypeError(f"fn is {fn!r}; pass a function fn(params, batch) -> arrays")

    returned = []

    def closed(c: Tree, r: Any, b: Any) -> Any:
        out = fn(combine(c, r), b)
        leaves, structure = jax.tree.flatten(out)
        arrays = [x for x in leaves if hasattr(x, "dtype")]
        if not arrays:
            raise ValueError(f"fn returns {out!r}, no array; return the network's outputs or its loss")
        paths = tuple(path for path, x in _tree.named_leaves(out) if hasattr(x, "dtype"))
        returned[:] = [Outputs(paths, structure, tuple(... if hasattr(x, "dtype") else x for x in leaves))]
        return arrays

    try:  # JAX would answer the second call on the same function from its cache
        one, two = (jax.make_jaxpr(lambda *a: closed(*a))(chosen, rest, batch) for _ in range(2))
    except _NOT_TRACEABLE as error:
        raise ValueError(
            "fn is not traceable: it turns an array into a Python number or a NumPy array, or branches on its value; "
            f"use jnp and jnp.where or lax.cond there. JAX said: {str(error).splitlines()[0]}"
        ) from error
    except jax.errors.UnexpectedTracerError as error:
        raise ValueError(_KEEPS) from error
    if any(isinstance(c, Tracer) for c in (*one.consts, *two.consts)):
        raise ValueError(_KEEPS)
    if signature(one) != signature(two):
        raise ValueError("fn is not a pure function: two traces of it differ; it must depend on params and batch alone")
    return one, returned[0]


def _inline(program: Program, jaxpr: Any, constants: tuple[Atom, ...], inputs: tuple[Atom, ...], keep: bool) -> tuple:
    """Add the equations of `jaxpr`, a plain one, to the program; its outputs. keep: keep their contexts."""
    env: dict[Any, Atom] = dict(zip(jaxpr.constvars, constants, strict=True))
    env.update(zip(jaxpr.invars, inputs, strict=True))

    def read(atom: Any) -> Atom:
        return literal(atom.val, atom.aval) if hasattr(atom, "val") else env[atom]

    for eqn in jaxpr.eqns:
        arguments = tuple(read(atom) for atom in eqn.invars)
        env.update(zip(eqn.outvars, _equation(program, eqn, arguments, keep), strict=True))
    return tuple(read(atom) for atom in jaxpr.outvars)


def _equation(program: Program, eqn: Any, inputs: tuple[Atom, ...], keep: bool) -> tuple[Atom, ...]:
    name = eqn.primitive.name
    if name in CALLS and not (program.keep_derivatives and name in DERIVATIVES and not _has_product(eqn)):
        program.lost |= name in DERIVATIVES
        body, constants = opened(program, versions.called(eqn))
        outputs = _inline(program, body, constants, inputs, keep)
        if name in DERIVATIVES:
            outputs = outputs if program.unroll else tuple(map(program.alias, outputs))
            call = Equation(eqn.primitive, versions.parameters(eqn), inputs, outputs, (), None)
            program.calls.append(Call(len(program.equations), call))
        return outputs
    if name == "shard_map" and _is_alone(eqn):
        body, constants = opened(program, versions.alone(eqn))
        return _inline(program, body, constants, inputs, False)
    if name == "optimization_barrier":
        return inputs
    if not keep and name in SIZE_ONE_COLLECTIVES:
        return _collective(program, eqn, inputs)
    if name == "scan" and _is_unrolled(program, eqn, inputs):
        return _unrolled(program, eqn, inputs, keep)
    if name == "cond" and (isinstance(inputs[0], Literal) or inputs[0] in program.constants):
        index = inputs[0].value if isinstance(inputs[0], Literal) else program.constants[inputs[0]]
        branches = versions.branches(eqn)
        body, constants = opened(program, branches[int(np.clip(int(index), 0, len(branches) - 1))])
        return _inline(program, body, constants, inputs[1:], keep)
    return program.emit(eqn, inputs, eqn.ctx if keep else None)


def opened(program: Program, body: Any) -> tuple[Any, tuple[int, ...]]:
    """A jaxpr and the variables of its constants; `remat2` carries one without."""
    return plain(body), tuple(program.constant(value) for value in versions.constants(body))


def _unrolled(program: Program, eqn: Any, inputs: tuple[Atom, ...], keep: bool) -> tuple[Atom, ...]:
    """A scan, one step after another: each step slices its own layers."""
    loop = versions.scan(eqn)
    body, body_constants = opened(program, loop.body)
    n, k = loop.shared, loop.carry
    shared, carry, stacked = inputs[:n], inputs[n : n + k], inputs[n + k :]
    # A counter that starts as a literal becomes a variable, so that the first step looks like the others.
    carry = tuple(program.constant(jnp.asarray(a.value)) if isinstance(a, Literal) else a for a in carry)
    steps: list[tuple[Atom, ...]] = []
    bounds: list[tuple[int, int]] = []
    order = range(loop.length)[::-1] if loop.reverse else range(loop.length)
    for i in order:
        start, at = len(program.equations), program.constant(np.int32(i))
        slices = tuple(_call(program, _at, a, at)[0] for a in stacked)
        out = _inline(program, body, body_constants, (*shared, *carry, *slices), keep)
        carry = out[:k]
        steps.append(out[k:])
        bounds.append((start, len(program.equations)))
    if loop.reverse:
        steps.reverse()
    stacks = [_call(program, _stack, *column)[0] for column in zip(*steps, strict=True)]
    program.loops.append(Loop(tuple(bounds), len(program.equations), carry))
    return *carry, *stacks


def _at(stacked: jax.Array, i: jax.Array) -> jax.Array:
    zero = jnp.zeros((), i.dtype)
    start = (i, *[zero] * (stacked.ndim - 1))  # bound as it is: known steps need no care for negative numbers
    picked = jax.lax.dynamic_slice_p.bind(stacked, *start, slice_sizes=(1, *stacked.shape[1:]))
    return jax.lax.squeeze(picked, (0,))


def _stack(*steps: jax.Array) -> jax.Array:
    return jnp.stack(steps)


def _call(program: Program, fn: Callable[..., jax.Array], *inputs: Atom) -> tuple[Atom, ...]:
    """Add the equations of a function of our own."""
    types = [jax.ShapeDtypeStruct(t.shape, t.dtype) for t in map(program.type_of, inputs)]
    key = fn, tuple(map(type_key, types))
    if key not in program.own:
        program.own[key] = jax.make_jaxpr(fn)(*types)
    closed = program.own[key]
    return _inline(program, closed.jaxpr, tuple(program.constant(c) for c in closed.consts), inputs, True)


def _collective(program: Program, eqn: Any, inputs: tuple[Atom, ...]) -> tuple[Atom, ...]:
    """What a collective does over one device."""
    if eqn.primitive.name == "axis_index":
        return (program.constant(np.int32(0)),)
    params = versions.parameters(eqn)
    if eqn.primitive.name == "all_gather" and not params["tiled"]:
        return _call(program, partial(jnp.expand_dims, axis=params["all_gather_dimension"]), *inputs)
    return inputs


def _is_alone(eqn: Any) -> bool:
    """Whether a shard_map runs on one device and is read as its body."""
    sharded = versions.shard_map(eqn)
    return math.prod(sharded.mesh.values()) == 1 and not _blocked(plain(sharded.body))


def _blocked(jaxpr: Any) -> bool:
    """Whether a body of shard_map holds a collective without a rule, at any depth, which only its mesh can run."""
    return any(
        (e.primitive.name not in SIZE_ONE_COLLECTIVES and any(isinstance(a, str) for a in versions.mesh_axes(e)))
        or any(_blocked(plain(body)) for body in bodies(e))
        for e in jaxpr.eqns
    )


def _is_unrolled(program: Program, eqn: Any, inputs: tuple[Atom, ...]) -> bool:
    """Whether a loop over weights is read step by step: as wanted, or as the number of a step decides what it does."""
    body, length = versions.scan(eqn).body, versions.scan(eqn).length
    return (program.unroll or holds(body, {"cond"})) and length <= UNROLL_LIMIT and _holds_product(program, eqn, inputs)


def _holds_product(program: Program, eqn: Any, inputs: tuple[Atom, ...]) -> bool:
    """Whether a loop multiplies something that comes from params."""
    return any(program.is_parametric(a) and program.type_of(a).ndim >= 2 for a in inputs) and holds(
        versions.scan(eqn).body, PRODUCTS
    )


def _has_product(eqn: Any) -> bool:
    return any(holds(body, PRODUCTS) for body in bodies(eqn))
