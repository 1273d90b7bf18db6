"""Hessian, Gauss-Newton and true Fisher against the dense matrix by plain autodiff in float64, and their refusals."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import tiny_batches, tiny_loss, tree
from jax.flatten_util import ravel_pytree

import pruneopt as po
from pruneopt.bounds import Duality
from pruneopt.curvature import (
    BlockDiagonal,
    Diagonal,
    GaussNewton,
    Gram,
    Hessian,
    Kronecker,
    LowRankPlusDiagonal,
    Shrunk,
    empirical_fisher,
    sampled_fisher,
    softmax_fisher,
)
from pruneopt.objectives import Quadratic, Reconstruction
from pruneopt.penalties import L1
from pruneopt.solvers import CBS, CHITA, GlobalADMM, ProximalGradient

BOTH = ["a", "b"]
SHAPES = {"a": (2, 4), "b": (4, 3)}


def logits(params, batch):
    return jnp.tanh(batch[0] @ params["a"]) @ params["b"]


def entropy(z, batch):
    labels = (batch[1][:, 0] > 0).astype(int)
    return -jnp.mean(jnp.take_along_axis(jax.nn.log_softmax(z), labels[:, None], axis=1))


def squares(z, batch):
    return jnp.mean(jnp.sum((z - batch[1]) ** 2, axis=1))


def flat(params):
    return ravel_pytree(params)


def dense_hessian(loss, params):
    w, unravel = flat(params)
    return np.asarray(jax.jit(jax.hessian(lambda v: loss(unravel(v), tiny_batches()[0])))(w))


def dense_gauss_newton(loss, params):
    """J^T H_L J with both Jacobians whole."""
    w, unravel = flat(params)
    batch = tiny_batches()[0]
    z = logits(params, batch)
    j = jax.jit(jax.jacobian(lambda v: logits(unravel(v), batch).reshape(-1)))(w)
    h = jax.hessian(lambda v: loss(v.reshape(z.shape), batch))(z.reshape(-1))
    return np.asarray(j.T @ h @ j)


def made(name, sizes=(10,)):
    """(curvature, its dense matrix)."""
    params = tree(1, SHAPES)
    if name == "Hessian":
        return Hessian.of(tiny_loss, tree(1), tiny_batches(sizes), BOTH), dense_hessian(tiny_loss, tree(1))
    loss = {"squares": squares, "softmax": entropy}[name]
    return GaussNewton.of(logits, loss, params, tiny_batches(sizes), BOTH), dense_gauss_newton(loss, params)


# Batches of different sizes for one of them: how they are weighted is the same code for all, and each size compiles.
@pytest.mark.parametrize(
    ("name", "sizes"),
    [pytest.param("Hessian", (4, 4, 2), marks=pytest.mark.slow), ("squares", (5, 5)), ("softmax", (5, 5))],
)
@pytest.mark.slow
def test_products_diagonal_blocks_and_form_are_those_of_the_dense_matrix(name, sizes):
    h, expected = made(name, sizes)
    p, close = len(expected), {"rtol": 1e-11, "atol": 1e-12}
    np.testing.assert_allclose(h.dense(), expected, **close)
    d = tree(5, SHAPES if p == 20 else {"a": (2, 4), "b": (4, 1)})
    np.testing.assert_allclose(flat(h.mv(d))[0], expected @ flat(d)[0], **close)
    np.testing.assert_allclose(flat(h.diagonal(d))[0], np.diag(expected), **close)
    np.testing.assert_allclose(h.block("b"), expected[8:, 8:], **close)
    some = np.random.default_rng(0).permutation(p)[: p - 8]  # as many as "b" has
    np.testing.assert_allclose(h.block(some.tolist()), expected[np.ix_(some, some)], **close)
    w = np.asarray(flat(d)[0])
    assert h.form(d, jax.tree.map(jnp.zeros_like, d), 0.5) == pytest.approx(w @ expected @ w + 0.5 * w @ w)
    assert h.semidefinite == (np.linalg.eigvalsh(expected)[0] > -1e-12)


@pytest.mark.slow
def test_solve_is_that_of_the_dense_matrix_where_it_is_positive():
    h, expected = made("squares")
    b = tree(6, SHAPES)
    exact = np.linalg.solve(expected + 0.1 * np.eye(20), flat(b)[0])
    np.testing.assert_allclose(flat(h.solve(b, ridge=0.1))[0], exact, rtol=1e-9)


@pytest.mark.slow
def test_hutchinson_is_unbiased_and_the_same_however_the_data_is_cut():
    h, expected = made("squares")
    probes = 3000
    got = flat(h.hutchinson(probes).values)[0]
    off = expected - np.diag(np.diag(expected))
    assert np.all(np.abs(got - np.diag(expected)) < 4.5 * np.sqrt((off**2).sum(1) / probes) + 1e-12)
    key = jax.random.key(3)
    cut = flat(made("squares", (3, 7))[0].hutchinson(20, key).values)[0]
    np.testing.assert_allclose(flat(h.hutchinson(20, key).values)[0], cut, rtol=1e-11, atol=1e-13)


def test_the_exact_diagonal_is_computed_once():
    """A damped objective asks for it at each value; each time would be a pass for every 16 weights."""
    passes = []

    def batches():
        passes.append(1)
        return iter(tiny_batches((10,)))

    model = Quadratic(tree(1), Hessian.of(tiny_loss, tree(1), batches, BOTH), damping=0.1)
    first = model.value(tree(2))
    before = len(passes)
    assert model.value(tree(2)) == first
    assert len(passes) == before + 1  # the form alone


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_the_exact_diagonal_of_half_precision_weights_is_not_rounded_to_them(dtype):
    wide, half = tree(1), jax.tree.map(lambda x: x.astype(dtype), tree(1))
    model = Hessian.of(tiny_loss, wide, tiny_batches((10,)), BOTH)
    got, want = model.diagonal(half), model.diagonal(wide)
    assert all(x.dtype == jnp.float32 for x in jax.tree.leaves(got))
    np.testing.assert_allclose(flat(got)[0], flat(want)[0], rtol=1e-6)


@pytest.mark.slow
def test_proximal_gradient_on_products_over_the_data_is_that_on_the_same_matrix_in_memory():
    center, params = tree(3, SHAPES), tree(1, SHAPES)
    streamed = GaussNewton.of(logits, entropy, params, tiny_batches((10,)), BOTH)
    found = [
        po.solve(po.Problem(Quadratic(center, h, damping=0.1), penalty=L1(0.05)), ProximalGradient())
        for h in (streamed, softmax_fisher(logits, params, tiny_batches(), BOTH))
    ]
    assert [s.status for s in found] == [po.Status.OPTIMAL, po.Status.OPTIMAL]
    assert found[0].stats["gap"] < 1e-6 * found[0].objective
    np.testing.assert_allclose(flat(found[0].value)[0], flat(found[1].value)[0], rtol=1e-9, atol=1e-12)


@pytest.mark.slow
@pytest.mark.default_flags
def test_an_indefinite_hessian_is_minimised_over_a_ball_and_can_be_used_afterwards():
    center = tree(1, dtype=jnp.float32)
    h = Hessian.of(tiny_loss, center, tiny_batches((10,)), BOTH)
    ball = po.constraints.L1Ball(1.0)
    problem = po.Problem(Quadratic(center, h, center), subject_to=ball)
    solution = po.solve(problem, ProximalGradient())
    assert solution.status is po.Status.FEASIBLE
    assert solution.objective < problem.value(ball.project(center))
    assert solution.bound == -np.inf
    assert np.isfinite(flat(h.diagonal(center))[0]).all()


@pytest.mark.parametrize("solver", [CHITA(), GlobalADMM(), CBS()], ids=lambda s: type(s).__name__)
def test_an_indefinite_hessian_is_refused_where_a_minimum_is_sought(solver):
    w = {"a": 3 * tree(1)["a"], "b": tree(1)["b"]}
    h = Hessian.of(tiny_loss, w, tiny_batches((10,)), BOTH)
    problem = po.Problem(Quadratic(w, h, w), subject_to=po.constraints.Cardinality(count=6))
    with pytest.raises(ValueError, match="indefinite") as caught:
        po.solve(problem, solver)
    for word in (type(solver).__name__, "= -", "GaussNewton", "damping"):
        assert word in str(caught.value), str(caught.value)


@pytest.mark.slow
@pytest.mark.default_flags
def test_a_function_that_fixes_float32_within_is_taken_in_its_own_precision():
    def recurrent(params, batch):  # its state is float32 whatever comes in
        step = lambda h, _: (jnp.tanh(batch[0] @ params["a"] + h), None)  # noqa: E731
        h, _ = jax.lax.scan(step, jnp.zeros((batch[0].shape[0], 4), jnp.float32), length=2)
        return h @ params["b"]

    def loss(params, batch):
        return squares(recurrent(params, batch), batch)

    d, data = tree(5), tiny_batches((4, 6))
    zero = jax.tree.map(jnp.zeros_like, d)
    network = GaussNewton.of(recurrent, squares, tree(1), data, BOTH)
    for h in (Hessian.of(loss, tree(1), data, BOTH), network):
        product = flat(h.mv(d))[0]
        assert h.form(d, zero, 0.0) == pytest.approx(float(flat(d)[0] @ product), rel=1e-5)
        np.testing.assert_allclose(flat(Quadratic(zero, h).slope(d))[0], product, rtol=1e-4, atol=1e-6)
    assert not network.semidefinite  # for all that is known


@pytest.mark.default_flags
@pytest.mark.slow
def test_form_is_float64_and_products_are_float32_in_the_default_mode():
    h = Hessian.of(tiny_loss, tree(1), tiny_batches((4, 6)), BOTH)
    d = tree(2)
    assert h.mv(d)["a"].dtype == jnp.float32
    got = h.form(d, jax.tree.map(jnp.zeros_like, d), 0.0)
    with jax.enable_x64(True):
        wide = lambda t: jax.tree.map(lambda x: jnp.asarray(x, jnp.float64), t)  # noqa: E731
        batches = wide(jax.tree.map(np.asarray, tiny_batches((4, 6))))  # rounded to float32 first, as h's are
        w, unravel = flat(wide(tree(1, dtype=jnp.float32)))
        losses = lambda v: sum(n * tiny_loss(unravel(v), b) for n, b in zip((4, 6), batches, strict=True)) / 10  # noqa: E731
        v = flat(wide(d))[0]
        expected = float(v @ jax.jit(jax.hessian(losses))(w) @ v)
    assert got == pytest.approx(expected, rel=1e-6)


# --------------------------------------------------------------------------------------------------- true Fisher


@pytest.mark.slow
def test_the_exact_fisher_of_a_softmax_is_the_sum_over_labels_and_the_gauss_newton_matrix():
    params = tree(1, SHAPES)
    w, unravel = flat(params)
    x, y = tiny_batches()[0]
    expected = np.zeros((20, 20))
    jacobian = jax.jit(jax.jacobian(lambda v, x: jax.nn.log_softmax(logits(unravel(v), (x[None], y)))[0]))
    for i in range(10):
        p = np.exp(jax.nn.log_softmax(logits(params, (x[i : i + 1], y)))[0])
        slopes = np.asarray(jacobian(w, x[i]))
        expected += np.einsum("c,ci,cj->ij", p, slopes, slopes) / 10
    np.testing.assert_allclose(dense_gauss_newton(entropy, params), expected, rtol=1e-10, atol=1e-13)
    found = softmax_fisher(logits, params, tiny_batches((4, 4, 2)), BOTH, ridge=0.5)
    assert found.gradients.shape == (30, 20)
    np.testing.assert_allclose(found.dense(), expected + 0.5 * np.eye(20), rtol=1e-10, atol=1e-13)


def repeated(copies):
    """One batch of the ten examples again and again."""
    return [jax.tree.map(lambda x: jnp.tile(x, (copies, 1)), tiny_batches()[0])]


@pytest.mark.slow
def test_the_sampled_fisher_is_unbiased_and_the_same_however_the_data_is_cut():
    params, copies = tree(1, SHAPES), 400
    many = repeated(copies)
    found = sampled_fisher(logits, params, many, BOTH)
    outer = np.einsum("ni,nj->nij", found.gradients, found.gradients).reshape(copies, 10, 20, 20)
    standard_error = np.sqrt(outer.var(0).sum(0) / copies) / 10
    apart = np.abs(np.asarray(found.dense()) - dense_gauss_newton(entropy, params))
    assert np.all(apart < 5 * standard_error + 1e-12)
    one = sampled_fisher(logits, params, tiny_batches(), BOTH, key=jax.random.key(4))
    cut = sampled_fisher(logits, params, tiny_batches((3, 7)), BOTH, key=jax.random.key(4))
    np.testing.assert_array_equal(one.gradients, cut.gradients)
    assert not np.array_equal(one.gradients, found.gradients[:10])


@pytest.mark.slow
def test_the_sampled_fisher_of_another_likelihood():
    """Normal with variance 1/2, whose -log p is the sum of squares: its Fisher is their Gauss-Newton matrix."""
    params, copies = tree(1, SHAPES), 400
    found = sampled_fisher(
        logits,
        params,
        repeated(copies),
        BOTH,
        sample=lambda key, z: z + jnp.sqrt(0.5) * jax.random.normal(key, z.shape, z.dtype),
        loss=lambda z, y: jnp.sum((z - y) ** 2),
    )
    outer = np.einsum("ni,nj->nij", found.gradients, found.gradients).reshape(copies, 10, 20, 20)
    standard_error = np.sqrt(outer.var(0).sum(0) / copies) / 10
    apart = np.abs(np.asarray(found.dense()) - dense_gauss_newton(squares, params))
    assert np.all(apart < 5 * standard_error + 1e-12)


# ------------------------------------------------------------------------------------------------------ bad input


def bad_loss(params, batch):
    """Finite, its Hessian is not."""
    return tiny_loss(params, batch) + jnp.sqrt(jnp.where(jnp.max(batch[0]) > 90, 0.0, 1.0) * jnp.sum(params["b"] ** 2))


def nan_above(value, batch):
    return value * jnp.where(jnp.max(batch[0]) > 90, jnp.nan, 1.0)


def poisoned():
    batches = tiny_batches((4, 4, 2))
    x, y = batches[1]
    batches[1] = (x.at[2].set(99.0), y)
    return batches


REFUSED = {
    "indefinite": (
        lambda: made("Hessian")[0].solve(tree(1)),
        ("not positive definite", "least eigenvalue is -", "ridge >", "GaussNewton"),
    ),
    "singular": (lambda: made("softmax")[0].solve(tree(1, SHAPES)), ("not positive definite", "ridge >")),
    "dense too large": (lambda: made("Hessian")[0].dense(memory=100), ("1,152 bytes", "12 x 12", "GaussNewton")),
    "block too large": (lambda: made("squares")[0].block("b", memory=100), ("1,152 bytes", "fewer entries")),
    "NaN on one batch": (
        lambda: Hessian.of(bad_loss, tree(1), poisoned(), BOTH).mv(tree(1)),
        ("batch 1", "Hessian of fn", "NaN"),
    ),
    "a loss that is NaN on one batch": (
        lambda: Hessian.of(lambda p, b: nan_above(tiny_loss(p, b), b), tree(1), poisoned(), BOTH).mv(tree(1)),
        ("batches: batch 1: fn returns nan",),
    ),
    "a loss of outputs that is NaN on one batch": (
        lambda: GaussNewton.of(
            logits, lambda z, b: nan_above(squares(z, b), b), tree(1, SHAPES), poisoned(), BOTH
        ).diagonal(tree(1, SHAPES)),
        ("batches: batch 1: fn returns nan",),
    ),
    "transposed": (
        lambda: made("Hessian")[0].mv(jax.tree.map(jnp.transpose, tree(1))),
        ("direction", "'a'", "(4, 2)", "(2, 4)"),
    ),
    "too large a direction": (
        lambda: made("Hessian")[0].mv(jax.tree.map(lambda x: x * jnp.inf, tree(1))),
        ("direction", "diverges", "GaussNewton"),
    ),
    "half a probe": (lambda: made("Hessian")[0].hutchinson(2.5), ("probes=2.5", "whole number")),
    "an index twice": (lambda: made("Hessian")[0].block([0, 0, 1]), ("[0, 0, 1]", "twice")),
    "no probe": (lambda: made("Hessian")[0].hutchinson(0), ("probes=0",)),
    "no scalar": (lambda: Hessian.of(logits, tree(1, SHAPES), tiny_batches(), BOTH), ("not one floating",)),
    "no model": (lambda: GaussNewton.of(None, squares, tree(1), tiny_batches(), BOTH), ("model(params, batch)",)),
    "no examples": (lambda: Hessian.of(tiny_loss, tree(1), [], BOTH), ("empty",)),
    "a loss for a network": (lambda: sampled_fisher(tiny_loss, tree(1), tiny_batches(), BOTH), ("a loss", "network")),
    "one example": (lambda: sampled_fisher(logits, tree(1, SHAPES), tiny_batches((1,)), BOTH), ("1 example",)),
    "no logits": (
        lambda: softmax_fisher(lambda p, b: logits(p, b)[0, 0], tree(1, SHAPES), tiny_batches(), BOTH),
        ("logits (n, classes)", "sampled_fisher"),
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_bad_input_gets_one_sentence(name):
    call, words = REFUSED[name]
    with pytest.raises((ValueError, TypeError)) as caught:
        call()
    for word in words:
        assert word in str(caught.value), str(caught.value)


def test_one_example_has_a_hessian():
    h = Hessian.of(tiny_loss, tree(1), tiny_batches((1,)), BOTH)
    assert np.isfinite(flat(h.mv(tree(2)))[0]).all()
    assert empirical_fisher(tiny_loss, tree(1), tiny_batches((1, 1)), BOTH).n == 2


# ------------------------------------------------------------------------------------------ whether H is semidefinite


def welsch(z, batch):
    """Bounded in the residual, so concave where that is large."""
    return jnp.mean(jnp.sum(1 - jnp.exp(-((z - 3 * batch[1]) ** 2)), axis=1))


def between_examples(z, batch):
    """Convex in each example's outputs, not in those of two."""
    return jnp.mean(z**2) - 3 * jnp.mean(z[1:] * z[:-1])


def both_as_a_pair(z, batch):
    return squares(z[0], batch) + entropy(z[1], batch)


@pytest.mark.parametrize(("loss", "model"), [
    (squares, logits), (entropy, logits), (lambda z, b: jnp.mean(jnp.abs(z - b[1])), logits),
    (both_as_a_pair, lambda p, b: (logits(p, b), 30 * logits(p, b))),
    (welsch, logits), (between_examples, logits),
], ids=["squares", "softmax", "absolute", "a pair of outputs", "welsch", "between examples"])  # fmt: skip
def test_a_gauss_newton_says_whether_its_loss_is_convex_at_its_outputs(loss, model):
    params = tree(1, SHAPES)
    h = GaussNewton.of(model, loss, params, tiny_batches((5, 5)), BOTH)
    convex = loss not in (welsch, between_examples)
    least = np.linalg.eigvalsh(h.dense())[0]
    assert (least > -1e-12) == convex
    assert h.semidefinite == convex


def test_a_gauss_newton_of_many_outputs_claims_nothing():
    wide = lambda p, b: jnp.repeat(logits(p, b), 50, axis=1)  # noqa: E731
    h = GaussNewton.of(wide, lambda z, b: jnp.mean(z**2), tree(1, SHAPES), tiny_batches((10,)), BOTH)
    assert not h.semidefinite


def bent_down():
    """(w, a Hessian that is indefinite there)."""
    w = tree(1)
    h = Hessian.of(tiny_loss, w, tiny_batches((10,)), BOTH)
    assert np.linalg.eigvalsh(h.dense())[0] < 0
    return w, h


@pytest.mark.slow
def test_what_is_made_of_an_indefinite_hessian_does_not_call_itself_semidefinite():
    w, h = bent_down()
    positive = jax.tree.map(jnp.ones_like, w)
    assert not h.semidefinite
    assert not Shrunk.checked(h, positive, 0.1).semidefinite
    assert Shrunk.checked(h, positive, 1.0).semidefinite
    for by in ("leaf", "out", "in", 1, 5):
        blocks = BlockDiagonal.of(h, by)
        dense = np.stack([flat(blocks.mv(unflat))[0] for unflat in map(flat(w)[1], np.eye(12))])
        assert blocks.semidefinite == (np.linalg.eigvalsh(dense)[0] >= 0), by
    assert not BlockDiagonal.of(h).semidefinite
    assert BlockDiagonal.of(empirical_fisher(tiny_loss, w, tiny_batches((2,)), BOTH), 5).semidefinite  # rank 2


def test_the_others_check_their_numbers():
    w = tree(1)
    signed, ones = Diagonal(w), Diagonal(jax.tree.map(jnp.ones_like, w))
    assert not signed.semidefinite
    assert ones.semidefinite
    fisher = empirical_fisher(tiny_loss, w, tiny_batches((4,)), BOTH)
    assert LowRankPlusDiagonal(fisher, ones.values).semidefinite
    assert not LowRankPlusDiagonal(fisher, signed.values).semidefinite
    assert not Gram.checked(jnp.asarray([[1.0, 3.0], [3.0, 1.0]])).semidefinite
    assert Gram.checked(jnp.ones((2, 2))).semidefinite
    assert Gram.checked(jnp.zeros((2, 2))).semidefinite
    k = Kronecker.of(tiny_loss, w, tiny_batches((3,)), BOTH)
    assert k.semidefinite
    assert not Kronecker(k.inputs, tuple(-s for s in k.outputs), k.entries, k.layout).semidefinite


@pytest.mark.parametrize("make", [lambda h, w: Shrunk.checked(h, jax.tree.map(jnp.ones_like, w), 0.1),
                                  lambda h, w: BlockDiagonal.of(h)], ids=["shrunk", "blocks"])  # fmt: skip
@pytest.mark.slow
def test_nothing_is_proven_of_an_indefinite_model_however_it_is_wrapped(make):
    w, h = bent_down()
    problem = po.Problem(Quadratic(w, make(h, w)), subject_to=po.constraints.L1Ball(1.0))
    solution = po.solve(problem, ProximalGradient())
    assert "gap" not in solution.stats
    assert solution.bound == -np.inf


@pytest.mark.parametrize("solver", [CHITA(), GlobalADMM(), CBS()], ids=lambda s: type(s).__name__)
def test_shrinking_or_cutting_hides_no_indefinite_hessian_from_a_solver(solver):
    w = {"a": 3 * tree(1)["a"], "b": tree(1)["b"]}
    h = Hessian.of(tiny_loss, w, tiny_batches((10,)), BOTH)
    h = BlockDiagonal.of(h) if solver == CBS() else Shrunk.checked(h, jax.tree.map(lambda x: 0 * x, w), 0.01)
    problem = po.Problem(Quadratic(w, h, w), subject_to=po.constraints.Cardinality(count=6))
    with pytest.raises(ValueError, match="indefinite"):
        po.solve(problem, solver)


@pytest.mark.parametrize(("loss", "shrunk"), [(squares, False), (entropy, True), (welsch, False)])
@pytest.mark.slow
def test_certify_proves_the_gap_of_a_gauss_newton_where_the_loss_is_convex_and_not_elsewhere(loss, shrunk):
    center, params, rng = tree(3, SHAPES), tree(1, SHAPES), np.random.default_rng(0)
    h = GaussNewton.of(logits, loss, params, tiny_batches((10,)), BOTH)
    h = Shrunk.checked(h, jax.tree.map(jnp.ones_like, params), 0.2) if shrunk else h
    problem = po.Problem(Quadratic(center, h, damping=0.1), penalty=L1(0.05))
    solution = po.solve(problem, ProximalGradient(iterations=5 if loss is welsch else 400))
    claim = dataclasses.replace(solution, evidence=Duality(jax.tree.map(np.asarray, solution.value)))
    bound = po.certify(problem, claim).bound
    assert (solution.status is po.Status.OPTIMAL) == (bound > -np.inf) == (loss is not welsch)
    for size in (1e-3, 0.1, 1.0) if loss is not welsch else ():  # the objective is nowhere below it
        step = jax.tree.map(lambda x: rng.standard_normal(x.shape), center)
        assert problem.value(jax.tree.map(lambda x, d, s=size: x + s * d, solution.value, step)) >= bound - 1e-12


@pytest.mark.slow
@pytest.mark.default_flags
def test_damping_proves_what_rounding_made_indefinite():
    """A Gram of fewer tokens than inputs, accumulated in float32."""
    x = np.random.default_rng(0).standard_normal((10, 40)).astype(np.float32)
    h = Gram.checked(jnp.asarray(x.T @ x / 10))
    assert not h.semidefinite
    w = jnp.asarray(np.random.default_rng(1).standard_normal((40, 3)), jnp.float32)
    problem = po.Problem(Reconstruction(w, h, damping=0.01), penalty=L1(0.05))
    assert problem.objective.is_convex
    solution = po.solve(problem, ProximalGradient())
    assert solution.stats["gap"] <= 1e-6 * solution.objective
    signed = Diagonal({"w": jnp.asarray([[3.0, -0.1]])})
    assert [Quadratic({"w": jnp.ones((1, 2))}, signed, damping=d).is_convex for d in (0.05, 0.2)] == [False, True]
