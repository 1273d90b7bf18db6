"""Allocations against enumeration and a plain mixed-integer programme; what is proven of them; what is refused."""

import itertools
import math

import numpy as np
import pytest
from scipy.optimize import LinearConstraint, milp

from pruneopt import Status
from pruneopt.allocation import Infeasible, Tables, allocate, meet


def drawn(seed, groups=5, levels=4, resources=1, coupled=False, ragged=False):
    """Errors that fall and costs that rise with the level, both with noise: neither is monotone."""
    rng = np.random.default_rng(seed)
    names = [f"g{g}" for g in range(groups)]
    sizes = {name: int(rng.integers(1, levels + 1)) if ragged else levels for name in names}
    level = {name: np.linspace(0, 1, n) for name, n in sizes.items()}
    errors = {
        name: rng.lognormal() * (1 - level[name]) ** rng.uniform(1, 4) * rng.uniform(0.5, 1.5, n)
        for name, n in sizes.items()
    }
    costs = {
        f"r{k}": {name: rng.lognormal() * level[name] * rng.uniform(0.7, 1.3, n) for name, n in sizes.items()}
        for k in range(resources)
    }
    pairs = {}
    if coupled:
        widths = {name: 1 + np.arange(n) for name, n in sizes.items()}
        pairs = {
            f"r{k}": {
                (a, b): rng.uniform(0.05, 0.2) * np.outer(widths[a], widths[b])
                for a, b in itertools.pairwise(names)
                if rng.random() < 0.8
            }
            for k in range(resources)
        }
    return Tables(errors, costs, coupled=pairs, fixed={"r0": 0.3})


def enumerated(tables, budget):
    """The least sum of errors of any choice within the budget."""
    best = math.inf
    for row in itertools.product(*(range(len(tables.errors[group])) for group in tables.groups)):
        choice = dict(zip(tables.groups, row, strict=True))
        spent = tables.spent(choice)
        if all(spent[name] <= limit * (1 + 1e-12) for name, limit in budget.items()):
            best = min(best, tables.lost(choice))
    return best


@pytest.mark.parametrize("seed", range(12))
@pytest.mark.parametrize(("resources", "coupled"), [(1, False), (2, False), (1, True), (2, True)])
@pytest.mark.cases(48)
def test_it_is_the_best_of_all_choices(seed, resources, coupled):
    tables = drawn(seed, resources=resources, coupled=coupled, ragged=seed % 3 == 0)
    budget = {name: (0.3 + 0.05 * seed) * tables.largest(name) for name in tables.costs}
    best = enumerated(tables, budget)
    if best == math.inf:
        with pytest.raises(Infeasible, match="infeasible"):
            allocate(tables, budget)
        return
    found = allocate(tables, budget, gap=0.0)
    assert found.error == pytest.approx(best, rel=1e-9, abs=1e-12)
    assert found.bound <= best * (1 + 1e-9)
    assert found.status is Status.OPTIMAL
    assert found.spent == tables.spent(found.levels)
    assert found.error == pytest.approx(tables.lost(found.levels))
    assert all(found.spent[name] <= limit * (1 + 1e-11) for name, limit in budget.items())


@pytest.mark.parametrize("coupled", [False, True])
def test_the_bound_is_what_its_prices_prove(coupled):
    """By weak duality, computed here: min over choices of error + price x (cost - budget)."""
    tables = drawn(5, coupled=coupled)
    budget = {"r0": 0.5 * tables.largest("r0")}
    found = allocate(tables, budget, gap=1.0)  # nothing is searched: the bound is the dual's
    price = found.prices["r0"]
    rows = itertools.product(*(range(len(tables.errors[group])) for group in tables.groups))
    choices = [dict(zip(tables.groups, row, strict=True)) for row in rows]
    proven = min(tables.lost(c) + price * (tables.spent(c)["r0"] - budget["r0"]) for c in choices)
    assert found.bound == pytest.approx(proven, rel=1e-9)
    assert price > 0


@pytest.mark.parametrize(("groups", "levels", "resources", "gap"), [(120, 30, 1, 1e-4), (40, 12, 2, 1e-3)])
def test_large_tables_are_proven_as_asked(groups, levels, resources, gap):
    tables = drawn(3, groups, levels, resources)
    budget = {name: 0.45 * tables.largest(name) for name in tables.costs}
    found = allocate(tables, budget, gap=gap)
    assert found.gap <= gap
    errors = np.concatenate([tables.errors[group] for group in tables.groups])
    one = np.kron(np.eye(groups), np.ones(levels))
    costs = [np.concatenate([tables.costs[name][group] for group in tables.groups]) for name in tables.costs]
    room = [budget[name] - tables.fixed.get(name, 0.0) for name in tables.costs]
    theirs = milp(
        errors,
        constraints=[LinearConstraint(one, 1, 1), LinearConstraint(np.array(costs), -np.inf, room)],
        integrality=np.ones(len(errors)),
        bounds=(0, 1),
        options={"mip_rel_gap": 1e-6, "time_limit": 60},
    )
    assert found.bound <= theirs.fun * (1 + 1e-6)
    assert theirs.fun * (1 - 1e-5) <= found.error <= theirs.fun * (1 + gap)


def test_a_search_that_is_given_up_claims_no_more_than_its_prices(monkeypatch):
    import sys

    tables = drawn(4, 8, 6)
    budget = {"r0": 0.4 * tables.largest("r0")}
    whole, dual = allocate(tables, budget, gap=0.0), allocate(tables, budget, gap=1.0)
    monkeypatch.setattr(sys.modules["pruneopt.allocation.search"], "_ROWS", 1)
    found = allocate(tables, budget, gap=0.0)
    assert dual.gap > 0
    assert found.status is Status.LIMIT
    assert found.bound == dual.bound <= whole.error <= found.error


def test_prices_that_the_linear_solver_cannot_find_are_the_last_ones_known(monkeypatch):
    """HiGHS gives up where a budget is all but the least that can be reached: no crash, and no claim beyond a proof."""
    import sys
    from types import SimpleNamespace

    tables = drawn(3, 8, 6)
    budget = {"r0": 0.3 * tables.largest("r0")}
    best, module = allocate(tables, budget, gap=0.0).error, sys.modules["pruneopt.allocation.lagrangian"]
    whole, calls = module.linprog, []

    def gives_up(*args, **words):
        calls.append(args)
        return whole(*args, **words) if len(calls) < 3 else SimpleNamespace(x=None)

    monkeypatch.setattr(module, "linprog", gives_up)
    found = allocate(tables, budget, gap=1.0)
    assert len(calls) == 3
    assert found.bound <= best * (1 + 1e-9) <= found.error * (1 + 1e-8)
    assert found.spent["r0"] <= budget["r0"]


def test_widths_of_a_chain_of_products():
    """A perceptron's widths, whose cost is a product of neighbours, against enumeration over all."""
    widths = [8, 16, 24, 32]
    errors = {f"h{i}": [4.0 / (i + 1), 1.5, 0.4, 0.0] for i in range(5)}
    costs = {"flops": {"h0": [100 * w for w in widths], "h4": [10 * w for w in widths]}}
    pairs = {"flops": {(f"h{i}", f"h{i + 1}"): np.outer(widths, widths) for i in range(4)}}
    tables = Tables(errors, costs, dict.fromkeys(errors, widths), coupled=pairs)
    budget = {"flops": 0.5 * tables.largest("flops")}
    found = allocate(tables, budget)
    assert found.error == pytest.approx(enumerated(tables, budget))
    assert found["h0"] in widths
    w = [found[f"h{i}"] for i in range(5)]
    assert found.spent["flops"] == 100 * w[0] + sum(a * b for a, b in itertools.pairwise(w)) + 10 * w[4]


def test_a_budget_that_holds_everything_is_free():
    tables = drawn(1)
    found = allocate(tables, {"r0": 2 * tables.largest("r0")})
    assert found.error == pytest.approx(sum(min(row) for row in tables.errors.values()))
    assert found.prices == {"r0": 0.0}
    assert found.next is None
    assert found.gap == 0


def test_the_next_point_is_what_the_budget_just_misses():
    tables = Tables(
        {"a": [3.0, 1.0], "b": [2.0, 1.5]}, {"bytes": {"a": [1, 5], "b": [1, 2]}}, {"a": [4, 8], "b": [4, 8]}
    )
    found = allocate(tables, {"bytes": 4})
    assert (found["a"], found["b"]) == (4, 8)
    assert found.next == ("a", 8, 2.0, {"bytes": 4.0})
    assert "next: a at 8 saves 2 for +4 bytes" in repr(found)


def test_what_cannot_be_met_says_what_can():
    tables = Tables({"a": [1, 0], "b": [1, 0]}, {"flops": {"a": [10, 20], "b": [5, 9]}}, fixed={"flops": 7})
    with pytest.raises(
        Infeasible, match=r"flops can be 22 at least, 21 was asked for \(a 10, fixed 7, b 5\)"
    ) as caught:
        allocate(tables, {"flops": 21})
    assert caught.value.least == {"flops": 22.0}
    both = Tables({"a": [1, 0]}, {"x": {"a": [1, 3]}, "y": {"a": [3, 1]}})
    with pytest.raises(Infeasible, match="each budget can be met alone, not all together"):
        allocate(both, {"x": 2, "y": 2})


def test_budgets_that_are_hard_to_meet_together_are_met():
    """Costs that fall in one resource where they rise in the other, and one choice that fits both to the unit."""
    rng = np.random.default_rng(7)
    x = {f"g{g}": rng.integers(1, 30, 4).astype(float) for g in range(6)}
    y = {group: 30 - row for group, row in x.items()}
    hidden = {group: int(rng.integers(4)) for group in x}
    tables = Tables({group: rng.random(4) for group in x}, {"x": x, "y": y})
    budget = tables.spent(hidden)
    found = allocate(tables, budget)
    assert found.error == pytest.approx(enumerated(tables, budget))


@pytest.mark.parametrize(
    ("words", "match"),
    [
        ({"errors": {}}, "errors is empty"),
        ({"errors": {"a": []}}, "errors of 'a' has no level"),
        ({"errors": {"a": [1.0, np.nan]}}, "errors of 'a': level 1 is nan; measure it"),
        ({"costs": {}}, "costs is empty"),
        ({"costs": {"flops": {"b": [1, 2]}}}, r"costs\['flops'\] names the group 'b', which is none of a"),
        ({"costs": {"flops": {"a": [1, 2, 3]}}}, r"has shape \(3,\), its errors ask for \(2,\)"),
        ({"costs": {"flops": {"a": [1, -2]}}}, "a cost of -2 is negative"),
        ({"costs": {"flops": {"a": [1, np.inf]}}}, "level 1 is inf"),
        ({"levels": {"a": [1]}}, "levels of 'a' names 1 levels, its errors have 2"),
        ({"fixed": {"bytes": 1.0}}, "fixed names the resource 'bytes'"),
        ({"coupled": {"flops": {("a", "a"): np.eye(2)}}}, "does not follow it in errors"),
    ],
)
def test_tables_that_do_not_fit_are_refused(words, match):
    with pytest.raises(ValueError, match=match):
        Tables(**{"errors": {"a": [1.0, 0.0]}, "costs": {"flops": {"a": [1, 2]}}, **words})


@pytest.mark.parametrize(
    ("budget", "match"),
    [({}, "budget is empty"), ({"x": 1}, "budget names 'x'"), ({"r0": -1}, "is -1"), ({"r0": math.nan}, "is nan")],
)
def test_budgets_that_mean_nothing_are_refused(budget, match):
    with pytest.raises(ValueError, match=match):
        allocate(drawn(0), budget)


@pytest.mark.parametrize("seed", range(4))
def test_a_budget_is_met_as_measured(seed):
    """What is measured is more than the tables say: the network costs something by itself, and parts are too cheap."""
    tables = drawn(seed, groups=30, levels=12)
    limit = 0.5 * tables.largest("r0")
    truth = lambda found: 1.15 * found.spent["r0"] + 0.02 * tables.largest("r0")  # noqa: E731
    met = meet(tables, {"r0": limit}, "r0", truth)
    assert met.measured == truth(met.allocation)
    assert abs(met.measured / limit - 1) <= 0.03
    assert met.tried[0] == (limit, allocate(tables, {"r0": limit}).spent["r0"], met.tried[0][2])
    assert 1 < len(met.tried) <= 6


def test_what_cannot_be_met_as_measured_comes_closest():
    tables = drawn(0, groups=6)
    least = sum(min(row) for row in tables.costs["r0"].values()) + 0.3
    met = meet(tables, {"r0": 1.1 * least}, "r0", lambda found: 3 * found.spent["r0"])
    assert met.measured == min(measured for *_, measured in met.tried)
    with pytest.raises(Infeasible):
        meet(tables, {"r0": 0.9 * least}, "r0", lambda found: found.spent["r0"])


@pytest.mark.parametrize("amount", [math.nan, math.inf, 0.0, -1.0])
def test_an_amount_that_is_none_is_refused(amount):
    tables = drawn(0)
    with pytest.raises(ValueError, match=r"measure: it is"):
        meet(tables, {"r0": tables.largest("r0")}, "r0", lambda found: amount)
    with pytest.raises(ValueError, match=r"resource is 'r1', the budget names r0"):
        meet(tables, {"r0": 1.0}, "r1", lambda found: 1.0)


def test_budgets_that_nothing_can_meet_are_refused():
    tables = drawn(0)
    for limit in (0.0, math.nan):
        with pytest.raises(ValueError, match=r"budget\['r0'\] is"):
            meet(tables, {"r0": limit}, "r0", lambda found: 1.0)
    with pytest.raises(ValueError, match="attempts=0"):
        meet(tables, {"r0": 1.0}, "r0", lambda found: 1.0, attempts=0)
    free = Tables({"g": [1.0, 0.0]}, {"r0": {"g": [0.0, 0.0]}})
    with pytest.raises(ValueError, match="predict no r0"):
        meet(free, {"r0": 1.0}, "r0", lambda found: 1.0)
