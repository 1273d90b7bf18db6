"""How much each leaf can lose: the loss against the sparsity of one leaf at a time."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import jax
from tqdm import tqdm

from pruneopt import _tree
from pruneopt.constraints.cardinality import Cardinality
from pruneopt.network.batches import Source
from pruneopt.network.leaves import Choice, as_key
from pruneopt.network.network import Network
from pruneopt.objectives.loss import Loss
from pruneopt.plans.layerwise import layerwise
from pruneopt.plans.methods import Asked, LayerMethod, Method, weight_row
from pruneopt.problem import Problem
from pruneopt.solve import solve
from pruneopt.solvers.score import Score
from pruneopt.structure.defaults import network_of

Tree = Any


@dataclass(frozen=True)
class Sensitivity:
    """Loss against sparsity, leaf by leaf.

    levels: sparsities. losses: {path: the mean loss at each level with that leaf alone pruned}. dense: unpruned.
    """

    levels: tuple[float, ...]
    losses: dict[str, tuple[float, ...]]
    dense: float

    def __str__(self) -> str:
        width = max(len(path) for path in self.losses)
        head = " ".join(f"{level:>9.0%}" for level in self.levels)
        rows = [f"{path:<{width}} " + " ".join(f"{x:>9.4g}" for x in row) for path, row in self.losses.items()]
        return "\n".join([f"{'loss at sparsity':<{width}} {head}", *rows, f"dense loss {self.dense:.4g}"])

    def plot(self, axes: Any = None) -> Any:
        """Draw one curve a leaf on matplotlib `axes` (new ones by default); returns the axes."""
        if axes is None:
            import matplotlib.pyplot as plt

            axes = plt.subplots()[1]
        for path, row in self.losses.items():
            axes.plot([100 * level for level in self.levels], row, marker=".", label=path)
        axes.axhline(self.dense, color="grey", linestyle=":", label="dense")
        axes.set(xlabel="sparsity of that leaf alone (%)", ylabel="loss", title="Sensitivity")
        axes.legend(fontsize="small")
        return axes


@_tree.on_host
def sensitivity(
    fn: Callable[[Tree, Any], Any],
    params: Tree,
    batches: Source,
    levels: Sequence[float] = (0.25, 0.5, 0.75, 0.9, 0.95),
    *,
    method: Asked = "magnitude",
    leaves: Choice = None,
    key: jax.Array | None = None,
    progress: bool = True,
) -> Sensitivity:
    """The mean loss with one leaf pruned to each of `levels` by `method`, all others dense.

    fn: loss(params, batch) -> scalar, a mean over examples. levels: sparsities in [0, 1). The method's model is built
    at the dense weights: once where the method ranks weights of the whole network, for each leaf where it moves them to
    make up for what goes, since that depends on what else goes. Raises what `prune` raises.
    Source: Han et al. 2015, section 3.4.
    """
    levels = tuple(float(level) for level in levels)
    if not levels:
        raise ValueError("levels is empty; pass sparsities such as (0.5, 0.9)")
    constraints = [Cardinality(sparsity=level, per="leaf", floor=0) for level in levels]
    network, row, key = network_of(fn, params, batches, leaves), weight_row(method), as_key(key)
    chosen, loss = network.chosen, Loss(*network.given)
    dense = loss.finite_value(chosen)

    def pruned(which: Choice) -> list[dict[str, Any]]:
        if isinstance(row, LayerMethod):
            words: dict[str, Any] = {"leaves": which, "key": key, "progress": False}
            found = [layerwise(*network.given[:3], c, row, **words).params for c in constraints]
        else:
            model = row.model(Network.of(fn, params, network.batches, which), key)
            found = [solve(Problem(model, subject_to=c), row.solver, key=key).value for c in constraints]
        return [dict(_tree.named_leaves(value)) for value in found]

    paths = [path for path, _ in _tree.named_leaves(chosen)]
    ranks = isinstance(row, Method) and isinstance(row.solver, Score)
    together = pruned(network.leaves) if ranks else None
    losses: dict[str, tuple[float, ...]] = {}
    for path in tqdm(paths, desc="sensitivity", unit="leaf", disable=not progress):
        cut = pruned(lambda name, _, p=path: name == p) if together is None else together
        alone = [_tree.map_named(lambda name, w, c=c, p=path: c[p] if name == p else w, chosen) for c in cut]
        losses[path] = tuple(loss.value(w) for w in alone)
    return Sensitivity(levels, losses, dense)
