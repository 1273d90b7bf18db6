"""What is discouraged."""

from pruneopt.penalties.base import Penalty
from pruneopt.penalties.l1 import L1

__all__ = ["L1", "Penalty"]
