"""What is printed says what was solved and how well, in few lines, and never an array."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import pruneopt as po
from pruneopt.constraints import Cardinality, Support
from pruneopt.solvers import Score

RNG = np.random.default_rng(0)
MANY = {f"layer{i}": RNG.standard_normal((4, 4)) for i in range(30)}
HALF = Cardinality(sparsity=0.5, per="leaf")


def layered():
    params = {name: RNG.standard_normal((4, 4)) for name in "ab"}
    batches = [RNG.standard_normal((40, 4))]
    fn = lambda p, x: jnp.tanh(jnp.asarray(x) @ p["a"]) @ p["b"]  # noqa: E731
    return po.prune(fn, params, batches, HALF, method="wanda", progress=False)


@pytest.mark.parametrize(
    ("objective", "penalty", "first"),
    [
        (po.objectives.Quadratic(MANY, po.curvature.Diagonal(MANY), MANY, damping=0.01), None,
         "minimise Quadratic(layer0 (4, 4), layer1 (4, 4), layer10 (4, 4), ...; 30 leaves, 480 weights; "
         "curvature Diagonal; a gradient; damping 0.01)"),
        (po.objectives.Reconstruction(jnp.ones((3, 2)), po.curvature.Gram.checked(jnp.eye(3))), po.penalties.L1(0.5),
         "minimise Reconstruction((3, 2); curvature Gram) + L1(weight=0.5)"),
    ],
)  # fmt: skip
def test_a_problem_prints_in_two_lines(objective, penalty, first):
    constraint = None if penalty else HALF
    lines = repr(po.Problem(objective, subject_to=constraint, penalty=penalty)).split("\n")
    assert lines == [first, f"subject to {constraint or 'nothing'}"]
    masks = Support(jax.tree.map(lambda x: np.ones(x.shape, bool), objective.center))
    assert "True" not in repr(po.Problem(objective, subject_to=masks))


def test_a_loss_prints_its_function_and_shapes():
    def mean_square(params, batch):
        return jnp.mean(params["w"] ** 2) * jnp.mean(batch)

    found = po.objectives.Loss(mean_square, {"w": jnp.ones((2, 3))}, [jnp.ones(2)])
    assert repr(found) == "Loss(mean_square; w (2, 3))"


def test_a_solution_prints_in_one_line():
    f = po.objectives.Reconstruction(jnp.ones((3, 2)), po.curvature.Gram.checked(jnp.eye(3)))
    text = repr(po.solve(po.Problem(f, subject_to=Cardinality(count=4, floor=0)), Score()))
    assert "\n" not in text
    assert text.startswith("Solution(feasible, objective 1, no bound, kept 4 of 6, relative error 0.333, ")


def test_a_pruned_network_prints_a_table_and_gives_records():
    pruned = layered()
    title, head, *rows, total = repr(pruned).split("\n")
    assert title.startswith("Pruned by wanda")
    assert head.split() == ["layer", "kept", "of", "sparsity", "error", "s"]
    records = pruned.to_records()
    assert [r["layer"] for r in records] == ["a", "b"]
    for row, record in zip(rows, records, strict=True):
        assert row.split()[:4] == [record["layer"], "8", "16", "50.00%"]
        assert row.split()[4] == f"{record['relative_error']:.3g}"
    assert total.startswith("kept 16 of 32 weights, sparsity 0.5000, ")


def test_a_long_list_of_layers_is_cut_with_a_count():
    pruned = po.prune(None, MANY, None, HALF, progress=False)
    lines = repr(pruned).split("\n")
    assert len(lines) == 15
    assert "... 19 more layers" in lines
    assert len(pruned.to_records()) == 30
    assert pruned.to_records()[3] == {"layer": "layer11", "size": 16, "kept": 8, "sparsity": 0.5}


def test_a_pruned_network_is_a_pytree_of_its_params_and_support():
    pruned = layered()
    assert len(jax.tree.leaves(pruned)) == 4
    moved = jax.tree.map(jnp.asarray, pruned)
    assert isinstance(moved, po.Pruned)
    assert (moved.history, moved.solutions) == (pruned.history, pruned.solutions)
    assert isinstance(moved.params["a"], jax.Array)
    doubled = jax.jit(lambda p: jax.tree.map(lambda x: x * 2 if x.dtype != bool else x, p))(moved)
    np.testing.assert_allclose(doubled.params["a"], 2 * np.asarray(pruned.params["a"]))
    again = jax.jit(lambda p: p)(layered())
    assert again.history is not pruned.history  # a compiled function does not remember another network's account
    paths = [jax.tree_util.keystr(path) for path, _ in jax.tree_util.tree_leaves_with_path(pruned)]
    assert paths == [".params['a']", ".params['b']", ".support['a']", ".support['b']"]


def test_users_write_solvers_with_public_names():
    class Nothing(po.solvers.Solver):
        def refuses(self, problem):
            return None

        def run(self, problem, init, key):
            assert init is None or isinstance(init, po.solvers.Start)
            return po.solvers.Outcome(problem.objective.center, problem.full_support())

    got = po.prune(lambda p, x: x @ p["a"], {"a": jnp.ones((2, 2))}, [jnp.eye(2)], Cardinality(sparsity=0.0),
                   method=Nothing(), progress=False)  # fmt: skip
    assert got.kept == 4
