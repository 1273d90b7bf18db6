"""The canonical form of a product: y = x W for one matrix W (n_in, n_out), or several side by side."""

from __future__ import annotations

import abc
import math
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Shaped

# What multiplies a matrix of parameters: the primitives that have a form.
PRODUCTS = frozenset({"dot_general", "conv_general_dilated", "ragged_dot_general"})

_BLOCK = 2**20  # entries of a block of convolution patches: what a core's cache holds


class Form(abc.ABC):
    """How an operator's arrays become `problems` matrices (n_in, n_out), their input rows and their output rows."""

    problems: int
    n_in: int
    n_out: int

    @abc.abstractmethod
    def to_matrix(self, operand: Shaped[Array, "..."]) -> Shaped[Array, "problems n_in n_out"]:
        """The weights; linear, so that its transpose is the way back."""

    @abc.abstractmethod
    def rows(self, x: Shaped[Array, "..."]) -> Shaped[Array, "problems positions n_in"]:
        """The inputs that meet the weights, one row a position. One problem's rows may stand for all (axis 1)."""

    @property
    @abc.abstractmethod
    def output_axes(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """The axes of the output that are problems, and those that are positions, in the order of `rows`."""

    def output_rows(self, y: Shaped[Array, "..."]) -> Shaped[Array, "problems positions n_out"]:
        """The outputs, in the order of `rows`."""
        first = (*self.output_axes[0], *self.output_axes[1])
        y = jnp.transpose(y, (*first, *(k for k in range(y.ndim) if k not in first)))
        return y.reshape(self.problems, math.prod(self.positions), self.n_out)

    @property
    @abc.abstractmethod
    def positions(self) -> tuple[int, ...]:
        """Shape of the positions (examples, tokens, pixels) of one problem."""

    def units(self, x: Shaped[Array, "..."]) -> Shaped[Array, "problems positions units"]:
        """The incoming activations, one column a unit: a neuron, or a channel of a convolution, without padding."""
        return self.rows(x)

    def blocks(self, x: Shaped[Array, "..."]) -> Shaped[Array, "blocks ..."]:
        """`x` cut along its first positions, so that `rows` of one block stays small; one block where rows are x."""
        return x[None]

    @property
    def weight_key(self) -> Any:
        """Equal for forms that arrange the weights alike."""
        return (type(self), self.problems, self.n_in, self.n_out)

    @property
    def row_key(self) -> Any:
        """Equal for forms that make the same rows of the same input, whatever the weights."""
        return self

    @property
    def flops(self) -> int:
        """2 x multiply-adds, padding taps included."""
        return 2 * self.problems * math.prod(self.positions) * self.n_in * self.n_out

    @property
    def arrangement(self) -> str:
        """What the axes mean, in words."""
        return f"{self.problems} problems" if self.problems > 1 else ""


@dataclass(frozen=True)
class Dot(Form):
    """dot_general. Axes of the input x and of the weights w; `batch` pairs are separate problems, `repeated` pairs
    run over positions, since the weights are the same along them.
    """

    x_shape: tuple[int, ...]
    w_shape: tuple[int, ...]
    contract: tuple[tuple[int, int], ...]
    batch: tuple[tuple[int, int], ...]
    repeated: tuple[tuple[int, int], ...]
    x_first: bool
    all_batch: tuple[tuple[int, int], ...]

    @property
    def _x_free(self) -> tuple[int, ...]:
        used = {a for a, _ in self.contract + self.batch + self.repeated}
        return tuple(a for a in range(len(self.x_shape)) if a not in used)

    @property
    def _w_free(self) -> tuple[int, ...]:
        used = {b for _, b in self.contract + self.batch + self.repeated}
        return tuple(b for b in range(len(self.w_shape)) if b not in used)

    @property
    def problems(self) -> int:  # pyright: ignore[reportIncompatibleVariableOverride]
        """Product of the batch axes."""
        return math.prod(self.w_shape[b] for _, b in self.batch)

    @property
    def n_in(self) -> int:  # pyright: ignore[reportIncompatibleVariableOverride]
        """Product of the contracted axes."""
        return math.prod(self.w_shape[b] for _, b in self.contract)

    @property
    def n_out(self) -> int:  # pyright: ignore[reportIncompatibleVariableOverride]
        """Product of the weights' other axes."""
        return math.prod(self.w_shape[b] for b in self._w_free)

    @property
    def positions(self) -> tuple[int, ...]:
        """The input's other axes, those along which the weights repeat first."""
        return tuple(self.x_shape[a] for a in (*(a for a, _ in self.repeated), *self._x_free))

    @property
    def weight_key(self) -> Any:
        """The weights' axes."""
        pick = lambda pairs: tuple(b for _, b in pairs)  # noqa: E731
        return (Dot, self.w_shape, pick(self.contract), pick(self.batch), pick(self.repeated))

    @property
    def row_key(self) -> Any:
        """The input's axes."""
        pick = lambda pairs: tuple(a for a, _ in pairs)  # noqa: E731
        return (Dot, self.x_shape, pick(self.contract), pick(self.batch), pick(self.repeated))

    def to_matrix(self, operand: Shaped[Array, "..."]) -> Shaped[Array, "problems n_in n_out"]:
        """Batch, contracted, other axes, each group flattened."""
        order = (*(b for _, b in self.repeated), *(b for _, b in self.batch), *(b for _, b in self.contract))
        w = jnp.transpose(operand, (*order, *self._w_free))[(0,) * len(self.repeated)]
        return w.reshape(self.problems, self.n_in, self.n_out)

    def rows(self, x: Shaped[Array, "..."]) -> Shaped[Array, "problems positions n_in"]:
        """Batch, position, contracted axes, each group flattened."""
        order = (*(a for a, _ in self.batch), *(a for a, _ in self.repeated), *self._x_free)
        x = jnp.transpose(x, (*order, *(a for a, _ in self.contract)))
        return x.reshape(self.problems, math.prod(self.positions), self.n_in)

    @property
    def output_axes(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """dot_general puts batch axes first, then the left operand's others, then the right one's."""
        start, place = len(self.all_batch) + (0 if self.x_first else len(self._w_free)), self.all_batch.index
        free = range(start, start + len(self._x_free))
        return tuple(map(place, self.batch)), (*map(place, self.repeated), *free)

    @property
    def arrangement(self) -> str:
        """Batch and contracted axes."""
        said = []
        if self.batch:
            said.append(f"{self.problems} problems along axis {', '.join(str(b) for _, b in self.batch)}")
        if len(self.contract) > 1:
            said.append(f"{len(self.contract)} contracted axes")
        if self.repeated:
            said.append("weights repeated over a batch axis")
        return ", ".join(said)


@dataclass(frozen=True)
class Conv(Form):
    """conv_general_dilated with the weights as kernel: one problem a feature group.

    n_in runs over the window first and the input channels of the group last, as in a flattened HWIO kernel.
    """

    x_shape: tuple[int, ...]
    w_shape: tuple[int, ...]
    x_spec: tuple[int, ...]
    w_spec: tuple[int, ...]
    y_spec: tuple[int, ...]
    y_shape: tuple[int, ...]
    strides: tuple[int, ...]
    padding: tuple[tuple[int, int], ...]
    x_dilation: tuple[int, ...]
    w_dilation: tuple[int, ...]
    groups: int

    @property
    def window(self) -> tuple[int, ...]:
        """Spatial shape of the kernel."""
        return tuple(self.w_shape[a] for a in self.w_spec[2:])

    @property
    def problems(self) -> int:  # pyright: ignore[reportIncompatibleVariableOverride]
        """Feature groups."""
        return self.groups

    @property
    def n_in(self) -> int:  # pyright: ignore[reportIncompatibleVariableOverride]
        """Window taps x input channels of a group."""
        return math.prod(self.window) * self.w_shape[self.w_spec[1]]

    @property
    def n_out(self) -> int:  # pyright: ignore[reportIncompatibleVariableOverride]
        """Output channels of a group."""
        return self.w_shape[self.w_spec[0]] // self.groups

    @property
    def positions(self) -> tuple[int, ...]:
        """Examples and output pixels."""
        return tuple(self.y_shape[a] for a in (self.y_spec[0], *self.y_spec[2:]))

    @property
    def weight_key(self) -> Any:
        """The kernel's layout."""
        return (Conv, self.w_shape, self.w_spec, self.groups)

    @property
    def row_key(self) -> Any:
        """Everything but the number of outputs."""
        shape, spec = self.x_shape, self.x_spec
        dilations = (self.x_dilation, self.w_dilation)
        return (Conv, shape, spec, self.window, self.positions[1:], self.strides, self.padding, dilations, self.groups)

    def to_matrix(self, operand: Shaped[Array, "..."]) -> Shaped[Array, "problems n_in n_out"]:
        """(*window, in, groups, out)."""
        w = jnp.transpose(operand, (*self.w_spec[2:], self.w_spec[1], self.w_spec[0]))
        w = w.reshape(self.n_in, self.groups, self.n_out)
        return jnp.moveaxis(w, 1, 0)

    def _images(self, x: Shaped[Array, "..."]) -> Shaped[Array, "n *pixels groups channels"]:
        x = jnp.transpose(x, (self.x_spec[0], *self.x_spec[2:], self.x_spec[1]))
        return x.reshape(*x.shape[:-1], self.groups, -1)

    def blocks(self, x: Shaped[Array, "..."]) -> Shaped[Array, "blocks ..."]:
        """Groups of whole images."""
        x = jnp.moveaxis(x, self.x_spec[0], 0)
        n, a_row = x.shape[0], math.prod(self.positions[1:]) * self.n_in * self.groups
        size = next(d for d in range(max(1, min(n, _BLOCK // a_row)), 0, -1) if n % d == 0)
        return jnp.moveaxis(x.reshape(n // size, size, *x.shape[1:]), 1, self.x_spec[0] + 1)

    def rows(self, x: Shaped[Array, "..."]) -> Shaped[Array, "problems positions n_in"]:
        """Shifted slices side by side; faster on CPU than XLA's own patches."""
        x = self._images(x)
        edges = [(lo, hi, d - 1) for (lo, hi), d in zip(self.padding, self.x_dilation, strict=True)]
        x = jax.lax.pad(x, jnp.zeros((), x.dtype), [(0, 0, 0), *edges, (0, 0, 0), (0, 0, 0)])
        pixels = self.positions[1:]
        taps = []
        for tap in np.ndindex(*self.window):
            start = [t * d for t, d in zip(tap, self.w_dilation, strict=True)]
            stop = [s + (p - 1) * k + 1 for s, p, k in zip(start, pixels, self.strides, strict=True)]
            taps.append(
                jax.lax.slice(x, (0, *start, 0, 0), (x.shape[0], *stop, *x.shape[-2:]), (1, *self.strides, 1, 1))
            )
        stacked = jnp.stack(taps, axis=-2)  # (n, *pixels, groups, taps, channels)
        stacked = jnp.moveaxis(stacked, -3, 0)
        return stacked.reshape(self.groups, -1, self.n_in)

    def units(self, x: Shaped[Array, "..."]) -> Shaped[Array, "problems positions units"]:
        """Channels."""
        x = self._images(x)
        return jnp.moveaxis(x, -2, 0).reshape(self.groups, -1, x.shape[-1])

    @property
    def output_axes(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Examples and pixels; groups share an axis with channels."""
        return (), (self.y_spec[0], *self.y_spec[2:])

    def output_rows(self, y: Shaped[Array, "..."]) -> Shaped[Array, "problems positions n_out"]:
        """Pixels by channels, group by group."""
        y = jnp.transpose(y, (self.y_spec[0], *self.y_spec[2:], self.y_spec[1]))
        return jnp.moveaxis(y.reshape(-1, self.groups, self.n_out), 1, 0)

    @property
    def arrangement(self) -> str:
        """Window, stride, dilation, groups."""
        said = ["x".join(map(str, self.window))]
        if set(self.strides) != {1}:
            said.append(f"stride {'x'.join(map(str, self.strides))}")
        if set(self.w_dilation) != {1}:
            said.append(f"dilation {'x'.join(map(str, self.w_dilation))}")
        if set(self.x_dilation) != {1}:
            said.append(f"transposed {'x'.join(map(str, self.x_dilation))}")
        if self.groups > 1:
            said.append(f"{self.groups} groups" + (", depthwise" if self.w_shape[self.w_spec[1]] == 1 else ""))
        return ", ".join(said)


@dataclass(frozen=True)
class Ragged(Form):
    """ragged_dot_general: rows sorted by group, one problem a group (a mixture's expert)."""

    x_shape: tuple[int, ...]
    w_shape: tuple[int, ...]
    x_axes: tuple[int, int]  # position, contracted
    w_axes: tuple[int, int, int]  # group, contracted, other

    @property
    def problems(self) -> int:  # pyright: ignore[reportIncompatibleVariableOverride]
        """Groups."""
        return self.w_shape[self.w_axes[0]]

    @property
    def n_in(self) -> int:  # pyright: ignore[reportIncompatibleVariableOverride]
        """The contracted axis."""
        return self.w_shape[self.w_axes[1]]

    @property
    def n_out(self) -> int:  # pyright: ignore[reportIncompatibleVariableOverride]
        """The other axis."""
        return self.w_shape[self.w_axes[2]]

    @property
    def positions(self) -> tuple[int, ...]:
        """All rows; each belongs to one group."""
        return (self.x_shape[self.x_axes[0]],)

    @property
    def weight_key(self) -> Any:
        """The weights' axes."""
        return (Ragged, self.w_shape, self.w_axes)

    @property
    def row_key(self) -> Any:
        """The input's axes."""
        return (Ragged, self.x_shape, self.x_axes, self.problems)

    @property
    def flops(self) -> int:
        """Each row meets one group."""
        return 2 * self.positions[0] * self.n_in * self.n_out

    def to_matrix(self, operand: Shaped[Array, "..."]) -> Shaped[Array, "problems n_in n_out"]:
        """(group, contracted, other)."""
        return jnp.transpose(operand, self.w_axes)

    def rows(self, x: Shaped[Array, "..."]) -> Shaped[Array, "problems positions n_in"]:
        """All rows, once; `belongs` says to which group each goes."""
        return jnp.transpose(x, self.x_axes)[None]

    @property
    def output_axes(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Rows, each of one group."""
        return (), (0,)

    def output_rows(self, y: Shaped[Array, "..."]) -> Shaped[Array, "problems positions n_out"]:
        """The output has the rows' order."""
        return y[None]

    def belongs(self, sizes: Shaped[Array, " problems"]) -> Float[Array, "problems positions"]:
        """1 where a row is the group's; rows past the last group belong to none."""
        at = jnp.searchsorted(jnp.cumsum(sizes), jnp.arange(self.positions[0], dtype=sizes.dtype), side="right")
        return at[None] == jnp.arange(self.problems, dtype=at.dtype)[:, None]
