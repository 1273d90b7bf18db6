"""What the network is: its leaves, how it is evaluated, what it costs."""

from pruneopt.structure.cost import Cost, cost, differences
from pruneopt.structure.leaves import combine, is_prunable, is_trainable, partition

__all__ = ["Cost", "combine", "cost", "differences", "is_prunable", "is_trainable", "partition"]
