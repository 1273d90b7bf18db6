"""What pruning changed: counts by hand, FLOPs against XLA's own, redundancy against networks made redundant."""

import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import pruneopt as po
from pruneopt.constraints import Cardinality
from pruneopt.delivery.timings import Timing, reasons
from pruneopt.structure.cost import cost, flops
from pruneopt.structure.graph import trace
from pruneopt.structure.stopwatch import Compiled, Seconds, race, resized

pytestmark = pytest.mark.default_flags
RNG = np.random.default_rng(0)


def normal(*shape):
    return jnp.asarray(RNG.standard_normal(shape), jnp.float32)


def xla_flops(fn, params, batch):
    return jax.jit(fn).lower(params, batch).compile().cost_analysis()["flops"]


def dense(p, x):
    return (x @ p["w1"]) @ p["w2"]


def convolution(p, x):
    x = jax.lax.conv_general_dilated(x, p["k"], (2, 1), "VALID", dimension_numbers=("NHWC", "HWIO", "NHWC"))
    return x.reshape(x.shape[0], -1) @ p["w"]


def grouped(p, x):
    return jax.lax.conv_general_dilated(
        x, p["k"], (1, 1), "VALID", dimension_numbers=("NHWC", "HWIO", "NHWC"), feature_group_count=2
    )


def attention(p, x):
    q, k, v = (jnp.einsum("btd,dhe->bthe", x, p[n]) for n in "qkv")
    mixed = jnp.einsum("bhst,bthe->bshe", jnp.einsum("bshe,bthe->bhst", q, k), v)
    return jnp.einsum("bshe,hed->bsd", mixed, p["o"])


NETWORKS = {
    "dense": (dense, {"w1": normal(8, 16), "w2": normal(16, 4)}, normal(5, 8)),
    "strided convolution": (convolution, {"k": normal(3, 3, 4, 6), "w": normal(144, 3)}, normal(2, 10, 8, 4)),
    "grouped convolution": (grouped, {"k": normal(3, 3, 2, 6)}, normal(2, 9, 9, 4)),
    "attention": (attention, {"q": normal(8, 2, 4), "k": normal(8, 2, 4), "v": normal(8, 2, 4), "o": normal(2, 4, 8)},
                  normal(3, 5, 8)),
}  # fmt: skip


@pytest.mark.parametrize("name", NETWORKS)
def test_flops_equal_xla_on_dots_and_valid_convolutions(name):
    fn, params, batch = NETWORKS[name]
    counted = flops(fn, params, batch)
    assert sum(counted.values()) == pytest.approx(xla_flops(fn, params, batch), rel=1e-6)
    assert set(counted) - {""} == set(params)


def test_flops_are_charged_through_calls_layouts_and_scans():
    layers = normal(3, 6, 6)
    mask = jnp.ones((6, 6))

    @jax.checkpoint
    def block(w, x):
        return jax.nn.gelu(x @ (w * mask).T)

    def fn(p, x):
        x, _ = jax.lax.scan(lambda h, w: (jax.jit(block)(w, h), None), x, p["stack"])
        return jax.lax.cond(x.sum() > 0, lambda h: h @ p["out"].astype(jnp.float32), lambda h: h[:, :2], x)

    counted = flops(fn, {"stack": layers, "out": normal(6, 2).astype(jnp.bfloat16)}, normal(5, 6))
    assert counted == {"stack": 3 * 2 * 5 * 6 * 6, "out": 2 * 5 * 6 * 2}


def test_report_counts_by_hand():
    fn, params, batch = NETWORKS["dense"]
    pruned = po.prune(None, params, None, Cardinality(sparsity=0.75, per="leaf"), progress=False)
    r = po.report(fn, params, pruned, batch, repeats=3)
    assert (r.parameters, r.kept) == (192, 48)
    assert r.sparsity == 0.75
    assert (r.flops_dense, r.flops_kept, r.flops_shrunk) == (2 * 5 * 192, 2 * 5 * 48, None)
    assert (r.bytes_dense, r.bytes_stored) == (768, 48 * 4 + 192 // 8)
    assert [(t.size, t.program) for t in r.timings] == [(n, p) for n in (1, 32, 256) for p in ("dense", "masked")]
    assert all(t.seconds.median > 0 and len(t.seconds.rounds) == 3 for t in r.timings)
    text = str(r)
    assert "75.00%" in text
    assert "zeros are multiplied" in text
    assert po.report(None, params, pruned).flops_dense is None
    assert po.report(fn, params, pruned, batch, repeats=0).timings == ()


@pytest.mark.slow
def test_report_of_a_smaller_network():
    fn, params, batch = NETWORKS["dense"]
    small = po.shrink_units(fn, params, batch, {("w1", 1): range(0, 16, 2)})
    r = po.report(fn, params, small, batch, sizes=(2, 7), repeats=3)
    assert (r.parameters, r.kept, r.flops_shrunk, r.bytes_shrunk) == (192, 96, 2 * 5 * 96, 4 * 96)
    assert (r.activations_dense, r.activations_shrunk) == (4 * 5 * (8 + 16), 4 * 5 * (8 + 8))
    assert [(t.size, t.program) for t in r.timings] == [(n, p) for n in (2, 7) for p in ("dense", "masked", "shrunk")]
    for n in (2, 7):
        compiled = jax.jit(fn).lower(small.params, jnp.resize(batch, (n, 8))).compile().memory_analysis()
        memory = r.timing("shrunk", n).memory
        assert (memory.arguments, memory.outputs) == (4 * (96 + 8 * n), 4 * 4 * n)
        assert memory.temporary == compiled.temp_size_in_bytes
    masked = po.from_masks(params, {"w1": np.arange(16) % 2 == 0 + np.zeros((8, 1)), "w2": None})
    both = po.report(fn, params, masked, batch, small=small, sizes=(), repeats=3)
    assert (both.timing("shrunk").size, both.kept, both.flops_shrunk) == (None, 128, 960)


class TestWhy:
    """Where nothing was gained, the report says why: here of seconds made up."""

    @pytest.fixture(autouse=True)
    def network(self):
        self.params = {"w1": normal(8, 16), "w2": normal(16, 4)}
        self.batch = normal(5, 8)

    def why(self, small=None, mask=None, empty=0.1, faster=(1.0, 1.0, 1.0)):
        work = cost(trace(dense, self.params, self.batch), {} if mask is None else {"w1": mask})
        cut = None if small is None else cost(trace(small.fn, small.params, self.batch))
        ran = Seconds((1.0,)), None, Seconds((empty,))
        found = [Timing(n, "masked", ran[0], faster[0], *ran[1:]) for n in (1, 32)]
        found += [Timing(n, "shrunk", ran[0], f, *ran[1:]) for n, f in zip((1, 32), faster[1:], strict=True) if small]
        return "\n".join(reasons(found, work, small, cut))

    def cut(self, units):
        return po.shrink_units(dense, self.params, self.batch, {("w1", 1): range(units)})

    def test_of_zeros(self):
        mask = np.ones((8, 16), bool)
        mask[0, 0] = False
        assert "no operator lost a whole input or output" in self.why(mask=mask)
        assert "1 of 2 operators lost whole inputs or outputs" in self.why(mask=mask & (np.arange(16) % 2 == 0))

    def test_no_unit_went(self):
        small = po.shrink(dense, self.params, self.batch, {"w1": np.arange(16) % 17 < np.arange(9, 17)[:, None]})
        assert "at batch 1 and batch 32: no whole unit went" in self.why(small)

    def test_too_small_a_network(self):
        assert "at batch 1 and batch 32: the network is too small" in self.why(self.cut(8), empty=0.8)

    def test_too_few_of_the_flops_went(self):
        assert "batch 32: the units that went had 6.2 % of the FLOPs" in self.why(self.cut(15), faster=(1, 1.1, 1.04))
        assert "shrunk" not in self.why(self.cut(15), faster=(1, 1.1, 1.1))

    @pytest.mark.slow
    def test_no_multiples_of_eight(self):
        said = self.why(self.cut(7))
        assert "FLOPs fell 2.29 times" in said
        assert "the widths 7 are no multiples of 8" in said
        assert "multiples" not in self.why(self.cut(8))

    def test_a_busy_machine(self):
        assert "differ by 30%" in self.why(faster=(1.3, 1, 1))
        assert "busy" not in self.why(faster=(1.05, 1, 1))

    def test_stands_in_the_report(self):
        pruned = po.from_masks(self.params, {"w1": np.arange(16) % 2 == np.zeros((8, 1))})
        r = po.report(dense, self.params, pruned, self.batch, sizes=(3,), repeats=1)
        assert "1 of 2 operators lost whole inputs or outputs" in str(r)


def test_seconds_are_compared_round_by_round():
    a, b = Seconds((1.0, 2.0, 8.0)), Seconds((1.0, 1.0, 2.0))
    assert (a.median, a.over(b), a.quartiles) == (2.0, 2.0, (1.5, 5.0))


def test_a_race_gives_each_its_turn():
    order = []
    calls = {name: lambda name=name: order.append(name) or time.sleep(0.002) for name in "abc"}
    found = race(calls, 4)
    assert order[6:] == list("abcbcacababc")
    assert all(len(seconds.rounds) == 4 and min(seconds.rounds) >= 0.002 for seconds in found.values())


def test_batches_are_tiled_and_cut_along_their_examples():
    batch = {"ids": np.arange(6).reshape(3, 2), "labels": jnp.arange(3), "rate": 0.5, "names": ["a", "b", "c"]}
    larger, smaller = resized(batch, 7), resized(batch, 2)
    np.testing.assert_array_equal(larger["labels"], [0, 1, 2, 0, 1, 2, 0])
    np.testing.assert_array_equal(larger["ids"][:, 0], [0, 2, 4, 0, 2, 4, 0])
    np.testing.assert_array_equal(smaller["ids"], [[0, 1], [2, 3]])
    assert larger["rate"] == 0.5


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells")
def test_the_measured_peak_is_what_the_compiler_laid_out():
    def fn(p, x):
        h = jnp.sin(x @ p["w"])  # 32 MiB, read twice
        return h.sum() + (h * h[::-1]).max()

    memory = Compiled(fn, {"w": jnp.ones((8, 2048))}, jnp.ones((4096, 8))).memory()
    assert memory.temporary > 30 << 20
    assert memory.peak == pytest.approx(memory.arguments + memory.temporary, rel=0.2)


REFUSED = {
    "no shared axis": ({"batch": (jnp.ones((5, 8)), jnp.ones(3)), "sizes": (2,)}, ValueError, "first axes"),
    "size 0": ({"sizes": (0,)}, ValueError, "sizes"),
    "a size that fn does not take": ({"fn": lambda p, x: x.reshape(5, 8) @ p["w1"]}, ValueError, "with 1 examples"),
    "small of another kind": ({"small": {}}, TypeError, "small is a dict"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refusals(name):
    changed, error, words = REFUSED[name]
    _, params, batch = NETWORKS["dense"]
    pruned = po.prune(None, params, None, Cardinality(sparsity=0.75), progress=False)
    first = lambda p, b: dense(p, b[0] if isinstance(b, tuple) else b)  # noqa: E731
    given = {"fn": first, "params": params, "pruned": pruned, "batch": batch} | changed
    with pytest.raises(error, match=words):
        po.report(**given)


def loss(p, batch):
    x, y = batch
    return jnp.mean((jax.nn.relu(x @ p["w1"]) @ p["w2"] - y) ** 2)


def test_redundancy_finds_what_was_planted():
    w1, w2 = np.array(normal(10, 8)), np.array(normal(8, 3))
    w1[:, 1] = 0  # a zero output
    w1[:, 2] = -3 * w1[:, 0]  # a twin
    w1[4] = 0  # an input that nobody reads
    w1[:, 5] = -np.abs(w1[:, 5])  # silent on positive inputs
    x = jnp.abs(normal(40, 10))
    layers = po.redundancy(
        loss,
        {"w1": jnp.asarray(w1), "w2": jnp.asarray(w2)},
        [(x[:25], normal(25, 3)), (x[25:], normal(15, 3))],
        tolerance=0.0,
    ).layers
    first, second = layers
    assert (first.zero_inputs, first.zero_outputs, first.duplicate_outputs) == (1, 1, 1)
    assert first.silent_outputs == 2 + (np.asarray(x @ w1[:, [0, 2]]) <= 0).all(0).sum()
    assert first.free >= 10 + 10 + 6  # the zero output, the silent one, the unread input
    assert first.rank == np.linalg.matrix_rank(w1)
    s = np.linalg.svd(w1, compute_uv=False)
    s = s[s > 0] / s.sum()
    assert first.effective_rank == pytest.approx(np.exp(-np.sum(s * np.log(s))), rel=1e-5)
    assert second.free >= 2 * 3  # what the zero and the silent unit feed
    assert "w1" in str(po.redundancy(None, {"w1": jnp.asarray(w1)}))
    for bad in ({"tolerance": -1.0}, {"similarity": 0.0}):
        with pytest.raises(ValueError, match=next(iter(bad))):
            po.redundancy(None, {"w1": jnp.asarray(w1)}, **bad)
