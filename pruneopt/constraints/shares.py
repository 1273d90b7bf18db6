"""A network's budget shared out among its leaves by their shapes alone."""

from __future__ import annotations

import fnmatch
import glob
import math
from collections.abc import Mapping, Sequence
from typing import Any

from pruneopt import _tree
from pruneopt.constraints.amount import check_amount
from pruneopt.constraints.by_path import ByPath
from pruneopt.constraints.cardinality import Cardinality
from pruneopt.network.leaves import Choice, partition

Tree = Any


def by_size(params: Tree, sparsity: float, power: float = 0.5, *, leaves: Choice = None) -> ByPath:
    """Of a leaf of n weights min(n, c n^(1 - power)) are kept: small layers, which carry more a weight, keep more.

    power: 0 is the same density everywhere, 1 the same count. leaves: default the prunable ones.
    Together exactly floor((1 - sparsity) n + 1e-9) weights, at least one a leaf. For `plans.layerwise`, which
    shares a budget over the tree out uniformly (power 0). Raises ValueError for a sparsity outside [0, 1) or one that
    keeps fewer weights than there are leaves, a power outside [0, 1].
    """
    if not 0 <= power <= 1:
        raise ValueError(f"power={power!r} is outside [0, 1]; pass 0 for equal densities, 1 for equal counts")
    shapes = _shapes(params, leaves)
    return _shared(shapes, sparsity, {path: math.prod(shape) ** (1 - power) for path, shape in shapes.items()})


def erdos_renyi(params: Tree, sparsity: float, *, leaves: Choice = None) -> ByPath:
    """Budgets for each leaf in proportion to the sum of its axes' lengths, at most all of it.

    Together exactly floor((1 - sparsity) n + 1e-9) weights, at least one a leaf. Source: Mocanu et al. 2018,
    equation 3; with kernels' window axes in the sum, Evci et al. 2020, section 3 (ERK). Raises ValueError as `by_size`.
    """
    shapes = _shapes(params, leaves)
    return _shared(shapes, sparsity, {path: float(sum(shape)) for path, shape in shapes.items()})


def arithmetic(params: Tree, sparsity: float, slope: float, blocks: Sequence[str], *, leaves: Choice = None) -> ByPath:
    """Block i of L in order of depth is pruned to sparsity + slope (i - (L - 1) / 2): an arithmetic progression.

    blocks: glob patterns of paths, the first block first, such as [f"layers/{i}/*" for i in range(L)]; all leaves of a
        block have its sparsity. slope: > 0 prunes late blocks more. Where blocks differ in size, or a sparsity would
        leave [0, 1], all are shifted by one number so that the total is met.
    Together exactly floor((1 - sparsity) n + 1e-9) weights, at least one a leaf. Source: Huang et al. 2025, equation
    10 (ATP); the slope is to be chosen on training data, as there by a search over a grid up to
    min(2 sparsity, 2 (1 - sparsity)) / (L - 1). Raises ValueError as `by_size`, and for a leaf that no block matches.
    """
    sizes = {path: math.prod(shape) for path, shape in _shapes(params, leaves).items()}
    middle = (len(blocks) - 1) / 2
    steps = [1 - sparsity - slope * (i - middle) for i in range(len(blocks))]
    return shifted(sizes, sparsity, {path: steps[block_of(path, blocks)] for path in sizes})


def block_of(path: str, blocks: Sequence[str]) -> int:
    """The first block whose pattern a path matches. Raises ValueError where there is none."""
    for i, pattern in enumerate(blocks):
        if fnmatch.fnmatchcase(path, pattern):
            return i
    raise ValueError(f"blocks: leaf '{path}' matches none of {list(blocks)}; add a pattern, or leave it out of leaves=")


def shifted(sizes: Mapping[str, int], sparsity: float, densities: Mapping[str, float]) -> ByPath:
    """Counts at these densities plus one number, which meets the total; none below 0 or above 1."""
    check_amount(sparsity, None)
    total = math.floor((1 - sparsity) * sum(sizes.values()) + 1e-9)

    def wanted(shift: float) -> dict[str, float]:
        return {path: size * min(max(densities[path] + shift, 0.0), 1.0) for path, size in sizes.items()}

    low, high = -max(densities.values()), 1 - min(densities.values())
    for _ in range(100):
        middle = (low + high) / 2
        low, high = (low, middle) if sum(wanted(middle).values()) > total else (middle, high)
    return _whole(sizes, total, wanted((low + high) / 2), sparsity)


def counted(counts: Mapping[str, int]) -> ByPath:
    """A count for each leaf, by its path taken literally; a leaf may keep none."""
    floors = {path: None if count else 0 for path, count in counts.items()}
    return ByPath({glob.escape(path): Cardinality(count=n, floor=floors[path]) for path, n in counts.items()})


def _shapes(params: Tree, leaves: Choice) -> dict[str, tuple[int, ...]]:
    return {path: tuple(leaf.shape) for path, leaf in _tree.named_leaves(partition(params, leaves)[0])}


def _shared(shapes: dict[str, tuple[int, ...]], sparsity: float, parts: dict[str, float]) -> ByPath:
    """Counts in proportion to `parts`; leaves that would be more than full are full, and the rest is shared anew."""
    check_amount(sparsity, None)
    sizes = {path: math.prod(shape) for path, shape in shapes.items()}
    total = math.floor((1 - sparsity) * sum(sizes.values()) + 1e-9)
    wanted: dict[str, float] = {}
    full: set[str] = set()
    while not full >= set(sizes):
        free = total - sum(sizes[path] for path in full)
        scale = free / sum(part for path, part in parts.items() if path not in full)
        wanted = {path: float(sizes[path]) if path in full else scale * parts[path] for path in sizes}
        over = {path for path in sizes if wanted[path] > sizes[path]}
        if not over:
            break
        full |= over
    return _whole(sizes, total, wanted, sparsity)


def _whole(sizes: Mapping[str, int], total: int, wanted: Mapping[str, float], sparsity: float) -> ByPath:
    """Whole counts that sum to `total`: the largest remainders get one more, no leaf keeps none."""
    counts = {path: min(math.floor(w + 1e-9), sizes[path]) for path, w in wanted.items()}
    by_remainder = sorted(sizes, key=lambda path: counts[path] - wanted[path])
    for path in by_remainder[: total - sum(counts.values())]:
        counts[path] += 1
    if total < len(sizes):
        least = min(counts, key=lambda path: counts[path])
        raise ValueError(
            f"sparsity={sparsity!r} keeps {total} weights for {len(sizes)} leaves, so that leaf '{least}' would keep "
            "none; lower the sparsity, or choose fewer leaves="
        )
    for path in sizes:
        if counts[path] == 0:  # a leaf keeps one at least, at the cost of the leaf that keeps most
            counts[max(counts, key=lambda path: counts[path])] -= 1
            counts[path] = 1
    return counted(counts)
