"""What a network loses on examples that are set aside, and whether they are."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from pruneopt import _store, _tree
from pruneopt.network.batches import Batches
from pruneopt.plans.levels import Measure

Tree = Any


class HeldOut:
    """measure(outputs of the dense params, outputs of others), a mean over the examples of all batches."""

    def __init__(self, fn: Callable[[Tree, Any], Any], params: Tree, probe: Batches, measure: Measure):
        self._run, self._of, self._probe = jax.jit(fn), jax.jit(measure), probe
        self._wanted = [self._run(params, batch) for batch in probe]
        self._sizes = [probe.weight(batch) for batch in probe]

    def lost(self, params: Tree) -> float:
        """The mean at these params; whatever the measure is, NaN too."""
        pairs = zip(self._wanted, self._probe, strict=True)
        each = [float(self._of(wanted, self._run(params, batch))) for wanted, batch in pairs]
        return float(np.average(each, weights=self._sizes))


def check_apart(stream: Batches, probe: Batches) -> list[str]:
    """What is said of held-out examples that are trained on. Raises ValueError where most are."""
    trained = {example for batch in stream for example in _examples(batch)}
    asked = [example for batch in probe for example in _examples(batch)]
    shared = sum(example in trained for example in asked)
    said = f"{shared} of the {len(asked)} examples of held_out are among batches"
    if 2 * shared > len(asked):
        raise ValueError(f"{said}, so that they cannot tell a fit from a gain; pass examples that no step sees")
    return [said] if shared else []


def _examples(batch: Any) -> list[str]:
    """A digest of each example of a batch, or of the whole where its arrays do not agree on them."""
    leaves = [np.asarray(leaf) for leaf in jax.tree.leaves(batch) if _tree.is_array(leaf)]
    sizes = {len(leaf) if leaf.ndim else 0 for leaf in leaves}
    if len(sizes) != 1 or sizes == {0}:
        return [_store.digest(leaves)]
    return [_store.digest([leaf[i] for leaf in leaves]) for i in range(sizes.pop())]
