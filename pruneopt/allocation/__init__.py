"""How much of a budget each group gets: one level each, with proof, or by measuring; and the curve over budgets."""

from pruneopt.allocation.allocate import Allocation, Change, Infeasible, allocate
from pruneopt.allocation.evolve import Evolved, evolve
from pruneopt.allocation.frontier import Frontier, frontier
from pruneopt.allocation.meet import Met, meet
from pruneopt.allocation.tables import Tables

__all__ = [
    "Allocation",
    "Change",
    "Evolved",
    "Frontier",
    "Infeasible",
    "Met",
    "Tables",
    "allocate",
    "evolve",
    "frontier",
    "meet",
]
