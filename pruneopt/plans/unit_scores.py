"""The table of rows that rank whole units of a Coupled set."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal

import jax
import numpy as np
from jaxtyping import Float

from pruneopt import _tree
from pruneopt.constraints import parts
from pruneopt.constraints.base import Constraint
from pruneopt.constraints.coupled import Coupled
from pruneopt.constraints.members import Members
from pruneopt.network.batches import Source
from pruneopt.network.leaves import Choice, as_key, is_trainable
from pruneopt.network.network import Network
from pruneopt.plans import unit_models as models
from pruneopt.plans.unit_activations import activations, contracted, experts
from pruneopt.structure.defaults import network_of

Tree = Any
Scored = dict[str, Float[np.ndarray, " units"]]
Ranks = Callable[[Network, tuple[Members, ...], jax.Array], Scored]


@dataclass(frozen=True)
class UnitMethod:
    """A row that ranks whole units: `ranks(network, groups, key)` gives {group: a number a unit}, larger = keep.

    across: how scores of one group compare with those of others, where a budget is over all (per="tree"): "none", as
        they are; "mean", over the mean of their group; "standard", less the mean and over the standard deviation of
        their group, the least of all then set to zero. Of the units that are not zero yet.
    """

    ranks: Ranks
    source: str = field(default="", compare=False)
    reads_data: bool = True
    across: Literal["none", "mean", "standard"] = "none"

    def __post_init__(self) -> None:
        if not callable(self.ranks):
            raise TypeError(f"ranks is {self.ranks!r}; pass a function (network, groups, key) -> {{group: scores}}")
        if self.across not in ("none", "mean", "standard"):
            raise ValueError(f"across={self.across!r} is unknown; pass 'none', 'mean' or 'standard'")

    def scores(self, network: Network, groups: tuple[Members, ...], key: jax.Array) -> Scored:
        """The scores in float64, made comparable. Raises ValueError for a NaN, and for zeros in all of a group."""
        if self.reads_data and (network.fn is None or network.source is None):
            raise TypeError("fn or batches are None, but this row reads data; pass fn(params, batch) and batches")
        found = {name: np.asarray(x, np.float64) for name, x in self.ranks(network, groups, key).items()}
        for name, x in found.items():
            if not np.all(np.isfinite(x)):
                raise ValueError(
                    f"the scores of group '{name}' hold a NaN or an infinity; check the data and the network"
                )
            if self.reads_data and not np.any(x):
                raise ValueError(
                    f"the score of every unit of group '{name}' is zero, as at a converged network, behind dead units "
                    "or of data that do not vary: it ranks none of them; check fn and batches, leave the group out of "
                    "groups=, or pass method='unit_l2'"
                )
        alive = Coupled(groups, {}).alive(jax.tree.map(lambda w: w != 0, network.chosen))
        found = {name: _compared(x, x[np.asarray(alive[name])], self.across) for name, x in found.items()}
        least = min(x.min() for x in found.values()) if self.across == "standard" else 0.0
        return {name: x - least for name, x in found.items()}


def _compared(x: np.ndarray, living: np.ndarray, across: str) -> np.ndarray:
    """Scores by the mean and standard deviation of those units that are not zero yet."""
    if across == "none" or not len(living):
        return x
    scale = living.std() if across == "standard" else living.mean()
    return (x - living.mean() * (across == "standard")) / (scale if scale > 0 else 1.0)


UNIT_METHODS: dict[str, UnitMethod] = {
    "unit_random": UnitMethod(models.random, "the baseline of every comparison", reads_data=False),
    "unit_l1": UnitMethod(partial(models.norms, power=1), "Li et al. 2017, on coupled units", reads_data=False),
    "unit_l2": UnitMethod(models.norms, "He et al. 2018, on coupled units", reads_data=False),
    "unit_magnitude": UnitMethod(
        partial(models.norms, root=False), "Fang et al. 2023 (DepGraph), group magnitude", False, "mean"
    ),
    "bn_scale": UnitMethod(models.norm_scales, "Liu et al. 2017 (Network Slimming)"),
    "unit_taylor": UnitMethod(models.first_order, "Molchanov et al. 2019, first order"),
    "unit_fisher": UnitMethod(models.fisher, "Theis et al. 2018; Liu et al. 2021 (Group Fisher)"),
    "unit_kfac": UnitMethod(models.kronecker, "Wang et al. 2019 (Kron-OBD)"),
    "unit_hessian": UnitMethod(models.hessian_traces, "Yu et al. 2022 (HAP)"),
    "apoz": UnitMethod(partial(activations, of="nonzero"), "Hu et al. 2016: the fraction of inputs that is not zero"),
    "activation_mean": UnitMethod(partial(activations, of="absolute"), "Molchanov et al. 2017, mean activation"),
    "activation_variance": UnitMethod(partial(activations, of="variance"), "Polyak and Wolf 2015"),
    "activation_rms": UnitMethod(partial(activations, of="rms"), "Sun et al. 2023 (Wanda), on units"),
    "flap": UnitMethod(partial(activations, of="fluctuation"), "An et al. 2024 (FLAP)", across="standard"),
    "unit_products": UnitMethod(contracted, "terms of products of two activations: widths of queries and keys"),
    "reap": UnitMethod(experts, "Lasby et al. 2025 (REAP); of experts"),
}


@_tree.on_host
def unit_scores(
    fn: Callable[[Tree, Any], Any] | None,
    params: Tree,
    batches: Source | None,
    units: Constraint,
    name: str | UnitMethod,
    *,
    leaves: Choice = None,
    key: jax.Array | int | None = None,
) -> Scored:
    """{group: a score of each of its units}, larger = keep: what `prune(..., method=name)` ranks by at these params.

    fn: a loss, (params, batch) -> scalar, for rows of derivatives; for others outputs will do. units: a Coupled set,
    whose budget is not read. name: of `plans.UNIT_METHODS`, or a row. leaves: whose entries are decided; by default
    what the groups own but running statistics.
    Raises ValueError for an unknown name, a set that is not Coupled, groups of another network, data that rank nothing.
    """
    row = name if isinstance(name, UnitMethod) else UNIT_METHODS.get(name) if isinstance(name, str) else None
    if row is None:
        raise ValueError(f"name={name!r} is no row of units; pass one of {', '.join(UNIT_METHODS)}, or a UnitMethod")
    groups = groups_of(units, name)
    network = network_of(fn, params, batches, owned(groups) if leaves is None else leaves)
    units.check(network.chosen)
    return row.scores(network, groups, as_key(key))


def groups_of(constraint: Constraint, method: Any) -> tuple[Members, ...]:
    """The groups whose units a constraint chooses. Raises ValueError where it chooses anything else."""
    groups = parts.of(constraint).groups
    if not groups:
        raise ValueError(
            f"method={method!r} ranks whole units, and constraint={constraint!r} is no set of these; pass "
            "constraints.coupled(structure.trace(fn, params, batch).units(), budget), alone or within a Support"
        )
    return groups


def owned(groups: tuple[Members, ...]) -> Callable[[str, Any], bool]:
    """The leaves that groups hold a part of, but running statistics."""
    paths = {path for group in groups for path, _ in group.places}
    return lambda path, leaf: path in paths and is_trainable(path, leaf)
