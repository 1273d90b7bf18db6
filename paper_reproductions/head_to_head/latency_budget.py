"""ResNet-20 within a budget of measured seconds: whole branches may go, widths are those at which the machine is fast.

    python paper_reproductions/head_to_head/latency_budget.py [--batch 256] [--faster 1.3 1.6] [--seeds 1] [--rounds 15]

`structure.latency` measures the blocks at widths on a grid (none, and multiples of 8), `plans.unit_tables` what each
width of each group loses, `allocation.meet` finds the widths of least loss whose shrunk program is measured to be so
many times faster, one pass refits it (the setting of structured.py). Reported: what the tables predict of these widths;
how many times faster the network is, both programs in the same rounds, measured once more after all is chosen; test
accuracy as it is and with batch-norm statistics estimated anew on 2,000 cropped training images. Data: PRUNEOPT_DATA.
"""

import argparse
import os
import sys
import time
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[2]))
import pruneopt as po
from paper_reproductions.head_to_head import structured
from pruneopt.structure.stopwatch import Compiled, race


def shrunk(network, pruned):
    return po.shrink(network.forward, pruned.params, network.train[:4], pruned)


def run(network, seed, given):
    rng = np.random.default_rng(seed)
    order, batch = rng.permutation(len(network.train)), network.train[: given.batch]
    units = po.structure.trace(network.forward, network.params, batch).units()
    units, clock = po.constraints.coupled(units, {}, network.groups), time.perf_counter()
    grid = {group.name: [0, *range(8, group.size + 1, 8)] for group in units.groups}
    seconds = po.structure.latency(network.forward, network.params, batch, grid, repeats=given.rounds)
    print(f"seed {seed}: latency of {len(seconds.blocks)} blocks in {time.perf_counter() - clock:.0f} s", flush=True)
    calibration = structured.pieces(network.train[order[: given.images]])
    measured = structured.pieces(network.train[order[-structured.MEASURED :]])
    words = {"method": structured.METHOD, "widths": seconds, "progress": False}
    tables = po.plans.unit_tables(network.forward, network.params, calibration, units, measured, **words)
    dense = Compiled(network.forward, network.params, batch)

    def spent(choice):
        """Seconds at these widths, whatever the weights, in those of the table."""
        cut = po.constraints.Coupled(units.groups, {g: choice[g] for g in tables.groups})
        small = shrunk(network, structured.by_magnitude(network, cut))
        calls = {"dense": dense, "small": Compiled(small.fn, small.params, batch)}
        took = race(calls, given.rounds, 120.0, time.perf_counter)
        return seconds.whole * took["small"].over(took["dense"])

    smaller, rows = {}, []
    for faster in given.faster:
        met = po.allocation.meet(tables, {"seconds": seconds.whole / faster}, "seconds", spent)
        choice = met.allocation
        cut = po.constraints.Coupled(units.groups, {g: choice[g] for g in tables.groups})
        pruned = structured.reconstructed(network, calibration, cut)
        small = shrunk(network, pruned)
        smaller[faster] = Compiled(small.fn, small.params, batch)
        fresh = network.anew(pruned.params, network.seen(network.train[order[: structured.ANEW]], rng))
        accuracy = [structured.accuracy(network, network.forward, p) for p in (pruned.params, fresh)]
        rows.append((faster, seconds.whole / choice.spent["seconds"], accuracy))
        print(f"  {faster}: widths {[choice[g] for g in tables.groups]}, gap {choice.gap:.1e}", flush=True)
        print("    " + "; ".join(f"{seconds.whole / was:.3f}, measured {seconds.whole / is_now:.3f}"
                                 for _, was, is_now in met.tried), flush=True)  # fmt: skip
    calls = {"dense": dense, **smaller}
    took = race(calls, given.rounds, 120.0, time.perf_counter)
    return [(faster, said, 1 / took[faster].over(took["dense"]), *accuracy) for faster, said, accuracy in rows]


def main():
    words = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    words.add_argument("--batch", type=int, default=256)
    words.add_argument("--faster", nargs="+", type=float, default=[1.3, 1.6])
    words.add_argument("--seeds", type=int, default=1)
    words.add_argument("--images", type=int, default=1000)
    words.add_argument("--rounds", type=int, default=15)
    given = words.parse_args()
    network = structured.ResNet20(os.environ["PRUNEOPT_DATA"])
    print(f"{'faster':>7} {'predicted':>10} {'measured':>9} {'as it is':>9} {'anew':>6}")
    for seed in range(given.seeds):
        for faster, said, took, plain, fresh in run(network, seed, given):
            print(f"{faster:>7} {said:>10.3f} {took:>9.3f} {plain:>9.1f} {fresh:>6.1f}", flush=True)


if __name__ == "__main__":
    main()
