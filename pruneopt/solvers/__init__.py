"""How problems are solved."""

from pruneopt.solvers.admm import ADMM
from pruneopt.solvers.auto import BALANCED, BEST, FAST, Auto
from pruneopt.solvers.base import Solver, Then
from pruneopt.solvers.block_obs import BlockOBS
from pruneopt.solvers.conjugate_gradients import ConjugateGradients
from pruneopt.solvers.descent import Descent
from pruneopt.solvers.polish import Polish
from pruneopt.solvers.score import Score
from pruneopt.solvers.thanos import Thanos

__all__ = [
    "ADMM",
    "BALANCED",
    "BEST",
    "FAST",
    "Auto",
    "BlockOBS",
    "ConjugateGradients",
    "Descent",
    "Polish",
    "Score",
    "Solver",
    "Thanos",
    "Then",
]
