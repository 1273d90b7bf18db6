"""The laws of a solver, each a function of the solver and of cases whose optimum is known by enumeration.

`laws.py` asks them of every solver of the registry, `test_laws_bite.py` of solvers that are wrong on purpose.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache, cached_property

import cases
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import CONSTRAINTS, MATRIX_CONSTRAINTS, flat, unflat

import pruneopt as po
from pruneopt.curvature import Gram, LowRank
from pruneopt.objectives import Quadratic, Reconstruction
from pruneopt.solvers import Score, Solver

DEAD = (1, 4)  # the inputs that `starved` takes away


def quadratic(f):
    """(H + lambda I, W0, g) of a quadratic objective, dense and in float64."""
    w0 = flat(f.center).astype(np.float64)
    n = len(w0)
    h = np.stack([flat(f.curvature.mv(unflat(e, f.center))) for e in np.eye(n)], axis=1).astype(np.float64)
    h += f.damping * np.trace(h) / n * np.eye(n)
    return h, w0, np.zeros(n) if f.gradient is None else flat(f.gradient).astype(np.float64)


def refit(f, support):
    """(objective, weights) of the best weights on a support, a row of booleans: least squares in NumPy."""
    h, w0, g = quadratic(f)
    return _refit(h, w0, g, f.constant, support)


def _refit(h, w0, g, constant, support):
    d = np.where(support, 0.0, -w0)
    s = np.flatnonzero(support)
    if len(s):
        d[s] = -np.linalg.lstsq(h[np.ix_(s, s)], (h @ d + g)[s], rcond=None)[0]
    return constant + g @ d + 0.5 * d @ h @ d, w0 + d


def brute_force(f, feasible):
    """(objective, weights, support) of the optimum over feasible supports, given as rows."""
    terms = (*quadratic(f), f.constant)
    found = [_refit(*terms, row) for row in feasible]
    i = int(np.argmin([value for value, _ in found]))
    return *found[i], feasible[i]


@dataclass(frozen=True, eq=False)
class Case:
    """A problem of 12 weights, every support that it allows as a row, and whether the set tells its inputs apart."""

    problem: po.Problem
    feasible: np.ndarray
    has_order: bool = False

    @cached_property
    def best(self):
        """(objective, weights, support) of the optimum: the supports that no other contains are enough."""
        sizes = self.feasible.sum(1)
        return brute_force(self.problem.objective, self.feasible[sizes == sizes.max()])

    def row(self, tree):
        """A tree of the variable's structure as a row of float64 numbers."""
        return flat(tree).astype(np.float64)

    def tree(self, row):
        """A row as such a tree, in the weights' dtype."""
        return unflat(row, self.problem.objective.center)


def _rows(rng, n, correlated):
    """24 rows of n numbers: independent, or strongly correlated."""
    return rng.standard_normal((24, n)) @ (np.eye(n) + correlated * rng.standard_normal((n, n)))


def layer(seed, constraint):
    """The reconstruction of a (6, 2) layer; odd seeds have correlated inputs."""
    rng, dtype = np.random.default_rng([15, seed]), jnp.zeros(()).dtype
    x = _rows(rng, 6, 0.8 * (seed % 2))
    f = Reconstruction(jnp.asarray(rng.standard_normal((6, 2)), dtype), Gram.checked(jnp.asarray(x.T @ x / 24, dtype)))
    rows = cases.every_support()
    allowed, twin = MATRIX_CONSTRAINTS[constraint]
    return Case(po.Problem(f, subject_to=allowed), rows[twin(rows.reshape(-1, 6, 2))], "support" in constraint)


def model(seed, constraint):
    """A low-rank model of the tree of `cases`; odd seeds have correlated gradients."""
    rng, center = np.random.default_rng([16, seed]), cases.tree(100 + seed)
    g = jnp.asarray(_rows(rng, 12, 0.5 * (seed % 2)), jnp.zeros(()).dtype)
    f = Quadratic(center, LowRank.checked(g, center), damping=0.1)
    return Case(
        po.Problem(f, subject_to=CONSTRAINTS[constraint][0]),
        cases.feasible_supports(constraint),
        "support" in constraint,
    )


@cache
def _made(dtype):
    few = [layer(0, "cardinality in each output"), layer(1, "cardinality"), layer(4, "a fixed support")]
    few += [model(0, "cardinality over the tree"), model(1, "cardinality over the tree"), model(4, "a fixed support")]
    more = [layer(i, "cardinality") for i in (0, 2, 3)] + [model(i, "cardinality over the tree") for i in (2, 3)]
    units = [layer(i, "inputs") for i in (0, 1, 6, 7)]
    return few, few + more, units


def taken(solver, every=False, fixed=False):
    """The cases that a solver does not refuse, few or every one, or those of a fixed support alone; units where it
    takes nothing else.
    """
    few, all_of_them, units = _made(jnp.zeros(()).dtype)
    found = [case for case in (all_of_them if every else few) if solver.refuses(case.problem) is None]
    found = found or [case for case in units if solver.refuses(case.problem) is None]
    return [case for case in found if case.has_order or not fixed]


@cache
def plain(solver, case):
    """The answer to the problem as it stands."""
    return po.solve(case.problem, solver)


# ------------------------------------------------------------------------------------------------ other problems


def scaled(problem, w, h):
    """The same problem in other units: W0 times w, H times h."""
    f = problem.objective
    bent = f.curvature
    if isinstance(bent, LowRank):
        bent = replace(bent, gradients=bent.gradients * h**0.5)
    else:
        bent = replace(bent, matrix=bent.matrix * h)
    return replace(problem, objective=replace(f, center=jax.tree.map(lambda x: x * w, f.center), curvature=bent))


def reordered(problem, inputs):
    """(the problem with its outputs, or its inputs, in another order; which weight stands where)."""
    f = problem.objective
    index = unflat(np.arange(12), jax.tree.map(lambda x: x.astype(int), f.center))
    if isinstance(f, Quadratic):
        moved = {"a": index["a"][::-1] if inputs else index["a"][:, jnp.asarray([2, 0, 3, 1])], "b": index["b"]}
        bent = replace(f.curvature, gradients=f.curvature.gradients[:, flat(moved)])
    else:
        order = jnp.asarray([3, 0, 5, 1, 4, 2]) if inputs else jnp.arange(6)
        moved = index[order] if inputs else index[:, ::-1]
        bent = Gram.checked(f.curvature.matrix[order][:, order])
    center = unflat(flat(f.center)[flat(moved)], f.center)
    return replace(problem, objective=replace(f, center=center, curvature=bent)), flat(moved)


def starved(problem, times):
    """The layer's problem without any data for the inputs DEAD, whose weights are large."""
    f = problem.objective
    live = np.isin(np.arange(6), DEAD, invert=True)
    h = jnp.where(jnp.asarray(np.outer(live, live)), f.curvature.matrix, jnp.zeros((), f.center.dtype))
    center = jnp.where(jnp.asarray(live)[:, None], f.center, times * f.center)
    return replace(problem, objective=replace(f, center=center, curvature=Gram.checked(h)))


# ------------------------------------------------------------------------------------------------ the laws


def is_feasible(solver: Solver, case: Case, tolerance: float) -> None:
    """The support is one of those that NumPy allows, what is cut is zero, the objective is the formula's."""
    found = plain(solver, case)
    support, w = flat(found.support), case.row(found.value)
    assert (case.feasible == support).all(1).any()
    assert not w[~support].any()
    h, w0, g = quadratic(case.problem.objective)
    d = w - w0
    assert found.objective == pytest.approx(g @ d + 0.5 * d @ h @ d, rel=1e2 * tolerance)


def repeats_itself(solver: Solver, case: Case, tolerance: float) -> None:
    """The same answer to the bit for the same key."""
    first, again = plain(solver, case), po.solve(case.problem, solver)
    np.testing.assert_array_equal(flat(first.support), flat(again.support))
    np.testing.assert_array_equal(flat(first.value), flat(again.value))


def proves_nothing_false(solver: Solver, case: Case, tolerance: float) -> None:
    """bound <= optimum <= objective, and `optimal` only at the optimum."""
    found, best = plain(solver, case), case.best[0]
    slack = 1e2 * tolerance * max(best, found.objective)
    assert found.bound <= best + slack
    assert best <= found.objective + slack
    assert found.status is not po.Status.OPTIMAL or found.objective <= best * (1 + 2e-6) + slack


def keeps_its_promises(solver: Solver, case: Case, tolerance: float) -> None:
    """Never worse than what it names in `never_worse_than`, from a poor start and from the optimum itself."""
    if not solver.never_worse_than:
        return
    f = case.problem.objective
    h, w0, g = quadratic(f)
    poor = po.solve(case.problem, Score("random"), key=1)
    for row, support in ((case.row(poor.value), flat(poor.support)), case.best[1:]):
        start = replace(poor, value=case.tree(row), support=unflat(support, poor.support))
        found = po.solve(case.problem, solver, init=start)
        d = case.row(start.value) - w0, np.where(support, 0, -w0), -w0
        init, mask, zero = (f.constant + g @ x + 0.5 * x @ h @ x for x in d)
        least = {"init": init, "mask": mask, "zero": zero, "refit": refit(f, flat(found.support))[0]}
        for name in solver.never_worse_than:
            assert found.objective <= least[name] * (1 + 1e-6) + 1e2 * tolerance * zero, name


def scales(solver: Solver, case: Case, tolerance: float) -> None:
    """In other units of the weights and of the loss it is the same answer; powers of two, which round alike."""
    first = plain(solver, case)
    for w, h in ((2.0**10, 1.0), (1.0, 2.0**-13)):
        moved = po.solve(scaled(case.problem, w, h), solver)
        np.testing.assert_array_equal(flat(moved.support), flat(first.support))
        assert moved.objective == pytest.approx(w * w * h * first.objective, rel=1e2 * tolerance)


def _follows(solver, case, tolerance, inputs):
    if case.has_order:
        return
    problem, where = reordered(case.problem, inputs)
    first, moved = plain(solver, case), po.solve(problem, solver)
    np.testing.assert_array_equal(flat(moved.support), flat(first.support)[where])
    assert moved.objective == pytest.approx(first.objective, rel=1e2 * tolerance)


def follows_the_order_of_outputs(solver: Solver, case: Case, tolerance: float) -> None:
    """Outputs in another order: the same answer in that order."""
    _follows(solver, case, tolerance, inputs=False)


def follows_the_order_of_inputs(solver: Solver, case: Case, tolerance: float) -> None:
    """Inputs in another order: the same answer in that order."""
    _follows(solver, case, tolerance, inputs=True)


def sees_live_inputs_alone(solver: Solver, case: Case, tolerance: float) -> None:
    """An input without data costs no budget, and its weights change nothing."""
    if case.has_order or not isinstance(case.problem.objective, Reconstruction):
        return
    one, other = (po.solve(starved(case.problem, times), solver) for times in (10.0, -70.0))
    support = np.asarray(one.support)
    assert not support[list(DEAD)].any()
    assert support.sum() == case.feasible.sum(1).max()
    np.testing.assert_array_equal(flat(other.support), flat(one.support))
    np.testing.assert_allclose(flat(other.value), flat(one.value), rtol=1e2 * tolerance, atol=1e2 * tolerance)


LAWS: dict[str, Callable[[Solver, Case, float], None]] = {
    law.__name__: law
    for law in (
        is_feasible,
        repeats_itself,
        proves_nothing_false,
        keeps_its_promises,
        scales,
        follows_the_order_of_outputs,
        follows_the_order_of_inputs,
        sees_live_inputs_alone,
    )
}


def of_all(law: Callable[[Solver, Case, float], None], solver: Solver, of: list[Case], tolerance: float) -> None:
    """One law of a solver on each of these cases."""
    assert of, "no case for this solver"
    for case in of:
        law(solver, case, tolerance)


def error(solver: Solver, of: list[Case]) -> float:
    """The geometric mean of objective over optimum."""
    return float(np.exp(np.mean([np.log(plain(solver, case).objective / case.best[0]) for case in of])))


def is_near_the_optimum(solver: Solver, of: list[Case], factor: float) -> None:
    """Within the factor of the optimum on average, and better than supports at random where there is a choice."""
    assert error(solver, of) <= factor
    free = [case for case in of if not case.has_order]
    assert not free or error(solver, free) < 0.9 * error(Score("random"), free)
