"""Optimal Brain Surgeon on MONK's problems and XOR: how few weights keep the accuracy of the trained network.

    python paper_reproductions/hassibi_1993/run.py [--seeds 5]

Networks as in the paper: 17 inputs, one for each value of each attribute (2 for XOR), sigmoid hidden units, one
sigmoid output, squared error; 3, 2 and 2 hidden units have 58, 39 and 39 weights with their biases, XOR's 2 have 9.
Each is trained in full batches with weight decay. Then, one weight at a time: H is the Gauss-Newton matrix of the
squared error (the paper's sum of outer products), OBS removes the cheapest weight and moves the others, and where
that costs accuracy the rest is trained on; three removals in a row that it does not recover from end a run. The
fewest weights that keep the dense network's accuracy on the training and the test set (on MONK's 3, whose labels are
noisy, on the test set) are reported for each seed. Test accuracy chooses the point on the path: this is what OBS can
reach, no rule for stopping.

Data: PRUNEOPT_DATA (`monks/`); XOR needs none.
"""

import argparse
import os
import sys
import time
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax

sys.path.insert(0, str(Path(__file__).parents[2]))
import pruneopt as po
from pruneopt.constraints import Cardinality, Intersection, Support
from pruneopt.curvature import GaussNewton
from pruneopt.objectives import Quadratic
from pruneopt.solvers import OBS

VALUES = (3, 3, 2, 3, 4, 2)  # of MONK's attributes
# (hidden units, its fewest weights, test accuracy to reach, weight decay at first and at last)
PROBLEMS = {
    "monks-1": (3, 14, 1.0, (1e-4, 1e-5)),
    "monks-2": (2, 15, 1.0, (1e-4, 1e-5)),
    "monks-3": (2, 4, 0.93, (1e-3, 1e-3)),
    "xor": (2, None, 1.0, (1e-4, 1e-5)),
}
STEPS, MORE = 6000, 1500
OPTIMIZER = optax.adam(0.02)


def data(name, part):
    """Inputs (n, 17) in {0, 1} and targets (n, 1)."""
    if name == "xor":
        return np.array([[0, 0], [0, 1], [1, 0], [1, 1]], np.float32), np.array([[0], [1], [1], [0]], np.float32)
    lines = (Path(os.environ["PRUNEOPT_DATA"]) / "monks" / f"{name}.{part}").read_text().split("\n")
    rows = np.array([[int(v) for v in line.split()[:7]] for line in lines if line.strip()])
    inputs = np.concatenate([np.eye(n)[rows[:, i + 1] - 1] for i, n in enumerate(VALUES)], axis=1)
    return inputs.astype(np.float32), rows[:, :1].astype(np.float32)


def outputs(params, batch):
    hidden = jax.nn.sigmoid(batch[0] @ params["w1"] + params["b1"][0])  # (n, hidden)
    return jax.nn.sigmoid(hidden @ params["w2"] + params["b2"][0])  # (n, 1)


def squared(found, batch):
    return 0.5 * jnp.mean((found - batch[1]) ** 2)


@partial(jax.jit, static_argnums=4)
def train(params, mask, batch, decay, steps):
    """`steps` of Adam on the squared error and `decay` / 2 times the squared weights, on the mask."""

    def objective(p):
        return squared(outputs(p, batch), batch) + 0.5 * decay * sum(jnp.sum(x * x) for x in jax.tree.leaves(p))

    def step(_, carry):
        p, state = carry
        gradient = jax.tree.map(jnp.multiply, jax.grad(objective)(p), mask)
        move, state = OPTIMIZER.update(gradient, state)
        return jax.tree.map(lambda x, u, m: (x + u) * m, p, move, mask), state

    return jax.lax.fori_loop(0, steps, step, (params, OPTIMIZER.init(params)))[0]


@jax.jit
def correct(params, batch):
    return jnp.mean((outputs(params, batch) > 0.5) == (batch[1] > 0.5))


def initial(seed, inputs, hidden):
    rng = np.random.default_rng(seed)
    shapes = {"w1": (inputs, hidden), "b1": (1, hidden), "w2": (hidden, 1), "b2": (1, 1)}
    return {k: jnp.asarray(rng.uniform(-1, 1, s), jnp.float32) for k, s in shapes.items()}


def pruned(name, seed):
    """(dense accuracy, weights, fewest weights, their accuracy), accuracies (train, test); None: training failed."""
    hidden, _, needed, (decay, last) = PROBLEMS[name]
    batch, test = data(name, "train"), data(name, "test")
    params = initial(seed, batch[0].shape[1], hidden)
    support = jax.tree.map(lambda x: jnp.ones(x.shape, bool), params)
    mask = jax.tree.map(jnp.ones_like, params)
    params = train(params, mask, batch, decay, STEPS)
    params = train(params, mask, batch, last, STEPS)
    dense = float(correct(params, batch)), float(correct(params, test))
    if dense[1] < needed:
        return None
    total = sum(x.size for x in jax.tree.leaves(params))
    best, count, failures = (total, dense), total, 0
    while count > 1 and failures < 3:
        count -= 1
        curvature = GaussNewton.of(outputs, squared, params, [batch], leaves="*")
        model = Quadratic(params, curvature, damping=1e-4)
        allowed = Intersection((Support(support), Cardinality(count=count, floor=0)))
        solution = po.solve(po.Problem(model, subject_to=allowed), OBS())
        support, mask = solution.support, jax.tree.map(lambda m: m.astype(jnp.float32), solution.support)
        params = solution.value
        now = float(correct(params, batch)), float(correct(params, test))
        if now[0] < dense[0] or now[1] < dense[1]:
            params = train(params, mask, batch, last, MORE)
            now = float(correct(params, batch)), float(correct(params, test))
        good = now[1] >= dense[1] if name == "monks-3" else now[0] >= dense[0] and now[1] >= dense[1]
        failures = 0 if good else failures + 1
        best = (count, now) if good else best
    return dense, total, *best


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--problems", nargs="*", default=list(PROBLEMS))
    given = parser.parse_args()
    for name in given.problems:
        clock, found = time.perf_counter(), []
        for seed in range(given.seeds):
            found.append(pruned(name, seed))
        trained = [f for f in found if f is not None]
        print(f"{name}: {len(trained)} of {given.seeds} trainings reach {PROBLEMS[name][2]:.0%}; the paper's fewest "
              f"weights: {PROBLEMS[name][1]}")  # fmt: skip
        for dense, total, count, accuracy in trained:
            print(f"    {total} -> {count:2d} weights; train, test accuracy {dense[0]:.3f}, {dense[1]:.3f} -> "
                  f"{accuracy[0]:.3f}, {accuracy[1]:.3f}")  # fmt: skip
        print(f"    {time.perf_counter() - clock:.0f} s", flush=True)


if __name__ == "__main__":
    main()
