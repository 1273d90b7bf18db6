"""Prune a small convolutional network in several ways, retrain each equally long, and compare.

    python examples/prune_cnn.py                                 # scikit-learn's digits, about a minute
    python examples/prune_cnn.py --data mnist --data-dir FOLDER  # or cifar10; longer; datasets.py says which files

Most rows leave scattered zeros; "filters, shrunk" cuts whole filters and neurons out of arrays and program.
Part of the training set is held out and draws the picture; the test set is read for the table alone.
"""

import argparse
from dataclasses import replace
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
parser.add_argument("--epochs", type=int, default=5, help="of training, and again of retraining: 5, 10, 15, ...")
parser.add_argument("--runs", type=int, default=3, help="repetitions from another start, 2 or more")
parser.add_argument("--rate", type=float, default=0.01, help="Adam's first learning rate; 0.003 for cifar10")
parser.add_argument("--sparsity", type=float, default=0.9)
parser.add_argument("--filters", type=float, default=0.5, help="share of filters and neurons that are kept in that row")
parser.add_argument("--width", type=int, default=16, help="channels of the first convolution")
parser.add_argument("--toy", action="store_true", help="few images, a tiny network: to see that it runs")
parser.add_argument("--out", type=Path, default=Path("prune_cnn.png"), help="of the picture")
args = parser.parse_args()
if args.toy:
    args.images, args.epochs, args.runs, args.width = 300, 5, 2, 4
if args.epochs < 5 or args.epochs % 5 or args.runs < 2:
    parser.error("--epochs must be a multiple of 5, to be shared among 5 stages, and --runs 2 or more")

ONE_SHOT = ("random", "magnitude", "taylor", "obd")
CUT = "filters, shrunk"
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


def without_filters(params):
    """The smaller network without the filters and neurons of least norm; their scales, biases, readers go along."""
    kept = {}
    for name in ("conv1", "conv2", "conv3", "conv4", "linear1"):
        kernel = np.asarray(params[name]["kernel"])
        norms = np.linalg.norm(kernel.reshape(-1, kernel.shape[-1]), axis=0)
        kept[f"{name}/kernel", kernel.ndim - 1] = np.sort(np.argsort(-norms)[: round(args.filters * len(norms))])
    return po.shrink_units(net, params, x[:100], kept)


def run(seed):
    """Train, prune, retrain. Each row is retrained args.epochs in all: at the end, or a fifth after each of 5 cuts."""
    dense = trained(args.epochs)(init(*x.shape[1:], args.width, seed), None)
    prune = partial(po.prune, loss, dense, calibration, to(args.sparsity), key=jax.random.key(seed), progress=False)
    before = {"dense": above(0, dense), "threshold 0.01": above(0.01, dense)} | {m: prune(method=m) for m in ONE_SHOT}
    after = {k: po.Pruned(trained(args.epochs)(cut.params, cut.support), cut.support) for k, cut in before.items()}
    before[CUT] = small = without_filters(dense)  # net takes its widths from its arrays, so that train_loss does too
    after[CUT] = replace(small, params=trained(args.epochs)(small.params, None))
    for name, (method, schedule) in STAGED.items():
        before[name] = prune(method=method, schedule=schedule)  # all 5 cuts, no retraining between them
        after[name] = prune(method=method, schedule=schedule, fine_tune=trained(args.epochs // 5))
    return before, after


runs = [run(seed) for seed in range(args.runs)]
before, after = runs[0]
dense = before["dense"].params


def scores(name, data):
    """Means and standard errors over runs of the accuracy before and after retraining, (2,) each."""
    found = np.array([[accuracy(kind[name].params, data) for kind in pair] for pair in runs])  # (runs, 2)
    return found.mean(axis=0), found.std(axis=0, ddof=1) / len(runs) ** 0.5


print(f"{args.data}: {n} images train, {len(x) - n} are held out, {len(x_test)} test; {args.epochs} epochs of training")
print("                       accuracy %      sparsity parameters  MFLOPs     KiB    latency ms")
print("method             before      after          %       kept    kept  stored   dense  pruned")
latency = {}  # {name: what its program takes of the dense one's time, quartiles over turns, (3,)}
for name in before:
    r = po.report(net, dense, after[name], test[0][0], sizes=())
    (was, now), (_, error) = scores(name, test)
    whole, cut = (r.timing(kind).seconds for kind in ("dense", "shrunk" if name == CUT else "masked"))
    latency[name] = np.quantile(np.divide(cut.rounds, whole.rounds), (0.25, 0.5, 0.75))
    stored = r.bytes_shrunk or r.bytes_stored
    print(
        f"{name:17} {was:7.1f} {now:7.1f} ± {error:3.1f} {100 * r.sparsity:8.1f} "
        f"{r.kept:10,} {r.flops_kept / 1e6:7.2f} {stored / 1024:7.1f} "
        f"{1e3 * whole.median:7.2f} {1e3 * cut.median:7.2f}"
    )
print(f"""after: {args.epochs} epochs of retraining in every row. 'gradual' and 'coarse, then fine' (by magnitude, then
by diagonal Fisher) spend a fifth of them after each of 5 cuts; their 'before' has the cuts alone. '{CUT}' keeps
{args.filters:.0%} of the filters and neurons, those of largest norm, in a smaller program. Means of {len(runs)} runs
with their standard error; the other columns are of the first run. MFLOPs: for {len(test[0][0])} images, were every
zero skipped. Nothing skips them: scattered zeros make nothing faster. The smaller program takes
{latency[CUT][1]:.2f} of the dense one's time. Latencies are medians of 30 turns on this {jax.default_backend()}.""")

# The picture, on held-out images. A colour is a meaning: what was cut, retrained or not, and the smaller program.
BEFORE, AFTER, SMALLER, DENSE = "tab:blue", "tab:orange", "tab:green", "0.5"
figure = Figure(figsize=(13, 9), layout="constrained")
(bars, speed), (curves, layers) = figure.subplots(2, 2)
names = [*ONE_SHOT, *STAGED, CUT]
means, errors = (np.array(part) for part in zip(*(scores(name, held_out) for name in names), strict=True))  # (names, 2)
for k, (color, label) in enumerate(((BEFORE, "before retraining"), (AFTER, "after retraining"))):
    at = np.arange(len(names)) + 0.4 * (k - 0.5)
    bars.barh(at, means[:, k], 0.38, xerr=errors[:, k], color=color, label=label, capsize=3)
bars.axvline(scores("dense", held_out)[0][0], color=DENSE, linestyle=":", label="dense")
titles = [f"{name}, {args.filters:.0%}" if name == CUT else f"{name}, {args.sparsity:.0%} zeros" for name in names]
bars.set_yticks(range(len(names)), titles)
bars.invert_yaxis()
bars.set(xlabel="held-out accuracy (%)", title=f"Mean of {len(runs)} runs, standard errors")
for name, mean, error in zip(names, means[:, 1], errors[:, 1], strict=True):
    low, middle, high = latency[name]
    color = SMALLER if name == CUT else AFTER
    speed.errorbar(middle, mean, error, [[middle - low], [high - middle]], "o", color=color, capsize=3)
(_, mean), (_, error) = scores("dense", held_out)
speed.errorbar(1, mean, error, fmt="s", color=DENSE, capsize=3)
title = "Accuracy after retraining against measured time"
speed.set(xlabel="time over the dense network's (median, quartiles)", ylabel="held-out accuracy (%)", title=title)
speed.set_xlim(0)
handles = [("dense", DENSE), ("scattered zeros, six ways", AFTER), ("smaller program", SMALLER)]
speed.legend(*zip(*((speed.scatter([], [], color=c), name) for name, c in handles), strict=True), loc="lower left")
for name, style in zip(ONE_SHOT, ("-", "--", ":", "-."), strict=True):
    prune = partial(po.prune, loss, dense, calibration, method=name, key=jax.random.key(0), progress=False)
    found = [accuracy(po.apply(dense, prune(to(level))), held_out) for level in LEVELS]
    curves.plot([100 * level for level in LEVELS], found, style, marker=".", color=BEFORE, label=name)
curves.axhline(accuracy(dense, held_out), color=DENSE, linestyle=":", label="dense")
curves.set(xlabel="sparsity of the network (%)", ylabel="held-out accuracy (%)", title="One shot, before retraining")
curves.legend(fontsize="small")
plans.sensitivity(loss, dense, calibration, LEVELS, progress=False).plot(layers).set_yscale("log")
for i, line in enumerate(layers.lines[:-1]):  # layers are told by shade and marker
    line.set(color=str(0.12 * i), marker="osv^Dx"[i % 6])
layers.legend(fontsize="small")
bars.legend(fontsize="small", loc="upper center", bbox_to_anchor=(0.4, -0.12), ncols=3)
args.out.parent.mkdir(parents=True, exist_ok=True)
figure.savefig(args.out, dpi=100)
print(f"picture: {args.out}")
