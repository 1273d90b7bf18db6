"""What the user hands in, as one noun: a function, its parameters, which of them are decided, and data."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from pruneopt.network import calls
from pruneopt.network.batches import Batches, Source
from pruneopt.network.leaves import Choice, Default, Rest, check_finite, combine, partition

Tree = Any


@dataclass(frozen=True, eq=False)
class Network:
    """fn(params, batch), params, and the batches to call it on, checked once.

    fn: outputs or a loss; None where nothing is called. leaves: the choice of what is decided. chosen: `params` with
    None at every other leaf; rest: the others. source: None where no data is read.
    """

    fn: Callable[[Tree, Any], Any] | None
    params: Tree
    leaves: Choice
    source: Batches | None
    chosen: Tree
    rest: Rest

    @classmethod
    def of(cls, fn: Any, params: Tree, batches: Source | Batches | None, leaves: Choice = None) -> Network:
        """Raises what `partition` and `Batches` raise, and ValueError for a chosen leaf that is not finite."""
        chosen, rest = partition(params, leaves)
        check_finite(chosen, "params")
        source = None if batches is None else Batches(batches)
        return cls(fn, params, leaves, source, chosen, rest)

    def check_loss(self) -> None:
        """Raise TypeError or ValueError unless fn gives a scalar, and its derivative sees every chosen leaf."""
        calls.check_scalar(*self.parts)
        calls.check_seen(*self.parts)

    @property
    def batches(self) -> Batches:
        """The data. Raises TypeError where there are none."""
        return Batches(None) if self.source is None else self.source

    @property
    def given(self) -> tuple[Any, Tree, Batches, Choice]:
        """(fn, params, batches, leaves), as public calls take them."""
        return self.fn, self.params, self.batches, self.leaves

    @property
    def left_out(self) -> dict[str, str]:
        """{path: why} of the leaves that look prunable and are not chosen by default."""
        return dict(self.leaves.left_out) if isinstance(self.leaves, Default) else {}

    @property
    def parts(self) -> tuple[Any, Tree, Rest, Batches]:
        """(fn, chosen, rest, batches), as `calls` take them."""
        return self.fn, self.chosen, self.rest, self.batches

    def at(self, params: Tree) -> Network:
        """The same network at other parameters."""
        return Network.of(self.fn, params, self.source, self.leaves)

    def put(self, chosen: Tree) -> Tree:
        """`params` with other values of what is decided."""
        return combine(chosen, self.rest)
