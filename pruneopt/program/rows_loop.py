"""Primitives that carry a body: calls, read as their body, and loops, branches and kernels that stay whole."""

from __future__ import annotations

from pruneopt.program import versions
from pruneopt.program.axes import Ids, Reader
from pruneopt.program.flatten import straightened
from pruneopt.program.program import Equation, Program
from pruneopt.program.row import Row
from pruneopt.program.versions import CALLS, DERIVATIVES

_OWN = "a function with a derivative of its own"

_STEPS = "a loop runs over it"
_LAYERS = "it stacks layers: one entry of it is read at a time"


def _scan(reader: Reader, equation: Equation) -> list[Ids]:
    """The body's axes are those of one step: what is carried meets what was, steps are blocked."""
    loop = versions.scan(equation)
    n, k = loop.shared, loop.carry
    ids = [reader.of(atom) for atom in equation.inputs]
    for atom, one in zip(equation.inputs[n + k :], ids[n + k :], strict=True):
        reader.block((atom,), (0,), _LAYERS if reader.program.is_parametric(atom) else _STEPS)
        reader.role(atom, one[:1], "layer")
    inputs = [*ids[: n + k], *(one[1:] for one in ids[n + k :])]
    ends = reader.inside(_body(reader, equation), inputs)
    for before, after in zip(ids[n : n + k], ends[:k], strict=True):
        for a, b in zip(before, after, strict=True):
            reader.axes.tie(a, b, "carried by a loop")
    steps = [reader.made((loop.length,), _STEPS) for _ in ends[k:]]
    return [*ids[n : n + k], *((*step, *end) for step, end in zip(steps, ends[k:], strict=True))]


def _body(reader: Reader, equation: Equation) -> Program:
    """The body of a loop; what is carried depends on the batch where it does at the start or after a step."""
    loop = versions.scan(equation)
    data = {i for i, atom in enumerate(equation.inputs) if reader.program.is_data(atom)}
    while True:
        body = straightened(versions.plain(loop.body), versions.constants(loop.body), data)
        found = data | {loop.shared + i for i, atom in enumerate(body.outputs[: loop.carry]) if body.is_data(atom)}
        if found == data:
            return body
        data = found


ROWS: dict[str, Row] = {
    **{name: Row(inlined=True, whole=_OWN if name in DERIVATIVES else "") for name in CALLS},
    "while": Row(whole="a while loop, whose number of steps depends on the data"),
    "cond": Row(whole="a cond, whose branch depends on data or params"),
    "scan": Row(whole="a loop that was not unrolled", axes=_scan),
    "shard_map": Row(whole="a shard_map over several devices, or one with a collective that has no rule"),
    "pallas_call": Row(whole="a Pallas kernel"),
    "custom_linear_solve": Row(whole="a linear solve"),
    "ffi_call": Row(whole="a foreign call"),
}
