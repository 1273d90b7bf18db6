"""Which units of many small networks can be cut, and whether cutting them is zeroing them.

    python paper_reproductions/head_to_head/units.py [names ...] [--large] [--blocked]

For each network of `networks/small`, in float64: its leaves, groups of axes, those of them that are free, the share of
its parameters in leaves with an axis that can be cut, the largest difference between the network with a third of the
units of each free group deleted and with the same units zeroed, over the largest output, and the seconds to read its
groups and to shrink it once (traced, rewritten, compiled and compared). --large adds whole applications, --blocked
prints why the other leaves cannot be cut. "error" is the message of a network that fails.
"""

import argparse
import importlib.util
import os
import time

os.environ.setdefault("KERAS_BACKEND", "jax")
parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("names", nargs="*", help="networks; all by default")
parser.add_argument("--large", action="store_true")
parser.add_argument("--blocked", action="store_true")
parser.add_argument("--trace", action="store_true", help="read the groups alone")


def measured(entry, only_trace=False):
    """(units, largest difference or a message, seconds to read, seconds to shrink once) of a network."""
    import jax

    import pruneopt as po
    from paper_reproductions.networks.small import deletion

    fn, params, batch = entry.make()
    start = time.perf_counter()
    found = po.structure.trace(fn, params, batch).units()
    read, worst, shrinking = time.perf_counter() - start, 0.0, []
    for cut in () if only_trace else deletion.rounds(found):
        start = time.perf_counter()
        small = po.shrink_units(fn, params, batch, cut.kept)
        shrinking.append(time.perf_counter() - start)
        before = jax.jit(fn)(deletion.zeroed(params, cut.gone), batch)
        after = jax.jit(small.fn)(small.params, batch)
        worst = max(worst, deletion.difference(before, after))
    return found, worst, read, max(shrinking, default=0.0)


def blocked(found):
    """Lines: the leaves that cannot be cut, and why."""
    from paper_reproductions.networks.small import deletion

    cut = {path for group in deletion.free(found) for path, _ in group.members}
    for path in found.paths:
        if path not in cut:
            why = [f"axis {k}: {g.blocked[0]}" for k in range(found.type_of(path).ndim) for g in found.of(path, k)]
            yield f"    {path} {found.type_of(path).shape}: {'; '.join(why)}"


def main(args):
    import jax

    from paper_reproductions.networks.small import deletion
    from paper_reproductions.networks.small.catalogue import NETWORKS

    jax.config.update("jax_enable_x64", True)
    head = f"{'network':<24}{'leaves':>7}{'groups':>7}{'free':>6}{'share':>8}{'error':>10}{'read':>8}{'shrink':>8}"
    print(head)
    for name, entry in NETWORKS.items():
        if (args.names and name not in args.names) or (entry.large and not args.large):
            continue
        if entry.needs and importlib.util.find_spec(entry.needs) is None:
            print(f"{name:<24} {entry.needs} is not installed")
            continue
        try:
            found, worst, read, shrink = measured(entry, args.trace)
        except Exception as error:
            print(f"{name:<24} {type(error).__name__}: {str(error)[:300]}")
            continue
        counts = f"{len(found.paths):>7}{len(found.groups):>7}{len(deletion.free(found)):>6}"
        print(f"{name:<24}{counts}{deletion.share(found):>8.3f}{worst:>10.1e}{read:>8.2f}{shrink:>8.2f}", flush=True)
        for line in blocked(found) if args.blocked else ():
            print(line)


if __name__ == "__main__":
    main(parser.parse_args())
