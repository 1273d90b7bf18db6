"""Rows that rank units by what enters the operators that read them, and experts by what they add."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Float

from pruneopt import _tree
from pruneopt.capture.experts import adds, contributions
from pruneopt.capture.products import energies, products
from pruneopt.capture.statistics import Statistics, capture
from pruneopt.constraints.members import Members
from pruneopt.network.network import Network
from pruneopt.plans.unit_parts import readers
from pruneopt.program.forms import Ragged
from pruneopt.structure.layout import slots_of
from pruneopt.structure.operators import Operator
from pruneopt.structure.traced import Traced

Groups = Sequence[Members]
Scored = dict[str, Float[np.ndarray, " units"]]


@dataclass(frozen=True)
class _Read:
    """What enters the operator that reads a group: of each input (problems, n_in) its unit and statistics, and the
    squared norm of its row of weights.
    """

    units: np.ndarray
    second: np.ndarray
    variance: np.ndarray
    absolute: np.ndarray
    zeros: np.ndarray | None
    rows: np.ndarray


def activations(network: Network, groups: Groups, key: Any, *, of: str) -> Scored:
    """A statistic of what enters the operators that read a unit, over all positions of all batches.

    of: "nonzero", the fraction that is not zero (1 - APoZ, Hu et al. 2016); "absolute", the mean size; "variance":
        means over the unit's inputs in all operators that read it. "rms": the root of the sum over these of E[x^2]
        ||w||^2, w the input's row of weights (Sun et al. 2023, on units); "fluctuation": the sum of Var[x] ||w||^2 (An
        et al. 2024, FLAP). Matrices that are a unit's own, such as an expert's, all read it.
    """
    found = {}
    for group, reads in zip(groups, _reads(network, groups), strict=True):
        total, many = np.zeros(group.size), np.zeros(group.size)
        for read in reads:
            own = read.units >= 0
            value = _statistic(read, of, group.name)
            np.add.at(total, read.units[own], value[own])
            np.add.at(many, read.units[own], 1.0)
        whole = {"rms": np.sqrt(total), "fluctuation": total}
        found[group.name] = whole[of] if of in whole else total / np.maximum(many, 1)
    return found


def _statistic(read: _Read, of: str, name: str) -> np.ndarray:
    if of == "nonzero":
        if read.zeros is None:
            raise ValueError(
                f"group '{name}' is read by experts whose rows are sorted, where zeros are not counted expert by "
                "expert; pass method='reap', or leave the group out of groups="
            )
        return 1.0 - read.zeros
    if of in ("rms", "fluctuation"):
        return (read.second if of == "rms" else read.variance) * read.rows
    return getattr(read, of)


def _reads(network: Network, groups: Groups) -> list[list[_Read]]:
    """What enters the operators that read each group. Raises ValueError where none does, or where all is zero."""
    named = dict(_tree.named_leaves(network.params))
    graph = Traced(network).of(network.batches.first)
    slots = slots_of(graph.operators, named)
    every = [readers(group, slots) for group in groups]
    for group, each in zip(groups, every, strict=True):
        if not each:
            raise ValueError(
                f"group '{group.name}': no product with weights reads its units, so that nothing is known of what "
                "enters one; pass a row of weights or derivatives, such as method='unit_l2' or 'unit_taylor'"
            )
    paths = {path for each in every for slot, _ in each for path in slot.paths}
    sorted_rows = any(isinstance(slot.operators[0].uses[0].form, Ragged) for each in every for slot, _ in each)
    words: dict[str, Any] = {"means": True, "activations": True, "gram": sorted_rows}
    fn, params, batches, _ = network.given
    statistics = capture(fn, params, batches, leaves=lambda path, _: path in paths, **words)
    found = []
    for group, each in zip(groups, every, strict=True):
        reads = [_read(slot.operators[0], units, statistics[slot.operators[0].name], named) for slot, units in each]
        if not any(np.any(read.second[read.units >= 0]) for read in reads):
            raise ValueError(
                f"batches: all that enters the operators that read group '{group.name}' is zero in every batch and "
                "ranks none of its units; check the data and the network before it, or leave the group out of groups="
            )
        found.append(reads)
    return found


def _read(op: Operator, units: np.ndarray, found: Statistics, named: dict[str, Any]) -> _Read:
    matrix = np.asarray(op.to_matrix(named), np.float64)
    wide = lambda x: np.broadcast_to(np.asarray(x, np.float64), units.shape)  # noqa: E731
    taps = lambda x: wide(np.tile(np.asarray(x), (1, op.n_in // x.shape[1])))  # noqa: E731
    rows, absolute = np.sum(matrix**2, axis=2), wide(found.absolute)
    if isinstance(op.uses[0].form, Ragged):  # sums over each expert's own rows alone
        assert found.gram is not None
        second, mean = wide(np.diagonal(np.asarray(found.gram), axis1=1, axis2=2)), wide(found.mean)
        return _Read(units, second, np.maximum(second - mean**2, 0), absolute, None, rows)
    assert found.unit_mean is not None
    assert found.zeros is not None
    variance = taps(found.unit_variance)
    return _Read(units, variance + taps(found.unit_mean) ** 2, variance, absolute, taps(found.zeros), rows)


def experts(network: Network, groups: Groups, key: Any) -> Scored:
    """The mean over the positions routed to an expert of the norm of what it adds: its gate times its output.

    Source: Lasby et al. 2025 (REAP); see `capture.experts`, which finds both in the program.
    """
    traced = Traced(network)
    graph = traced.of(network.batches.first)
    slots = slots_of(graph.operators, dict(_tree.named_leaves(network.params)))
    found = {}
    for group in groups:
        own = [(slot.operators[0], units) for slot, units in readers(group, slots) if _is_of_experts(units)]
        last = adds(graph.program, [op for op, _ in own])
        if not last:
            raise ValueError(
                f"group '{group.name}' holds no experts whose outputs a gate weighs and sums: no product with a matrix "
                "for each unit whose output goes there; leave the group out of groups=, or pass another row, such as "
                "method='activation_rms'"
            )
        total = np.zeros(group.size)
        for op, units in own:
            if op in last:
                np.add.at(total, units[:, 0], contributions(traced, op.name, network.params, network.batches))
        found[group.name] = total
    return found


def _is_of_experts(units: np.ndarray) -> bool:
    """Whether each problem (of units (problems, n_in)) is one unit's, and there are several."""
    return bool(np.all(units == units[:, :1])) and len(np.unique(units[:, 0])) > 1 and bool(np.all(units >= 0))


def contracted(network: Network, groups: Groups, key: Any) -> Scored:
    """The mean over examples of the squared norm of what a unit adds to products of two activations: q_u k_u^T of the
    width of queries and keys. Terms of several entries of one unit are taken as orthogonal.

    Source: a product as a sum of outer products, Drineas, Kannan and Mahoney 2006, section 4.
    """
    traced, named = Traced(network), dict(_tree.named_leaves(network.params))
    stream, found = network.batches, {}
    for group in groups:
        if not products(traced.of(stream.first), group.name):
            raise ValueError(
                f"group '{group.name}' is contracted in no product of two activations; leave it out of groups=, or "
                "pass a row of what enters products with weights, such as method='activation_rms'"
            )

        def of(batch: Any, group: Members = group) -> Any:
            graph = traced.of(batch)
            return energies(graph, products(graph, group.name), group.size, batch, named) / stream.examples(batch)

        found[group.name] = np.asarray(stream.mean(of), np.float64)
    return found
