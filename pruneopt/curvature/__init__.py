"""How the loss bends: the H of quadratic models."""

from pruneopt.curvature.base import Curvature
from pruneopt.curvature.diagonal import Diagonal, Identity
from pruneopt.curvature.fisher import empirical_fisher, empirical_fisher_diagonal
from pruneopt.curvature.gram import Gram
from pruneopt.curvature.hessian import hessian_vector_product, hutchinson_diagonal
from pruneopt.curvature.low_rank import LowRank

__all__ = [
    "Curvature",
    "Diagonal",
    "Gram",
    "Identity",
    "LowRank",
    "empirical_fisher",
    "empirical_fisher_diagonal",
    "hessian_vector_product",
    "hutchinson_diagonal",
]
