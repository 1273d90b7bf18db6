"""Prune a small convolutional network in several ways, retrain each equally long, and compare.

    python examples/prune_cnn.py                                 # scikit-learn's digits, about a minute
    python examples/prune_cnn.py --data mnist --data-dir FOLDER  # or cifar10; longer; datasets.py says which files

Part of the training set is held out and draws the picture; the test set is read for the table alone.
"""

import argparse
from functools import cache, partial
from pathlib import Path

import datasets
import jax
import jax.numpy as jnp
import numpy as np
import optax
from cnn import hits, init, loss, net, statistics, train_loss
from matplotlib.figure import Figure

import pruneopt as po
from pruneopt import plans

parser = argparse.ArgumentParser(description="Prune a small convolutional network in several ways and compare.")
parser.add_argument("--data", choices=("digits", "mnist", "cifar10"), default="digits")
parser.add_argument("--data-dir", help="default: mnist or cifar10 in the folder $PRUNEOPT_DATA")
parser.add_argument("--images", type=int, help="use only so many training images (200 or more)")
parser.add_argument("--epochs", type=int, default=15, help="of training, and again of retraining: 5, 10, 15, ...")
parser.add_argument("--runs", type=int, default=3, help="repetitions from another start, 2 or more")
parser.add_argument("--rate", type=float, default=0.01, help="Adam's first learning rate; 0.003 for cifar10")
parser.add_argument("--sparsity", type=float, default=0.9)
parser.add_argument("--width", type=int, default=8, help="channels of the first convolution")
parser.add_argument("--toy", action="store_true", help="few images, a tiny network: to see that it runs")
parser.add_argument("--out", type=Path, default=Path(__file__).parent / "pictures" / "prune_cnn.png")
args = parser.parse_args()
if args.toy:
    args.images, args.epochs, args.runs, args.width = 300, 5, 2, 4
if args.epochs < 5 or args.epochs % 5 or args.runs < 2:
    parser.error("--epochs must be a multiple of 5, to be shared among 5 stages, and --runs 2 or more")

ONE_SHOT = ("random", "magnitude", "taylor", "obd")
STAGED = {"gradual magnitude": ("magnitude", plans.Cubic(5)), "coarse, then fine": ("fisher", plans.CoarseThenFine())}
LEVELS = (0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 0.98)

# Data, as lists of batches (images, labels). Each pass of training makes new batches of 50.
x, y, x_test, y_test = datasets.load(args.data, args.data_dir)
x, y, rng = x[: args.images], y[: args.images], np.random.default_rng(0)
n = len(x) - max(1, len(x) // 600) * 100  # the rest is held out


def batches(x, y):
    return [(jnp.asarray(x[i : i + 100]), jnp.asarray(y[i : i + 100])) for i in range(0, len(x), 100)]


def shuffled():
    order = rng.permutation(n)
    return ((x[order[i : i + 50]], y[order[i : i + 50]]) for i in range(0, n - 49, 50))


held_out, test, calibration = batches(x[n:], y[n:]), batches(x_test, y_test), batches(x[:n][:400], y[:n][:400])


def accuracy(params, data):
    """Percent right, with batch-norm statistics estimated anew: those of the dense network do not fit a pruned one."""
    params = plans.recalibrate(statistics, params, calibration)
    return 100 * sum(int(hits(params, batch)) for batch in data) / sum(len(batch[1]) for batch in data)


@cache  # one optimiser for each number of epochs: another one would be compiled anew
def trained(epochs):
    """(params, support) -> params, pruned weights held at zero."""
    adam = optax.adam(optax.cosine_decay_schedule(args.rate, epochs * (n // 50)))
    return plans.retrain(train_loss, shuffled, adam, epochs=epochs, has_updates=True)


def to(sparsity):
    """One budget for all layers, 5 weights to each at least."""
    return po.constraints.Cardinality(sparsity=sparsity, floor=5)


def above(threshold, params):
    """The beginner's way: drop what is below a fixed threshold, whatever sparsity that gives."""
    return po.from_masks(params, jax.tree.map(lambda w: np.abs(w) >= threshold if w.ndim > 1 else None, params))


def run(seed):
    """Train, prune, retrain. Each row is retrained args.epochs in all: at the end, or a fifth after each of 5 cuts."""
    dense = trained(args.epochs)(init(*x.shape[1:], args.width, seed), None)
    prune = partial(po.prune, loss, dense, calibration, to(args.sparsity), key=jax.random.key(seed), progress=False)
    before = {"dense": above(0, dense), "threshold 0.01": above(0.01, dense)} | {m: prune(method=m) for m in ONE_SHOT}
    after = {k: po.Pruned(trained(args.epochs)(cut.params, cut.support), cut.support) for k, cut in before.items()}
    for name, (method, schedule) in STAGED.items():
        before[name] = prune(method=method, schedule=schedule)  # all 5 cuts, no retraining between them
        after[name] = prune(method=method, schedule=schedule, fine_tune=trained(args.epochs // 5))
    return before, after


runs = [run(seed) for seed in range(args.runs)]
before, after = runs[0]
dense = before["dense"].params
print(f"{args.data}: {n} images train, {len(x) - n} are held out, {len(x_test)} test; {args.epochs} epochs of training")
print("                       accuracy %      sparsity parameters  MFLOPs     KiB    latency ms")
print("method             before      after          %       kept    kept  stored   dense  pruned")
for name in before:
    r = po.report(net, dense, after[name], test[0][0], sizes=())
    scores = np.array([[accuracy(kind[name].params, test) for kind in pair] for pair in runs])  # (runs, 2)
    error = scores[:, 1].std(ddof=1) / len(runs) ** 0.5
    print(
        f"{name:17} {scores[:, 0].mean():7.1f} {scores[:, 1].mean():7.1f} ± {error:3.1f} {100 * r.sparsity:8.1f} "
        f"{r.kept:10,} {r.flops_kept / 1e6:7.2f} {r.bytes_stored / 1024:7.1f} "
        f"{1e3 * r.timing('dense').seconds.median:7.2f} {1e3 * r.timing('masked').seconds.median:7.2f}"
    )
print(f"""after: {args.epochs} epochs of retraining in every row. 'gradual' and 'coarse, then fine' (by magnitude, then
by diagonal Fisher) spend a fifth of them after each of 5 cuts; their 'before' has the cuts alone. Means of {len(runs)}
runs with their standard error; the other columns are of the first run. MFLOPs: for {len(test[0][0])} images, were every
zero skipped. Nothing skips them: the latencies, medians of 30 calls in turn, are of dense kernels on this
{jax.default_backend()}, and scattered zeros make them no faster.""")

# The picture: accuracy against sparsity, then how much each layer alone can lose.
figure = Figure(figsize=(12, 5.2), layout="constrained")
left, right = figure.subplots(1, 2)
for i, name in enumerate([*ONE_SHOT, *STAGED]):
    levels, cuts = [args.sparsity], [before[name]]
    if name in ONE_SHOT:
        prune = partial(po.prune, loss, dense, calibration, method=name, key=jax.random.key(0), progress=False)
        levels, cuts = LEVELS, [prune(to(level)) for level in LEVELS]
    scores = [accuracy(po.apply(dense, cut), held_out) for cut in cuts]
    left.plot([100 * level for level in levels], scores, ".-", color=f"C{i}", label=name)
    side = 100 * args.sparsity + 0.7 * (i - 2.5)
    retrained = np.mean([accuracy(tuned[name].params, held_out) for _, tuned in runs])
    left.plot(side, retrained, "*", color=f"C{i}", markersize=11)
left.plot([], [], "*", color="grey", markersize=11, label="after retraining (mean)")
left.axhline(accuracy(dense, held_out), color="grey", linestyle=":", label="dense")
left.set(xlabel="sparsity of the network (%)", ylabel="held-out accuracy (%)", title="Accuracy before retraining")
left.legend(fontsize="small", loc="upper center", bbox_to_anchor=(0.5, -0.12), ncols=4)
plans.sensitivity(loss, dense, calibration, LEVELS, progress=False).plot(right).set_yscale("log")
args.out.parent.mkdir(parents=True, exist_ok=True)
figure.savefig(args.out, dpi=120)
print(f"picture: {args.out}")
