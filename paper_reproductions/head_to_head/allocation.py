"""Which layer keeps how much: stories260K at 50, 60, 70 % of its projections' weights, allocations beside each other.

    python paper_reproductions/head_to_head/allocation.py [--method balanced] [--draws 3] [--levels 0.5 0.6 0.7]
        [--step 0.05] [--segments 16] [--measured 16] [--test-segments 40] [--generations 20] [--around]

Every row prunes layer by layer with the same method on the same calibration set and keeps the same number of weights,
to the unit; only the counts of the layers differ. Calibrated on `--draws` disjoint sets of `--segments` windows that
lie behind the 40 test windows; whatever is chosen is chosen on `--measured` windows of 128 tokens behind those, by the
KL divergence from the dense network: the power of by_size and the slope of ATP (with the first draw), the tables and
what evolution measures. Rows: uniform; by_size; Erdos-Renyi; OWL at its own settings; ATP; allocated, exactly, on the
measured tables of the dense network; evolved from there on the network put together of the leaves of the tables.
--around: also allocated on tables around the network that the allocation gave. Perplexity on the test windows, mean and
standard error over the draws; for allocations the loss that the tables predict and the one measured, both on the
windows of the choice. Data: PRUNEOPT_DATA.
"""

import argparse
import os
import sys
import time
from pathlib import Path

import jax
import numpy as np

sys.path.insert(0, str(Path(__file__).parents[2]))
import pruneopt as po
from paper_reproductions.networks import stories
from pruneopt.constraints import arithmetic, by_size, erdos_renyi

LEAVES = ["layers/*/w*"]
POWERS = (0.1, 0.25, 0.4, 0.6)
SLOPES = (-0.02, 0.02, 0.04, 0.08)
TESTED, LENGTH = 40, 128  # windows of the test protocol; tokens of a window that choices are made on


class Run:
    """One calibration set: pruning with it, and the loss on the windows of the choice."""

    def __init__(self, params, calibration, measured, method, step=0.05):
        self.params, self.calibration, self.measured, self.method = params, calibration, measured, method
        self._steps = [round(k * step, 6) for k in range(round(1 / step))]
        self.blocks = [f"layers/{i}/*" for i in range(len(params["layers"]))]
        self._forward = jax.jit(stories.forward)
        self._kl = jax.jit(po.plans.kl)
        self._dense = [self._forward(params, x) for x in measured]

    def pruned(self, constraint):
        given = (stories.forward, self.params, self.calibration, constraint, self.method)
        return po.plans.layerwise(*given, leaves=LEAVES, progress=False).params

    def loss(self, params):
        pairs = zip(self._dense, self.measured, strict=True)
        return float(np.mean([self._kl(before, self._forward(params, x)) for before, x in pairs]))

    def best(self, make, settings):
        """The setting whose network is nearest to the dense one."""
        return min(settings, key=lambda setting: self.loss(self.pruned(make(setting))))

    def levels(self, base=None):
        words = {"method": self.method, "sparsities": self._steps, "leaves": LEAVES, "base": base, "progress": False}
        return po.plans.layer_levels(stories.forward, self.params, self.calibration, **words)


def projections(params):
    return [w for layer in params["layers"].values() for name, w in layer.items() if name.startswith("w")]


def size(params):
    return sum(w.size for w in projections(params))


def kept(params):
    return sum(int(np.count_nonzero(w)) for w in projections(params))


def chosen(run, sparsity):
    """The power of by_size and the slope of ATP."""
    power = run.best(lambda p: by_size(run.params, sparsity, p, leaves=LEAVES), POWERS)
    return power, run.best(lambda s: arithmetic(run.params, sparsity, s, run.blocks, leaves=LEAVES), SLOPES)


def rows(run, sparsity, settings, found, tables, given):
    """{row: (constraint, what the tables predict or None)}."""
    total, (power, slope) = int((1 - sparsity) * size(run.params) + 1e-9), settings
    words = {"leaves": LEAVES}
    made = {
        "uniform": (by_size(run.params, sparsity, 0.0, **words), None),
        "by_size": (by_size(run.params, sparsity, power, **words), None),
        "Erdos-Renyi": (erdos_renyi(run.params, sparsity, **words), None),
        "OWL": (
            po.plans.outlier_weighed(stories.forward, run.params, run.calibration, sparsity, run.blocks, **words),
            None,
        ),
        "ATP": (arithmetic(run.params, sparsity, slope, run.blocks, **words), None),
    }
    choice = po.allocation.allocate(tables, {"weights": total})
    made["allocated"] = (po.plans.budgets(tables, choice.levels, total), choice.error)
    if given.generations:
        searched = po.allocation.evolve(
            tables,
            {"weights": total},
            lambda levels: run.loss(found.network(levels)),
            start=choice.levels,
            generations=given.generations,
            offspring=8,
            progress=False,
        )
        print(f"    {searched!r}", flush=True)
        made["evolved"] = (po.plans.budgets(tables, searched.levels, total), searched.loss)
    if given.around:
        near = run.levels(run.pruned(made["allocated"][0])).measured(run.measured, progress=False)
        again = po.allocation.allocate(near, {"weights": total})
        made["allocated around it"] = (po.plans.budgets(near, again.levels, total), again.error)
    return made


def main(words=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--method", default="balanced")
    parser.add_argument("--draws", type=int, default=3)
    parser.add_argument("--levels", nargs="+", type=float, default=[0.5, 0.6, 0.7])
    parser.add_argument("--step", type=float, default=0.05, help="between the sparsities of the tables")
    parser.add_argument("--segments", type=int, default=16, help="windows of a calibration set")
    parser.add_argument("--measured", type=int, default=16, help="windows on which choices are made")
    parser.add_argument("--test-segments", type=int, default=TESTED)
    parser.add_argument("--generations", type=int, default=20, help="of the evolution; 0 for none")
    parser.add_argument("--around", action="store_true")
    given = parser.parse_args(words)
    data = os.environ["PRUNEOPT_DATA"]
    params, _ = stories.load(data)
    test = stories.windows(data, 0, given.test_segments)
    after = 1200 * (TESTED + given.draws * given.segments)
    measured = [np.stack([w[:LENGTH] for w in stories.windows(data, after, given.measured)])]
    print(f"dense perplexity {stories.perplexity(params, test):.4f}", flush=True)
    settings, scores = {}, {}
    for draw in range(given.draws):
        clock = time.perf_counter()
        windows = stories.windows(data, 1200 * (TESTED + draw * given.segments), given.segments)
        run = Run(params, [b[:, :-1] for b in stories.batches(windows)], measured, given.method, given.step)
        found = run.levels()
        tables = found.measured(measured, progress=False)
        print(f"draw {draw}: {tables!r}, {time.perf_counter() - clock:.0f} s", flush=True)
        for level in given.levels:
            if not draw:
                settings[level] = chosen(run, level)
                print(f"  {level:.0%}: by_size {settings[level][0]}, ATP {settings[level][1]}", flush=True)
            for name, (constraint, predicted) in rows(run, level, settings[level], found, tables, given).items():
                pruned = run.pruned(constraint)
                lost, value = run.loss(pruned), stories.perplexity(pruned, test)
                scores.setdefault((name, level), []).append((value, lost, np.nan if predicted is None else predicted))
                said = f"kept {kept(pruned):,}, perplexity {value:.3f}, loss {lost:.4f}"
                said += "" if predicted is None else f", predicted {predicted:.4f}"
                print(f"  {level:.0%} {name:<20} {said}", flush=True)
    table(scores, given.levels)
    return scores


def table(scores, levels):
    """Perplexity and its standard error; loss on the windows of the choice, and what was predicted of it."""
    print(f"\n{'':<20}" + "".join(f"{f'{level:.0%}':^34}" for level in levels))
    for name in dict.fromkeys(name for name, _ in scores):
        cells = []
        for level in levels:
            found = np.array(scores[name, level])
            error = found[:, 0].std(ddof=1) / len(found) ** 0.5 if len(found) > 1 else 0.0
            predicted = "" if np.isnan(found[0, 2]) else f" [{found[:, 2].mean():.3f}]"
            cells.append(f"{found[:, 0].mean():8.3f} ±{error:.3f} {found[:, 1].mean():6.3f}{predicted}")
        print(f"{name:<20}" + "".join(f"{cell:<34}" for cell in cells))


if __name__ == "__main__":
    main()
