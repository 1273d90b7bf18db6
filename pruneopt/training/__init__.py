"""In the user's optax loop: optimisers that train sparse weights."""

from pruneopt.training.base import MaskedState, SparseOptimizer
from pruneopt.training.freeze import freeze
from pruneopt.training.gradual import gradual
from pruneopt.training.metric import adam_metric, rms_metric
from pruneopt.training.proximal import ProximalState, proximal
from pruneopt.training.schedule import Interval

__all__ = [
    "Interval",
    "MaskedState",
    "ProximalState",
    "SparseOptimizer",
    "adam_metric",
    "freeze",
    "gradual",
    "proximal",
    "rms_metric",
]
