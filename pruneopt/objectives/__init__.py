"""What is lost: the loss, its quadratic model, a layer's reconstruction error."""

from pruneopt.objectives.base import Objective, QuadraticObjective
from pruneopt.objectives.loss import Loss
from pruneopt.objectives.quadratic import Quadratic
from pruneopt.objectives.reconstruction import Reconstruction
from pruneopt.objectives.scores import Scores

__all__ = ["Loss", "Objective", "Quadratic", "QuadraticObjective", "Reconstruction", "Scores"]
