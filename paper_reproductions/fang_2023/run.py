"""DepGraph's channels of ResNet-20, by Torch-Pruning's own code, beside reconstruction; fine-tuned by the same steps.

    python paper_reproductions/fang_2023/run.py [--seeds 1] [--shares 0.7 0.51 0.33] [--rows ...] [--steps 60 150]
    python paper_reproductions/fang_2023/run.py --epochs 2 [--seeds 3] [--shares 0.51]

Every row starts from the checkpoint of CHITA, cuts channels until the program has this share of the dense network's
FLOPs and is then fine-tuned. Peers: Torch-Pruning (VainF+Torch-Pruning in PEERS) with torch; its ratio is bisected to
the FLOPs, the same ratio for every group. "residual": the channels of the stream are cut too, else those inside the
blocks alone. Without PEERS ours runs alone. Ours: the rows of head_to_head/structured.py.

Batch norm is estimated anew on 2,000 cropped training images; where the network as it is scores better on the held-out
images (a refitted one does), what it computes is kept and the difference goes into scale and bias (`plans.settle`).
Fine-tuning: cropped and mirrored images in batches of 128, SGD with Nesterov's momentum 0.9 on a cosine to zero, batch
norm by the batch's own statistics, running ones kept along. The rate of each row is the one of --rates with the best
accuracy on 1,000 held-out training images after the first of --steps; the longer runs take it over. "distilled":
towards the dense network's logits. --epochs: so many passes over the images that are not held out.
Data: PRUNEOPT_DATA.
"""

import argparse
import bisect
import copy
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
from paper_reproductions.head_to_head import structured
from paper_reproductions.networks import resnet20

BATCH, HELD, DECAY = 128, 1000, 1e-4
IMPORTANCES = ("magnitude", "Taylor", "Hessian", "random")
THEIRS = (*IMPORTANCES, "magnitude, residual")
OURS = ("reconstructed, uniform", "reconstructed, allocated", "reconstructed, allocated, distilled")
RATES, PASSES = (0.003, 0.01, 0.03, 0.1), (0.01,)
DISTILLED, TEMPERATURE = 0.9, 4.0
OPTIMIZER = optax.chain(optax.add_decayed_weights(DECAY), optax.trace(0.9, nesterov=True))


class Task:
    """The network of structured.py, and which training images a seed cuts by, holds out and trains on."""

    def __init__(self, seed, images=1000):
        folder = os.environ["PRUNEOPT_DATA"]
        self.network = structured.ResNet20(folder)
        self.images, self.labels = resnet20.cifar10(folder, "train20k", *resnet20.CHITA)
        order = np.random.default_rng(seed).permutation(len(self.labels))
        self.cut, self.measured = order[:images], order[-structured.MEASURED :]
        self.anew, self.held = order[: structured.ANEW], order[structured.ANEW :][:HELD]
        self.trained = np.setdiff1d(order, self.held)
        self.dense = flops(self.network.params, self.images)

    def score(self, params, chosen):
        """Accuracy on these training images, percent."""
        run = jax.jit(resnet20.forward)
        right = [np.asarray(run(params, x).argmax(1)) for x in structured.pieces(self.images[chosen])]
        return 100 * float(np.mean(np.concatenate(right) == self.labels[chosen]))

    def started(self, params, rng):
        """(params with statistics to train from, accuracy with statistics merely estimated anew)."""
        seen = resnet20.cropped(self.images[self.anew], *resnet20.CHITA, rng)
        fresh = self.network.anew(params, seen)
        starts = (fresh, po.plans.settle(resnet20.forward, params, structured.pieces(seen)))
        best = max(starts, key=lambda start: self.score(start, self.held))
        return best, structured.accuracy(self.network, resnet20.forward, fresh)


def flops(params, images):
    return po.structure.cost(po.structure.trace(resnet20.forward, params, images[:1])).flops


# Fine-tuning


@partial(jax.jit, static_argnames=("distilled", "temperature"), donate_argnums=(0, 1))
def step(params, state, teacher, batch, rate, distilled, temperature):
    """(params, state) a step on. The statistics are leaves of params: replaced, and without a gradient."""

    def loss(params):
        logits, updates = resnet20.train_forward(params, batch[0])
        value = optax.softmax_cross_entropy_with_integer_labels(logits, batch[1]).mean()
        if distilled:
            wanted = resnet20.forward(teacher, batch[0])
            divergence = po.plans.kl(wanted / temperature, logits / temperature)
            value = distilled * temperature**2 * divergence + (1 - distilled) * value
        return value, updates

    gradient, updates = jax.grad(loss, has_aux=True)(params)
    move, state = OPTIMIZER.update(gradient, state, params)
    params = jax.tree.map(lambda p, m: p - rate * m, params, move)
    newer = lambda new, old: old if new is None else new  # noqa: E731
    return jax.tree.map(newer, updates, params, is_leaf=lambda x: x is None), state


def fine_tuned(task, params, steps, rate, seed, distilled=0.0, temperature=TEMPERATURE):
    rng = np.random.default_rng(seed)
    params = jax.tree.map(jnp.array, params)  # a copy: the step takes its arguments' memory
    state, passes = OPTIMIZER.init(params), -(-steps * BATCH // len(task.trained))
    order = np.concatenate([rng.permutation(task.trained) for _ in range(passes)])
    for t, seen in enumerate(order[: steps * BATCH].reshape(steps, BATCH)):
        batch = resnet20.cropped(task.images[seen], *resnet20.CHITA, rng), task.labels[seen]
        now = rate * (1 + np.cos(np.pi * t / steps)) / 2
        params, state = step(params, state, task.network.params, batch, now, distilled, temperature)
    return params


# Torch-Pruning


def peer():
    """(torch, torch_pruning) or None."""
    folder = Path(os.environ.get("PEERS", "")) / "VainF+Torch-Pruning"
    if not os.environ.get("PEERS") or not folder.is_dir():
        return None
    sys.path.insert(0, str(folder))
    import torch
    import torch_pruning

    return torch, torch_pruning


def module(torch, params):
    """The network of networks/resnet20.py with these arrays, in PyTorch."""
    nn = torch.nn

    def tensor(array):
        return nn.Parameter(torch.from_numpy(np.array(array)))

    def convolution(conv, stride=1):
        size, _, before, after = conv["kernel"].shape
        made = nn.Conv2d(before, after, size, stride, size // 2, bias=False)
        made.weight = tensor(np.asarray(conv["kernel"]).transpose(3, 2, 0, 1))  # HWIO -> OIHW
        return made

    def norm(given):
        made = nn.BatchNorm2d(len(given["scale"]), resnet20.EPSILON)
        made.weight, made.bias = tensor(given["scale"]), tensor(given["bias"])
        made.running_mean.copy_(tensor(given["mean"]).data)
        made.running_var.copy_(tensor(given["var"]).data)
        return made

    class Block(nn.Module):
        def __init__(self, given, stride):
            super().__init__()
            self.conv1, self.norm1 = convolution(given["conv1"], stride), norm(given["norm1"])
            self.conv2, self.norm2 = convolution(given["conv2"]), norm(given["norm2"])
            self.shortcut = nn.Sequential()
            if "shortcut" in given:
                parts = given["shortcut"]
                self.shortcut = nn.Sequential(convolution(parts["conv"], stride), norm(parts["norm"]))

        def forward(self, x):
            y = self.norm2(self.conv2(torch.relu(self.norm1(self.conv1(x)))))
            return torch.relu(y + self.shortcut(x))

    class Network(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv1, self.norm1 = convolution(params["conv1"]), norm(params["norm1"])
            for stage in resnet20.STAGES:
                strides = [2 if b == "0" and stage != "stage1" else 1 for b in resnet20.BLOCKS]
                blocks = zip(resnet20.BLOCKS, strides, strict=True)
                setattr(self, stage, nn.Sequential(*[Block(params[stage][b], stride) for b, stride in blocks]))
            head = params["classifier"]
            self.classifier = nn.Linear(*head["kernel"].shape)
            self.classifier.weight, self.classifier.bias = tensor(np.asarray(head["kernel"]).T), tensor(head["bias"])

        def forward(self, x):
            x = torch.relu(self.norm1(self.conv1(x)))
            for stage in resnet20.STAGES:
                x = getattr(self, stage)(x)
            return self.classifier(x.mean((2, 3)))

    return Network().eval()


def arrays(network):
    """The params of networks/resnet20.py with what the module holds."""

    def array(tensor):
        return jnp.asarray(tensor.detach().numpy().copy())

    def convolution(made):
        return {"kernel": array(made.weight).transpose(2, 3, 1, 0)}

    def norm(made):
        names = {"scale": made.weight, "bias": made.bias, "mean": made.running_mean, "var": made.running_var}
        return {name: array(tensor) for name, tensor in names.items()}

    def block(made):
        parts = {name: convolution(getattr(made, name)) for name in ("conv1", "conv2")}
        parts |= {name: norm(getattr(made, name)) for name in ("norm1", "norm2")}
        if len(made.shortcut):
            parts["shortcut"] = {"conv": convolution(made.shortcut[0]), "norm": norm(made.shortcut[1])}
        return parts

    stages = {s: {b: block(getattr(network, s)[int(b)]) for b in resnet20.BLOCKS} for s in resnet20.STAGES}
    head = {"kernel": array(network.classifier.weight).T, "bias": array(network.classifier.bias)}
    return {"conv1": convolution(network.conv1), "norm1": norm(network.norm1), **stages, "classifier": head}


def cut_by_peer(torch, tp, network, row, ratio, images, labels, seed):
    """The params that Torch-Pruning leaves of the module at this ratio, one shot, every group at the same ratio."""
    network, kind = copy.deepcopy(network), row.split(", ")[0]
    importances = (tp.importance.GroupMagnitudeImportance, tp.importance.GroupTaylorImportance,
                   tp.importance.GroupHessianImportance, tp.importance.RandomImportance)  # fmt: skip
    importance = dict(zip(IMPORTANCES, importances, strict=True))[kind]()
    x, y = torch.from_numpy(images.transpose(0, 3, 1, 2).copy()), torch.from_numpy(labels).long()
    if kind == "Taylor":
        torch.nn.functional.cross_entropy(network(x), y).backward()
    if kind == "Hessian":  # as its docstring has it, an example at a time
        for one, label in zip(x, y, strict=True):
            network.zero_grad()
            torch.nn.functional.cross_entropy(network(one[None]), label[None]).backward()
            importance.accumulate_grad(network)
    kept = [network.classifier]
    if "residual" not in row:
        kept += [made for name, made in network.named_modules() if isinstance(made, torch.nn.Conv2d)
                 and not (name.startswith("stage") and name.endswith("conv1"))]  # fmt: skip
    torch.manual_seed(seed)
    tp.pruner.BasePruner(network, x[:1], importance, pruning_ratio=ratio, ignored_layers=kept).step()
    return arrays(network)


def by_peer(task, row, share, seed):
    """At the least ratio, in steps of 1/64 (no group has more units), whose program is within this share of the FLOPs.

    The widths follow from the ratio alone, so that it is found with scores that cost nothing.
    """
    torch, tp = peer()
    chosen = task.cut[: 100 if row == "Hessian" else len(task.cut)]
    dense, given = module(torch, task.network.params), (task.images[chosen], task.labels[chosen])
    free = "random, residual" if "residual" in row else "random"

    def fits(k):
        params = cut_by_peer(torch, tp, dense, free, k / 64, *given, seed)
        return flops(params, task.images) <= share * task.dense

    least = bisect.bisect_left(range(64), True, key=fits)
    return cut_by_peer(torch, tp, dense, row, least / 64, *given, seed)


# Ours


def by_us(task, rows, shares):
    """{(row, share): params} as structured.py has them."""
    network, calibration = task.network, structured.pieces(task.images[task.cut])
    graph = po.structure.trace(resnet20.forward, network.params, task.images[:1])
    units = po.constraints.coupled(graph.units(), {}, network.groups)
    measured = structured.pieces(task.images[task.measured])
    words = {"method": structured.METHOD, "progress": False}
    tables = po.plans.unit_tables(resnet20.forward, network.params, calibration, units, measured, **words)
    found = {}
    for share in shares:
        choice = po.allocation.allocate(tables, {"flops": share * tables.largest("flops")})
        widths = {"uniform": structured.uniform(tables, share), "allocated": {g: choice[g] for g in tables.groups}}
        for kind in {row.split(", ")[1] for row in rows}:
            cut = po.constraints.Coupled(units.groups, widths[kind])
            pruned = structured.reconstructed(network, calibration, cut)
            small = po.shrink(resnet20.forward, pruned.params, task.images[:4], pruned)
            found |= {(row, share): small.params for row in rows if row.split(", ")[1] == kind}
    return found


def run(task, given, seed, share, row, params):
    """Prints the row; {steps: accuracy}."""
    rng = np.random.default_rng(seed)
    start, anew = task.started(params, rng)
    found = {0: structured.accuracy(task.network, resnet20.forward, start)}
    line = f"{seed} {share:.2f} {row:<38} FLOPs {flops(params, task.images) / task.dense:.3f}  anew {anew:.2f}"
    print(f"{line}  start {found[0]:.2f}", flush=True)
    distilled, rates, scores = DISTILLED * ("distilled" in row), given.rates, {}
    for steps in given.steps:
        for rate in rates:
            clock = time.perf_counter()
            tuned = fine_tuned(task, start, steps, rate, seed, distilled)
            scores[rate] = task.score(tuned, task.held), structured.accuracy(task.network, resnet20.forward, tuned)
            print(f"    {steps} steps at {rate}: held-out {scores[rate][0]:.2f}, test {scores[rate][1]:.2f}, "
                  f"{time.perf_counter() - clock:.0f} s", flush=True)  # fmt: skip
        rates = [max(rates, key=lambda rate: scores[rate][0])]
        found[steps] = scores[rates[0]][1]
    return found


def main(words=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--images", type=int, default=1000, help="training images to cut by")
    parser.add_argument("--shares", nargs="+", type=float, default=[0.7, 0.51, 0.33])
    parser.add_argument("--rows", nargs="+", default=[*THEIRS, *OURS])
    parser.add_argument("--steps", nargs="*", type=int, default=[60, 150])
    parser.add_argument("--rates", nargs="+", type=float)
    parser.add_argument("--epochs", type=int, help="fine-tune ours, distilled, for so many passes")
    given = parser.parse_args(words)
    if given.epochs:
        given.rows = [OURS[-1]]
    given.rates = given.rates or (PASSES if given.epochs else RATES)
    theirs = [row for row in given.rows if row in THEIRS]
    if theirs and peer() is None:
        print("PEERS is unset or without VainF+Torch-Pruning: ours alone")
        theirs = []
    ours = [row for row in given.rows if row in OURS]
    found = {}
    for seed in range(given.seeds):
        task = Task(seed, given.images)
        if given.epochs:
            given.steps = [given.epochs * len(task.trained) // BATCH]
        cut = by_us(task, ours, given.shares) if ours else {}
        for share in given.shares:
            for row in theirs + ours:
                params = cut[row, share] if row in ours else by_peer(task, row, share, seed)
                for steps, value in run(task, given, seed, share, row, params).items():
                    found.setdefault((row, share, steps), []).append(value)
    print(f"{'steps':<40}{'share':>6}" + "".join(f"{steps:>14}" for steps in [0, *given.steps]))
    for row in theirs + ours:
        for share in given.shares:
            every = [np.array(found[row, share, steps]) for steps in [0, *given.steps]]
            spread = [x.std(ddof=1) / len(x) ** 0.5 if len(x) > 1 else 0.0 for x in every]
            cells = "".join(f"{x.mean():>8.2f} ±{s:.2f}" for x, s in zip(every, spread, strict=True))
            print(f"{row:<40}{share:>6}{cells}", flush=True)
    return found


if __name__ == "__main__":
    main()
