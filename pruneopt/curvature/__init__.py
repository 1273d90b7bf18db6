"""How the loss bends: the H of quadratic models."""

from pruneopt.curvature.base import Curvature
from pruneopt.curvature.block_diagonal import BlockDiagonal
from pruneopt.curvature.diagonal import Diagonal, Identity
from pruneopt.curvature.fisher import empirical_fisher, empirical_fisher_diagonal
from pruneopt.curvature.gauss_newton import GaussNewton
from pruneopt.curvature.gram import Gram
from pruneopt.curvature.hessian import Hessian, hessian_vector_product, hutchinson_diagonal
from pruneopt.curvature.kronecker import Kronecker
from pruneopt.curvature.low_rank import LowRank
from pruneopt.curvature.low_rank_plus_diagonal import LowRankPlusDiagonal
from pruneopt.curvature.shrunk import Shrunk
from pruneopt.curvature.true_fisher import sampled_fisher, sampled_fisher_diagonal, softmax_fisher

__all__ = [
    "BlockDiagonal",
    "Curvature",
    "Diagonal",
    "GaussNewton",
    "Gram",
    "Hessian",
    "Identity",
    "Kronecker",
    "LowRank",
    "LowRankPlusDiagonal",
    "Shrunk",
    "empirical_fisher",
    "empirical_fisher_diagonal",
    "hessian_vector_product",
    "hutchinson_diagonal",
    "sampled_fisher",
    "sampled_fisher_diagonal",
    "softmax_fisher",
]
