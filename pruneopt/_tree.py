"""Arithmetic on pytrees. A `None` in a tree is a hole: a leaf that a problem does not decide."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from pruneopt import _linalg

Tree = Any


def is_array(leaf: Any) -> bool:
    """Whether `leaf` is a NumPy or JAX array (not a Python scalar, key array or function)."""
    if isinstance(leaf, jax.Array):
        return not jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)
    return isinstance(leaf, np.ndarray) and leaf.dtype != object


def wide(dtype: Any) -> Any:
    """The dtype to compute in: float64 for float64, else float32."""
    return np.dtype(np.float64) if dtype == np.float64 else np.dtype(np.float32)


def name(key_path: tuple) -> str:
    """The path of a leaf as text: `conv1/kernel`."""
    return jax.tree_util.keystr(key_path, simple=True, separator="/")


def named_leaves(tree: Tree) -> list[tuple[str, Any]]:
    """[(path, leaf)] in leaf order."""
    return [(name(path), leaf) for path, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]]


def map_named(fn: Callable[..., Any], tree: Tree, *rest: Tree) -> Tree:
    """`jax.tree.map` whose function also receives the leaf's path as its first argument."""
    return jax.tree_util.tree_map_with_path(lambda path, *leaves: fn(name(path), *leaves), tree, *rest)


def size(tree: Tree) -> int:
    """Number of entries over all leaves, a Python integer."""
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(tree))


def dot(a: Tree, b: Tree) -> jax.Array:
    """Sum over all leaves of <a, b>."""
    products = jax.tree.map(lambda x, y: jnp.sum(x * y), a, b)
    return sum(jax.tree.leaves(products), jnp.zeros(()))


def masked(tree: Tree, support: Tree) -> Tree:
    """`tree` with +0 wherever `support` is False; a `None` in `support` leaves its leaf as it is.

    Leaves keep their type: a NumPy leaf comes back as a NumPy array of the same dtype.
    """

    def one(mask, leaf):
        if mask is None:
            return leaf
        if isinstance(leaf, np.ndarray):
            return np.where(np.asarray(mask), leaf, np.zeros((), leaf.dtype))
        return _where_kept(mask, leaf)

    return jax.tree.map(one, support, tree, is_leaf=lambda x: x is None)


@jax.jit
def _where_kept(mask: jax.Array, leaf: jax.Array) -> jax.Array:
    return jnp.where(mask, leaf, jnp.zeros((), leaf.dtype))


@jax.jit
def _true(leaf: jax.Array) -> jax.Array:
    return _linalg.blocked_sum(lambda x: x.astype(jnp.uint32), leaf)


@jax.jit
def _outside(leaf: jax.Array, mask: jax.Array) -> jax.Array:
    return _linalg.blocked_sum(lambda x, m: ((x != 0) & ~m).astype(jnp.uint32), leaf, mask)


@jax.jit
def _nonfinite(leaf: jax.Array) -> jax.Array:
    return _linalg.blocked_sum(lambda x: (~jnp.isfinite(x)).astype(jnp.uint32), leaf)


def kept(support: Tree) -> int:
    """Number of True entries over all leaves, summed in Python integers."""
    return sum(int(_true(leaf)) for leaf in jax.tree.leaves(support))


def outside(tree: Tree, support: Tree) -> int:
    """Number of nonzero entries of `tree` where `support` is False, summed in Python integers."""
    pairs = zip(jax.tree.leaves(tree), jax.tree.leaves(support), strict=True)
    return sum(int(_outside(leaf, mask)) for leaf, mask in pairs)


@jax.jit
def _dropped(leaf: jax.Array, mask: jax.Array) -> jax.Array:
    return _linalg.blocked_sum(lambda x, m: jnp.where(m, 0.0, x.astype(jnp.float64)), leaf, mask)


def dropped(tree: Tree, support: Tree) -> float:
    """Sum of the entries of `tree` where `support` is False, in float64 whatever JAX's mode."""
    with jax.enable_x64(True):
        pairs = zip(jax.tree.leaves(tree), jax.tree.leaves(support), strict=True)
        return sum(float(_dropped(leaf, mask)) for leaf, mask in pairs)


def first_nonfinite(tree: Tree) -> str | None:
    """Path of the first floating-point leaf that holds a NaN or an infinity, or None."""
    for path, leaf in named_leaves(tree):
        if is_array(leaf) and jnp.issubdtype(leaf.dtype, jnp.inexact) and int(_nonfinite(leaf)):
            return path
    return None
