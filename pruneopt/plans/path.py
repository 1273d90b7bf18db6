"""Penalised solutions over the weight of the penalty, and the one that keeps exactly so many weights."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from tqdm import tqdm

from pruneopt import _selection, _tree
from pruneopt.constraints.cardinality import Cardinality
from pruneopt.constraints.support import Support
from pruneopt.objectives.base import Objective, QuadraticObjective
from pruneopt.objectives.loss import Loss
from pruneopt.objectives.reconstruction import Reconstruction
from pruneopt.penalties.base import Penalty
from pruneopt.penalties.group import GroupLasso
from pruneopt.penalties.l1 import L1, ElasticNet
from pruneopt.problem import Problem
from pruneopt.solution import Solution, Status
from pruneopt.solve import solve
from pruneopt.solvers.active_set import ActiveSet
from pruneopt.solvers.base import Solver
from pruneopt.solvers.polish import Polish
from pruneopt.solvers.proximal_gradient import ProximalGradient

Tree = Any
_ABOVE = 1e-9  # by which the first weight is above the largest useful one, relative: rounding lets nothing live there
_TIED = 1e-5  # width of a bracket, relative, inside which weights that differ count as tied


@dataclass(frozen=True, eq=False)
class Path:
    """Solutions at falling weights of a penalty, each started at the one before.

    weights: falling. solutions: of Problem(objective, penalty=...) at each. kept: units that live at each, weights or,
    for GroupLasso, groups; `units` of them in all.
    """

    weights: tuple[float, ...]
    solutions: tuple[Solution, ...]
    kept: tuple[int, ...]
    units: int

    def __str__(self) -> str:
        rows = [
            f"{w:>10.4g} {k:>10,} {1 - k / self.units:>9.2%} {s.objective:>12.6g} {s.gap:>8.1g}"
            for w, k, s in zip(self.weights, self.kept, self.solutions, strict=True)
        ]
        return "\n".join([f"{'weight':>10} {'kept':>10} {'sparsity':>9} {'objective':>12} {'gap':>8}", *rows])


@_tree.on_host
def path(
    objective: Objective,
    penalty: Penalty,
    solver: Solver | None = None,
    *,
    weights: tuple[float, ...] | None = None,
    points: int = 10,
    least: float = 1e-2,
    progress: bool = True,
) -> Path:
    """minimise objective(w) + penalty(w) for falling weights of the penalty, each warm-started.

    penalty: its own `weight` does not matter. solver: default `ActiveSet` for L1 and elastic nets on a Reconstruction,
    else `ProximalGradient`. weights: to solve at, sorted here; default `points` from the largest useful one (where zero
    is optimal, and where a quadratic starts) down to `least` of it, evenly spaced in the logarithm.

    Raises ValueError for weights that are not finite and > 0, and what `solve` raises.
    Source: Friedman, Hastie and Tibshirani 2010, section 2.5.
    """
    _check_penalty(penalty)
    solver, start = solver or _usual(objective, penalty), None
    if weights is None:
        if isinstance(points, bool) or not isinstance(points, int) or points < 1 or not 0 < least < 1:
            raise ValueError(f"points={points!r}, least={least!r}; pass points >= 1 and least in (0, 1)")
        top = _largest(objective, penalty) * (1 + _ABOVE)
        if isinstance(objective, QuadraticObjective):  # a network at zero may have no gradient
            start = jax.tree.map(jnp.zeros_like, objective.center)
        weights = tuple(float(w) for w in top * np.geomspace(1, least, points))
    values = np.asarray(weights if hasattr(weights, "__len__") else None)
    if (
        values.ndim != 1
        or not values.size
        or values.dtype.kind not in "iuf"
        or not np.all((values > 0) & (values < math.inf))
    ):
        raise ValueError(f"weights={weights!r} are not all finite and > 0; pass weights such as (0.1, 0.01)")
    falling = tuple(sorted(map(float, values), reverse=True))
    found: list[Solution] = []
    for weight in tqdm(falling, desc="path", unit="weight", disable=not progress):
        found.append(_at(objective, penalty, solver, weight, found[-1] if found else start))
    sizes = [_sizes(penalty, s.value) for s in found]
    return Path(falling, tuple(found), tuple(int(np.count_nonzero(s)) for s in sizes), sizes[0].size)


def at_sparsity(
    objective: Objective,
    penalty: Penalty,
    solver: Solver | None = None,
    *,
    sparsity: float | None = None,
    count: int | None = None,
    debias: Solver | None = None,
    solves: int = 40,
    progress: bool = True,
) -> Solution:
    """The weights that a penalty keeps at exactly the asked-for number, then f alone minimised on them.

    sparsity, count: the fraction to remove or the number to keep, exactly one, of weights, or for GroupLasso of groups.
    penalty, solver: as for `path`. debias: what minimises f on the support: default `Polish()` for a quadratic; pass
        `Descent(optimizer, epochs)` for a Loss. solves: of penalised problems, at most.

    The weight falls by 0.7 from the largest useful one until enough live, then the bracket is halved, every solve
    started at the nearest one, until the count is met or the bracket is 1e-5 wide. Then some are tied: the smallest of
    the solution that keeps too many go, ties by leaf order, then index. Status feasible: that the support is the
    best of its size is not proven.
    stats: weight, where the support was found; solves; tied, weights or groups that were cut at that tie.

    It needs a gradient at w = 0, as quadratics and losses of one layer have; in a network of two layers or more that is
    zero, and `path(..., weights=...)` or `plans.penalised` serve.

    Raises ValueError where no weight keeps enough (naming how many live at the smallest tried), for a count of 0, where
    the gradient at zero is zero, and what `solve` raises.
    Source: Friedman et al. 2010 (path); Belloni and Chernozhukov 2013 (least squares on the lasso's support).
    """
    _check_penalty(penalty)
    if isinstance(solves, bool) or not hasattr(solves, "__index__") or solves < 1:
        raise ValueError(
            f"solves={solves!r} is not a whole number >= 1; pass how many problems may be solved, such as 40"
        )
    solver = solver or _usual(objective, penalty)
    if debias is None:
        if isinstance(objective, Loss):
            raise ValueError("debias is None, but the objective is a Loss; pass debias=Descent(optimizer, epochs)")
        debias = Polish()
    units = _sizes(penalty, objective.center).size
    wanted = Cardinality(sparsity=sparsity, count=count, floor=0).kept_of(units)
    if wanted == 0:
        raise ValueError(
            f"sparsity={sparsity}, count={count} keeps none of {units}; pass count >= 1 or a lower sparsity"
        )
    few, many, kept = _largest(objective, penalty), None, 0
    weight = 0.7 * few
    start: Solution | None = None
    done = 0
    with tqdm(total=solves, desc="at_sparsity", unit="solve", disable=not progress) as bar:
        while done < solves:
            done += 1
            solution = _at(objective, penalty, solver, weight, start)
            kept = int(np.count_nonzero(_sizes(penalty, solution.value)))
            bar.update()
            bar.set_postfix(weight=f"{weight:.3g}", kept=kept, wanted=wanted)
            start = solution
            if kept >= wanted:
                many = (weight, solution, kept)
            else:
                few = weight
            if kept == wanted or (many is not None and few - many[0] <= _TIED * few):
                break
            weight = 0.7 * weight if many is None else math.sqrt(few * many[0])
    if many is None:
        raise ValueError(
            f"count={wanted}: only {kept} of {units} live at weight={few:.3g}, the smallest of {solves} tried, so no "
            "weight brackets it; ask for fewer, pass more solves=, or damp the objective (dead inputs never live)"
        )
    weight, solution, kept = many
    mask = _largest_units(penalty, solution.value, wanted)
    fitted = solve(Problem(objective, subject_to=Support(mask)), debias, init=mask)
    stats = {**fitted.stats, "weight": weight, "solves": done, "tied": kept - wanted}
    return replace(fitted, status=_unproven(fitted.status), bound=-math.inf, gap=math.inf, evidence=None, stats=stats)


def _check_penalty(penalty: Any) -> None:
    if not isinstance(penalty, Penalty):
        raise TypeError(f"penalty is {penalty!r}; pass a penalty such as L1(1.0)")


def _unproven(status: Status) -> Status:
    return Status.FEASIBLE if status is Status.OPTIMAL else status


def _usual(objective: Objective, penalty: Penalty) -> Solver:
    if isinstance(objective, Reconstruction) and isinstance(penalty, L1 | ElasticNet):
        return ActiveSet()
    return ProximalGradient()


def _at(objective: Objective, penalty: Any, solver: Solver, weight: float, start: Any) -> Solution:
    return solve(Problem(objective, penalty=replace(penalty, weight=weight)), solver, init=start)


def _largest(objective: Objective, penalty: Penalty) -> float:
    """The largest useful weight. Raises ValueError where that is not a positive number."""
    zero = jax.tree.map(jnp.zeros_like, objective.center)
    slope = objective.slope(zero) if isinstance(objective, QuadraticObjective) else None
    if isinstance(objective, Loss):
        slope = objective.gradient(zero)
    if slope is None:
        raise ValueError(f"objective is a {type(objective).__name__}, without a gradient; pass a quadratic or a Loss")
    most = penalty.weight_max(slope)
    if not 0 < most < math.inf:
        raise ValueError(
            f"penalty={type(penalty).__name__} has no largest useful weight here ({most}): the gradient where all "
            "weights are zero is zero, as in a network of two layers, or some weights are not penalised; solve at "
            "weights of your own by `path(..., weights=(0.1, 0.01))`, or prune by `plans.penalised`"
        )
    return most


def _sizes(penalty: Penalty, w: Tree) -> np.ndarray:
    """The size of every unit: |w|, or for GroupLasso the norm of each group."""
    leaves = [np.abs(np.asarray(x, np.float64)) for x in jax.tree.leaves(w)]
    if isinstance(penalty, GroupLasso):
        return np.sqrt(penalty.groups.sums([x * x for x in leaves]))
    return np.concatenate([x.reshape(-1) for x in leaves])


def _largest_units(penalty: Penalty, w: Tree, count: int) -> Tree:
    """A mask of the `count` largest units."""
    (chosen,) = _selection.keep_largest([jnp.asarray(_sizes(penalty, w))], count)
    kept = np.asarray(chosen)
    if isinstance(penalty, GroupLasso):
        return jax.tree.map(
            lambda x, label: np.broadcast_to(kept[np.asarray(label)], x.shape), w, penalty.groups.labels
        )
    leaves, structure = jax.tree.flatten(w)
    ends = np.cumsum([x.size for x in leaves])
    masks = [kept[end - x.size : end].reshape(x.shape) for x, end in zip(leaves, ends, strict=True)]
    return jax.tree.unflatten(structure, masks)
