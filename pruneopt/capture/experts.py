"""How much each expert of a mixture adds to its output: the norm of what the gate lets through, where it is routed."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from pruneopt import _tree
from pruneopt.network.batches import Batches
from pruneopt.program.forms import Ragged
from pruneopt.program.keys import Literal
from pruneopt.program.primitives import row_of
from pruneopt.program.program import Equation, Program
from pruneopt.program.segment import Segment, closure
from pruneopt.structure.graph import Graph
from pruneopt.structure.operators import Operator, Use
from pruneopt.structure.traced import Traced

Tree = Any

# What is linear in one input, the others given; `first`: in the first alone.
_LINEAR = frozenset({"mul", "dot_general", "convert_element_type", "reduce_sum", "neg", "copy", "select_n"})
_FIRST = frozenset({"div", "gather"})


class Combined(NamedTuple):
    """The outputs y of experts and the sum z of them, linear in y. others: what else the way from y to z reads."""

    output: int
    total: int
    others: tuple[int, ...]


def combined(program: Program, use: Use) -> Combined:
    """The farthest variable that is linear in a product's output alone, its gate and its sum over experts passed."""
    readers: dict[int, list[int]] = {}
    for i, equation in enumerate(program.equations):
        for atom in dict.fromkeys(a for a in equation.inputs if isinstance(a, int)):
            readers.setdefault(atom, []).append(i)
    (output,) = program.equations[use.equation].outputs
    var, others = output, dict[int, None]()
    while len(readers.get(var, ())) == 1 and var not in program.outputs:
        equation = program.equations[readers[var][0]]
        if not _is_linear(program, equation, var):
            break
        others |= dict.fromkeys(a for a in equation.inputs if isinstance(a, int) and a != var)
        (var,) = equation.outputs
    return Combined(output, var, tuple(others))


def _is_linear(program: Program, equation: Equation, var: int) -> bool:
    """Whether an equation is linear in one variable, and weighs it by data or numbers and not by parameters."""
    name, inputs = equation.primitive.name, equation.inputs
    rest = [a for a in inputs if a is not var and a != var]
    if inputs.count(var) != 1 or any(map(program.is_parametric, rest)):
        return False
    if name == "scatter-add":
        return inputs[2] == var and not program.is_data(inputs[0])
    if name == "select_n":
        return inputs[0] != var and all(_is_zero(program, a) for a in rest if a is not inputs[0])
    if name in _LINEAR:
        return True
    if inputs[0] != var or name in _FIRST:
        return inputs[0] == var
    moves = row_of(equation).layout is not None and len(equation.outputs) == 1
    return moves and not any(map(program.is_data, rest))


def _is_zero(program: Program, atom: Any) -> bool:
    """Whether it is known to be zero."""
    if isinstance(atom, Literal):
        return not np.any(np.asarray(atom.value))
    if atom in program.constants:
        return not np.any(np.asarray(program.constants[atom]))
    if atom in program.maker and program.equations[program.maker[atom]].primitive.name == "broadcast_in_dim":
        return _is_zero(program, program.equations[program.maker[atom]].inputs[0])
    return False


def adds(program: Program, operators: Sequence[Operator]) -> list[Operator]:
    """Those of several operators of experts whose outputs are weighed and summed, and not inputs of another."""
    products = {use.equation for op in operators for use in op.uses}
    found = []
    for op in operators:
        ways = [combined(program, use) for use in op.uses]
        inside = any(way.total in program.equations[i].inputs for way in ways for i in products)
        if not inside and all(way.total != way.output for way in ways):
            found.append(op)
    return found


def contributions(traced: Traced, name: str, leaves: Tree, batches: Batches) -> Float[np.ndarray, " problems"]:
    """For each problem e of an operator, an expert, the mean over the positions routed to it of ||g_e(x) y_e(x)||.

    y_e is the operator's output and g_e y_e what it adds to the sum over experts, whatever the program makes of its
    gate: the sum's part that is linear in y_e. A position is routed to e where outputs of ones would add something.
    0 for an expert that no position is routed to. Raises ValueError where outputs are not summed along their own axis.
    Source: Lasby et al. 2025 (REAP).
    """
    named = dict(_tree.named_leaves(leaves))
    total, count = 0.0, 0.0
    for batch in batches:
        graph = traced.of(batch)
        (op,) = [op for op in graph.operators if op.name == name]
        for sums, routed in (_added(graph, op, use, named, batch) for use in op.uses):
            total, count = total + np.asarray(sums, np.float64), count + np.asarray(routed, np.float64)
    return np.asarray(total / np.maximum(count, 1.0))


def _added(graph: Graph, op: Operator, use: Use, leaves: dict[str, Any], batch: Any) -> tuple[Array, Array]:
    program, found = graph.program, combined(graph.program, use)
    if found.total == found.output or program.shapes[found.total].shape[-1:] != (op.n_out,):
        raise ValueError(
            f"experts: what the program makes of the outputs of '{op.name}', {program.shapes[found.total].shape}, is "
            f"no sum of vectors of {op.n_out} that a gate weighs; rank the experts by another row, such as "
            "method='unit_l2', or by a UnitMethod of your own"
        )
    wanted = [found.output, *found.others, *use.inputs[1:]]
    have = {v for v in wanted if not program.is_data(v)}
    data = [v for v in dict.fromkeys(wanted) if v not in have]
    first = Segment(program, closure(program, data, set()), data)
    chain = Segment(program, closure(program, [found.total], set(data)), [found.total])
    given = {v: leaves[path] for path, v in program.leaves.items()} | program.constants
    given |= dict(zip(program.batch, jax.tree.leaves(batch), strict=True))
    env = given | dict(zip(data, first.run(given), strict=True))
    sizes = env[use.inputs[1]] if isinstance(use.form, Ragged) else None
    others = [env[v] for v in chain.inputs]
    return _norms(chain, chain.inputs.index(found.output), use.form, others, sizes)


@partial(jax.jit, static_argnames=("chain", "place", "form"))
def _norms(chain: Segment, place: int, form: Any, given: Sequence[Any], sizes: Any) -> tuple[Any, Any]:
    """(sum of the norms, number of positions where the gate is not zero) of each problem's part of the total."""
    y = given[place]
    axes = form.output_axes[1] if isinstance(form, Ragged) else form.output_axes[0]
    owned = form.belongs(sizes) if isinstance(form, Ragged) else jnp.eye(form.problems, dtype=bool)
    along = [y.shape[k] if k in axes else 1 for k in range(y.ndim)]

    def of(outputs: Any) -> Any:
        values = [outputs if i == place else x for i, x in enumerate(given)]
        return chain.trace(values)[0].astype(_tree.wide(y.dtype))

    def one(own: Any) -> tuple[Any, Any]:
        own = own.astype(bool).reshape([y.shape[k] for k in axes])  # in the order of the form's axes
        own = jnp.transpose(own, np.argsort(axes).tolist()).reshape(along)
        z, gate = (of(jnp.where(own, x, jnp.zeros((), y.dtype))) for x in (y, jnp.ones_like(y)))
        norm = jnp.sqrt(jnp.sum(z * z, axis=-1))
        return jnp.sum(norm), jnp.sum(jnp.any(gate != 0, axis=-1).astype(norm.dtype))

    return jax.lax.map(one, owned)
