"""Batches: any re-iterable of pytrees whose arrays share a leading axis of examples."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from pruneopt import _tree
from pruneopt.network.readable import readable

Batch = Any
Source = Any  # an iterable of batches, what has __getitem__ and __len__, a callable that returns one, or Batches
_STATE = "pass pruneopt.Batches(batches, count=lambda batch: number of examples), or close fn over what examples share"


def each(batch: Batch, where: str) -> tuple[Batch, int]:
    """A batch with an entry an example in every leaf, NumPy arrays and random keys as they are; the examples.

    Raises ValueError, naming `where` and the leaves, for an array that its examples share.
    """
    shapes = {path: np.shape(leaf) for path, leaf in _tree.named_leaves(batch)}
    n = _shared(shapes)
    if n is None or () in shapes.values():
        raise ValueError(
            f"{where}: the first axes of its leaves differ ({_listed(shapes)}), and this method takes the examples one "
            "by one; give each leaf an entry an example, or close fn over what they share"
        )
    is_key = lambda leaf: isinstance(leaf, jax.Array) and not _tree.is_array(leaf)  # noqa: E731
    return jax.tree.map(lambda leaf: leaf if is_key(leaf) else np.asarray(leaf), batch), n


def explained(batch: Batch) -> str:
    """Which leaf of a batch may be why a result is not finite, in words; "" where all are finite."""
    path = _tree.first_nonfinite(batch)
    if path is None:
        return ""
    what = f"leaf '{path}'" if path else "array"
    return f" (its {what} holds a NaN or an infinity)"


class Batches:
    """The user's batches, and how many examples each counts for in a mean.

    source: a re-iterable (a list, a data loader), an object with `__getitem__` and `__len__`, or a zero-argument
        callable that returns a new iterator. name: the argument that errors speak of.
    count: batch -> what its mean is taken over, a number > 0. None: the length of the first axis where all arrays of a
        batch agree on it and batches differ in nothing else (or a leaf has that axis alone); batches of equal shapes
        weigh the same whatever it is; everything else is refused.

    Tensors of other libraries come as NumPy arrays; text and objects as `Unread`, which fn must not read. The first
    pass checks that all batches have one structure, later ones that none is missing.

    Raises TypeError for a one-shot iterator, an array or None; ValueError for an empty source, a batch of another
    structure, a pass that ends before the first one did, a count that is no number > 0.
    """

    def __init__(
        self,
        source: Source | Batches | None,
        name: str = "batches",
        *,
        count: Callable[[Batch], float] | None = None,
    ):
        self._known: int | None = None  # batches of a whole pass
        self._checked, self._structure, self._first = 0, None, {}
        self._name, self._count = name, count
        self._last: Any = None
        self._begun: tuple[Batch, Iterator[Batch]] | None = None
        self._source: Any = source
        if count is not None and not callable(count):
            raise TypeError(f"count is {count!r}; pass a function, batch -> number of examples")
        if isinstance(source, Batches):
            self._known, self._source, self._first = source._known, source._source, source._first
            self._checked, self._structure = source._checked, source._structure
            self._name, self._count = source._name if name == "batches" else name, count or source._count
            self._begun, source._begun = source._begun, None
            return
        if source is None:
            raise TypeError(f"{name} is None, but this method reads data; pass a list of batches")
        if isinstance(source, Iterator):
            raise TypeError(
                f"{name} is a one-shot iterator ({type(source).__name__}), which a second pass would find empty; "
                f"pass a list, or a function that returns a new iterator: {name}=lambda: iter(...)"
            )
        single = isinstance(source, (jax.Array, np.ndarray, dict, str)) or hasattr(source, "__array__")
        if single or not (callable(source) or _stream(source) is not None):
            raise TypeError(
                f"{name} is one {type(source).__name__}, not a sequence of batches; pass [batch] for a single one"
            )

    @property
    def first(self) -> Batch:
        """The first batch. The next pass goes on from there and does not read it again."""
        if self._begun is None:
            rest = self._pass()
            self._begun = next(rest), rest
        return self._begun[0]

    def __iter__(self) -> Iterator[Batch]:
        if self._begun is not None:
            (first, rest), self._begun = self._begun, None
            yield first
            yield from rest
        else:
            yield from self._pass()

    def _pass(self) -> Iterator[Batch]:
        given: Any = self._source() if callable(self._source) else self._source
        stream = _stream(given)
        if stream is None:
            raise TypeError(f"{self._name}() returned {type(given).__name__}; return a new iterator over batches")
        if isinstance(given, Iterator) and given is self._last:
            raise TypeError(f"{self._name}() returned the same one-shot iterator twice; return a new one each time")
        self._last = given if isinstance(given, Iterator) else None
        seen = 0
        for batch in map(readable, stream):
            if self._known is None and seen >= self._checked:
                self._check(batch, seen)
            seen += 1
            yield batch
        if seen == 0 and self._known is None:
            raise ValueError(f"{self._name} is empty; pass at least one batch")
        if seen < (self._known or 0):
            raise ValueError(
                f"{self._name} ended after {seen} of {self._known} batches on a later pass; pass a list, or a function "
                "that returns a new full iterator each time"
            )
        self._known = seen

    def _check(self, batch: Batch, index: int) -> None:
        structure = jax.tree.structure(batch)
        if self._structure is None:
            self._structure, self._first = structure, _shapes(batch)
        if structure != self._structure:
            raise ValueError(
                f"{self._name}: batch {index} has structure {structure}, batch 0 has {self._structure}; "
                "give all batches the same structure"
            )
        self._checked = index + 1

    @property
    def name(self) -> str:
        """The argument that errors speak of."""
        return self._name

    def examples(self, batch: Batch) -> float:
        """What the mean of a batch is taken over. Raises ValueError where arrays do not agree and none is stated."""
        if self._count is not None:
            return self._stated(batch)
        shapes = _shapes(batch)
        n = _shared(shapes)
        if n is None:
            raise ValueError(
                f"{self._name}: the first axes of a batch's leaves differ ({_listed(shapes)}), so that its number of "
                f"examples is a guess; {_STATE}"
            )
        return float(n)

    def weight(self, batch: Batch) -> float:
        """What a batch counts for in a mean over all: its examples, or 1 where all batches have the same shapes.

        Raises ValueError where batches differ and their examples are neither stated nor plain.
        """
        shapes = _shapes(batch)
        first = self._first or shapes
        if self._count is None and shapes == first and _shared(shapes) is None:
            return 1.0
        n = self.examples(batch)
        if self._count is None and shapes != first:
            others = {p: (first[p], s) for p, s in shapes.items() if p in first and first[p][1:] != s[1:]}
            if _shared(first) is None or (others and not any(len(s) == 1 for s in shapes.values())):
                told = others or {p: (first[p], s) for p, s in shapes.items() if first[p] != s}
                said = ", ".join(f"'{p}' {a} and {b}" for p, (a, b) in list(told.items())[:8])
                raise ValueError(
                    f"{self._name}: batches differ in more than one number of examples ({said}), so that what their "
                    f"means count is a guess; {_STATE}"
                )
        return n

    def _stated(self, batch: Batch) -> float:
        assert self._count is not None
        try:
            n = float(self._count(batch))
        except (TypeError, ValueError) as error:
            raise TypeError(f"count returns no number for a batch ({error}); return its number of examples") from error
        if not 0 < n < math.inf:
            raise ValueError(f"count returns {n} for a batch; return its number of examples, a number > 0")
        return n

    def mean(self, fn: Callable[[Batch], Any]) -> Any:
        """Mean over examples of `fn(batch)`, itself a mean over the examples of a batch; a tree of arrays."""
        total, n = None, 0.0
        for batch in self:
            size = self.weight(batch)
            total = _scaled(fn(batch), size) if total is None else _added(total, fn(batch), size)
            n += size
        return _scaled(total, 1.0 / n)

    def finite_mean(
        self, fn: Callable[[Batch], Any], what: str, check: Callable[[Batch, str], None] = lambda batch, where: None
    ) -> Any:
        """`mean`, or ValueError for a NaN or an infinity, naming `what`, the batch and the leaf, by another pass.

        check: raises first where that batch, as it is called, has something worse to say.
        """
        mean = self.mean(fn)
        path = _tree.first_nonfinite(mean)
        if path is None:
            return mean
        for index, batch in enumerate(self):
            found = _tree.first_nonfinite(fn(batch))
            if found is not None:
                check(batch, f"{self._name}: batch {index}")
                raise ValueError(
                    f"{self._name}: batch {index}: {what} holds a NaN or an infinity in leaf '{found}'"
                    f"{explained(batch)}; repair that batch, or the loss there"
                )
        raise ValueError(f"{what} holds a NaN or an infinity in leaf '{path}', summed over {self._name}; scale fn down")


def _stream(source: Any) -> Iterable[Batch] | None:
    """What to iterate over: what is iterable, or the entries of what has `__getitem__` and `__len__`."""
    if isinstance(source, Iterable):
        return source
    if hasattr(source, "__getitem__") and hasattr(source, "__len__"):
        return (source[i] for i in range(len(source)))
    return None


def shared_length(batch: Batch) -> int | None:
    """The length of the first axis that all arrays of a batch agree on, or None."""
    return _shared(_shapes(batch))


def _shapes(batch: Batch) -> dict[str, tuple[int, ...]]:
    """Of the arrays with axes. Raises ValueError for one without examples."""
    shapes = {path: tuple(np.shape(leaf)) for path, leaf in _tree.named_leaves(batch)}
    shapes = {path: shape for path, shape in shapes.items() if shape}
    if shapes and all(shape[0] == 0 for shape in shapes.values()):
        raise ValueError("batches holds a batch of 0 examples; drop it")
    return shapes


def _shared(shapes: dict[str, tuple[int, ...]]) -> int | None:
    lengths = {shape[0] for shape in shapes.values() if shape}
    return lengths.pop() if len(lengths) == 1 else None


def _listed(shapes: dict[str, tuple[int, ...]]) -> str:
    return ", ".join(f"'{path}' {shape}" for path, shape in list(shapes.items())[:8])


@jax.jit
def _scaled(tree: Any, factor: float) -> Any:
    return jax.tree.map(lambda x: _tree.widened(x) * jnp.asarray(factor, _tree.wide(x.dtype)), tree)


@jax.jit
def _added(total: Any, tree: Any, factor: float) -> Any:
    return jax.tree.map(lambda t, x: t + _tree.widened(x) * jnp.asarray(factor, t.dtype), total, tree)
