"""In the user's optax loop: optimisers that train sparse weights."""

from pruneopt.training.admm import ADMMState, admm
from pruneopt.training.base import MaskedState, SparseOptimizer
from pruneopt.training.drop_and_grow import rigl, sparse_evolution
from pruneopt.training.freeze import freeze
from pruneopt.training.gates import GatedState, l0
from pruneopt.training.gradual import gradual
from pruneopt.training.hard_threshold import hard_threshold
from pruneopt.training.lagrangian import lagrangian
from pruneopt.training.metric import adam_metric, rms_metric
from pruneopt.training.proximal import ProximalState, proximal
from pruneopt.training.schedule import Interval
from pruneopt.training.straight_through import DenseState, straight_through

__all__ = [
    "ADMMState",
    "DenseState",
    "GatedState",
    "Interval",
    "MaskedState",
    "ProximalState",
    "SparseOptimizer",
    "adam_metric",
    "admm",
    "freeze",
    "gradual",
    "hard_threshold",
    "l0",
    "lagrangian",
    "proximal",
    "rigl",
    "rms_metric",
    "sparse_evolution",
    "straight_through",
]
