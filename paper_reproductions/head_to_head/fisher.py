"""Per-example gradients and inverse Fisher diagonals, beside PyTorch's loop and the own code of M-FAC and WoodFisher.

    python paper_reproductions/head_to_head/fisher.py [--examples 1000] [--rounds 3] [--network resnet20 | mlpnet]
                                                      [--parts gradients inverse blocks]

Everything runs on one thread (the process is bound to one CPU), in turn. Gradients: empirical_fisher's n x p matrix
beside batch-1 backward passes in PyTorch written row by row into one array, the same network and weights; both warm.
Memory: the most that each adds to its process, over the bytes of the matrix. Inverse diagonals: those of
(1/n) G^T G + ridge I with the same G, whole and in blocks; errors against NumPy in float64. --rounds 0: one run each,
the first one, compilation included. Data: PRUNEOPT_DATA;
IST-DASLab+M-FAC and IST-DASLab+WoodFisher in PEERS. What needs torch or PEERS is left out without it.
"""

import argparse
import importlib.util
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

if hasattr(os, "sched_setaffinity"):
    os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})
os.environ["OPENBLAS_NUM_THREADS"] = os.environ["OMP_NUM_THREADS"] = "1"

import jax
import jax.numpy as jnp
import numpy as np

sys.path.insert(0, str(Path(__file__).parents[2]))
from paper_reproductions.networks import mlpnet, resnet20
from pruneopt.curvature import BlockDiagonal, LowRank, empirical_fisher

parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
parser.add_argument("--examples", type=int, default=1000)
parser.add_argument("--rounds", type=int, default=3)
parser.add_argument("--network", choices=("resnet20", "mlpnet"), default="resnet20")
parser.add_argument("--parts", nargs="*", choices=("gradients", "inverse", "blocks"))
parser.add_argument("--ridge", type=float, default=1e-5)
parser.add_argument("--block", type=int, default=1000)
parser.add_argument("--memory-of", choices=("pruneopt", "torch"), help="run one of them once and print what it added")
args = parser.parse_args()
parts = args.parts or ("gradients", "inverse", "blocks")
folder = os.environ["PRUNEOPT_DATA"]
has_torch = importlib.util.find_spec("torch") is not None


def setting():
    """Network, forward pass, leaves, images and labels."""
    if args.network == "mlpnet":
        images, labels = mlpnet.mnist(folder, "train")
        return mlpnet.load(folder), mlpnet.forward, None, images[: args.examples], labels[: args.examples]
    images, labels = resnet20.cifar10(folder, "train20k", *resnet20.CHITA)
    leaves = lambda path, leaf: leaf.ndim > 1 and "shortcut" not in path  # noqa: E731
    return resnet20.load_chita(folder), resnet20.forward, leaves, images[: args.examples], labels[: args.examples]


params, forward, leaves, images, labels = setting()


def loss(params, batch):
    x, y = batch
    return -jnp.mean(jnp.take_along_axis(jax.nn.log_softmax(forward(params, x)), y[:, None], axis=1))


def ours(n=args.examples):
    return jax.block_until_ready(empirical_fisher(loss, params, [(images[:n], labels[:n])], leaves).gradients)


def torch_network():
    """(logits, weights) in PyTorch, the weights as empirical_fisher orders them."""
    import torch
    from torch.nn import functional

    named = {jax.tree_util.keystr(p, simple=True, separator="/"): x for p, x in jax.tree.leaves_with_path(params)}
    chosen = [path for path, x in named.items() if x.ndim > 1 and "shortcut" not in path]
    layout = {4: (3, 2, 0, 1), 2: (1, 0), 1: (0,)}  # HWIO -> OIHW, (in, out) -> (out, in)
    w = {p: torch.tensor(np.ascontiguousarray(np.transpose(x, layout[x.ndim]))) for p, x in named.items()}
    for path in chosen:
        w[path].requires_grad_()

    def norm(x, path):
        parts = [w[f"{path}/{part}"] for part in ("mean", "var", "scale", "bias")]
        return functional.batch_norm(x, *parts, eps=resnet20.EPSILON)

    def block(x, path, stride):
        y = functional.conv2d(x, w[f"{path}/conv1/kernel"], stride=stride, padding=1)
        y = functional.conv2d(functional.relu(norm(y, f"{path}/norm1")), w[f"{path}/conv2/kernel"], padding=1)
        if f"{path}/shortcut/conv/kernel" in w:
            x = functional.conv2d(x, w[f"{path}/shortcut/conv/kernel"], stride=stride)
            x = norm(x, f"{path}/shortcut/norm")
        return functional.relu(norm(y, f"{path}/norm2") + x)

    def resnet(x):
        x = functional.relu(norm(functional.conv2d(x, w["conv1/kernel"], padding=1), "norm1"))
        for stage in resnet20.STAGES:
            for i in resnet20.BLOCKS:
                x = block(x, f"{stage}/{i}", 2 if i == "0" and stage != "stage1" else 1)
        return functional.linear(x.mean((2, 3)), w["classifier/kernel"], w["classifier/bias"])

    def mlp(x):
        x = functional.relu(functional.linear(functional.relu(functional.linear(x, w["fc1"])), w["fc2"]))
        return functional.linear(x, w["fc3"])

    return {"resnet20": resnet, "mlpnet": mlp}[args.network], [w[path] for path in chosen]


def torch_loop(n=args.examples):
    """G by batch-1 backward passes; its rows have PyTorch's order within a leaf."""
    import torch

    torch.set_num_threads(1)
    network, weights = torch_network()
    x = torch.tensor(images if images.ndim == 2 else np.ascontiguousarray(images.transpose(0, 3, 1, 2)))
    y = torch.tensor(labels).long()
    gradients = np.empty((n, sum(p.numel() for p in weights)), np.float32)
    for i in range(n):
        found = torch.autograd.grad(torch.nn.functional.cross_entropy(network(x[i : i + 1]), y[i : i + 1]), weights)
        at = 0
        for g in found:
            gradients[i, at : at + g.numel()] = g.reshape(-1).numpy()
            at += g.numel()
    return gradients


LOOPS = {"pruneopt": ours} | ({"torch": torch_loop} if has_torch else {})


def resident():
    line = next(x for x in Path("/proc/self/status").read_text().splitlines() if x.startswith("VmHWM"))
    return 1024 * int(line.split()[1])


if args.memory_of:
    LOOPS[args.memory_of](32)  # what a first call leaves behind: compiled programs, threads' buffers
    before = resident()
    LOOPS[args.memory_of]()
    print(resident() - before)
    sys.exit()


def clocked(fn):
    wall, cpu = time.perf_counter(), time.process_time()
    out = fn()
    return out, time.perf_counter() - wall, time.process_time() - cpu


def medians(jobs):
    """{name: (result, wall, CPU)}, medians of interleaved rounds after one, or of that one."""
    times = {name: [] for name in jobs}
    results = {}
    for i in range(args.rounds + 1):
        for name, job in jobs.items():
            results[name], *spent = clocked(job)
            times[name] += [spent] if i or not args.rounds else []
    return {name: (results[name], *map(statistics.median, zip(*times[name], strict=True))) for name in jobs}


print(f"{args.network}, {args.examples} examples, one thread; medians of {args.rounds} interleaved runs after one")
if "gradients" in parts:
    found = medians(LOOPS)
    size = found["pruneopt"][0].nbytes
    print(f"per-example gradients {found['pruneopt'][0].shape}, {size / 1e6:.0f} MB")
    for name, (_, wall, cpu) in found.items():
        command = [sys.executable, __file__, "--memory-of", name, "--network", args.network]
        command += ["--examples", str(args.examples)]
        peak = int(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
        print(f"  {name:<10} wall {wall:7.2f} s   CPU {cpu:7.2f} s   peak memory {peak / size:.2f} of the matrix")
    if has_torch:
        wall, cpu = (found["torch"][i] / found["pruneopt"][i] for i in (1, 2))
        ours_norms, theirs = (np.linalg.norm(found[name][0], axis=1) for name in ("pruneopt", "torch"))
        apart = np.max(np.abs(ours_norms - theirs)) / np.max(theirs)
        print(f"  ratio      wall {wall:7.2f}     CPU {cpu:7.2f}     norms differ by {apart:.1e} of the largest")
    gradients = np.asarray(found["pruneopt"][0])
else:
    gradients = np.asarray(ours())

layout = empirical_fisher(loss, params, [(images[:2], labels[:2])], leaves).layout
peers = Path(os.environ["PEERS"]) if has_torch and os.environ.get("PEERS") else None


def flat(tree):
    return np.concatenate([x.reshape(-1) for x in jax.tree.leaves(tree)])


def peer(folder, module):
    """A module of a peer's own code, run by itself; what it imports and does not use here is left empty."""
    unused = {"flatten_tensor_list", "get_summary_stats", "get_total_sparsity"}
    sys.modules["utils.utils"] = SimpleNamespace(**dict.fromkeys(unused))
    sys.modules["policies.pruners"] = SimpleNamespace(GradualPruner=object)
    spec = importlib.util.spec_from_file_location(folder, peers / folder / f"{module}.py")
    found = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(found)
    return found


def compare(title, jobs, exact):
    print(f"{title}, ridge {args.ridge:g}")
    timed = medians(jobs)
    for name, (diagonal, wall, cpu) in timed.items():
        error = np.max(np.abs(diagonal - exact) / exact)
        print(f"  {name:<10} wall {wall:7.2f} s   CPU {cpu:7.2f} s   largest relative error {error:.1e}")
    if len(timed) == 2:
        (_, wall, cpu), (_, theirs, their_cpu) = timed.values()
        print(f"  ratio      wall {theirs / wall:7.2f}     CPU {their_cpu / cpu:7.2f}")


def ours_blocks(g):
    return flat(BlockDiagonal.of(LowRank(g, layout), args.block).inverse_diagonal(args.ridge))


def woodfisher():
    """The recursion of WoodFisher's split blocks, called as its pruner calls it."""
    import torch

    settings = SimpleNamespace(
        aux_gpu_id=-1, fisher_cpu=True, fisher_damp=args.ridge, fisher_optimized=False, offload_inv=False
    )
    of = peer("IST-DASLab+WoodFisher", "pruners/woodfisherblock").BlockwiseWoodburryFisherPruner
    parts = []
    for place in layout.places.values():
        pruner = SimpleNamespace(args=settings, _num_grads=len(gradients), _goal=len(gradients))
        pruner._all_grads_dic = {0: torch.tensor(gradients[:, place])}
        for start in range(0, place.stop - place.start, args.block):
            end = min(start + args.block, place.stop - place.start)
            inverse = of._compute_split_block_woodburry_fisher_inverse(pruner, 0, start, end, "cpu")
            parts.append(inverse.diagonal().numpy().copy())
    return np.concatenate(parts)


if "inverse" in parts:
    jobs = {"pruneopt": lambda: flat(LowRank(gradients, layout).inverse_diagonal(args.ridge))}
    if peers:
        import torch

        swap = peer("IST-DASLab+M-FAC", "prun").HInvFastSwap
        cpu = torch.device("cpu")
        jobs["M-FAC"] = lambda: swap(torch.tensor(gradients), damp=args.ridge, gpu=cpu).diag().numpy()
    exact = flat(LowRank(gradients.astype(np.float64), layout).inverse_diagonal(args.ridge))
    compare("diagonal of the inverse", jobs, exact)
if "blocks" in parts:
    jobs = {"pruneopt": lambda: ours_blocks(gradients)} | ({"WoodFisher": woodfisher} if peers else {})
    exact = []
    for place in layout.places.values():
        for start in range(place.start, place.stop, args.block):
            part = gradients[:, start : min(start + args.block, place.stop)].astype(np.float64)
            exact.append(np.diagonal(np.linalg.inv(part.T @ part / len(part) + args.ridge * np.eye(part.shape[1]))))
    compare(f"diagonal of the inverse in blocks of {args.block}", jobs, np.concatenate(exact))
