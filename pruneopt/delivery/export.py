"""A network as one file that a process with JAX alone runs: the compiled program's text with the weights in it."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jax
import jax.export
import jax.numpy as jnp
import numpy as np

from pruneopt import _store, _tree
from pruneopt.delivery.smaller import difference
from pruneopt.network.batches import shared_length
from pruneopt.solution import Pruned

Tree = Any

_END = b"PRUNEOPT"  # after the program and its checksum: what reads the program looks no further than its end
_MOST = 2**31 - 2**24  # bytes of weights: the format counts in 32 bits with a sign
_TOLERANCE = {1: 2e-1, 2: 2e-2, 4: 1e-5, 8: 1e-9}  # of the largest output, by the bytes of its dtype


@dataclass(frozen=True, eq=False)
class Exported:
    """An exported network: `exported(batch)` runs it, also under `jit`.

    any_size: whether it takes batches of any number of examples; else those of the example's size alone. why: why not,
        in words; empty where it does, or where the file was loaded. platforms: what it runs on. nbytes: of the file.
    """

    any_size: bool
    platforms: tuple[str, ...]
    nbytes: int
    why: str = ""
    _call: Callable[[Any], Any] = field(repr=False, default=lambda batch: batch)

    def __call__(self, batch: Any) -> Any:
        """The network's outputs."""
        return self._call(batch)


@_tree.on_host
def export(
    fn: Callable[[Tree, Any], Any],
    params: Tree | Pruned,
    batch: Any,
    file: str | os.PathLike[str],
    *,
    any_size: bool = True,
    platforms: Sequence[str] | None = None,
) -> Exported:
    """Write fn(params, .) to `file`, weights and all, for processes that have JAX and flatbuffers and nothing else:

        jax.jit(jax.export.deserialize(open(file, "rb").read()).call)(batch)

    Of a SmallerNetwork pass its `fn` and `params`. The program takes batches of any number of examples, the first axis
    of all arrays of `batch`: by a symbolic size where fn can be traced with one, else by mapping fn over single
    examples, if that gives on `batch` what fn gives. Where neither holds it takes the size of `batch` alone, and the
    result says why.

    batch: one batch, of arrays and numbers in dicts, lists and tuples; two examples or more tell whether fn mixes them.
    any_size: False for the size of `batch` alone. platforms: "cpu", "cuda", "rocm", "tpu"; by default this one.
    The file ends in a checksum, which `load_export` checks. Its program is code: run files of those you trust.

    Raises TypeError for a batch that holds anything else; ValueError for weights that are not finite or above 2 GiB,
        a function that cannot be exported, trees of classes that other processes do not know; ImportError without
        flatbuffers; OSError where the file cannot be written.
    """
    params = params.params if isinstance(params, Pruned) else params
    _check(params, batch)
    params = jax.tree.map(_alone, params)
    program, why = _traced(fn, params, batch, any_size, tuple(platforms) if platforms is not None else None)
    try:
        data = bytes(program.serialize())
    except ImportError as error:
        raise ImportError(_NEEDS) from error
    except ValueError as error:
        raise ValueError(
            "batch and fn's outputs must be arrays in dicts, lists and tuples, which other processes know: "
            f"{_said(error)}"
        ) from error
    _store.write(file, [data, hashlib.sha256(data).digest(), _END])
    return _exported(program, len(data), why)


def load_export(file: str | os.PathLike[str]) -> Exported:
    """What `export` wrote to `file`, once its checksum was found right.

    Raises ValueError for a damaged file, one that `export` did not write, or one that this JAX cannot read;
    FileNotFoundError where there is none, ImportError without flatbuffers.
    """
    content = Path(file).read_bytes()
    data, checksum, end = content[: -32 - len(_END)], content[-32 - len(_END) : -len(_END)], content[-len(_END) :]
    if end != _END:
        raise ValueError(
            f"file '{file}' was not written by pruneopt.export, or its end is missing; jax.export.deserialize reads "
            "programs of others"
        )
    if hashlib.sha256(data).digest() != checksum:
        raise ValueError(f"file '{file}' is damaged: its checksum does not match; export it again")
    try:
        program = jax.export.deserialize(bytearray(data))
    except ImportError as error:
        raise ImportError(_NEEDS) from error
    except Exception as error:  # whatever a reader of bytes stumbles over
        raise ValueError(
            f"file '{file}' cannot be read by JAX {jax.__version__}: {_said(error)}; export it with this JAX"
        ) from error
    return _exported(program, len(data))


_NEEDS = "exported programs need flatbuffers; install pruneopt[export]"


def _exported(program: Any, size: int, why: str = "") -> Exported:
    symbolic = any(not isinstance(n, int) for aval in program.in_avals for n in aval.shape)
    return Exported(symbolic, tuple(program.platforms), size + 32 + len(_END), why, jax.jit(program.call))


def _check(params: Tree, batch: Any) -> None:
    for path, leaf in _tree.named_leaves(batch):
        if not (isinstance(leaf, (jax.Array, np.generic, bool, int, float, complex)) or _tree.is_array(leaf)):
            raise TypeError(
                f"batch: '{path}' is a {type(leaf).__name__}; an exported program takes arrays and numbers alone"
            )
    if (path := _tree.first_nonfinite(params)) is not None:
        raise ValueError(f"params: '{path}' holds a NaN or an infinity; repair it before you export it")
    size = sum(leaf.nbytes for leaf in jax.tree.leaves(params) if _tree.is_array(leaf))
    if size > _MOST:
        raise ValueError(f"params holds {size:,} bytes, and a program at most {_MOST:,}; pass them on by save_weights")


def _alone(leaf: Any) -> Any:
    """A leaf on one device."""
    if isinstance(leaf, jax.Array) and _tree.is_array(leaf) and len(leaf.devices()) > 1:
        return jnp.asarray(np.asarray(leaf))
    return leaf


def _traced(
    fn: Callable[[Tree, Any], Any], params: Tree, batch: Any, any_size: bool, platforms: tuple[str, ...] | None
) -> tuple[Any, str]:
    """(the program, why it takes one size alone)."""

    def made(function: Callable[[Any], Any], size: Any = None) -> Any:
        specs = jax.tree.map(lambda x: _spec(x, size), batch)
        return jax.export.export(jax.jit(function), platforms=platforms)(specs)

    def whole(batch: Any) -> Any:
        return fn(params, batch)

    why = [] if any_size else ["it was not asked for"]
    if any_size and shared_length(batch) is None:
        why = ["the arrays of the batch have no first axis of one length, along which their examples would lie"]
    if not why:
        (size,) = jax.export.symbolic_shape("examples")
        one_by_one = _one_by_one(whole, batch)
        for how, function in (("traced with a symbolic size", whole), ("example by example", one_by_one)):
            try:
                if function is one_by_one:
                    _agree(whole, one_by_one, batch)
                return made(function, size), ""
            except Exception as error:  # a user's function may raise anything at other sizes
                why.append(f"{how}: {_said(error)}")
    try:
        return made(whole), "; ".join(why)
    except Exception as error:
        raise ValueError(f"fn cannot be exported: {_said(error)}") from error


def _spec(leaf: Any, size: Any) -> Any:
    """Shape and dtype of a leaf of the batch, with `size` examples where one is given."""
    array = leaf if isinstance(leaf, jax.Array) else jnp.asarray(leaf)
    first = array.shape[:1] if size is None else (size,) * min(array.ndim, 1)
    return jax.ShapeDtypeStruct((*first, *array.shape[1:]), array.dtype)


def _one_by_one(fn: Callable[[Any], Any], batch: Any) -> Callable[[Any], Any]:
    """fn of a batch as fn of its examples, one batch each."""
    axes = jax.tree.map(lambda leaf: 0 if np.ndim(leaf) else None, batch)

    def one(example: Any) -> Any:
        outputs = fn(jax.tree.map(lambda leaf, axis: leaf if axis is None else leaf[None], example, axes))
        for path, leaf in _tree.named_leaves(outputs):
            if np.shape(leaf)[:1] != (1,):
                raise ValueError(f"{f'its output {path!r}' if path else 'its output'} has no axis of examples")
        return jax.tree.map(lambda leaf: leaf[0], outputs)

    return jax.vmap(one, in_axes=(axes,))


def _agree(whole: Callable[[Any], Any], one_by_one: Callable[[Any], Any], batch: Any) -> None:
    """Raise ValueError where fn of a batch is not fn of its examples."""
    if shared_length(batch) == 1:  # or fn could mix examples unseen: a second one of the same numbers in another order
        batch = jax.tree.map(lambda x: jnp.concatenate([x, jnp.roll(x, 1)]) if np.ndim(x) else x, batch)
    before, after = jax.jit(whole)(batch), jax.jit(one_by_one)(batch)
    for (path, a), b in zip(_tree.named_leaves(before), jax.tree.leaves(after), strict=True):
        what = f"output '{path}'" if path else "output"
        if a.shape != b.shape:
            raise ValueError(f"its {what} is {a.shape} of a batch and {b.shape} of its examples")
        if not jnp.issubdtype(a.dtype, jnp.inexact):
            continue  # a number that rounding tips over is no sign of mixed examples
        tolerance = _TOLERANCE[a.dtype.itemsize // (2 if jnp.iscomplexobj(a) else 1)]
        if not (apart := difference([a], [b])) <= tolerance:
            raise ValueError(f"its {what} differs by {apart:.2g} of the largest: fn mixes examples")


def _said(error: Exception) -> str:
    """The first line of a message, which is all that a sentence has room for."""
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
