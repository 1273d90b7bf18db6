"""Calibration batches on their way through a network, stopped at each operator to see what reaches it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from pruneopt import _linalg
from pruneopt.capture import walk
from pruneopt.capture.beside import Beside, beside
from pruneopt.capture.positions import Positions, checked_weights
from pruneopt.capture.sums import add, against, cross, is_finite, not_finite, summed
from pruneopt.capture.sums import sums as sums_of
from pruneopt.capture.walk import Cut, Env, Walk
from pruneopt.network.batches import Batches, Source, explained
from pruneopt.program.program import Program
from pruneopt.structure.operators import Operator, Use
from pruneopt.structure.traced import Traced

Tree = Any
Leaves = Mapping[str, Any]
Step = Callable[[Env, Leaves], Env]
_MEANS = ("mean", "dense_mean", "missing_mean")  # the sums behind `Means`


class Means(NamedTuple):
    """Means over the positions of a problem: of its inputs, of the dense network's (None where they are not followed),
    and of what its outputs are to make up for (None where there is nothing).
    """

    inputs: Any
    dense: Any
    missing: Any


@dataclass(frozen=True, eq=False)
class Inputs:
    """What reaches one problem: count of positions, Gram X^T X / count, cross term X^T X0 / count with X0 the dense
    network's inputs (None where they are not followed), missing X^T R / count with R what the outputs are to make up
    for in the sum that takes them (`beside`; None where there is none), means where they are seen.
    """

    count: float
    gram: Any
    cross: Any
    missing: Any = None
    means: Means | None = None

    @cached_property
    def centred(self) -> Inputs:
        """The same of inputs and outputs less their means: what is left to a problem with a free intercept.

        Of an input that is constant but for rounding nothing is left.
        """
        if self.means is None or not self.count:
            return self
        m, dense, missing = (None if x is None else np.asarray(x, np.float64) for x in self.means)
        assert m is not None
        h = np.diagonal(np.asarray(self.gram, np.float64))
        varies = (h - m * m > 32 * np.finfo(self.gram.dtype).eps * h)[:, None]

        def less(whole: Any, by: Any) -> Any:
            return jnp.asarray((np.asarray(whole, np.float64) - np.outer(m, by)) * varies, self.gram.dtype)

        cross = None if dense is None else less(self.cross, dense)
        gram = less(self.gram, m) * jnp.asarray(varies.T, self.gram.dtype)
        return Inputs(self.count, gram, cross, None if missing is None else less(self.missing, missing), self.means)

    def intercept(self, center: Any, value: Any) -> np.ndarray:
        """The best constant beside `value`: the mean of X0 W0 + R - X W."""
        assert self.means is not None
        m = np.asarray(self.means.inputs, np.float64)
        dense = m if self.means.dense is None else np.asarray(self.means.dense, np.float64)
        found = dense @ np.asarray(center, np.float64) - m @ np.asarray(value, np.float64)
        return found if self.means.missing is None else found + np.asarray(self.means.missing, np.float64)

    def moments(self, value: Any) -> tuple[np.ndarray, np.ndarray]:
        """Mean and variance of X W, of inputs that are centred."""
        assert self.means is not None
        w = np.asarray(value, np.float64)
        variance = np.einsum("im,im->m", w, np.asarray(self.gram, np.float64) @ w)
        return np.asarray(self.means.inputs, np.float64) @ w, np.maximum(variance, 0.0)

    def target(self, center: Any, damping: float) -> Any:
        """W0 - (H + lambda I)^-1 X^T ((X - X0) W0 - R) / N, in float64.

        With this centre, 1/2 tr(D^T (H + lambda I) D) differs only by a constant from
        ||X0 W0 + R - X W||^2 / 2N + lambda / 2 ||W - W0||^2. Directions that no input takes and no damping holds stay.
        """
        if self.cross is None or not self.count:
            return center
        h, cross, w = (np.asarray(x, np.float64) for x in (self.gram, self.cross, center))
        values, vectors = _linalg.eigh(h)
        values += damping * np.mean(np.diagonal(h))
        live = values > len(h) * np.finfo(self.gram.dtype).eps * values[-1]
        wanted = (cross - h) @ w + (0.0 if self.missing is None else np.asarray(self.missing, np.float64))
        move = vectors[:, live] @ ((vectors[:, live].T @ wanted) / values[live, None])
        return jnp.asarray(w + move, center.dtype)


class Calibration:
    """Every batch's live variables, in the pruned network and, if asked, in the dense one.

    It stops at the chosen operators. batches: read once. weights: batch -> weights of positions, or None.
    dense: the leaves of the dense network, to follow it too; None to follow the pruned one alone. residual: whether
    to see what an output is added to, in both. means: whether to see means.
    """

    def __init__(
        self,
        traced: Traced,
        batches: Source,
        weights: Callable[[Any], Any] | None,
        dense: Leaves | None,
        residual: bool = False,
        means: bool = False,
    ):
        self._want = ("gram", "mean") if means else ("gram",)
        self._programs: list[Any] = []
        self._walks: dict[Any, Walk] = {}
        self._cuts: dict[Any, list[Cut]] = {}
        self._envs: list[Env] = []
        self._weights: list[Any] = []
        self._operators: list[Operator] = []
        self._chosen: dict[Any, list[Operator]] = {}
        self._beside: dict[Any, dict[int, Beside]] = {}
        self._told: list[str] = []
        self._places: dict[Any, Positions] = {}
        stream = Batches(batches)
        self._name = stream.name
        for batch in stream:
            program = (graph := traced.of(batch)).program
            if program not in self._walks:
                self._operators = self._chosen[program] = traced.chosen(graph)
                cuts = walk.cuts(self._operators)
                self._cuts[program] = cuts
                self._beside[program] = _besides(program, self._operators) if residual else {}
                others = [(one.other,) for one in self._beside[program].values()]
                self._walks[program] = Walk(program, [d for cut in cuts for d in cut.demands] + others)
            self._programs.append(program)
            self._envs.append(self._walks[program].start(batch))
            self._told.append(explained(batch))
            self._weights.append(None if weights is None else checked_weights(weights(batch)))
        self._dense_leaves = dense
        self._dense = None if dense is None else list(self._envs)

    @property
    def cuts(self) -> list[Cut]:
        """Where it stops, for the first batch; the same operators for the others."""
        return self._cuts[self._programs[0]]

    @property
    def arrays(self) -> list[list[Any]]:
        """What is live of each batch, and its weights."""
        return [[*env.values(), w] for env, w in zip(self._envs, self._weights, strict=True)]

    def advance(self, cut: int, leaves: Leaves) -> None:
        """Evaluate every batch up to a cut, the pruned network with `leaves`."""
        steps = {}
        for program, position in self._walks.items():
            for op in self._cuts[program][cut - 1].operators if cut else ():
                if op in self._beside[program]:
                    position.release((self._beside[program][op].other,))
            demand = self._cuts[program][cut].inputs
            steps[program] = position.advance(demand)
            position.release(demand)
        for i, program in enumerate(self._programs):
            self._envs[i] = steps[program](self._envs[i], leaves)
            if self._dense is not None and self._dense_leaves is not None:
                self._dense[i] = steps[program](self._dense[i], self._dense_leaves)
        jax.block_until_ready(self._envs)

    def sums(self, cut: int, leaves: Leaves) -> dict[int, dict[str, Any]]:
        """{operator of the cut: sums over all batches}: count, gram and, where the dense network is followed, cross.

        Operators share the sums of their first product; further products add theirs, looking ahead with these weights.
        Raises ValueError, naming the batch, for inputs that are not finite.
        """
        shared: dict[str, Any] = {}
        own: dict[int, dict[str, Any]] = {}
        ahead = {program: self._ahead(program, cut) for program in self._walks}
        for i, program in enumerate(self._programs):
            env, other = self._envs[i], None if self._dense is None else self._dense[i]
            first = self._cuts[program][cut]
            add(shared, self._reaching(i, first.operators[0], first.use, env, other))
            for op in set(first.operators) & self._beside[program].keys():
                add(own.setdefault(op, {}), self._missing(i, op, leaves))
            for op, use, step in ahead[program]:
                env = step(env, leaves)
                if other is not None and self._dense_leaves is not None:
                    other = step(other, self._dense_leaves)
                add(own.setdefault(op, {}), self._reaching(i, op, use, env, other))
        shared["problems"] = {}
        total = {op: dict(shared) for op in self.cuts[cut].operators}
        for op, more in own.items():
            add(total[op], more)
            total[op]["problems"] = {}
        self._check(cut, jax.block_until_ready(total))
        return total

    def _check(self, cut: int, total: dict[int, dict[str, Any]]) -> None:
        """Raise ValueError for sums that are not finite, naming the operator and the first batch that makes them so."""
        bad = next((op for op, sums in total.items() if not is_finite(sums["gram"])), None)
        if bad is None:
            return
        name = self._operators[bad].name
        for i, program in enumerate(self._programs):
            first = self._cuts[program][cut]
            if not is_finite(self._reaching(i, first.operators[0], first.use, self._envs[i], None)["gram"]):
                raise ValueError(not_finite(f"{self._name}: batch {i}", name, self._told[i]))
        raise ValueError(not_finite(self._name, name, ""))

    def _ahead(self, program: Program, cut: int) -> list[tuple[int, Use, Step]]:
        """(operator, product, step to it) of the further products with a cut's weights."""
        if not (further := self._cuts[program][cut].further):
            return []
        position, found = self._walks[program].ahead(), []
        for op, use in further:
            found.append((op, use, position.advance(use.inputs)))
            position.release(use.inputs)
        return found

    def _missing(self, i: int, op: int, leaves: Leaves) -> dict[str, Any]:
        """X^T R of an operator in one batch, R what its outputs are to make up for, and the sum of R where means are
        wanted.

        What they are added to is looked at ahead: operators on its way that are still to be pruned are as they are.
        """
        program = self._programs[i]
        found, (use,) = self._beside[program][op], self._chosen[program][op].uses
        assert self._dense is not None
        assert self._dense_leaves is not None
        step = self._walks[program].ahead().advance((found.other,))
        before, after = step(self._dense[i], self._dense_leaves)[found.other], step(self._envs[i], leaves)[found.other]
        arrays = walk.values(program, self._envs[i], use.inputs)
        given = use.form, arrays, found.missing(program, leaves, before, after), self._spread(i, op, use)
        sums = {"missing": against(*given)}
        return sums | ({"missing_mean": summed(*given)} if "mean" in self._want else {})

    def _spread(self, i: int, op: int, use: Use) -> Any:
        """The weights of a product's positions in one batch, None for ones."""
        weights = self._weights[i]
        if weights is None:
            return None
        key = self._programs[i], np.shape(weights)
        if key not in self._places:
            self._places[key] = Positions(*key)
        return self._places[key].spread(self._operators[op].name, use, weights)

    def _reaching(self, i: int, op: int, use: Use, env: Env, other: Env | None) -> dict[str, Any]:
        """The sums of one product of an operator in one batch."""
        program, weights = self._programs[i], self._spread(i, op, use)
        arrays = walk.values(program, env, use.inputs)
        sums = sums_of(use.form, arrays, weights, self._want)
        if other is not None:
            dense = walk.values(program, other, use.inputs)
            sums["cross"] = cross(use.form, arrays, dense, weights)
            if "mean" in self._want:
                sums["dense_mean"] = sums_of(use.form, [dense[0], *arrays[1:]], weights, ("mean",))["mean"]
        return sums


def _besides(program: Program, operators: list[Operator]) -> dict[int, Beside]:
    """{operator: what its output is added to}, of those with one product."""
    found = {i: beside(program, op.uses[0]) for i, op in enumerate(operators) if len(op.uses) == 1}
    return {i: one for i, one in found.items() if one is not None}


def problem(sums: Mapping[str, Any], e: int) -> Inputs:
    """The inputs of problem e of an operator from its sums; the same for operators that share them."""
    if e not in sums["problems"]:
        count = float(sums["count"][e])
        over = jnp.asarray(1.0 / count if count else 0.0, sums["gram"].dtype)
        of = {n: sums[n][e] * over for n in ("gram", "cross", "missing", *_MEANS) if n in sums}
        means = Means(*(of.get(n) for n in _MEANS)) if "mean" in of else None
        sums["problems"][e] = Inputs(count, of["gram"], of.get("cross"), of.get("missing"), means)
    return sums["problems"][e]
