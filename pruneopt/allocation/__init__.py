"""How much of a budget each group gets: one level each, with proof."""

from pruneopt.allocation.allocate import Allocation, Change, Infeasible, allocate
from pruneopt.allocation.tables import Tables

__all__ = ["Allocation", "Change", "Infeasible", "Tables", "allocate"]
