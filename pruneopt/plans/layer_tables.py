"""What the network loses with one leaf at a time at each sparsity, what that costs, and counts from an allocation."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from tqdm import tqdm

from pruneopt import _tree
from pruneopt.allocation.tables import Tables
from pruneopt.capture.calibration import Calibration
from pruneopt.constraints.by_path import ByPath
from pruneopt.constraints.cardinality import Cardinality
from pruneopt.constraints.shares import counted
from pruneopt.network.batches import Source
from pruneopt.network.leaves import Choice, as_key, check_like
from pruneopt.network.network import Network
from pruneopt.plans.layer_task import LayerTask
from pruneopt.plans.levels import Levels, Measure, kl
from pruneopt.plans.methods import Asked, LayerMethod, layer_row
from pruneopt.structure.cost import cost
from pruneopt.structure.defaults import network_of
from pruneopt.structure.traced import Traced

Tree = Any
SPARSITIES = tuple(k / 20 for k in range(20))


@_tree.on_host
def layer_levels(
    fn: Callable[[Tree, Any], Any],
    params: Tree,
    batches: Source,
    *,
    sparsities: Sequence[float] = SPARSITIES,
    method: Asked = "balanced",
    base: Tree = None,
    weights: Callable[[Any], Any] | None = None,
    leaves: Choice = None,
    key: jax.Array | int | None = None,
    progress: bool = True,
) -> Levels:
    """For each leaf and each sparsity what `plans.layerwise` would solve for it in the network `base`.

    One pass over the network takes the Gram of each operator's inputs once, for all sparsities. Every sparsity is a
    problem of its own, solved anew, as the pass that follows an allocation solves it: supports are nested for methods
    that rank weights, and not for others. All is held at once, on the host: as many times the chosen leaves as there
    are sparsities.

    fn: outputs (or a loss) of params and a batch. sparsities: in [0, 1), the levels of each leaf; an operator's share
        of its leaf is in proportion. method: a layer method or a solver, as `layerwise` takes it, with one damping.
    base: params of a network around which each leaf is changed, such as one pruned uniformly; default params. Inputs
        are the base's, targets the method's own: of the dense network where it says so. What leaves lose together is
        closer to a sum near a base than far from it.
    weights, leaves, key: as of `layerwise`.
    Raises ValueError for sparsities outside [0, 1) or none, a method that is centred, an operator of several leaves,
    whose counts no leaf has of its own, and what `layerwise` raises.
    """
    steps, row = _checked(sparsities), layer_row(method)
    if row.centred:
        raise ValueError("method is centred, and moves biases with each level; pass it with centred=False")
    network = network_of(fn, params, batches, leaves)
    if base is not None:
        check_like(base, params, "base")
    plan = _Pass(network, params if base is None else base, row, steps, weights)
    values: dict[str, list[dict[str, np.ndarray]]] = {path: [] for path in plan.sizes}
    relative: dict[str, list[float]] = {path: [] for path in plan.sizes}
    for path, leaf, error in plan.go(as_key(key), progress):
        values[path].append({path: np.asarray(leaf)})
        relative[path].append(error)
    labels, around = dict.fromkeys(values, steps), params if base is None else base
    return Levels(fn, params, around, labels, values, relative, plan.starts, *plan.costs())


def layer_tables(
    fn: Callable[[Tree, Any], Any],
    params: Tree,
    batches: Source,
    measured: Source,
    *,
    sparsities: Sequence[float] = SPARSITIES,
    method: Asked = "balanced",
    measure: Measure = kl,
    leaves: Choice = None,
    key: jax.Array | int | None = None,
    progress: bool = True,
) -> Tables:
    """{leaf: what the network loses with that leaf alone at each sparsity} and the costs, for `allocation.allocate`.

    `layer_levels(...)`, which says how leaves are pruned, then `measured(...)` on other examples: the mean of
    `measure(outputs of params, outputs with the leaf pruned)`, `kl` of logits, `squared` for others. What leaves lose
    together is not their sum: the allocation's `error` is a prediction to be measured.

    Costs: "weights", kept of the chosen leaves; "flops", 2 x multiply-adds of kept weights on the first batch; "bytes",
    of the values kept, no index counted. Of the last two what the rest of the network costs is `fixed`.
    """
    words: dict[str, Any] = {"sparsities": sparsities, "method": method, "leaves": leaves, "key": key}
    found = layer_levels(fn, params, batches, **words, progress=progress)
    return found.measured(measured, measure, progress=progress)


def budgets(tables: Tables, levels: Mapping[str, int], total: int | None = None) -> ByPath:
    """The counts of "weights" at these levels, a leaf each: a constraint for `layerwise` and `prune`.

    tables: of `layer_tables`. levels: {leaf: number of its level}, such as an `Allocation`'s. total: how many weights
        are to be kept in all; what the levels leave of it goes to the leaf that loses least for each weight on the way
        to its next denser level, then to the next one, so that no leaf passes that level before all are at theirs.
    Raises ValueError for tables without "weights", for a total below what the levels keep or above the densest ones'.
    """
    if "weights" not in tables.costs:
        raise ValueError(f"tables know {', '.join(tables.costs)} and no 'weights'; pass those of plans.layer_tables")
    rows = {path: np.asarray(tables.costs["weights"][path]).round().astype(int) for path in levels}
    at = dict(levels)
    counts = {path: int(rows[path][level]) for path, level in at.items()}
    left = 0 if total is None else total - sum(counts.values())
    most = sum(int(row.max()) for row in rows.values())
    if left < 0 or left > most - sum(counts.values()):
        raise ValueError(
            f"total={total} is outside {sum(counts.values())} to {most}, what these levels and the densest keep"
        )
    while left:
        steps = {path: after for path, level in at.items() if (after := _denser(rows[path], level)) is not None}
        saves = {}
        for path, after in steps.items():
            saved = tables.errors[path][at[path]] - tables.errors[path][after]
            saves[path] = saved / (rows[path][after] - rows[path][at[path]])
        for path in sorted(saves, key=saves.__getitem__, reverse=True):
            more = min(left, int(rows[path][steps[path]]) - counts[path])
            counts[path], at[path], left = counts[path] + more, steps[path], left - more
    return counted(counts)


def _denser(row: np.ndarray, level: int) -> int | None:
    """The level with the next larger count."""
    above = np.flatnonzero(row > row[level])
    return int(above[row[above].argmin()]) if len(above) else None


def _checked(sparsities: Sequence[float]) -> tuple[float, ...]:
    found = tuple(float(s) for s in sparsities)
    if not found or not all(0 <= s < 1 for s in found) or len(set(found)) < len(found):
        raise ValueError(f"sparsities={sparsities!r}: pass different numbers in [0, 1), such as (0.25, 0.5, 0.75)")
    return found


class _Pass:
    """One pass over a network whose weights stay as they are, each operator solved at every sparsity on the way."""

    def __init__(
        self,
        network: Network,
        base: Tree,
        row: LayerMethod,
        sparsities: tuple[float, ...],
        weights: Callable[[Any], Any] | None,
    ):
        self._before, self._base = (dict(_tree.named_leaves(tree)) for tree in (network.params, base))
        self._traced = Traced(network)
        dense = None if row.target == "layer" else self._before
        self._stream = Calibration(self._traced, network.batches, weights, dense, row.target == "stream")
        self._operators = self._traced.chosen(self._traced.first)
        several = next((op for op in self._operators if len(op.paths) > 1), None)
        if several is not None:
            raise ValueError(
                f"leaves: '{several.name}' is made of {len(several.paths)} leaves, so that none has counts of its own; "
                "leave them out"
            )
        self._of: dict[str, list[int]] = {}
        for i, op in enumerate(self._operators):
            self._of.setdefault(op.paths[0], []).append(i)
        self.sizes = {path: int(self._covered(path).sum()) for path in self._of}
        self.starts = {path: self._operators[own[0]].name for path, own in self._of.items()}
        self._allowed = [Cardinality(sparsity=s, per="leaf", floor=0) for s in sparsities]
        first = LayerTask(self._operators, self._before, self._allowed[0], row, (row.damping,))
        self._tasks = [first, *(first.under(constraint) for constraint in self._allowed[1:])]
        for task in self._tasks:
            task.check()

    def go(self, key: jax.Array, progress: bool) -> Iterator[tuple[str, Any, float]]:
        """(path, the leaf, the layers' relative error), level after level of a leaf once its operators are solved."""
        matrices: dict[int, list[Any]] = {}
        lost: dict[int, list[float]] = {}
        with tqdm(total=len(self._operators), desc="levels", unit="layer", disable=not progress) as bar:
            for number, cut in enumerate(self._stream.cuts):
                self._stream.advance(number, self._base)
                sums = self._stream.sums(number, self._base)
                for i in cut.operators:
                    drawn = jax.random.fold_in(key, i)
                    solved = [task.solve(i, sums[i], None, False, drawn) for task in self._tasks]
                    matrices[i] = [jnp.stack([s.value for s in found]) for found, _, _ in solved]
                    lost[i] = [facts["relative_error"] for _, _, facts in solved]
                    bar.update()
                    path = self._operators[i].paths[0]
                    own = self._of[path]
                    if all(j in lost for j in own):
                        sizes = [self._operators[j].size for j in own]
                        for level in range(len(self._tasks)):
                            error = float(np.average([lost[j][level] for j in own], weights=sizes))
                            yield path, self._leaf(path, matrices, level), error
                        for j in own:
                            del matrices[j]

    def costs(self) -> tuple[dict[str, dict[str, list[float]]], dict[str, float]]:
        """What each level costs of each resource, and what is spent besides."""
        graph = self._traced.first
        whole = cost(graph)
        flops = {path: sum(self._operators[i].flops for i in own) for path, own in self._of.items()}
        kept = {path: [c.kept_of(size) for c in self._allowed] for path, size in self.sizes.items()}
        item = {path: np.dtype(self._before[path].dtype).itemsize for path in self.sizes}
        costs = {
            "weights": {path: [float(k) for k in row] for path, row in kept.items()},
            "flops": {path: [flops[path] * k / self.sizes[path] for k in row] for path, row in kept.items()},
            "bytes": {path: [float(k * item[path]) for k in row] for path, row in kept.items()},
        }
        rest = whole.bytes - sum(self.sizes[path] * item[path] for path in self.sizes)
        return costs, {"weights": 0.0, "flops": float(whole.flops - sum(flops.values())), "bytes": float(rest)}

    def _covered(self, path: str) -> np.ndarray:
        """Which entries of a leaf its operators read."""
        read = np.zeros(math.prod(np.shape(self._before[path])), bool)
        for i in self._of[path]:
            read[self._operators[i].places().reshape(-1)] = True
        return read

    def _leaf(self, path: str, matrices: Mapping[int, list[Any]], level: int) -> Any:
        leaves = dict(self._base)
        for i in self._of[path]:
            leaves |= self._operators[i].to_leaves(matrices[i][level], leaves)
        return leaves[path]
