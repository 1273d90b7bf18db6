"""What the rows of `plans.unit_scores` rank whole units by: their weights and the derivatives of the loss."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from pruneopt import _tree
from pruneopt.constraints.members import Members
from pruneopt.curvature.fisher import projected_fisher
from pruneopt.curvature.hessian import hutchinson_diagonal
from pruneopt.curvature.kronecker import Kronecker
from pruneopt.network import calls
from pruneopt.network.network import Network
from pruneopt.plans.unit_parts import Of, counted, owners_of, pooled
from pruneopt.program.primitives import row_of
from pruneopt.program.program import Program
from pruneopt.structure.traced import Traced

Tree = Any
Groups = Sequence[Members]
Scored = dict[str, Float[np.ndarray, " units"]]
_PROBES = 8  # sign vectors of a trace, one at a time: see `curvature.streamed.over_rows`


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
                [owners_of(group, (path, axis), path_, shape).ravel()
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
    probes = [hutchinson_diagonal(*network.given, probes=1, key=k).values for k in jax.random.split(key, _PROBES)]
    mean = jax.tree.map(lambda *each: sum(np.asarray(h, np.float64) for h in each) / _PROBES, *probes)
    diagonal = dict(_tree.named_leaves(mean))
    named = {path: np.asarray(w, np.float64) for path, w in _tree.named_leaves(network.chosen)}
    found = {}
    for group in groups:
        part = counted(network, group, of)
        trace = pooled(part, diagonal)
        many = pooled(part, {path: np.ones_like(w) for path, w in named.items()})
        found[group.name] = (
            0.5 * np.abs(trace) / np.maximum(many, 1) * pooled(part, {p: w**2 for p, w in named.items()})
        )
    return found
