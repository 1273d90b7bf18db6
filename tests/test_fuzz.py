"""2,000 seeded problems of one layer, over constraints, solvers, spectra, dtypes and scales: every promise of `solve`.

Each is judged by NumPy in float64 alone: values finite and of the weights' dtype, the constraint's NumPy twin met, the
objective equal to the formula, the bound below it, `certify` of one mind, `optimal` only where enumeration agrees, a
feasible init never beaten by what it led to where the solver says so, nothing that was given changed, the same answer
twice. Two shapes, so that compilation does not dominate; scales only where the objective fits the dtype.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import pruneopt as po
from pruneopt import constraints as c
from pruneopt import solvers as s

pytestmark = pytest.mark.slow
PROBLEMS, CHUNKS = 2000, 8
SHAPES = ((6, 2), (8, 3))


def _all(x):
    return bool(np.all(x))


def menu(n, m):
    """Constraints on (n, m), each with the same set in NumPy; few, since most solvers compile a program for each."""
    mask = np.random.default_rng(n).random((n, m)) < 0.7
    mask[0] = True
    found = []
    for count in (3, n - 1, n * m - 2):
        found += [
            (c.Cardinality(count=count, floor=0), lambda w, k=count: w.sum() <= k),
            (c.Cardinality(count=count, floor=2), lambda w, k=count: 2 <= w.sum() <= k),
            (
                c.Intersection((c.Support(mask), c.Cardinality(count=count, floor=0))),
                lambda w, k=count: not (w & ~mask).any() and w.sum() <= k,
            ),
        ]
    for sparsity in (0.0, 0.5):

        def kept(size, cut=sparsity):
            return int(np.floor((1 - cut) * size + 1e-9))

        found += [
            (c.Cardinality(sparsity=sparsity, per="leaf"), lambda w, k=kept: w.sum() <= k(n * m)),
            (c.Cardinality(sparsity=sparsity, per="out"), lambda w, k=kept: _all(w.sum(0) <= k(n))),
            (c.Cardinality(sparsity=sparsity, per="in", floor=0), lambda w, k=kept: _all(w.sum(1) <= k(m))),
        ]

    def pairs(w):
        return w.reshape(n // 2, 2, m)

    return [
        *found,
        (c.Cardinality(sparsity=0.5, per="in", span=2), lambda w: _all(pairs(w).sum((1, 2)) <= m)),
        (c.NM(1, 2), lambda w: _all(pairs(w).sum(1) <= 1)),
        (c.Slices(-2, c.Cardinality(count=n // 2)), lambda w: w.any(1).sum() <= n // 2),
        (c.Slices(-1, c.Cardinality(count=1)), lambda w: w.any(0).sum() <= 1),
        (c.Blocks((2, 1), c.Cardinality(count=n // 2)), lambda w: pairs(w).any(1).sum() <= n // 2),
        (c.Support(mask), lambda w: not (w & ~mask).any()),
        (
            c.Intersection((c.NM(1, 2), c.Cardinality(count=n // 2, floor=0))),
            lambda w: _all(pairs(w).sum(1) <= 1) and w.sum() <= n // 2,
        ),
    ]


MENUS = [menu(*SHAPES[0]), menu(*SHAPES[1])[::4]]

SOLVERS = (
    s.Score(),
    s.Score("absolute"),
    s.Score("random"),
    s.Score("relative"),
    s.Then(s.Score(), s.Polish()),
    s.FAST,
    s.BALANCED,
    s.BEST,
    s.BlockOBS(block=4),
    s.Thanos(block=4),
    s.ALPS(),
    s.HardThresholding(),
    s.FrankWolfe(10),
    s.SparseSwaps(),
    s.GreedyOBS(),
    s.Then(s.Score(), s.Swap()),
    s.Then(s.Score("absolute"), s.ConjugateGradients(6)),
)


def gram(rng, n):
    """A Gram of n inputs: well conditioned, decaying, of rank 2 or 5, with dead inputs, or nothing at all."""
    x = rng.standard_normal((4 * n, n))
    match rng.integers(6):
        case 1:
            x *= 10.0 ** -np.linspace(0, 4, n)
        case 2:
            x = x[:, :2] @ rng.standard_normal((2, n))
        case 3:
            x = x[:, :5] @ rng.standard_normal((5, n))
        case 4:
            x[:, rng.random(n) < 0.5] = 0
        case 5 if rng.random() < 0.2:
            x *= 0
    return x.T @ x / len(x)


def draw(seed):
    """(problem, solver, twin, whether an init is given) of a seed."""
    rng = np.random.default_rng([15, seed])
    which = int(rng.random() < 0.3)
    n, m = SHAPES[which]
    dtype = np.dtype(rng.choice(["float32", "float32", "float64", "bfloat16", "float16"]).item())
    wide = np.float64 if dtype == np.float64 else np.float32
    reach = {"float16": 2, "float32": 12, "bfloat16": 12, "float64": 30}[dtype.name]
    w = rng.standard_normal((n, m)) * 10.0 ** rng.uniform(-reach, reach)
    if rng.random() < 0.2:
        w[rng.random((n, m)) < 0.5] = 0
    h = gram(rng, n) * 10.0 ** rng.uniform(-reach / 3, reach / 3)
    objective = po.objectives.Reconstruction(
        jnp.asarray(w).astype(dtype), po.curvature.Gram(jnp.asarray(h, wide)), float(rng.choice([0.0, 0.01]))
    )
    allowed, twin = MENUS[which][rng.integers(len(MENUS[which]))]
    problem = po.Problem(objective, subject_to=allowed)
    order = [seed % len(SOLVERS), *rng.permutation(len(SOLVERS))]
    solver = next(SOLVERS[i] for i in order if SOLVERS[i].refuses(problem) is None)
    return problem, solver, twin, bool(rng.random() < 0.3)


def numbers(problem):
    """H + lambda I and W0 in float64."""
    f = problem.objective
    h = np.asarray(f.curvature.matrix, np.float64)
    return h + f.damping * np.mean(np.diagonal(h)) * np.eye(len(h)), np.asarray(f.center, np.float64)


def value(h, d):
    return 0.5 * float(np.sum(d * (h @ d)))


def least(problem, twin):
    """The optimum, by least squares on every support."""
    h, w0 = numbers(problem)
    n, m = w0.shape

    @functools.cache
    def column(j, support):
        d, s_ = -w0[:, j].copy(), list(support)
        if s_:
            d[s_] += np.linalg.lstsq(h[np.ix_(s_, s_)], (h @ w0[:, j])[s_], rcond=None)[0]
        return 0.5 * float(d @ h @ d)

    best = np.inf
    for bits in range(1 << (n * m)):
        mask = (bits >> np.arange(n * m) & 1).astype(bool).reshape(n, m)
        if twin(mask):
            best = min(best, sum(column(j, tuple(np.flatnonzero(mask[:, j]))) for j in range(m)))
    return best


def faults(seed):
    """What is wrong with the answer to one problem."""
    problem, solver, twin, with_init = draw(seed)
    (h, w0), given = numbers(problem), jax.tree.map(np.asarray, problem.objective)
    init = None
    if with_init and s.Score().refuses(problem) is None:
        init = po.solve(problem, s.Score("random"), key=seed, throw=False)
    try:
        solution = po.solve(problem, solver, init=init, key=seed)
    except ValueError as error:
        return [] if "layer would collapse" in str(error) else [f"refused late: {error}"]
    kept, w = np.asarray(solution.support), np.asarray(solution.value, np.float64)
    wide = np.finfo(np.float64 if solution.value.dtype == np.float64 else np.float32).eps
    scale = value(np.abs(h), np.abs(w0) + np.abs(w)) + 1e-300
    right, found = value(h, w - w0), []
    if not np.all(np.isfinite(w)):
        found.append("not finite")
    if solution.value.dtype != problem.objective.center.dtype:
        found.append(f"dtype {solution.value.dtype}")
    if not twin(kept) or np.any(w[~kept]):
        found.append("infeasible")
    if abs(solution.objective - right) > 1e-9 * scale:
        found.append(f"objective {solution.objective:.6g}, right: {right:.6g}")
    if not solution.bound <= solution.objective * (1 + 1e-9):
        found.append(f"bound {solution.bound:.6g} above the objective {solution.objective:.6g}")
    check = po.certify(problem, solution)
    if (check.violation, check.outside, check.objective, check.bound) != (0, 0, solution.objective, solution.bound):
        found.append(f"certify says {check}")
    if init is not None and init.status.is_usable and "init" in solver.never_worse_than:
        start = value(h, np.asarray(init.value, np.float64) - w0)
        rounding = float(jnp.finfo(problem.objective.center.dtype).eps) * scale
        if twin(np.asarray(init.support)) and right > start + max(4 * wide * scale, rounding):
            found.append(f"worse than its init: {right:.9g}, {start:.9g}")
    if solution.status is po.Status.OPTIMAL and w0.size <= 12 and right > least(problem, twin) + 1e-6 * scale:
        found.append(f"not optimal: {right:.6g}")
    if not all(map(np.array_equal, jax.tree.leaves(given), jax.tree.leaves(problem.objective))):
        found.append("what was given is changed")
    again = po.solve(problem, solver, init=init, key=seed)
    if not (np.array_equal(again.support, kept) and np.array_equal(np.asarray(again.value, np.float64), w)):
        found.append("another answer the second time")
    return [f"{seed}: {solver} under {problem.subject_to!r:.80}: {what}" for what in found]


@pytest.mark.parametrize("chunk", range(CHUNKS))
def test_every_promise_holds(chunk):
    found = []
    jax.clear_caches()  # a chunk compiles enough for a process of its own
    for seed in range(PROBLEMS):
        if seed % len(SOLVERS) % CHUNKS == chunk:  # problems of a solver in one process, which compiles them once
            found += faults(seed)
    assert not found, "\n".join(found)
