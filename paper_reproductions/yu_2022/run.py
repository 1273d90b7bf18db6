"""Channels of ResNet-20 on CIFAR-10 ranked by Hessian traces (Yu et al. 2022, HAP), cut, and fine-tuned.

    PRUNEOPT_DATA=data python paper_reproductions/yu_2022/run.py [--ratio 0.77] [--images 512] [--steps 314]
        [--tried 80] [--rates 0.01 0.03 0.1] [--seeds 1]

The channels inside the nine blocks are cut, 336 of them; the residual stream is not. HAP's ratio is the share of
channels that go, by one threshold over all layers. The other rows keep as many channels, of their own choice, as have
the FLOPs that HAP's cut left. Scores are of `--images` training images. Each row's rate is the one with the least loss
on 2,000 training images that are not trained on, after `--tried` steps; then `--steps` steps of SGD from the cut
network, batches of 128 cropped images, momentum 0.9, weight decay 5e-4, the rate over ten at half and again at three
quarters.
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
from paper_reproductions.networks import resnet20
from pruneopt.constraints import Cardinality, Coupled
from pruneopt.plans import UnitMethod, unit_models

BATCH, HELD, PIECE = 128, 2000, 250
ROWS = {
    "Hessian trace (HAP)": UnitMethod(partial(unit_models.hessian_traces, of="makers")),
    "Hessian trace, coupled": "unit_hessian",
    "magnitude": "unit_l2",
    "random": "unit_random",
}


def loss(params, batch):
    """Cross-entropy by the running statistics."""
    return _entropy(resnet20.forward(params, batch[0]), batch[1])


def train_loss(params, batch):
    """Cross-entropy by the batch's own statistics, and the running ones a step on."""
    logits, moved = resnet20.train_forward(params, batch[0])
    return _entropy(logits, batch[1]), moved


def _entropy(logits, labels):
    return jnp.mean(optax.softmax_cross_entropy_with_integer_labels(logits, labels))


def pieces(images, labels):
    return [(images[i : i + PIECE], labels[i : i + PIECE]) for i in range(0, len(images), PIECE)]


def accuracy(params, data):
    run = jax.jit(resnet20.forward)
    return 100 * float(np.mean(np.concatenate([np.asarray(run(params, x).argmax(1)) == y for x, y in pieces(*data)])))


def mean_loss(params, data):
    run = jax.jit(loss)
    return float(np.mean([run(params, piece) for piece in pieces(*data)]))


def flops(graph, groups):
    """alive -> FLOPs: each channel's part of the products that make and read it, and all the rest."""
    each = {g.name: sum(op.flops for op in graph.operators if {*op.paths} & {p for p, _ in g.places}) for g in groups}
    rest = sum(op.flops for op in graph.operators) - sum(each.values())
    return lambda alive: rest + sum(each[g.name] * float(np.mean(alive[g.name])) for g in groups)


def cut(params, groups, row, batches, seed, *, count):
    """The network with the best `count` channels, one left in each layer at least."""
    units = Coupled(groups, Cardinality(count=count, floor=1))
    pruned = po.prune(loss, params, batches, units, method=row, key=seed, progress=False)
    return pruned, {name: np.asarray(alive) for name, alive in units.alive(pruned.support).items()}


def within(params, groups, row, batches, seed, limit, of):
    """The cut with the most channels that costs no more FLOPs than `limit`."""
    scores = po.plans.unit_scores(loss, params, batches, Coupled(groups, {}), row, key=seed)
    alive = {name: np.arange(len(x)) == np.argmax(x) for name, x in scores.items()}
    order = sorted((-x, name, i) for name, every in scores.items() for i, x in enumerate(every) if not alive[name][i])
    for _, name, i in order:
        alive[name][i] = True
        if of(alive) > limit:
            alive[name][i] = False
            break
    known = UnitMethod(lambda network, groups, key: scores, reads_data=False)
    return cut(params, groups, known, None, seed, count=sum(int(x.sum()) for x in alive.values()))


def tuned(params, data, steps, rate, seed):
    """SGD from here, in training mode."""
    images, labels = data
    schedule = optax.piecewise_constant_schedule(rate, {steps // 2: 0.1, 3 * steps // 4: 0.1})
    moving = jax.tree_util.tree_map_with_path(lambda path, _: path[-1].key not in ("mean", "var"), params)
    optimizer = optax.masked(optax.chain(optax.add_decayed_weights(5e-4), optax.sgd(schedule, 0.9)), moving)
    state, rng = optimizer.init(params), np.random.default_rng(seed)

    @jax.jit
    def step(params, state, batch):
        gradient, moved = jax.grad(train_loss, has_aux=True)(params, batch)
        updates, state = optimizer.update(gradient, state, params)
        taken = jax.tree.map(lambda p, u, moves: p + u if moves else p, params, updates, moving)
        return jax.tree.map(lambda new, p: p if new is None else new, moved, taken, is_leaf=lambda x: x is None), state

    for _ in range(steps):
        chosen = rng.integers(0, len(images), BATCH)
        batch = resnet20.cropped(images[chosen], *resnet20.CHITA, rng), labels[chosen]
        params, state = step(params, state, batch)
    return params


def main(words=None):
    """{(row, seed): (share of FLOPs, of parameters, accuracy as cut, statistics anew, fine-tuned, rate)}."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--ratio", type=float, default=0.77)
    parser.add_argument("--images", type=int, default=512)
    parser.add_argument("--steps", type=int, default=314)
    parser.add_argument("--tried", type=int, default=80)
    parser.add_argument("--rates", type=float, nargs="+", default=[0.01, 0.03, 0.1])
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--rows", nargs="+", default=list(ROWS))
    args = parser.parse_args(words)
    folder = os.environ["PRUNEOPT_DATA"]
    params = resnet20.load_chita(folder)
    images, labels = resnet20.cifar10(folder, "train20k", *resnet20.CHITA)
    test = resnet20.cifar10(folder, "test1k", *resnet20.CHITA)
    held, seen = (images[-HELD:], labels[-HELD:]), (images[:-HELD], labels[:-HELD])
    graph = po.structure.trace(resnet20.forward, params, images[:1])
    names = [f"{s}/{b}/conv1/kernel[3]" for s in resnet20.STAGES for b in resnet20.BLOCKS]
    groups = po.constraints.coupled(graph.units(), {}, names).groups
    of, many = flops(graph, groups), sum(group.size for group in groups)
    whole, found = of({g.name: np.ones(g.size) for g in groups}), {}
    print(f"dense: {accuracy(params, test):.2f} %, {whole / 1e6:.1f} MFLOPs, {many} channels inside blocks", flush=True)
    for seed in range(args.seeds):
        rng = np.random.default_rng(seed)
        order = rng.permutation(len(seen[0]))
        batches = pieces(seen[0][order[: args.images]], seen[1][order[: args.images]])
        fresh = pieces(resnet20.cropped(seen[0][order[:HELD]], *resnet20.CHITA, rng), seen[1][order[:HELD]])
        limit = None
        for name in args.rows:
            clock = time.perf_counter()
            if limit is None:  # the first row sets the FLOPs of the others
                pruned, alive = cut(params, groups, ROWS[name], batches, seed, count=many - int(args.ratio * many))
                limit = of(alive)
            else:
                pruned, alive = within(params, groups, ROWS[name], batches, seed, limit, of)
            small = po.shrink(resnet20.forward, pruned.params, images[:2], pruned).params
            ranked = time.perf_counter() - clock
            anew = po.plans.recalibrate(lambda p, b: resnet20.train_forward(p, b[0])[1], small, fresh)
            tries = {r: mean_loss(tuned(anew, seen, args.tried, r, seed), held) for r in args.rates}
            rate = min(tries, key=tries.get)
            last = tuned(anew, seen, args.steps, rate, seed + 1)
            left = sum(x.size for x in jax.tree.leaves(small)) / sum(x.size for x in jax.tree.leaves(params))
            figures = [accuracy(p, test) for p in (small, anew, last)]
            found[name, seed] = (of(alive) / whole, left, *figures, rate)
            print(
                f"seed {seed}, {name:24} FLOPs {of(alive) / whole:.3f}, parameters {left:.3f}, as cut "
                f"{figures[0]:.2f}, statistics anew {figures[1]:.2f}, tuned {figures[2]:.2f} % at rate {rate:g}; "
                f"widths {[int(x.sum()) for x in alive.values()]}; cut {ranked:.0f} s, all "
                f"{time.perf_counter() - clock:.0f} s",
                flush=True,
            )
    return found


if __name__ == "__main__":
    main()
