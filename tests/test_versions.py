"""Every body that a JAX primitive carries is read for what it is: NumPy's values, no leaf lost, the unknown refused."""

from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.extend.core import Primitive, primitives
from jax.sharding import AxisType, PartitionSpec

from pruneopt.capture.statistics import capture
from pruneopt.program import versions
from pruneopt.program.flatten import flatten
from pruneopt.program.segment import Segment
from pruneopt.structure import cost
from pruneopt.structure.graph import trace

RNG = np.random.default_rng(0)
X, A, B = (RNG.normal(size=shape) for shape in ((6, 4), (4, 4), (4, 4)))
STACK, SHARED, SHIFTS = RNG.normal(size=(3, 4, 4)), RNG.normal(size=(4, 4)), RNG.normal(size=(3, 4))


def layer(w, x):
    return jnp.tanh(x @ w)


def _scan(p, x, reverse):
    def step(h, layer):
        w, b = layer
        h = jnp.tanh(h @ w @ p["shared"] + jnp.broadcast_to(b, h.shape))
        return h, h.sum(1)

    h, ys = lax.scan(step, x, (p["stack"], p["shifts"]), reverse=reverse)
    return h, ys


def _scan_by_numpy(p, x, reverse):
    ys = {}
    for i in range(3)[::-1] if reverse else range(3):
        x = np.tanh(x @ p["stack"][i] @ p["shared"] + p["shifts"][i])
        ys[i] = x.sum(1)
    return x, np.stack([ys[i] for i in range(3)])


def _closed_call(w, x):
    bound = primitives.closed_call_p.get_bind_params({"call_jaxpr": jax.make_jaxpr(layer)(w, x)})
    return primitives.closed_call_p.bind(w, x, **bound)[0]


def _custom_vjp(w, x):
    wrapped = jax.custom_vjp(layer)
    wrapped.defvjp(lambda w, x: (layer(w, x), (w, x)), lambda kept, g: kept)
    return wrapped(w, x)


def _custom_jvp(w, x):
    wrapped = jax.custom_jvp(layer)
    wrapped.defjvp(lambda primals, tangents: (layer(*primals), layer(*primals)))
    return wrapped(w, x)


def _shard_map(w, x):
    mesh = jax.make_mesh((1,), ("i",), axis_types=(AxisType.Auto,))
    rows = PartitionSpec("i")

    def shard(w, x):
        return layer(w, x) + 0 * lax.psum(x, "i")

    return jax.shard_map(shard, mesh=mesh, in_specs=(PartitionSpec(), rows), out_specs=rows)(w, x)


def _numpy_call(p, x):
    return (np.tanh(x @ p["a"]) @ p["b"],)


def _calls(wrapped):
    return lambda p, x: (wrapped(p["a"], x) @ p["b"],), {"a": A, "b": B}, _numpy_call, {"a": 1, "b": 1}


LOOPED = {"stack": STACK, "shared": SHARED, "shifts": SHIFTS}
# (fn, params, the same by NumPy, {leaf: how many operators read it}); the shifts of the scan are added, not multiplied.
CASES = {
    "scan": (
        lambda p, x: _scan(p, x, False),
        LOOPED,
        lambda p, x: _scan_by_numpy(p, x, False),
        {"stack": 3, "shared": 1},
    ),
    "scan in reverse": (
        lambda p, x: _scan(p, x, True),
        LOOPED,
        lambda p, x: _scan_by_numpy(p, x, True),
        {"stack": 3, "shared": 1},
    ),
    "closed call": _calls(_closed_call),
    "custom vjp": _calls(_custom_vjp),
    "custom jvp": _calls(_custom_jvp),
    "remat": _calls(jax.checkpoint(layer)),
    "composite": _calls(lax.composite(layer, "my.layer")),
    "shard map": _calls(_shard_map),
}


@pytest.mark.parametrize("name", CASES)
class TestKnown:
    def test_the_straight_line_computes_what_numpy_does(self, name):
        fn, params, by_numpy, _ = CASES[name]
        program = flatten(fn, params, X)
        env = {v: params[p] for p, v in program.leaves.items()} | program.constants | {program.batch[0]: X}
        found = Segment(program, program.equations, program.outputs).run(env)
        for one, other in zip(found, by_numpy(params, X), strict=True):
            np.testing.assert_allclose(one, other, rtol=1e-12, atol=1e-14)

    def test_no_leaf_is_lost(self, name):
        fn, params, _, readers = CASES[name]
        graph = trace(fn, params, X)
        assert graph.program.leaves.keys() == params.keys()
        assert {p: sum(p in op.paths for op in graph.operators) for p in readers} == readers
        assert not graph.refusals
        assert sum(op.size for op in graph.operators) == sum(params[p].size for p in readers)

    def test_its_flops_are_counted_by_hand(self, name):
        fn, params, _, readers = CASES[name]
        times = 3 if "stack" in readers else 1
        assert cost(trace(fn, params, X)).by_leaf == dict.fromkeys(readers, 2 * 6 * 4 * 4 * times)


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.slow
def test_the_gram_of_each_step_of_a_scan_is_numpys(reverse):
    found = capture(lambda p, x: _scan(p, x, reverse)[0], LOOPED, [X])
    h = X
    for i in range(3)[::-1] if reverse else range(3):
        np.testing.assert_allclose(found[f"stack[{i}]"].gram, (h.T @ h / 6)[None], rtol=1e-12, atol=1e-13)
        h = np.tanh(h @ STACK[i] @ SHARED + SHIFTS[i])


def test_a_loop_that_stays_whole_is_counted_by_its_length():
    def fn(p, x):
        return lax.scan(lambda h, _: (jnp.tanh(h @ p["shared"]), None), x, None, length=5000)[0]

    graph = trace(fn, {"shared": SHARED}, X)
    assert [(r.primitive, r.paths) for r in graph.refusals] == [("scan", ("shared",))]
    assert cost(graph).by_leaf == {"shared": 5000 * 2 * 6 * 4 * 4}


class TestUnknown:
    """A primitive that no version known here has, or one whose parameters changed."""

    @staticmethod
    def call(name, body):
        primitive = Primitive(name)
        primitive.multiple_results = True
        primitive.def_abstract_eval(lambda *avals, **params: body.out_avals)
        return primitive

    @pytest.mark.parametrize("wrap", [lambda body: body, lambda body: {"forward": (body,)}], ids=["plain", "nested"])
    def test_a_call_that_carries_a_jaxpr_is_refused_by_name(self, wrap):
        body = jax.make_jaxpr(layer)(A, X)
        mystery = self.call("mystery_call", body)
        graph = trace(lambda p, x: mystery.bind(p["a"], x, inside=wrap(body))[0] @ p["b"], {"a": A, "b": B}, X)
        assert [op.name for op in graph.operators] == ["b"]
        (refusal,) = graph.refusals
        assert (refusal.primitive, refusal.paths) == ("mystery_call", ("a",))
        assert "a call without a rule, whose parameter 'inside' is a body" in refusal.reason
        assert "mystery_call" in graph.why_not("a")

    def test_so_is_one_whose_body_holds_no_product_that_is_known(self):
        body = jax.make_jaxpr(lambda w, x: x + w.sum())(A, X)
        mystery = self.call("mystery_kernel", body)
        graph = trace(lambda p, x: mystery.bind(p["a"], x, inside=body)[0] @ p["b"], {"a": A, "b": B}, X)
        assert [(r.primitive, r.paths) for r in graph.refusals] == [("mystery_kernel", ("a",))]

    def test_a_scan_with_other_parameters_is_refused_by_name(self):
        loop = self.equation(lambda x: lax.scan(lambda h, w: (h @ w, None), x, STACK), X)
        assert versions.scan(loop)[1:] == (0, 1, 3, False, 1)
        known = {k: v for k, v in loop.params.items() if k in ("jaxpr", "length", "reverse", "unroll")}
        with pytest.raises(ValueError, match=r"scan, which has no parameter 'ft_in' here .it has jaxpr, length, rev"):
            versions.scan(loop.replace(params=known))
        with pytest.raises(ValueError, match=r"scan, which has 2 parts in its parameter 'ft_in' here"):
            versions.scan(loop.replace(params=known | {"ft_in": SimpleNamespace(unpack=lambda: ((0,), (0,)))}))

    def test_a_call_with_other_parameters_is_refused_by_name(self):
        call = self.equation(jax.jit(lambda x: jnp.tanh(x)), X)
        with pytest.raises(ValueError, match=r"jit, which has no parameter 'jaxpr' here .* install one of those"):
            versions.called(call.replace(params={"name": "f"}))
        with pytest.raises(ValueError, match="jit, which has no body in its parameter 'jaxpr'"):
            versions.called(call.replace(params={"jaxpr": jnp.tanh}))

    def test_a_body_of_other_arrays_is_refused_by_name(self):
        call = self.equation(jax.jit(lambda x: jnp.tanh(x)), X)
        other = jax.make_jaxpr(jnp.tanh)(X.T)
        with pytest.raises(ValueError, match="a body in 'jaxpr' that takes or gives other arrays than it"):
            versions.called(call.replace(params=call.params | {"jaxpr": other}))

    def test_a_rule_that_misses_a_parameter_says_which(self):
        equation = flatten(lambda p, x: x @ p["a"].T, {"a": A}, X).equations[0]
        assert equation.params["permutation"] == (1, 0)
        with pytest.raises(ValueError, match=r"transpose, which has no parameter 'order' here .it has permutation"):
            equation.params["order"]

    @staticmethod
    def equation(fn, *args):
        return jax.make_jaxpr(fn)(*args).jaxpr.eqns[0]
