"""What reaches each operator: input Grams, means, activations and output gradients, streamed over batches."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float
from tqdm import tqdm

from pruneopt import _tree
from pruneopt.capture import walk
from pruneopt.capture.walk import Env, Walk
from pruneopt.network.batches import Batches, Source, explained
from pruneopt.network.calls import check_value
from pruneopt.network.leaves import Choice, is_floating, partition
from pruneopt.network.network import Network
from pruneopt.program.forms import Form, Ragged
from pruneopt.program.keys import Literal
from pruneopt.program.program import Program
from pruneopt.structure.graph import Graph
from pruneopt.structure.operators import Operator
from pruneopt.structure.traced import Traced

Tree = Any
Weights = Callable[[Any], Any]
_HIGHEST = jax.lax.Precision.HIGHEST


@dataclass(frozen=True, eq=False)
class Statistics:
    """What was captured for one operator; None where it was not asked for. Means run over positions and batches.

    count: positions seen, or the sum of their weights, for each problem. gram: X^T X / count. mean: of the inputs.
    absolute: mean absolute input. zeros, unit_mean, unit_variance: of each incoming unit (neuron, or channel of a
    convolution), without padding and unweighted. output_gradient: G^T G / count, G the gradient of an example's loss
    in the operator's outputs, a row a position.
    """

    count: Float[np.ndarray, " problems"]
    gram: Float[Array, "problems n_in n_in"] | None = None
    mean: Float[Array, "problems n_in"] | None = None
    absolute: Float[Array, "problems n_in"] | None = None
    zeros: Float[Array, "problems units"] | None = None
    unit_mean: Float[Array, "problems units"] | None = None
    unit_variance: Float[Array, "problems units"] | None = None
    output_gradient: Float[Array, "problems n_out n_out"] | None = None


@_tree.on_host
def capture(
    fn: Callable[[Tree, Any], Any],
    params: Tree,
    batches: Source,
    *,
    leaves: Choice = None,
    gram: bool = True,
    means: bool = False,
    activations: bool = False,
    output_gradients: bool = False,
    weights: Weights | None = None,
    progress: bool = False,
) -> dict[str, Statistics]:
    """{operator's name: statistics of its inputs} over all batches, one batch in memory at a time.

    fn: outputs or a loss; for `output_gradients` a scalar loss, a mean over the examples of the batch.
    leaves: which operators, by the leaves that they read. weights: batch -> array of one weight a position, such as an
        attention mask (B, T); it counts in Grams and means. Weights tied over several products add up.
    Sums are kept in float32, float64 for float64 inputs, at the highest matmul precision.

    Raises ValueError for a leaf that no operator reads (with the reason), or weights that fit no position.
    """
    network = Network.of(fn, params, batches, leaves)
    stream, traced, slopes = network.batches, Traced(network), _Slopes(network)
    floats = dict(_tree.named_leaves(params))
    want = tuple(n for n, on in (("gram", gram), ("means", means), ("activations", activations)) if on)
    totals: dict[str, dict[str, Any]] = {}

    def sums_of(batch: Any, graph: Graph) -> Any:
        given = None if weights is None else checked_weights(weights(batch))
        return _one_batch(graph, traced.chosen(graph), batch, floats, want, given)

    for index, batch in enumerate(tqdm(stream, desc="capture", unit="batch", disable=not progress)):
        try:
            graph = traced.of(batch)
        except Exception as error:
            error.add_note(f"pruneopt called fn on batch {index} of batches.")
            raise
        for op, sums in sums_of(batch, graph):
            add(totals.setdefault(op.name, {}), sums)
        if output_gradients:
            names, n = [op.name for op in traced.chosen(graph)], stream.examples(batch)
            given = None if weights is None else checked_weights(weights(batch))
            for name, moment in slopes.of(batch, n, floats, names, given).items():
                add(totals.setdefault(name, {}), {"output_gradient": moment})
    _check_finite(totals, stream, lambda batch: sums_of(batch, traced.of(batch)), fn, params)
    return {name: _finished(sums) for name, sums in totals.items()}


def checked_weights(weights: Any) -> Any:
    """Weights of positions as they are. Raises ValueError for a NaN, an infinity or a negative one."""
    values = np.asarray(weights)
    if not np.all(np.isfinite(values)) or np.any(values < 0):
        raise ValueError("weights hold a NaN, an infinity or a negative number; pass weights >= 0, 0 where padded")
    return weights


def _check_finite(totals: dict[str, Any], stream: Batches, of: Callable[[Any], Any], fn: Any, params: Tree) -> None:
    """Raise ValueError for sums that are not finite, naming the first batch that makes them so, by another pass."""
    inputs = [n for n, s in totals.items() if not is_finite({k: x for k, x in s.items() if k != "output_gradient"})]
    for index, batch in enumerate(stream if inputs else ()):
        for op, sums in of(batch):
            if op.name in inputs and not is_finite(sums):
                raise ValueError(not_finite(f"{stream.name}: batch {index}", op.name, explained(batch)))
    if inputs:
        raise ValueError(not_finite(stream.name, inputs[0], ""))
    slopes = [n for n, s in totals.items() if not is_finite(s.get("output_gradient", 0.0))]
    for index, batch in enumerate(stream if slopes else ()):
        check_value(fn, *partition(params, is_floating), batch, f"{stream.name}: batch {index}")
    if slopes:
        raise ValueError(
            f"{stream.name}: the gradient in the outputs of '{slopes[0]}' holds a NaN or an infinity; repair the loss"
        )


def _one_batch(graph: Graph, chosen: Sequence[Operator], batch: Any, leaves: Any, want: Any, weights: Any) -> Any:
    """(operator, sums) for every product of the chosen operators."""
    uses = [(use, op) for op in chosen for use in op.uses]
    uses.sort(key=lambda pair: pair[0].equation)
    position = Walk(graph.program, [use.inputs for use, _ in uses])
    env: Env = position.start(batch)
    shared: dict[Any, Any] = {}
    for use, op in uses:
        key = (use.inputs, use.form.row_key)
        env = position.advance(use.inputs)(env, leaves)
        if key not in shared:
            shared = {key: sums(use.form, walk.values(graph.program, env, use.inputs), weights, want)}
        position.release(use.inputs)
        yield op, shared[key]


def sums(form: Form, inputs: Sequence[Any], weights: Any = None, want: tuple[str, ...] = ("gram",)) -> dict[str, Any]:
    """Sums over the positions of one product's inputs: count, and what is wanted of gram, means, activations."""
    spread = None if weights is None else _spread(form, jnp.asarray(weights))
    return _sums(form, inputs[0], inputs[1] if len(inputs) > 1 else None, spread, want)


def cross(form: Form, inputs: Sequence[Any], others: Sequence[Any], weights: Any = None) -> Any:
    """X^T Y over the positions, X the rows of `inputs` and Y those of `others`: (problems, n_in, n_in)."""
    spread = None if weights is None else _spread(form, jnp.asarray(weights))
    return _cross(form, inputs[0], others[0], inputs[1] if len(inputs) > 1 else None, spread)


def _spread(form: Form, weights: Any) -> Any:
    """Weights of any leading part of the positions, one a position."""
    shape, positions = weights.shape, form.positions
    n = len(shape)
    if len(positions) < n and shape[: len(positions)] == positions:  # one row an example: it counts if any part does
        return jnp.max(weights.reshape(*positions, -1), axis=-1).reshape(-1)
    if positions[:n] == shape:
        spread = weights.reshape(*shape, *[1] * (len(positions) - n))
        return jnp.broadcast_to(spread, positions).reshape(-1)
    if positions == (math.prod(shape),):
        return weights.reshape(-1)
    raise ValueError(
        f"weights have shape {shape}, but an operator's positions have shape {positions}; leave its leaf out of "
        "leaves=, or give one weight an example"
    )


@partial(jax.jit, static_argnames=("form", "want"))
def _sums(form: Form, x: Any, sizes: Any, weights: Any, want: tuple[str, ...]) -> dict[str, Any]:
    x = x.astype(_tree.wide(x.dtype))
    each = _each(form, sizes, weights, x.dtype)
    ones = jnp.ones((form.problems, math.prod(form.positions)), x.dtype)
    out: dict[str, Any] = {"count": jnp.sum(ones if each is None else jnp.broadcast_to(each, ones.shape), axis=1)}
    if "gram" in want:
        out["gram"] = _blocked(form, lambda rows, w: _gram(rows, rows, w), each, x)
    if "means" in want:
        out["mean"] = _blocked(form, partial(_weighted, lambda r: r), each, x)
        out["absolute"] = _blocked(form, partial(_weighted, jnp.abs), each, x)
    if "activations" in want:
        units = form.units(x)
        out["units"] = jnp.full((units.shape[0], 1), units.shape[1], x.dtype)
        out["zeros"] = jnp.sum((units == 0).astype(x.dtype), axis=1)
        out["unit_sum"] = jnp.sum(units, axis=1)
        centred = units - jnp.mean(units, axis=1, keepdims=True)
        out["unit_square"] = jnp.sum(centred * centred, axis=1)
    return out


@partial(jax.jit, static_argnames=("form",))
def _cross(form: Form, x: Any, y: Any, sizes: Any, weights: Any) -> Any:
    x, y = x.astype(_tree.wide(x.dtype)), y.astype(_tree.wide(y.dtype))
    return _blocked(form, _gram, _each(form, sizes, weights, x.dtype), x, y)


def _each(form: Form, sizes: Any, weights: Any, dtype: Any) -> Any:
    """One weight for each problem (or for all) and position; None for ones."""
    each = None if weights is None else weights.astype(dtype)[None]
    if isinstance(form, Ragged):
        belongs = form.belongs(sizes).astype(dtype)
        each = belongs if each is None else belongs * each
    return each


def _blocked(form: Form, fn: Callable[..., Any], each: Any, *arrays: Any) -> Any:
    """Sum of fn(*rows, weights) over blocks of positions."""
    blocks = [form.blocks(a) for a in arrays]
    n = blocks[0].shape[0]
    if n == 1:
        return fn(*map(form.rows, arrays), each)
    cut = None if each is None else jnp.moveaxis(each.reshape(each.shape[0], n, -1), 1, 0)

    def add(total: Any, block: Any) -> tuple[Any, None]:
        parts, w = block
        return total + fn(*map(form.rows, parts), w), None

    first = (tuple(b[0] for b in blocks), None if cut is None else cut[0])
    zero = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), jax.eval_shape(lambda p: add(0, p)[0], first))
    return jax.lax.scan(add, zero, (tuple(blocks), cut))[0]


def _gram(left: Any, right: Any, each: Any) -> Any:
    """sum_n w_n left_n right_n^T for each problem; what has no weight may be anything, a NaN too."""
    left, right = _live(left, each), _live(right, each)
    if each is not None and each.shape[0] > left.shape[0]:  # one set of rows, a problem's own weights
        return jax.lax.map(lambda w: jnp.matmul(left[0].T, right[0] * w[:, None], precision=_HIGHEST), each)
    if each is not None:
        right = right * each[..., None]
    if left.shape[0] == 1:
        return jnp.matmul(left[0].T, right[0], precision=_HIGHEST)[None]
    return jnp.einsum("pni,pnj->pij", left, right, precision=_HIGHEST)


def _live(rows: Any, each: Any) -> Any:
    """Rows, those without weight set to zero."""
    if each is None:
        return rows
    counts = (each > 0) if each.shape[0] <= rows.shape[0] else jnp.any(each > 0, axis=0, keepdims=True)
    return jnp.where(counts[..., None], rows, jnp.zeros((), rows.dtype))


def _weighted(of: Callable[[Any], Any], rows: Any, each: Any) -> Any:
    rows = _live(rows, each)
    if each is None:
        return jnp.sum(of(rows), axis=1)
    if each.shape[0] > rows.shape[0]:
        return jnp.matmul(each, of(rows)[0], precision=_HIGHEST)
    return jnp.sum(of(rows) * each[..., None], axis=1)


@jax.jit
def _all_finite(tree: Any) -> Any:
    return jnp.all(jnp.stack([jnp.all(jnp.isfinite(x)) for x in jax.tree.leaves(tree)]))


def is_finite(sums: Any) -> bool:
    """Whether they hold neither a NaN nor an infinity."""
    return bool(_all_finite(sums))


def not_finite(where: str, name: str, told: str) -> str:
    """What is wrong with inputs that are not finite, and what to do."""
    return (
        f"{where}: the inputs of '{name}' overflow or are not a number{told}; check the data and the network before it"
    )


def add(total: dict[str, Any], sums: dict[str, Any]) -> None:
    """Add the sums of another batch or product to `total`; counts in float64 on the host."""
    on_host = {
        n: np.asarray(v, np.float64) for n, v in sums.items() if n in ("count", "units", "unit_sum", "unit_square")
    }
    if "units" in on_host and "units" in total:  # squares around two means, joined (Chan, Golub and LeVeque 1979)
        n, m = total["units"], on_host["units"]
        apart = total["unit_sum"] / n - on_host["unit_sum"] / m
        on_host["unit_square"] = on_host["unit_square"] + apart**2 * n * m / (n + m)
    summed = {n: v for n, v in sums.items() if n not in on_host and n in total}
    summed = _joined({n: total[n] for n in summed}, summed)
    total.update({n: total[n] + v if n in total else v for n, v in on_host.items()})
    total.update({n: summed.get(n, v) for n, v in sums.items() if n not in on_host})


# One compiled program for all sums of an operator: compiling costs more than running.
@jax.jit
def _joined(one: dict[str, Any], two: dict[str, Any]) -> dict[str, Any]:
    return {n: one[n] + two[n] for n in one}


@jax.jit
def _divided(sums: dict[str, Any], by: dict[str, Any]) -> dict[str, Any]:
    return {n: s / by[n].reshape(-1, *[1] * (s.ndim - 1)) for n, s in sums.items()}


def _finished(total: dict[str, Any]) -> Statistics:
    """Sums divided by their counts."""

    count = total["count"]
    units = total.get("units", count)
    by = {"gram": count, "mean": count, "absolute": count, "zeros": units, "output_gradient": count}
    sums = {n: total[n] for n in by if n in total}
    over: dict[str, Any] = _divided(sums, {n: np.where(by[n] > 0, by[n], 1.0).astype(s.dtype) for n, s in sums.items()})
    for name in ("unit_sum", "unit_square"):
        if name in total:
            over[name] = jnp.asarray(total[name] / np.maximum(units, 1.0), over["zeros"].dtype)
    return Statistics(
        count,
        gram=over.get("gram"),
        mean=over.get("mean"),
        absolute=over.get("absolute"),
        zeros=over.get("zeros"),
        unit_mean=over.get("unit_sum"),
        unit_variance=over.get("unit_square"),
        output_gradient=over.get("output_gradient"),
    )


class _Slopes:
    """Second moments of a loss's gradients in its operators' outputs, compiled once for each shape of batches."""

    def __init__(self, network: Network):
        self._traced = Traced(network, keep_derivatives=True)
        self._compiled: dict[Graph, Any] = {}

    def of(self, batch: Any, n: float, leaves: dict[str, Any], names: list[str], weights: Any) -> dict[str, Any]:
        """{operator: sum over positions of g g^T}, g the gradient of an example's loss in the operator's output: n
        times that of the batch's.
        """
        graph = self._traced.of(batch)
        outputs = [graph.program.type_of(a) for a in graph.program.outputs]
        if len(outputs) != 1 or outputs[0].shape != ():
            raise ValueError(
                "output_gradients=True needs a loss: fn(params, batch) -> one number, a mean over examples"
            )
        places = {use.equation: (op.name, use) for op in graph.operators if op.name in names for use in op.uses}
        if graph not in self._compiled:
            self._compiled[graph] = jax.jit(jax.grad(partial(_bumped, graph.program)))
        types = {i: graph.program.type_of(graph.program.equations[i].outputs[0]) for i in places}
        arrays = {path: leaves[path] for path in graph.program.leaves}
        bumps = {i: jnp.zeros(t.shape, t.dtype) for i, t in types.items()}
        slopes = self._compiled[graph](bumps, arrays, jax.tree.leaves(batch))
        found = {}
        for index, (name, use) in places.items():
            spread = None if weights is None else _spread(use.form, jnp.asarray(weights))
            moment = _moment(use.form, slopes[index], n, spread)
            found[name] = found[name] + moment if name in found else moment
        return found


def _bumped(program: Program, bumps: dict[int, Any], leaves: dict[str, Any], batch: list[Any]) -> Any:
    """The loss with bumps[i] added to what equation i makes."""
    env: dict[Any, Any] = {v: leaves[p] for p, v in program.leaves.items()} | program.constants
    env.update(zip(program.batch, batch, strict=True))
    for index, equation in enumerate(program.equations):
        out = equation.run([a.value if isinstance(a, Literal) else env[a] for a in equation.inputs])
        if index in bumps:
            out = [out[0] + bumps[index]]
        env.update(zip(equation.outputs, out, strict=True))
    return env[program.outputs[0]]


@partial(jax.jit, static_argnames="form")
def _moment(form: Form, slope: Any, examples: float, weights: Any) -> Any:
    wide = _tree.wide(slope.dtype)
    rows = form.output_rows(slope.astype(wide) * jnp.asarray(examples, wide))
    return _gram(rows, rows, None if weights is None else weights.astype(wide)[None])
