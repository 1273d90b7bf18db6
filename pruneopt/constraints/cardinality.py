"""At most so many weights may live, with one budget for the tree, each leaf or each slice of a leaf."""

from __future__ import annotations

import inspect
import math
import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import jax
import jax.core
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Shaped

from pruneopt import _selection, _tree
from pruneopt.constraints.amount import check_amount, in_proportion
from pruneopt.constraints.base import Constraint, check_cut, check_orientation
from pruneopt.constraints.parts import Choice, Parts
from pruneopt.structure.layout import Slot

Tree = Any
Scope = Literal["tree", "leaf", "out", "in"] | int | tuple[int, ...]


@dataclass(frozen=True, kw_only=True)
class Cardinality(Constraint):
    """||w||_0 <= count in every scope, count = floor((1 - sparsity) size + 1e-9).

    sparsity: fraction of the weights of a scope to remove, in [0, 1). Give this or `count`, not both.
    count: weights to keep in a scope.
    per: the scope that shares one budget: "tree" (all leaves together: importance decides where), "leaf" (each
        leaf the same), "out" / "in" (each output / input of the matrices that the network multiplies, `laid`; where
        nothing tells them a leaf of two axes is (n_in, n_out), one of four an HWIO kernel, others are refused), or an
        axis or a tuple of axes of the leaf (each index along them).
    span: for per="in" or "out", so many consecutive inputs / outputs share one budget (SparseGPT's blocks of inputs
        are per="in", span=128). The last run may be smaller: it has the budget of its own size, or all of it where
        that is below `count`.
    floor: at least so many weights live in each leaf (per="tree" or "leaf"), against layer collapse. None: a
        solution that empties a leaf is an error; 0: that is allowed.
    cut: the fraction of the removals that is made; schedules set it, 1 is the whole constraint.

    `select` is exact: the largest scores of a scope (the floor's first).
    """

    sparsity: float | None = None
    count: int | None = None
    per: Scope = "tree"
    span: int = 1
    floor: int | None = None
    cut: float = 1.0

    def __new__(cls, *given: Any, **fields: Any) -> Cardinality:
        """Raises TypeError for a number without its name."""
        if given:
            what = "pass sparsity= (the fraction to remove) or count= (the weights to keep)"
            raise TypeError(f"Cardinality({given[0]!r}) does not say what that number is; {what}")
        return super().__new__(cls)

    def __post_init__(self) -> None:
        check_amount(self.sparsity, self.count)
        if isinstance(self.per, tuple) and len(self.per) == 1 and isinstance(self.per[0], str):
            object.__setattr__(self, "per", self.per[0])
        if self.count is not None:
            object.__setattr__(self, "count", operator.index(self.count))
        if self.sparsity is not None:
            object.__setattr__(self, "sparsity", float(self.sparsity))
        if self.floor is not None and hasattr(self.floor, "__index__"):
            object.__setattr__(self, "floor", operator.index(self.floor))
        scopes = self.per if isinstance(self.per, tuple) else (self.per,)
        if not all(isinstance(s, str) or hasattr(s, "__index__") for s in scopes) or len(set(scopes)) < len(scopes):
            raise ValueError(f"per={self.per!r}: pass a scope such as 'out', an axis or a tuple of different axes")
        if isinstance(self.per, tuple) and any(isinstance(s, str) for s in self.per):
            raise ValueError(f"per={self.per!r}: a tuple holds axis numbers alone; pass one name, such as per='out'")
        check_cut(self.cut)
        if isinstance(self.span, bool) or not hasattr(self.span, "__index__") or self.span < 1:
            raise ValueError(f"span={self.span!r} is not a whole number >= 1; pass the inputs or outputs of one budget")
        object.__setattr__(self, "span", operator.index(self.span))
        if self.span > 1 and self.per not in ("in", "out"):
            raise ValueError(f"span={self.span} needs per='in' or per='out', not per={self.per!r}; drop the span")
        if isinstance(self.per, str) and self.per not in ("tree", "leaf", "out", "in"):
            raise ValueError(
                f"per={self.per!r} is unknown; pass 'tree', 'leaf', 'out', 'in', an axis or a tuple of axes"
            )
        if self.floor is not None and not (isinstance(self.floor, int) and self.floor >= 0):
            raise ValueError(f"floor={self.floor!r} is not a whole number >= 0; pass the weights to keep in each leaf")
        if self.floor and self.per not in ("tree", "leaf"):
            raise ValueError(f"floor={self.floor} needs per='tree' or per='leaf', not per={self.per!r}; drop the floor")

    @property
    def exact(self) -> bool:
        """True."""
        return True

    @property
    def allows_empty(self) -> bool:
        """Whether the user passed floor=0."""
        return self.floor == 0

    def kept_of(self, size: int) -> int:
        """The budget of a scope of `size` weights, before floors."""
        if self.count is not None:
            if self.count > size:
                raise ValueError(f"count={self.count} is above the {size} weights of a scope; pass count <= {size}")
            final = self.count
        else:
            assert self.sparsity is not None
            final = math.floor((1 - self.sparsity) * size + 1e-9)
        return size - math.floor((size - final) * self.cut + 1e-9)

    def described(self, ndim: int | None = None) -> Parts:
        """A budget of single weights; nothing where all are kept."""
        if self.sparsity == 0 and not self.floor:
            return Parts()
        choice = Choice(
            self,
            self._box(ndim),
            across=self.per == "tree",
            free=True,
            floor=self.floor or 0,
            kept_of=self.kept_of,
            counts=lambda shape: self._budgets(jax.ShapeDtypeStruct(shape, np.float32)),
        )
        return Parts(choices=(choice,))

    def check(self, variable: Tree) -> None:
        """Raise ValueError for a count above a scope's size, an axis that a leaf lacks, floors above the budget."""
        if self.per == "tree":
            total = _tree.size(variable)
            if total >= 2**32:
                raise ValueError(f"per='tree' shares one budget over {total} weights, 2^32 or more; use per='leaf'")
            need = sum(min(self.floor or 0, math.prod(x.shape)) for x in jax.tree.leaves(variable))
            if need > self.kept_of(total):
                raise ValueError(
                    f"floor={self.floor} keeps {need} weights over all leaves, above the budget of "
                    f"{self.kept_of(total)}; lower the floor or the sparsity"
                )
            return
        if self.is_oriented:
            check_orientation(f"per={self.per!r}", variable)
        for path, leaf in _tree.named_leaves(variable):
            self._budgets(leaf, path)

    @property
    def is_oriented(self) -> bool:
        """Whether its scopes are outputs or inputs."""
        return self.per in ("out", "in")

    @property
    def shares(self) -> bool:
        """Whether the matrices of a leaf have one budget."""
        return self.per in ("tree", "leaf", ())

    def scope(self, by_layer: bool = False) -> str:
        """What has one budget."""
        if self.per == "tree":
            return "one budget for the tree" + (", shared out uniformly by layer" if by_layer else "")
        if isinstance(self.per, str):
            name = {"leaf": "leaf", "out": "output", "in": "input"}[self.per]
            return f"one budget for each {name}" if self.span == 1 else f"one budget for every {self.span} {name}s"
        return f"one budget for each index of axis {self.per}"

    def restricted(self, slots: Sequence[Slot]) -> list[Cardinality]:
        """One budget for each slot: what the tree, or a leaf of several slots, keeps is shared out in proportion.

        Weights that an earlier slot holds too are counted there, and kept at its density.
        """
        if not self.shares:
            return [self if isinstance(self.per, str) else self._along(slot) for slot in slots]
        groups: dict[Any, list[int]] = {}
        for i, slot in enumerate(slots):
            groups.setdefault(slot.paths if self.per != "tree" else None, []).append(i)
        counts, floors = {}, {}
        for group in groups.values():
            own = [i for i in group if not slots[i].again] or group
            sizes = [slots[i].size for i in own]
            floors |= zip(own, self._floors([slots[i] for i in own]), strict=True)
            if self.kept_of(sum(sizes)) < sum(floors[i] for i in own):
                raise ValueError(
                    f"floor={self.floor} keeps {sum(floors[i] for i in own)} weights, above the budget of "
                    f"{self.kept_of(sum(sizes))}; lower the floor or the sparsity"
                )
            counts |= zip(own, in_proportion(self.kept_of(sum(sizes)), sizes, [floors[i] for i in own]), strict=True)
            for i in set(group) - set(own):
                first = next(j for j in own if slots[j].paths == slots[i].paths)
                counts[i], floors[i] = counts[first] * slots[i].size // slots[first].size, floors[first]
        floor = lambda i: None if self.floor is None else floors[i]  # noqa: E731
        return [Cardinality(count=counts[i], floor=floor(i)) for i in range(len(slots))]

    def portion(self, support: Any, problem: int) -> Cardinality:
        """What `support` keeps of the problem, where the problems have one budget."""
        if self.sparsity == 0:
            return Cardinality(sparsity=0.0)
        if self.shares:
            return Cardinality(count=int(np.sum(np.asarray(support[problem]))), floor=0)
        if isinstance(self.per, str):
            return self
        return replace(self, per="leaf" if self.per == (0,) else (0, 1))

    def _along(self, slot: Slot) -> Cardinality:
        """Numbered axes of a leaf as those of its matrices."""
        axes = self.per if isinstance(self.per, tuple) else (self.per,)
        kinds = {slot.kind_of(operator.index(axis)) for axis in axes}  # type: ignore[arg-type]
        if "" in kinds:
            raise ValueError(
                f"per={self.per!r}: an axis of leaf '{slot.name}' is neither the inputs nor the outputs of its "
                f"matrices {slot.shape}; pass per='in' or per='out'"
            )
        kinds -= {"problem"}
        if len(kinds) == 1:
            return replace(self, per=kinds.pop())
        every = tuple(range(slot.ndim))
        return replace(self, per=every) if kinds else replace(self, per=(0,) if slot.ndim == 3 else "leaf")

    def _floors(self, slots: Sequence[Slot]) -> list[int]:
        """The least that each slot keeps: a leaf's floor is shared out over the slots that read it."""
        least = [0] * len(slots)
        for paths in {slot.paths for slot in slots}:
            own = [i for i, slot in enumerate(slots) if slot.paths == paths]
            sizes = [slots[i].size for i in own]
            shared = in_proportion(min(self.floor or 0, sum(sizes)), sizes, [0] * len(own))
            for i, count in zip(own, shared, strict=True):
                least[i] = count
        return least

    def select(self, scores: Tree) -> Tree:
        """The largest scores of each scope; traceable by JAX."""
        return self._selected(scores, lambda count: count(self))

    def select_stage(self, scores: Tree, cuts: Sequence[float], stage: Any) -> Tree:
        """One selection whose counts are looked up by `stage`."""
        looser = [self.relaxed(cut) for cut in cuts]
        return self._selected(scores, lambda count: jnp.asarray([count(c) for c in looser], jnp.uint32)[stage])

    def _selected(self, scores: Tree, kept: Callable[[Callable[[Cardinality], Any]], Any]) -> Tree:
        leaves, structure = jax.tree.flatten(scores)
        if self.per == "tree":
            if self.floor:
                leaves = [_raised_to_floor(leaf, self.floor) for leaf in leaves]
            masks = _selection.keep_largest(leaves, kept(lambda c: c.kept_of(_tree.size(scores))))
        elif self.per == "leaf":
            masks = [_selection.keep_largest([x], kept(lambda c, x=x: int(c._budgets(x)[0])))[0] for x in leaves]
        else:
            masks = [self._select_slices(x, kept(lambda c, x=x: c._budgets(x).astype(np.uint32))) for x in leaves]
        return jax.tree.unflatten(structure, masks)

    def violation(self, support: Tree) -> int:
        """Weights above the budgets plus weights below the floors."""
        leaves = jax.tree.leaves(support)
        kept = _tree.kept_by_leaf(support)
        short = sum(
            max(0, min(self.floor or 0, math.prod(leaf.shape)) - k) for leaf, k in zip(leaves, kept, strict=True)
        )
        if self.per == "tree":
            return short + max(0, sum(kept) - self.kept_of(_tree.size(support)))
        over = 0
        for leaf in leaves:
            kept = np.asarray(jnp.sum(self._rows(leaf, False)[0], axis=1, dtype=jnp.int32))
            over += int(np.maximum(kept - self._budgets(leaf), 0).sum())
        return short + over

    def density(self, variable: Tree) -> float:
        """Kept over all weights, floors aside."""
        total = _tree.size(variable)
        if self.per == "tree":
            return self.kept_of(total) / total
        return sum(int(self._budgets(leaf).sum()) for leaf in jax.tree.leaves(variable)) / total

    def relaxed(self, cut: float) -> Cardinality:
        """The same scopes with only the fraction `cut` of their removals."""
        return replace(self, cut=self.cut * cut)

    def _box(self, ndim: int | None) -> tuple[int, int] | None:
        """The consecutive inputs and outputs of a scope; None where the leaf decides."""
        match self.per:
            case "tree" | "leaf":
                return -1, -1
            case "in":
                return self.span, -1
            case "out":
                return -1, self.span
        if ndim != 2:
            return None
        axes = self._axes(2)
        return (1 if 0 in axes else -1), (1 if 1 in axes else -1)

    def _axes(self, ndim: int, path: str = "") -> tuple[int, ...]:
        """The axes whose every index has a budget of its own."""
        if self.per in ("tree", "leaf"):
            return ()
        if self.per == "out":
            axes: tuple[int, ...] = (0, 2) if ndim == 3 else (ndim - 1,)
        elif self.per == "in":
            axes = tuple(range(ndim - 1))
        else:
            axes = self.per if isinstance(self.per, tuple) else (operator.index(self.per),)  # type: ignore[arg-type]
        if any(not -ndim <= axis < ndim for axis in axes):
            raise ValueError(f"per={self.per!r} names an axis that {_tree.called(path)} of {ndim} axes does not have")
        return tuple(axis % ndim for axis in axes)

    def _select_slices(self, leaf: Shaped[Array, "..."], counts: Any) -> Shaped[Array, "..."]:
        rows, restored = self._rows(leaf, -np.inf)
        (mask,) = _selection.keep_largest_in_rows([rows], counts)
        return restored(mask)

    def _rows(
        self, leaf: Shaped[Array, "..."], fill: Any
    ) -> tuple[Shaped[Array, "g n"], Callable[[Shaped[Array, "g n"]], Shaped[Array, "..."]]]:
        """One row for each scope, the last filled up with `fill`; and the way back."""
        axes = self._axes(leaf.ndim)
        if self.span == 1:
            return to_rows(leaf, axes), lambda rows: from_rows(rows, leaf.shape, axes)
        axis = ("in", "out").index(self.per) + 1  # type: ignore[arg-type]
        p, o = self._problems(leaf), math.prod(leaf.shape[-1:])
        i = math.prod(leaf.shape) // (p * o)
        pads = [(0, 0), (0, 0), (0, 0)]
        pads[axis] = (0, -(p, i, o)[axis] % self.span)
        padded = jnp.pad(leaf.reshape(p, i, o), pads, constant_values=fill)
        runs = (p, -1, self.span, o) if axis == 1 else (p, i, -1, self.span)
        split = padded.reshape(runs)

        def restored(rows):
            return from_rows(rows, split.shape, (0, axis)).reshape(padded.shape)[:, :i, :o].reshape(leaf.shape)

        return to_rows(split, (0, axis)), restored

    def _problems(self, leaf: Any) -> int:
        """Of a stack of matrices (problems, n_in, n_out), how many: their outputs and inputs are apart."""
        return leaf.shape[0] if self.per in ("in", "out") and len(leaf.shape) == 3 else 1

    def _budgets(self, leaf: Shaped[Array, "..."] | jax.ShapeDtypeStruct, path: str = "") -> np.ndarray:
        """How many weights each scope keeps."""
        problems = self._problems(leaf)
        groups = math.prod(leaf.shape[a] for a in self._axes(leaf.ndim, path)) // problems
        size = math.prod(leaf.shape) // (groups * problems)
        whole, rest = divmod(groups, self.span)
        first = size * min(self.span, groups)
        kept = [max(self.kept_of(first), min(self.floor or 0, first))] * max(whole, 1)
        if whole and rest:
            last = size * rest
            kept.append(last if self.count is not None and self.count > last else self.kept_of(last))
        return np.asarray(kept * problems, np.int64)


# Read from `__new__` the signature would hold what that refuses.
_FIELDS = list(inspect.signature(Cardinality.__init__).parameters.values())[1:]
setattr(Cardinality, "__signature__", inspect.Signature(_FIELDS))  # noqa: B010


def _raised_to_floor(scores: Shaped[Array, "..."], floor: int) -> Shaped[Array, "..."]:
    (first,) = _selection.keep_largest([scores], min(floor, scores.size))
    if isinstance(scores, jax.core.Tracer):
        return jnp.where(first, jnp.asarray(jnp.inf, scores.dtype), scores)
    raised = np.array(scores)
    raised[np.asarray(first)] = np.inf
    return jnp.asarray(raised)


def to_rows(leaf: Shaped[Array, "..."], axes: tuple[int, ...]) -> Shaped[Array, "g n"]:
    """One row for each index along `axes`."""
    groups = math.prod(leaf.shape[a] for a in axes)
    return jnp.moveaxis(leaf, axes, range(len(axes))).reshape(groups, -1)


def from_rows(rows: Shaped[Array, "g n"], shape: tuple[int, ...], axes: tuple[int, ...]) -> Shaped[Array, "..."]:
    """The inverse of `to_rows`."""
    moved = [shape[a] for a in axes] + [s for i, s in enumerate(shape) if i not in axes]
    return jnp.moveaxis(rows.reshape(moved), range(len(axes)), axes)
