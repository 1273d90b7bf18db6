"""What a penalty is: what pruning discourages without forbidding it."""

from __future__ import annotations

import abc
from typing import Any

Tree = Any


class Penalty(abc.ABC):
    """A function P(w) >= 0 with a computable proximal map. Subclasses are final frozen dataclasses."""

    @abc.abstractmethod
    def value(self, w: Tree) -> float:
        """P(w)."""

    @abc.abstractmethod
    def prox(self, w: Tree, step: float) -> Tree:
        """argmin over v of P(v) + ||v - w||^2 / (2 step)."""

    @abc.abstractmethod
    def weight_max(self, gradient: Tree) -> float:
        """The smallest weight of the penalty at which zero is optimal, for this gradient of the loss at zero."""
