"""More than one solve: whole networks, schedules, sensitivity, recalibration."""

from pruneopt.plans.gradual import CoarseThenFine, Cubic, Iterative, OneShot, Schedule, Stage
from pruneopt.plans.lossless import lossless
from pruneopt.plans.methods import METHODS, Method
from pruneopt.plans.prune import prune
from pruneopt.plans.recalibrate import recalibrate
from pruneopt.plans.retrain import retrain
from pruneopt.plans.sensitivity import Sensitivity, sensitivity

__all__ = [
    "METHODS",
    "CoarseThenFine",
    "Cubic",
    "Iterative",
    "Method",
    "OneShot",
    "Schedule",
    "Sensitivity",
    "Stage",
    "lossless",
    "prune",
    "recalibrate",
    "retrain",
    "sensitivity",
]
