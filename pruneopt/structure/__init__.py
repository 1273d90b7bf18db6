"""What the network is: its operators and their inputs, the axes that belong together, its leaves, what it costs."""

from pruneopt.capture.statistics import Statistics, capture
from pruneopt.network.leaves import combine, is_prunable, is_trainable, partition
from pruneopt.network.network import Network
from pruneopt.structure.cost import Cost, cost, differences
from pruneopt.structure.defaults import default_leaves
from pruneopt.structure.graph import Graph, trace
from pruneopt.structure.latency import Block, Latency, latency
from pruneopt.structure.layout import Layout, layout
from pruneopt.structure.operators import Operator
from pruneopt.structure.reach import Reach, reach
from pruneopt.structure.units import Group, Units
from pruneopt.structure.unstack import Unstacked, unstack

__all__ = [
    "Block",
    "Cost",
    "Graph",
    "Group",
    "Latency",
    "Layout",
    "Network",
    "Operator",
    "Reach",
    "Statistics",
    "Units",
    "Unstacked",
    "capture",
    "combine",
    "cost",
    "default_leaves",
    "differences",
    "is_prunable",
    "is_trainable",
    "latency",
    "layout",
    "partition",
    "reach",
    "trace",
    "unstack",
]
