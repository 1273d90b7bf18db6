"""What the network is: its leaves, how it is evaluated, what it costs."""

from pruneopt.structure.leaves import combine, is_prunable, is_trainable, partition

__all__ = ["combine", "is_prunable", "is_trainable", "partition"]
