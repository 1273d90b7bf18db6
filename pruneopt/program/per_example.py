"""Losses whose gradients are cheap one example at a time: a kernel's gradient is its activations times its deltas."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from pruneopt import _tree
from pruneopt.network.calls import Loss
from pruneopt.program.flatten import flatten
from pruneopt.program.forms import Conv
from pruneopt.program.keys import Literal
from pruneopt.program.primitives import form_of
from pruneopt.program.program import Equation, Program

Tree = Any


@dataclass(frozen=True)
class Separable:
    """The same loss, to be differentiated on one example under `jax.vmap` over examples. Equal for equal losses.

    JAX's own gradient of a convolution in its kernel, one for each example of a batch, is a convolution with a feature
    group an example, which is slow. Here it is X^T D, X the patches of the example's input and D the gradient in its
    output. All else, biases, scales and loops included, is JAX's derivative, and so is the whole of a loss that cannot
    be read as a straight line or that has a derivative of its own around a product.

    Source: Goodfellow 2015, "Efficient per-example gradient computations".
    """

    loss: Loss

    def __call__(self, params: Tree, batch: Any) -> Any:
        """The loss, read anew whenever JAX traces it."""
        try:
            with jax.ensure_compile_time_eval():  # reads loop counters while JAX traces
                program = flatten(self.loss, params, batch, keep_derivatives=True)
        except ValueError:
            return self.loss(params, batch)
        kernels = {i: form for i, e in enumerate(program.equations) if (form := _kernel(program, e)) is not None}
        if program.lost or not kernels:
            return self.loss(params, batch)
        leaves = dict(_tree.named_leaves(params))
        env: dict[Any, Any] = {v: leaves[p] for p, v in program.leaves.items()} | program.constants
        env.update(zip(program.batch, jax.tree.leaves(batch), strict=True))
        read = lambda atom: atom.value if isinstance(atom, Literal) else env[atom]  # noqa: E731
        for index, equation in enumerate(program.equations):
            inputs = [read(atom) for atom in equation.inputs]
            form = kernels.get(index)
            out = equation.run(inputs) if form is None else [_convolution(equation, form)(*inputs)]
            env.update(zip(equation.outputs, out, strict=True))
        return read(program.outputs[0])


def _kernel(program: Program, equation: Equation) -> Conv | None:
    """The form of a convolution of data with a kernel of parameters."""
    if equation.primitive.name != "conv_general_dilated":
        return None
    image, kernel = equation.inputs
    if not (program.is_data(image) and program.is_parametric(kernel)):
        return None
    shapes = [tuple(program.type_of(a).shape) for a in (image, kernel, equation.outputs[0])]
    form = form_of(equation, shapes, 1, frozenset())
    return form if isinstance(form, Conv) else None


def _convolution(equation: Equation, form: Conv) -> Callable[[Any, Any], Any]:
    """The convolution with the derivative in its kernel as a product."""

    @jax.custom_vjp
    def convolved(image: Any, kernel: Any) -> Any:
        return equation.run([image, kernel])[0]

    def forward(image: Any, kernel: Any) -> tuple[Any, Any]:
        return convolved(image, kernel), (image, kernel)

    def backward(saved: tuple[Any, Any], delta: Any) -> tuple[Any, Any]:
        image, kernel = saved
        (back,) = jax.linear_transpose(lambda x: equation.run([x, kernel])[0], image)(delta)
        (gradient,) = jax.linear_transpose(form.to_matrix, kernel)(_product(form)(image, delta).astype(kernel.dtype))
        return back, gradient

    convolved.defvjp(forward, backward)
    return convolved


def _product(form: Conv) -> Callable[[Any, Any], Any]:
    """X^T D for each feature group; over a batch one example after another on a CPU: its patches stay in cache."""

    def product(image: Any, delta: Any) -> Any:
        rows, deltas = form.rows(image), form.output_rows(delta)
        found = jnp.einsum("gpo,gpi->goi", deltas, rows, precision=jax.lax.Precision.HIGHEST)
        return jnp.swapaxes(found, 1, 2)

    in_turn = jax.custom_batching.sequential_vmap(product)
    each = jax.custom_batching.custom_vmap(product)

    @each.def_vmap
    def over_examples(size: int, batched: list[bool], image: Any, delta: Any) -> tuple[Any, bool]:
        axes = tuple(0 if b else None for b in batched)
        found = jax.lax.platform_dependent(
            image, delta, cpu=jax.vmap(in_turn, axes, axis_size=size), default=jax.vmap(product, axes, axis_size=size)
        )
        return found, True

    return each
