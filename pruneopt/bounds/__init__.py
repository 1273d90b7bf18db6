"""What proves a solution: evidence that gives a lower bound by itself, and how far a support is from its neighbours."""

from pruneopt.bounds.base import Evidence
from pruneopt.bounds.convexity import StrongConvexity
from pruneopt.bounds.duality import Duality, dual_value
from pruneopt.bounds.exchange import largest_gain
from pruneopt.bounds.separable import Separable

__all__ = ["Duality", "Evidence", "Separable", "StrongConvexity", "dual_value", "largest_gain"]
