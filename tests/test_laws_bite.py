"""The laws have teeth: what is wrong on purpose breaks the law that it should."""

import itertools
import sys
from dataclasses import dataclass, replace

import jax
import jax.numpy as jnp
import laws
import numpy as np
import optax
import pytest
import solver_laws
import test_training
from cases import CONSTRAINTS, PENALTIES, flat, unflat
from training_cases import HALF, KEPT, OPTIMIZERS

import pruneopt as po
from pruneopt import penalties
from pruneopt import training as t
from pruneopt.bounds import Evidence
from pruneopt.constraints import Cardinality, L1Ball
from pruneopt.solvers import GreedyOBS, Outcome, Polish, Score, Solver, Then
from pruneopt.training.base import SparseOptimizer

FINDS = Then(Score(), Polish())


@dataclass(frozen=True)
class Mutant(Solver):
    """A solver that takes every constraint and keeps W0 on the support that `select` makes of its scores."""

    def refuses(self, problem):
        return FINDS.refuses(problem)

    def scores(self, problem):
        return problem.objective.saliency()

    def run(self, problem, init, key):
        support = problem.subject_to.select(self.scores(problem))
        return Outcome(po.apply(problem.objective.center, support), support)


class LastIndices(Mutant):
    """The last indices that are allowed, at 3.7 or -3.7."""

    def run(self, problem, init, key):
        center = problem.objective.center
        support = problem.subject_to.select(unflat(np.arange(1.0, 13.0), center))
        return Outcome(jax.tree.map(lambda w, m: jnp.where(m, 3.7 * jnp.sign(w), 0 * w), center, support), support)


class LastIndicesRefitted(Mutant):
    """The last indices that are allowed, at their best weights."""

    def run(self, problem, init, key):
        return FINDS.second.run(problem, LastIndices().run(problem, init, key), key)


class Infeasible(Mutant):
    """One weight more than it says."""

    def run(self, problem, init, key):
        support = unflat(np.ones(12), jax.tree.map(lambda x: x != 0, problem.objective.center))
        return Outcome(problem.objective.center, support)


class NeverRefits(Mutant):
    """A good support, whose weights it says to be refitted."""

    never_worse_than = frozenset({"refit"})


class HalfRefits(Mutant):
    """A refit that goes half of the way."""

    never_worse_than = frozenset({"refit"})

    def run(self, problem, init, key):
        found = FINDS.run(problem, init, key)
        middle = jax.tree.map(
            lambda a, w, m: 0.5 * (a + jnp.where(m, w, 0 * w)), found.value, problem.objective.center, found.support
        )
        return replace(found, value=middle)


@dataclass(frozen=True)
class Tall(Evidence):
    """A proof that no point is better than the one at hand."""

    def bound(self, problem, value, support):
        return problem.value(value)


class ClaimsOptimality(Mutant):
    """What ranks best, said to be optimal."""

    def run(self, problem, init, key):
        return replace(super().run(problem, init, key), evidence=Tall())


class Moody(Mutant):
    """Another answer each time."""

    calls = itertools.count()

    def run(self, problem, init, key):
        return Score("random").run(problem, init, jax.random.key(next(self.calls)))


class Deaf(Mutant):
    """Never worse than init, which it does not look at."""

    never_worse_than = frozenset({"init"})


class WorseThanZero(Mutant):
    """Never worse than zero, it says, and turns every sign."""

    never_worse_than = frozenset({"zero"})

    def run(self, problem, init, key):
        found = super().run(problem, init, key)
        return replace(found, value=jax.tree.map(lambda x: -x, found.value))


class AbsoluteInWeights(Mutant):
    """A score with a number in the weights' units."""

    def scores(self, problem):
        one = Score("random").run(problem, None, jax.random.key(0)).support
        return jax.tree.map(lambda s, r: s + 0.3 * r.astype(s.dtype), problem.objective.saliency(), one)


class AbsoluteInCurvature(Mutant):
    """A ridge of 1 beside H, whatever its units."""

    def run(self, problem, init, key):
        f = problem.objective
        h, w0, _ = solver_laws.quadratic(f)
        found = super().run(problem, init, key)
        s = np.flatnonzero(flat(found.support))
        w = np.zeros(12)
        w[s] = np.linalg.solve(h[np.ix_(s, s)] + 1.0 * np.eye(len(s)), h[s] @ w0 + w0[s])
        return replace(found, value=unflat(w, f.center))


class FirstOutputFirst(Mutant):
    """A better score for what stands first among the outputs."""

    def scores(self, problem):
        return jax.tree.map(
            lambda s: s / jnp.asarray(1 + 9 * np.arange(s.shape[1]), s.dtype)[None], problem.objective.saliency()
        )


class FirstInputFirst(Mutant):
    """A better score for what stands first among the inputs."""

    def scores(self, problem):
        return jax.tree.map(
            lambda s: s / jnp.asarray(1 + 9 * np.arange(s.shape[0]), s.dtype)[:, None], problem.objective.saliency()
        )


class SpendsOnDeadInputs(Mutant):
    """Magnitude, whether an input is ever on or not."""

    def scores(self, problem):
        return jax.tree.map(jnp.abs, problem.objective.center)


class WastesBudget(Mutant):
    """All weights at zero."""

    def run(self, problem, init, key):
        found = super().run(problem, init, key)
        return replace(found, value=jax.tree.map(jnp.zeros_like, found.value))


# mutant: the law that it must break; the loosest factor of all solvers stands for being near the optimum.
SOLVERS = {
    LastIndices: "near",
    LastIndicesRefitted: "near",
    WastesBudget: "near",
    Infeasible: "is_feasible",
    NeverRefits: "keeps_its_promises",
    HalfRefits: "keeps_its_promises",
    WorseThanZero: "keeps_its_promises",
    Deaf: "keeps_its_promises",
    ClaimsOptimality: "proves_nothing_false",
    Moody: "repeats_itself",
    AbsoluteInWeights: "scales",
    AbsoluteInCurvature: "scales",
    FirstOutputFirst: "follows_the_order_of_outputs",
    FirstInputFirst: "follows_the_order_of_inputs",
    SpendsOnDeadInputs: "sees_live_inputs_alone",
}


def test_every_law_of_a_solver_has_its_mutant():
    assert set(SOLVERS.values()) == {*solver_laws.LAWS, "near"}


@pytest.mark.parametrize("mutant", SOLVERS, ids=lambda kind: kind.__name__)
def test_a_wrong_solver_breaks_its_law(mutant, monkeypatch):
    if mutant is Deaf:  # `run` keeps this promise for every solver; here it does not
        monkeypatch.setattr(sys.modules["pruneopt.solve"], "run", lambda solver, *rest: solver.run(*rest))
    solver, law = mutant(), SOLVERS[mutant]
    if law == "near":
        with pytest.raises(AssertionError):
            solver_laws.is_near_the_optimum(solver, solver_laws.taken(solver, every=True), max(laws.WITHIN.values()))
        return
    with pytest.raises((AssertionError, po.SolveError)):
        solver_laws.of_all(solver_laws.LAWS[law], solver, solver_laws.taken(solver), 1e-12)


def test_the_mutants_are_wrong_in_what_they_change():
    """What they are made of breaks no law."""
    for law in solver_laws.LAWS.values():
        solver_laws.of_all(law, Mutant(), solver_laws.taken(Mutant()), 1e-12)
    assert solver_laws.error(GreedyOBS(), solver_laws.taken(GreedyOBS())) < 1.1


# ------------------------------------------------------------------------------------------------ other kinds


@dataclass(frozen=True)
class KeepsTheFirst(Cardinality):
    """Feasible, whatever the scores."""

    def select(self, scores):
        ranks = unflat(np.arange(12.0, 0, -1), scores)
        return super().select(jax.tree.map(lambda r, s: jnp.where(jnp.isinf(s), s, r), ranks, scores))


@dataclass(frozen=True)
class Shrinks(L1Ball):
    """In the ball, and not the nearest point of it."""

    def project(self, values, support=None, metric=None):
        size = min(1.0, self.radius / self.norm(values))
        return jax.tree.map(lambda x: size * x, values)


def test_wrong_sets_break_their_laws(monkeypatch):
    law = laws.TestConstraint()
    monkeypatch.setitem(
        CONSTRAINTS, "first", (KeepsTheFirst(sparsity=0.5, floor=0), CONSTRAINTS["cardinality over the tree"][1])
    )
    with pytest.raises(AssertionError):
        law.test_select_beats_every_feasible_support("first", 1e-12)
    monkeypatch.setitem(CONSTRAINTS, "shrinks", (Shrinks(2.0), CONSTRAINTS["an L1 ball, on values alone"][1]))
    with pytest.raises(AssertionError):
        law.test_project_gives_the_nearest_point("shrinks", 1e-12)


def _scaled(by):
    class Wrong(penalties.L1):
        def prox(self, w, step):
            return super().prox(w, by * step)

    return Wrong(0.3)


def _late():
    class Wrong(penalties.L1):
        def weight_max(self, gradient, step=1.0):
            return 1.1 * super().weight_max(gradient, step)

    return Wrong(0.3)


def test_wrong_penalties_break_their_laws(monkeypatch):
    law = laws.TestPenalty()
    for i, by in enumerate((0.0, 0.9, 1.1)):
        monkeypatch.setitem(PENALTIES, f"wrong {i}", (_scaled(by), PENALTIES["l1"][1]))
        with pytest.raises(AssertionError):
            law.test_prox_minimises_on_a_grid(f"wrong {i}", 2.0, 1e-12)
        with pytest.raises(AssertionError):
            law.test_prox_beats_all_points_around(f"wrong {i}", 1e-12)
    monkeypatch.setitem(PENALTIES, "late", (_late(), PENALTIES["l1"][1]))
    with pytest.raises(AssertionError):
        law.test_zero_is_optimal_exactly_from_weight_max_on("late", 1.0, 1e-12)


def _gradual(adam):
    return t.gradual(adam, HALF, begin=1, end=7, every=2)


def _ends(make, change):
    """The transformation with what `finish` returns changed by `change(done, params)`."""

    def made(adam):
        right = make(adam)
        return SparseOptimizer(right.init, right.update, lambda p, state: change(right.finish(p, state), p))

    return made


def _one_more(done, p):
    flags = done.support["a"]["kernel"]
    more = flags.at[jnp.unravel_index(jnp.argmin(flags), flags.shape)].set(True)
    return replace(done, support={**done.support, "a": {**done.support["a"], "kernel": more}})


def _not_zero(done, p):
    return replace(done, params=jax.tree.map(lambda x: x + 1e-30, done.params))


TRANSFORMATIONS = {
    "keeps one more": (_ends(_gradual, _one_more), "test_ends_at_the_count_with_exact_zeros"),
    "leaves what is no zero": (_ends(_gradual, _not_zero), "test_ends_at_the_count_with_exact_zeros"),
    "trains nothing": (lambda adam: _gradual(optax.set_to_zero()), "test_lowers_the_loss"),
}


@pytest.mark.default_flags
@pytest.mark.parametrize("name", TRANSFORMATIONS)
def test_a_wrong_transformation_breaks_its_law(name, monkeypatch):
    make, law = TRANSFORMATIONS[name]
    monkeypatch.setitem(OPTIMIZERS, name, (make, KEPT))
    with jax.enable_x64(True), pytest.raises(AssertionError):
        getattr(test_training.TestTransformation(), law)(name)
