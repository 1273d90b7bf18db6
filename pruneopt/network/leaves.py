"""Which leaves of a parameter tree are pruned, and how the rest travels along untouched."""

from __future__ import annotations

import difflib
import fnmatch
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from pruneopt import _tree

Tree = Any
Choice = None | str | Sequence[str] | Callable[[str, Any], bool]

_NOT_WEIGHTS = re.compile(r"bias|norm|scale|embed", re.IGNORECASE)
_STATISTIC = re.compile(r"batch_stats|running|moving|(^|/)(mean|var)(/|$)", re.IGNORECASE)


def is_prunable(path: str, leaf: Any) -> bool:
    """The default choice where fn is unknown: floating arrays of two or more axes, neither the leaf nor its layer named
    after a bias, norm, scale or embedding (the last two names of the path count; a block called PreNorm holds prunable
    layers).
    """
    own = "/".join(path.removesuffix("/value").split("/")[-2:])
    return is_floating(path, leaf) and leaf.ndim >= 2 and not _NOT_WEIGHTS.search(own)


def is_trainable(path: str, leaf: Any) -> bool:
    """Floating arrays whose path does not name a running statistic (batch_stats, running, moving, mean, var)."""
    return is_floating(path, leaf) and not _STATISTIC.search(path)


def is_floating(path: str, leaf: Any) -> bool:
    """Floating arrays that have entries."""
    return _tree.is_array(leaf) and jnp.issubdtype(leaf.dtype, jnp.floating) and leaf.size > 0


@dataclass(frozen=True)
class Default:
    """The default choice where fn is known, for leaves=: those of these paths.

    left_out: {path: why} of the leaves that the choice by shape and name would have taken.
    """

    paths: frozenset[str]
    left_out: Mapping[str, str] = field(default_factory=dict, compare=False)

    def __call__(self, path: str, leaf: Any) -> bool:
        """Whether a leaf is chosen."""
        return path in self.paths


def is_default(leaves: Choice) -> bool:
    """Whether a choice is the library's and not the user's."""
    return leaves is None or leaves is is_prunable or isinstance(leaves, Default)


@jax.tree_util.register_pytree_node_class
class Rest:
    """The leaves that a problem does not decide: arrays are traced, everything else (functions, flags) is static."""

    def __init__(self, arrays: Tree, others: tuple[tuple[int, Any], ...], structure: Any):
        self.arrays, self.others, self.structure = arrays, others, structure

    def tree_flatten(self) -> tuple[tuple[Tree], Any]:
        """For JAX."""
        return (self.arrays,), _Static(self.others, self.structure)

    @classmethod
    def tree_unflatten(cls, static: Any, children: tuple[Tree]) -> Rest:
        """For JAX."""
        return cls(children[0], static.others, static.structure)


class _Static:
    """Leaves compared by identity, or by value where Python can."""

    def __init__(self, others: tuple[tuple[int, Any], ...], structure: Any):
        self.others, self.structure = others, structure

    def __hash__(self) -> int:
        return hash((self.structure, tuple(index for index, _ in self.others)))

    def __eq__(self, other: object) -> bool:
        return (
            isinstance(other, _Static)
            and self.structure == other.structure
            and len(self.others) == len(other.others)
            and all(
                i == j and (a is b or (type(a) is type(b) and isinstance(a, (int, float, str)) and a == b))
                for (i, a), (j, b) in zip(self.others, other.others, strict=True)
            )
        )


def partition(params: Tree, leaves: Choice = None) -> tuple[Tree, Rest]:
    """Split `params` into (chosen, rest).

    chosen: `params` with None at every leaf that is not chosen. rest: the others; `combine` puts them together.
    leaves: None (the default choice), a glob pattern or list of patterns over paths ("conv*/kernel"), or a predicate
        (path, leaf) -> bool.

    Raises ValueError for an empty tree, a pattern that matches no leaf (naming the nearest paths) or no chosen leaf;
    TypeError for a chosen leaf that is not a floating array, or is float64 while JAX is in 32-bit mode.
    """
    named, structure = jax.tree_util.tree_flatten_with_path(params)
    if not named:
        raise ValueError("params is an empty tree; pass the network's parameters")
    paths = [_tree.name(path) for path, _ in named]
    _tree.check_paths(params, "params")
    values = [leaf for _, leaf in named]
    wanted = _wanted(paths, values, leaves)
    if not any(wanted):
        kinds = {type(leaf).__name__ for leaf in values if not hasattr(leaf, "ndim") or not _tree.is_array(leaf)}
        hint = f" (some are {', '.join(sorted(kinds))}, not arrays: pass their values)" if kinds else ""
        raise ValueError(f"leaves: no prunable leaf among {_some(paths)}{hint}; name them with leaves='pattern'")
    for path, leaf, is_chosen in zip(paths, values, wanted, strict=True):
        if is_chosen:
            check_leaf(path, leaf)
    chosen = jax.tree.unflatten(structure, [v if w else None for v, w in zip(values, wanted, strict=True)])
    fixed = [(i, v) for i, (v, w) in enumerate(zip(values, wanted, strict=True)) if not w]
    arrays = {i: v for i, v in fixed if isinstance(v, (jax.Array, np.ndarray))}
    return chosen, Rest(arrays, tuple((i, v) for i, v in fixed if i not in arrays), structure)


def combine(chosen: Tree, rest: Rest) -> Tree:
    """The whole tree again; the inverse of `partition`."""
    fixed = {**rest.arrays, **dict(rest.others)}
    moving = iter(jax.tree.leaves(chosen))
    n = rest.structure.num_leaves
    return jax.tree.unflatten(rest.structure, [fixed[i] if i in fixed else next(moving) for i in range(n)])


def updated(rest: Rest, updates: Tree) -> Rest:
    """`rest` with the arrays of `updates`: a tree like the params, None at leaves and subtrees that stay.

    Raises ValueError where `updates` would replace a leaf that is being decided or is not an array.
    """
    places = jax.tree.unflatten(rest.structure, list(range(rest.structure.num_leaves)))
    arrays = dict(rest.arrays)

    def put(new: Any, place: Any) -> None:
        if new is None:
            return
        if place not in arrays:
            raise ValueError("updates: a leaf that is being trained, or is no array, has an update; pass None there")
        arrays[place] = new

    jax.tree.map(put, updates, places, is_leaf=lambda x: x is None)
    return Rest(arrays, rest.others, rest.structure)


def check_finite(tree: Tree, what: str) -> Tree:
    """`tree`, or ValueError naming `what` and the first leaf with a NaN or an infinity."""
    _tree.check_here(tree, what)
    path = _tree.first_nonfinite(tree)
    if path is not None:
        raise ValueError(f"{what} holds a NaN or an infinity in {_tree.called(path)}; repair it before pruning")
    return tree


def check_like(tree: Tree, params: Tree, what: str) -> None:
    """Raise ValueError unless `tree` has the structure and shapes of `params`."""
    if jax.tree.structure(tree) != jax.tree.structure(params):
        raise ValueError(
            f"{what} has structure {jax.tree.structure(tree)}, params has {jax.tree.structure(params)}; "
            "pass a tree of the same structure"
        )
    for (path, mine), theirs in zip(_tree.named_leaves(tree), jax.tree.leaves(params), strict=True):
        if np.shape(mine) != np.shape(theirs):
            raise ValueError(
                f"{what}: {_tree.called(path)} has shape {np.shape(mine)}, params has {np.shape(theirs)} there"
            )


def nearest(path: str, paths: Sequence[str]) -> str:
    """Existing paths as text, those most like `path` first."""
    close = difflib.get_close_matches(path, paths, n=len(paths), cutoff=0.0)
    return _some(close)


def _wanted(paths: list[str], values: list[Any], leaves: Choice) -> list[bool]:
    if leaves is None:
        leaves = is_prunable
    if callable(leaves):
        return [bool(leaves(path, leaf)) for path, leaf in zip(paths, values, strict=True)]
    if not isinstance(leaves, (str, list, tuple, set)) or not all(isinstance(p, str) for p in leaves):
        raise TypeError(f"leaves={leaves!r} is not a choice; pass a pattern, a list of them or a predicate(path, leaf)")
    patterns = [leaves] if isinstance(leaves, str) else list(leaves)
    for pattern in patterns:
        if not any(fnmatch.fnmatchcase(path, pattern) for path in paths):
            raise ValueError(f"leaves: '{pattern}' matches no leaf; the paths are {nearest(pattern, paths)}")
    return [any(fnmatch.fnmatchcase(path, pattern) for pattern in patterns) for path in paths]


def check_leaf(path: str, leaf: Any, argument: str = "leaves") -> None:
    """Raise TypeError or ValueError unless a leaf is a nonempty floating array that JAX can hold exactly."""
    name = f"{argument}: '{path}'" if path else argument
    instead = "leave it out of leaves=" if argument == "leaves" else "pass floating-point weights"
    if not _tree.is_array(leaf) or not jnp.issubdtype(leaf.dtype, jnp.floating):
        kind = leaf.dtype if hasattr(leaf, "dtype") else type(leaf).__name__
        raise TypeError(f"{name} is {kind}, not a floating-point array; {instead}")
    if jnp.finfo(leaf.dtype).bits < 16:
        raise TypeError(
            f"{name} is {leaf.dtype}, too short to compute in; prune it in bfloat16 or wider and cast the result back"
        )
    if leaf.size == 0:
        raise ValueError(f"{name} has shape {leaf.shape} and no entries; {instead}")
    if leaf.dtype == np.float64 and not jnp.zeros(0, float).dtype == np.float64:
        raise TypeError(
            f"{name} is float64 but JAX is in 32-bit mode and would round it; cast it to float32, or enable float64 in "
            "JAX"
        )


def _some(paths: Sequence[str]) -> str:
    return str(list(paths[:8]))[:-1] + (", ...]" if len(paths) > 8 else "]")


def as_key(key: jax.Array | int | None) -> jax.Array:
    """A key: as given, of a seed, or of seed 0. Raises TypeError for anything else."""
    if key is None or hasattr(key, "__index__"):
        return jax.random.key(0 if key is None else int(key))  # type: ignore[arg-type]
    if not isinstance(key, jax.Array):
        raise TypeError(f"key is {key!r}; pass a seed or a key, such as jax.random.key(0)")
    return key
