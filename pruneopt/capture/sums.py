"""Sums over what reaches a product: counts, Grams, means, streamed in blocks, each position with its weight."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from pruneopt import _tree
from pruneopt.program.forms import Form, Ragged

_HIGHEST = jax.lax.Precision.HIGHEST


def sums(form: Form, inputs: Sequence[Any], weights: Any = None, want: tuple[str, ...] = ("gram",)) -> dict[str, Any]:
    """Sums over the positions of one product's inputs: count, and what is wanted of gram, mean, means, activations.

    weights: one for each problem (or one row for all) and position, as `Positions.spread` gives them; None for ones.
    """
    return _sums(form, inputs[0], inputs[1] if len(inputs) > 1 else None, weights, want)


def cross(form: Form, inputs: Sequence[Any], others: Sequence[Any], weights: Any = None) -> Any:
    """X^T Y over the positions, X the rows of `inputs` and Y those of `others`: (problems, n_in, n_in)."""
    return _cross(form, inputs[0], others[0], inputs[1] if len(inputs) > 1 else None, weights)


def against(form: Form, inputs: Sequence[Any], outputs: Any, weights: Any = None) -> Any:
    """X^T Y over the positions, X the rows of `inputs`, Y of an array like the output: (problems, n_in, n_out)."""
    return _against(form, inputs[0], outputs, inputs[1] if len(inputs) > 1 else None, weights)


def summed(form: Form, inputs: Sequence[Any], outputs: Any, weights: Any = None) -> Any:
    """The sum over positions of an array like the output: (problems, n_out)."""
    return _summed(form, inputs[1] if len(inputs) > 1 else None, outputs, weights)


@partial(jax.jit, static_argnames=("form", "want"))
def _sums(form: Form, x: Any, sizes: Any, weights: Any, want: tuple[str, ...]) -> dict[str, Any]:
    x = x.astype(_tree.wide(x.dtype))
    each = _each(form, sizes, weights, x.dtype)
    ones = jnp.ones((form.problems, math.prod(form.positions)), x.dtype)
    out: dict[str, Any] = {"count": jnp.sum(ones if each is None else jnp.broadcast_to(each, ones.shape), axis=1)}
    if "gram" in want:
        out["gram"] = _blocked(form, lambda rows, w: gram(rows, rows, w), each, x)
    if "mean" in want or "means" in want:
        out["mean"] = _blocked(form, partial(_weighted, lambda r: r), each, x)
    if "means" in want:
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
    return _blocked(form, gram, _each(form, sizes, weights, x.dtype), x, y)


@partial(jax.jit, static_argnames=("form",))
def _against(form: Form, x: Any, y: Any, sizes: Any, weights: Any) -> Any:
    x = x.astype(_tree.wide(x.dtype))
    rows, each = form.output_rows(y).astype(x.dtype), _each(form, sizes, weights, x.dtype)
    blocks = form.blocks(x)
    n = blocks.shape[0]
    if n == 1:
        return gram(form.rows(x), rows, each)
    cut = lambda a: None if a is None else jnp.moveaxis(a.reshape(a.shape[0], n, -1, *a.shape[2:]), 1, 0)  # noqa: E731
    parts = (blocks, cut(rows), cut(each))
    of = lambda part: gram(form.rows(part[0]), part[1], part[2])  # noqa: E731
    first = jax.eval_shape(of, jax.tree.map(lambda a: a[0], parts))
    return jax.lax.scan(lambda total, part: (total + of(part), None), jnp.zeros(first.shape, first.dtype), parts)[0]


@partial(jax.jit, static_argnames=("form",))
def _summed(form: Form, sizes: Any, outputs: Any, weights: Any) -> Any:
    rows = form.output_rows(outputs.astype(_tree.wide(outputs.dtype)))
    each = _each(form, sizes, weights, rows.dtype)
    return _weighted(lambda r: r, rows, each if each is None else jnp.broadcast_to(each, rows.shape[:2]))


def _each(form: Form, sizes: Any, weights: Any, dtype: Any) -> Any:
    """One weight for each problem (or for all) and position; None for ones."""
    each = None if weights is None else weights.astype(dtype)
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


def gram(left: Any, right: Any, each: Any) -> Any:
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
