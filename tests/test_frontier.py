"""The curve over budgets against enumeration of all choices at each of them."""

import math

import numpy as np
import pytest
from test_allocation import drawn, enumerated

from pruneopt import Status
from pruneopt.allocation import Infeasible, Tables, frontier


@pytest.mark.parametrize("coupled", [False, True])
def test_every_point_is_the_best_of_all_choices_within_its_budget(coupled):
    tables = drawn(2, coupled=coupled, ragged=True)
    found = frontier(tables, "r0", gap=0.0)
    assert len(found.points) == 20
    for point in found.points:
        assert point.error == pytest.approx(enumerated(tables, point.budget), rel=1e-9, abs=1e-12)
        assert point.error == pytest.approx(tables.lost(point.levels))
        assert point.spent == tables.spent(point.levels)
        assert point.spent["r0"] <= point.budget["r0"] * (1 + 1e-11)
        assert point.status is Status.OPTIMAL
    assert found.errors[-1] == pytest.approx(sum(min(row) for row in tables.errors.values()))


def test_a_wide_gap_leaves_bounds_below_the_best_and_curves_that_never_turn():
    tables = drawn(6, 4, 4)
    found = frontier(tables, "r0", gap=0.5)
    exact = [enumerated(tables, point.budget) for point in found.points]
    assert all(b <= e * (1 + 1e-9) <= f * (1 + 1e-8) for b, e, f in zip(found.bounds, exact, found.errors, strict=True))
    assert np.all(np.diff(found.errors) <= 0)
    assert np.all(np.diff(found.bounds) <= 0)
    assert all(f - b <= 0.5 * found.errors[0] * (1 + 1e-9) for f, b in zip(found.errors, found.bounds, strict=True))


def test_budgets_of_your_own_come_in_order_and_print_as_a_table():
    costs = {"bytes": {"a": [1, 4, 9], "b": [1, 3]}}
    tables = Tables({"a": [3.0, 1.0, 0.0], "b": [2.0, 0.5]}, costs, fixed={"bytes": 2})
    found = frontier(tables, "bytes", [14, 6, 9, 6])
    assert found.spent == [6.0, 9.0, 14.0]
    assert found.errors == [3.5, 1.5, 0.5]
    lines = str(found).splitlines()
    assert lines[0].split() == ["bytes", "at", "most", "spent", "error", "bound", "gap", "price"]
    assert [line.split()[:3] for line in lines[1:]] == [["6", "6", "3.5"], ["9", "9", "1.5"], ["14", "14", "0.5"]]


def test_the_plot_draws_what_was_found():
    found = frontier(drawn(0, 3, 3), "r0")
    axes = found.plot()
    error, bound = axes.get_lines()
    assert list(error.get_xdata()) == found.spent
    assert list(error.get_ydata()) == found.errors
    assert list(bound.get_ydata()) == found.bounds
    assert axes.get_xlabel() == "r0"
    assert found.plot(axes) is axes
    axes.figure.clear()


def test_groups_without_a_choice_are_one_point():
    found = frontier(Tables({"a": [1.0]}, {"flops": {"a": [3]}}), "flops")
    assert (found.spent, found.errors, found.bounds) == ([3.0], [1.0], [1.0])


def test_what_cannot_be_drawn_is_refused():
    with pytest.raises(ValueError, match="resource='x' is unknown; the tables know r0"):
        frontier(drawn(0), "x")
    with pytest.raises(ValueError, match="budgets is empty"):
        frontier(drawn(0), "r0", [])
    with pytest.raises(Infeasible, match="at least"):
        frontier(drawn(0), "r0", [0.0, 100.0])
    with pytest.raises(ValueError, match="is nan"):
        frontier(drawn(0), "r0", [math.nan])
