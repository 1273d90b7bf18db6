"""A curvature drawn towards its diagonal."""

import numpy as np
import pytest
from cases import CURVATURES, tree
from test_obs import parts

from pruneopt.curvature import Shrunk
from pruneopt.objectives import Quadratic


def test_off_diagonals_shrink_and_the_diagonal_stays():
    h, like = CURVATURES["empirical Fisher"]()
    for share in (0.0, 0.3, 1.0):
        full = parts(Quadratic(like, h))[1]
        got = parts(Quadratic(like, Shrunk.checked(h, h.diagonal(like), share)))[1]
        np.testing.assert_allclose(np.diag(got), np.diag(full), rtol=1e-12)
        off = ~np.eye(12, dtype=bool)
        np.testing.assert_allclose(got[off], (1 - share) * full[off], rtol=1e-10, atol=1e-14)


def test_bad_input_is_refused():
    h, like = CURVATURES["empirical Fisher"]()
    for curvature, values, share, error, message in (
        (h, h.diagonal(like), 1.5, ValueError, "share="),
        (h, tree(1), 0.5, ValueError, "negative"),
        (h, {"a": np.full((2, 4), np.nan), "b": like["b"]}, 0.5, ValueError, "values holds a NaN"),
        (None, like, 0.5, TypeError, "curvature is a NoneType"),
    ):
        with pytest.raises(error, match=message):
            Shrunk.checked(curvature, values, share)
