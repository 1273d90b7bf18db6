"""The table of methods: a published method is a row (model of the loss, solver), never a class of its own."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal

import jax
import numpy as np

from pruneopt.network.network import Network
from pruneopt.objectives.base import Objective
from pruneopt.objectives.scores import Scores
from pruneopt.plans.judged import DAMPINGS, as_dampings
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
from pruneopt.plans.unit_scores import UNIT_METHODS, UnitMethod
from pruneopt.solvers.alps import ALPS
from pruneopt.solvers.auto import BALANCED, BEST, FAST, Auto
from pruneopt.solvers.base import Solver, Then
from pruneopt.solvers.block_obs import BlockOBS
from pruneopt.solvers.cbs import CBS
from pruneopt.solvers.chita import CHITA
from pruneopt.solvers.frank_wolfe import FrankWolfe
from pruneopt.solvers.global_admm import GlobalADMM
from pruneopt.solvers.greedy_obs import GreedyOBS
from pruneopt.solvers.greedy_units import GreedyUnits
from pruneopt.solvers.hard_threshold import HardThresholding
from pruneopt.solvers.obs import OBS
from pruneopt.solvers.polish import Polish
from pruneopt.solvers.pursuit import Pursuit
from pruneopt.solvers.score import Score
from pruneopt.solvers.sparse_swaps import SparseSwaps
from pruneopt.solvers.summed_obs import SummedOBS
from pruneopt.solvers.thanos import Thanos

Model = Callable[[Network, jax.Array], Objective]


def _check_row(row: Any) -> None:
    """Raise for what is no solver, or for dampings that are no numbers >= 0; they become a tuple."""
    if not isinstance(row.solver, Solver):
        raise TypeError(f"solver is {row.solver!r}; pass a pruneopt Solver")
    object.__setattr__(row, "dampings", as_dampings("dampings", row.dampings) if np.size(row.dampings) else ())


@dataclass(frozen=True)
class Method:
    """A row for the whole network: `model(network, key)` builds the objective at its params, `solver` solves it.

    predicts: whether the model's change is meant to be that of the loss fn. dampings: of a damped quadratic model,
        tried where there are examples to choose on; empty for the model's own.
    """

    model: Model
    solver: Solver
    source: str = field(default="", compare=False)
    reads_data: bool = True
    predicts: bool = True
    dampings: tuple[float, ...] = DAMPINGS

    def __post_init__(self) -> None:
        _check_row(self)


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
    "chita": Method(low_rank_fisher, Then(CHITA(), Polish()), "Benbaki et al. 2023, as published, then the refit"),
    "pursuit": Method(low_rank_fisher, Pursuit(), "the same with each step from the refit of its support"),
    "global": Method(low_rank_fisher, Then(GlobalADMM(), Polish()), "ADMM in the metric of diag(F), then the refit"),
    "pursuit_steps": Method(
        fisher_step, Pursuit(8, 1e-3), "Benbaki et al. 2023 (CHITA++), with the gradient: for stages", dampings=()
    ),
    "global_steps": Method(fisher_step, Then(GlobalADMM(), Polish()), "the same by ADMM", dampings=()),
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


@dataclass(frozen=True)
class LayerMethod:
    """A row for `plans.layerwise`: `solver` solves each layer's damped reconstruction in turn.

    target: "network" matches what the dense network computes there, ||X0 W0 - X W||^2 with X0 its inputs, by moving
        the centre (`calibration.Inputs.target`); "layer" the dense layer on the pruned inputs (Frantar and Alistarh
        2023), as most published methods do; "stream" as "network", and what an output is added to, such as the stream
        of a residual network, is to be the dense network's with it: outputs make up for what the stream lost before.
    damping: lambda / mean(diag H). dampings: tried where there are examples to choose on; empty for `damping` alone.
    centred: whether each output has an intercept as well, where a leaf can hold it: H is of inputs less their means,
        and what the means lose goes into a norm's running mean, or into a bias (An et al. 2024; `capture.affine`).
    """

    solver: Solver
    source: str = field(default="", compare=False)
    damping: float = 0.01
    target: Literal["layer", "network", "stream"] = "network"
    dampings: tuple[float, ...] = DAMPINGS
    centred: bool = False

    def __post_init__(self) -> None:
        _check_row(self)
        if self.target not in ("layer", "network", "stream"):
            raise ValueError(f"target={self.target!r} is unknown; pass 'layer', 'network' or 'stream'")
        if len(as_dampings("damping", self.damping)) != 1:
            raise ValueError(f"damping={self.damping!r} is no single number; pass those to try as dampings=")


def _published(solver: Solver, source: str, damping: float = 0.0) -> LayerMethod:
    """A row as its paper has it: one damping, each layer's own outputs."""
    return LayerMethod(solver, source, damping, "layer", DAMPINGS if damping else ())


# Wanda's score is |w| times the norm of the input, undamped.
LAYER_METHODS: dict[str, LayerMethod] = {
    "wanda": _published(Score(), "Sun et al. 2023; its budget is Cardinality(per='out')"),
    "wanda_refit": _published(Then(Score(), Polish()), "Wanda's support, weights refitted exactly", damping=0.01),
    "ria": _published(Score("relative"), "Zhang et al. 2024; its budget is Cardinality(per='out')"),
    "sparsegpt": _published(BlockOBS(), "Frantar and Alistarh 2023; its budget is Cardinality(per='in', span=128)"),
    "thanos": _published(Thanos(), "Ilin and Richtarik 2025"),
    "obc": _published(GreedyOBS(), "Frantar, Singh and Alistarh 2022"),
    "alps": _published(ALPS(), "Meng et al. 2024"),
    "iht": _published(
        Then(HardThresholding(), Polish()), "Blumensath and Davies 2010, then an exact refit", damping=0.01
    ),
    "frank_wolfe": _published(FrankWolfe(), "Roux, Zimmer and Pokutta 2025, the mask alone"),
    "sparse_swaps": _published(SparseSwaps(), "Zimmer et al. 2025, from Wanda's mask, the mask alone"),
    "units": LayerMethod(
        GreedyUnits(),
        "whole inputs, as Coupled sets ask for: OSSCAR's local search from backward elimination, means into biases",
        damping=0.01,
        target="stream",
        centred=True,
    ),
    "fast": LayerMethod(
        FAST, "ADMM in OBS's metric for the density kept, one level of rho; towards the dense network's outputs"
    ),
    "balanced": LayerMethod(BALANCED, "the same, three levels"),
    "best": LayerMethod(BEST, "the same, five levels, more iterations"),
    "auto": LayerMethod(Auto(), "the preset that the layer's size allows"),
}


def gauss_newton(logits: Any, *, temperature: float = 4.0, share: float = 0.15, damping: float = 0.01) -> Method:
    """A row for classifiers, the best at one stage: the whole network's Gauss-Newton matrix, ADMM, a refit.

    logits: (params, batch) -> (n, ..., classes), of the same batches as the loss. The rest: `SoftmaxGaussNewton`.
    """
    model = SoftmaxGaussNewton(logits, temperature, share, damping)
    return Method(model, GlobalADMM(rho=(0.1, 10.0), levels=8, refit=60), "Gauss-Newton matrix, ADMM in its diagonal")


Row = Method | LayerMethod | UnitMethod
Asked = str | Row | Solver | Scores


def row_of(method: Asked) -> Row:
    """The row that `method` asks for: a name's, itself, `LayerMethod(solver)` for a solver alone, or the cut that keeps
    the largest of `Scores`.

    Raises ValueError, listing the names, for an unknown one.
    """
    if isinstance(method, (Method, LayerMethod, UnitMethod)):
        return method
    if isinstance(method, Solver):
        return LayerMethod(method)
    if isinstance(method, Scores):
        return Method(lambda network, key: method.at(network.params, network.chosen), Score(), "", False, False)
    rows: dict[str, Row] = {**METHODS, **LAYER_METHODS, **UNIT_METHODS}
    if not isinstance(method, str) or method not in rows:
        raise ValueError(f"method={method!r} is unknown; pass one of {', '.join(rows)}, a row of your own, or a Solver")
    return rows[method]


def weight_row(method: Asked) -> Method | LayerMethod:
    """`row_of`, or ValueError for a row that ranks whole units."""
    row = row_of(method)
    if isinstance(row, UnitMethod):
        raise ValueError(
            f"method={method!r} ranks whole units, and this plan cuts weights; pass one of "
            f"{', '.join(METHODS | LAYER_METHODS)}, or use prune with a Coupled set"
        )
    return row


def layer_row(method: Asked) -> LayerMethod:
    """`row_of`, or ValueError for a method that models the loss of the whole network."""
    row = weight_row(method)
    if not isinstance(row, LayerMethod):
        raise ValueError(
            f"method={method!r} models the whole network's loss; pass one of {', '.join(LAYER_METHODS)}, a Solver or "
            "a LayerMethod, or use prune"
        )
    return row


def loss_row(method: Asked) -> Method:
    """`row_of`, or ValueError for a method that goes layer by layer."""
    row = weight_row(method)
    if not isinstance(row, Method):
        raise ValueError(
            f"method={method!r} goes layer by layer, and this plan needs a model of the loss; pass one of "
            f"{', '.join(METHODS)}, or Method(model, solver)"
        )
    return row


def name_of(method: Asked) -> str:
    """What a method is called in a history: its name in the tables, or what its solver is."""
    if isinstance(method, str):
        return method
    if isinstance(method, Scores):
        return "Scores"
    row = row_of(method)
    rows: dict[str, Row] = {**METHODS, **LAYER_METHODS, **UNIT_METHODS}
    known = [n for n, other in rows.items() if other is row] or [n for n, other in rows.items() if other == row]
    return known[0] if known else repr(row if isinstance(row, UnitMethod) else row.solver)
