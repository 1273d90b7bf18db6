"""Latency tables: with FLOPs in the place of seconds, sums are those of networks written by hand; files; refusals."""

import importlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import pruneopt as po
from pruneopt.structure import stopwatch

TABLES = importlib.import_module("pruneopt.structure.latency")  # `latency` itself is the function
RNG = np.random.default_rng(0)


def arrays(**shapes):
    return {name: jnp.asarray(RNG.standard_normal(shape)) for name, shape in shapes.items()}


def mlp(p, x):
    h = jnp.tanh(x @ p["a"] + p["b"][None])
    h = jnp.tanh(h @ p["c"])
    return h @ p["d"]


def residual(p, x):
    x = x @ p["stem"]
    for i in "123":
        x = x + jax.nn.relu(x @ p[f"up{i}"]) @ p[f"down{i}"]
    return x @ p["head"]


MLP = {"a": (5, 16), "b": (16,), "c": (16, 12), "d": (12, 3)}
RESIDUAL = {"stem": (5, 8), "head": (8, 3)} | {f"up{i}": (8, 16) for i in "123"} | {f"down{i}": (16, 8) for i in "123"}


def group(fn, params, batch, path, axis):
    (found,) = po.structure.trace(fn, params, batch).units().of(path, axis)
    return found


def flops(fn, params, batch):
    return (jax.jit(fn).lower(params, batch).compile().cost_analysis() or {}).get("flops", 0.0)


@pytest.fixture
def counted(monkeypatch):
    """FLOPs that XLA counts, products and sums alone, in the place of seconds; how many programs were measured."""
    measured = []

    def race(calls, repeats, limit, clock):
        measured.append(len(calls) - 2)
        costs = {name: (getattr(c, "_run", None) or c._compiled).cost_analysis() for name, c in calls.items()}
        return {name: stopwatch.Seconds(((cost or {}).get("flops", 0.0),)) for name, cost in costs.items()}

    monkeypatch.setattr(TABLES, "race", race)
    return measured


class TestSums:
    def test_of_layers_in_turn(self, counted):
        params, batch = arrays(**MLP), arrays(x=(7, 5))["x"]
        first, second = group(mlp, params, batch, "a", 1), group(mlp, params, batch, "c", 1)
        table = po.structure.latency(mlp, params, batch, [first, second])
        assert [(b.name, b.groups, b.seconds.shape) for b in table.blocks] == [
            ("a", (first,), (2,)),
            ("c", (first, second), (2, 4)),
            ("d", (second,), (4,)),
        ]
        assert table.grid == {first: (8, 16), second: (3, 6, 9, 12)}
        assert (table.scale, table.size) == (pytest.approx(1), 7)
        for n, m in ((8, 3), (16, 9), (8, 12)):
            hand = arrays(a=(5, n), b=(n,), c=(n, m), d=(m, 3))
            assert table.predict({first: n, second: m}) == pytest.approx(flops(mlp, hand, batch))
        assert table.predict({}) == pytest.approx(flops(mlp, params, batch))
        assert table.predict({first: 8}, whole=2 * table.whole) == pytest.approx(2 * table.predict({first: 8}))
        assert table.blocks[1].at({first: 8}) == table.blocks[1].seconds[0, 3]
        named = po.structure.latency(mlp, params, batch, {"a[1]": [8], "d[0]": [3, 6, 9]})  # an axis of each group
        assert (named.grid, named.whole) == (table.grid, table.whole)

    def test_of_residual_blocks_that_are_alike(self, counted):
        params, batch = arrays(**RESIDUAL), arrays(x=(7, 5))["x"]
        inner = {group(residual, params, batch, f"up{i}", 1): (4, 8) for i in "123"}
        table = po.structure.latency(residual, params, batch, inner)
        assert [(b.name, len(b.groups)) for b in table.blocks] == [
            ("stem", 0),
            ("up1", 1),
            ("up2", 1),
            ("up3", 1),
            ("head", 0),
        ]
        assert counted == [1 + 3 + 1]
        widths = dict(zip(inner, (4, 8, 16), strict=True))
        hand = params | arrays(up1=(8, 4), down1=(4, 8), up2=(8, 8), down2=(8, 8))
        assert table.predict(widths) == pytest.approx(flops(residual, hand, batch))

    def test_with_the_stream(self, counted):
        params, batch = arrays(**RESIDUAL), arrays(x=(7, 5))["x"]
        groups = {group(residual, params, batch, "stem", 1): (4,), group(residual, params, batch, "up2", 1): (0, 8)}
        table = po.structure.latency(residual, params, batch, groups)
        assert [b.seconds.shape for b in table.blocks] == [(2,), (2,), (2, 3), (2,), (2,)]
        hand = {name: np.ones([4 if n == 8 else n for n in leaf.shape]) for name, leaf in params.items()}
        hand |= {"up2": np.ones((4, 8)), "down2": np.ones((8, 4))}
        assert table.predict(dict(zip(groups, (4, 8), strict=True))) == pytest.approx(flops(residual, hand, batch))


def test_seconds_are_measured():
    params, batch = arrays(**MLP), arrays(x=(7, 5))["x"]
    groups = [group(mlp, params, batch, "a", 1)]
    table = po.structure.latency(mlp, params, batch, groups, repeats=2)
    assert all(np.all(block.seconds > 0) for block in table.blocks)
    assert table.predict({groups[0]: 8}) > 0
    assert "a (axis 1 of 'a'): 8: " in str(table)


class TestFile:
    @pytest.fixture(autouse=True)
    def table(self, counted, tmp_path, flags):
        self.params, self.batch, self.file = arrays(**MLP), arrays(x=(7, 5))["x"], tmp_path / "table"
        self.groups = [group(mlp, self.params, self.batch, path, 1) for path in "ac"]
        self.counted = counted
        self.first = self.measure()

    def measure(self, batch=None, groups=None):
        batch = self.batch if batch is None else batch
        return po.structure.latency(mlp, self.params, batch, groups or self.groups, file=self.file)

    def test_is_measured_once(self):
        again = self.measure(batch=self.batch + 1)
        assert len(self.counted) == 1
        widths = {self.groups[0]: 8, self.groups[1]: 6}
        assert again.predict(widths) == self.first.predict(widths)
        assert str(again) == str(self.first)

    def test_of_another_network_batch_or_grid(self):
        with pytest.raises(ValueError, match="no table of this network"):
            self.measure(batch=self.batch[:3])
        with pytest.raises(ValueError, match="no table of this network"):
            self.measure(groups=self.groups[:1])

    def test_of_another_device(self, monkeypatch):
        monkeypatch.setattr(TABLES, "device", lambda: "abacus")
        with pytest.raises(ValueError, match="this is abacus; pass another name"):
            self.measure()

    def test_that_is_damaged(self):
        whole = self.file.read_bytes()
        for broken in (whole[:-1], whole[:-1] + bytes([whole[-1] ^ 1]), b""):
            self.file.write_bytes(broken)
            with pytest.raises(ValueError, match="is damaged"):
                self.measure()


class TestRefusals:
    @pytest.fixture(autouse=True)
    def network(self, counted, flags):
        self.params, self.batch = arrays(**MLP), arrays(x=(7, 5))["x"]
        self.units = po.structure.trace(mlp, self.params, self.batch).units()

    def refused(self, groups, words):
        with pytest.raises(ValueError, match=words):
            po.structure.latency(mlp, self.params, self.batch, groups)

    def test_groups(self):
        self.refused([self.units.of("d", 1)[0]], r"axis 1 of 'd' cannot be cut: it is an output")
        self.refused([("a", 1)], "is no group of fn")
        other = group(residual, arrays(**RESIDUAL), self.batch, "up1", 1)
        self.refused([other], "is no group of fn")
        self.refused([], "groups is empty")

    def test_widths(self):
        (first,) = self.units.of("a", 1)
        (second,) = self.units.of("c", 1)
        self.refused({first: (4, 17)}, r"widths \[4, 17\] of axis 1 of 'a'; pass whole numbers, 0 to 16")
        table = po.structure.latency(mlp, self.params, self.batch, [first])
        with pytest.raises(ValueError, match="7 of axis 1 of 'a' is not on its grid, which is 8, 16"):
            table.predict({first: 7})
        with pytest.raises(ValueError, match="no group of axis 1 of 'c'; there are axis 1 of 'a'"):
            table.predict({second: 3})

    def test_too_many_programs(self, monkeypatch):
        monkeypatch.setattr(TABLES, "_MOST", 7)
        self.refused([*self.units.of("a", 1), *self.units.of("c", 1)], "block 'c' holds 2 groups and would need 8")


@pytest.mark.slow
def test_the_report_prints_what_was_predicted(counted):
    params, batch = arrays(**MLP), arrays(x=(7, 5))["x"]
    first, second = group(mlp, params, batch, "a", 1), group(mlp, params, batch, "c", 1)
    table = po.structure.latency(mlp, params, batch, [first, second])
    small = po.shrink_units(mlp, params, batch, {("a", 1): range(8)})
    r = po.report(mlp, params, small, batch, sizes=(2, 7), repeats=1, latency=table)
    now = r.timing("dense", 7).seconds.median
    assert r.timing("shrunk", 7).predicted == pytest.approx(table.predict({first: 8}, whole=now))
    assert r.timing("shrunk", 2).predicted is None
    assert f"{1e3 * r.timing('shrunk', 7).predicted:.3f} ms predicted" in str(r)
    odd = po.shrink_units(mlp, params, batch, {("a", 1): range(7)})
    assert po.report(mlp, params, odd, batch, sizes=(7,), repeats=1, latency=table).timing("shrunk").predicted is None
