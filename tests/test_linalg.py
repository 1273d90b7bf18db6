"""Host factors run where they cannot crash: on one BLAS thread from 8,192 rows on, wherever they are called."""

import ast
from pathlib import Path

import numpy as np
import pytest
import scipy.linalg
from threadpoolctl import threadpool_info, threadpool_limits

import pruneopt as po
from pruneopt import _linalg

PACKAGE = Path(po.__file__).parent
FACTORS = {"cholesky", "cho_factor", "cho_solve", "solve", "solve_triangular", "eigh", "eigvalsh", "eig", "inv", "pinv",
           "svd", "qr", "lu_factor", "lstsq", "get_lapack_funcs"}  # fmt: skip


def threads(*_, **__):
    return max(pool["num_threads"] for pool in threadpool_info() if pool["user_api"] == "blas")


@pytest.fixture
def two_threads():
    with threadpool_limits(2, user_api="blas"):
        if threads() < 2:
            pytest.skip("this BLAS runs on one thread")
        yield


def test_large_factors_run_on_one_thread(two_threads, monkeypatch):
    monkeypatch.setattr(_linalg, "MANY_ROWS", 4)
    monkeypatch.setattr(scipy.linalg, "get_lapack_funcs", lambda *_: (threads,))
    for call in (_linalg._guarded(threads), _linalg.lapack(("potrf",), np.eye(2))[0]):
        assert call(np.eye(4)) == 2
        assert call(np.eye(5)) == 1
        assert call(np.zeros((7, 2, 2))) == 2
        assert call(np.zeros((2, 5))) == 1
        assert threads() == 2
    with pytest.raises(ZeroDivisionError):
        _linalg._guarded(lambda _: 1 / 0)(np.eye(5))
    assert threads() == 2


def test_every_routine_is_guarded():
    names = (
        "cholesky",
        "cholesky_solve",
        "triangular_solve",
        "inverse",
        "solve",
        "eigh",
        "eigvalsh",
        "singular_values",
    )
    for name in names:
        assert getattr(_linalg, name).__qualname__ == "_guarded.<locals>.guarded"
    a = np.array([[4.0, 1.0], [1.0, 3.0]])
    factor = _linalg.cholesky(a)
    np.testing.assert_allclose(factor @ factor.T, a)
    np.testing.assert_allclose(_linalg.cholesky_solve(factor, a), np.eye(2), atol=1e-15)
    np.testing.assert_allclose(_linalg.triangular_solve(factor, factor), np.eye(2), atol=1e-15)
    np.testing.assert_allclose(_linalg.inverse(a) @ a, np.eye(2), atol=1e-15)
    np.testing.assert_allclose(_linalg.solve(a, a), np.eye(2), atol=1e-15)
    np.testing.assert_allclose(_linalg.eigh(a)[0], _linalg.eigvalsh(a))
    np.testing.assert_allclose(_linalg.singular_values(a)[::-1], _linalg.eigvalsh(a))
    with pytest.raises(np.linalg.LinAlgError):
        _linalg.cholesky(-a)


def test_nobody_else_factors_on_the_host():
    for file in PACKAGE.rglob("*.py"):
        if file.name == "_linalg.py":
            continue
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.Attribute) and node.attr in FACTORS:
                where = ast.unparse(node.value)
                assert where not in ("np.linalg", "scipy.linalg"), f"{file}: {where}.{node.attr}; use _linalg's"
