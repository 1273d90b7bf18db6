"""The table of methods: a published method is a row (model of the loss, solver), never a class of its own."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax

from pruneopt import _data
from pruneopt.curvature.diagonal import Identity
from pruneopt.curvature.fisher import empirical_fisher_diagonal
from pruneopt.curvature.hessian import hutchinson_diagonal
from pruneopt.objectives.base import Objective
from pruneopt.objectives.quadratic import Quadratic
from pruneopt.solvers.alps import ALPS
from pruneopt.solvers.auto import BALANCED, BEST, FAST, Auto
from pruneopt.solvers.base import Solver, Then
from pruneopt.solvers.block_obs import BlockOBS
from pruneopt.solvers.frank_wolfe import FrankWolfe
from pruneopt.solvers.greedy_obs import GreedyOBS
from pruneopt.solvers.hard_threshold import HardThresholding
from pruneopt.solvers.polish import Polish
from pruneopt.solvers.score import Score
from pruneopt.solvers.sparse_swaps import SparseSwaps
from pruneopt.solvers.thanos import Thanos
from pruneopt.structure import evaluate
from pruneopt.structure.leaves import Choice, partition

Tree = Any
Model = Callable[[Any, Tree, Any, Choice, jax.Array], Objective]


class Method(NamedTuple):
    """A row: `model(fn, params, batches, leaves, key)` builds the objective at `params`, `solver` solves it."""

    model: Model
    solver: Solver
    source: str
    reads_data: bool = True


def weights_alone(fn: Any, params: Tree, batches: Any, leaves: Choice, key: jax.Array) -> Quadratic:
    """1/2 ||w - w0||^2: no data, no loss."""
    return Quadratic(partition(params, leaves)[0], Identity())


def linear(fn: Any, params: Tree, batches: Any, leaves: Choice, key: jax.Array) -> Quadratic:
    """<g, w - w0>, g the gradient of the mean loss."""
    chosen, rest = partition(params, leaves)
    stream = _data.Batches(batches)
    evaluate.check_scalar(fn, chosen, rest, stream)
    return Quadratic(chosen, None, evaluate.mean_gradient(fn, chosen, rest, stream))


def diagonal_fisher(fn: Any, params: Tree, batches: Any, leaves: Choice, key: jax.Array) -> Quadratic:
    """1/2 <d, diag(F) d>, F the empirical Fisher."""
    curvature = empirical_fisher_diagonal(fn, params, batches, leaves)
    return Quadratic(partition(params, leaves)[0], curvature)


def diagonal_hessian(fn: Any, params: Tree, batches: Any, leaves: Choice, key: jax.Array) -> Quadratic:
    """1/2 <d, diag(H) d>, H the Hessian of the mean loss, its diagonal by 8 Hutchinson probes."""
    curvature = hutchinson_diagonal(fn, params, batches, leaves, key=key)
    return Quadratic(partition(params, leaves)[0], curvature)


# OBD ranks by |h|: an estimated Hessian diagonal is negative wherever a probe's noise or the network's indefiniteness
# makes it so, and "removing this lowers the loss" is then noise (MNIST MLP at 90 %: 87 % accuracy by |h|, 47 % by h).
METHODS: dict[str, Method] = {
    "random": Method(weights_alone, Score("random"), "the baseline of every comparison", reads_data=False),
    "magnitude": Method(weights_alone, Score(), "Han et al. 2015", reads_data=False),
    "taylor": Method(linear, Score("absolute"), "Molchanov et al. 2019, first order"),
    "fisher": Method(diagonal_fisher, Score(), "Theis et al. 2018, diagonal empirical Fisher"),
    "obd": Method(diagonal_hessian, Score("absolute"), "LeCun, Denker, Solla 1990"),
}


class LayerMethod(NamedTuple):
    """A row for `plans.layerwise`: `solver` solves each layer's reconstruction in turn."""

    solver: Solver
    source: str
    damping: float = 0.01


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
    "fast": LayerMethod(FAST, "ADMM in the metric of the inverse diagonal, one level of rho"),
    "balanced": LayerMethod(BALANCED, "the same, three levels"),
    "best": LayerMethod(BEST, "the same, five levels, more iterations"),
    "auto": LayerMethod(Auto(), "the preset that the layer's size allows"),
}


def method(name: str | Method) -> Method:
    """The row of that name among the models of the whole loss. Raises ValueError, listing the names, for another."""
    if isinstance(name, Method):
        return name
    if name not in METHODS:
        raise ValueError(f"method={name!r} is unknown here; pass one of {', '.join(METHODS)}, or a Method")
    return METHODS[name]


def any_method(name: str | Method | LayerMethod) -> Method | LayerMethod:
    """The row of that name, layer by layer or not. Raises ValueError, listing the names, for another."""
    if isinstance(name, (Method, LayerMethod)):
        return name
    rows = METHODS | LAYER_METHODS
    if name not in rows:
        raise ValueError(f"method={name!r} is unknown; pass one of {', '.join(rows)}, or a Method")
    return rows[name]
