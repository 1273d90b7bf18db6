"""More than one solve: whole networks, schedules, sensitivity, recalibration."""

from pruneopt.allocation.allocate import allocate
from pruneopt.plans.best_of import best_of
from pruneopt.plans.distil import distil
from pruneopt.plans.layer_tables import budgets, layer_levels, layer_tables
from pruneopt.plans.layerwise import layerwise
from pruneopt.plans.levels import Levels, kl, squared
from pruneopt.plans.lossless import lossless
from pruneopt.plans.lottery import lottery
from pruneopt.plans.methods import LAYER_METHODS, METHODS, LayerMethod, Method, gauss_newton
from pruneopt.plans.models import SoftmaxGaussNewton
from pruneopt.plans.outlier_weighed import outlier_weighed
from pruneopt.plans.path import Path, at_sparsity, path
from pruneopt.plans.penalised import penalised
from pruneopt.plans.prune import prune
from pruneopt.plans.recalibrate import recalibrate
from pruneopt.plans.refine import refine
from pruneopt.plans.refine_windows import refine_windows
from pruneopt.plans.refit_products import refit_products
from pruneopt.plans.retrain import retrain
from pruneopt.plans.schedules import CoarseThenFine, Cubic, Iterative, OneShot, Schedule, Stage
from pruneopt.plans.sensitivity import Sensitivity, sensitivity
from pruneopt.plans.settle import settle
from pruneopt.plans.staged import staged
from pruneopt.plans.unit_scores import UNIT_METHODS, UnitMethod, unit_scores
from pruneopt.plans.unit_tables import unit_levels, unit_tables

__all__ = [
    "LAYER_METHODS",
    "METHODS",
    "UNIT_METHODS",
    "CoarseThenFine",
    "Cubic",
    "Iterative",
    "LayerMethod",
    "Levels",
    "Method",
    "OneShot",
    "Path",
    "Schedule",
    "Sensitivity",
    "SoftmaxGaussNewton",
    "Stage",
    "UnitMethod",
    "allocate",
    "at_sparsity",
    "best_of",
    "budgets",
    "distil",
    "gauss_newton",
    "kl",
    "layer_levels",
    "layer_tables",
    "layerwise",
    "lossless",
    "lottery",
    "outlier_weighed",
    "path",
    "penalised",
    "prune",
    "recalibrate",
    "refine",
    "refine_windows",
    "refit_products",
    "retrain",
    "sensitivity",
    "settle",
    "squared",
    "staged",
    "unit_levels",
    "unit_scores",
    "unit_tables",
]
