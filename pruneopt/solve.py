"""The one driver: refuse, run, verify, judge."""

from __future__ import annotations

import time
from contextlib import nullcontext
from typing import Any

import jax
import jax.numpy as jnp

from pruneopt import _linalg, _tree
from pruneopt.certify import verify
from pruneopt.network.leaves import as_key, check_finite, check_like
from pruneopt.objectives.reconstruction import Reconstruction
from pruneopt.problem import Problem
from pruneopt.solution import Solution, Status
from pruneopt.solvers.base import Solver, Start, ignored_values, run

Tree = Any


class SolveError(RuntimeError):
    """A solver's result is not usable: not finite, or infeasible. The message is the status's sentence."""


@_tree.on_host
def solve(
    problem: Problem,
    solver: Solver,
    *,
    init: Solution | Tree | None = None,
    key: jax.Array | int | None = None,
    throw: bool = True,
) -> Solution:
    """minimise problem.objective(w) + problem.penalty(w) subject to problem.subject_to.

    init: where to start: a Solution, a tree of weights (its support is where they are nonzero) or a tree of boolean
        masks (the trained weights on it), feasible. key: for randomised solvers; a key or a seed.
    throw: raise SolveError for a result that is not finite or not feasible; otherwise it only says so in `status`.

    NumPy weights come back as NumPy. Feasibility, objective and bound are recomputed here, whatever the solver says.
    `stats` has what the solver had to say and, for a Reconstruction, relative_error (undamped). How far a support is
    from 1-swap optimal costs more than many a solver: `certify(problem, solution, exchange=True)` says it.
    Raises ValueError where the solver refuses the problem, `init` does not fit or breaks the constraint, or the support
    empties a leaf that the constraint does not allow to be empty (layer collapse).
    """
    for name, part, kind in (("problem", problem, Problem), ("solver", solver, Solver)):
        if not isinstance(part, kind):
            raise TypeError(f"{name} is {part!r}; pass a pruneopt {kind.__name__}")
    refusal = solver.refuses(problem) or ignored_values(problem, solver)
    if refusal:
        raise ValueError(refusal)
    start = None if init is None else _start(problem, init)
    key = as_key(key)
    layer = isinstance(problem.objective, Reconstruction)
    with _linalg.host_threads(len(problem.objective.center)) if layer else nullcontext():
        return _solved(problem, solver, start, key, throw)


def _solved(problem: Problem, solver: Solver, start: Start | None, key: jax.Array, throw: bool) -> Solution:
    clock = time.perf_counter()
    outcome = run(solver, problem, start, key)
    jax.block_until_ready((outcome.value, outcome.support))
    value = jax.tree.map(_tree.like, outcome.value, problem.objective.center)
    support = jax.tree.map(_tree.placed, outcome.support, problem.objective.center)
    seconds = time.perf_counter() - clock
    path = problem.emptied(support)
    if path is not None:
        raise ValueError(
            f"subject_to={problem.subject_to!r} keeps no weight of {_tree.called(path)}: the layer would collapse; "
            "lower the sparsity, pass floor=1 (or more) to keep some, or floor=0 to allow it"
        )
    check = verify(problem, value, support, outcome.evidence)
    status = Status.LIMIT if outcome.hit_limit and check.status is Status.FEASIBLE else check.status
    if throw and not status.is_usable:
        raise SolveError(f"{status.value} ({solver!r}, {check.violation} units over, {check.outside} outside)")
    stats = {"solver": solver, "seconds": seconds, **outcome.stats}
    if isinstance(problem.objective, Reconstruction) and status.is_usable:
        stats["relative_error"] = problem.objective.relative_error(value, check.objective)
    return Solution(value, support, status, check.objective, check.bound, check.gap, outcome.evidence, stats)


def _start(problem: Problem, init: Any) -> Start:
    center = problem.objective.center
    given = init.value if isinstance(init, Solution) else init
    check_like(given, center, "init")
    check_finite(given, "init")
    if isinstance(init, Solution):
        start = Start(init.value, init.support)
    elif all(leaf.dtype == bool for leaf in jax.tree.leaves(init)):
        start = Start(_tree.masked(center, init), jax.tree.map(jnp.asarray, init))
    else:
        start = Start(init, jax.tree.map(lambda x: jnp.asarray(x) != 0, init))
    units, amount = problem.violation(start.support), problem.value_violation(start.value)
    if units or amount > 0:
        how = f"{units} units" if units else f"{amount:.3g}"
        raise ValueError(
            f"init breaks subject_to={problem.subject_to!r} by {how}; pass a feasible one, such as a Solution of this "
            "problem, or the mask subject_to.select(scores)"
        )
    return start
