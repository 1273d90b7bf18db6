"""Transformations of the user's optax loop: laws for all of them, then each against its own formulas."""

import inspect
import os
import subprocess
import sys
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import training_cases
from training_cases import ADAM, GRADIENT, HALF, KEPT, OPTIMIZERS, STEPS, batch, loss, of, params, trained

import pruneopt as po
from pruneopt import training as t
from pruneopt.constraints import NM, Cardinality, Slices
from pruneopt.penalties import L1, GroupLasso, Partition

# optax itself does not run under strict dtype promotion.
pytestmark = pytest.mark.default_flags
PRUNED = ("a/kernel", "b/kernel")


@pytest.fixture(autouse=True)
def float64(flags):
    with jax.enable_x64(True), jax.numpy_rank_promotion("raise"):
        yield


def named(tree):
    return dict(po._tree.named_leaves(tree))


def same(a, b, **tolerance):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        if tolerance:
            np.testing.assert_allclose(x, y, **tolerance)
        else:
            np.testing.assert_array_equal(x, y)


def test_every_transformation_is_in_the_registry():
    made = {
        n
        for n in t.__all__
        if inspect.isfunction(f := getattr(t, n)) and "SparseOptimizer" in str(inspect.signature(f))
    }
    assert made == set(OPTIMIZERS), "add a row to tests/training_cases.py"


@pytest.mark.parametrize("name", OPTIMIZERS)
class TestTransformation:
    def test_ends_at_the_count_with_exact_zeros(self, name):
        optimizer, kept = of(name), OPTIMIZERS[name][1]
        p, state, _ = trained(optimizer)
        done = optimizer.finish(p, state)
        assert jax.tree.structure(done.params) == jax.tree.structure(p)
        if kept is not None:
            assert done.kept == kept
        assert set(named(done.support)) <= set(PRUNED)
        for path, mask in named(done.support).items():
            assert mask.dtype == bool
            assert not np.any(np.asarray(named(done.params)[path])[~np.asarray(mask)])
        for path, leaf in named(p).items():
            if path not in named(done.support):
                np.testing.assert_array_equal(named(done.params)[path], leaf)
                assert np.any(np.asarray(leaf) != np.asarray(named(params())[path])), "the bias was not trained"

    @pytest.mark.slow
    def test_goes_on_from_a_checkpoint(self, name):
        optimizer = of(name)
        whole = trained(optimizer)
        p, state, _ = trained(optimizer, 5)
        leaves, structure = jax.tree.flatten((p, state))
        assert all(isinstance(x, jax.Array) for x in leaves), "a state holds only arrays"
        stored = [np.asarray(x) for x in leaves]  # what any checkpoint library writes
        p, state = jax.tree.unflatten(structure, [jnp.asarray(x) for x in stored])
        same(trained(optimizer, STEPS - 5, p, state, 5), whole)

    def test_lowers_the_loss(self, name):
        optimizer = of(name)
        p, state, _ = trained(optimizer, 60, data=lambda i: batch(0))
        final = optimizer.finish(p, state).params
        start = optimizer.finish(*trained(optimizer, STEPS, data=lambda i: batch(0))[:2]).params
        assert loss(final, batch(0)) < loss(start, batch(0))

    @pytest.mark.slow
    def test_keeps_dtypes_and_is_pure(self, name):
        optimizer = of(name)
        p = jax.tree.map(lambda x: x.astype(jnp.bfloat16), params())
        state = optimizer.init(p)
        update = jax.jit(optimizer.update)
        for _ in range(STEPS):
            before = jax.tree.map(np.array, (p, state))
            updates, new = update(p, state, p)  # as if the weights were their own gradient
            same((p, state), before)
            same((updates, new), update(p, state, p))
            assert jax.tree.map(lambda x: (x.shape, x.dtype), new) == jax.tree.map(lambda x: (x.shape, x.dtype), state)
            p, state = optax.apply_updates(p, updates), new
        done = optimizer.finish(p, state)
        for path, mask in named(done.support).items():
            assert named(done.params)[path].dtype == jnp.bfloat16
            assert not np.any(np.asarray(named(done.params)[path], np.float32)[~np.asarray(mask)])


@pytest.mark.parametrize("name", ["gradual", "admm", "l0"])
@pytest.mark.slow
def test_works_inside_a_chain_and_with_other_optimisers(name):
    make, kept = OPTIMIZERS[name]
    inner = make(optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(0.02, weight_decay=0.1)))
    p, state, _ = trained(optax.chain(optax.clip(1.0), inner))
    assert kept in (None, inner.finish(p, state).kept)


CHILD = """
import sys
sys.path[:0] = [{tests!r}, {root!r}]
import jax
jax.config.update("jax_enable_x64", True)
jax.config.update("jax_disable_most_optimizations", True)
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec as P
import training_cases as c
assert jax.device_count() == 8
mesh = Mesh(jax.devices(), ("data",))
whole, split = NamedSharding(mesh, P()), NamedSharding(mesh, P("data"))
for name, (make, _) in c.OPTIMIZERS.items():
    optimizer = make(c.ADAM())
    one = c.trained(optimizer, data=lambda i: c.batch(i))
    p = jax.device_put(c.params(), whole)
    state = jax.device_put(optimizer.init(p), whole)
    many = c.trained(optimizer, p=p, state=state, data=lambda i: jax.device_put(c.batch(i), split))
    for done in (one, many):
        assert all(np.isfinite(x).all() for x in jax.tree.leaves(done))
    a, b = (optimizer.finish(*jax.tree.map(np.asarray, done)[:2]) for done in (one, many))
    jax.tree.map(np.testing.assert_array_equal, a.support, b.support)
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-12, atol=1e-12), one, many)
    assert len(jax.tree.leaves(many[0])[0].sharding.device_set) == 8
    print("same", name)
"""


@pytest.mark.slow
def test_eight_devices_give_the_same_masks_and_values():
    here = Path(__file__).parent
    flags = {"XLA_FLAGS": "--xla_force_host_platform_device_count=8", "JAX_PLATFORMS": "cpu"}
    code = CHILD.format(tests=str(here), root=str(here.parent))
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=os.environ | flags)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split("\n")[:-1] == [f"same {name}" for name in OPTIMIZERS]


# ------------------------------------------------------------------------------------------------- the interval


@pytest.mark.parametrize(("begin", "end", "every"), [(0, 10, 2), (3, 10, 4), (5, 5, 3), (0, 7, 1), (2, 9, 100)])
@pytest.mark.slow
def test_interval_acts_when_it_says(begin, end, every):
    when = t.Interval(begin, end, every)
    steps = jnp.arange(end + 5, dtype=jnp.int32)
    due = np.flatnonzero(jax.vmap(when.is_due)(steps))
    np.testing.assert_array_equal(due, sorted({*range(begin, end, every), end}))
    assert when.stages == len(due)
    np.testing.assert_array_equal(jax.vmap(when.stage)(steps)[due], np.arange(len(due)))
    cuts = when.cubic()
    assert len(cuts) == len(due)
    np.testing.assert_allclose(cuts, 1 - (1 - np.arange(1, len(due) + 1) / len(due)) ** 3)


@pytest.mark.parametrize("constraint", [
    HALF, Cardinality(sparsity=0.75, per="out"), Cardinality(count=3, floor=1),
    Slices(0, Cardinality(sparsity=0.5, per="leaf")), po.constraints.ByPath({"a*": HALF, "*": NM(1, 5)}),
    po.constraints.Intersection((HALF, Cardinality(sparsity=0.6, per="leaf"))),
], ids=str)  # fmt: skip
@pytest.mark.slow
def test_a_traced_stage_selects_what_the_relaxed_constraint_does(constraint):
    scores = {k: jnp.abs(v) for k, v in named(params(3)).items() if k in PRUNED}
    cuts = [0.3, 0.3, 1.0]
    staged = jax.jit(lambda s, i: constraint.select_stage(s, cuts, i))
    for i, cut in enumerate(cuts):
        same(staged(scores, jnp.asarray(i)), constraint.relaxed(cut).select(scores))


# ------------------------------------------------------------------------------------------------- freeze


INNER = {
    "adamw": optax.adamw(0.02, weight_decay=0.3),
    "adabelief": optax.adabelief(0.02),
    "adagrad": optax.adagrad(0.02, initial_accumulator_value=0.1),
    "by group": optax.partition(
        {"k": optax.adam(0.02), "b": optax.sgd(0.1)}, {"a": {"kernel": "k", "bias": "b"}, "b": {"kernel": "k"}}
    ),
    "masked decay": optax.chain(
        optax.adam(0.02), optax.add_decayed_weights(-0.01, mask=lambda p: jax.tree.map(lambda x: x.ndim > 1, p))
    ),
    "noisy": optax.noisy_sgd(0.02, key=0),
}


@pytest.mark.parametrize("inner", INNER)
@pytest.mark.slow
def test_nothing_is_left_off_the_support(inner):
    mask = {"a/kernel": jnp.asarray(np.random.default_rng(1).random((4, 5)) < 0.5)}
    dense, optimizer = INNER[inner], t.freeze(INNER[inner], mask)
    p, warm, _ = trained(dense, 4)  # momentum everywhere
    p, update = po.apply(p, mask), jax.jit(optimizer.update)
    state = optimizer.init(p)._replace(inner=warm)  # a late freeze inherits it
    off = ~np.asarray(mask["a/kernel"])
    for _ in range(5):
        updates, state = update(jax.tree.map(jnp.cos, params()), state, p)
        p = optax.apply_updates(p, updates)
        assert not np.any(np.asarray(updates["a"]["kernel"])[off])
        assert not np.any(np.asarray(p["a"]["kernel"])[off])
        for leaf in jax.tree.leaves(state.inner):
            if leaf.shape == (4, 5):
                assert not np.any(np.asarray(leaf)[off])
                assert np.all(np.asarray(leaf)[~off] != 0) or inner == "noisy"
    assert np.all(np.asarray(p["a"]["kernel"])[~off] != 0)


@pytest.mark.slow
def test_states_are_masked_after_a_step_only_where_they_must_be():
    from pruneopt.training.base import keeps_zeros

    kept = {name: keeps_zeros(inner, params()) for name, inner in INNER.items()}
    assert kept == {name: name != "adabelief" for name in INNER}
    assert not keeps_zeros(optax.chain(optax.add_noise(0.1, 0.5, 0), optax.trace(0.9)), params())


@pytest.mark.slow
def test_on_the_support_it_is_the_optimiser_itself():
    """Against the same problem written with the kept weights alone."""
    mask = np.arange(20).reshape(4, 5) % 3 > 0
    index = jnp.asarray(np.flatnonzero(mask))

    def small_loss(kept, rest, data):
        kernel = jnp.zeros(20).at[index].set(kept).reshape(4, 5)
        return loss({"a": {"kernel": kernel, "bias": rest["bias"]}, "b": {"kernel": rest["b"]}}, data)

    p = params()
    small, rest = p["a"]["kernel"].reshape(-1)[index], {"bias": p["a"]["bias"], "b": p["b"]["kernel"]}
    adam, small_gradient = ADAM(), jax.jit(jax.grad(small_loss, (0, 1)))
    state = adam.init((small, rest))
    for i in range(STEPS):
        gradient = small_gradient(small, rest, batch(i))
        updates, state = adam.update(gradient, state)
        small, rest = optax.apply_updates((small, rest), updates)
    got, _, _ = trained(
        t.freeze(ADAM(), {"a/kernel": jnp.asarray(mask)}), p=po.apply(params(), {"a/kernel": jnp.asarray(mask)})
    )
    np.testing.assert_allclose(got["a"]["kernel"].reshape(-1)[index], small, rtol=1e-12)
    np.testing.assert_allclose(got["b"]["kernel"], rest["b"], rtol=1e-12)


def test_zeros_at_the_start_stay_by_default():
    p = po.apply(params(), {"a/kernel": jnp.arange(20).reshape(4, 5) % 2 == 0})
    optimizer = t.freeze(ADAM())
    p, state, _ = trained(optimizer, p=p)
    assert optimizer.finish(p, state).kept == 30
    pruned = po.prune(None, params(), None, HALF, progress=False)
    optimizer = t.freeze(ADAM(), pruned)
    p, state, _ = trained(optimizer, p=jax.tree.map(jnp.array, pruned.params))
    same(optimizer.finish(p, state).support, pruned.support)


def test_the_wrong_order_is_found_out():
    """Momentum chained after a cut moves what was cut; `finish` says so."""
    inside = t.gradual(optax.identity(), HALF, end=6)
    wrong = optax.chain(inside, optax.sgd(0.05, momentum=0.9))
    p, state, _ = trained(wrong)
    with pytest.raises(ValueError, match=r"nonzero weights off the support.*put it inside, gradual\(optax"):
        inside.finish(p, state)
    right = t.gradual(optax.chain(optax.identity(), optax.sgd(0.05, momentum=0.9)), HALF, end=6)
    p, state, _ = trained(right)
    assert right.finish(p, state).kept == KEPT


AFTER = {"scale": optax.scale(0.5), "adam": optax.adam(1e-2), "decay": optax.add_decayed_weights(0.1)}


@pytest.mark.parametrize(("name", "after"), [
    ("straight_through", "scale"), ("straight_through", "adam"), ("straight_through", "decay"), ("l0", "adam"),
    ("lagrangian", "scale"), ("proximal", "scale"), ("proximal", "adam"),
])  # fmt: skip
def test_the_wrong_order_is_found_out_where_the_last_word_is_on_values(name, after):
    inside = of(name) if name != "proximal" else t.proximal(optax.sgd(0.1), L1(0.5), 0.1)
    p, state, _ = trained(optax.chain(inside, AFTER[after]), 60 if name == "proximal" else STEPS)
    with pytest.raises(ValueError, match=rf"params holds .* a transformation after this one .*inside, {name}\(optax"):
        inside.finish(p, state)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.float64])
@pytest.mark.parametrize("place", [(0, 0), (0, 299), (783, 0), (391, 150)])
@pytest.mark.slow
def test_a_later_step_on_any_one_weight_is_found_out(place, dtype):
    """At the sizes of LeNet's first layer, by a tenth of the weight."""
    rng = np.random.default_rng(0)
    p = {"w": jnp.asarray(rng.normal(0, 0.05, (784, 300)), dtype)}
    p["w"] = p["w"].at[place].set(0.05)
    inside = t.proximal(ADAM(), L1(1e-4), 0.02, metric=t.adam_metric())
    nudge = {"w": jnp.zeros((784, 300), dtype).at[place].set(5e-3)}

    def moved(updates, state, params):
        return jax.tree.map(jnp.add, updates, nudge), state

    later = optax.GradientTransformation(lambda params: optax.EmptyState(), moved)
    for optimizer in (inside, optax.chain(inside, later)):
        state = optimizer.init(p)
        updates, state = jax.jit(optimizer.update)(jax.tree.map(jnp.cos, p), state, p)
        new = optax.apply_updates(p, updates)
        if optimizer is inside:
            inside.finish(new, state)
        else:
            with pytest.raises(ValueError, match="params holds weights in leaf 'w' that are not those of the last"):
                inside.finish(new, state)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16, jnp.float32])
@pytest.mark.slow
def test_the_right_order_is_never_refused_for_its_rounding(dtype):
    """Weights of one sign, whose sums round most; the step compiled with the loop and without."""
    rng = np.random.default_rng(0)
    p = {
        "w": jnp.asarray(rng.uniform(1, 2, (2000, 20)), dtype),
        "c": jnp.asarray(rng.normal(0, 1, (3, 3, 8, 4)), dtype),
    }
    optimizer = t.proximal(optax.sgd(0.01), L1(0.1), 0.01)

    def step(carry, _):
        p, state = carry
        updates, state = optimizer.update(jax.tree.map(jnp.sin, p), state, p)
        return (optax.apply_updates(p, updates), state), None

    apart = (p, optimizer.init(p))
    for _ in range(5):
        apart, _ = step(apart, None)
        optimizer.finish(*apart)
    last, state = jax.jit(lambda c: jax.lax.scan(step, c, length=30)[0])((p, optimizer.init(p)))
    same(optimizer.finish(last, state).params, last)


@pytest.mark.parametrize("name", sorted(set(OPTIMIZERS) - {"gradual"}))
def test_finish_needs_no_update(name):
    done = of(name).finish(params(), of(name).init(params()))
    for path, mask in named(done.support).items():
        assert not np.any(np.asarray(named(done.params)[path])[~np.asarray(mask)])
    kept = OPTIMIZERS[name][1]
    assert kept in (None, done.kept)


@pytest.mark.parametrize("name", ["gradual", "hard_threshold", "admm", "lagrangian", "rigl", "straight_through"])
def test_a_layer_that_collapses_is_an_error(name):
    make = getattr(t, name)
    for floor in (None, 0):
        optimizer = make(ADAM(), Cardinality(sparsity=0.999, floor=floor), end=1)
        p, state, _ = trained(optimizer, 3 if name == "gradual" else 0)
        if floor == 0:
            assert optimizer.finish(p, state).kept == 0
        else:
            with pytest.raises(ValueError, match=r"keeps no weight of leaf 'a/kernel': the layer has collapsed.*floor"):
                optimizer.finish(p, state)


@pytest.mark.parametrize("name", ["freeze", "gradual", "rigl", "straight_through"])
def test_a_diverging_step_is_an_error_and_no_network(name):
    optimizer = of(name, partial(optax.sgd, 1e200))
    p, state, value = trained(optimizer)
    assert not np.isfinite(value)
    with pytest.raises(ValueError, match=r"NaN or an infinity in leaf 'a/.*': training diverged; pass a smaller"):
        optimizer.finish(p, state)


# ------------------------------------------------------------------------------------------------- gradual


def test_gradual_cuts_the_smallest_on_the_cubic():
    optimizer = t.gradual(optax.set_to_zero(), HALF, begin=2, end=8, every=3)  # weights move only by cuts
    p, start = params(), params()
    state, update = optimizer.init(p), jax.jit(optimizer.update)
    sizes = np.concatenate([np.abs(np.ravel(named(start)[k])) for k in PRUNED])
    expected = [40, 40, *[40 - int(np.floor(20 * (1 - (1 - k / 3) ** 3) + 1e-9)) for k in (1, 1, 1, 2, 2, 2)], 20, 20]
    for i, count in enumerate(expected):
        updates, state = update(p, state, p)
        p = optax.apply_updates(p, updates)
        living = np.concatenate([np.ravel(named(p)[k]) for k in PRUNED]) != 0
        np.testing.assert_array_equal(np.flatnonzero(living), np.sort(np.argsort(-sizes)[:count]))
        assert po._tree.kept(state.masks) == count
        if i < 8:
            with pytest.raises(ValueError, match=f"step {i + 1}, but pruning ends with step end=8"):
                optimizer.finish(p, state)


@pytest.mark.slow
def test_gradual_equals_prune_and_freeze_by_hand():
    optimizer = t.gradual(ADAM(), NM(2, 4, axis="out"), begin=0, end=4, every=2, leaves="b/kernel")
    got, _, _ = trained(optimizer)
    p, state, masks = params(), ADAM().init(params()), np.ones((5, 4), bool)
    for i in range(STEPS):
        if i in (0, 2, 4):
            n = 4 - int(2 * (1 - (1 - (i // 2 + 1) / 3) ** 3) + 1e-9)
            scores = np.where(masks, np.abs(np.asarray(p["b"]["kernel"])), -1)
            masks &= np.argsort(np.argsort(-scores, axis=1), axis=1) < n
        gradient = GRADIENT(p, batch(i))
        gradient["b"]["kernel"] = gradient["b"]["kernel"] * masks
        updates, state = ADAM().update(gradient, state, p)
        p = optax.apply_updates(p, updates)
        drop = lambda x, m=masks: x | {"b": {"kernel": x["b"]["kernel"] * m}}  # noqa: E731
        p, adam = drop(p), state[0]
        state = (adam._replace(mu=drop(adam.mu), nu=drop(adam.nu)), *state[1:])
    same(got, p, rtol=1e-12, atol=1e-14)


# ------------------------------------------------------------------------------------------------- proximal


def lasso(x, y, weight, sweeps=4000):
    """Coordinate descent in NumPy for |x w - y|^2 / 2n + weight |w|_1."""
    w, n = np.zeros(x.shape[1]), len(y)
    for _ in range(sweeps):
        for j in range(len(w)):
            rho = x[:, j] @ (y - x @ w + x[:, j] * w[j]) / n
            w[j] = np.sign(rho) * max(abs(rho) - weight, 0) / (x[:, j] @ x[:, j] / n)
    return w


@pytest.mark.parametrize(("inner", "metric", "rate"), [
    (optax.adam, t.adam_metric(), 0.003), (optax.sgd, None, 0.02), (optax.rmsprop, t.rms_metric(), 0.001),
], ids=["adam", "sgd", "rmsprop"])  # fmt: skip
@pytest.mark.slow
def test_proximal_reaches_the_lasso_whatever_the_metric(inner, metric, rate):
    rng = np.random.default_rng(0)
    x = rng.standard_normal((40, 8)) * np.logspace(-1, 0.5, 8)
    y, weight = x @ rng.standard_normal(8) + 0.3 * rng.standard_normal(40), 0.15
    expected = lasso(x, y, weight)
    assert 2 <= np.count_nonzero(expected) <= 7
    jx, jy, w = jnp.asarray(x), jnp.asarray(y), {"w": jnp.zeros((8, 1))}
    steps = 12_000
    schedule = optax.cosine_decay_schedule(rate, steps)
    optimizer = t.proximal(inner(schedule), L1(weight), schedule, metric=metric)

    def step(carry, _):
        w, state = carry
        gradient = {"w": jx.T @ (jx @ w["w"] - jy[:, None]) / 40}
        updates, state = optimizer.update(gradient, state, w)
        return (optax.apply_updates(w, updates), state), None

    (w, state), _ = jax.jit(lambda c: jax.lax.scan(step, c, length=steps))((w, optimizer.init(w)))
    np.testing.assert_allclose(w["w"][:, 0], expected, atol=2e-3)
    done = optimizer.finish(w, state)
    np.testing.assert_array_equal(np.asarray(done.support["w"])[:, 0], expected != 0)


@pytest.mark.slow
def test_proximal_is_the_soft_threshold_in_the_metric():
    optimizer = t.proximal(ADAM(), L1(3.0), 0.02, metric=t.adam_metric())
    p, plain = params(), ADAM()
    state, adam = optimizer.init(p), plain.init(p)
    for i in range(3):
        gradient = GRADIENT(p, batch(i))
        moved, adam = plain.update(gradient, adam, p)
        moved = optax.apply_updates(p, moved)
        updates, state = optimizer.update(gradient, state, p)
        p = optax.apply_updates(p, updates)
        np.testing.assert_array_equal(p["a"]["bias"], moved["a"]["bias"])
        for layer in ("a", "b"):
            v = np.asarray(moved[layer]["kernel"])
            d = 1 / (np.sqrt(np.asarray(adam[0].nu[layer]["kernel"]) / (1 - 0.999 ** (i + 1))) + 1e-8)
            expected = np.sign(v) * np.maximum(np.abs(v) - 0.02 * 3.0 * d, 0)
            np.testing.assert_allclose(p[layer]["kernel"], expected, rtol=1e-9, atol=1e-15)
            assert np.any(np.asarray(p[layer]["kernel"]) == 0)


@pytest.mark.parametrize("tied", [False, True], ids=["what enters", "what enters and leaves"])
@pytest.mark.slow
def test_a_group_lasso_removes_whole_neurons(tied):
    neuron = jnp.arange(5, dtype=jnp.int32)
    labels = {"a": {"kernel": neuron[None], "bias": None}, "b": {"kernel": neuron[:, None] if tied else None}}
    optimizer = t.proximal(
        optax.sgd(0.1),
        GroupLasso(0.05 if tied else 0.12, Partition(labels, 5)),
        0.1,
        leaves=None if tied else "a/kernel",
    )
    p, state, _ = trained(optimizer, 150, data=lambda i: batch(i % 4))
    done = optimizer.finish(p, state)
    first, second = (np.asarray(done.params[k]["kernel"]) != 0 for k in "ab")
    assert 0 < first.any(0).sum() < 5, "some neurons went, some stayed"
    np.testing.assert_array_equal(first, np.repeat(first[:1], 4, 0))
    np.testing.assert_array_equal(done.support["a"]["kernel"], first)
    if tied:
        np.testing.assert_array_equal(second, np.repeat(first[:1].T, 4, 1))
    else:
        assert second.all()
        assert done.support["b"]["kernel"] is None


# ------------------------------------------------------------------------------------------------- drop and grow


@pytest.mark.parametrize("name", ["rigl", "sparse_evolution"])
@pytest.mark.slow
def test_drop_and_grow_is_the_published_box(name):
    per_leaf = Cardinality(sparsity=0.5, per="leaf")
    optimizer = getattr(t, name)(optax.sgd(0.1), per_leaf, end=8, every=4, drop=0.6)
    p, update = params(), jax.jit(optimizer.update)
    state = optimizer.init(p)
    first = named(state.masks)
    assert all(int(m.sum()) == 10 for m in first.values())
    for i in range(11):
        masks, old = named(state.masks), named(p)
        gradient = GRADIENT(p, batch(i))
        updates, state = update(gradient, state, p)
        p = optax.apply_updates(p, updates)
        new, g = named(state.masks), named(gradient)
        for path in PRUNED:
            now, mask, w = np.asarray(named(p)[path]), np.asarray(new[path]), np.asarray(old[path])
            assert mask.sum() == 10
            assert not now[~mask].any()
            if i not in (4, 8):
                np.testing.assert_array_equal(mask, masks[path])
                if i > 0:
                    np.testing.assert_allclose(now[mask], (w - 0.1 * np.asarray(g[path]))[mask], rtol=1e-12)
                continue
            dropped = int(np.floor(0.6 / 2 * (1 + np.cos(np.pi * i / 8)) * 10))
            living = np.where(masks[path], np.abs(w), -1).ravel()
            survivors = np.zeros(20, bool)
            survivors[np.argsort(-living)[: 10 - dropped]] = True
            assert mask.ravel()[survivors].all()
            if name == "rigl":
                score = np.where(survivors, np.inf, np.abs(np.asarray(g[path])).ravel())
                np.testing.assert_array_equal(np.flatnonzero(mask), np.sort(np.argsort(-score)[:10]))
            np.testing.assert_array_equal(now[mask], w[mask])  # the optimiser rests, what is new is zero
    assert any(np.any(np.asarray(first[k]) != np.asarray(new[k])) for k in PRUNED)


# ------------------------------------------------------------------------------------------------- hard threshold


def test_hard_threshold_projects_holds_and_lets_go():
    optimizer = t.hard_threshold(optax.sgd(0.1), HALF, begin=1, end=9, every=4, hold=2)
    p, update = params(), jax.jit(optimizer.update)
    state = optimizer.init(p)
    for i in range(12):
        before = np.concatenate([np.ravel(named(p)[k]) for k in PRUNED])
        gradient = GRADIENT(p, batch(i))
        updates, state = update(gradient, state, p)
        p = optax.apply_updates(p, updates)
        now = np.concatenate([np.ravel(named(p)[k]) for k in PRUNED])
        if i in (1, 5, 9):
            np.testing.assert_array_equal(np.flatnonzero(now), np.sort(np.argsort(-np.abs(before))[:KEPT]))
        assert (np.count_nonzero(now) == KEPT) == (i in (1, 2, 5, 6, 9, 10, 11))
        if 1 <= i < 9:
            assert optimizer.finish(p, state).kept == KEPT


# ------------------------------------------------------------------------------------------------- straight-through


def test_straight_through_is_the_published_step():
    optimizer = t.straight_through(optax.sgd(0.1), NM(2, 4, axis="out"), decay=0.05, leaves="b/kernel")
    p, update = params(), jax.jit(optimizer.update)
    state, dense = optimizer.init(p), np.array(p["b"]["kernel"])
    mask = np.argsort(np.argsort(-np.abs(dense), axis=1), axis=1) < 2
    seen = {**p, "b": {"kernel": p["b"]["kernel"]}}
    for i in range(6):
        gradient = GRADIENT(seen, batch(i))
        dense = dense - 0.1 * (np.asarray(gradient["b"]["kernel"]) + 0.05 * np.where(mask, 0, dense))
        mask = np.argsort(np.argsort(-np.abs(dense), axis=1), axis=1) < 2
        updates, state = update(gradient, state, p)
        p = optax.apply_updates(p, updates)
        np.testing.assert_allclose(p["b"]["kernel"], np.where(mask, dense, 0), rtol=1e-10, atol=1e-15)
        assert np.all(np.count_nonzero(p["b"]["kernel"], axis=1) == 2)
        np.testing.assert_allclose(state.dense["b"]["kernel"], dense, rtol=1e-12)
        seen = p


# ------------------------------------------------------------------------------------------------- ADMM


def test_admm_is_the_box_in_the_metric():
    """f = 1/2 |w - c|^2 by Adam, against NumPy; then the constraint holds and the rest is retrained."""
    c, steps, end = np.random.default_rng(2).standard_normal((3, 4)), 40, 30
    optimizer = t.admm(optax.adam(0.05), HALF, end=end, every=5, pull=0.1, metric=t.adam_metric())
    p, update = {"w": jnp.asarray(c[::-1].copy())}, jax.jit(optimizer.update)
    state = optimizer.init(p)
    w, z, u, m, v = np.array(p["w"]), np.array(p["w"]), np.zeros((3, 4)), np.zeros((3, 4)), np.zeros((3, 4))
    for i in range(steps):
        updates, state = update({"w": p["w"] - c}, state, p)
        p = optax.apply_updates(p, updates)
        stage = min(i // 5, 6)
        if i % 5 == 0 and i <= end:
            x = w + u
            d = 1 / (np.sqrt(v / (1 - 0.999 ** max(i, 1))) + 1e-8)  # before the first step all of one size
            mask = np.zeros(12, bool)
            mask[np.argsort(-(x**2 / d).ravel(), kind="stable")[:6]] = True
            mask = mask.reshape(3, 4)
            z = np.where(mask, x, 0)
            u = (x - z) * max(stage, 1) / (stage + 1)
        g = w - c
        if i >= end:
            g, m, v = (np.where(mask, a, 0) for a in (g, m, v))
        m, v = 0.9 * m + 0.1 * g, 0.999 * v + 0.001 * g**2
        step = -0.05 * (m / (1 - 0.9 ** (i + 1))) / (np.sqrt(v / (1 - 0.999 ** (i + 1))) + 1e-8)
        w = np.where(mask, w + step, 0) if i >= end else w + step - 0.1 * (stage + 1) / 7 * (w - z + u)
        np.testing.assert_allclose(p["w"], w, rtol=1e-7, atol=1e-9)
    done = optimizer.finish(p, state)
    assert done.kept == 6 == np.count_nonzero(done.params["w"])


# ------------------------------------------------------------------------------------------------- gates


@pytest.mark.slow
def test_gates_have_the_published_law():
    from pruneopt.training import gates

    log_alpha = jnp.linspace(-3.0, 3.0, 7)
    z = jax.vmap(lambda k: gates.sample(k, log_alpha))(jax.random.split(jax.random.key(0), 20_000))
    np.testing.assert_allclose(np.mean(z != 0, axis=0), gates.open_probability(log_alpha), atol=0.012)
    assert float(z.min()) == 0
    assert float(z.max()) == 1
    for a in (-1.0, 0.3, 2.0):  # slope against autodiff of the sample itself
        for seed in range(6):
            draw = lambda x, k=jax.random.key(seed): gates.sample(k, x)  # noqa: E731
            value, tangent = jax.jvp(draw, (jnp.asarray([a]),), (jnp.ones(1),))
            np.testing.assert_allclose(gates.slope(value), tangent, rtol=1e-9)
    assert gates.estimate(jnp.asarray(-10.0)) == 0
    assert gates.estimate(jnp.asarray(10.0)) == 1


@pytest.mark.parametrize("per", ["weight", pytest.param("in", marks=pytest.mark.slow)])
@pytest.mark.slow
def test_l0_is_the_gradient_of_the_reparameterised_loss(per):
    """Against autodiff through the gates, the loss written with them, in the user's place."""
    from pruneopt.training import gates

    rate, weight, p = 0.1, 0.01, params()
    optimizer = t.l0(optax.sgd(rate), weight, per=per, open_=0.6, key=3)
    state, update = optimizer.init(p), jax.jit(optimizer.update)
    theta = named(p)
    alpha = {k: jnp.full(gates.gate_shape(theta[k].shape, per), np.log(0.6 / 0.4)) for k in PRUNED}

    def whole(theta, alpha, keys, data):
        z = {k: gates.sample(keys[k], a) if keys else jnp.ones_like(theta[k]) for k, a in alpha.items()}
        w = {k: x * z[k] if k in z else x for k, x in theta.items()}
        tree = {"a": {"kernel": w["a/kernel"], "bias": w["a/bias"]}, "b": {"kernel": w["b/kernel"]}}
        size = lambda k: theta[k].size // alpha[k].size  # noqa: E731
        price = sum(size(k) * jnp.sum(gates.open_probability(a)) for k, a in alpha.items())
        return loss(tree, data) + weight * price

    keys, whole_gradient = None, jax.jit(jax.grad(whole, (0, 1)))
    for i in range(3):
        g_theta, g_alpha = whole_gradient(theta, alpha, keys, batch(i))
        theta = jax.tree.map(lambda x, g: x - rate * g, theta, g_theta)
        alpha = jax.tree.map(lambda x, g: x - rate * g, alpha, g_alpha)
        updates, state = update(GRADIENT(p, batch(i)), state, p)
        p = optax.apply_updates(p, updates)
        keys = dict(zip(PRUNED, jax.random.split(jax.random.fold_in(jax.random.key(3), i), 2), strict=True))
        for k in PRUNED:
            np.testing.assert_allclose(named(state.log_alpha)[k], alpha[k], rtol=1e-9)
            np.testing.assert_allclose(named(state.weights)[k], theta[k], rtol=1e-9)
            expected = theta[k] * gates.sample(keys[k], alpha[k])
            np.testing.assert_allclose(named(p)[k], expected, rtol=1e-9, atol=1e-14)
    done = optimizer.finish(p, state)
    for k in PRUNED:
        np.testing.assert_allclose(named(done.params)[k], theta[k] * gates.estimate(alpha[k]), rtol=1e-9)


@pytest.mark.slow
def test_the_multiplier_finds_its_price_and_restarts():
    optimizer = t.lagrangian(optax.adam(0.05), HALF, end=400, ascent=0.05)
    p, state, _ = trained(optimizer, 0)
    prices, living = [], []
    from pruneopt.training import gates

    for i in range(300):
        p, state, _ = training_cases.step_of(optimizer)(p, state, batch(i % 4))
        prices.append(float(state.price))
        living.append(sum(float(jnp.sum(gates.open_probability(a))) for a in jax.tree.leaves(state.log_alpha)) / 40)
    density = np.array([0.95, *living[:-1]])  # what the multiplier saw
    rising = np.flatnonzero(density[1:] > 0.5) + 1
    np.testing.assert_allclose(
        np.array(prices)[rising], np.array(prices)[rising - 1] + 0.05 * (density[rising] - 0.5) / 40, rtol=1e-9
    )
    assert all(price == 0 for price, d in zip(prices[1:], density[1:], strict=True) if d <= 0.5)
    assert min(living) < 0.52
    assert optimizer.finish(p, state).kept == KEPT


# ------------------------------------------------------------------------------------------------- bad input


BAD = {
    "prox after Adam": (
        lambda: t.proximal(optax.adam(0.1), L1(0.1), 0.1).init(params()),
        ValueError,
        ("metric of its own", "metric=adam_metric()"),
    ),
    "prox after RMSprop": (
        lambda: t.proximal(optax.rmsprop(0.1), L1(0.1), 0.1).init(params()),
        ValueError,
        ("metric=adam_metric()",),
    ),
    "prox after Adagrad": (
        lambda: t.proximal(optax.adagrad(0.1), L1(0.1), 0.1).init(params()),
        ValueError,
        ("metric of its own",),
    ),
    "prox after signs": (
        lambda: t.proximal(optax.lion(0.1), L1(0.1), 0.1).init(params()),
        ValueError,
        ("metric of its own",),
    ),
    "another learning rate": (
        lambda: t.proximal(optax.adam(0.1), L1(0.1), 0.01, metric=t.adam_metric()).init(params()),
        ValueError,
        ("10 times", "learning_rate=0.01"),
    ),
    "metric of another optimiser": (
        lambda: t.proximal(optax.sgd(0.1), L1(0.1), 0.1, metric=t.adam_metric()).init(params()),
        ValueError,
        ("adam_metric()", "0 states"),
    ),
    "groups in a metric": (
        lambda: t.proximal(
            optax.adam(0.1), GroupLasso(0.1, Partition.slices(params(), -1)), 0.1, metric=t.adam_metric()
        ),
        ValueError,
        ("GroupLasso", "metric", "L1"),
    ),
    "no learning rate": (lambda: t.proximal(optax.sgd(0.1), L1(0.1), -1), ValueError, ("learning_rate=-1",)),
    "a rate in words": (lambda: t.proximal(optax.sgd(0.1), L1(0.1), "a"), ValueError, ("learning_rate='a'",)),
    "a metric in words": (lambda: t.proximal(ADAM(), L1(0.1), 0.1, metric="adam"), TypeError, ("metric is 'adam'",)),
    "a metric uncalled": (
        lambda: t.proximal(ADAM(), L1(0.1), 0.1, metric=t.adam_metric),
        TypeError,
        ("pass adam_metric()",),
    ),
    "price in words": (lambda: t.l0(ADAM(), "a"), ValueError, ("weight='a'",)),
    "penalty that is a number": (lambda: t.proximal(optax.sgd(0.1), 0.1, 0.1), TypeError, ("penalty is 0.1", "L1")),
    "negative weight": (lambda: L1(-0.1), ValueError, ("weight=-0.1",)),
    "weight NaN": (lambda: L1(float("nan")), ValueError, ("weight=nan",)),
    "constraint that is a number": (
        lambda: t.gradual(ADAM(), 0.9, end=3),
        TypeError,
        ("constraint is 0.9", "Cardinality"),
    ),
    "no optimiser": (
        lambda: t.gradual(HALF, HALF, end=3),
        TypeError,
        ("optimizer is", "gradual(optax.adam(1e-3), ...)"),
    ),
    "end before begin": (lambda: t.gradual(ADAM(), HALF, begin=5, end=3), ValueError, ("end=3", ">= 5")),
    "interval of nothing": (lambda: t.gradual(ADAM(), HALF, end=3, every=0), ValueError, ("every=0", ">= 1")),
    "drop of everything": (lambda: t.rigl(ADAM(), HALF, end=3, drop=1.0), ValueError, ("drop=1.0", "(0, 1)")),
    "rigl of neurons": (
        lambda: t.rigl(ADAM(), po.constraints.ByPath({"*": Slices(0, HALF)}), end=3),
        ValueError,
        ("blocks or slices", "rigl drops single weights"),
    ),
    "hold beyond the interval": (lambda: t.hard_threshold(ADAM(), HALF, end=9, hold=101), ValueError, ("hold=101",)),
    "pull of everything": (lambda: t.admm(ADAM(), HALF, end=9, pull=1.0), ValueError, ("pull=1.0", "(0, 1)")),
    "negative price": (lambda: t.l0(ADAM(), -1.0), ValueError, ("weight=-1.0", ">= 0")),
    "price NaN": (lambda: t.l0(ADAM(), float("nan")), ValueError, ("weight=nan",)),
    "gates per row": (lambda: t.l0(ADAM(), 0.1, per="row"), ValueError, ("per='row'", "'in'")),
    "gates all open": (lambda: t.l0(ADAM(), 0.1, open_=1.0), ValueError, ("open_=1.0",)),
    "no ascent": (lambda: t.lagrangian(ADAM(), HALF, end=3, ascent=0), ValueError, ("ascent=0",)),
    "negative decay": (lambda: t.straight_through(ADAM(), NM(2, 4), decay=-1), ValueError, ("decay=-1",)),
    "projection every 0 steps": (lambda: t.straight_through(ADAM(), NM(2, 4), every=0), ValueError, ("every=0",)),
    "no params": (
        lambda: t.freeze(ADAM()).update(params(), t.freeze(ADAM()).init(params())),
        ValueError,
        ("params is None", "update(gradient, state, params)"),
    ),
    "masks of another shape": (
        lambda: t.freeze(ADAM(), {"a/kernel": jnp.ones((2, 2), bool)}).init(params()),
        ValueError,
        ("mask 'a/kernel'", "(2, 2)"),
    ),
    "masks and leaves": (
        lambda: t.freeze(ADAM(), {"a/kernel": jnp.ones((4, 5), bool)}, leaves="b*"),
        ValueError,
        ("leaves='b*'", "drop leaves="),
    ),
    "masks of no leaf": (lambda: t.freeze(ADAM(), {"c": jnp.ones((2, 2), bool)}).init(params()), ValueError, ("'c'",)),
    "masks of numbers": (
        lambda: t.freeze(ADAM(), {"a/kernel": jnp.ones((4, 5))}).init(params()),
        TypeError,
        ("mask 'a/kernel'", "booleans"),
    ),
    "a constraint that does not fit": (lambda: t.gradual(ADAM(), NM(2, 3), end=3).init(params()), ValueError, ("m=3",)),
    "state of another": (
        lambda: t.freeze(ADAM()).finish(params(), ADAM().init(params())),
        ValueError,
        ("state holds 0",),
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_is_refused_in_one_sentence(name):
    call, error, words = BAD[name]
    with pytest.raises(error) as caught:
        call()
    for word in words:
        assert word in str(caught.value), str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_an_update_of_other_trees_is_refused_in_one_sentence(name):
    optimizer, p = of(name), params()
    state = optimizer.init(p)
    less = {"a": p["a"]}
    turned = p | {"b": {"kernel": p["b"]["kernel"].T}}
    cases = (
        (less, p, ("gradient has structure", "params has")),
        (turned, p, ("gradient: leaf 'b/kernel' has shape (4, 5)", "(5, 4)")),
        (less, less, ("params has structure", "`init`")),
    )
    for gradient, given, words in cases:
        for update in (optimizer.update, jax.jit(optimizer.update)):
            with pytest.raises(ValueError, match=r"structure|shape") as caught:
                update(gradient, state, given)
            assert all(word in str(caught.value) for word in words), str(caught.value)
            assert "\n" not in str(caught.value)


@pytest.mark.parametrize("ball", [po.constraints.L1Ball(1.0), po.constraints.GroupBall(1.0)], ids=str)
@pytest.mark.parametrize("make", [t.gradual, t.hard_threshold, t.admm, t.lagrangian, t.rigl, t.straight_through])
def test_a_ball_is_refused_where_supports_are_picked(make, ball):
    with pytest.raises(ValueError, match=r"constraint=.*Ball\(.*bounds values.*pass a constraint on supports"):
        make(ADAM(), ball, end=3)


@pytest.mark.parametrize("end", [-1, 2.5, "a", True])
def test_an_end_that_is_no_step_is_refused(end):
    calls = (
        lambda: t.l0(ADAM(), 0.1, end=end),
        lambda: t.lagrangian(ADAM(), HALF, end=end),
        lambda: t.straight_through(ADAM(), NM(2, 4), end=end),
    )
    for call in calls:
        with pytest.raises(ValueError, match=r"end=.* is not a whole number >= 0; pass a number of steps"):
            call()
    with pytest.raises(ValueError, match="end=None is not a whole number >= 0"):
        t.lagrangian(ADAM(), HALF, end=None)


def test_the_cases_name_what_is_pruned():
    assert set(named(t.freeze(ADAM()).init(params()).masks)) == set(PRUNED)
    assert training_cases.KEPT == KEPT
