"""What a batch is: its examples counted, never guessed; judged by what fn computes from it; tensors and text."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import pruneopt as po
from pruneopt.constraints import Cardinality
from pruneopt.curvature import GaussNewton, Hessian, Kronecker, empirical_fisher_diagonal, hutchinson_diagonal
from pruneopt.network.batches import Batches
from pruneopt.objectives import Loss

RNG = np.random.default_rng(0)
X, Y = RNG.normal(size=(10, 4)), RNG.normal(size=(10, 2))
X[8:] *= 10  # the last two examples decide the mean: weighting batches wrongly shows
SCALE = np.array([0.5, 1.0, 2.0, 1.5])
PARAMS = {"a": RNG.normal(size=(4, 3)), "b": RNG.normal(size=(3, 2))}
CUTS = (slice(0, 8), slice(8, 10))


def outputs(p, batch):
    return jnp.tanh((batch["x"] * batch["a_scale"][None]) @ p["a"]) @ p["b"]


def loss(p, batch):
    return 0.5 * jnp.mean(jnp.sum((outputs(p, batch) - batch["y"]) ** 2, axis=1))


def squares(z, batch):
    return 0.5 * jnp.mean(jnp.sum((z - batch["y"]) ** 2, axis=1))


def shared(*cuts):
    """Batches with an array that the examples share, first by name."""
    return [{"a_scale": SCALE, "x": X[i], "y": Y[i]} for i in cuts]


WHOLE = shared(slice(0, 10))
STATED = Batches(shared(*CUTS), count=lambda batch: len(batch["x"]))


def time_major(p, batch):
    """A mean over examples, which are the second axis of x (T, B, d)."""
    return jnp.mean(jnp.sum(jnp.tanh(batch["x"] @ p["a"]) @ p["b"], axis=(0, 2)) ** 2)


LONG = RNG.normal(size=(3, 10, 4))
LONG[:, 8:] *= 10


def same(a, b):
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-12, atol=1e-12), a, b)


MEANS = {
    "loss": lambda data: Loss(loss, PARAMS, data).value(PARAMS),
    "gradient": lambda data: Loss(loss, PARAMS, data).gradient(PARAMS),
    "Hessian": lambda data: Hessian.of(loss, PARAMS, data).mv(PARAMS),
    "Hutchinson": lambda data: hutchinson_diagonal(loss, PARAMS, data, probes=1).values,
    "Gauss-Newton": lambda data: GaussNewton.of(outputs, squares, PARAMS, data).mv(PARAMS),
    "K-FAC": lambda data: Kronecker.of(loss, PARAMS, data).mv(PARAMS),
    "output gradients": lambda data: (
        po.structure.capture(loss, PARAMS, data, output_gradients=True)["a"].output_gradient
    ),
}


@pytest.mark.parametrize("name", MEANS)
class TestCount:
    def test_stated_examples_give_the_mean_over_all_of_them(self, name):
        whole = Batches(WHOLE, count=lambda batch: len(batch["x"]))
        same(MEANS[name](STATED), MEANS[name](whole))

    def test_shared_arrays_are_refused_by_name(self, name):
        with pytest.raises(ValueError, match=r"'a_scale' \(4,\), 'x' \((8|2), 4\).*count=lambda batch"):
            MEANS[name](shared(*CUTS))


@pytest.mark.parametrize("name", ["loss", "gradient", "Hessian", "Gauss-Newton"])
def test_batches_of_equal_shapes_weigh_the_same_whatever_their_count(name):
    same(MEANS[name](shared(slice(0, 5), slice(5, 10))), MEANS[name](WHOLE))


@pytest.mark.parametrize("method", ["taylor", "obd", "snip", "grasp"])
def test_rows_of_derivatives_count_as_stated(method):
    def pruned(data):
        return po.prune(loss, PARAMS, data, Cardinality(sparsity=0.5), method=method, progress=False)

    same(pruned(STATED).support, pruned(WHOLE).support)
    with pytest.raises(ValueError, match="'a_scale'"):
        pruned(shared(*CUTS))


LONG_PARTS = [{"x": LONG[:, i]} for i in CUTS]


class TestTimeMajor:
    def test_another_axis_that_varies_is_refused(self):
        with pytest.raises(ValueError, match=r"'x' \(3, 8, 4\) and \(3, 2, 4\).*count=lambda batch"):
            Loss(time_major, PARAMS, LONG_PARTS).value(PARAMS)

    def test_a_stated_count_gives_the_mean(self):
        f = Loss(time_major, PARAMS, Batches(LONG_PARTS, count=lambda batch: batch["x"].shape[1]))
        assert f.value(PARAMS) == pytest.approx(float(time_major(PARAMS, {"x": LONG})), rel=1e-12)

    def test_labels_tell_the_examples_of_sequences_of_several_lengths(self):
        of = lambda p, b: jnp.mean((jnp.sum(b["x"] @ p["a"], axis=(1, 2)) - b["y"]) ** 2)  # noqa: E731
        parts = [{"x": RNG.normal(size=(n, t, 4)), "y": Y[:n, 0]} for n, t in ((6, 3), (2, 5))]
        want = sum(len(b["y"]) * float(of(PARAMS, b)) for b in parts) / 8
        assert Loss(of, PARAMS, parts, "a").value(PARAMS | {"b": None}) == pytest.approx(want, rel=1e-12)


@pytest.mark.parametrize(
    ("count", "error", "words"),
    [
        (3, TypeError, "count is 3"),
        (lambda b: 0, ValueError, "count returns 0"),
        (lambda b: b["y"], TypeError, "count"),
    ],
)
def test_a_bad_count_is_refused(count, error, words):
    with pytest.raises(error, match=words):
        Loss(loss, PARAMS, Batches(shared(*CUTS), count=count)).value(PARAMS)


def test_held_out_batches_may_state_their_count():
    found = Batches(STATED, "held_out")
    assert found.name == "held_out"
    assert found.examples(WHOLE[0]) == 10


def test_the_fisher_takes_examples_one_by_one():
    with pytest.raises(ValueError, match=r"batch 0.*'a_scale' \(4,\).*close fn over"):
        empirical_fisher_diagonal(loss, PARAMS, STATED)
    lengths = [{"x": RNG.normal(size=(2, t, 4))} for t in (3, 5)]
    with pytest.raises(ValueError, match=r"batch 1: an example of leaf 'x' has shape \(5, 4\).*pad"):
        empirical_fisher_diagonal(time_major, PARAMS, lengths)


# ------------------------------------------------------------------------------------------------ sources


class Dataset:
    """Batches by index, as a torch Dataset gives them: no __iter__, and no IndexError at the end."""

    def __len__(self):
        return 2

    def __getitem__(self, i):
        return {"a_scale": SCALE, "x": X[CUTS[i % 2]], "y": Y[CUTS[i % 2]]}


class Tensor:
    """Another library's array."""

    def __init__(self, values):
        self._values = values

    def __array__(self, dtype=None, copy=None):
        if self._values is None:
            raise TypeError("it lies on another device")
        return np.asarray(self._values, dtype)


def test_batches_by_index():
    found = Loss(loss, PARAMS, Batches(Dataset(), count=lambda b: len(b["x"])))
    assert found.value(PARAMS) == found.value(PARAMS) == Loss(loss, PARAMS, STATED).value(PARAMS)
    assert len(list(Batches(Dataset))) == 2  # a callable that returns one
    with pytest.raises(TypeError, match="one Tensor, not a sequence"):
        Batches(Tensor(X))


def plain(p, batch):
    return 0.5 * jnp.mean((jnp.tanh(batch["x"] @ p["a"]) @ p["b"] - batch["y"]) ** 2)


def marked(cut, **more):
    return {"x": X[cut], "y": Y[cut], **more}


@pytest.mark.parametrize(
    "more",
    [
        lambda cut: {"id": [f"image {i}" for i in range(10)[cut]]},
        lambda cut: {"id": np.array(["a"] * len(X[cut]))},
        lambda cut: {"id": np.array([None, "b"] * 5, object)[cut], "note": "text", "when": np.datetime64("2026-01-01")},
        lambda cut: {"z": Tensor(None), "nested": {"id": ("a", b"b"), "more": [object()]}},
    ],
)
@pytest.mark.parametrize(
    "method", ["fisher", "wanda", *(pytest.param(m, marks=pytest.mark.slow) for m in ("taylor", "kfac_obd", "synflow"))]
)
def test_what_fn_never_reads_is_no_matter(more, method):
    fn = plain if method not in ("wanda", "synflow") else lambda p, b: jnp.tanh(b["x"] @ p["a"]) @ p["b"]

    def support(of):
        data = [marked(cut, **of(cut)) for cut in CUTS]
        return po.prune(fn, PARAMS, data, Cardinality(sparsity=0.5), method=method, progress=False).support

    same(support(more), support(lambda cut: {}))


def test_tensors_of_other_libraries_are_arrays():
    data = [{"x": Tensor(X[i]), "y": Tensor(Y[i])} for i in CUTS]
    assert Loss(plain, PARAMS, data).value(PARAMS) == Loss(plain, PARAMS, [marked(i) for i in CUTS]).value(PARAMS)
    graph = po.structure.trace(plain, PARAMS, data[0])
    assert [op.name for op in graph.operators] == ["a", "b"]


@pytest.mark.parametrize(
    ("read", "kind"),
    [
        (lambda b: b["id"][0] == "a", "list"),
        (lambda b: b["on"] == "a", "str"),
        (lambda b: jnp.sum(b["z"]), "Tensor"),
        (lambda b: b["z"].shape, "Tensor"),
    ],
)
def test_text_that_fn_reads_is_refused_by_name(read, kind):
    def fn(p, batch):
        read(batch)
        return plain(p, batch)

    data = [marked(CUTS[0], id=["a", "b"], on="text", z=Tensor(None))]
    with pytest.raises(TypeError, match=f"fn reads leaf '(id|on|z)' of a batch, a {kind} that is no array"):
        Loss(fn, PARAMS, data)


# ------------------------------------------------------------------------------------- judged by what fn computes


HOLES = np.where(RNG.random(Y.shape) < 0.3, np.nan, Y)


@pytest.mark.parametrize("method", ["taylor", "fisher", "obd", "kfac_obd", "m_fac"])
def test_targets_that_the_loss_masks_may_be_nan(method):
    def found(y, seen):
        data = [{"x": X[i], "y": y[i], "bias": np.full(len(X[i]), -np.inf), "seen": seen[i]} for i in CUTS]
        return po.prune(by_mask, PARAMS, data, Cardinality(sparsity=0.5), method=method, progress=False).support

    def by_mask(p, batch):
        seen = batch["seen"]
        z = jnp.tanh(batch["x"] @ p["a"]) @ p["b"] + jnp.exp(batch["bias"])[:, None]
        return 0.5 * jnp.mean(jnp.where(seen, z - jnp.where(seen, batch["y"], 0.0), 0.0) ** 2)

    seen = np.isfinite(HOLES)
    same(found(HOLES, seen), found(np.where(seen, HOLES, 7.0), seen))


def test_a_layer_by_layer_method_does_not_read_the_targets():
    fn = lambda p, b: jnp.tanh(b["x"] @ p["a"]) @ p["b"]  # noqa: E731
    run = lambda y: po.prune(  # noqa: E731
        fn, PARAMS, [{"x": X, "y": y}], Cardinality(sparsity=0.5), method="wanda", progress=False
    )
    same(run(HOLES).params, run(Y).params)


BAD = {
    **{
        method: lambda data, method=method: po.prune(
            plain, PARAMS, data, Cardinality(sparsity=0.5), method=method, progress=False
        )
        for method in ("taylor", "fisher", "obd", "kfac_obd", "wanda", "grasp")
    },
    "retrain": lambda data: po.plans.retrain(plain, data, optax.sgd(0.01))(
        PARAMS, {n: w != 0 for n, w in PARAMS.items()}
    ),
    "capture": lambda data: po.structure.capture(plain, PARAMS, data),
    "means": lambda data: po.structure.capture(plain, PARAMS, data, gram=False, means=True),
}


@pytest.mark.parametrize("what", BAD)
def test_a_nan_that_fn_computes_names_batch_and_leaf(what):
    broken = np.where(np.arange(2)[:, None] == 1, np.nan, X[8:])
    data = [marked(CUTS[0]), {"x": broken, "y": Y[8:]}]
    with pytest.raises(ValueError, match=r"batches: batch 1: .*leaf 'x' holds a NaN or an infinity"):
        BAD[what](data)


@pytest.mark.default_flags
def test_a_float64_center_in_32_bit_mode_is_named():
    with pytest.raises(TypeError, match=r"^center is float64 but JAX is in 32-bit mode"):
        po.Problem(po.objectives.Reconstruction(np.ones((4, 3)), po.curvature.Gram(jnp.eye(4))))
