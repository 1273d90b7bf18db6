"""What is allowed: sets of supports."""

from pruneopt.constraints.ball import GroupBall, L1Ball
from pruneopt.constraints.base import Constraint
from pruneopt.constraints.block import Blocks, Slices, Units
from pruneopt.constraints.by_path import ByPath
from pruneopt.constraints.cardinality import Cardinality
from pruneopt.constraints.coupled import Coupled, coupled
from pruneopt.constraints.intersection import Intersection
from pruneopt.constraints.laid import Laid, laid
from pruneopt.constraints.nm import NM
from pruneopt.constraints.shares import arithmetic, by_size, erdos_renyi
from pruneopt.constraints.support import Support
from pruneopt.constraints.transposable import TransposableNM

__all__ = [
    "NM",
    "Blocks",
    "ByPath",
    "Cardinality",
    "Constraint",
    "Coupled",
    "GroupBall",
    "Intersection",
    "L1Ball",
    "Laid",
    "Slices",
    "Support",
    "TransposableNM",
    "Units",
    "arithmetic",
    "by_size",
    "coupled",
    "erdos_renyi",
    "laid",
]
