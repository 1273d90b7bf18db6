"""What fixed parameters do to an operator's output, entry by entry: a bias, a norm by running statistics, a scale."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, Int

from pruneopt.capture.walk import fixed
from pruneopt.program.forms import Form
from pruneopt.program.program import Program
from pruneopt.program.segment import Segment, closure
from pruneopt.structure.operators import Use

_AFFINE = frozenset({"add", "convert_element_type", "div", "mul", "neg", "sub"})
_MOVES = frozenset({"copy", "expand_dims", "reshape", "squeeze", "transpose"})
_NEAR = 1e-3  # of one: how far ratios of derivatives may be from the whole numbers, or the ones, that they stand for

Leaves = Mapping[str, Any]
# {role: (path of the leaf, its entry for each feature, by how much the feature moves with it)}
Roles = dict[str, tuple[str, Int[np.ndarray, " f"], Float[np.ndarray, " f"]]]


def readers_of(program: Program) -> dict[int, list[int]]:
    """{variable: the equations that read it}."""
    readers: dict[int, list[int]] = {}
    for i, equation in enumerate(program.equations):
        for atom in dict.fromkeys(a for a in equation.inputs if isinstance(a, int)):
            readers.setdefault(atom, []).append(i)
    return readers


def affine_steps(program: Program, readers: Mapping[int, Sequence[int]], start: int) -> Iterator[int]:
    """What a variable becomes while the next equation alone reads it, and adds or multiplies what no batch moves."""
    var = start
    while len(readers.get(var, ())) == 1 and var not in program.outputs:
        equation = program.equations[readers[var][0]]
        name, data = equation.primitive.name, [a for a in equation.inputs if isinstance(a, int) and program.is_data(a)]
        divides = name == "div" and equation.inputs[0] != var
        if name not in _AFFINE | _MOVES or len(data) != 1 or equation.inputs.count(var) != 1 or divides:
            return
        var = equation.outputs[0]
        yield var


class Affine:
    """z = slope y + offset of each feature, an output of a problem of an operator, and the leaves that say so.

    bias: moves z. mean: moves y the other way. scale, variance: a norm's, whose statistics a training step sets.
    """

    def __init__(self, program: Program, output: int, segment: Segment, at: Int[np.ndarray, " f"], roles: Roles):
        self._program, self._output, self._segment, self._at, self._roles = program, output, segment, at, roles

    @property
    def paths(self) -> dict[str, str]:
        """{role: path of the leaf}."""
        return {role: path for role, (path, *_) in self._roles.items()}

    @property
    def is_norm(self) -> bool:
        """Whether it is a norm by running statistics, with a scale and then a bias."""
        return {"bias", "mean", "scale", "variance"} <= self._roles.keys() and np.allclose(self._roles["bias"][2], 1.0)

    def moved(self, leaves: Leaves, by: Float[np.ndarray, " f"]) -> dict[str, Any]:
        """The leaves with which z is what it would be of y + by: a norm's running mean where there is one, which is y's
        own and estimated anew with it, else the bias.
        """
        if "mean" in self._roles:
            return self._put(leaves, "mean", self._of(leaves, "mean") - by)
        step = self._line(leaves)[0] * by / self._roles["bias"][2]
        return self._put(leaves, "bias", self._of(leaves, "bias") + step)

    def settled(
        self, leaves: Leaves, mean: Float[np.ndarray, " f"], variance: Float[np.ndarray, " f"]
    ) -> dict[str, Any]:
        """The leaves of a norm with these statistics of y, and the scale and bias with which z stays what it is."""
        slope, offset = self._line(leaves)
        now = dict(leaves)
        now |= self._put(now, "mean", mean) | self._put(now, "variance", variance)
        other, _ = self._line(now)
        ratio = np.divide(slope, other, out=np.ones_like(slope), where=other != 0)
        now |= self._put(now, "scale", self._of(now, "scale") * ratio)
        now |= self._put(now, "bias", self._of(now, "bias") + offset - self._line(now)[1])
        return {path: now[path] for path in self.paths.values()}

    def _line(self, leaves: Leaves) -> tuple[Float[np.ndarray, " f"], Float[np.ndarray, " f"]]:
        """Slope and offset of each feature."""
        y = self._segment.inputs.index(self._output)
        found = _line(self._segment, y, _inputs(self._program, self._segment, self._output, leaves))
        slope, offset = (np.asarray(x, np.float64).reshape(-1)[self._at] for x in found)
        return slope, offset

    def _of(self, leaves: Leaves, role: str) -> Float[np.ndarray, " f"]:
        path, entries, _ = self._roles[role]
        return np.asarray(leaves[path], np.float64).reshape(-1)[entries]

    def _put(self, leaves: Leaves, role: str, value: Float[np.ndarray, " f"]) -> dict[str, Any]:
        path, entries, _ = self._roles[role]
        new = np.array(leaves[path]).reshape(-1)
        new[entries] = value
        return {path: jnp.asarray(new.reshape(leaves[path].shape))}


def affine(program: Program, use: Use, leaves: Leaves) -> Affine | None:
    """What follows a product until something else than sums with parameters and products by them; None without a leaf
    that moves each feature by itself and does nothing else, and for more outputs than half precision can count.
    """
    (output,) = program.equations[use.equation].outputs
    readers = readers_of(program)
    end = next(reversed([*affine_steps(program, readers, output)]), output)
    segment = Segment(program, equations := closure(program, [end], {output}), [end])
    way = {program.maker[equation.outputs[0]] for equation in equations}
    own = [v for v in segment.inputs if v in program.names and _is_own(program, readers, v, way)]
    shape = program.shapes[output]
    if end == output or not own or not jnp.issubdtype(shape.dtype, jnp.floating):
        return None
    numbers = _numbered(use.form, shape)
    probe = {program.names[v]: jnp.where(x == 0, jnp.ones_like(x), x) for v in own for x in [leaves[program.names[v]]]}
    inputs = _inputs(program, segment, output, dict(leaves) | probe)  # a scale of zero would hide what is behind it
    at = [segment.inputs.index(v) for v in (output, *own)]
    slope, counted, tangents = _probed(segment, tuple(at), inputs, numbers)
    slope, counted = (np.asarray(x, np.float64).reshape(-1) for x in (slope, counted))
    if not np.all(slope):
        return None
    features = np.rint(counted / slope).astype(np.int64) - 1
    size = use.form.problems * use.form.n_out
    if features.min() < 0 or features.max() >= size or np.any(np.abs(counted / slope - 1 - features) > 0.1):
        return None  # half precision does not tell so many outputs apart
    first = np.full(size, -1)
    first[features[::-1]] = np.arange(len(features))[::-1]
    roles: Roles = {}
    for var, found in zip(own, tangents, strict=True):
        leaf, parts = probe[program.names[var]], [np.asarray(x, np.float64).reshape(-1) for x in found]
        role, entries = _role(np.asarray(leaf, np.float64).reshape(-1), slope, features, first, parts)
        if role:
            roles[role] = program.names[var], entries, parts[0][first]
    return Affine(program, output, segment, first, roles) if roles.keys() & {"bias", "mean"} else None


def _role(
    leaf: Float[np.ndarray, " n"], slope: Any, features: Any, first: Int[np.ndarray, " f"], tangents: Sequence[Any]
) -> tuple[str, Int[np.ndarray, " f"]]:
    """What a leaf is, and its entry for each feature; "" for what is none of the four.

    tangents: of offset and slope as all entries of the leaf move by one, and by their numbers from 1 on.
    """
    offset, tilt, *counted = tangents
    moves, numbers = (tilt, counted[1]) if np.any(tilt) else (offset, counted[0])
    if not np.all(moves):
        return "", first
    each = np.clip(np.rint(numbers / moves), 1, len(leaf)).astype(np.int64) - 1
    entries = each[first]
    clear = np.abs(numbers / moves - 1 - each) < 0.1
    if not (np.all(clear) and np.array_equal(entries[features], each) and len(set(entries)) == len(entries)):
        return "", first
    if not np.any(tilt):
        if not np.allclose(offset, offset[first][features], rtol=_NEAR):
            return "", first
        return ("mean" if np.allclose(offset, -slope, rtol=_NEAR) else "bias"), entries
    share = leaf[each] * tilt / slope  # d log slope / d log leaf
    if np.allclose(share, 1.0, rtol=_NEAR):
        return "scale", entries
    return ("variance" if np.all((share <= 0) & (share > -0.5 - _NEAR)) else ""), entries


def _is_own(program: Program, readers: Mapping[int, Sequence[int]], leaf: int, way: set[int]) -> bool:
    """Whether all that reads a leaf, or what parameters alone make of it, is on the way."""
    left = [leaf]
    while left:
        var = left.pop()
        if var in program.outputs or not set(readers.get(var, ())) <= way:
            return False
        made = [v for i in readers.get(var, ()) for v in program.equations[i].outputs]
        left += [v for v in made if not program.is_data(v)]
    return True


def _inputs(program: Program, segment: Segment, output: int, leaves: Leaves) -> list[Any]:
    """The segment's inputs where y is zero."""
    shape = program.shapes[output]
    return [jnp.zeros(shape.shape, shape.dtype) if v == output else fixed(program, v, leaves) for v in segment.inputs]


def _numbered(form: Form, shape: Any) -> Any:
    """An array like the output that holds the number of each entry's feature, from 1 on."""
    rows = jax.eval_shape(form.output_rows, shape)
    numbers = 1 + jnp.arange(rows.shape[0] * rows.shape[2], dtype=shape.dtype).reshape(rows.shape[0], 1, -1)
    (found,) = jax.linear_transpose(form.output_rows, shape)(jnp.broadcast_to(numbers, rows.shape))
    return found


@partial(jax.jit, static_argnums=(0, 1))
def _line(segment: Segment, y: int, inputs: list[Any]) -> tuple[Any, Any]:
    """d z / d y, and z where y is zero."""

    def at(value: Any) -> Any:
        return segment.trace([value if i == y else x for i, x in enumerate(inputs)])[0]

    offset, slope = jax.jvp(at, (inputs[y],), (jnp.ones_like(inputs[y]),))
    return slope, offset


@partial(jax.jit, static_argnums=(0, 1))
def _probed(segment: Segment, at: tuple[int, ...], inputs: list[Any], numbers: Any) -> tuple[Any, Any, list[Any]]:
    """The slope, the slope times the features' numbers, and for each leaf the tangents that `_role` reads."""
    y, *own = at

    def line(k: int, leaf: Any) -> tuple[Any, Any]:
        slope, offset = _line(segment, y, [leaf if i == k else x for i, x in enumerate(inputs)])
        return offset, slope

    def counted(value: Any) -> Any:
        return segment.trace([value if i == y else x for i, x in enumerate(inputs)])[0]

    slope, _ = _line(segment, y, inputs)
    tangents = []
    for k in own:
        leaf = inputs[k]
        steps = (jnp.ones_like(leaf), 1 + jnp.arange(leaf.size, dtype=leaf.dtype).reshape(leaf.shape))
        pairs = [jax.jvp(partial(line, k), (leaf,), (step,))[1] for step in steps]
        tangents.append([*pairs[0], *pairs[1]])
    return slope, jax.jvp(counted, (inputs[y],), (numbers,))[1], tangents
