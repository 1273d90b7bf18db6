"""Test flags: strict float64 by default, JAX's own settings for tests marked `default_flags`."""

import os
from pathlib import Path

os.environ.setdefault("KERAS_BACKEND", "jax")
os.environ.setdefault("MPLBACKEND", "Agg")

import jax
import pytest


@pytest.fixture(autouse=True)
def flags(request):
    if request.node.get_closest_marker("default_flags"):
        yield
        return
    with jax.enable_x64(True), jax.numpy_dtype_promotion("strict"), jax.numpy_rank_promotion("raise"):
        yield


@pytest.fixture
def data() -> Path:
    """The folder of real data and checkpoints."""
    folder = os.environ.get("PRUNEOPT_DATA")
    if not folder:
        pytest.skip("set PRUNEOPT_DATA to the folder that holds checkpoints/ and mnist/ (see README, Data)")
    return Path(folder)
