"""On eight devices: the masks of one in float64, values to rounding, and each result where its leaf was."""

import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import pruneopt as po
from pruneopt import training
from pruneopt.constraints import Cardinality
from pruneopt.curvature import empirical_fisher
from pruneopt.objectives import Quadratic
from pruneopt.penalties import L1

SCRIPT = """
import json, sys
import jax, jax.numpy as jnp, numpy as np
import pruneopt as po
from jax.sharding import Mesh, NamedSharding, PartitionSpec as P

jax.config.update("jax_enable_x64", True)
jax.config.update("jax_disable_most_optimizations", True)
mesh = Mesh(np.array(jax.devices()), ("m",))
rng = np.random.default_rng(0)
weights = {"a": jnp.asarray(rng.standard_normal((16, 24))), "b": jnp.asarray(rng.standard_normal((24, 16)))}
places = {"a": NamedSharding(mesh, P(None, "m")), "b": NamedSharding(mesh, P("m"))}
sharded = {name: jax.device_put(leaf, places[name]) for name, leaf in weights.items()}
x = rng.standard_normal((8, 16))  # fewer positions than inputs: H is singular
masks = {name: rng.random(leaf.shape) < 0.5 for name, leaf in weights.items()}
fn = lambda p, x: jnp.tanh(jnp.asarray(x) @ p["a"]) @ p["b"]
loss = lambda p, x: jnp.mean(fn(p, x) ** 2)
half = po.constraints.Cardinality(sparsity=0.5)
by_method = lambda method: lambda p: po.prune(
    loss if method in ("taylor", "woodfisher") else fn, p, [x], half, method=method, progress=False
)
spread = jax.device_put(x, NamedSharding(mesh, P("m")))
network = po.plans.LayerMethod(po.solvers.BALANCED, target="network")
of = lambda p: spread if p is sharded else x
file = sys.argv[1]
po.save(po.from_masks(weights, masks), file)
calls = {method: by_method(method) for method in ("magnitude", "taylor", "wanda", "sparsegpt", "balanced")}
calls |= {"network": lambda p: po.plans.layerwise(fn, p, [of(p), 2 * of(p)], half, network, progress=False)}
calls |= {"from_masks": lambda p: po.from_masks(p, masks), "load": lambda p: po.load(file, p)}
shape = lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding if x.committed else None)
calls |= {"load of shapes": lambda p: po.load(file, jax.tree.map(shape, p))}
said = {}
for name, call in calls.items():
    one, many = call(weights), call(sharded)
    said[name] = {
        "masks": sum(int((np.asarray(one.support[n]) != np.asarray(many.support[n])).sum()) for n in weights),
        "values": max(float(np.abs(np.asarray(one.params[n]) - np.asarray(many.params[n])).max()) for n in weights),
        "placed": all(
            tree[n].sharding.is_equivalent_to(places[n], 2) for tree in (many.params, many.support) for n in weights
        ),
    }
print(json.dumps(said))
"""


@pytest.mark.slow
def test_results_lie_where_their_leaves_do_and_masks_are_those_of_one_device(tmp_path):
    flags = os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"
    environment = os.environ | {"XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"}
    environment["PYTHONPATH"] = str(Path(po.__file__).parents[1])
    command = [sys.executable, "-c", SCRIPT, str(tmp_path / "x")]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    for name, said in json.loads(done.stdout.splitlines()[-1]).items():
        assert said["masks"] == 0, name
        assert said["values"] < 1e-9, name
        assert said["placed"], name


# ------------------------------------------------------------------------------------------------------ short floats


@pytest.mark.parametrize("dtype", ["float8_e4m3fn", "float8_e5m2", "float4_e2m1fn"])
def test_weights_too_short_to_compute_in_are_refused_at_once(dtype):
    short = {"a": jnp.ones((4, 4)), "k": jnp.ones((4, 4)).astype(dtype)}
    half, x, fn = Cardinality(sparsity=0.5), np.ones((3, 4), np.float32), lambda p, x: x @ p["k"].astype(jnp.float32)
    calls = [
        lambda: po.prune(None, short, None, half, progress=False),
        lambda: po.plans.layerwise(fn, short, [x], half, "wanda", progress=False),
        lambda: po.structure.capture(fn, short, [x]),
        lambda: empirical_fisher(lambda p, x: jnp.mean(fn(p, x)), short, [x]),
        lambda: po.Problem(Quadratic(short), subject_to=half),
        lambda: training.gradual(optax.sgd(0.1), half, end=1).init(short),
        lambda: training.proximal(optax.sgd(0.1), L1(1.0), 0.1).init(short),
    ]
    for call in calls:
        with pytest.raises(TypeError, match=f"'k' is {dtype}, too short to compute in; prune it in bfloat16 or wider"):
            call()
    done = po.apply(short, {"k": np.eye(4) > 0})
    np.testing.assert_array_equal(np.asarray(done["k"].astype(jnp.float32)), np.eye(4))
    assert done["a"] is short["a"]
    assert po.prune(None, short, None, half, leaves="a", progress=False).params["k"] is short["k"]
    jax.block_until_ready(done)
