"""How problems are solved."""

from pruneopt.solvers.base import Solver, Then
from pruneopt.solvers.descent import Descent
from pruneopt.solvers.polish import Polish
from pruneopt.solvers.score import Score

__all__ = ["Descent", "Polish", "Score", "Solver", "Then"]
