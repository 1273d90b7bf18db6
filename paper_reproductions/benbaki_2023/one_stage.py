"""What the one-stage tables of this folder share: losses, draws of examples, rows, and how a table is measured.

A row is (the model that it reads or None, (setting, sparsity) -> the weights of the chosen leaves).
"""

import argparse
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

sys.path.insert(0, str(Path(__file__).parents[2]))
import pruneopt as po
from pruneopt.constraints import Cardinality, Support, by_size
from pruneopt.curvature import Diagonal, Identity, empirical_fisher
from pruneopt.network.leaves import combine, partition
from pruneopt.objectives import Quadratic
from pruneopt.solvers import CHITA, Polish, Pursuit, Score, SummedOBS

N = 1000
RIDGE = 1e-4  # of Q


def cross_entropy(logits, batch):
    return jnp.mean(jax.nn.logsumexp(logits, axis=-1) - jnp.take_along_axis(logits, batch[1][:, None], axis=-1)[:, 0])


@dataclass(frozen=True)
class CrossEntropy:
    """The loss (params, (images, labels)) -> scalar of a network; equal where the networks are."""

    forward: Callable

    def __call__(self, params, batch):
        return cross_entropy(self.forward(params, batch[0]), batch)


@dataclass(frozen=True)
class Tempered:
    """The logits over a temperature, of (params, (images, labels))."""

    forward: Callable
    temperature: float

    def __call__(self, params, batch):
        return self.forward(params, batch[0]) / self.temperature


@dataclass(frozen=True)
class Network:
    """forward(params, images) -> logits, the trained params, and which leaves are pruned."""

    forward: Callable
    params: Any
    leaves: Any = None

    @property
    def loss(self):
        return CrossEntropy(self.forward)


class Setting:
    """One draw of examples, in batches, and the models at the trained weights, each made once and timed."""

    def __init__(self, network, batches, models):
        self.network, self.batches, self._models, self._made = network, batches, models, {}
        self.center, self._rest = partition(network.params, network.leaves)

    def model(self, name):
        """(objective, seconds that it took the first time)."""
        if name not in self._made:
            clock = time.process_time()
            self._made[name] = self._models[name](self), time.process_time() - clock
        return self._made[name]

    def release(self):
        """Forget the models."""
        self._made = {}

    def whole(self, weights):
        """All parameters, with these weights."""
        return combine(weights, self._rest)


def fisher(setting):
    """Q(w) = 1/2 <d, (G^T G / n + RIDGE I) d>, G the per-example gradients."""
    network = setting.network
    curvature = empirical_fisher(network.loss, network.params, setting.batches, network.leaves, ridge=RIDGE)
    return Quadratic(setting.center, curvature)


def solved(model, solver):
    """The row of a solver on a model."""

    def weights(setting, sparsity):
        objective = setting.model(model)[0]
        return po.solve(po.Problem(objective, subject_to=Cardinality(sparsity=sparsity)), solver).value

    return model, weights


def layer_by_layer(solver, power, damping=0.01):
    """The row of `plans.layerwise`: in each layer, in turn, what the dense network computes there is the target; of a
    layer of n weights a share in proportion to n^-power is kept.
    """

    def weights(setting, sparsity):
        network, images = setting.network, [batch[0] for batch in setting.batches]
        allowed = by_size(network.params, sparsity, power, leaves=network.leaves)
        row = po.plans.LayerMethod(solver, damping=damping)
        words = {"leaves": network.leaves, "progress": False}
        found = po.plans.layerwise(network.forward, network.params, images, allowed, row, **words)
        return partition(found.params, network.leaves)[0]

    return None, weights


def magnitude(setting, sparsity):
    problem = po.Problem(Quadratic(setting.center, Identity()), subject_to=Cardinality(sparsity=sparsity))
    return po.solve(problem, Score())


def published(model):
    """The rows of the literature, on a model by the empirical Fisher."""

    def refitted_magnitude(setting, sparsity):
        mask = magnitude(setting, sparsity).support
        return po.solve(po.Problem(setting.model(model)[0], subject_to=Support(mask)), Polish()).value

    def diagonal(setting, sparsity):
        f = Quadratic(setting.center, Diagonal(setting.model(model)[0].curvature.diagonal(setting.center)))
        return po.solve(po.Problem(f, subject_to=Cardinality(sparsity=sparsity)), Score()).value

    return {
        "magnitude": (None, lambda setting, sparsity: magnitude(setting, sparsity).value),
        "diagonal Fisher": (model, diagonal),
        "magnitude, refit (CHITA's LS)": (model, refitted_magnitude),
        "M-FAC": solved(model, SummedOBS()),
        "CHITA, 50 iterations": solved(model, CHITA(50)),
        "CHITA, each step refitted": solved(model, Pursuit()),
    }


def arguments(rows, sparsities):
    """A parser of what every table is asked."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--methods", nargs="*", default=list(rows))
    parser.add_argument("--sparsities", nargs="*", type=float, default=list(sparsities))
    parser.add_argument("--examples", type=int, default=N, help="that each seed draws")
    parser.add_argument("--validate", action="store_true", help="score on training images that no seed draws")
    return parser


def draws(pool, given):
    """The examples of each seed."""
    return [np.random.default_rng(seed + 1).choice(pool, given.examples, replace=False) for seed in range(given.seeds)]


def summary(rows):
    """Means over the seeds and their standard errors, as text."""
    mean, error = np.mean(rows, 0), np.zeros(len(rows[0]))
    if len(rows) > 1:
        error = np.std(rows, 0, ddof=1) / len(rows) ** 0.5
    return "".join(f"{m:>8.2f} ±{e:4.2f}" for m, e in zip(mean, error, strict=True))


def table(settings, rows, given, scores):
    """Print each of `scores` ({what is added to a row's name: (setting, params) -> accuracy}) of each row of
    `given.methods`, draw by draw and in the mean, then the rows' Q.

    CPU seconds: of one draw's sparsities, the model included.
    """
    header = f"{'accuracy %':<44}" + "".join(f"{s:>14}" for s in given.sparsities) + "   CPU s"
    measured = {(name, label): [] for name in given.methods for label in scores}
    seconds, q = ({name: [] for name in given.methods} for _ in range(2))
    for number, setting in enumerate(settings, 1):
        print(f"draw {number} of {len(settings)}\n{header}")
        for name in given.methods:
            reads, row = rows[name]
            prepared = setting.model(reads)[1] if reads else 0.0
            clock = time.process_time()
            found = [row(setting, s) for s in given.sparsities]
            seconds[name].append(prepared + time.process_time() - clock)
            if number == 1:
                q[name] = [setting.model("fisher")[0].value(w) for w in found]
            for label, score in scores.items():
                measured[name, label].append([score(setting, setting.whole(w)) for w in found])
                print(f"{name + label:<44}" + summary(measured[name, label][-1:]) + f"{seconds[name][-1]:>9.1f}")
            sys.stdout.flush()
        setting.release()
    print(f"all draws\n{header}")
    for (name, label), values in measured.items():
        print(f"{name + label:<44}" + summary(values) + f"{np.median(seconds[name]):>9.1f}")
    print(f"\n{'Q, the first draw':<44}" + "".join(f"{s:>12}" for s in given.sparsities))
    for name, values in q.items():
        print(f"{name:<44}" + "".join(f"{v:>12.2e}" for v in values))
