"""What a curvature is: the matrix H of a quadratic model, never formed unless asked for."""

from __future__ import annotations

import abc
from typing import Any

Tree = Any


class Curvature(abc.ABC):
    """A symmetric positive semidefinite operator H on trees, the curvature of a mean loss.

    Its class states its structure, so a solver asks by type. Subclasses are final frozen dataclasses, registered
    as pytrees whose leaves are their arrays.
    """

    @abc.abstractmethod
    def mv(self, direction: Tree) -> Tree:
        """H d, in the shapes of `direction`."""

    @abc.abstractmethod
    def diagonal(self, like: Tree) -> Tree:
        """The diagonal of H: for each leaf of `like` an array that broadcasts to its shape."""

    @abc.abstractmethod
    def form(self, w: Tree, center: Tree, ridge: float) -> float:
        """<d, (H + ridge I) d> for d = w - center, in float64 whatever JAX's mode."""
