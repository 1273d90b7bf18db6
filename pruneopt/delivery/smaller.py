"""A function with entries of its params cut, and the check that it computes what the masked one does."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from pruneopt import _tree
from pruneopt.network.readable import readable
from pruneopt.program.flatten import flatten
from pruneopt.program.program import Outputs
from pruneopt.program.rewrite import Rewritten
from pruneopt.structure.dead import Lost
from pruneopt.structure.reading import leaves_of
from pruneopt.structure.units import Units

Tree = Any
TOLERANCE = 1e-5  # of the largest output, in float32
_PROGRAMS = 64  # signatures of batches whose programs are kept


class Smaller:
    """fn with entries of params cut: the program of each signature of its batches, rewritten once."""

    def __init__(self, fn: Callable[[Tree, Any], Any], params: Tree, lost: Lost):
        self._fn, self._lost = fn, lost
        self._known: dict[Any, tuple[Units, Rewritten, Outputs]] = {}
        self._dense = jax.tree.map(_abstract, params)

    def __call__(self, params: Tree, batch: Any) -> Any:
        """What fn returns, of the smaller params."""
        batch = readable(batch)
        _, program, outputs = self._program(batch)
        return outputs.tree(program(_arrays(params), jax.tree.leaves(batch)))

    def kept(self, batch: Any, outputs: Sequence[Any]) -> list[Any]:
        """The outputs of the dense function, those that renew leaves of params cut as the leaves are."""
        _, program, _ = self._program(readable(batch))
        return [program.left.sliced(x, ids) for x, ids in zip(outputs, program.reader.ends, strict=True)]

    def parts(self, masked: Tree, params: Tree, batch: Any) -> Iterator[tuple[str, float]]:
        """(equation in words, by how much the two programs differ there, over its largest entry), in order."""
        batch = readable(batch)
        units, program, _ = self._program(batch)
        arrays, small, dense = jax.tree.leaves(batch), {}, {}
        program(_arrays(params), arrays, lambda e, results: small.update(zip(e.outputs, results, strict=True)))
        whole = units.rewritten({})
        whole(_arrays(masked), arrays, lambda e, results: dense.update(zip(e.outputs, results, strict=True)))
        source = program.reader.program
        for equation in source.equations:
            for atom in small.keys() & dense.keys() & set(equation.outputs):
                expected = program.left.sliced(dense[atom], program.reader.of(atom))
                if np.shape(expected) == np.shape(small[atom]):
                    shape = " x ".join(map(str, source.shapes[atom].shape))
                    read = f" which reads {_tree.listed(leaves_of(source, atom)[-4:])}"
                    yield f"{equation.primitive.name} ({shape}),{read}", difference([expected], [small[atom]])

    def _program(self, batch: Any) -> tuple[Units, Rewritten, Outputs]:
        leaves, structure = jax.tree.flatten(batch)
        key = structure, tuple((np.shape(x), str(jax.typeof(x).dtype)) for x in leaves)
        if key not in self._known:
            with jax.ensure_compile_time_eval():  # loop counters are numbers, also where the caller traces
                units = Units(flatten(self._fn, self._dense, batch, unroll=False))
            while len(self._known) >= _PROGRAMS:
                self._known.pop(next(iter(self._known)))
            self._known[key] = units, units.rewritten(units.gone(self._lost)), units.reader.program.returned
        return self._known[key]


class Check(NamedTuple):
    """error: the largest difference over the largest output; of functions that return whole numbers alone, of what
    those are made of. flipped: whole numbers and booleans that differ.
    """

    error: float
    flipped: int


def checked(fn: Callable[[Tree, Any], Any], masked: Tree, smaller: Smaller, params: Tree, batch: Any) -> Check:
    """What the smaller network's outputs and the masked one's differ by, computed in float32 at least.

    Raises ValueError where that is too much, with the operator where they part.
    """
    masked, params, batch = (jax.tree.map(_widened, tree) for tree in (masked, params, batch))
    before = smaller.kept(batch, compiled(fn, masked, batch))
    after = compiled(smaller, params, batch)
    error, flipped = difference(before, after), _flipped(before, after)
    if not any(jnp.issubdtype(x.dtype, jnp.inexact) for x in before):
        error = max((apart for _, apart in smaller.parts(masked, params, batch)), default=0.0)
    if not error <= TOLERANCE:
        raise ValueError(
            f"the smaller network differs from the masked one by {error:.2g} of the largest output, more than "
            f"{TOLERANCE:g}{_where(smaller, masked, params, batch)}; please report this network"
        )
    return Check(error, flipped)


def compiled(fn: Callable[[Tree, Any], Any], params: Tree, batch: Any) -> list[Any]:
    """The arrays that fn returns, in one compiled call."""
    leaves, structure = jax.tree.flatten(params)
    arrays = {i: leaf for i, leaf in enumerate(leaves) if hasattr(leaf, "dtype")}

    def run(arrays: dict[int, Any], batch: Any) -> list[Any]:
        return _leaves(fn(structure.unflatten([arrays.get(i, leaf) for i, leaf in enumerate(leaves)]), batch))

    return jax.jit(run)(arrays, batch)


def difference(before: Sequence[Any], after: Sequence[Any]) -> float:
    """The largest |after - before| over the largest |before|, of arrays of numbers."""
    pairs = [
        (np.asarray(a, np.float64), np.asarray(b, np.float64))
        for a, b in zip(before, after, strict=True)
        if jnp.issubdtype(a.dtype, jnp.inexact)
    ]
    largest = max((float(np.max(np.abs(a), initial=0.0, where=np.isfinite(a))) for a, _ in pairs), default=0.0)
    apart = max(
        (float(np.max(np.abs(np.subtract(a, b, where=a != b, out=np.zeros_like(a))), initial=0.0)) for a, b in pairs),
        default=0.0,
    )
    return apart / largest if largest else apart


def _where(smaller: Smaller, masked: Tree, params: Tree, batch: Any) -> str:
    """The operator at which two programs part, in words."""
    found = smaller.parts(masked, params, batch)
    return next((f"; they part at {words}" for words, apart in found if not apart <= TOLERANCE), "")


def _flipped(before: Sequence[Any], after: Sequence[Any]) -> int:
    pairs = [(a, b) for a, b in zip(before, after, strict=True) if not jnp.issubdtype(a.dtype, jnp.inexact)]
    return sum(int(np.sum(np.asarray(a) != np.asarray(b))) for a, b in pairs if _tree.is_array(a))


def _leaves(outputs: Any) -> list[Any]:
    return [x for x in jax.tree.leaves(outputs) if hasattr(x, "dtype")]


def _arrays(params: Tree) -> Mapping[str, Any]:
    return {path: leaf for path, leaf in _tree.named_leaves(params) if hasattr(leaf, "dtype")}


def _widened(leaf: Any) -> Any:
    """Floating arrays in float32 at least, so that rounding hides no difference."""
    if _tree.is_array(leaf) and jnp.issubdtype(leaf.dtype, jnp.floating):
        return jnp.asarray(leaf).astype(_tree.wide(leaf.dtype))
    return leaf


def _abstract(leaf: Any) -> Any:
    """An array of the same type without memory of its own; whole numbers and keys as they are."""
    if _tree.is_array(leaf) and jnp.issubdtype(leaf.dtype, jnp.floating):
        return np.broadcast_to(np.zeros((), leaf.dtype), leaf.shape)
    return leaf
