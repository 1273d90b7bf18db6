"""How much lives: a sparsity or a count, and a count shared out over parts."""

from __future__ import annotations

from collections.abc import Sequence
from numbers import Real


def check_amount(sparsity: float | None, count: int | None) -> None:
    """Raise ValueError unless exactly one of `sparsity` in [0, 1) and a whole `count` >= 0 is given."""
    if (sparsity is None) == (count is None):
        given = "neither was" if sparsity is None else f"both were (sparsity={sparsity}, count={count})"
        raise ValueError(f"sparsity and count: {given} given; pass exactly one of them")
    is_number = isinstance(sparsity, Real) or getattr(sparsity, "shape", None) == ()
    if sparsity is not None and not (is_number and 0 <= sparsity < 1):
        raise ValueError(
            f"sparsity={sparsity!r} is outside [0, 1); pass the fraction of weights to remove, such as 0.9"
        )
    if count is not None and (isinstance(count, bool) or not hasattr(count, "__index__") or count < 0):
        raise ValueError(f"count={count!r} is not a whole number >= 0; pass the number of weights to keep")


def in_proportion(total: int, sizes: Sequence[int], least: Sequence[int]) -> list[int]:
    """`total` in proportion to `sizes`, to the unit: the largest remainders get one more, the first of equal ones.

    Nobody gets less than `least`, at the cost of who has most above it.
    """
    whole = sum(sizes)
    counts = [total * size // whole for size in sizes]
    by_remainder = sorted(range(len(sizes)), key=lambda i: -(total * sizes[i] % whole))
    for i in by_remainder[: total - sum(counts)]:
        counts[i] += 1
    for i, wanted in enumerate(least):
        while counts[i] < wanted:
            counts[max(range(len(counts)), key=lambda j: counts[j] - least[j])] -= 1
            counts[i] += 1
    return counts
