"""Published numbers on real checkpoints and layers."""

import gzip

import jax.numpy as jnp
import numpy as np
import pytest

import pruneopt as po
from pruneopt.constraints import NM, Cardinality
from pruneopt.curvature import Gram, Identity
from pruneopt.objectives import Quadratic, Reconstruction
from pruneopt.solvers import Polish, Score, Then

pytestmark = pytest.mark.usefixtures("optimised")

# CHITA's table for magnitude pruning of MLPNet: (weights kept, MNIST test accuracy in %).
MAGNITUDE = [(16180, 93.93), (12944, 93.78), (9708, 93.62), (6471, 92.89), (3235, 90.30), (1618, 83.64), (647, 32.25)]


@pytest.fixture(scope="module")
def mlpnet(folder):
    """The checkpoint's three weight matrices, transposed to (n_in, n_out), float32."""
    with np.load(folder / "checkpoints" / "mlpnet_mnist.npz", allow_pickle=False) as archive:
        return {f"fc{i}": archive[f"module.fc{i}._layer.weight"].T for i in (1, 2, 3)}


@pytest.fixture(scope="module")
def mnist_images(folder):
    def idx(name, offset):
        return np.frombuffer(gzip.decompress((folder / "mnist" / name).read_bytes()), np.uint8, offset=offset)

    x = idx("t10k-images-idx3-ubyte.gz", 16).reshape(-1, 784) / np.float32(255)
    return (x - np.float32(0.1307)) / np.float32(0.3081), idx("t10k-labels-idx1-ubyte.gz", 8)


def accuracy(params, images):
    x, labels = images
    hidden = np.maximum(np.maximum(x @ np.asarray(params["fc1"]), 0) @ np.asarray(params["fc2"]), 0)
    return 100 * np.mean(np.argmax(hidden @ np.asarray(params["fc3"]), axis=1) == labels)


@pytest.mark.default_flags
@pytest.mark.parametrize(("count", "expected"), MAGNITUDE)
@pytest.mark.slow
def test_magnitude_pruning_of_mlpnet_is_the_published_row(mlpnet, mnist_images, count, expected):
    pruned = po.prune(None, mlpnet, None, Cardinality(count=count), progress=False)
    assert pruned.kept == sum(np.count_nonzero(leaf) for leaf in pruned.params.values()) == count
    assert pruned.solutions["*"].status is po.Status.OPTIMAL
    assert round(accuracy(pruned.params, mnist_images), 2) == expected


@pytest.mark.default_flags
def test_dense_mlpnet_has_its_published_accuracy(mlpnet, mnist_images):
    assert round(accuracy(mlpnet, mnist_images), 2) == 93.97


# Relative errors on the shared layers by the peers' own code (magnitude, Wanda with a layer budget) and by float64
# row-wise least squares on their masks: (layer, sparsity or "2:4", magnitude, + refit, Wanda, + refit), four digits.
LAYERS = [
    ("minilm_l2_attn_out", 0.9, 5.075e-01, 2.776e-01, 4.593e-01, 2.541e-01),
    ("minilm_l2_attn_out", "2:4", 1.486e-01, 4.234e-02, 1.263e-01, 4.425e-02),
    ("mlpnet_fc1", 0.9, 1.852e-01, 1.622e-02, 1.837e-01, 2.895e-02),
    ("resnet20_l3_conv", 0.7, 1.590e-01, 4.230e-02, 1.480e-01, 4.182e-02),
]


# Wanda with its own budget, the same fraction of every output (layer, sparsity, relative error).
@pytest.mark.default_flags
@pytest.mark.parametrize(
    ("layer", "sparsity", "expected"), [("minilm_l2_attn_out", 0.5, 6.184e-02), ("resnet20_l3_conv", 0.5, 3.424e-02)]
)
@pytest.mark.slow
def test_wanda_is_a_row(folder, layer, sparsity, expected):
    with np.load(folder / "layers" / f"{layer}.npz", allow_pickle=False) as archive:
        gram = jnp.asarray(archive["H"] / archive["n_samples"].astype(np.float32))
        objective = Reconstruction(jnp.asarray(archive["W0"].T), Gram.checked(gram))
    solution = po.solve(po.Problem(objective, subject_to=Cardinality(sparsity=sparsity, per="out")), Score())
    assert solution.stats["relative_error"] == pytest.approx(expected, rel=1e-3)


@pytest.mark.default_flags
@pytest.mark.parametrize(("layer", "spec", "magnitude", "magnitude_refit", "wanda", "wanda_refit"), LAYERS)
def test_layer_errors_are_the_peers(folder, layer, spec, magnitude, magnitude_refit, wanda, wanda_refit):
    with np.load(folder / "layers" / f"{layer}.npz", allow_pickle=False) as archive:
        gram = jnp.asarray(archive["H"] / archive["n_samples"].astype(np.float32))
        weights = jnp.asarray(archive["W0"].T)
    constraint = NM(2, 4) if spec == "2:4" else Cardinality(sparsity=spec)
    problem = po.Problem(Reconstruction(weights, Gram.checked(gram)), subject_to=constraint)
    by_size = po.solve(po.Problem(Quadratic(weights, Identity()), subject_to=constraint), Score())
    refit = po.solve(problem, Polish(), init=by_size)
    by_wanda = po.solve(problem, Score())
    wanda_then_refit = po.solve(problem, Then(Score(), Polish()))
    error = problem.objective.relative_error
    assert error(by_size.value) == pytest.approx(magnitude, rel=1e-3)
    assert error(refit.value) == pytest.approx(magnitude_refit, rel=1e-3)
    assert by_wanda.stats["relative_error"] == pytest.approx(wanda, rel=1e-3)
    assert wanda_then_refit.stats["relative_error"] == pytest.approx(wanda_refit, rel=1e-3)
