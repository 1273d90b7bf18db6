"""Evidence owns its bound and is trusted in nothing: random or foreign evidence never passes the optimum."""

import inspect
from dataclasses import replace

import cases
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import MATRIX_CONSTRAINTS, flat, gram, matrix, unflat
from laws import plain_descent, problem_of
from solver_laws import brute_force

import pruneopt as po
from pruneopt import bounds, penalties
from pruneopt.bounds import Duality, Evidence, Separable, StrongConvexity
from pruneopt.curvature import Gram
from pruneopt.objectives import Reconstruction

KINDS = {c for name in bounds.__all__ if inspect.isclass(c := getattr(bounds, name)) and not inspect.isabstract(c)}


def random_points(like, seed, count=4):
    rng = np.random.default_rng(seed)
    for i in range(count):
        row = 10.0 ** (i - 2) * rng.standard_normal(flat(like).size) * (rng.random(flat(like).size) < 0.7)
        yield unflat(row, like)


def random_evidence(like, seed):
    """Every kind, with arrays that have nothing to do with the problem."""
    made = [Separable(), StrongConvexity(), Duality(jax.tree.map(np.zeros_like, like))]
    made += [Duality(jax.tree.map(np.asarray, point)) for point in random_points(like, seed)]
    assert {type(e) for e in made} == KINDS, "a kind of evidence without its law"
    return made


@pytest.mark.parametrize(
    "f_name",
    ["identity", "diagonal, damped", "diagonal with a gradient", "reconstruction", "singular reconstruction, damped"],
)
def test_random_evidence_stays_below_brute_force(f_name):
    is_matrix = "reconstruction" in f_name
    matrices, trees = ("cardinality", "1:3 along the inputs"), ("cardinality over the tree", "cardinality with a floor")
    names = (*(matrices if is_matrix else trees), "a fixed support")
    for c_name in names:
        problem = problem_of(f_name, c_name)
        rows = cases.every_support()
        feasible = (
            rows[MATRIX_CONSTRAINTS[c_name][1](rows.reshape(-1, 6, 2))]
            if is_matrix
            else cases.feasible_supports(c_name)
        )
        best = brute_force(problem.objective, feasible)[0]
        center = problem.objective.center
        for i, evidence in enumerate(random_evidence(center, 1)):
            for value in random_points(center, 2 + i):
                support = jax.tree.map(lambda w: w != 0, value)
                bound = evidence.bound(problem, value, support)
                rounding = 1e-14 * max(abs(best), problem.value(value))
                assert not bound > best + rounding, (c_name, evidence)


PENALISED = {
    "l1": penalties.L1(0.1),
    "elastic net": penalties.ElasticNet(0.1, 0.7),
    "group lasso": penalties.GroupLasso(0.05, penalties.Partition.slices(np.zeros((6, 2), np.float32), axis=0)),
    "mcp": penalties.MCP(0.1, 2.0),
}


@pytest.mark.parametrize("name", PENALISED)
@pytest.mark.parametrize("rank", [None, 3])
def test_random_evidence_stays_below_a_penalised_optimum(name, rank):
    f = Reconstruction(matrix(1), Gram.checked(gram(rank=rank)))
    problem = po.Problem(f, penalty=PENALISED[name])
    best = plain_descent(problem)
    for i, evidence in enumerate(random_evidence(f.center, 3)):
        for value in random_points(f.center, 4 + i, 2):
            bound = evidence.bound(problem, value, value != 0)
            assert not bound > best * (1 + 1e-9), evidence
            assert bound == -np.inf or (isinstance(evidence, Duality) and problem.penalty.is_convex)


def test_random_evidence_stays_below_the_optimum_in_a_ball():
    f = Reconstruction(matrix(1), Gram.checked(gram(rank=3)))
    problem = po.Problem(f, subject_to=po.constraints.L1Ball(1.5))
    best = po.solve(problem, po.solvers.ProximalGradient(iterations=20_000, tolerance=1e-10)).objective
    for evidence in random_evidence(f.center, 5):
        assert not evidence.bound(problem, f.center, f.center != 0) > best * (1 + 1e-9)


def test_a_point_off_the_fixed_support_lends_strong_convexity_nothing():
    """f(w) - |r|^2 / 2c bounds the w that share its values off the support: they must be zero there."""
    mask = np.zeros((6, 2), bool)
    mask[0] = True
    h, w0 = np.eye(6), np.arange(1.0, 13.0).reshape(6, 2)
    f = Reconstruction(jnp.asarray(w0), Gram.checked(jnp.asarray(h)), damping=1.0)
    problem = po.Problem(f, subject_to=po.constraints.Support(mask))
    optimum = float(np.sum(np.where(mask, 0, w0) ** 2))  # (1 + lambda) / 2 = 1
    value = jnp.asarray(np.where(mask, w0, -w0))
    assert StrongConvexity().bound(problem, value, mask) <= optimum * (1 + 1e-12)


def test_evidence_that_is_not_finite_or_of_other_shapes_proves_nothing():
    problem = po.Problem(Reconstruction(matrix(1), Gram.checked(gram())), penalty=penalties.L1(0.1))
    solution = po.solve(problem, po.solvers.ActiveSet())
    for bad in (np.nan, np.inf, 1e200):
        point = np.full((6, 2), bad)
        with np.errstate(all="ignore"):
            assert Duality(point).bound(problem, solution.value, solution.support) == -np.inf
    with pytest.raises(ValueError, match=r"evidence: .* has shape \(2, 2\)"):
        Duality(np.zeros((2, 2))).bound(problem, solution.value, solution.support)


def test_certify_takes_evidence_alone():
    problem = problem_of("identity", "cardinality over the tree")
    solution = po.solve(problem, po.solvers.Score())
    with pytest.raises(TypeError, match="evidence is a str; pass one of"):
        po.certify(problem, replace(solution, evidence="I am optimal"))


def test_evidence_is_final_and_one_file_a_kind():
    assert {c for c in Evidence.__subclasses__() if c.__module__.startswith("pruneopt")} == KINDS
    assert not any(kind.__subclasses__() for kind in KINDS)
    assert len({kind.__module__ for kind in KINDS}) == len(KINDS)
