"""The registry: one row for each public object, over a few shared shapes. `laws.py` takes the cross product."""

import jax
import jax.numpy as jnp
import numpy as np
import optax

from pruneopt import constraints as c
from pruneopt import curvature as h
from pruneopt import objectives as o
from pruneopt import penalties as p
from pruneopt import solvers as s
from pruneopt.constraints.members import Members
from pruneopt.structure import layout

# Shapes small enough to enumerate every support of the whole tree: 12 weights.
SHAPES = {"a": (2, 4), "b": (4, 1)}


def tree(seed, shapes=SHAPES, dtype=None):
    """Seeded normal draws in `shapes`, in the dtype of JAX's mode."""
    rng = np.random.default_rng(seed)
    return {k: jnp.asarray(rng.standard_normal(shape), dtype or jnp.zeros(()).dtype) for k, shape in shapes.items()}


def flat(tree):
    """The leaves of a tree as one row."""
    return np.concatenate([np.asarray(x).reshape(-1) for x in jax.tree.leaves(tree)])


def unflat(row, like):
    """A row as a tree like another, in its dtypes."""
    leaves, structure = jax.tree.flatten(like)
    ends = np.cumsum([x.size for x in leaves])
    return jax.tree.unflatten(
        structure,
        [jnp.asarray(row[e - x.size : e].reshape(x.shape), x.dtype) for x, e in zip(leaves, ends, strict=True)],
    )


def masks(seed, shapes=SHAPES, density=0.6):
    rng = np.random.default_rng(seed)
    return {k: jnp.asarray(rng.random(shape) < density) for k, shape in shapes.items()}


def every_support(n=12):
    """All 2^n supports as rows of booleans."""
    return (np.arange(2**n)[:, None] >> np.arange(n)) % 2 == 1


def _leaves(rows):
    """The leaves a (N, 2, 4) and b (N, 4, 1) of supports given as rows of 12."""
    return rows[:, :8].reshape(-1, 2, 4), rows[:, 8:].reshape(-1, 4, 1)


def _all(x):
    return x.reshape(len(x), -1).all(1)


def _total(a, b):
    return a.sum((1, 2)) + b.sum((1, 2))


_TURNED = layout(
    lambda p, x: (x @ p["a"].T, x @ p["b"]),
    {k: np.zeros(shape, np.float32) for k, shape in SHAPES.items()},
    np.zeros((3, 4), np.float32),
)

# name: (constraint on SHAPES, the same set written again in NumPy on all supports at once: (a, b) -> feasible).
_HIDDEN = (Members("h", 4, {("a", 1): np.arange(4), ("b", 0): np.arange(4)}),)
CONSTRAINTS = {
    "cardinality over the tree": (c.Cardinality(sparsity=0.5, floor=0), lambda a, b: _total(a, b) <= 6),
    "cardinality with a floor": (
        c.Cardinality(count=5, floor=2),
        lambda a, b: (_total(a, b) <= 5) & (a.sum((1, 2)) >= 2) & (b.sum((1, 2)) >= 2),
    ),
    "cardinality in each leaf": (
        c.Cardinality(sparsity=0.5, per="leaf"),
        lambda a, b: (a.sum((1, 2)) <= 4) & (b.sum((1, 2)) <= 2),
    ),
    "cardinality in each output": (
        c.Cardinality(count=1, per="out"),
        lambda a, b: _all(a.sum(1) <= 1) & _all(b.sum(1) <= 1),
    ),
    "cardinality in each input": (
        c.Cardinality(sparsity=0.5, per="in", floor=0),
        lambda a, b: _all(a.sum(2) <= 2) & _all(b.sum(2) <= 0),
    ),
    "cardinality in runs of 3 inputs": (
        c.Cardinality(sparsity=0.5, per="in", span=3),
        lambda a, b: (a.sum((1, 2)) <= 4) & (b[:, :3].sum((1, 2)) <= 1) & (b[:, 3, 0] <= 0),
    ),
    "cardinality along axis 0": (c.Cardinality(count=1, per=0), lambda a, b: _all(a.sum(2) <= 1) & _all(b.sum(2) <= 1)),
    "cardinality along both axes": (c.Cardinality(count=1, per=(0, 1)), lambda a, b: _total(a, b) <= 12),
    "all kept": (c.Cardinality(sparsity=0.0), lambda a, b: _total(a, b) <= 12),
    "none kept": (c.Cardinality(count=0, floor=0), lambda a, b: _total(a, b) == 0),
    "2:4 along other axes": (
        c.ByPath({"a": c.NM(2, 4, axis="out"), "b": c.NM(2, 4)}),
        lambda a, b: _all(a.sum(2) <= 2) & _all(b.sum(1) <= 2),
    ),
    "1:2 both ways, and 2:4": (
        c.ByPath({"a": c.TransposableNM(1, 2), "b": c.NM(2, 4)}),
        lambda a, b: _all(a.sum(1) <= 1) & _all(a.reshape(len(a), 2, 2, 2).sum(3) <= 1) & _all(b.sum(1) <= 2),
    ),
    "1:2 along the inputs": (
        c.NM(1, 2),
        lambda a, b: _all(a.sum(1) <= 1) & _all(b.reshape(len(b), 2, 2).sum(2) <= 1),
    ),
    "blocks 2x1": (
        c.Blocks((2, 1), c.Cardinality(sparsity=0.5, floor=0)),
        lambda a, b: a.any(1).sum(1) + b.reshape(len(b), 2, 2).any(2).sum(1) <= 3,
    ),
    "blocks of whole inputs": (
        c.Blocks((1, -1), c.Cardinality(count=3, floor=0)),
        lambda a, b: a.any(2).sum(1) + b.any(2).sum(1) <= 3,
    ),
    "neurons": (c.Slices(-1, c.Cardinality(count=3, floor=0)), lambda a, b: a.any(1).sum(1) + b.any(1).sum(1) <= 3),
    "inputs of each leaf": (
        c.Slices(0, c.Cardinality(sparsity=0.5, per="leaf")),
        lambda a, b: (a.any(2).sum(1) <= 1) & (b.any(2).sum(1) <= 2),
    ),
    "coupled units": (
        c.Coupled(_HIDDEN, c.Cardinality(count=2, floor=0)),
        lambda a, b: (a.any(1) | b.any(2)).sum(1) <= 2,
    ),
    "a fixed support": (
        c.Support({"a": masks(7)["a"], "b": None}),
        lambda a, b: ~(a & ~np.asarray(masks(7)["a"])).any((1, 2)),
    ),
    "cardinality within a support": (
        c.Intersection((c.Support(masks(8)), c.Cardinality(count=4, floor=0))),
        lambda a, b: (
            (_total(a, b) <= 4)
            & ~(a & ~np.asarray(masks(8)["a"])).any((1, 2))
            & ~(b & ~np.asarray(masks(8)["b"])).any((1, 2))
        ),
    ),
    "cardinality within 1:2": (
        c.Intersection((c.NM(1, 2), c.Cardinality(count=4, floor=2))),
        lambda a, b: (
            _all(a.sum(1) <= 1)
            & _all(b.reshape(len(b), 2, 2).sum(2) <= 1)
            & (_total(a, b) <= 4)
            & (a.sum((1, 2)) >= 2)
            & (b.sum((1, 2)) >= 2)
        ),
    ),
    "cardinality in each output, a is (out, in)": (
        c.Laid(c.Cardinality(count=1, per="out"), _TURNED),
        lambda a, b: _all(a.sum(2) <= 1) & _all(b.sum(1) <= 1),
    ),
    "1:2 along the inputs, a is (out, in)": (
        c.Laid(c.NM(1, 2), _TURNED),
        lambda a, b: _all(a.reshape(len(a), 2, 2, 2).sum(3) <= 1) & _all(b.reshape(len(b), 2, 2).sum(2) <= 1),
    ),
    "an L1 ball, on values alone": (c.L1Ball(2.0), lambda a, b: _total(a, b) >= 0),
    "a group ball, on values alone": (c.GroupBall(2.0), lambda a, b: _total(a, b) >= 0),
    "a ball within a support": (
        c.Intersection((c.Support(masks(8)), c.L1Ball(2.0))),
        lambda a, b: ~(a & ~np.asarray(masks(8)["a"])).any((1, 2)) & ~(b & ~np.asarray(masks(8)["b"])).any((1, 2)),
    ),
    "balls by path": (c.ByPath({"a": c.L1Ball(2.0), "b": c.GroupBall(1.0)}), lambda a, b: _total(a, b) >= 0),
    "by path": (
        c.ByPath({"a": c.Cardinality(count=3), "*": c.Cardinality(sparsity=0.25)}),
        lambda a, b: (a.sum((1, 2)) <= 3) & (b.sum((1, 2)) <= 3),
    ),
}


def feasible_supports(name):
    """Every support of SHAPES that the NumPy twin of a constraint allows, as rows of 12."""
    rows = every_support()
    return rows[CONSTRAINTS[name][1](*_leaves(rows))]


# name: (penalty on SHAPES, its value written again in NumPy for rows of 12 weights).
_FACTORS = {"a": np.asarray([[0.5, 1.0, 2.0, 0.25], [1.5, 1.0, 1.0, 3.0]]), "b": np.asarray([[2.0]])}
_FACTORS_ROW = np.concatenate([_FACTORS["a"].reshape(-1), np.full(4, 2.0)])
_OWL = np.asarray([3.0, 2.5, 2.5, 2.0, 1.0, 1.0, 0.5, 0.5, 0.25, 0.25, 0.0, 0.0])
_FILTERS = p.Partition.slices(tree(0, dtype=np.float32), axis=-1)  # the columns of a, and b
_MIXED = np.asarray([0, 0, 1, 2, 2, 1, 0, 0, 3, 3, 1, 3])  # groups across both leaves
_COUPLED = p.Partition({"a": _MIXED[:8].reshape(2, 4), "b": _MIXED[8:].reshape(4, 1)}, 4)


def _norms(w, labels):
    groups = [labels == g for g in range(labels.max() + 1)]
    return sum(np.sqrt(g.sum()) * np.linalg.norm(w[:, g], axis=1) for g in groups)


def _scad(x, lam, a):
    middle = (2 * a * lam * x - x**2 - lam**2) / (2 * (a - 1))
    return np.where(x <= lam, lam * x, np.where(x <= a * lam, middle, lam**2 * (a + 1) / 2))


PENALTIES = {
    "l1": (p.L1(0.3), lambda w: 0.3 * np.abs(w).sum(1)),
    "weighted l1": (p.L1(0.3, _FACTORS), lambda w: 0.3 * (np.abs(w) @ _FACTORS_ROW)),
    "elastic net": (p.ElasticNet(0.4, 0.7), lambda w: 0.4 * (0.7 * np.abs(w) + 0.15 * w**2).sum(1)),
    "weighted elastic net": (
        p.ElasticNet(0.4, 0.5, _FACTORS),
        lambda w: 0.4 * ((0.5 * np.abs(w) + 0.25 * w**2) @ _FACTORS_ROW),
    ),
    "group lasso of filters": (
        p.GroupLasso(0.3, _FILTERS),
        lambda w: 0.3 * _norms(w, np.asarray([0, 1, 2, 3, 0, 1, 2, 3, 4, 4, 4, 4])),
    ),
    "group lasso of coupled units": (p.GroupLasso(0.3, _COUPLED), lambda w: 0.3 * _norms(w, _MIXED)),
    "sparse group lasso": (
        p.SparseGroupLasso(0.4, _COUPLED, 0.25),
        lambda w: 0.4 * (0.25 * np.abs(w).sum(1) + 0.75 * _norms(w, _MIXED)),
    ),
    "l0": (p.L0(0.3), lambda w: 0.3 * (w != 0).sum(1)),
    "l1/2": (p.LHalf(0.3), lambda w: 0.3 * np.sqrt(np.abs(w)).sum(1)),
    "mcp": (
        p.MCP(0.4, 1.7),
        lambda w: np.where(np.abs(w) <= 0.68, 0.4 * np.abs(w) - w**2 / 3.4, 0.5 * 1.7 * 0.16).sum(1),
    ),
    "scad": (p.SCAD(0.4, 2.4), lambda w: _scad(np.abs(w), 0.4, 2.4).sum(1)),
    "log-sum": (p.LogSum(0.3, 0.4), lambda w: 0.3 * np.log(1 + np.abs(w) / 0.4).sum(1)),
    "owl": (p.OWL(0.2, _OWL), lambda w: 0.2 * (-np.sort(-np.abs(w), axis=1)) @ _OWL),
}

# A smooth non-quadratic loss with interactions, for curvature: least squares through tanh.
_X = np.random.default_rng(3).standard_normal((10, 2))
_Y = np.random.default_rng(4).standard_normal((10, 1))


def tiny_outputs(params, batch):
    return jnp.tanh(batch[0] @ params["a"]) @ params["b"]


def tiny_squares(outputs, batch):
    return jnp.mean(jnp.sum((outputs - batch[1]) ** 2, axis=1))


def tiny_loss(params, batch):
    return tiny_squares(tiny_outputs(params, batch), batch)


def tiny_batches(sizes=(10,)):
    """The ten examples cut into batches of these sizes."""
    dtype = jnp.zeros(()).dtype
    ends = np.cumsum(sizes)
    return [
        (jnp.asarray(_X[e - n : e], dtype), jnp.asarray(_Y[e - n : e], dtype)) for e, n in zip(ends, sizes, strict=True)
    ]


def gram(n=6, rank=None, seed=5):
    x = np.random.default_rng(seed).standard_normal((4 * n, rank or n))
    if rank:
        x = x @ np.random.default_rng(seed + 1).standard_normal((rank, n))
    return jnp.asarray(x.T @ x / len(x), jnp.zeros(()).dtype)


def matrix(seed, n=6, m=2):
    return tree(seed, {"w": (n, m)})["w"]


# name: () -> (curvature, a tree it acts on). Built late: the dtype is that of JAX's mode in the test.
CURVATURES = {
    "identity": lambda: (h.Identity(), tree(1)),
    "diagonal": lambda: (h.Diagonal(jax.tree.map(jnp.square, tree(2))), tree(1)),
    "Gram": lambda: (h.Gram.checked(gram()), matrix(1)),
    "singular Gram": lambda: (h.Gram.checked(gram(rank=3)), matrix(1)),
    "empirical Fisher diagonal": lambda: (
        h.empirical_fisher_diagonal(tiny_loss, tree(1), tiny_batches(), ["a", "b"]),
        tree(1),
    ),
    "empirical Fisher": lambda: (
        h.empirical_fisher(tiny_loss, tree(1), tiny_batches(), ["a", "b"], ridge=0.01),
        tree(1),
    ),
    "low rank plus diagonal": lambda: (
        h.LowRankPlusDiagonal.checked(CURVATURES["empirical Fisher"]()[0], jax.tree.map(jnp.square, tree(2))),
        tree(1),
    ),
    "blocks of 5": lambda: (h.BlockDiagonal.of(CURVATURES["empirical Fisher"]()[0], by=5), tree(1)),
    "Kronecker": lambda: (
        h.Kronecker.of(tiny_loss, tree(1), tiny_batches((4, 6)), ["a", "b"], ridge=0.01),
        tree(1),
    ),
    "Hessian": lambda: (h.Hessian.of(tiny_loss, tree(1), tiny_batches((4, 6)), ["a", "b"]), tree(1)),
    "Gauss-Newton": lambda: (
        h.GaussNewton.of(tiny_outputs, tiny_squares, tree(1), tiny_batches((4, 6)), ["a", "b"]),
        tree(1),
    ),
}


def _shrunk():
    fisher, like = CURVATURES["empirical Fisher"]()
    return h.Shrunk.checked(fisher, fisher.diagonal(like), 0.2), like


CURVATURES["shrunk empirical Fisher"] = _shrunk

# name: () -> objective.
OBJECTIVES = {
    "identity": lambda: o.Quadratic(tree(1), h.Identity()),
    "diagonal, damped": lambda: o.Quadratic(tree(1), CURVATURES["diagonal"]()[0], constant=2.0, damping=0.1),
    "diagonal with a gradient": lambda: o.Quadratic(tree(1), CURVATURES["diagonal"]()[0], tree(9)),
    "linear": lambda: o.Quadratic(tree(1), None, tree(9)),
    "empirical Fisher, damped": lambda: o.Quadratic(tree(1), CURVATURES["empirical Fisher"]()[0], damping=0.1),
    "reconstruction": lambda: o.Reconstruction(matrix(1), h.Gram.checked(gram())),
    "singular reconstruction, damped": lambda: o.Reconstruction(matrix(1), h.Gram.checked(gram(rank=3)), damping=0.01),
    "scores": lambda: o.Scores(jax.tree.map(jnp.square, tree(6)), tree(1)),
    "loss": lambda: o.Loss(tiny_loss, tree(1), tiny_batches(), ["a", "b"]),
}

# As CONSTRAINTS, for a reconstruction's matrix w (6, 2).
_W_MASK = np.asarray(tree(11, {"w": (6, 2)})["w"] > -0.3)
MATRIX_CONSTRAINTS = {
    "cardinality": (c.Cardinality(sparsity=0.5), lambda w: w.sum((1, 2)) <= 6),
    "cardinality in each output": (c.Cardinality(count=2, per="out"), lambda w: _all(w.sum(1) <= 2)),
    "cardinality in runs of 4 inputs": (
        c.Cardinality(sparsity=0.5, per="in", span=4),
        lambda w: (w[:, :4].sum((1, 2)) <= 4) & (w[:, 4:].sum((1, 2)) <= 2),
    ),
    "1:2 both ways": (
        c.TransposableNM(1, 2),
        lambda w: _all(w.sum(2) <= 1) & _all(w.reshape(len(w), 3, 2, 2).sum(2) <= 1),
    ),
    "1:3 along the inputs": (c.NM(1, 3), lambda w: _all(w.reshape(len(w), 2, 3, 2).sum(2) <= 1)),
    "inputs": (c.Slices(-2, c.Cardinality(count=4)), lambda w: w.any(2).sum(1) <= 4),
    "a fixed support": (c.Support(_W_MASK), lambda w: ~(w & ~_W_MASK).any((1, 2))),
}

# Penalties for a reconstruction's matrix (6, 2).
_INPUTS = p.Partition.slices(np.zeros((6, 2), np.float32), axis=0)
MATRIX_PENALTIES = {
    "l1": p.L1(0.1),
    "weighted l1": p.L1(0.05, np.asarray([[0.5, 3.0]])),
    "elastic net": p.ElasticNet(0.1, 0.7),
    "group lasso": p.GroupLasso(0.05, _INPUTS),
    "owl": p.OWL(0.05, _OWL),
    "mcp": p.MCP(0.1, 2.0),
}

SOLVERS = {
    "saliency": s.Score(),
    "absolute": s.Score("absolute"),
    "random": s.Score("random"),
    "polish": s.Polish(),
    "saliency, then polish": s.Then(s.Score(), s.Polish()),
    "descent": s.Descent(optax.sgd(0.05), epochs=3),
    "relative": s.Score("relative"),
    "ADMM": s.ADMM(levels=2, iterations=3, refit=12),
    "auto": s.Auto(),
    "conjugate gradients": s.ConjugateGradients(8),
    "block OBS": s.BlockOBS(block=4),
    "Thanos": s.Thanos(block=4),
    "ALPS": s.ALPS(),
    "hard thresholding": s.HardThresholding(),
    "Frank-Wolfe": s.FrankWolfe(30),
    "sparse swaps": s.SparseSwaps(),
    "greedy OBS": s.GreedyOBS(),
    "greedy units": s.GreedyUnits(),
    "saliency, then swap": s.Then(s.Score(), s.Swap()),
    "OBS": s.OBS(),
    "CHITA": s.CHITA(1),
    "summed OBS": s.SummedOBS(),
    "pursuit": s.Pursuit(),
    "CBS": s.CBS(),
    "active set": s.ActiveSet(first=1),
    "proximal gradient": s.ProximalGradient(iterations=4000),
    "global ADMM": s.GlobalADMM(levels=2, iterations=3, inner=3, refit=12),
}

LAYER = {
    "relative",
    "ADMM",
    "ALPS",
    "auto",
    "block OBS",
    "Thanos",
    "hard thresholding",
    "Frank-Wolfe",
    "sparse swaps *",
    "greedy OBS *",
    "greedy units *",
    "saliency, then swap *",
    "conjugate gradients s",
}
# What OBS and CBS can count by.
_BUDGETS = {
    "cardinality over the tree",
    "cardinality with a floor",
    "cardinality in each leaf",
    "all kept",
    "none kept",
    "a fixed support",
    "cardinality within a support",
}
# "*" where a solver takes the pair but not every constraint.
REFUSED = {
    "sparse swaps": ("1:2 both ways", "inputs"),
    "saliency, then swap": ("1:2 both ways", "inputs"),
    "greedy OBS": ("cardinality in runs of 4 inputs", "1:2 both ways", "inputs"),
    "greedy units": set(MATRIX_CONSTRAINTS) - {"inputs"},
    "CBS": set(CONSTRAINTS) - _BUDGETS,
    "OBS": set(CONSTRAINTS) - _BUDGETS,
}


# (solver, objective): which pairs a solver takes under a cardinality; "s" only under a fixed support.
TAKES = {
    "identity": {"saliency", "absolute", "random", "saliency, then polish", "polish s", "global ADMM", "CHITA"},
    "diagonal, damped": {"saliency", "absolute", "random", "saliency, then polish", "polish s", "global ADMM", "CHITA"},
    "diagonal with a gradient": {
        "saliency",
        "absolute",
        "random",
        "saliency, then polish",
        "polish s",
        "global ADMM",
        "CHITA",
    },
    "linear": {"saliency", "absolute", "random"},
    "scores": {"saliency", "absolute", "random"},
    "empirical Fisher, damped": {
        "saliency",
        "absolute",
        "random",
        "saliency, then polish",
        "polish s",
        "OBS *",
        "global ADMM",
        "CHITA",
        "pursuit",
        "CBS *",
        "summed OBS",
    },
    "reconstruction": {"saliency", "absolute", "random", "saliency, then polish", "polish s"} | LAYER,
    "singular reconstruction, damped": {"saliency", "absolute", "random", "saliency, then polish", "polish s"} | LAYER,
    "loss": {"random", "descent s"},
}

# (solver, objective): the penalties that it takes, without a constraint.
_EVERY_MATRIX = set(MATRIX_PENALTIES)
PENALISED = {
    "active set": {
        "reconstruction": {"l1", "weighted l1", "elastic net"},
        "singular reconstruction, damped": {"l1", "weighted l1", "elastic net"},
    },
    "proximal gradient": {
        "reconstruction": _EVERY_MATRIX,
        "singular reconstruction, damped": _EVERY_MATRIX,
        "identity": {"elastic net", "group lasso of filters", "mcp", "l1/2"},
        "diagonal, damped": {"l1", "sparse group lasso", "owl", "scad"},
        "diagonal with a gradient": {"l1", "group lasso of coupled units", "l0"},
        "empirical Fisher, damped": {"weighted l1", "group lasso of filters", "log-sum"},
        "loss": {"l1", "group lasso of filters", "mcp"},
    },
}
