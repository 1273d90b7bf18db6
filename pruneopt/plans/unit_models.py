"""What the rows of `plans.unit_scores` rank whole units by: weights, derivatives, activations."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from pruneopt import _tree
from pruneopt.capture.experts import adds, contributions
from pruneopt.capture.products import energies, products
from pruneopt.capture.statistics import Statistics, capture
from pruneopt.constraints.coupled import Members
from pruneopt.curvature.fisher import projected_fisher
from pruneopt.curvature.hessian import hutchinson_diagonal
from pruneopt.curvature.kronecker import Kronecker
from pruneopt.network import calls
from pruneopt.network.network import Network
from pruneopt.program.forms import Ragged
from pruneopt.program.primitives import row_of
from pruneopt.program.program import Program
from pruneopt.structure.layout import Slot, slots_of
from pruneopt.structure.operators import Operator
from pruneopt.structure.traced import Traced

Tree = Any
Groups = Sequence[Members]
Scored = dict[str, Float[np.ndarray, " units"]]
Of = Literal["all", "kernels", "makers"]


# -------------------------------------------------------------------------------------------------------- weights


def norms(
    network: Network, groups: Groups, key: Any, *, power: int = 2, root: bool = True, of: Of = "kernels"
) -> Scored:
    """(sum |w|^power)^(1/power) over the weights of each unit; without the root where `root` is False."""
    sizes = {path: np.abs(np.asarray(w, np.float64)) ** power for path, w in _tree.named_leaves(network.chosen)}
    total = {group.name: pooled(counted(network, group, of), sizes) for group in groups}
    return {name: x ** (1 / power) if root else x for name, x in total.items()}


def random(network: Network, groups: Groups, key: Any) -> Scored:
    """Uniform draws."""
    draw = np.asarray(jax.random.uniform(key, (sum(group.size for group in groups),)), np.float64)
    ends = np.cumsum([group.size for group in groups])[:-1]
    return {group.name: part for group, part in zip(groups, np.split(draw, ends), strict=True)}


def norm_scales(network: Network, groups: Groups, key: Any) -> Scored:
    """sum |gamma| over the scales of a group's norms: leaves with one number a unit by which data are multiplied.

    Source: Liu et al. 2017 (Network Slimming), section 3.
    """
    program = Traced(network).of(network.batches.first).program
    named, found = dict(_tree.named_leaves(network.params)), {}
    for group in groups:
        paths = [path for path, axis in group.places if named[path].size == named[path].shape[axis]]
        scales = [path for path in paths if _multiplies(program, program.leaves[path])]
        if not scales:
            raise ValueError(
                f"group '{group.name}' has no norm's scale: no leaf with one number a unit multiplies data; leave it "
                "out of groups=, or pass a row such as method='unit_l2'"
            )
        found[group.name] = pooled(group, {path: np.abs(np.asarray(named[path], np.float64)) for path in scales})
    return found


def _multiplies(program: Program, leaf: int) -> bool:
    """Whether data are multiplied by a leaf, laid out otherwise, multiplied or divided by others: gamma, and no
    variance, which stands under a root.
    """
    scales = {leaf}
    for equation in program.equations:
        name, inputs = equation.primitive.name, equation.inputs
        which = [i for i, a in enumerate(inputs) if isinstance(a, int) and a in scales]
        if not which:
            continue
        if name == "mul" and any(map(program.is_data, inputs)):
            return True
        if name == "mul" or (name == "div" and which == [0]) or (row_of(equation).layout is not None and which == [0]):
            scales.update(equation.outputs)
    return False


# ---------------------------------------------------------------------------------------------------- derivatives


def first_order(network: Network, groups: Groups, key: Any) -> Scored:
    """|sum g w| over all that is decided of each unit, g the gradient of the mean loss: to first order what the loss
    changes by when the unit goes.

    Source: Molchanov et al. 2019, equation 8, without the square.
    """
    network.check_loss()
    fn, chosen, rest, stream = network.parts
    products = jax.tree.map(
        lambda g, w: np.asarray(g, np.float64) * np.asarray(w, np.float64),
        calls.mean_gradient(fn, chosen, rest, stream),
        chosen,
    )
    named = dict(_tree.named_leaves(products))
    return {group.name: np.abs(pooled(group, named)) for group in groups}


@dataclass(frozen=True)
class _PerUnit:
    """(g, w) -> the sums of g w over each unit, group after group."""

    groups: tuple[Members, ...]

    def __call__(self, gradient: Tree, chosen: Tree) -> Float[Array, " units"]:
        wide = lambda x: x.astype(_tree.wide(x.dtype))  # noqa: E731
        products = dict(_tree.named_leaves(jax.tree.map(lambda g, w: wide(g) * wide(w), gradient, chosen)))
        parts = []
        for group in self.groups:
            total: Any = 0.0
            for (path, axis), places in group.places.items():
                if path in products:
                    x = products[path].sum(tuple(k for k in range(products[path].ndim) if k != axis))
                    owner = np.where(places >= 0, places, group.size)
                    total += jax.ops.segment_sum(x, owner, group.size + 1)[:-1]
            parts.append(total)
        return jnp.concatenate(parts)


def fisher(network: Network, groups: Groups, key: Any) -> Scored:
    """1/2 mean over examples of (sum g_i w)^2, g_i the gradient of example i's loss: what the loss rises by in the
    metric of the empirical Fisher when the unit goes, all its weights together.

    Source: Theis et al. 2018, equation 6; Liu et al. 2021 (Group Fisher), on coupled units.
    """
    network.check_loss()
    found = 0.5 * projected_fisher(*network.given, project=_PerUnit(tuple(groups)))
    ends = np.cumsum([group.size for group in groups])[:-1]
    return {group.name: part for group, part in zip(groups, np.split(found, ends), strict=True)}


def kronecker(network: Network, groups: Groups, key: Any) -> Scored:
    """1/2 sum over operators of <w_u, (A (x) S) w_u>, w_u what an operator's matrix holds of the unit: outputs of those
    that make it, inputs of those that read it; A and S their Kronecker factors.

    Source: Wang et al. 2019 (EigenDamage), section 3.1, Kron-OBD, on coupled units.
    """
    read = {path for op in Traced(network).of(network.batches.first).operators for path in op.paths}
    decided = {path for path, _ in _tree.named_leaves(network.chosen)} & read
    fn, params, batches, _ = network.given
    h = Kronecker.of(fn, params, batches, lambda path, _: path in decided)
    named = dict(_tree.named_leaves(params))
    weights = np.concatenate([np.asarray(named[path], np.float64).ravel() for path in h.layout.paths])
    found = {}
    for group in groups:
        ids = [
            np.concatenate(
                [_owners(group, (path, axis), path_, shape).ravel()
                 for path_, shape in zip(h.layout.paths, h.layout.shapes, strict=True)]
            )
            for path, axis in group.places
            if path in decided
        ]  # fmt: skip
        total = np.zeros(group.size)
        for a, s, at in zip(h.inputs, h.outputs, h.entries, strict=True):
            owners = [every[np.asarray(at)] for every in ids]
            for e, (a_, s_) in enumerate(zip(np.asarray(a, float), np.asarray(s, float), strict=True)):
                each = [one[e] for one in owners if np.any(one[e] >= 0)]
                total += _forms(weights[np.asarray(at)[e]], a_, s_, each, group.size)
        found[group.name] = 0.5 * total
    return found


def _forms(w: np.ndarray, a: np.ndarray, s: np.ndarray, owners: list[np.ndarray], size: int) -> np.ndarray:
    """<w_u, A w_u S> of each unit u."""
    found = np.zeros(size)
    for u in range(size) if owners else ():
        own = np.any([one == u for one in owners], axis=0)
        rows, columns = np.flatnonzero(own.any(1)), np.flatnonzero(own.any(0))
        part = (w * own)[np.ix_(rows, columns)]
        found[u] = np.sum(part * (a[np.ix_(rows, rows)] @ part @ s[np.ix_(columns, columns)]))
    return found


def hessian_traces(network: Network, groups: Groups, key: Any, *, of: Of = "kernels") -> Scored:
    """|tr(H_uu)| / n_u ||w_u||^2 / 2, w_u the n_u weights of each unit and H_uu their block of the Hessian of the mean
    loss, its trace by 8 Hutchinson probes.

    Source: Yu et al. 2022 (HAP), equation 5; there of="makers", the weights that make a channel.
    """
    network.check_loss()
    diagonal = dict(_tree.named_leaves(hutchinson_diagonal(*network.given, key=key).values))
    named = {path: np.asarray(w, np.float64) for path, w in _tree.named_leaves(network.chosen)}
    found = {}
    for group in groups:
        part = counted(network, group, of)
        trace = pooled(part, {path: np.asarray(h, np.float64) for path, h in diagonal.items()})
        many = pooled(part, {path: np.ones_like(w) for path, w in named.items()})
        found[group.name] = (
            0.5 * np.abs(trace) / np.maximum(many, 1) * pooled(part, {p: w**2 for p, w in named.items()})
        )
    return found


# ---------------------------------------------------------------------------------------------------- activations


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
    readers = [_readers(group, slots) for group in groups]
    for group, each in zip(groups, readers, strict=True):
        if not each:
            raise ValueError(
                f"group '{group.name}': no product with weights reads its units, so that nothing is known of what "
                "enters one; pass a row of weights or derivatives, such as method='unit_l2' or 'unit_taylor'"
            )
    paths = {path for each in readers for slot, _ in each for path in slot.paths}
    sorted_rows = any(isinstance(slot.operators[0].uses[0].form, Ragged) for each in readers for slot, _ in each)
    words: dict[str, Any] = {"means": True, "activations": True, "gram": sorted_rows}
    fn, params, batches, _ = network.given
    statistics = capture(fn, params, batches, leaves=lambda path, _: path in paths, **words)
    found = []
    for group, each in zip(groups, readers, strict=True):
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
        own = [(slot.operators[0], units) for slot, units in _readers(group, slots) if _is_of_experts(units)]
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


# -------------------------------------------------------------------------------------------------- whose entries


def pooled(group: Members, named: dict[str, np.ndarray]) -> Float[np.ndarray, " units"]:
    """Sums over what each unit owns of these leaves; an entry that it owns along two axes counts twice."""
    total = np.zeros(group.size)
    for (path, axis), places in group.places.items():
        if path in named:
            sums = named[path].sum(tuple(k for k in range(named[path].ndim) if k != axis))
            np.add.at(total, places[places >= 0], sums[places >= 0])
    return total


def counted(network: Network, group: Members, of: Of) -> Members:
    """The members whose weights count: all that is decided, kernels (leaves of two or more axes), or the kernels of the
    operators that make the units; all where there are no kernels.
    """
    chosen = dict(_tree.named_leaves(network.chosen))
    every = {at: places for at, places in group.places.items() if at[0] in chosen}
    if of == "makers":
        graph = Traced(network).of(network.batches.first)
        slots = slots_of(graph.operators, dict(_tree.named_leaves(network.params)))
        kept = {at: places for at, places in every.items() if any(_makes(group, at, slot) for slot in slots)}
    else:
        kept = {at: p for at, p in every.items() if of == "all" or sum(n > 1 for n in chosen[at[0]].shape) > 1}
    return Members(group.name, group.size, kept or every)


def _owners(group: Members, at: tuple[str, int], path: str, shape: tuple[int, ...]) -> np.ndarray:
    """The unit of each entry of a leaf, as one member says; -1 for none."""
    if path != at[0]:
        return np.full(shape, -1, np.int32)
    along = [-1 if k == at[1] else 1 for k in range(len(shape))]
    return np.broadcast_to(group.places[at].astype(np.int32).reshape(along), shape)


def _of_matrix(group: Members, at: tuple[str, int], slot: Slot) -> np.ndarray:
    """The unit of each entry of a slot's matrices (problems, n_in, n_out)."""
    leaves = {p: _owners(group, at, p, shape) for p, shape in zip(slot.paths, slot.leaf_shapes, strict=True)}
    return np.asarray(slot.stack(leaves)).reshape(slot.problems, *slot.shape[-2:])


def _readers(group: Members, slots: Sequence[Slot]) -> list[tuple[Slot, np.ndarray]]:
    """The operators of which rows are a unit's, and the unit of each input (problems, n_in)."""
    found = []
    for slot in slots:
        for at in group.places:
            if at[0] in slot.paths:
                units = _of_matrix(group, at, slot)
                if np.any(units >= 0) and np.all(units == units[:, :, :1]):
                    found.append((slot, units[:, :, 0]))
    return found


def _makes(group: Members, at: tuple[str, int], slot: Slot) -> bool:
    """Whether columns of an operator are a unit's."""
    if at[0] not in slot.paths:
        return False
    units = _of_matrix(group, at, slot)
    return bool(np.any(units >= 0) and np.all(units == units[:, :1]))


BY_ACTIVATION = {
    name: partial(activations, of=of)
    for name, of in (
        ("apoz", "nonzero"),
        ("activation_mean", "absolute"),
        ("activation_variance", "variance"),
        ("activation_rms", "rms"),
        ("flap", "fluctuation"),
    )
}
