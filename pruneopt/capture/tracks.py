"""Where the entries of a variable come from along the axes of the batch: one rule a primitive, an index an axis."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

from pruneopt.program.program import Equation

Index = np.ndarray  # of a variable's rank, of size 1 along the axes that it does not depend on; -1: of no one position
_LOST = np.zeros(0)  # what a rule returns where it cannot follow


class Where(NamedTuple):
    """tracks: (axis of the weights, index); ~axis for an axis of that place which has another length. gone: axes that
    were summed over. lost: {axis: why it could not be followed}.
    """

    tracks: tuple[tuple[int, Index], ...] = ()
    gone: frozenset[int] = frozenset()
    lost: tuple[tuple[int, str], ...] = ()

    @property
    def known(self) -> bool:
        """Whether it has to do with the batch."""
        return bool(self.tracks or self.gone or self.lost)

    def mapped(self, of: Callable[[Index], Index | None], name: str) -> Where:
        """Tracks moved by `of`: an index, None where its axis is summed over, `_LOST`."""
        kept, gone, lost = [], set(self.gone), dict(self.lost)
        for axis, index in self.tracks:
            new = of(index)
            if new is _LOST:
                lost.setdefault(axis, f"{name} moves it") if axis >= 0 else None
            elif new is not None:
                kept.append((axis, new))
            elif axis >= 0:
                gone.add(axis)
        return Where(tuple(kept), frozenset(gone), tuple(lost.items()))


def spans(index: Index) -> tuple[int, ...]:
    """The axes that an index depends on; none for a single position."""
    return tuple(k for k, n in enumerate(index.shape) if n > 1)


def same(a: Index, b: Index) -> bool:
    """Whether two indices are one."""
    return a.shape == b.shape and bool(np.array_equal(a, b))


def join(parts: Sequence[Where], name: str) -> Where:
    """What entries have that are made of those of all parts, of one rank."""
    tracks: list[tuple[int, Index]] = []
    lost = {axis: why for part in parts for axis, why in part.lost}
    for axis, index in (track for part in parts for track in part.tracks):
        if not any(axis == other and same(index, found) for other, found in tracks):
            tracks.append((axis, index))

    def clashes(axis: int, index: Index) -> bool:
        others = [found for other, found in tracks if other == axis and found is not index]
        met = [spans(found) for found in others]
        return any((not spans(index) and not there) or set(spans(index)) & set(there) for there in met)

    bad = {axis for axis, index in tracks if axis >= 0 and clashes(axis, index)}
    lost |= {axis: f"different positions meet in {name}" for axis in bad if axis not in lost}
    kept = tuple(track for track in tracks if track[0] not in bad)
    return Where(kept, frozenset().union(*(part.gone for part in parts)), tuple(lost.items()))


def _factored(index: Index) -> Index:
    """Without the axes along which it is constant."""
    for k in spans(index):
        if bool(np.all(index == index.take([0], k))):
            index = index.take([0], k)
    return index


def _moved(index: Index, to: dict[int, int], rank: int) -> Index | None:
    """Axis k goes to axis to[k] of a variable of `rank` axes; those that are not in `to` are summed over."""
    if any(k not in to for k in spans(index)):
        return None
    order = sorted(to, key=lambda k: to[k])
    shape = [1] * rank
    for k in order:
        shape[to[k]] = index.shape[k]
    others = [k for k in range(index.ndim) if k not in to]
    return np.transpose(index, (*others, *order)).reshape(shape)


class Rules:
    """The rules, for one program. shape: atom -> its shape. value: atom -> the array that it holds, or None."""

    def __init__(self, shape: Callable[[Any], tuple[int, ...]], value: Callable[[Any], Any]):
        self._shape, self._value = shape, value

    def of(self, equation: Equation, inputs: Sequence[Where]) -> list[Where]:
        """For each output of an equation, where its entries come from."""
        name = equation.primitive.name
        if not any(part.known for part in inputs):
            return [Where()] * len(equation.outputs)
        if name in _ALIKE:
            return self._alike(equation, inputs)
        rule = getattr(self, "_" + name, None) or (self._reduce if name in _REDUCE else None)
        found = None if rule is None else rule(equation, inputs)
        return [self._unknown(name, inputs)] * len(equation.outputs) if found is None else found

    def _unknown(self, name: str, inputs: Sequence[Where]) -> Where:
        axes = {axis for part in inputs for axis, _ in part.tracks if axis >= 0}
        axes |= {axis for part in inputs for axis in part.gone}
        lost = {axis: why for part in inputs for axis, why in part.lost}
        return Where(lost=tuple((dict.fromkeys(axes, f"it goes through {name}") | lost).items()))

    def _alike(self, equation: Equation, inputs: Sequence[Where]) -> list[Where]:
        found = []
        for i, var in enumerate(equation.outputs):
            rank = len(self._shape(var))
            parts = [w for a, w in zip(equation.inputs, inputs, strict=True) if len(self._shape(a)) == rank]
            if len(equation.outputs) == len(equation.inputs):
                parts = [inputs[i]]
            found.append(join(parts, equation.primitive.name))
        return found

    def _transpose(self, e: Equation, inputs: Sequence[Where]) -> list[Where]:
        return [inputs[0].mapped(lambda index: np.transpose(index, e.params["permutation"]), "transpose")]

    def _broadcast_in_dim(self, e: Equation, inputs: Sequence[Where]) -> list[Where]:
        to, rank = dict(enumerate(e.params["broadcast_dimensions"])), len(self._shape(e.outputs[0]))
        return [inputs[0].mapped(lambda index: _moved(index, to, rank), "broadcast_in_dim")]

    def _reshape(self, e: Equation, inputs: Sequence[Where]) -> list[Where] | None:
        old, new = self._shape(e.inputs[0]), self._shape(e.outputs[0])
        if 0 in old or e.params.get("dimensions") is not None:
            return None
        groups = _groups(old, new)

        def of(index: Index) -> Index:
            full, made = [1] * len(old), [1] * len(new)
            for before, after in groups:
                if any(index.shape[k] > 1 for k in before):
                    for k in before:
                        full[k] = old[k]
                    for k in after:
                        made[k] = new[k]
            return _factored(np.broadcast_to(index, full).reshape(made))

        return [inputs[0].mapped(of, "reshape")]

    def _squeeze(self, e: Equation, inputs: Sequence[Where]) -> list[Where]:
        return [inputs[0].mapped(lambda index: np.squeeze(index, tuple(e.params["dimensions"])), "squeeze")]

    def _rev(self, e: Equation, inputs: Sequence[Where]) -> list[Where]:
        return [inputs[0].mapped(lambda index: np.flip(index, tuple(e.params["dimensions"])), "rev")]

    def _reduce(self, e: Equation, inputs: Sequence[Where]) -> list[Where]:
        dims = e.params["dimensions" if e.primitive.name == "reduce" else "axes"]
        kept = [k for k in range(len(self._shape(e.inputs[0]))) if k not in dims]
        to = {k: i for i, k in enumerate(kept)}
        return [inputs[0].mapped(lambda index: _moved(index, to, len(kept)), e.primitive.name)] * len(e.outputs)

    def _cut(self, where: Where, bounds: Sequence[tuple[int, int, int] | None], name: str) -> Where:
        """A slice; None for an axis whose start is not known."""

        def of(index: Index) -> Index | None:
            for k in spans(index):
                bound = bounds[k]
                if bound is None:
                    return _LOST
                index = index[(slice(None),) * k + (slice(*bound),)]
            return index

        return where.mapped(of, name)

    def _slice(self, e: Equation, inputs: Sequence[Where]) -> list[Where]:
        p = e.params
        strides = p["strides"] or (1,) * len(p["start_indices"])
        bounds = list(zip(p["start_indices"], p["limit_indices"], strides, strict=True))
        return [self._cut(inputs[0], bounds, "slice")]

    def _dynamic_slice(self, e: Equation, inputs: Sequence[Where]) -> list[Where]:
        shape, bounds = self._shape(e.inputs[0]), []
        for n, size, start in zip(shape, e.params["slice_sizes"], map(self._value, e.inputs[1:]), strict=True):
            at = 0 if n == size else None if start is None else int(np.clip(int(start), 0, n - size))
            bounds.append(None if at is None else (at, at + size, 1))
        return [self._cut(inputs[0], bounds, "a slice at an index that is computed")]

    def _split(self, e: Equation, inputs: Sequence[Where]) -> list[Where]:
        shape, k, start, found = self._shape(e.inputs[0]), e.params["axis"], 0, []
        for size in e.params["sizes"]:
            bounds = [(start, start + size, 1) if j == k else (0, n, 1) for j, n in enumerate(shape)]
            found.append(self._cut(inputs[0], bounds, "split"))
            start += size
        return found

    def _concatenate(self, e: Equation, inputs: Sequence[Where]) -> list[Where]:
        k = e.params["dimension"]
        return [_joined(inputs, [self._shape(a)[k] for a in e.inputs], k)]

    def _stack(self, e: Equation, inputs: Sequence[Where]) -> list[Where]:
        k = e.params["axis"]
        layers = [part.mapped(lambda index: np.expand_dims(index, k), "stack") for part in inputs]
        return [_joined(layers, [1] * len(layers), k)]

    def _unstack(self, e: Equation, inputs: Sequence[Where]) -> list[Where]:
        k, shape, found = e.params["axis"], self._shape(e.inputs[0]), []
        for at in range(shape[k]):
            bounds = [(at, at + 1, 1) if j == k else (0, n, 1) for j, n in enumerate(shape)]
            layer = self._cut(inputs[0], bounds, "unstack")
            found.append(layer.mapped(lambda index: np.squeeze(index, k), "unstack"))
        return found

    def _pad(self, e: Equation, inputs: Sequence[Where]) -> list[Where]:
        shape = self._shape(e.outputs[0])

        def of(index: Index) -> Index | None:
            for k in spans(index):
                low, high, inside = e.params["padding_config"][k]
                if low < 0 or high < 0:
                    return _LOST
                if low or high or inside:
                    padded = np.full([*index.shape[:k], shape[k], *index.shape[k + 1 :]], -1, index.dtype)
                    stop = low + (index.shape[k] - 1) * (inside + 1) + 1
                    padded[(slice(None),) * k + (slice(low, stop, inside + 1),)] = index
                    index = padded
            return index

        return [inputs[0].mapped(of, "pad")]

    def _dynamic_update_slice(self, e: Equation, inputs: Sequence[Where]) -> list[Where] | None:
        """Positions that are written one after another into an array without any."""
        (old, new), starts = map(self._shape, e.inputs[:2]), list(map(self._value, e.inputs[2:]))
        if not inputs[1].known and inputs[0].known:
            return [inputs[0]]
        cut = [k for k, (n, m) in enumerate(zip(old, new, strict=True)) if n != m]
        if any(starts[k] is None for k in cut):
            return None
        tracks = []
        for axis, index in inputs[1].tracks:
            before = [i for a, i in inputs[0].tracks if a == axis]
            if axis < 0 or len(before) > 1:
                continue
            base = before[0] if before else np.full([1] * len(old), -1)
            shape = [n if k in cut else max(base.shape[k], index.shape[k]) for k, n in enumerate(old)]
            made = np.array(np.broadcast_to(base, shape))
            place = [
                slice(at := int(np.clip(int(starts[k]), 0, old[k] - new[k])), at + new[k]) if k in cut else slice(None)
                for k in range(len(old))
            ]
            made[tuple(place)] = index
            tracks.append((axis, _factored(made)))
        gone, lost = inputs[0].gone | inputs[1].gone, dict(inputs[0].lost) | dict(inputs[1].lost)
        return [Where(tuple(tracks), gone, tuple(lost.items()))]

    def _dot_general(self, e: Equation, inputs: Sequence[Where]) -> list[Where]:
        contract, batch = e.params["dimension_numbers"]
        rank, start, parts = len(self._shape(e.outputs[0])), len(batch[0]), []
        for side in (0, 1):
            ndim = len(self._shape(e.inputs[side]))
            free = [k for k in range(ndim) if k not in (*contract[side], *batch[side])]
            to = {k: i for i, k in enumerate(batch[side])} | {k: start + i for i, k in enumerate(free)}
            start += len(free)
            parts.append(inputs[side].mapped(lambda index, to=to: _moved(index, to, rank), "dot_general"))
        return [join(parts, "dot_general")]

    def _conv_general_dilated(self, e: Equation, inputs: Sequence[Where]) -> list[Where] | None:
        """Pixels keep their place where there are as many after the convolution as before it."""
        p, old, new = e.params, self._shape(e.inputs[0]), self._shape(e.outputs[0])
        if inputs[1].known or p["batch_group_count"] != 1:
            return None
        image, out = p["dimension_numbers"].lhs_spec, p["dimension_numbers"].out_spec
        to = dict(zip((image[0], *image[2:]), (out[0], *out[2:]), strict=True))
        plain = {
            k: stride == dilation == 1 and old[k] == new[to[k]]
            for k, stride, dilation in zip(image[2:], p["window_strides"], p["lhs_dilation"], strict=True)
        }

        def of(index: Index) -> Index | None:
            slides = any(not plain.get(k, True) for k in spans(index))
            return _LOST if slides else _moved(index, to, len(new))

        return [inputs[0].mapped(of, "conv_general_dilated, whose window")]

    def _ragged_dot_general(self, e: Equation, inputs: Sequence[Where]) -> list[Where] | None:
        rows = e.params["ragged_dot_dimension_numbers"].lhs_ragged_dimensions
        if len(rows) != 1 or len(self._shape(e.outputs[0])) != 2:
            return None
        return [inputs[0].mapped(lambda index: _moved(index, {rows[0]: 0}, 2), "ragged_dot_general")]

    def _sort(self, e: Equation, inputs: Sequence[Where]) -> list[Where]:
        k = e.params["dimension"]
        found = [part.mapped(lambda index: _LOST if k in spans(index) else index, "sort") for part in inputs]
        return [join(found, "sort")] * len(e.outputs)

    def _gather(self, e: Equation, inputs: Sequence[Where]) -> list[Where]:
        """Axes of which all is taken go on; entries picked by an index stand where the index does."""
        numbers, sizes = e.params["dimension_numbers"], e.params["slice_sizes"]
        shape, rank = self._shape(e.inputs[0]), len(self._shape(e.outputs[0]))
        batch = [k for k in range(rank) if k not in numbers.offset_dims]
        at = inputs[1].mapped(lambda index: _moved(index, dict(enumerate(batch)), rank), "gather")
        gone = (*numbers.collapsed_slice_dims, *numbers.operand_batching_dims)
        kept = [k for k in range(len(shape)) if k not in gone]
        to = {k: j for k, j in zip(kept, numbers.offset_dims, strict=True) if sizes[k] == shape[k]}
        paired = zip(numbers.operand_batching_dims, numbers.start_indices_batching_dims, strict=True)
        to |= {k: batch[j] for k, j in paired}
        one_each = {k for _, index in at.tracks for k in spans(index)}
        single = all(self._shape(e.outputs[0])[k] == 1 or k in one_each | set(to.values()) for k in batch)
        picks = self._value(e.inputs[1])

        def of(index: Index) -> Index | None:
            if all(k in to for k in spans(index)):
                return _moved(index, to, rank)
            if picks is not None:
                return _factored(np.asarray(e.run([np.broadcast_to(index, shape).copy(), picks])[0]))
            return None if single else _LOST

        return [join([inputs[0].mapped(of, "an index that is computed (gather)"), at], "gather")]


def _joined(inputs: Sequence[Where], sizes: Sequence[int], k: int) -> Where:
    """Parts of these sizes side by side along axis k.

    Where positions lie along it their indices are joined too; -1 where a part has none, as a class token.
    """
    own, whole = list(inputs), []
    for axis in sorted({axis for part in inputs for axis, _ in part.tracks if axis >= 0}):
        each = [[index for a, index in part.tracks if a == axis] for part in inputs]
        found = [index for indices in each for index in indices]
        along = any(k in spans(index) for index in found)
        if max(map(len, each)) > 1 or (not along and all(same(index, found[0]) for index in found)):
            continue
        shape = [max(index.shape[j] for index in found) for j in range(found[0].ndim)]
        parts = []
        for indices, n in zip(each, sizes, strict=True):
            shape[k] = n
            parts.append(np.broadcast_to(indices[0] if indices else np.asarray(-1), shape))
        whole.append((axis, _factored(np.concatenate(parts, k))))
        own = [part._replace(tracks=tuple(t for t in part.tracks if t[0] != axis)) for part in own]
    rest = [part.mapped(lambda index: _LOST if k in spans(index) else index, "a concatenation") for part in own]
    return join([*rest, Where(tuple(whole))], "a concatenation")


def _groups(old: tuple[int, ...], new: tuple[int, ...]) -> list[tuple[list[int], list[int]]]:
    """Stretches of axes with one product before and after a reshape."""
    found, i, j = [], 0, 0
    while i < len(old) or j < len(new):
        before, after = list(range(i, min(i + 1, len(old)))), list(range(j, min(j + 1, len(new))))
        i, j = i + len(before), j + len(after)
        while (p := int(np.prod([old[k] for k in before]))) != (q := int(np.prod([new[k] for k in after]))):
            if p < q:
                before, i = [*before, i], i + 1
            else:
                after, j = [*after, j], j + 1
        found.append((before, after))
    return found


_REDUCE = frozenset(
    {"reduce", "reduce_and", "reduce_max", "reduce_min", "reduce_or", "reduce_prod", "reduce_sum", "reduce_xor"}
    | {"argmax", "argmin"}
)
# Each entry of the result stands where those that it is made of stand.
_ALIKE = frozenset(
    {"abs", "acos", "acosh", "add", "add_any", "and", "asin", "asinh", "atan", "atan2", "atanh", "bessel_i0e"}
    | {"bessel_i1e", "cbrt", "ceil", "clamp", "clz", "conj", "convert_element_type", "copy", "copy_p", "cos", "cosh"}
    | {"cumlogsumexp", "cummax", "cummin", "cumprod", "cumsum", "device_put", "digamma", "div", "eq", "eq_to", "erf"}
    | {"erf_inv", "erfc", "exp", "exp2", "expm1", "floor", "ge", "gt", "igamma", "igammac", "imag", "integer_pow"}
    | {"is_finite", "le", "le_to", "lgamma", "log", "log1p", "logistic", "lt", "lt_to", "max", "min", "mul", "name"}
    | {"ne", "neg", "nextafter", "not", "optimization_barrier", "or", "population_count", "pow", "pvary", "real"}
    | {"reduce_precision", "rem", "round", "rsqrt", "select_n", "sharding_constraint", "shift_left", "sign", "sin"}
    | {"shift_right_arithmetic", "shift_right_logical", "sinh", "sqrt", "square", "stop_gradient", "sub", "tan"}
    | {"tanh", "xor"}
)
