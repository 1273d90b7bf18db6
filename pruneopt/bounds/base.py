"""What evidence is: plain arrays that prove a lower bound."""

from __future__ import annotations

import abc
from typing import Any

from pruneopt.problem import Problem

Tree = Any


class Evidence(abc.ABC):
    """Why no feasible point can be better than so much.

    Subclasses are final frozen dataclasses of plain arrays, one file a kind. Whoever made the evidence is not trusted:
    `bound` checks every premise of its proof anew, from the problem, and is -inf where one fails.
    """

    @abc.abstractmethod
    def bound(self, problem: Problem, value: Tree, support: Tree) -> float:
        """A lower bound on the objective of every feasible point of `problem`, in float64; -inf where none is proven.

        It holds whatever `value` and `support` are; the better they are, the tighter it may be.
        """
