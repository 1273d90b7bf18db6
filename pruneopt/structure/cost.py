"""What a network costs, dense and pruned: FLOPs of its products, parameters, bytes, memory of its activations."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from pruneopt import _tree
from pruneopt.network.leaves import combine, is_floating, nearest, partition
from pruneopt.program import versions
from pruneopt.program.flatten import traced
from pruneopt.program.forms import PRODUCTS
from pruneopt.program.program import Equation, Program
from pruneopt.program.versions import CALLS, bodies, plain
from pruneopt.structure.graph import Graph, trace
from pruneopt.structure.operators import Operator

Tree = Any


@dataclass(frozen=True)
class Row:
    """One operator: `problems` matrices (n_in, n_out) and what of them is alive.

    parameters, alive_weights: weights. flops: of all its products on the traced batch; alive_flops: those with alive
    weights. alive_in, alive_out: inputs and outputs with any alive weight, of problems x n_in and problems x n_out.
    """

    name: str
    problems: int
    n_in: int
    n_out: int
    flops: int
    alive_flops: int
    parameters: int
    alive_weights: int
    alive_in: int
    alive_out: int


@dataclass(frozen=True)
class Cost:
    """A network's cost on the traced batch. `print(cost)` shows the table.

    rows: its operators. by_leaf: {path: FLOPs of the products with that leaf}, "" for those with none.
    parameters: entries of all floating-point leaves; bytes: of all arrays of params; alive_*: without what is cut, no
    index counted. activation_bytes: the largest sum of arrays that depend on the batch and are needed at one time, the
    batch included, when equations run one after another: those an equation reads and makes, and those read later. A
    compiler that fuses needs less, a gradient more; what lives inside a loop that was not unrolled is not counted.
    largest_activation: bytes of the largest such array.
    """

    rows: tuple[Row, ...]
    by_leaf: dict[str, int]
    parameters: int
    alive_parameters: int
    bytes: int
    alive_bytes: int
    activation_bytes: int
    largest_activation: int

    @property
    def flops(self) -> int:
        """2 x multiply-adds of all products."""
        return sum(self.by_leaf.values())

    @property
    def alive_flops(self) -> int:
        """FLOPs if the zeros of operators were skipped; products that no operator reads stay whole."""
        return self.flops - sum(r.flops - r.alive_flops for r in self.rows)

    @property
    def flops_activations(self) -> int:
        """FLOPs of products without a leaf of params: between activations, or with a constant."""
        return self.by_leaf.get("", 0)

    @property
    def flops_unread(self) -> int:
        """FLOPs of products with a leaf that no operator reads: inside a while, or of two leaves."""
        return self.flops - self.flops_activations - sum(r.flops for r in self.rows)

    def __str__(self) -> str:
        rows = [("operator", "in x out", "problems", "MFLOPs", "alive", "weights", "alive", "alive in", "alive out")]
        for r in self.rows:
            numbers = (f"{r.parameters:,}", f"{r.alive_weights:,}", f"{r.alive_in:,}", f"{r.alive_out:,}")
            work = (f"{r.flops / 1e6:.3f}", f"{r.alive_flops / 1e6:.3f}")
            rows.append((r.name, f"{r.n_in} x {r.n_out}", str(r.problems), *work, *numbers))
        between, unread = self.flops_activations / 1e6, self.flops_unread / 1e6
        return "\n".join(
            (
                _table(rows),
                f"MFLOPs {self.flops / 1e6:.3f} -> {self.alive_flops / 1e6:.3f} if zeros were skipped; "
                f"{between:.3f} of them between activations, {unread:.3f} read by no operator",
                f"parameters {self.parameters:,} -> {self.alive_parameters:,}",
                f"bytes {self.bytes:,} -> {self.alive_bytes:,} of values",
                f"activations {self.activation_bytes:,} bytes at the peak, {self.largest_activation:,} the largest",
            )
        )


def cost(graph: Graph, alive: Tree = None) -> Cost:
    """What the network of `graph` costs, dense and with the weights of `alive` alone.

    FLOPs = 2 x multiply-adds of dots, convolutions and ragged dots, padding taps included; a loop's body times its
    length, a while's body once, the dearest branch of a cond, a product that fn states twice once; elementwise work is
    not counted. An operator's alive FLOPs are its FLOPs times the alive fraction of its weights; the groups of a ragged
    dot count as equally long.

    graph: from `trace`. alive: boolean masks of leaves, as a tree like params or {path: mask}; None, or no mask for a
        leaf, means that all of it is alive.
    Raises TypeError or ValueError for a mask that is not boolean, or whose path or shape is no leaf's.
    """
    if not isinstance(graph, Graph):
        raise TypeError(
            f"graph is a {type(graph).__name__}; pass what structure.graph.trace(fn, params, batch) returned"
        )
    program = graph.program
    masks = {path: _checked(program, path, mask) for path, mask in _tree.named_leaves(alive)}
    types = {path: program.shapes[var] for path, var in program.leaves.items()}
    cut = {path: mask.size - int(np.count_nonzero(mask)) for path, mask in masks.items()}
    floating = [p for p, t in types.items() if jnp.issubdtype(t.dtype, jnp.inexact)]
    parameters, size = sum(math.prod(types[p].shape) for p in floating), sum(map(_bytes, types.values()))
    return Cost(
        tuple(_row(op, masks, types) for op in graph.operators),
        dict(_by_leaf(graph)),
        parameters,
        parameters - sum(cut.get(p, 0) for p in floating),
        size,
        size - sum(n * types[p].dtype.itemsize for p, n in cut.items()),
        *_activations(program),
    )


def flops(fn: Callable[[Tree, Any], Any], params: Tree, batch: Any) -> dict[str, int]:
    """{path: FLOPs of fn(params, batch) in products with that leaf}, counted as `cost` does.

    "" collects products without a leaf; a product of two leaves is charged to the second, an operand computed from
    several to the largest of them, an operator that reads several to each for the weights that it gives.
    """
    return cost(trace(fn, params, batch)).by_leaf


def product_flops(program: Program, equation: Equation) -> int:
    """2 x multiply-adds of one product of a program, padding taps included."""
    shapes = [program.type_of(a).shape for a in (*equation.inputs[:2], *equation.outputs[:1])]
    return _Count().product(equation.primitive.name, equation.params, shapes)


@dataclass(frozen=True)
class Difference:
    """Our FLOPs beside XLA's, and why they differ: xla = flops - padding - repeats + elementwise.

    padding: FLOPs of convolution taps that fall on padding or on the holes of a dilated image. repeats: those of bodies
    that run several times (scan) and that XLA counts once. elementwise: the remainder, all that XLA counts outside
    products, exponentials not among it. XLA's number is a float32. Products that XLA drops, since nothing reads them,
    or computes otherwise end up in the remainder too: on CPU it multiplies the rows of a ragged dot by every group, and
    reads a float64 convolution with one input channel a group as a dense one.
    """

    flops: int
    padding: int
    repeats: int
    xla: int

    @property
    def elementwise(self) -> int:
        """What is left: XLA's count of everything that is no product."""
        return self.xla - (self.flops - self.padding - self.repeats)

    def __str__(self) -> str:
        numbers = (self.flops, self.padding, self.repeats, self.elementwise, self.xla)
        head = ("", "ours", "- padding taps", "- repeated bodies", "+ elementwise", "= XLA")
        return _table([head, ("FLOPs", *(f"{n:,}" for n in numbers))])


def differences(fn: Callable[[Tree, Any], Any], params: Tree, batch: Any) -> Difference:
    """Our FLOPs of fn(params, batch) beside those of XLA's own cost analysis of the compiled function."""
    chosen, rest = partition(params, is_floating)
    jaxpr = traced(fn, chosen, rest, batch)[0].jaxpr
    data = [_DATA] * len(jaxpr.invars)
    full, once, inside = (
        sum(count.body(jaxpr, data)[0].values()) for count in (_Count(), _Count(steps=False), _Count(False, False))
    )
    # Compiled for this one question, with a function that need not be hashable.
    compiled = jax.jit(lambda c, r, b: fn(combine(c, r), b)).lower(chosen, rest, batch).compile()
    counted = (compiled.cost_analysis() or {}).get("flops", 0.0)
    return Difference(sum(flops(fn, params, batch).values()), once - inside, full - once, round(counted))


def _checked(program: Program, path: str, mask: Any) -> np.ndarray:
    if path not in program.leaves:
        raise ValueError(f"alive: '{path}' is no leaf of params; there are {nearest(path, list(program.leaves))}")
    shape = program.shapes[program.leaves[path]].shape
    mask = np.asarray(mask)
    if mask.dtype != bool:
        raise TypeError(f"alive: the mask of '{path}' is {mask.dtype}; pass booleans, such as a support or leaf != 0")
    if mask.shape != shape:
        raise ValueError(f"alive: the mask of '{path}' has shape {mask.shape}, its leaf {shape}; pass one of its shape")
    return mask


def _row(op: Operator, masks: dict[str, np.ndarray], types: dict[str, Any]) -> Row:
    weights, rows, columns = op.size, op.problems * op.n_in, op.problems * op.n_out
    if any(path in masks for path in op.paths):
        support = np.asarray(op.support({p: masks.get(p, np.ones(types[p].shape, bool)) for p in op.paths}))
        weights, rows, columns = (int(np.count_nonzero(s)) for s in (support, support.any(2), support.any(1)))
    skipped = op.flops * weights // max(op.size, 1)
    return Row(op.name, op.problems, op.n_in, op.n_out, op.flops, skipped, op.size, weights, rows, columns)


def _by_leaf(graph: Graph) -> Counter[str]:
    """FLOPs by leaf: what the operators read goes to their leaves, the rest where its operands come from."""
    program, total, count = graph.program, Counter(), _Count()
    read = {use.equation for op in graph.operators for use in op.uses}
    for op in graph.operators:
        left = op.flops
        for path in op.paths[1:]:
            share = op.flops * int(np.count_nonzero(op.part_of(path))) // max(op.size, 1)
            total[path] += share
            left -= share
        total[op.paths[0]] += left
    owner = {var: _Owner(math.prod(program.shapes[var].shape), path) for path, var in program.leaves.items()}
    owner.update(dict.fromkeys(program.batch, _DATA))
    for index, e in enumerate(program.equations):
        owners = [owner.get(a, _FIXED) if isinstance(a, int) else _FIXED for a in e.inputs]
        types = [program.type_of(a) for a in (*e.inputs[:2], *e.outputs[:1])]
        found, out = count.equation(e, owners, types, len(e.outputs))
        owner.update(zip(e.outputs, out, strict=True))
        if index not in read:
            total.update(found)
    return total


class _Owner(NamedTuple):
    """What an array comes from: the largest leaf, its entries and path; the batch outweighs any leaf."""

    size: float
    path: str


_DATA, _FIXED = _Owner(math.inf, ""), _Owner(0, "")


def _mixed(owners: Sequence[_Owner]) -> _Owner:
    """The owner of what is computed from arrays of these owners; the last of equals."""
    return max(reversed(owners), key=lambda o: o.size, default=_FIXED)


class _Count(NamedTuple):
    """FLOPs of jaxprs by leaf. taps: on padding too; steps: a repeated body as often as it runs, not as XLA sees it."""

    taps: bool = True
    steps: bool = True

    def body(self, body: Any, owners: Sequence[_Owner]) -> tuple[Counter[str], list[_Owner]]:
        """FLOPs by leaf of one run of a jaxpr, and the owners of its outputs."""
        jaxpr, total = plain(body), Counter()
        env = dict(zip(jaxpr.invars, owners, strict=True))
        of = lambda atom: _FIXED if hasattr(atom, "val") else env.get(atom, _FIXED)  # noqa: E731
        for e in jaxpr.eqns:
            types = [v.aval for v in (*e.invars[:2], *e.outvars[:1])]
            found, out = self.equation(e, [of(a) for a in e.invars], types, len(e.outvars))
            env.update(zip(e.outvars, out, strict=True))
            total.update(found)
        return total, [of(atom) for atom in jaxpr.outvars]

    def equation(self, e: Any, owners: list[_Owner], types: list[Any], outputs: int) -> tuple[Counter, list[_Owner]]:
        """The same of one equation, of a jaxpr or a program. types: of two inputs and an output."""
        name, mixed = e.primitive.name, [_mixed(owners)] * outputs
        if name in PRODUCTS:
            work = self.product(name, versions.parameters(e), [t.shape for t in types])
            return Counter({owners[1].path or owners[0].path: work}), mixed
        if name == "while":
            loop = versions.while_loop(e)
            n, m = loop.cond_shared, loop.cond_shared + loop.body_shared
            found, carry = self.loop(loop.body, owners[n:m], owners[m:], [])
            return found + self.body(loop.cond, owners[:n] + carry)[0], carry
        if name == "scan":
            scan = versions.scan(e)
            n, m = scan.shared, scan.shared + scan.carry
            found, out = self.loop(scan.body, owners[:n], owners[n:m], owners[m:])
            return _times(found, self.repeats(e)), out
        if name == "cond":
            branches = [self.body(b, owners[1:]) for b in versions.branches(e)]
            out = [_mixed((owners[0], *each)) for each in zip(*(b[1] for b in branches), strict=True)]
            return max((b[0] for b in branches), key=lambda c: sum(c.values())), out
        total, out = Counter(), mixed
        for inner in [versions.solved(e)] if name == "custom_linear_solve" else bodies(e):
            more = len(plain(inner).invars) - len(owners)  # outputs and scratch of a kernel
            given = [*owners, *[_DATA] * more] if more >= 0 else [_mixed(owners)] * (len(owners) + more)
            found, made = self.body(inner, given)
            total += _times(found, self.repeats(e))
            out = made if name in CALLS else mixed
        return total, out

    def loop(self, body: Any, fixed: list, carry: list, steps: list) -> tuple[Counter[str], list[_Owner]]:
        """One run of a loop's body, once the owners of its carry stay."""
        while True:
            found, out = self.body(body, fixed + carry + steps)
            after = [new if new.size > old.size else old for old, new in zip(carry, out, strict=False)]
            if after == carry:
                return found, carry + out[len(carry) :]
            carry = after

    def repeats(self, e: Any) -> int:
        """How often a body runs, or how often XLA sees it: a scan's as often as JAX writes it out."""
        name = e.primitive.name
        if name == "scan":
            scan = versions.scan(e)
            trips, rest = divmod(scan.length, max(scan.unroll, 1))
            return scan.length if self.steps or not trips else scan.unroll + rest
        if name == "shard_map" and self.steps:
            sharded = versions.shard_map(e)
            return math.prod(sharded.mesh[axis] for axis in sharded.manual)
        if name == "pallas_call" and self.steps:
            return math.prod(versions.grid(e))
        return 1

    def product(self, name: str, p: dict[str, Any], shapes: list[tuple[int, ...]]) -> int:
        """2 x multiply-adds of a product. shapes: of its two operands and its output."""
        left, right, out = shapes
        if name == "conv_general_dilated":
            spec = p["dimension_numbers"]
            windows = (p[k] for k in ("window_strides", "padding", "lhs_dilation", "rhs_dilation"))
            axes = zip(spec.lhs_spec[2:], spec.rhs_spec[2:], spec.out_spec[2:], *windows, strict=True)
            taps = [
                out[c] * right[b] if self.taps else _inside(left[a], right[b], out[c], *window)
                for a, b, c, *window in axes
            ]
            return 2 * out[spec.out_spec[0]] * out[spec.out_spec[1]] * right[spec.rhs_spec[1]] * math.prod(taps)
        ragged = name == "ragged_dot_general"
        numbers = p["ragged_dot_dimension_numbers"].dot_dimension_numbers if ragged else p["dimension_numbers"]
        contracted = numbers[0][0]
        total = 2 * math.prod(out) * math.prod(left[i] for i in contracted)
        if ragged and set(p["ragged_dot_dimension_numbers"].lhs_ragged_dimensions) & set(contracted):
            return total // out[0]  # the groups share the contracted axis
        return total


def _inside(n: int, taps: int, n_out: int, stride: int, padding: Any, holes: int, dilation: int) -> int:
    """How many pairs of output and tap along one axis meet one of the n pixels of the image, no padding and no hole."""
    at = np.arange(n_out)[:, None] * stride - padding[0] + np.arange(taps) * dilation
    return int(np.count_nonzero((at % holes == 0) & (at >= 0) & (at < n * holes)))


def _times(found: Counter[str], n: int) -> Counter[str]:
    return Counter({path: n * work for path, work in found.items()})


def _bytes(aval: Any) -> int:
    return math.prod(aval.shape) * aval.dtype.itemsize


def _activations(program: Program) -> tuple[int, int]:
    """Bytes of the variables that depend on the batch: at the peak, and of the largest."""
    size = {var: _bytes(program.shapes[var]) for var in program.data}
    last = {a: i for i, e in enumerate(program.equations) for a in e.inputs if isinstance(a, int)}
    last.update({a: len(program.equations) for a in program.outputs if isinstance(a, int)})
    peak = sum(size[var] for var in program.batch)
    live = sum(size[var] for var in program.batch if var in last)
    for i, e in enumerate(program.equations):
        live += sum(size.get(var, 0) for var in e.outputs)
        peak = max(peak, live)
        done = {a for a in (*e.inputs, *e.outputs) if isinstance(a, int) and last.get(a, i) == i}
        live -= sum(size.get(var, 0) for var in done)
    return peak, max(size.values(), default=0)


def _table(rows: list[tuple[str, ...]]) -> str:
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = (
        "  ".join(c.rjust(w) if i else c.ljust(w) for i, (c, w) in enumerate(zip(r, widths, strict=True))) for r in rows
    )
    return "\n".join(line.rstrip() for line in lines)
