"""Test flags: strict float64 by default, JAX's own settings for tests marked `default_flags`."""

import os

os.environ.setdefault("KERAS_BACKEND", "jax")
os.environ.setdefault("MPLBACKEND", "Agg")

import jax
import pytest

# Tests compile hundreds of tiny programs, which takes most of their time; golden tests turn optimisation on again.
jax.config.update("jax_disable_most_optimizations", True)


@pytest.fixture(autouse=True)
def flags(request):
    if request.node.get_closest_marker("default_flags"):
        yield
        return
    with jax.enable_x64(True), jax.numpy_dtype_promotion("strict"), jax.numpy_rank_promotion("raise"):
        yield
