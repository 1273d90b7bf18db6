"""A set taken apart: what is fixed, what chooses and what bounds values, as each set describes itself."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Bool

from pruneopt import _tree

Tree = Any


@dataclass(frozen=True)
class Choice:
    """How a set chooses: at most so many of every scope live.

    by: the set, whose `select` chooses. box: the consecutive inputs and outputs of a matrix (n_in, n_out) that are one
        scope, -1 for all of them; where `units`, that are one unit; None where the leaf decides.
    across: whether one scope holds all leaves. free: whether any so many single weights of a scope may live.
    units: whether whole boxes live or die. group: (n, m) of N:M. floor: weights that live in each leaf at least.
    rows: the unit of each input of a matrix, -1 for those that always live, where the inputs of a unit need not be
        neighbours; else None.
    groups: the groups of coupled units that live or die whole, which `by` can also choose by scores of their own, in
        runs of `multiple`.
    kept_of: how many of a scope of so many weights live, floors aside; counts: how many in each scope of a leaf of that
        shape, scope after scope. None for others than budgets of single weights.
    """

    by: Any
    box: tuple[int, int] | None = None
    across: bool = False
    free: bool = False
    units: bool = False
    group: tuple[int, int] | None = None
    floor: int = 0
    rows: tuple[int, ...] | None = None
    groups: tuple[Any, ...] = field(default=(), compare=False)
    multiple: int = 1
    kept_of: Callable[[int], int] | None = field(default=None, compare=False)
    counts: Callable[[tuple[int, ...]], np.ndarray] | None = field(default=None, compare=False)

    def lies_within(self, coarse: Choice) -> bool:
        """Whether every scope surely lies in one scope of `coarse`, so that choosing in turn is optimal.

        Groups and budgets are then a laminar matroid, where the greedy choice is best; a unit adds up the best of its
        own.
        """
        if not (self.group if coarse.units else self.free) or self.floor or not (coarse.free or coarse.units):
            return False
        if self.across:
            return coarse.across
        if self.box is None or coarse.box is None:
            return False
        return all(b == -1 or (a != -1 and b % a == 0) for a, b in zip(self.box, coarse.box, strict=True))


@dataclass(frozen=True, eq=False)
class Parts:
    """A set as the intersection of fixed masks, choices and sets of values; everything is the one without any.

    masks: trees of booleans; what one says nothing of, it lets live. choices: in the order in which they choose, each
    among what the ones before it kept; those with a floor last, since no other may cut below it. values: the sets that
    bound values, at most one in a set that was checked. by_path: whether leaves differ in their sets.
    """

    masks: tuple[Tree, ...] = ()
    choices: tuple[Choice, ...] = ()
    values: tuple[Any, ...] = ()
    by_path: bool = False

    @property
    def fixed(self) -> bool:
        """Whether the masks are all there is: one support that holds all others."""
        return not self.choices and not self.values

    @property
    def one(self) -> Choice | None:
        """The only choice; None where there is none or more than one."""
        return self.choices[0] if len(self.choices) == 1 else None

    @property
    def run(self) -> int | None:
        """Runs of so many consecutive inputs of a matrix are chosen each by itself; None where they are not."""
        lengths = [-1 if choice.units or choice.box is None else choice.box[0] for choice in self.choices]
        return None if -1 in lengths else math.lcm(*lengths)

    def allowed(self, like: Tree) -> Tree:
        """What every mask lets live, a boolean array for each leaf of `like`."""
        named = [dict(_tree.named_leaves(mask)) for mask in self.masks]

        def one(path: str, leaf: Any) -> jax.Array:
            found = [jnp.asarray(masks[path]) for masks in named if path in masks]
            return functools.reduce(jnp.logical_and, found) if found else jnp.ones(leaf.shape, bool)

        return _tree.map_named(one, like)

    def allowed_flat(self, like: Tree) -> Bool[np.ndarray, " p"]:
        """`allowed`, the leaves laid end to end, on the host."""
        return np.concatenate([np.asarray(mask).reshape(-1) for mask in jax.tree.leaves(self.allowed(like))])

    @property
    def groups(self) -> tuple[Any, ...]:
        """The groups of coupled units, where whole units are all that is chosen among what masks allow; else none."""
        return () if self.one is None or self.values or self.by_path else self.one.groups

    @property
    def chooses_single_units(self) -> bool:
        """Whether units of groups are chosen one by one, so that the choice by scores is the best one."""
        return self.one is not None and self.one.multiple == 1

    def units(self, scores: Mapping[str, Any], like: Tree) -> dict[str, Any]:
        """{group: which of its units live}, with the largest sum of `scores`, {group: a number a unit}."""
        assert self.one is not None
        return self.one.by.units(scores, self.allowed(like))

    def with_units(self, alive: Mapping[str, Any], like: Tree) -> Tree:
        """What masks allow of these units, a boolean array for each leaf of `like`."""
        assert self.one is not None
        return self.one.by.with_units(alive, self.allowed(like))

    def cut(self, values: Tree) -> Tree:
        """`values` where every mask lets them live, zero elsewhere; on the host, in their own precision."""
        kept = lambda x, mask: np.where(np.asarray(mask), np.asarray(x), np.zeros((), np.asarray(x).dtype))  # noqa: E731
        return jax.tree.map(kept, values, self.allowed(values))

    def select(self, scores: Tree) -> Tree:
        """The best support for `scores`, as `Constraint.select` says. Traceable by JAX."""
        if self.masks:
            scores = _only(scores, self.allowed(scores))
        if not self.choices:
            return jax.tree.map(lambda s: s > -jnp.inf, scores)
        return chosen(self.choices, scores)


def of(constraint: Any, ndim: int | None = None) -> Parts:
    """The parts of a constraint, of None too; `ndim`: of leaves that all have so many axes, 2 for a layer's matrix."""
    return Parts() if constraint is None else constraint.described(ndim)


def merged(described: Iterable[Parts]) -> Parts:
    """The parts of the intersection."""
    found = list(described)
    choices = [choice for parts in found for choice in parts.choices]
    return Parts(
        tuple(mask for parts in found for mask in parts.masks),
        tuple(sorted(choices, key=lambda choice: choice.floor > 0)),
        tuple(values for parts in found for values in parts.values),
        any(parts.by_path for parts in found),
    )


def chosen(choices: tuple[Choice, ...], scores: Tree) -> Tree:
    """What the choices, one at least, keep in turn. Traceable by JAX."""
    first, *rest = choices
    kept = first.by.select(scores)
    for choice in rest:
        scores = _only(scores, kept)
        kept = choice.by.select(scores)
    return kept


def exchanges(constraint: Any, shape: tuple[int, ...]) -> tuple[int, Bool[np.ndarray, "n m"]] | None:
    """In runs of how many inputs weights of an output of a matrix may change places without breaking the constraint.

    (length of a run, what may live at all); None where even such an exchange can break it.
    """
    found = of(constraint, ndim=2)
    if found.by_path or found.values:
        return None
    allowed, one = np.asarray(found.allowed(jnp.zeros(shape))), found.one
    if found.fixed:
        return 1, allowed
    if one is None or not one.free or one.box is None or (one.box[0] == 1 and one.box[1] != -1):
        return None
    return (shape[0] if one.box[0] == -1 else min(one.box[0], shape[0])), allowed


def units_of_inputs(constraint: Any, inputs: int) -> tuple[np.ndarray, int] | None:
    """(the unit of each input of a matrix, -1 where it lives in any case; how many units live) where whole units of
    inputs live or die for all outputs; None for any other set.
    """
    found = of(constraint, ndim=2)
    if found.masks or found.values or found.by_path or len(found.choices) > 1:
        return None
    if not found.choices:
        return np.full(inputs, -1), 0
    (choice,) = found.choices
    if choice.rows is not None:
        units = np.asarray(choice.rows)
    elif choice.units and choice.box is not None and choice.box[0] != -1 and choice.box[1] == -1:
        units = np.arange(inputs) // choice.box[0]
    else:
        return None
    kept = np.asarray(choice.by.select(jnp.ones((inputs, 1))))[:, 0]
    return units, len(np.unique(units[kept & (units >= 0)]))


def no_exchange(what: str, constraint: Any) -> str:
    """The sentence that refuses `what` where `exchanges` is None."""
    return (
        f"{what} exchanges weights inside an output, which {constraint!r} does not allow; pass a Cardinality per "
        "'tree', 'leaf', 'out' or run of inputs, NM along the inputs, or those within a Support"
    )


def _only(scores: Tree, kept: Tree) -> Tree:
    return jax.tree.map(lambda s, k: jnp.where(k, s, jnp.asarray(-jnp.inf, s.dtype)), scores, kept)
