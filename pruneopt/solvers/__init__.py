"""How problems are solved."""

from pruneopt.solvers.active_set import ActiveSet
from pruneopt.solvers.admm import ADMM
from pruneopt.solvers.alps import ALPS
from pruneopt.solvers.auto import BALANCED, BEST, FAST, Auto
from pruneopt.solvers.base import Outcome, Solver, Start, Then
from pruneopt.solvers.block_obs import BlockOBS
from pruneopt.solvers.cbs import CBS
from pruneopt.solvers.chita import CHITA
from pruneopt.solvers.conjugate_gradients import ConjugateGradients
from pruneopt.solvers.descent import Descent
from pruneopt.solvers.frank_wolfe import FrankWolfe
from pruneopt.solvers.global_admm import GlobalADMM
from pruneopt.solvers.greedy_obs import GreedyOBS
from pruneopt.solvers.greedy_units import GreedyUnits
from pruneopt.solvers.hard_threshold import HardThresholding
from pruneopt.solvers.obs import OBS
from pruneopt.solvers.polish import Polish
from pruneopt.solvers.proximal_gradient import ProximalGradient
from pruneopt.solvers.pursuit import Pursuit
from pruneopt.solvers.score import Score
from pruneopt.solvers.sparse_swaps import SparseSwaps
from pruneopt.solvers.summed_obs import SummedOBS
from pruneopt.solvers.swap import Swap
from pruneopt.solvers.thanos import Thanos

__all__ = [
    "ADMM",
    "ALPS",
    "BALANCED",
    "BEST",
    "CBS",
    "CHITA",
    "FAST",
    "OBS",
    "ActiveSet",
    "Auto",
    "BlockOBS",
    "ConjugateGradients",
    "Descent",
    "FrankWolfe",
    "GlobalADMM",
    "GreedyOBS",
    "GreedyUnits",
    "HardThresholding",
    "Outcome",
    "Polish",
    "ProximalGradient",
    "Pursuit",
    "Score",
    "Solver",
    "SparseSwaps",
    "Start",
    "SummedOBS",
    "Swap",
    "Thanos",
    "Then",
]
