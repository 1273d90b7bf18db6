"""A function with entries of its params cut, and the check that it computes what the masked one does."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Bool

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


class State(NamedTuple):
    """Arrays of the batch that a call renews, such as a cache of keys and values.

    renewed: {path of an array or subtree of the batch: path of the output that is its value in the next call}. lost:
    {path: for each axis, the entries that are cut}, of the arrays of the batch.
    """

    renewed: Mapping[str, str] = MappingProxyType({})
    lost: Lost = MappingProxyType({})  # pyright: ignore[reportAssignmentType]

    def numbers(self, batch: Any, outputs: Outputs) -> dict[int, int]:
        """{array of the batch: output}. Raises ValueError for paths that are not there, or of other trees."""
        paths, found = [path for path, _ in _tree.named_leaves(batch)], {}
        for old, new in self.renewed.items():
            mine = [i for i, path in enumerate(paths) if path == old or path.startswith(f"{old}/")]
            names = [new + paths[i][len(old) :] for i in mine]
            if not mine or not set(names) <= set(outputs.paths):
                raise ValueError(
                    f"state: '{old}' -> '{new}' names no arrays of the batch with outputs of the same names; the batch "
                    f"has {_tree.listed(paths)}, fn returns {_tree.listed(outputs.paths)}"
                )
            found.update((i, outputs.paths.index(name)) for i, name in zip(mine, names, strict=True))
        return found

    def text(self) -> dict[str, Any]:
        """In plain numbers and words."""
        lost = {path: [np.flatnonzero(one).tolist() for one in every] for path, every in self.lost.items()}
        lengths = {path: [len(one) for one in every] for path, every in self.lost.items()}
        return {"renewed": dict(self.renewed), "lost": lost, "lengths": lengths}

    @classmethod
    def of_text(cls, text: Mapping[str, Any]) -> State:
        """What `text` said. Raises ValueError, KeyError, TypeError or IndexError for anything else."""
        lost = {}
        for path, every in text["lost"].items():
            flags = tuple(np.zeros(int(n), bool) for n in text["lengths"][path])
            for one, at in zip(flags, every, strict=True):
                one[np.asarray(at, int)] = True
            lost[str(path)] = flags
        return cls({str(old): str(new) for old, new in text["renewed"].items()}, lost)

    def dense(self, batch: Any) -> Any:
        """A batch whose arrays have all entries again, zeros where some were cut."""
        return _tree.map_named(self._filled, batch) if self.lost else batch

    def cut(self, batch: Any) -> Any:
        """A batch whose arrays have lost these entries."""
        return _tree.map_named(lambda path, x: sliced(x, self.lost[path]) if path in self.lost else x, batch)

    def _filled(self, path: str, leaf: Any) -> Any:
        lost = self.lost.get(path)
        if lost is None or np.shape(leaf) == tuple(map(len, lost)):
            return leaf
        shape = [n if not one.any() else len(one) for n, one in zip(np.shape(leaf), lost, strict=True)]
        return np.broadcast_to(np.zeros((), leaf.dtype), shape)


class Smaller:
    """fn with entries of params cut: the program of each signature of its batches, rewritten once."""

    def __init__(self, fn: Callable[[Tree, Any], Any], params: Tree, lost: Lost, state: State = State()):  # noqa: B008
        self._fn, self._lost, self._state = fn, lost, state
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

    def parts(self, masked: Tree, params: Tree, whole: Any, batch: Any) -> Iterator[tuple[str, float]]:
        """(equation in words, by how much the two programs differ there, over its largest entry), in order."""
        batch = readable(batch)
        units, program, _ = self._program(batch)
        arrays, small, dense = jax.tree.leaves(batch), {}, {}
        program(_arrays(params), arrays, lambda e, results: small.update(zip(e.outputs, results, strict=True)))
        before = jax.tree.leaves(readable(whole))
        units.rewritten({})(
            _arrays(masked), before, lambda e, results: dense.update(zip(e.outputs, results, strict=True))
        )
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
                program = flatten(self._fn, self._dense, self._state.dense(batch), unroll=False)
                units = Units(program, self._state.numbers(batch, program.returned))
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


def checked(
    fn: Callable[[Tree, Any], Any],
    masked: Tree,
    smaller: Smaller,
    params: Tree,
    batch: Any,
    state: State = State(),  # noqa: B008
) -> Check:
    """What the smaller network's outputs and the masked one's differ by, computed in float32 at least.

    Raises ValueError where that is too much, with the operator where they part.
    """
    masked, params, whole = (jax.tree.map(_widened, tree) for tree in (masked, params, batch))
    whole = _tree.map_named(lambda path, x: zeroed(x, state.lost[path]) if path in state.lost else x, whole)
    batch = state.cut(whole)
    before = smaller.kept(batch, compiled(fn, masked, whole))
    after = compiled(smaller, params, batch)
    error, flipped = difference(before, after), _flipped(before, after)
    if not any(jnp.issubdtype(x.dtype, jnp.inexact) for x in before):
        error = max((apart for _, apart in smaller.parts(masked, params, whole, batch)), default=0.0)
    if not error <= TOLERANCE:
        raise ValueError(
            f"the smaller network differs from the masked one by {error:.2g} of the largest output, more than "
            f"{TOLERANCE:g}{_where(smaller, masked, params, whole, batch)}; please report this network"
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
    """The largest |after - before| over the largest finite |before|, of arrays of real or complex numbers.

    Equal infinities and NaNs at the same places do not differ; a NaN at one alone makes the result a NaN.
    """
    largest, apart = 0.0, 0.0
    for a, b in zip(before, after, strict=True):
        if jnp.issubdtype(a.dtype, jnp.inexact):
            wide = np.complex128 if jnp.iscomplexobj(a) else np.float64
            a, b = np.asarray(a, wide), np.asarray(b, wide)
            differs = (a != b) & ~(np.isnan(a) & np.isnan(b))
            each = np.abs(np.subtract(a, b, where=differs, out=np.zeros_like(a)))
            apart = float(np.maximum(apart, np.max(each, initial=0.0)))
            largest = max(largest, float(np.max(np.abs(a), initial=0.0, where=np.isfinite(a))))
    return apart / largest if largest else apart


def _where(smaller: Smaller, masked: Tree, params: Tree, whole: Any, batch: Any) -> str:
    """The operator at which two programs part, in words."""
    found = smaller.parts(masked, params, whole, batch)
    return next((f"; they part at {words}" for words, apart in found if not apart <= TOLERANCE), "")


def _flipped(before: Sequence[Any], after: Sequence[Any]) -> int:
    pairs = [(a, b) for a, b in zip(before, after, strict=True) if not jnp.issubdtype(a.dtype, jnp.inexact)]
    return sum(int(np.sum(np.asarray(a) != np.asarray(b))) for a, b in pairs if _tree.is_array(a))


def sliced(leaf: Any, lost: Sequence[Bool[np.ndarray, " n"]]) -> Any:
    """An array without these entries of its axes."""
    for k, one in enumerate(lost):
        leaf = leaf if not one.any() else leaf.take(np.flatnonzero(~one), axis=k)
    return leaf


def zeroed(leaf: Any, lost: Sequence[Bool[np.ndarray, " n"]]) -> Any:
    """An array with zeros at these entries of its axes."""
    for k, one in enumerate(lost):
        place = [1] * np.ndim(leaf)
        place[k] = -1
        where = np.where if isinstance(leaf, np.ndarray) else jnp.where
        leaf = where(one.reshape(place), np.zeros((), leaf.dtype), leaf) if one.any() else leaf
    return leaf


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
