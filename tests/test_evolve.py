"""Evolution on a loss that the tables do not know, against all choices; what it never does; what is refused."""

import itertools
import math

import numpy as np
import pytest
from test_allocation import drawn

from pruneopt.allocation import Tables, allocate, evolve


def interacting(tables, seed):
    """The tables' errors and products of what pairs of groups lose."""
    rng, names = np.random.default_rng(seed), tables.groups
    pairs = {pair: rng.uniform(-1, 3) for pair in itertools.combinations(names, 2)}

    def loss(levels):
        each = {group: tables.errors[group][level] for group, level in levels.items()}
        return sum(each.values()) + sum(w * each[a] * each[b] for (a, b), w in pairs.items())

    return loss


def all_within(tables, budget):
    for row in itertools.product(*(range(len(tables.errors[group])) for group in tables.groups)):
        choice = dict(zip(tables.groups, row, strict=True))
        if all(tables.spent(choice)[name] <= limit * (1 + 1e-12) for name, limit in budget.items()):
            yield choice


@pytest.mark.parametrize(("seed", "resources", "coupled"), [(0, 1, False), (1, 1, True), (4, 2, False), (5, 1, False)])
@pytest.mark.cases(4)
def test_it_finds_the_best_of_all_choices_where_groups_interact(seed, resources, coupled):
    tables = drawn(seed, 4, 4, resources, coupled, ragged=seed == 5)
    budget = {name: 0.5 * tables.largest(name) for name in tables.costs}
    loss = interacting(tables, seed)
    best = min(map(loss, all_within(tables, budget)))
    found = evolve(tables, budget, loss, generations=60, seed=seed, progress=False)
    assert found.loss == pytest.approx(best)
    assert found.loss == loss(found.levels)
    assert found.start == loss(allocate(tables, budget).levels)
    assert found.spent == tables.spent(found.levels)
    assert all(found.spent[name] <= limit * (1 + 1e-11) for name, limit in budget.items())


def test_the_allocation_alone_is_not_the_best_there():
    """Else the test above could not fail."""
    tables = drawn(0, 4, 4)
    budget, loss = {"r0": 0.5 * tables.largest("r0")}, interacting(tables, 0)
    assert loss(allocate(tables, budget).levels) > 1.01 * min(map(loss, all_within(tables, budget)))


def test_rows_are_measured_once_within_the_budget_and_the_loss_never_rises():
    tables = drawn(3, 6, 5)
    budget, seen = {"r0": 0.4 * tables.largest("r0")}, []
    inner = interacting(tables, 3)

    def loss(levels):
        seen.append(tuple(levels.values()))
        assert tables.spent(levels)["r0"] <= budget["r0"] * (1 + 1e-11)
        return inner(levels)

    words = {"start": dict.fromkeys(tables.groups, 0), "generations": 12, "offspring": 5, "progress": False}
    found = evolve(tables, budget, loss, **words)
    assert len(seen) == len(set(seen)) == found.evaluations
    assert len(found.history) == 12
    assert np.all(np.diff([found.start, *found.history]) <= 0)
    assert found.history[-1] == found.loss < found.start
    again = evolve(tables, budget, inner, **words)
    assert again.levels == found.levels
    assert "in 12 generations" in repr(found)


def test_a_start_that_nothing_beats_is_returned():
    tables = drawn(1)
    budget = {"r0": 0.5 * tables.largest("r0")}
    start = allocate(tables, budget).levels
    found = evolve(tables, budget, lambda levels: 0.0 if levels == start else math.nan, generations=5, progress=False)
    assert (found.levels, found.loss) == (start, 0.0)
    assert found["g0"] == start["g0"]


def test_screens_spare_the_loss():
    tables = drawn(2, 6, 5)
    budget, loss = {"r0": 0.5 * tables.largest("r0")}, interacting(tables, 2)
    counts = {"first": 0, "second": 0}

    def counting(name):
        def screen(levels):
            counts[name] += 1
            return loss(levels)

        return screen

    screens = [(counting("first"), 4), (counting("second"), 1)]
    words = {"start": dict.fromkeys(tables.groups, 0), "generations": 10, "progress": False}
    found = evolve(tables, budget, loss, offspring=8, screens=screens, **words)
    assert found.evaluations <= 11
    assert counts["second"] <= 40 < counts["first"] <= 80
    assert found.loss < found.start


@pytest.mark.parametrize(
    ("words", "match"),
    [
        ({"budget": {}}, "budget is empty"),
        ({"generations": 0}, "generations: 0 is below 1"),
        ({"offspring": 0}, "offspring: 0 is below 1"),
        ({"screens": [(len, 0)]}, "screens: 0 is below 1"),
        ({"start": {"a": 0}}, "start names 1 groups, the tables have 2"),
        ({"start": {"a": 5, "b": 0}}, "start: 'a' has levels 0 to 1, not 5"),
        ({"start": {"a": 1, "b": 1}}, "start spends .*; start within it"),
        ({"loss": lambda levels: math.nan}, "loss of the start is nan"),
    ],
)
def test_bad_input_is_refused(words, match):
    tables = Tables({"a": [1.0, 0.0], "b": [1.0, 0.0]}, {"x": {"a": [0, 1], "b": [0, 1]}})
    given = {"budget": {"x": 1}, "loss": tables.lost, "progress": False, **words}
    with pytest.raises(ValueError, match=match):
        evolve(tables, **given)
