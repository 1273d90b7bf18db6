"""Deleting units against zeroing them: every free group of many networks, in float64, and what share can be cut."""

import jax
import numpy as np
import pytest

import pruneopt as po
from paper_reproductions.networks.small import deletion
from paper_reproductions.networks.small.catalogue import NETWORKS

CHEAP = {
    "linear recurrent unit",
    "convnext",
    "graph",
    "ensemble",
    "siamese",
    "custom derivatives",
    "equinox mlp",
}
pytestmark = pytest.mark.default_flags  # frameworks mix dtypes and ranks


@pytest.fixture(autouse=True)
def double():
    with jax.enable_x64(True):
        yield


@pytest.mark.parametrize("name", [n if n in CHEAP else pytest.param(n, marks=pytest.mark.slow) for n in NETWORKS])
@pytest.mark.cases(1)
def test_units_of_every_free_group_are_deleted_exactly(name):
    entry = NETWORKS[name]
    if entry.needs:
        pytest.importorskip(entry.needs)
    fn, params, batch = entry.make()
    found = po.structure.trace(fn, params, batch).units()
    assert deletion.share(found) >= entry.share
    dense = jax.jit(fn)(params, batch)
    for cut in deletion.rounds(found):
        small = po.shrink_units(fn, params, batch, cut.kept)
        zeroed = deletion.zeroed(params, cut.gone)
        masked = jax.jit(fn)(zeroed, batch)
        assert deletion.difference(masked, jax.jit(small.fn)(small.params, batch)) <= entry.within
        assert deletion.difference(dense, masked) > 1e-4
        for whole, left in zip(jax.tree.leaves(zeroed), jax.tree.leaves(small.expand()), strict=True):
            if hasattr(whole, "dtype") and not jax.dtypes.issubdtype(whole.dtype, jax.dtypes.extended):
                np.testing.assert_array_equal(whole, left)
