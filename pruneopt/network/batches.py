"""Batches: any re-iterable of pytrees whose arrays share a leading axis of examples."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from pruneopt import _tree

Batch = Any
Source = Iterable[Batch] | Callable[[], Iterable[Batch]]


def examples(batch: Batch) -> int:
    """Number of examples in a batch: the length of the first axis of its first array."""
    for leaf in jax.tree.leaves(batch):
        if _tree.is_array(leaf) and leaf.ndim:
            if leaf.shape[0] == 0:
                raise ValueError("batches holds a batch of 0 examples; drop it")
            return leaf.shape[0]
    raise ValueError("batches holds a batch without an array; each batch needs arrays whose first axis is examples")


def each(batch: Batch, n: int, where: str) -> Batch:
    """A batch with an entry an example in every leaf: NumPy arrays, and random keys as they are.

    Raises ValueError, naming `where` and the leaves, for an array that its n examples share.
    """
    shapes = {path: np.shape(leaf) for path, leaf in _tree.named_leaves(batch)}
    if any(shape[:1] != (n,) for shape in shapes.values()):
        listed = ", ".join(f"'{path}' {shape}" for path, shape in list(shapes.items())[:8])
        raise ValueError(
            f"{where}: the first axes of its leaves differ ({listed}), and this method takes the examples one by one; "
            "give each leaf an entry an example, or close fn over what they share"
        )
    is_key = lambda leaf: isinstance(leaf, jax.Array) and not _tree.is_array(leaf)  # noqa: E731
    return jax.tree.map(lambda leaf: leaf if is_key(leaf) else np.asarray(leaf), batch)


class Batches:
    """Checked access to the user's batches.

    `source` is a re-iterable (a list, a data loader) or a zero-argument callable that returns a new iterator.
    The first pass over each batch checks that it has the structure of the others and finite floats; later passes that
    none is missing.

    Raises: TypeError for a one-shot iterator, an array or None; ValueError for an empty source, a batch of
    another structure, a NaN or an infinity (naming the batch), a pass that ends before the first one did. They speak of
    the argument `name`.
    """

    def __init__(self, source: Source | Batches | None, name: str = "batches"):
        self._known: int | None = None  # batches of a whole pass
        self._checked, self._structure = 0, None
        self._name = name
        self._last: Any = None
        self._source: Any = source
        if isinstance(source, Batches):
            self._known, self._source, self._name = source._known, source._source, source._name
            self._checked, self._structure = source._checked, source._structure
            return
        if source is None:
            raise TypeError(f"{name} is None, but this method reads data; pass a list of batches")
        if isinstance(source, Iterator):
            raise TypeError(
                f"{name} is a one-shot iterator ({type(source).__name__}), which a second pass would find empty; "
                f"pass a list, or a function that returns a new iterator: {name}=lambda: iter(...)"
            )
        if isinstance(source, (jax.Array, np.ndarray, dict, str)) or not (
            callable(source) or isinstance(source, Iterable)
        ):
            raise TypeError(
                f"{name} is one {type(source).__name__}, not a sequence of batches; pass [batch] for a single one"
            )

    def __iter__(self) -> Iterator[Batch]:
        stream: Any = self._source() if callable(self._source) else self._source
        if not isinstance(stream, Iterable):
            raise TypeError(f"{self._name}() returned {type(stream).__name__}; return a new iterator over batches")
        if isinstance(stream, Iterator) and stream is self._last:
            raise TypeError(f"{self._name}() returned the same one-shot iterator twice; return a new one each time")
        self._last = stream if isinstance(stream, Iterator) else None
        seen = 0
        for batch in stream:
            if self._known is None and seen >= self._checked:
                self._structure = self._structure or jax.tree.structure(batch)
                _check(batch, seen, self._structure, self._name)
                self._checked = seen + 1
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

    @property
    def name(self) -> str:
        """The argument that errors speak of."""
        return self._name

    def mean(self, fn: Callable[[Batch], Any]) -> Any:
        """Mean over examples of `fn(batch)`, itself a mean over the examples of a batch; a tree of arrays."""
        total, n = None, 0
        for batch in self:
            size = examples(batch)
            total = _scaled(fn(batch), float(size)) if total is None else _added(total, fn(batch), float(size))
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
                    f"{self._name}: batch {index}: {what} holds a NaN or an infinity in leaf '{found}'; repair that "
                    "batch, or the loss there"
                )
        raise ValueError(f"{what} holds a NaN or an infinity in leaf '{path}', summed over {self._name}; scale fn down")


def _check(batch: Batch, index: int, structure: Any, name: str) -> None:
    if jax.tree.structure(batch) != structure:
        raise ValueError(
            f"{name}: batch {index} has structure {jax.tree.structure(batch)}, batch 0 has {structure}; "
            "give all batches the same structure"
        )
    path = _tree.first_nonfinite(batch)
    if path is not None:
        where = f" (leaf '{path}')" if path else ""
        raise ValueError(f"{name}: batch {index}{where} holds a NaN or an infinity; remove or repair it")


@jax.jit
def _scaled(tree: Any, factor: float) -> Any:
    return jax.tree.map(lambda x: _tree.widened(x) * jnp.asarray(factor, _tree.wide(x.dtype)), tree)


@jax.jit
def _added(total: Any, tree: Any, factor: float) -> Any:
    return jax.tree.map(lambda t, x: t + _tree.widened(x) * jnp.asarray(factor, t.dtype), total, tree)
