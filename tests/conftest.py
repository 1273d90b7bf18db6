"""Test flags: strict float64 by default, JAX's own settings for tests marked `default_flags`."""

import itertools
import os
import zlib
from importlib.metadata import version
from pathlib import Path

os.environ.setdefault("KERAS_BACKEND", "jax")
os.environ.setdefault("MPLBACKEND", "Agg")
if version("jax").startswith("0.10."):  # XLA's older emitters compile in half the time; newer versions have no others
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --xla_cpu_use_fusion_emitters=false".strip()

import jax
import numpy as np
import pytest

# Tests compile hundreds of tiny programs, which takes most of their time; golden tests turn optimisation on again.
jax.config.update("jax_disable_most_optimizations", True)
# What one process or an earlier run compiled is read from disk: another run takes less than half the time.
jax.config.update("jax_compilation_cache_dir", str(Path(__file__).parents[1] / ".pytest_cache" / "jax"))
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)


CASES = 2
MAPS, RUN = Path("/proc/self/maps"), itertools.count(1)


def pytest_runtest_teardown():
    """Let compiled programs go: each takes several of the 65,530 maps that Linux allows a process."""
    if next(RUN) % 20 == 0 and MAPS.exists() and MAPS.read_bytes().count(b"\n") > 30_000:
        jax.clear_caches()


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items):
    """Of a test with many cases the default selection runs a few, evenly spaced; the others are slow."""
    tests = {}
    for item in items:
        if item.get_closest_marker("slow") is None:
            tests.setdefault((item.parent.nodeid, getattr(item, "originalname", item.name)), []).append(item)
    for cases in tests.values():
        few = next((mark.args[0] for mark in cases[0].iter_markers("cases")), CASES)
        kept = {round(k * (len(cases) - 1) / max(few - 1, 1)) for k in range(few)}
        for i, item in enumerate(cases):
            if len(cases) > few and i not in kept:
                item.add_marker(pytest.mark.slow)


@pytest.fixture(autouse=True)
def flags(request):
    if request.node.get_closest_marker("default_flags"):
        yield
        return
    with jax.enable_x64(True), jax.numpy_dtype_promotion("strict"), jax.numpy_rank_promotion("raise"):
        yield


@pytest.fixture(autouse=True)
def drawn(request):
    """What a test draws from its module's RNG is its own, whichever tests ran before it in the same process."""
    if isinstance(rng := getattr(request.module, "RNG", None), np.random.Generator):
        rng.bit_generator.state = np.random.default_rng(zlib.crc32(request.node.nodeid.encode())).bit_generator.state


@pytest.fixture(scope="module")
def optimised():
    """XLA's optimisations, for tests that run real networks."""
    jax.config.update("jax_disable_most_optimizations", False)
    yield
    jax.config.update("jax_disable_most_optimizations", True)


@pytest.fixture(scope="session")
def folder():
    """The folder of real data and checkpoints."""
    if not os.environ.get("PRUNEOPT_DATA"):
        pytest.skip("set PRUNEOPT_DATA to the folder of data and checkpoints (README, Data)")
    return Path(os.environ["PRUNEOPT_DATA"])
