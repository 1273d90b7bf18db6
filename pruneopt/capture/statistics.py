"""What reaches each operator: input Grams, means, activations and output gradients, streamed over batches."""

from __future__ import annotations

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
from pruneopt.capture.positions import Positions, checked_weights
from pruneopt.capture.sums import add, gram, is_finite, not_finite
from pruneopt.capture.sums import sums as sums_of
from pruneopt.capture.walk import Env, Walk
from pruneopt.network.batches import Batches, Source, explained
from pruneopt.network.calls import check_value
from pruneopt.network.leaves import Choice, is_floating, partition
from pruneopt.network.network import Network
from pruneopt.program.forms import Form
from pruneopt.program.keys import Literal
from pruneopt.program.program import Program
from pruneopt.structure.defaults import network_of
from pruneopt.structure.graph import Graph
from pruneopt.structure.operators import Operator, Use
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
    leaves: which operators, by the leaves that they read. weights: batch -> one weight >= 0 an example (B,) or position
        (B, T), such as an attention mask; in Grams and means. Its axes, the first ones of the batch's arrays, are
        followed through fn (`Positions`). Weights tied over several products add up.
    Sums are kept in float32, float64 for float64 inputs, at the highest matmul precision.

    Raises ValueError for a leaf that no operator reads (with the reason), weights that no array begins
    with or that cannot be followed to an operator, and sums that are not finite, naming the batch.
    """
    network = network_of(fn, params, batches, leaves)
    stream, traced, slopes = network.batches, Traced(network), _Slopes(network)
    floats = dict(_tree.named_leaves(params))
    want = tuple(n for n, on in (("gram", gram), ("means", means), ("activations", activations)) if on)
    totals: dict[str, dict[str, Any]] = {}

    each = _Each(weights)

    def reaching(batch: Any, graph: Graph) -> Any:
        return _one_batch(graph, traced.chosen(graph), batch, floats, want, each.of(graph, batch))

    for index, batch in enumerate(tqdm(stream, desc="capture", unit="batch", disable=not progress)):
        try:
            graph = traced.of(batch)
        except Exception as error:
            error.add_note(f"pruneopt called fn on batch {index} of batches.")
            raise
        for op, sums in reaching(batch, graph):
            add(totals.setdefault(op.name, {}), sums)
        if output_gradients:
            names, n = [op.name for op in traced.chosen(graph)], stream.examples(batch)
            for name, moment in slopes.of(batch, n, floats, names, graph, each.of(graph, batch)).items():
                add(totals.setdefault(name, {}), {"output_gradient": moment})
    _check_finite(totals, stream, lambda batch: reaching(batch, traced.of(batch)), fn, params)
    return {name: _finished(sums) for name, sums in totals.items()}


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
            shared = {key: sums_of(use.form, walk.values(graph.program, env, use.inputs), weights(op, use), want)}
        position.release(use.inputs)
        yield op, shared[key]


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


class _Each:
    """The weights of each product's positions in each batch, from the user's function of the batch; None for ones."""

    def __init__(self, weights: Weights | None):
        self._weights = weights
        self._known: dict[Any, Positions] = {}

    def of(self, graph: Graph, batch: Any) -> Callable[[Operator, Use], Any]:
        """(operator, product) -> weights (problems or 1, positions)."""
        if self._weights is None:
            return lambda op, use: None
        given = checked_weights(self._weights(batch))
        key = graph, np.shape(given)
        if key not in self._known:
            self._known[key] = Positions(graph.program, np.shape(given))
        return lambda op, use: self._known[key].spread(op.name, use, given)


class _Slopes:
    """Second moments of a loss's gradients in its operators' outputs, compiled once for each shape of batches."""

    def __init__(self, network: Network):
        self._traced = Traced(network, keep_derivatives=True)
        self._compiled: dict[Graph, Any] = {}

    def of(
        self, batch: Any, n: float, leaves: dict[str, Any], names: list[str], plain: Graph, weights: Any
    ) -> dict[str, Any]:
        """{operator: sum over positions of g g^T}, g the gradient of an example's loss in the operator's output: n
        times that of the batch's. weights: of the products of `plain`, the graph that keeps no derivative of its own.
        """
        graph = self._traced.of(batch)
        outputs = [graph.program.type_of(a) for a in graph.program.outputs]
        if len(outputs) != 1 or outputs[0].shape != ():
            raise ValueError(
                "output_gradients=True needs a loss: fn(params, batch) -> one number, a mean over examples"
            )
        pairs = [(a, b) for a, b in zip(graph.operators, plain.operators, strict=True) if a.name in names]
        places = {
            use.equation: (op.name, use, weights(twin, same))
            for op, twin in pairs
            for use, same in zip(op.uses, twin.uses, strict=True)
        }
        if graph not in self._compiled:
            self._compiled[graph] = jax.jit(jax.grad(partial(_bumped, graph.program)))
        types = {i: graph.program.type_of(graph.program.equations[i].outputs[0]) for i in places}
        arrays = {path: leaves[path] for path in graph.program.leaves}
        bumps = {i: jnp.zeros(t.shape, t.dtype) for i, t in types.items()}
        slopes = self._compiled[graph](bumps, arrays, jax.tree.leaves(batch))
        found = {}
        for index, (name, use, spread) in places.items():
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
    return gram(rows, rows, None if weights is None else weights.astype(wide))
