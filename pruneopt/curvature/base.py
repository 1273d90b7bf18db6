"""What a curvature is: the matrix H of a quadratic model, never formed unless asked for."""

from __future__ import annotations

import abc
import math
from functools import cached_property
from typing import Any

import numpy as np

from pruneopt import _linalg

Tree = Any
# Rounding: Cholesky of a semidefinite matrix of n columns needs (n + 1) eps tr(H) at worst (Higham 2002, theorem 10.3);
# 36 random ones of 20 to 1,200 columns, of ranks from 1 and columns of unlike sizes, needed 3.
_SLACK = 10


class Curvature(abc.ABC):
    """A symmetric operator H on trees, the curvature of a mean loss.

    Its class states its structure, so a solver asks by type. Subclasses are final frozen dataclasses, registered
    as pytrees whose leaves are their arrays. Where they exist: `block(which)`, `dense()`, `solve(b, ridge)`.
    """

    @cached_property
    def semidefinite(self) -> bool:
        """Whether H is known to be positive semidefinite: by its form, or since its numbers were checked."""
        return False

    @abc.abstractmethod
    def mv(self, direction: Tree) -> Tree:
        """H d, in the shapes of `direction`."""

    @abc.abstractmethod
    def diagonal(self, like: Tree) -> Tree:
        """The diagonal of H: for each leaf of `like` an array that broadcasts to its shape, float32 at least:
        squares of gradients that a half-precision weight sees are often below its smallest number."""

    @abc.abstractmethod
    def form(self, w: Tree, center: Tree, ridge: float) -> float:
        """<d, (H + ridge I) d> for d = w - center, in float64 whatever JAX's mode."""


def is_semidefinite(matrix: np.ndarray) -> bool:
    """Whether H + 10 eps tr(H) I has a Cholesky factor in float64, eps its rounding."""
    h = np.array(matrix, np.float64)
    h[np.diag_indices(len(h))] += _SLACK * np.finfo(np.float64).eps * np.trace(h)
    try:
        _linalg.cholesky(h)
    except np.linalg.LinAlgError:
        return not np.any(h)
    return True


def check_ridge(ridge: float) -> None:
    """Raise ValueError unless a ridge is a finite number >= 0."""
    if not 0 <= ridge < math.inf:
        raise ValueError(f"ridge={ridge!r} is not a finite number >= 0; pass one, such as 1e-3")


def check_memory(what: str, shape: tuple[int, ...], dtype: Any, memory: int, instead: str) -> None:
    """Raise ValueError where an array takes more than `memory` bytes, with the bytes and what to do instead."""
    needed = math.prod(shape) * np.dtype(dtype).itemsize
    if needed > memory:
        raise ValueError(
            f"{what} takes {needed:,} bytes ({' x '.join(map(str, shape))}), above memory={memory:,}; {instead}, or "
            "pass memory= to allow it"
        )
