"""Every public object obeys the laws of its kind, in strict float64 and in JAX's default float32."""

import inspect
from dataclasses import replace

import cases
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import solver_laws
from cases import (
    CONSTRAINTS,
    CURVATURES,
    MATRIX_CONSTRAINTS,
    MATRIX_PENALTIES,
    OBJECTIVES,
    PENALISED,
    PENALTIES,
    REFUSED,
    SOLVERS,
    TAKES,
    flat,
    unflat,
)
from solver_laws import brute_force

import pruneopt as po
from pruneopt import constraints, curvature, objectives, penalties, solvers


@pytest.fixture(params=["float64", pytest.param("float32", marks=[pytest.mark.default_flags, pytest.mark.slow])])
def tolerance(request):
    """The test runs in both modes; the value is the relative error to allow."""
    return 1e-12 if request.param == "float64" else 1e-5


def public_classes(room):
    """What solves, states or allows: final classes, without the plain data that they hand over."""
    data = {solvers.Start, solvers.Outcome}
    return {c for n in room.__all__ if inspect.isclass(c := getattr(room, n)) and not inspect.isabstract(c)} - data


def types_within(thing):
    """Types of an object and of what its fields hold."""
    found = {type(thing)}
    for part in getattr(thing, "__dict__", {}).values():
        for x in part if isinstance(part, tuple) else part.values() if isinstance(part, dict) else [part]:
            found |= {type(x)} | (types_within(x) if type(x).__module__.startswith("pruneopt") else set())
    return found


@pytest.mark.parametrize(
    ("room", "registered"),
    [
        (constraints, lambda: [k for k, _ in CONSTRAINTS.values()]),
        (penalties, lambda: [k for k, _ in PENALTIES.values()]),
        (curvature, lambda: [make()[0] for make in CURVATURES.values()]),
        (objectives, lambda: [make() for make in OBJECTIVES.values()]),
        (solvers, SOLVERS.values),
    ],
    ids=["constraints", "penalties", "curvature", "objectives", "solvers"],
)
def test_every_public_class_is_in_the_registry(room, registered):
    present = set().union(*(types_within(x) for x in registered()))
    assert public_classes(room) <= present, f"add a row to tests/cases.py for {public_classes(room) - present}"


# ---------------------------------------------------------------------------------------------- constraints


@pytest.mark.parametrize("name", CONSTRAINTS)
class TestConstraint:
    def test_violation_is_zero_exactly_on_the_set(self, name, tolerance):
        constraint, oracle = CONSTRAINTS[name]
        rows = cases.every_support()
        feasible = oracle(*cases._leaves(rows))
        rng = np.random.default_rng(0)
        some = np.concatenate(
            [
                rng.choice(np.flatnonzero(feasible), 12),
                rng.choice(np.flatnonzero(~feasible), 12) if (~feasible).any() else [],
            ]
        )
        like = {k: jnp.zeros(s, bool) for k, s in cases.SHAPES.items()}
        for i in some.astype(int):
            assert (constraint.violation(unflat(rows[i], like)) == 0) == feasible[i], rows[i]

    def test_select_beats_every_feasible_support(self, name, tolerance):
        constraint, _ = CONSTRAINTS[name]
        scores = jax.tree.map(jnp.abs, cases.tree(20))
        constraint.check(scores)
        chosen = flat(constraint.select(scores))
        feasible = cases.feasible_supports(name)
        assert (feasible == chosen).all(1).any(), "select is not feasible"
        assert constraint.exact
        best = (feasible @ flat(scores).astype(np.float64)).max()
        assert flat(scores)[chosen].sum() == pytest.approx(best, rel=tolerance)

    def test_infinite_scores_are_obeyed(self, name, tolerance):
        constraint, _ = CONSTRAINTS[name]
        feasible = cases.feasible_supports(name)
        rng = np.random.default_rng(21)
        scores = np.abs(flat(cases.tree(22))).astype(np.float64)
        largest = feasible[feasible.sum(1) == feasible.sum(1).max()]
        reference = largest[rng.integers(len(largest))]
        forced = reference & (rng.random(12) < 0.4)
        barred = ~reference & (rng.random(12) < 0.4)
        marked = np.where(forced, np.inf, np.where(barred, -np.inf, scores))
        chosen = flat(constraint.select(unflat(marked, cases.tree(22))))
        assert not (chosen & barred).any()
        assert chosen[forced].all()
        allowed = feasible[(feasible[:, forced]).all(1) & ~(feasible & barred).any(1)]
        assert (allowed == chosen).all(1).any()
        free = np.where(forced, 0.0, scores)
        if not isinstance(constraint, constraints.Units) or not forced.any():
            assert free[chosen].sum() == pytest.approx((allowed @ free).max(), rel=10 * tolerance)

    def test_select_is_the_same_under_jit_and_equivariant(self, name, tolerance):
        constraint, _ = CONSTRAINTS[name]
        scores = jax.tree.map(jnp.abs, cases.tree(23))
        plain = constraint.select(scores)
        jitted = jax.jit(constraint.select)(scores)
        np.testing.assert_array_equal(flat(plain), flat(jitted))
        if "support" not in name and "2:4" not in name:  # those tell the outputs of a apart
            order = np.asarray([2, 0, 3, 1])
            moved = constraint.select({**scores, "a": scores["a"][:, order]})
            np.testing.assert_array_equal(np.asarray(moved["a"]), np.asarray(plain["a"])[:, order])

    def test_ties_go_to_the_first(self, name, tolerance):
        constraint, _ = CONSTRAINTS[name]
        equal = jax.tree.map(jnp.ones_like, cases.tree(0))
        falling = unflat(np.linspace(1.001, 1.0, 12), cases.tree(0))  # the first a little better, sums in order too
        if isinstance(constraint, constraints.Units):
            return
        np.testing.assert_array_equal(flat(constraint.select(equal)), flat(constraint.select(falling)))

    def test_project_gives_the_nearest_point(self, name, tolerance):
        """p is nearest to w if and only if <w - p, z - p> <= 0 for all z of the set."""
        constraint, _ = CONSTRAINTS[name]
        for seed in (20, 22, 23) if constraint.bounds_values else ():
            w = jax.tree.map(lambda x: 3 * x, cases.tree(seed))
            p = constraint.project(w)
            assert constraint.value_violation(p) == 0
            away = flat(w).astype(np.float64) - flat(p)
            most = constraint.largest_product(unflat(away, w))
            assert most <= away @ flat(p) + 1e2 * tolerance * abs(most)

    def test_relaxed_asks_for_less(self, name, tolerance):
        constraint, _ = CONSTRAINTS[name]
        scores = jax.tree.map(jnp.abs, cases.tree(24))
        full = flat(constraint.select(scores))
        half = constraint.relaxed(0.5)
        loose = flat(half.select(scores))
        assert loose.sum() >= full.sum()
        assert constraint.density(scores) <= half.density(scores) <= 1
        np.testing.assert_array_equal(flat(constraint.relaxed(1.0).select(scores)), full)
        with pytest.raises(ValueError, match="cut="):
            constraint.relaxed(1.5)


# ---------------------------------------------------------------------------------------------- penalties


@pytest.mark.parametrize("name", PENALTIES)
class TestPenalty:
    def test_value_is_the_formula(self, name, tolerance):
        penalty, twin = PENALTIES[name]
        penalty.check(cases.tree(30))
        w = cases.tree(30)
        w["a"] = w["a"].at[0, 1].set(0)
        assert penalty.value(w) == pytest.approx(twin(flat(w).astype(np.float64)[None])[0], rel=1e-12)
        assert penalty.value(jax.tree.map(jnp.zeros_like, w)) == 0

    @pytest.mark.parametrize("step", [0.5, 2.0, 5.0])
    def test_prox_minimises_on_a_grid(self, name, step, tolerance):
        """The whole plane of two weights, the others at zero, where every penalty here leaves them."""
        penalty, twin = PENALTIES[name]
        prox = jax.jit(penalty.prox)
        grid = np.linspace(-3, 3, 301)
        x, y = (g.reshape(-1) for g in np.meshgrid(grid, grid))
        for i, j, at in ((0, 4, (1.7, -0.6)), (2, 5, (0.4, 0.3)), (3, 9, (-2.5, 2.1)), (8, 11, (1.1, 2.8))):
            plane, w = np.zeros((x.size, 12)), np.zeros(12)
            plane[:, i], plane[:, j], w[[i, j]] = x, y, at
            cost = twin(plane) + (x - at[0]) ** 2 / (2 * step) + (y - at[1]) ** 2 / (2 * step)
            v = flat(prox(unflat(w, cases.tree(0)), step)).astype(np.float64)
            assert set(np.flatnonzero(v)) <= {i, j}
            found = twin(v[None])[0] + np.sum((v - w) ** 2) / (2 * step)
            least = cost.min()
            assert found <= least + 10 * tolerance * abs(least)
            if penalty.is_convex:  # elsewhere far points may tie
                assert np.abs(plane[np.argmin(cost)] - v).max() <= 0.05

    def test_prox_beats_all_points_around(self, name, tolerance):
        penalty, twin = PENALTIES[name]
        rng = np.random.default_rng(31)
        for step, seed in ((0.3, 32), (1.0, 33), (4.0, 34)):
            w = cases.tree(seed)
            v = flat(penalty.prox(w, step)).astype(np.float64)
            centre = flat(w).astype(np.float64)
            moves = rng.standard_normal((1500, 12)) * 10.0 ** rng.uniform(-4, 0.5, (1500, 1))
            moves *= rng.random((1500, 12)) < rng.choice([0.1, 0.5, 1.0], (1500, 1))
            others = np.concatenate([v + moves, (v + moves) * (rng.random((1500, 12)) < 0.7), np.zeros((1, 12))])
            cost = twin(others) + np.sum((others - centre) ** 2, axis=1) / (2 * step)
            found = twin(v[None])[0] + np.sum((v - centre) ** 2) / (2 * step)
            assert found <= cost.min() + 10 * tolerance * abs(cost.min())

    @pytest.mark.parametrize("step", [0.4, 1.0, 6.0])
    def test_zero_is_optimal_exactly_from_weight_max_on(self, name, step, tolerance):
        gradient = cases.tree(30)
        penalty = PENALTIES[name][0]
        largest = penalty.weight_max(gradient, step)
        for factor, zero in ((1.001, True), (0.999, False)):
            heavier = replace(penalty, weight=largest * factor)
            moved = heavier.prox(jax.tree.map(lambda g: -step * g, gradient), step)
            assert bool((flat(moved) == 0).all()) is zero

    def test_conjugate_is_tight_at_the_prox_and_below_elsewhere(self, name, tolerance):
        """Fenchel and Young: P(w) + P*(u) >= <u, w>, equal where u is a subgradient at w."""
        penalty = PENALTIES[name][0]
        if not penalty.is_convex:
            with pytest.raises(ValueError, match="not convex"):
                penalty.conjugate(cases.tree(30))
            return
        w = cases.tree(35)
        v = penalty.prox(w, 0.7)
        u = jax.tree.map(lambda a, b: (np.asarray(a, np.float64) - np.asarray(b)) / (0.7 * (1 + 10 * tolerance)), w, v)
        product = float(flat(u) @ flat(v).astype(np.float64))
        assert penalty.value(v) + penalty.conjugate(u) == pytest.approx(product, rel=1e3 * tolerance)
        for other in (cases.tree(36), cases.tree(37)):
            assert penalty.value(other) + penalty.conjugate(u) >= float(flat(u) @ flat(other)) * (1 - tolerance)
        assert penalty.value(v) + penalty.conjugate(jax.tree.map(lambda x: 9 * x, u)) > 9 * product

    def test_steps_may_differ_among_entries_where_it_is_entrywise(self, name, tolerance):
        penalty, w = PENALTIES[name][0], cases.tree(38)
        steps = jax.tree.map(lambda x: jnp.asarray(np.random.default_rng(39).uniform(0.1, 5, x.shape), x.dtype), w)
        if not penalty.is_entrywise:
            with pytest.raises(ValueError, match="step differs among entries"):
                penalty.prox(w, steps)
            return
        together = flat(penalty.prox(w, steps))
        for i in range(0, 12, 5):
            assert together[i] == pytest.approx(flat(penalty.prox(w, float(flat(steps)[i])))[i], rel=10 * tolerance)


# ---------------------------------------------------------------------------------------------- curvature


@pytest.mark.parametrize("name", CURVATURES)
class TestCurvature:
    def dense(self, h, like):
        columns = [flat(h.mv(unflat(e, like))) for e in np.eye(flat(like).size)]
        return np.stack(columns, axis=1).astype(np.float64)

    def test_is_symmetric_semidefinite_and_its_diagonal_is_right(self, name, tolerance):
        h, like = CURVATURES[name]()
        dense = self.dense(h, like)
        np.testing.assert_allclose(dense, dense.T, atol=tolerance)
        if h.semidefinite:
            assert np.linalg.eigvalsh(dense).min() > -tolerance * np.abs(dense).max() * len(dense)
        wide = jax.tree.map(lambda d, x: jnp.broadcast_to(d, x.shape), h.diagonal(like), like)
        np.testing.assert_allclose(flat(wide), np.diag(dense), rtol=tolerance, atol=tolerance)

    def test_mv_is_linear_and_form_is_its_form(self, name, tolerance):
        h, like = CURVATURES[name]()
        dense = self.dense(h, like)
        x, y = (np.random.default_rng(i).standard_normal(len(dense)).astype(flat(like).dtype) for i in (40, 41))
        np.testing.assert_allclose(flat(h.mv(unflat(x, like))), dense @ x, rtol=1e2 * tolerance, atol=1e2 * tolerance)
        d = x.astype(np.float64) - y
        expected = d @ dense @ d + 0.25 * d @ d
        assert h.form(unflat(x, like), unflat(y, like), 0.25) == pytest.approx(expected, rel=1e2 * tolerance)


# ---------------------------------------------------------------------------------------------- objectives


@pytest.mark.parametrize("name", [n for n in OBJECTIVES if n not in ("loss", "scores")])
class TestQuadratic:
    def test_value_is_the_formula(self, name, tolerance):
        f = OBJECTIVES[name]()
        w0 = flat(f.center).astype(np.float64)
        n = len(w0)
        h = np.zeros((n, n))
        if f.curvature is not None:
            h = np.stack([flat(f.curvature.mv(unflat(e, f.center))) for e in np.eye(n)], axis=1).astype(np.float64)
        h += f.damping * np.trace(h) / n * np.eye(n)
        g = np.zeros(n) if f.gradient is None else flat(f.gradient).astype(np.float64)
        w = np.random.default_rng(50).standard_normal(n).astype(flat(f.center).dtype)
        d = w.astype(np.float64) - w0
        assert f.value(unflat(w, f.center)) == pytest.approx(f.constant + g @ d + 0.5 * d @ h @ d, rel=1e2 * tolerance)
        assert f.value(f.center) == f.constant

    def test_saliency_is_the_cost_of_removing_one_weight(self, name, tolerance):
        f = OBJECTIVES[name]()
        w0 = flat(f.center)
        alone = [f.value(unflat(np.where(np.arange(len(w0)) == i, 0, w0), f.center)) for i in range(len(w0))]
        np.testing.assert_allclose(
            flat(f.saliency()), np.array(alone) - f.constant, rtol=1e2 * tolerance, atol=1e2 * tolerance
        )


# ---------------------------------------------------------------------------------------------- solvers


GIVEN = ("polish", "conjugate gradients")  # they start from a support that is given
SLOW = ("CHITA", "global ADMM")


def problem_of(f_name, c_name):
    table = MATRIX_CONSTRAINTS if "reconstruction" in f_name else CONSTRAINTS
    return po.Problem(OBJECTIVES[f_name](), subject_to=table[c_name][0])


FEW = ("identity", "empirical Fisher, damped", "reconstruction")
FLOAT32 = [pytest.mark.default_flags, pytest.mark.slow]
BY_TABLE = pytest.mark.parametrize(
    ("f_name", "tolerance"),
    [(name, "float64") for name in OBJECTIVES] + [pytest.param(name, "float32", marks=FLOAT32) for name in FEW],
    indirect=["tolerance"],
)


@BY_TABLE
@pytest.mark.parametrize(
    "solver_name",
    [pytest.param(name, marks=pytest.mark.slow) if name in SLOW else name for name in SOLVERS],
)
@pytest.mark.cases(6)
def test_solves_or_refuses_as_the_table_says(f_name, solver_name, tolerance):
    """The same again, and under a set and everything, is the same answer."""
    solver = SOLVERS[solver_name]
    for c_name in MATRIX_CONSTRAINTS if "reconstruction" in f_name else CONSTRAINTS:
        problem = problem_of(f_name, c_name)
        fixed = c_name in ("a fixed support", "all kept")
        takes = solver_name in TAKES[f_name] or (fixed and f"{solver_name} s" in TAKES[f_name])
        takes |= f"{solver_name} *" in TAKES[f_name] and c_name not in REFUSED[solver_name]
        if problem.subject_to.bounds_values:
            takes = solver.projects and f_name in PENALISED[solver_name]
        same = problem.subject_to
        for sets in (
            (constraints.Support(problem.full_support()), same),
            (same, constraints.Cardinality(sparsity=0.0)),
        ):
            same = constraints.Intersection(sets)
        other = po.Problem(problem.objective, subject_to=same)
        if not takes:
            for refused in (problem, other):
                with pytest.raises(ValueError, match=r"\w"):
                    po.solve(refused, solver)
            continue
        solution = po.solve(problem, solver)
        assert solution.status.is_usable
        check = po.certify(problem, solution)
        assert (check.violation, check.outside) == (0, 0)
        assert check.objective == solution.objective
        assert solution.bound <= solution.objective * (1 + 1e-6) + 1e-12
        if fixed or c_name == "cardinality in each leaf":  # the same again, to the bit
            np.testing.assert_array_equal(flat(po.solve(problem, solver).value), flat(solution.value))
        again = po.solve(other, solver)
        np.testing.assert_array_equal(flat(again.support), flat(solution.support), err_msg=c_name)
        scale = np.abs(flat(solution.value)).max(initial=1.0)
        np.testing.assert_allclose(flat(again.value), flat(solution.value), atol=1e2 * tolerance * scale)
        assert again.status is solution.status
        assert again.bound == pytest.approx(solution.bound, rel=1e2 * tolerance), c_name


@pytest.mark.parametrize(
    "f_name", ["identity", "diagonal, damped", "singular reconstruction, damped", "reconstruction"]
)
@pytest.mark.cases(1)
def test_bound_is_below_brute_force_is_below_objective(f_name, tolerance):
    matrix = "reconstruction" in f_name
    for c_name in (
        ("cardinality", "1:3 along the inputs", "inputs", "a fixed support")
        if matrix
        else ("cardinality with a floor", "1:2 along the inputs", "neurons", "a fixed support")
    ):
        problem = problem_of(f_name, c_name)
        rows = cases.every_support()
        feasible = (
            rows[MATRIX_CONSTRAINTS[c_name][1](rows.reshape(-1, 6, 2))] if matrix else cases.feasible_supports(c_name)
        )
        best = brute_force(problem.objective, feasible)[0]
        names = {
            n.removesuffix(" s").removesuffix(" *")
            for n in TAKES[f_name]
            if not n.endswith(" s") or c_name == "a fixed support"
        }
        for solver_name in sorted(names):
            if c_name in REFUSED.get(solver_name, ()):
                continue
            solution = po.solve(problem, SOLVERS[solver_name])
            slack = 1e2 * tolerance * max(best, solution.objective, 1e-3)
            assert solution.bound <= best + slack, solver_name
            assert best <= solution.objective + slack, solver_name
            if solution.status is po.Status.OPTIMAL:
                assert solution.objective <= best + slack + 1e-6 * best, solver_name
        score = po.solve(problem, SOLVERS["saliency"])
        assert (score.status is po.Status.OPTIMAL) == (not matrix), "separable problems are proven"
        polished = po.solve(problem, SOLVERS["saliency, then polish"])
        assert polished.objective <= score.objective * (1 + tolerance)


# Geometric mean of objective over optimum on the cases of `solver_laws`, measured and rounded up.
WITHIN = {
    "saliency": 1.9,
    "absolute": 1.9,
    "relative": 2.9,
    "polish": 1 + 1e-6,
    "saliency, then polish": 1.4,
    "conjugate gradients": 1 + 1e-6,
    "ADMM": 1.1,
    "auto": 1.01,
    "ALPS": 1.1,
    "block OBS": 1.2,
    "Thanos": 1.5,
    "hard thresholding": 1.45,
    "Frank-Wolfe": 1.6,
    "sparse swaps": 1.7,
    "greedy OBS": 1.02,
    "greedy units": 1.01,
    "saliency, then swap": 1.06,
    "OBS": 1.06,
    "CHITA": 1.5,
    "summed OBS": 1.4,
    "pursuit": 1.1,
    "CBS": 1.45,
    "global ADMM": 1.3,
}

# (solver, law): why a solver is free of a law, which it does break.
EXEMPT = {
    ("random", "follows_the_order_of_outputs"): "draws a number a place",
    ("random", "follows_the_order_of_inputs"): "draws a number a place",
    ("random", "sees_live_inputs_alone"): "looks at no data",
    ("relative", "sees_live_inputs_alone"): "as published: a weight's share is one of all weights of its output",
    ("block OBS", "follows_the_order_of_inputs"): "as published: goes through the inputs in their order",
    ("Thanos", "follows_the_order_of_inputs"): "as published: goes through the inputs in their order",
}


@pytest.mark.parametrize(
    "solver_name",
    [pytest.param(name, marks=pytest.mark.slow) if name in SLOW else name for name in WITHIN | {"random": 0}],
)
@pytest.mark.cases(6)
def test_a_solver_obeys_the_laws_and_is_near_the_optimum(solver_name, tolerance):
    solver, is_given = SOLVERS[solver_name], solver_name in GIVEN
    few = solver_laws.taken(solver, fixed=is_given)
    for name, law in solver_laws.LAWS.items():
        if (solver_name, name) in EXEMPT:
            with pytest.raises(AssertionError):
                solver_laws.of_all(law, solver, few, tolerance)
        else:
            solver_laws.of_all(law, solver, few, tolerance)
    if solver_name != "random":
        every = solver_laws.taken(solver, every=True, fixed=is_given)
        solver_laws.is_near_the_optimum(solver, every, WITHIN[solver_name])


def test_every_solver_is_compared_with_an_optimum():
    """Here by enumeration; a penalty's and a loss's with descent in NumPy, below and in the solver's own tests."""
    assert set(SOLVERS) - set(WITHIN) == {"random", "descent", "active set", "proximal gradient"}


def penalties_of(f_name):
    """The penalties for an objective's variable."""
    return MATRIX_PENALTIES if "reconstruction" in f_name else {name: row[0] for name, row in PENALTIES.items()}


def plain_descent(problem, iterations=20_000):
    """The value of f + P after plain proximal gradient steps in NumPy and float64, the penalty's prox alone from us."""
    f, penalty = problem.objective, problem.penalty
    w0 = flat(f.center).astype(np.float64)
    n = len(w0)
    h = np.stack([flat(f.curvature.mv(unflat(e, f.center))) for e in np.eye(n)], axis=1).astype(np.float64)
    h += f.damping * np.trace(h) / n * np.eye(n)
    step, w = 1 / np.linalg.eigvalsh(h)[-1], w0
    prox = jax.jit(penalty.prox)
    for _ in range(iterations):
        new = flat(prox(unflat(w - step * h @ (w - w0), f.center), step)).astype(np.float64)
        moved, w = np.abs(new - w).max(), new
        if moved <= 1e-9 * np.abs(w).max():
            break
    return f.constant + 0.5 * (w - w0) @ h @ (w - w0) + penalty.value(unflat(w, f.center))


@BY_TABLE
@pytest.mark.parametrize("solver_name", SOLVERS)
def test_penalised_problems_are_solved_or_refused_as_the_table_says(f_name, solver_name, tolerance):
    """Of a solver that takes any penalty with an objective, the table holds all or a sample."""
    solver, taken = SOLVERS[solver_name], PENALISED.get(solver_name, {}).get(f_name, set())
    table = penalties_of(f_name)
    assert taken <= set(table)
    for name in taken or table:
        problem = po.Problem(OBJECTIVES[f_name](), penalty=table[name])
        if not taken:
            with pytest.raises(ValueError, match=r"\w"):
                po.solve(problem, solver)
            continue
        solution = po.solve(problem, solver)
        assert solution.status.is_usable
        check = po.certify(problem, solution)
        assert (check.outside, check.objective, check.bound) == (0, solution.objective, solution.bound)
        assert solution.objective <= problem.value(problem.objective.center) * (1 + tolerance)
        assert solution.kept == sum(int(np.count_nonzero(x)) for x in jax.tree.leaves(solution.value))
        proven = table[name].is_convex and getattr(problem.objective, "gradient", None) is None and f_name != "loss"
        assert (solution.status is po.Status.OPTIMAL) == proven, (name, solution)
        if name == "l1":
            np.testing.assert_array_equal(flat(po.solve(problem, solver).value), flat(solution.value))
        if proven and "reconstruction" in f_name:
            best = plain_descent(problem)
            assert solution.bound <= best + 1e2 * tolerance * best
            assert solution.objective <= best * (1 + 1e-6 + 1e2 * tolerance)


@pytest.mark.parametrize("f_name", [n for n in OBJECTIVES if n not in ("loss", "scores")])
def test_more_kept_is_not_worse_and_scale_does_not_matter(f_name, tolerance):
    f = OBJECTIVES[f_name]()
    solver = SOLVERS["saliency"]
    values, supports = [], []
    for count in (2, 5, 8, 12):
        solution = po.solve(po.Problem(f, subject_to=constraints.Cardinality(count=count, floor=0)), solver)
        assert solution.kept == count
        values.append(solution.objective)
        supports.append(solution.support)
    if f.gradient is None and f_name != "reconstruction" and "singular" not in f_name:
        assert values == sorted(values, reverse=True)
    if f.curvature is not None and f.gradient is None and "Fisher" not in f_name:  # that one is quadratic in its leaves
        scaled = jax.tree.map(lambda h: h * 4, f.curvature)
        if jax.tree.leaves(scaled):
            g = type(f)(f.center, scaled, damping=f.damping)
            moved = po.solve(po.Problem(g, subject_to=constraints.Cardinality(count=5, floor=0)), solver)
            np.testing.assert_array_equal(flat(moved.support), flat(supports[1]))
            assert moved.objective == pytest.approx(4 * (values[1] - f.constant), rel=1e2 * tolerance)
