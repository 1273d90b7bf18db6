"""Train a small convolutional network with an L1 penalty in a plain optax loop, then cut to a count and retrain.

    python examples/train_with_l1.py                                     # scikit-learn's digits, under a minute
    python examples/train_with_l1.py --groups                            # a group lasso, which removes whole filters
    python examples/train_with_l1.py --data mnist --data-dir FOLDER      # or cifar10; datasets.py says which files

The picture shows sparsity and held-out accuracy over training; the test set is read once, at the end.
"""

import argparse
from pathlib import Path

import datasets
import jax
import jax.numpy as jnp
import numpy as np
import optax
from cnn import hits, init, statistics, train_loss
from matplotlib.figure import Figure
from tqdm import trange

import pruneopt as po
from pruneopt import plans, training
from pruneopt.network.leaves import partition
from pruneopt.penalties import L1, GroupLasso, Partition

parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
parser.add_argument("--data", choices=("digits", "mnist", "cifar10"), default="digits")
parser.add_argument("--data-dir", help="default: mnist or cifar10 in the folder $PRUNEOPT_DATA")
parser.add_argument("--steps", type=int, default=1500, help="with the penalty; half as many retrain after the cut")
parser.add_argument("--weight", type=float, help="of the penalty (default 0.02; 0.03 with --groups)")
parser.add_argument("--sparsity", type=float, default=0.9, help="to cut to at the end")
parser.add_argument("--groups", action="store_true", help="a group lasso over filters and neurons, by SGD")
parser.add_argument("--toy", action="store_true", help="few steps: to see that it runs")
parser.add_argument("--out", type=Path, help="of the picture")
args = parser.parse_args()
steps = 40 if args.toy else args.steps
x, y, x_test, y_test = datasets.load(args.data, args.data_dir)
n, rng = len(x) - max(1, len(x) // 600) * 100, np.random.default_rng(0)  # the rest is held out
calibration = [(jnp.asarray(x[i : i + 100]), jnp.asarray(y[i : i + 100])) for i in range(0, 400, 100)]
params = init(*x.shape[1:], 8)

if args.groups:  # a penalty that ties weights together wants an optimiser without a metric
    leaves = ["conv*/kernel", "linear1/kernel"]  # not the ten outputs
    penalty = GroupLasso(args.weight or 0.03, Partition.slices(partition(params, leaves)[0], axis=-1))
    rate = optax.cosine_decay_schedule(0.1, steps)
    optimizer = training.proximal(optax.sgd(rate), penalty, rate, leaves=leaves)
else:
    rate, penalty = optax.cosine_decay_schedule(0.003, steps), L1(args.weight or 0.02)
    optimizer = training.proximal(optax.adam(rate), penalty, rate, metric=training.adam_metric())


@jax.jit
def step(params, state, images, labels):
    (_, updates), gradient = jax.value_and_grad(train_loss, has_aux=True)(params, (images, labels))
    moves, state = optimizer.update(gradient, state, params)
    params = optax.apply_updates(params, moves)
    return jax.tree.map(lambda u, p: p if u is None else u, updates, params, is_leaf=lambda u: u is None), state


def accuracy(params, x, y):
    """Percent right, with batch-norm statistics estimated anew."""
    params = plans.recalibrate(statistics, params, calibration)
    return 100 * sum(int(hits(params, (x[i : i + 100], y[i : i + 100]))) for i in range(0, len(y), 100)) / len(y)


state, trace = optimizer.init(params), []
for i in (bar := trange(steps, desc="train")):
    pick = rng.integers(0, n, 50)
    params, state = step(params, state, x[pick], y[pick])
    if i % max(1, steps // 50) == 0 or i == steps - 1:
        shrunk = optimizer.finish(params, state)
        trace.append((i + 1, 100 * shrunk.sparsity, accuracy(params, x[n:], y[n:])))
        bar.set_postfix(sparsity=f"{trace[-1][1]:.1f}%", accuracy=f"{trace[-1][2]:.1f}%")

# Debias: without the penalty, on the support it found (groups), or on that cut to the count asked for (L1).
shuffled = lambda: ((x[p], y[p]) for p in (rng.integers(0, n, 50) for _ in range(steps // 2)))  # noqa: E731
tune = plans.retrain(train_loss, shuffled, optax.adam(1e-3), has_updates=True)
if args.groups:
    final = po.Pruned(tune(params, shrunk.support), shrunk.support)
else:
    goal = po.constraints.Cardinality(sparsity=args.sparsity, floor=5)
    final = po.prune(None, params, None, goal, fine_tune=tune, progress=False)
for title, done in (("with the penalty", shrunk), ("retrained without it", final)):
    print(f"{title:21} {100 * done.sparsity:5.1f} % zeros, test accuracy {accuracy(done.params, x_test, y_test):.1f} %")
for path, mask in jax.tree_util.tree_leaves_with_path(final.support):
    alive = np.asarray(mask).reshape(-1, mask.shape[-1]).any(0)
    print(f"  {jax.tree_util.keystr(path, simple=True, separator='/'):16} {alive.sum()} of {len(alive)} outputs live")
trace.append((steps + steps // 2, 100 * final.sparsity, accuracy(final.params, x[n:], y[n:])))
figure = Figure(figsize=(7, 4), layout="constrained")
axes = figure.subplots()
axes.plot([t[0] for t in trace], [t[1:] for t in trace], label=("zeros among the penalised", "held-out accuracy"))
axes.axvline(steps, color="0.8", zorder=0, label="retraining" if args.groups else "cut, then retraining")
axes.set(xlabel="step", ylabel="%", ylim=(0, 100), title=f"{type(penalty).__name__} by proximal steps, {args.data}")
axes.legend()
out = args.out or Path(__file__).parent / f"pictures/train_with_{'group_lasso' if args.groups else 'l1'}.png"
out.parent.mkdir(parents=True, exist_ok=True)
figure.savefig(out, dpi=120)
print(f"picture: {out}")
