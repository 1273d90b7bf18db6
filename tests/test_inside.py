"""What reads numbers says in one sentence that it cannot run inside jit, vmap or grad, or on deleted arrays."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import pruneopt as po
from pruneopt import solvers
from pruneopt.constraints import Cardinality
from pruneopt.curvature import Gram, empirical_fisher
from pruneopt.objectives import Quadratic, Reconstruction

pytestmark = pytest.mark.default_flags

RNG = np.random.default_rng(0)
X = RNG.standard_normal((20, 6)).astype(np.float32)
WEIGHTS = {"a": jnp.asarray(RNG.standard_normal((6, 4)), jnp.float32)}
HALF = Cardinality(sparsity=0.5)
GRADUAL = po.training.gradual(optax.sgd(0.1), HALF, end=1)


def network(p, x):
    return jnp.tanh(x @ p["a"])


def loss(p, x):
    return jnp.mean(network(p, x) ** 2)


def problem(w):
    return po.Problem(Reconstruction(w, Gram(X.T @ X / 20)), subject_to=HALF)


@pytest.fixture(scope="module")
def done():
    """A solution and a pruned network, made outside."""
    return po.solve(problem(WEIGHTS["a"]), solvers.Score()), po.prune(None, WEIGHTS, None, HALF, progress=False)


CALLS = {
    "objective": lambda p, done, file: problem(p["a"]),
    "quadratic": lambda p, done, file: po.Problem(Quadratic(p), subject_to=HALF),
    "gram": lambda p, done, file: Gram.checked(jnp.sin(p["a"])),
    "solve": lambda p, done, file: po.solve(
        problem(WEIGHTS["a"]), solvers.Score(), init=dataclasses.replace(done[0], value=p["a"])
    ),
    "certify": lambda p, done, file: po.certify(problem(WEIGHTS["a"]), dataclasses.replace(done[0], value=p["a"])),
    "prune": lambda p, done, file: po.prune(None, p, None, HALF, progress=False),
    "prune on data": lambda p, done, file: po.prune(loss, WEIGHTS, [p["a"]], HALF, method="taylor", progress=False),
    "layerwise": lambda p, done, file: po.plans.layerwise(network, p, [X], HALF, solvers.Score(), progress=False),
    "capture": lambda p, done, file: po.structure.capture(network, p, [X]),
    "capture of data": lambda p, done, file: po.structure.capture(network, WEIGHTS, [p["a"]]),
    "fisher": lambda p, done, file: empirical_fisher(loss, p, [X]),
    "save": lambda p, done, file: po.save(po.Pruned(p, done[1].support), file),
    "from_masks": lambda p, done, file: po.from_masks(p, {"a": np.ones((6, 4), bool)}),
    "report": lambda p, done, file: po.report(None, p, done[1]),
    "finish": lambda p, done, file: GRADUAL.finish(p, None),
}
TRACED = (
    r"numbers are read here, and inside jit there are none yet; call it|is traced by jit, vmap or grad and has no num"
)


@pytest.mark.parametrize("name", CALLS)
def test_calls_inside_transformations_are_one_sentence(name, done, tmp_path):
    def inside(p):
        CALLS[name](p, done, tmp_path / "x")
        return jnp.sum(p["a"])

    one, several = WEIGHTS, jax.tree.map(lambda x: x[None], WEIGHTS)
    for outer, given in ((jax.jit(inside), one), (jax.grad(inside), one), (jax.vmap(inside), several)):
        with pytest.raises(TypeError, match=TRACED) as error:
            outer(given)
        assert "\n" not in str(error.value)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", [name for name in CALLS if name != "gram"])
def test_deleted_arrays_are_named(name, done, tmp_path):
    gone = {"a": jnp.array(WEIGHTS["a"])}
    gone["a"].delete()
    with pytest.raises(
        ValueError, match=r"was deleted, such as by donating it to a compiled function; pass the arrays"
    ):
        CALLS[name](gone, done, tmp_path / "x")


def test_inside_jit_constants_have_no_numbers_either(done, tmp_path):
    def inside(x):
        po.prune(None, WEIGHTS, None, HALF, progress=False)
        return x

    with pytest.raises(TypeError, match=r"prune: numbers are read here, and inside jit"):
        jax.jit(inside)(0.0)
    po.save(done[1], tmp_path / "x")
    with pytest.raises(TypeError, match=r"load: numbers are read here, and inside jit"):
        jax.jit(lambda x: (po.load(tmp_path / "x", WEIGHTS), x)[1])(0.0)
    kept = []
    jax.grad(lambda x: (kept.append(po.prune(None, WEIGHTS, None, HALF, progress=False).kept), x)[1])(0.0)
    assert kept == [12]  # what grad does not follow has its numbers


def test_a_support_is_applied_inside_transformations(done):
    pruned = done[1]
    expected = np.where(np.asarray(pruned.support["a"]), WEIGHTS["a"], 0)
    np.testing.assert_array_equal(jax.jit(lambda p: po.apply(p, pruned))(WEIGHTS)["a"], expected)
    np.testing.assert_array_equal(
        jax.grad(lambda p: jnp.sum(po.apply(p, pruned)["a"]))(WEIGHTS)["a"], np.asarray(pruned.support["a"])
    )
    many = jax.vmap(lambda p: po.apply(p, pruned))(jax.tree.map(lambda x: jnp.stack([x, 2 * x]), WEIGHTS))
    np.testing.assert_array_equal(many["a"], np.stack([expected, 2 * expected]))
    gone = {"a": jnp.array(WEIGHTS["a"])}
    gone["a"].delete()
    with pytest.raises(ValueError, match="params: leaf 'a' was deleted"):
        po.apply(gone, pruned)


def test_a_missing_argument_is_said_as_python_says_it():
    with pytest.raises(TypeError, match="missing 1 required positional argument: 'solver'"):
        po.solve(problem(WEIGHTS["a"]))
