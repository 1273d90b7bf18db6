"""What fixed parameters do to an operator's output: found in any writing of a norm, moved and settled exactly."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import pruneopt as po
from pruneopt import _tree
from pruneopt.capture.affine import affine
from pruneopt.solvers import Polish

pytestmark = pytest.mark.default_flags
RNG = np.random.default_rng(0)
EPS = 1e-3


@pytest.fixture(autouse=True)
def double():
    with jax.enable_x64(True):
        yield


def normal(*shape):
    return jnp.asarray(RNG.normal(size=shape))


def norm_params(n):
    return {"m": normal(n), "v": jnp.exp(normal(n)), "s": normal(n), "b": normal(n)}


def plain(y, p):
    return (y - p["m"]) / jnp.sqrt(p["v"] + EPS) * p["s"] + p["b"]


def folded(y, p):
    scale = p["s"] * jax.lax.rsqrt(p["v"] + EPS)
    return y * scale + (p["b"] - p["m"] * scale)


def heads(y, p):
    return y.reshape(*y.shape[:-1], 2, -1) + p["b"].reshape(2, -1)


def turned(y, p):
    return jnp.transpose(y, (1, 0)) * 2.0 + p["b"][:, None]


EVERY = {"mean": "m", "variance": "v", "scale": "s", "bias": "b"}
WRITINGS = {"norm": (plain, EVERY), "folded": (folded, EVERY), "heads": (heads, {"bias": "b"})}
WRITINGS |= {"scaled after": (lambda y, p: (y + p["b"]) * 0.5, {"bias": "b"})}
WRITINGS |= {"scale inside": (lambda y, p: (y + p["b"]) * p["s"], {"bias": "b", "scale": "s"})}
WRITINGS |= {"turned": (turned, {"bias": "b"}), "without scale": (lambda y, p: y - p["m"], {"mean": "m"})}


def network(of):
    return lambda p, x: jnp.tanh(of(x @ p["w"], p))


def found_in(name, **changes):
    of, paths = WRITINGS[name]
    params = {"w": normal(5, 4), **norm_params(4)} | changes
    fn, x = network(of), normal(30, 5)
    graph = po.structure.trace(fn, params, x)
    return fn, params, x, affine(graph.program, graph.operators[0].uses[0], params), paths


@pytest.mark.parametrize("name", WRITINGS)
def test_leaves_are_found_and_move_the_output_by_what_is_asked(name):
    fn, params, x, found, paths = found_in(name)
    assert found is not None
    assert found.paths == paths
    by = np.asarray(normal(4))
    moved = params | found.moved(params, by)
    want = network(lambda y, p: WRITINGS[name][0](y + by, p))(params, x)
    np.testing.assert_allclose(fn(moved, x), want, rtol=1e-9)


@pytest.mark.parametrize("name", ["norm", "folded"])
@pytest.mark.parametrize("zero", [False, True])
def test_a_settled_norm_has_the_statistics_and_gives_what_it_gave(name, zero):
    changes = {"s": jnp.asarray([0.0, 1.0, -2.0, 0.5])} if zero else {}
    fn, params, x, _, _ = found_in(name, **changes)
    settled = po.plans.settle(fn, params, [x[:10], x[10:]])
    y = np.asarray(x @ params["w"])
    np.testing.assert_allclose(settled["m"], y.mean(0), rtol=1e-8)
    np.testing.assert_allclose(settled["v"], y.var(0), rtol=1e-6)
    np.testing.assert_allclose(fn(settled, x), fn(params, x), rtol=1e-9)
    assert settled["w"] is params["w"]


def test_a_network_without_such_norms_is_not_settled():
    fn, params, x, _, _ = found_in("scaled after")
    with pytest.raises(ValueError, match="fn has no norm by running statistics"):
        po.plans.settle(fn, params, [x])


@pytest.mark.parametrize(
    "of",
    [
        lambda y, p: y * p["s"],  # no leaf moves it
        lambda y, p: (y + p["b"]) * p["b"],  # the bias does something else as well
        lambda y, p: y + jnp.sum(p["b"]),  # one number moves all
        lambda y, p: y + y[:1] + p["b"],  # the sum with another part of the output comes first
    ],
)
def test_what_moves_no_output_alone_is_left(of):
    params = {"w": normal(5, 4), **norm_params(4)}
    graph = po.structure.trace(network(of), params, normal(30, 5))
    assert affine(graph.program, graph.operators[0].uses[0], params) is None


@pytest.mark.parametrize("outputs", [6, 600])
def test_half_precision_tells_few_outputs_apart_and_refuses_many(outputs):
    params = {"w": normal(5, outputs), **norm_params(outputs)}
    params, x = jax.tree.map(lambda a: a.astype(jnp.bfloat16), params), normal(30, 5).astype(jnp.bfloat16)
    graph = po.structure.trace(network(lambda y, p: y * 0.3 + p["b"]), params, x)
    found = affine(graph.program, graph.operators[0].uses[0], params)
    assert found is None if outputs > 256 else found.paths == {"bias": "b"}


def test_channels_of_a_convolution_and_of_its_groups():
    def fn(p, x):
        y = jax.lax.conv_general_dilated(
            x, p["k"], (1, 1), "SAME", dimension_numbers=("NCHW", "OIHW", "NCHW"), feature_group_count=2
        )
        return jax.nn.relu(y + p["b"][None, :, None, None])

    params, x = {"k": normal(6, 2, 3, 3), "b": normal(6)}, normal(2, 4, 5, 5)
    graph = po.structure.trace(fn, params, x)
    found = affine(graph.program, graph.operators[0].uses[0], params)
    assert found is not None
    by = np.asarray(normal(6))
    np.testing.assert_allclose(params["b"] + by, found.moved(params, by)["b"], rtol=1e-12)


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("name", ["norm", "heads"])
def test_a_centred_refit_is_least_squares_with_an_intercept(name, weighted):
    """Against numpy.linalg.lstsq on the kept inputs and a column of ones; no other leaf is touched."""
    of, paths = WRITINGS[name]
    params = {"w": normal(5, 4), **norm_params(4)}
    x = normal(60, 5) + 2.0
    weights = np.linspace(0.5, 2.0, 60) if weighted else np.ones(60)
    mask = np.ones((5, 4), bool)
    mask[[1, 3]] = False
    allowed = po.constraints.Support({"w": jnp.asarray(mask)})
    method = po.plans.LayerMethod(Polish(), damping=0.0, dampings=(), target="network", centred=True)
    words = {"weights": lambda batch: jnp.asarray(weights), "leaves": "w", "progress": False}
    pruned = po.plans.layerwise(network(of), params, [x], allowed, method, **words)
    columns = np.column_stack([np.asarray(x)[:, [0, 2, 4]], np.ones(60)])
    root = np.sqrt(weights)[:, None]
    best = np.linalg.lstsq(columns * root, np.asarray(x @ params["w"]) * root, rcond=None)[0]
    np.testing.assert_allclose(np.asarray(pruned.params["w"])[[0, 2, 4]], best[:3], rtol=1e-6)
    want = network(lambda y, p: of(jnp.asarray(columns @ best), params))(params, x)
    np.testing.assert_allclose(network(of)(pruned.params, x), want, rtol=1e-6, atol=1e-9)
    same = {k for k in params if k not in ("w", paths.get("mean", "b"))}
    assert all(pruned.params[k] is params[k] for k in same)


def test_a_centred_pass_goes_on_after_a_kill(tmp_path):
    params = {"w": normal(5, 4), **norm_params(4)}
    x, allowed = normal(60, 5), po.constraints.Cardinality(sparsity=0.5, per="leaf")
    method = po.plans.LayerMethod(po.solvers.ADMM(), centred=True)
    words = {"run_dir": tmp_path, "progress": False}
    first, again = (po.plans.layerwise(network(plain), params, [x], allowed, method, **words) for _ in range(2))
    assert again.solutions["w"].stats["resumed"]
    for (path, a), b in zip(_tree.named_leaves(first.params), jax.tree.leaves(again.params), strict=True):
        np.testing.assert_array_equal(a, b, err_msg=path)
