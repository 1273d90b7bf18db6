"""A network with each group at each of its levels, and the tables of what that loses, for an allocation."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from tqdm import tqdm

from pruneopt import _tree
from pruneopt.allocation.tables import Tables
from pruneopt.capture.onwards import Onwards
from pruneopt.network.batches import Batches, Source
from pruneopt.structure.defaults import network_of
from pruneopt.structure.traced import Traced

Tree = Any
Measure = Callable[[Any, Any], Any]


def kl(before: Any, after: Any) -> jax.Array:
    """The mean over positions of KL(softmax(before) || softmax(after)), of logits along the last axis."""
    p, q = (jax.nn.log_softmax(jax.tree.leaves(x)[0].astype(jnp.float32), axis=-1) for x in (before, after))
    return jnp.mean(jnp.sum(jnp.exp(p) * (p - q), axis=-1))


def squared(before: Any, after: Any) -> jax.Array:
    """The squared difference of all outputs over their squares."""
    pairs = list(zip(jax.tree.leaves(before), jax.tree.leaves(after), strict=True))
    apart = sum(jnp.sum(jnp.square((a - b).astype(jnp.float32))) for b, a in pairs)
    return jnp.asarray(apart / sum(jnp.sum(jnp.square(b.astype(jnp.float32))) for b, _ in pairs))


@dataclass(frozen=True, eq=False, repr=False)
class Levels:
    """What `layer_levels` or `unit_levels` found: each group, a leaf or coupled units, pruned to each of its levels.

    labels: {group: what its levels are called, sparsities or widths}. values: {group: the leaves that each level
    changes, NumPy}. relative: {group: the relative squared error of the layer's own outputs at each}. starts: {group:
    the first operator that it changes}. costs, fixed, coupled: of the tables. base: the network around each group.
    """

    fn: Callable[[Tree, Any], Any]
    params: Tree
    base: Tree
    labels: Mapping[str, Sequence[Any]]
    values: Mapping[str, Sequence[Mapping[str, np.ndarray]]]
    relative: Mapping[str, Sequence[float]]
    starts: Mapping[str, str]
    costs: Mapping[str, Mapping[str, Any]]
    fixed: Mapping[str, float]
    coupled: Mapping[str, Mapping[tuple[str, str], Any]] = field(default_factory=dict)

    def __repr__(self) -> str:
        sizes = sorted({len(row) for row in self.labels.values()})
        return f"Levels({len(self.labels)} groups of {' or '.join(map(str, sizes))} levels)"

    def network(self, levels: Mapping[str, int]) -> Tree:
        """The base with groups {name: number of the level} as they were pruned, each for itself: nothing is refitted.

        Raises ValueError for a group or a level that is not there.
        """
        changed: dict[str, np.ndarray] = {}
        for group, level in levels.items():
            if group not in self.values or not 0 <= level < len(self.values[group]):
                raise ValueError(f"levels: {group!r} at {level!r} is not there; groups: {', '.join(self.values)[:200]}")
            changed |= self.values[group][level]
        at = lambda path, x: _tree.like(jnp.asarray(changed[path]), x) if path in changed else x  # noqa: E731
        return _tree.map_named(at, self.base)

    def reconstruction(self) -> Tables:
        """Tables of the layers' own relative errors: no pass over other examples, and no word on what they do to fn."""
        return self._tables(self.relative)

    def measured(
        self,
        measured: Source,
        measure: Measure = kl,
        *,
        around: Mapping[str, int] | None = None,
        progress: bool = True,
    ) -> Tables:
        """Tables of `measure(outputs of params, outputs with one group changed)` on examples, a mean over them.

        measure: `kl` of logits, `squared` for others, or your own. around: levels of all groups, such as an
        allocation's, to measure each group's change at: what groups lose together is closer to a sum there.
        The loss of the network around, where it has one, is shared out equally, so that a sum over all groups is that
        loss and the changes that one group at a time makes to it. Only what comes after a change is computed anew.
        Raises ValueError for a measure that is not finite, naming the group and the level.
        """
        probe, of = Batches(measured, "measured"), jax.jit(measure)
        middle = self.base if around is None else self.network(around)
        leaves, run = dict(_tree.named_leaves(middle)), jax.jit(self.fn)
        before = [jax.block_until_ready(run(self.params, batch)) for batch in probe]
        weights = [probe.weight(batch) for batch in probe]
        traced = Traced(network_of(self.fn, self.params, probe))

        def lost(outputs: Sequence[Any], where: str) -> float:
            each = [float(of(a, b)) for a, b in zip(before, outputs, strict=True)]
            if not np.all(np.isfinite(each)):
                raise ValueError(f"measure: it is {each} for {where}; repair it, or the network")
            return float(np.average(each, weights=weights))

        at = lost([run(middle, batch) for batch in probe], "the network around")
        errors: dict[str, list[float]] = {}
        for group, values in tqdm(self.values.items(), desc="measured", unit="group", disable=not progress):
            onwards = [Onwards(traced.of(batch), self.starts[group], batch, leaves) for batch in probe]
            errors[group] = []
            for level, changed in zip(self.labels[group], values, strict=True):
                outputs = [after.outputs(leaves | dict(changed)) for after in onwards]
                errors[group].append(lost(outputs, f"'{group}' at {level}") - at + at / len(self.values))
        return self._tables(errors)

    def _tables(self, errors: Mapping[str, Sequence[float]]) -> Tables:
        return Tables(errors, self.costs, self.labels, self.fixed, self.coupled)
