"""Block OBS, Thanos and RIA against NumPy float64 written from the papers, and against the peers' figures."""

import jax.numpy as jnp
import numpy as np
import pytest
from cases import gram, matrix

import pruneopt as po
from pruneopt.constraints import NM, Blocks, ByPath, Cardinality, Intersection, Slices, Support
from pruneopt.curvature import Gram, Identity
from pruneopt.objectives import Quadratic, Reconstruction
from pruneopt.solvers import Polish, Score, Then
from pruneopt.solvers.block_obs import BlockOBS
from pruneopt.solvers.thanos import Thanos

N, M = 12, 5


def layer(constraint, rank=None, n=N, m=M):
    return po.Problem(Reconstruction(matrix(1, n, m), Gram.checked(gram(n, rank))), subject_to=constraint)


def dense(problem, damping):
    """W0 and the damped Gram in NumPy."""
    h = np.asarray(problem.objective.curvature.matrix, np.float64)
    return np.array(problem.objective.center, np.float64), h + damping * np.trace(h) / len(h) * np.eye(len(h))


def largest(scores, count):
    """The mask of the `count` largest."""
    keep = np.zeros(scores.size, bool)
    keep[np.argsort(-scores, axis=None, kind="stable")[:count]] = True
    return keep.reshape(scores.shape)


def sparsegpt(w, h, starts, choose):
    """Algorithm 1 of SparseGPT: from each of `starts` on, `choose(scores, kept so far, start)` marks what lives."""
    u = np.linalg.cholesky(np.linalg.inv(h)).T
    w, keep = w.copy(), np.zeros(w.shape, bool)
    for j in range(len(w)):
        if j in starts:
            keep = choose(w**2 / np.diag(u)[:, None] ** 2, keep, j)
        error = np.where(keep[j], 0, w[j] / u[j, j])
        w[j:] -= np.outer(u[j, j:], error)
        w[j] *= keep[j]
    return w, keep


def runs(size):
    """A budget of half the weights of each run of `size` inputs, floored."""

    def choose(scores, keep, j):
        part = scores[j : j + size]
        return np.concatenate([keep[:j], largest(part, part.size // 2), keep[j + size :]])

    return choose


def shared(count):
    """One budget: what is swept stays as it is."""

    def choose(scores, keep, j):
        swept = (np.arange(len(scores)) < j)[:, None]
        return largest(np.where(swept, np.where(keep, np.inf, -np.inf), scores), count)

    return choose


def two_of_four(scores, keep, j):
    """2:4 in the group that starts at j."""
    keep = keep.copy()
    for o in range(scores.shape[1]):
        keep[j : j + 4, o] = largest(scores[j : j + 4, o], 2)
    return keep


SWEEPS = {
    "runs of 4": (Cardinality(sparsity=0.5, per="in", span=4), 4, range(0, N, 4), runs(4)),
    "runs of 4 in blocks of 8": (Cardinality(sparsity=0.5, per="in", span=4), 10, range(0, N, 4), runs(4)),
    "a smaller last run": (Cardinality(sparsity=0.5, per="in", span=5), 5, range(0, N, 5), runs(5)),
    "one budget, one block": (Cardinality(count=25), 12, [0], shared(25)),
    "one budget, blocks of 5": (Cardinality(count=25), 5, range(0, N, 5), shared(25)),
    "2:4, blocks of 7": (NM(2, 4), 7, range(0, N, 4), two_of_four),
    "2:4, one block": (NM(2, 4), 128, range(0, N, 4), two_of_four),
}


@pytest.mark.parametrize("name", SWEEPS)
def test_sweep_is_sparsegpt(name):
    constraint, block, starts, choose = SWEEPS[name]
    problem = layer(constraint)
    value, keep = sparsegpt(*dense(problem, 0.01), starts, choose)
    found = po.solve(problem, BlockOBS(block=block))
    np.testing.assert_array_equal(found.support, keep)
    np.testing.assert_allclose(found.value, value, rtol=1e-9, atol=1e-11)


def test_factor_in_halves_is_that_of_the_inverse():
    problem = layer(Cardinality(sparsity=0.5), n=270, m=1)
    value, _ = sparsegpt(*dense(problem, 0.1), [0], shared(135))
    np.testing.assert_allclose(po.solve(problem, BlockOBS(270, 0.1)).value, value, rtol=1e-8, atol=1e-10)


def test_a_fixed_support_is_swept_as_it_is():
    mask = np.random.default_rng(3).random((N, M)) < 0.5
    problem = layer(Support(jnp.asarray(mask)))
    value, _ = sparsegpt(*dense(problem, 0.1), [0], lambda *_: mask)
    np.testing.assert_allclose(po.solve(problem, BlockOBS(5, 0.1)).value, value, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize(
    ("constraint", "block", "choose"),
    [
        (Cardinality(count=25), 5, shared(25)),
        (Cardinality(count=25), 128, shared(25)),
        (NM(2, 4), 5, two_of_four),
    ],
    ids=["blocks of 5", "one block", "2:4"],
)
def test_each_block_of_thanos_is_least_squares_over_what_is_not_swept(constraint, block, choose):
    problem = layer(constraint)
    w0, h = dense(problem, 0.02)
    norm = np.sqrt(np.diag(dense(problem, 0)[1]))[:, None]
    w, keep = w0.copy(), np.zeros(w0.shape, bool)
    block = min(N, 4 if isinstance(constraint, NM) else block)
    for start in range(0, N, block):
        mask = choose(np.abs(w) * norm, keep, start)
        keep[start : start + block] = mask[start : start + block]
        for o in range(M):  # min over the free weights of (w - w0)^T h (w - w0), those before `start` as they are
            free = (np.arange(N) >= start) & (keep[:, o] | (np.arange(N) >= start + block))
            fixed = np.where(np.arange(N) < start, w[:, o], 0)
            w[:, o] = fixed
            w[free, o] = np.linalg.solve(h[np.ix_(free, free)], h[free] @ (w0[:, o] - fixed))
    found = po.solve(problem, Thanos(block=block, damping=0.02))
    np.testing.assert_array_equal(found.support, keep)
    np.testing.assert_allclose(found.value, w, rtol=1e-9, atol=1e-11)


def test_one_block_of_thanos_is_the_exact_refit_of_its_mask():
    problem = layer(Cardinality(count=30))
    found = po.solve(problem, Thanos(damping=0))
    np.testing.assert_allclose(found.value, po.solve(problem, Polish(), init=found).value, rtol=1e-9, atol=1e-11)


CONSTRAINTS = {
    "per output": Cardinality(sparsity=0.5, per="out"),
    "counts in runs": Cardinality(count=17, per="in", span=5),
    "1:5 along the outputs": NM(1, 5, axis="out"),
    "blocks": Blocks((3, 1), Cardinality(sparsity=0.5)),
    "inputs": Slices(-2, Cardinality(count=7)),
    "2:4 within a budget": Intersection((Cardinality(sparsity=0.6), NM(2, 4))),
    "none kept": Cardinality(count=0, floor=0),
}


@pytest.mark.slow
@pytest.mark.parametrize("solver", [BlockOBS(block=4), Thanos(block=4)], ids=["sweep", "thanos"])
@pytest.mark.parametrize("name", CONSTRAINTS)
def test_any_constraint_is_met_and_its_budget_used(name, solver):
    problem = layer(CONSTRAINTS[name])
    found = po.solve(problem, solver)
    most = problem.subject_to.select(jnp.ones((N, M)))
    assert found.status.is_usable
    if not isinstance(problem.subject_to, Blocks | Intersection):
        assert int(found.support.sum()) == int(most.sum())


SOLVERS = [BlockOBS(block=4), Thanos(block=4)]


@pytest.mark.parametrize("solver", SOLVERS, ids=["sweep", "thanos"])
class TestDegenerate:
    def test_all_kept_is_the_trained_matrix(self, solver):
        problem = layer(Cardinality(sparsity=0.0))
        np.testing.assert_allclose(po.solve(problem, solver).value, problem.objective.center, rtol=1e-12)

    def test_one_weight(self, solver):
        assert po.solve(layer(Cardinality(count=1), n=1, m=1), solver).status is not po.Status.NONFINITE

    @pytest.mark.parametrize("damping", [0.0, 0.01])
    @pytest.mark.parametrize("kind", ["singular", "indefinite", "duplicated", "dead", "zero"])
    def test_poor_grams(self, solver, kind, damping):
        h = np.array(gram(N, 3))
        if kind == "indefinite":
            h -= 1e-9 * np.eye(N)
        if kind == "duplicated":
            h = np.array(gram(N))[:, [0] * 4 + list(range(8))][[0] * 4 + list(range(8))]
        if kind == "dead":
            h[[2, 7]] = h[:, [2, 7]] = 0
        if kind == "zero":
            h *= 0
        problem = po.Problem(Reconstruction(matrix(1, N, M), Gram.checked(h)), subject_to=Cardinality(count=25))
        found = po.solve(problem, type(solver)(block=4, damping=damping))
        assert found.status.is_usable
        assert np.abs(found.value).max() < 1e3
        assert found.stats["damping"] >= damping
        assert int(found.support.sum()) == 25
        if kind == "dead":
            assert not found.support[np.array([2, 7])].any()

    def test_zero_weights(self, solver):
        problem = layer(Cardinality(count=25))
        zero = Reconstruction(problem.objective.center * 0, problem.objective.curvature)
        assert not po.solve(po.Problem(zero, subject_to=Cardinality(count=25)), solver).value.any()

    @pytest.mark.default_flags
    def test_bfloat16(self, solver):
        objective = Reconstruction(matrix(1, N, M).astype(jnp.bfloat16), Gram.checked(gram(N, 3)))
        found = po.solve(po.Problem(objective, subject_to=NM(2, 4)), solver)
        assert found.status.is_usable
        assert found.value.dtype == jnp.bfloat16

    def test_scale_changes_nothing(self, solver):
        problem = layer(Cardinality(count=25))
        found = po.solve(problem, solver)
        f = problem.objective
        large = Reconstruction(f.center * 2.0**20, Gram.checked(f.curvature.matrix * 2.0**-30))
        again = po.solve(po.Problem(large, subject_to=problem.subject_to), solver)
        np.testing.assert_allclose(again.value, found.value * 2.0**20, rtol=1e-9)

    def test_beats_scores_and_leaves_a_refit_little(self, solver):
        problem = layer(Cardinality(count=25))
        found = po.solve(problem, solver)
        refit = po.solve(problem, Then(solver, Polish()))
        assert refit.objective <= found.objective < po.solve(problem, Score()).objective


@pytest.mark.parametrize("solver", [BlockOBS, Thanos])
@pytest.mark.parametrize(
    ("knobs", "words"),
    [
        ({"block": 0}, "block=0"),
        ({"block": True}, "block=True"),
        ({"block": 1.5}, "block=1.5"),
        ({"damping": -1.0}, "damping=-1.0"),
        ({"damping": float("nan")}, "damping=nan"),
    ],
)
def test_bad_knobs(solver, knobs, words):
    with pytest.raises(ValueError, match=words):
        solver(**knobs)


@pytest.mark.parametrize("solver", SOLVERS, ids=["sweep", "thanos"])
def test_refusals(solver):
    w = matrix(1, N, M)
    half = Cardinality(sparsity=0.5)
    with pytest.raises(ValueError, match="Reconstruction"):
        po.solve(po.Problem(Quadratic(w, Identity()), subject_to=half), solver)
    with pytest.raises(ValueError, match="subject_to="):
        po.solve(layer(None), solver)
    with pytest.raises(ValueError, match="ByPath"):
        po.solve(layer(ByPath({"*": half})), solver)


def test_relative_importance_by_hand():
    problem = layer(Cardinality(count=25))
    w, h = dense(problem, 0)
    size = np.abs(w)
    scores = (size / size.sum(0) + size / size.sum(1)[:, None]) * np.sqrt(np.sqrt(np.diag(h)))[:, None]
    found = po.solve(problem, Score("relative"))
    np.testing.assert_array_equal(found.support, largest(scores, 25))
    np.testing.assert_array_equal(found.value, np.where(found.support, w, 0))


@pytest.mark.default_flags
def test_relative_importance_overflows_nowhere_and_takes_empty_rows():
    w = np.asarray(matrix(1, N, M), np.float32).copy()
    w[:, 0] *= 1e38
    w[3] = w[:, 2] = 0
    problem = po.Problem(Reconstruction(jnp.asarray(w), Gram.checked(gram(N))), subject_to=Cardinality(count=20))
    found = po.solve(problem, Score("relative"))
    assert int(found.support.sum()) == 20
    assert not found.support[3].any()
    assert not found.support[:, 2].any()


def test_relative_importance_needs_inputs():
    problem = po.Problem(Quadratic(matrix(1), Identity()), subject_to=Cardinality(count=3))
    with pytest.raises(ValueError, match=r"rule='relative'.*Reconstruction"):
        po.solve(problem, Score("relative"))


# The relative errors of SparseGPT's own code, with its own budget: the same fraction of every 128 inputs.
PUBLISHED = [
    ("minilm_l2_attn_out", "2:4", 5.01198e-02),
    pytest.param("mlpnet_fc1", 0.9, 3.53594e-02, marks=pytest.mark.slow),
]


@pytest.mark.default_flags
@pytest.mark.usefixtures("optimised")
@pytest.mark.parametrize(("name", "spec", "expected"), PUBLISHED)
@pytest.mark.slow
def test_real_layers_have_the_errors_of_sparsegpt(folder, name, spec, expected):
    with np.load(folder / "layers" / f"{name}.npz", allow_pickle=False) as archive:
        h = jnp.asarray(archive["H"] / archive["n_samples"].astype(np.float32))
        objective = Reconstruction(jnp.asarray(archive["W0"].T), Gram.checked(h))
    constraint = NM(2, 4) if spec == "2:4" else Cardinality(sparsity=spec, per="in", span=128)
    found = po.solve(po.Problem(objective, subject_to=constraint), BlockOBS())
    assert found.stats["relative_error"] == pytest.approx(expected, rel=0.01)
