"""The table of methods: a published method is a row (model of the loss, solver), never a class of its own."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax

from pruneopt.network.leaves import Choice
from pruneopt.objectives.base import Objective
from pruneopt.plans.models import (
    SoftmaxGaussNewton,
    channel_factors,
    channel_traces,
    diagonal_fisher,
    diagonal_hessian,
    fisher_blocks,
    fisher_step,
    gradient_flow,
    kronecker_fisher,
    linear,
    low_rank_fisher,
    ridged_fisher,
    synaptic_flow,
    weights_alone,
)
from pruneopt.solvers.alps import ALPS
from pruneopt.solvers.auto import BALANCED, BEST, FAST, Auto
from pruneopt.solvers.base import Solver, Then
from pruneopt.solvers.block_obs import BlockOBS
from pruneopt.solvers.cbs import CBS
from pruneopt.solvers.frank_wolfe import FrankWolfe
from pruneopt.solvers.global_admm import GlobalADMM
from pruneopt.solvers.greedy_obs import GreedyOBS
from pruneopt.solvers.hard_threshold import HardThresholding
from pruneopt.solvers.obs import OBS
from pruneopt.solvers.polish import Polish
from pruneopt.solvers.pursuit import Pursuit
from pruneopt.solvers.score import Score
from pruneopt.solvers.sparse_swaps import SparseSwaps
from pruneopt.solvers.summed_obs import SummedOBS
from pruneopt.solvers.thanos import Thanos

Tree = Any
Model = Callable[[Any, Tree, Any, Choice, jax.Array], Objective]


class Method(NamedTuple):
    """A row: `model(fn, params, batches, leaves, key)` builds the objective at `params`, `solver` solves it.

    predicts: whether the model's change is meant to be that of the loss fn.
    """

    model: Model
    solver: Solver
    source: str
    reads_data: bool = True
    predicts: bool = True


# OBD ranks by |h|: an estimated Hessian diagonal is negative wherever a probe's noise or the network's indefiniteness
# makes it so, and "removing this lowers the loss" is then noise (MNIST MLP at 90 %: 87 % accuracy by |h|, 47 % by h).
METHODS: dict[str, Method] = {
    "random": Method(
        weights_alone, Score("random"), "the baseline of every comparison", reads_data=False, predicts=False
    ),
    "magnitude": Method(weights_alone, Score(), "Han et al. 2015", reads_data=False, predicts=False),
    "taylor": Method(linear, Score("absolute"), "Molchanov et al. 2019, first order"),
    "fisher": Method(diagonal_fisher, Score(), "Theis et al. 2018, diagonal empirical Fisher"),
    "obd": Method(diagonal_hessian, Score("absolute"), "LeCun, Denker, Solla 1990"),
    "obs": Method(low_rank_fisher, OBS(), "Hassibi and Stork 1993, H the empirical Fisher; up to 10,000 weights"),
    "woodfisher": Method(fisher_blocks, SummedOBS(), "Singh and Alistarh 2020, blocks of 1,000 weights"),
    "m_fac": Method(low_rank_fisher, SummedOBS(), "Frantar, Kurtic and Alistarh 2021"),
    "kfac_obd": Method(kronecker_fisher, Score(), "LeCun et al. 1990 with the diagonal of K-FAC"),
    "kfac_obs": Method(kronecker_fisher, SummedOBS(), "Zeng and Urtasun 2018 (MLPrune)"),
    "cbs": Method(ridged_fisher, Then(CBS(), Polish()), "Yu et al. 2022, selection by swaps, then the joint update"),
    "chita": Method(low_rank_fisher, Pursuit(), "Benbaki et al. 2023, each step from the refit of its support"),
    "global": Method(low_rank_fisher, Then(GlobalADMM(), Polish()), "ADMM in the metric of diag(F), then the refit"),
    "chita_steps": Method(fisher_step, Pursuit(8, 1e-3), "Benbaki et al. 2023, with the gradient: for stages"),
    "global_steps": Method(fisher_step, Then(GlobalADMM(), Polish()), "the same by ADMM"),
    "hap": Method(
        channel_traces, Score("absolute"), "Yu et al. 2021; under Slices(-1, ...): the trace of each channel"
    ),
    "kfac_channels": Method(
        channel_factors, Score(), "Wang et al. 2019 (Kron-OBD); under Slices(-1, ...): each channel in K-FAC's metric"
    ),
    "snip": Method(linear, Score("absolute"), "Lee et al. 2019; at initialisation"),
    "grasp": Method(gradient_flow, Score(), "Wang, Zhang and Grosse 2020; at initialisation", predicts=False),
    "synflow": Method(
        synaptic_flow, Score("absolute"), "Tanaka et al. 2020; fn=outputs, schedule=Iterative(100)", predicts=False
    ),
}


class LayerMethod(NamedTuple):
    """A row for `plans.layerwise`: `solver` solves each layer's reconstruction of `target` in turn."""

    solver: Solver
    source: str
    damping: float = 0.01
    target: Literal["layer", "network"] = "layer"


# Wanda's score is |w| times the norm of the input, undamped.
LAYER_METHODS: dict[str, LayerMethod] = {
    "wanda": LayerMethod(Score(), "Sun et al. 2023; its budget is Cardinality(per='out')", damping=0.0),
    "wanda_refit": LayerMethod(Then(Score(), Polish()), "Wanda's support, weights refitted exactly"),
    "ria": LayerMethod(Score("relative"), "Zhang et al. 2024; its budget is Cardinality(per='out')", damping=0.0),
    "sparsegpt": LayerMethod(
        BlockOBS(), "Frantar and Alistarh 2023; its budget is Cardinality(per='in', span=128)", damping=0.0
    ),
    "thanos": LayerMethod(Thanos(), "Ilin and Richtarik 2025", damping=0.0),
    "obc": LayerMethod(GreedyOBS(), "Frantar, Singh and Alistarh 2022", damping=0.0),
    "alps": LayerMethod(ALPS(), "Meng et al. 2024", damping=0.0),
    "iht": LayerMethod(Then(HardThresholding(), Polish()), "Blumensath and Davies 2010, then an exact refit"),
    "frank_wolfe": LayerMethod(FrankWolfe(), "Roux, Zimmer and Pokutta 2025, the mask alone", damping=0.0),
    "sparse_swaps": LayerMethod(SparseSwaps(), "Zimmer et al. 2025, from Wanda's mask, the mask alone", damping=0.0),
    "fast": LayerMethod(
        FAST,
        "ADMM in the metric of the inverse diagonal, one level of rho; towards the dense network's outputs",
        target="network",
    ),
    "balanced": LayerMethod(BALANCED, "the same, two levels", target="network"),
    "best": LayerMethod(BEST, "the same, five levels, more iterations", target="network"),
    "auto": LayerMethod(Auto(), "the preset that the layer's size allows", target="network"),
}


def gauss_newton(logits: Any, *, temperature: float = 4.0, share: float = 0.15, damping: float = 0.01) -> Method:
    """A row for classifiers, the best at one stage: the whole network's Gauss-Newton matrix, ADMM, a refit.

    logits: (params, batch) -> (n, ..., classes), of the same batches as the loss. The rest: `SoftmaxGaussNewton`.
    """
    model = SoftmaxGaussNewton(logits, temperature, share, damping)
    return Method(model, GlobalADMM(rho=(0.1, 10.0), levels=8, refit=60), "Gauss-Newton matrix, ADMM in its diagonal")


def method(name: str | Method) -> Method:
    """The row of that name among the models of the whole loss. Raises ValueError, listing the names, for another."""
    if isinstance(name, Method):
        return name
    if not isinstance(name, str) or name not in METHODS:
        raise ValueError(f"method={name!r} is unknown here; pass one of {', '.join(METHODS)}, or a Method")
    return METHODS[name]


def any_method(name: str | Method | LayerMethod) -> Method | LayerMethod:
    """The row of that name, layer by layer or not. Raises ValueError, listing the names, for another."""
    if isinstance(name, (Method, LayerMethod)):
        return name
    rows = METHODS | LAYER_METHODS
    if not isinstance(name, str) or name not in rows:
        raise ValueError(f"method={name!r} is unknown; pass one of {', '.join(rows)}, or a Method")
    return rows[name]
