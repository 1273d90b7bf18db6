"""What is discouraged."""

from pruneopt.penalties.base import Penalty
from pruneopt.penalties.group import GroupLasso, SparseGroupLasso
from pruneopt.penalties.l1 import L1, ElasticNet
from pruneopt.penalties.nonconvex import L0, MCP, SCAD, LHalf, LogSum
from pruneopt.penalties.ordered import OWL
from pruneopt.penalties.partition import Partition

__all__ = [
    "L0",
    "L1",
    "MCP",
    "OWL",
    "SCAD",
    "ElasticNet",
    "GroupLasso",
    "LHalf",
    "LogSum",
    "Partition",
    "Penalty",
    "SparseGroupLasso",
]
