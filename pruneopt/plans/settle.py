"""Give norms the statistics of what they see, and leave what the network computes as it is."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from pruneopt import _tree
from pruneopt.capture.affine import affine
from pruneopt.capture.calibration import Inputs, Means
from pruneopt.capture.statistics import capture
from pruneopt.network.batches import Batches, Source
from pruneopt.structure.defaults import network_of
from pruneopt.structure.traced import Traced

Tree = Any


@_tree.on_host
def settle(
    fn: Callable[[Tree, Any], Any],
    params: Tree,
    batches: Source,
    *,
    weights: Callable[[Any], Any] | None = None,
) -> Tree:
    """`params` whose norms have the mean and variance of what reaches them; scale and bias make up for the change.

    After weights were refitted the running statistics are those of other outputs: training, which normalises by the
    batch's own, would start at another network than the one that was fitted. `fn` computes the same before and after,
    to rounding; `recalibrate`, which sets statistics alone, changes it.

    fn: the network that is evaluated, norms by running statistics. batches: as training will see them, cropped and all.
    weights: of positions, as in `layerwise`.
    Norms are found where they follow an operator, whatever the writing (`capture.affine`): with a scale and a bias of
    their own. Raises ValueError where there is none, and for inputs that are not finite.
    """
    named = dict(_tree.named_leaves(params))
    graph = Traced(network_of(fn, params, batches)).of(Batches(batches).first)
    alone = {op.name: op for op in graph.operators if len(op.uses) == 1}
    norms = {name: affine(graph.program, op.uses[0], named) for name, op in alone.items()}
    norms = {name: norm for name, norm in norms.items() if norm is not None and norm.is_norm}
    if not norms:
        raise ValueError("fn has no norm by running statistics, with scale and bias, behind a product with weights")
    paths = sorted({path for name in norms for path in alone[name].paths})
    now = dict(named)
    for name, seen in capture(fn, params, batches, leaves=paths, means=True, weights=weights).items():
        if name not in norms:
            continue
        assert seen.gram is not None
        assert seen.mean is not None
        matrix = alone[name].to_matrix(named)
        each = [
            Inputs(float(n), seen.gram[min(e, len(seen.gram) - 1)], None, None, Means(seen.mean[e], None, None))
            for e, n in enumerate(np.broadcast_to(seen.count, len(matrix)))
        ]
        parts = [inputs.centred.moments(w) for inputs, w in zip(each, matrix, strict=True)]
        mean, variance = (np.concatenate(part) for part in zip(*parts, strict=True))
        now |= norms[name].settled(now, mean, variance)
    return _tree.map_named(lambda path, x: _tree.like(now[path], x), params)
