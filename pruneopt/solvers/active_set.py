"""Feature-sign search: the exact lasso of every output of a layer, by Cholesky factors of small systems."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from pruneopt import _linalg
from pruneopt.bounds.duality import Duality
from pruneopt.objectives.reconstruction import Reconstruction
from pruneopt.penalties.l1 import L1, ElasticNet
from pruneopt.problem import Problem
from pruneopt.solvers.base import Outcome, Solver, Start, check_not_negative, check_whole

_ROUNDING = 1e-9  # by which a gradient may exceed its bound, relative
# A tenth of these and half and twice them change neither systems nor objective on those layers of `ActiveSet`.
_NOTHING = 1e-12  # of the largest target: what a product in float64 rounds, over 1,000 inputs
_RIDGE = 1e-10  # the first, of the largest diagonal entry, for a singular system; ten times that where it does not do
_STEPS = 10_000  # of one output in one round; each lowers its objective


@dataclass(frozen=True)
class ActiveSet(Solver):
    """minimise 1/2 tr((W - W0)^T (H + lambda I) (W - W0)) + P(W), P an L1 norm or elastic net, with proof.

    Each output w is a problem of its own. With R = (H + lambda I) (W0 - W) and a_i the L1 weight of entry i, w is
    optimal if R_i = a_i sign(w_i) where w_i is not zero and |R_i| <= a_i elsewhere (R less the net's ridge
    times w, for a net). In rounds:

    1. R by one product. Outputs without an |R_i| > a_i are done; in the others the `first` entries that exceed
       it most, or `growth` times as many as are active, become active with the sign of R_i.
    2. Minimise over the active entries at their signs, by Cholesky. Where that changes a sign, go as far as the first
       entry that becomes zero, drop it, and minimise again; an entry that would leave zero against its sign is dropped.

    Every step lowers the objective, so no set of signs returns, and the end is exact: status optimal, proven by the
    duality gap. A singular system takes a proximal step instead (a ridge about the present w). A Gram that rounding has
    made indefinite (float32, fewer samples than inputs) has no minimum: it is solved with twice its least eigenvalue
    added to its diagonal, and nothing is proven; damping, or a Gram in float64, brings the proof back.

    rounds: at most; beyond is the status limit. From `init` its nonzero entries start active.
    Cost: a product n^2 m a round for the outputs not yet done, |S|^3 / 3 a step; float64 on the host, where
    threads of BLAS gain little (the systems are small); memory n^2 + 5 n m
    numbers. stats: rounds, steps, largest_support, lift (what was added to an indefinite H).
    Source: Lee, Battle, Raina and Ng 2007, algorithm 1, entering several at once as the working sets of Massias,
    Gramfort and Salmon 2018 (Celer) do.
    """

    # The answer is the optimum whatever these are. Twice and half of each, on 24 outputs of minilm_l2_attn_out,
    # mlpnet_fc1 and resnet20_l3_conv: 0.8 to 1.3 times the rounds, 0.9 to 1.1 times the systems, one objective.
    first: int = 8
    growth: float = 0.5
    rounds: int = 200

    def __post_init__(self) -> None:
        check_whole(self, 1, "first", "rounds")
        check_not_negative(self, "growth")

    @property
    def never_worse_than(self) -> frozenset[str]:
        """Any init."""
        return frozenset({"init"})

    def refuses(self, problem: Problem) -> str | None:
        """Any objective but Reconstruction, a penalty other than L1 and ElasticNet, or a constraint."""
        if not isinstance(problem.objective, Reconstruction):
            return f"ActiveSet needs a Reconstruction, not {type(problem.objective).__name__}; use ProximalGradient"
        if not isinstance(problem.penalty, L1 | ElasticNet):
            return (
                f"ActiveSet needs a penalty L1 or ElasticNet, not {problem.penalty!r}; use ProximalGradient for others"
            )
        if problem.subject_to is not None:
            return f"ActiveSet knows no constraint; drop subject_to={problem.subject_to!r}, the penalty makes the zeros"
        return None

    def run(self, problem: Problem, init: Start | None, key: jax.Array) -> Outcome:
        """Round after round over the outputs that are not done."""
        f, penalty = problem.objective, problem.penalty
        assert isinstance(f, Reconstruction)
        assert isinstance(penalty, L1 | ElasticNet)
        center = np.asarray(f.center, np.float64).T  # an output a row from here on
        m, n = center.shape
        gram = np.array(f.curvature.matrix, np.float64)
        np.einsum("ii->i", gram)[:] += f.exact_ridge()
        lift = 0.0 if f.is_convex else -2 * float(_linalg.eigvalsh(gram)[0])
        np.einsum("ii->i", gram)[:] += lift
        target = center @ gram
        linear, square = (np.broadcast_to(x.T, (m, n)) for x in _weights(penalty))
        w = np.zeros((m, n)) if init is None else np.array(np.asarray(init.value).T, np.float64)
        live, rounds, steps = np.arange(m), 0, 0
        while live.size and rounds < self.rounds:
            residual = target[live] - w[live] @ gram - square[live] * w[live]
            unsettled = []
            for r, o in zip(residual, live, strict=True):
                at, before = _Output(gram, target[o], linear[o], square[o]), np.sign(w[o])
                signs = _entered(at, before, r, self.first, self.growth)
                started = rounds == 0 and before.any()
                if started or not np.array_equal(signs, before):
                    w[o], taken = _minimised(at, w[o], signs)
                    steps += taken
                    if started or not np.array_equal(np.sign(w[o]), before):
                        unsettled.append(o)
            live, rounds = np.asarray(unsettled, int), rounds + 1
        value = jnp.asarray(w.T, f.center.dtype)
        stats = {"rounds": rounds, "steps": steps, "largest_support": int(np.max(np.count_nonzero(w, axis=1)))}
        stats |= {"lift": lift} if lift else {}
        return Outcome(value, value != 0, hit_limit=bool(live.size), evidence=Duality(w.T), stats=stats)


class _Output(NamedTuple):
    """min over w of 1/2 <w, (gram + diag(square)) w> - <target, w> + <linear, |w|>."""

    gram: np.ndarray
    target: np.ndarray
    linear: np.ndarray
    square: np.ndarray


def _weights(penalty: L1 | ElasticNet) -> tuple[np.ndarray, np.ndarray]:
    """The factor of |w_i|, and that of w_i^2 / 2; they broadcast to (n, m)."""
    factors = np.ones((1, 1)) if penalty.factors is None else np.asarray(penalty.factors, np.float64)
    ratio = penalty.ratio if isinstance(penalty, ElasticNet) else 1.0
    return float(penalty.weight) * ratio * factors, float(penalty.weight) * (1 - ratio) * factors


def _entered(at: _Output, signs: np.ndarray, residual: np.ndarray, first: int, growth: float) -> np.ndarray:
    """Signs with the entries added whose residual exceeds its bound most."""
    over = np.where(signs == 0, np.abs(residual) - at.linear * (1 + _ROUNDING), 0.0)
    least = _NOTHING * np.max(np.abs(at.target))
    found = np.flatnonzero(over > least)
    places = max(first, int(growth * np.count_nonzero(signs)))
    if found.size > places:
        excess = over[found] / np.maximum(at.linear[found], least)
        found = found[np.argpartition(-excess, places)[:places]]
    signs = signs.copy()
    signs[found] = np.sign(residual[found])
    return signs


def _minimised(at: _Output, start: np.ndarray, signs: np.ndarray) -> tuple[np.ndarray, int]:
    """The minimum over the entries with a sign, from `start`, and the systems solved on the way."""
    active = np.flatnonzero(signs)
    s, w = signs[active], start[active]
    steps = 0
    while steps < _STEPS:
        steps += 1
        end, exact = _at_signs(at, active, s, w)
        move = end - w
        against = (w == 0) & (move * s <= 0)
        if against.any():
            keep = ~against
        else:
            crossing = end * s <= 0
            if not crossing.any():
                settled = exact or np.max(np.abs(move), initial=0.0) <= _ROUNDING * np.max(np.abs(end), initial=0.0)
                w = end
                if settled:
                    break
                continue
            length = np.where(crossing, w / np.where(crossing, w - end, 1.0), np.inf)
            keep = length > np.min(length)
            w = w + np.min(length) * move
        active, s, w = active[keep], s[keep], w[keep]
    full = np.zeros_like(start)
    full[active] = w
    return full, steps


def _at_signs(at: _Output, active: np.ndarray, signs: np.ndarray, near: np.ndarray) -> tuple[np.ndarray, bool]:
    """The minimum on the active entries with their signs fixed; True, or a proximal step towards it and False."""
    matrix = at.gram[np.ix_(active, active)]
    diagonal = np.einsum("ii->i", matrix)
    diagonal += at.square[active]
    sides = at.target[active] - at.linear[active] * signs
    factorise, solve = _linalg.lapack(("potrf", "potrs"), matrix)
    ridge, added = 0.0, 0.0
    largest = float(np.max(diagonal, initial=0.0))
    while active.size:
        factor, failed = factorise(matrix.T, lower=True, clean=False)
        if not failed and np.min(np.diagonal(factor)) ** 2 > active.size * np.finfo(float).eps * largest:
            return solve(factor, sides + added * near, lower=True)[0], added == 0
        ridge = max(10 * ridge, _RIDGE * largest)
        diagonal += ridge
        added += ridge
    return near, True
