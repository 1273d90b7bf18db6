"""Layer by layer: against loops written by hand in NumPy, on every way that a network can share weights and inputs."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import pruneopt as po
from pruneopt.capture import calibration
from pruneopt.constraints import NM, ByPath, Cardinality, Intersection, Support
from pruneopt.plans import LayerMethod, layer_task, layerwise
from pruneopt.plans.judged import DAMPINGS
from pruneopt.program import segment
from pruneopt.solvers import ADMM, Polish, Score, Then, factors

HALF = Cardinality(sparsity=0.5)
REFIT = Then(Score(), Polish())
RNG = np.random.default_rng(0)


def draw(*shape):
    return RNG.standard_normal(shape)


WEIGHTS = {"a": draw(6, 8), "b": draw(8, 8), "c": draw(8, 3)}
BATCHES = [draw(7, 6), draw(7, 6), draw(3, 6)]


def mlp(params, x):
    x = jnp.asarray(x)
    for name in ("a", "b"):
        x = jnp.maximum(x @ params[name], 0.0)
    return x @ params["c"]


def relu(x):
    return np.maximum(x, 0)


def kept_by_saliency(w, h, count):
    """The `count` weights of largest w^2 H_ii, by hand."""
    scores = w**2 * np.diagonal(h)[:, None]
    return scores >= np.sort(scores.ravel())[-count]


def refit(w, h, mask, ridge):
    """Column by column, min over the mask of the damped reconstruction error, by hand."""
    h = h + ridge * np.eye(len(h))
    out = np.zeros_like(w)
    for j in range(w.shape[1]):
        s = np.flatnonzero(mask[:, j])
        out[s, j] = np.linalg.solve(h[np.ix_(s, s)], (h @ w[:, j])[s])
    return out


def one_layer(w, x, damping=0.01, weights=None):
    """Half of the weights by saliency, refitted, on the inputs x."""
    weights = np.ones(len(x)) if weights is None else weights
    h = (x * weights[:, None]).T @ x / weights.sum()
    ridge = damping * np.mean(np.diagonal(h))
    mask = kept_by_saliency(w, h + ridge * np.eye(len(h)), w.size // 2)
    return refit(w, h, mask, ridge)


def by_hand(batches, weights=None):
    x, new = np.concatenate(batches), {}
    for name in ("a", "b", "c"):
        new[name] = one_layer(WEIGHTS[name], x, weights=weights)
        x = relu(x @ new[name])
    return new


def run(fn=mlp, params=None, batches=None, constraint=HALF, solver=REFIT, target="layer", damping=0.01, **words):
    given = WEIGHTS if params is None else params
    row = LayerMethod(solver, damping=damping, target=target)
    return layerwise(fn, given, BATCHES if batches is None else batches, constraint, row, progress=False, **words)


def assert_same(found, wanted, rtol=1e-9):
    for name, value in wanted.items():
        np.testing.assert_allclose(np.asarray(found[name]), value, rtol=rtol, atol=1e-12, err_msg=name)


def assert_identical(one, other):
    for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True):
        np.testing.assert_array_equal(np.asarray(a), np.asarray(b))


def test_each_layer_sees_the_pruned_ones_before_it():
    pruned = run()
    assert_same(pruned.params, by_hand(BATCHES))
    assert [entry["layer"] for entry in pruned.layers] == ["a", "b", "c"]
    assert {name: s.kept for name, s in pruned.solutions.items()} == {"a": 24, "b": 32, "c": 12}
    for name, mask in pruned.support.items():
        assert not np.any(np.asarray(pruned.params[name])[~np.asarray(mask)])


def test_cutting_the_data_into_other_batches_changes_nothing():
    assert_same(run(batches=[np.concatenate(BATCHES)]).params, by_hand(BATCHES))


def test_params_are_untouched_and_keep_their_kind():
    before = {name: w.copy() for name, w in WEIGHTS.items()}
    mixed = {**WEIGHTS, "b": jnp.asarray(WEIGHTS["b"])}
    pruned = run(params=mixed)
    assert_identical(WEIGHTS, before)
    assert isinstance(pruned.params["a"], np.ndarray)
    assert isinstance(pruned.params["b"], jax.Array)


def test_batches_are_read_once():
    reads = []

    def batches():
        reads.append(1)
        return iter(BATCHES)

    run(batches=batches)
    assert len(reads) == 1


def test_the_dense_networks_outputs_as_target():
    """Second layer: min ||X0 W0 - X W||^2 / N + ridge ||W - W0||^2 on a given support, by normal equations."""
    masks = {name: draw(*w.shape) > 0 for name, w in WEIGHTS.items()}
    pruned = run(constraint=Support(masks), solver=Polish(), target="network")
    x0 = x = np.concatenate(BATCHES)
    for name in ("a", "b", "c"):
        w0, mask = WEIGHTS[name], masks[name]
        h, n = x.T @ x / len(x), len(x)
        ridge = 0.01 * np.mean(np.diagonal(h))
        found = np.asarray(pruned.params[name])
        for j in range(w0.shape[1]):
            s = np.flatnonzero(mask[:, j])
            side = x.T @ (x0 @ w0[:, j]) / n + ridge * w0[:, j]
            best = np.linalg.solve(h[np.ix_(s, s)] + ridge * np.eye(s.size), side[s])
            np.testing.assert_allclose(found[s, j], best, rtol=1e-7, atol=1e-10)
        x0, x = relu(x0 @ w0), relu(x @ found)


def test_the_two_targets_differ_after_the_first_layer():
    layer, network = run(), run(target="network")
    np.testing.assert_allclose(layer.params["a"], network.params["a"], rtol=1e-9)
    assert np.max(np.abs(layer.params["b"] - network.params["b"])) > 1e-3


def test_position_weights_count_in_grams_and_errors():
    weights = [np.array([1.0, 0, 2, 1, 0, 1, 0.5]), np.zeros(7), np.array([0.0, 3, 1])]
    pairs = list(zip(BATCHES, weights, strict=True))
    pruned = run(lambda p, b: mlp(p, b[0]), batches=pairs, weights=lambda batch: batch[1])
    assert_same(pruned.params, by_hand(BATCHES, np.concatenate(weights)))


def test_held_out_batches_choose_the_damping():
    x, y = BATCHES[0][:5], np.concatenate(BATCHES[1:])
    pruned = run(batches=[x], held_out=[y], leaves=["a"])
    h = y.T @ y / len(y)
    tried = {d: one_layer(WEIGHTS["a"], x, d) for d in DAMPINGS}
    errors = {d: np.sum((w - WEIGHTS["a"]) * (h @ (w - WEIGHTS["a"]))) for d, w in tried.items()}
    best = min(errors, key=errors.get)
    assert pruned.layers[0]["damping"] == best
    assert best != DAMPINGS[0], "the case must tell the dampings apart"
    assert_same(pruned.params, {"a": tried[best]})


def test_layers_under_different_constraints_and_layers_skipped():
    pruned = run(constraint=ByPath({"a": NM(2, 4, axis="out"), "*": Cardinality(sparsity=0.75)}), leaves=["a", "c"])
    mask = np.asarray(pruned.support["a"])
    assert (mask.reshape(6, 2, 4).sum(-1) == 2).all()
    assert np.asarray(pruned.support["c"]).sum() == 6
    assert pruned.support["b"] is None
    assert pruned.params["b"] is WEIGHTS["b"]


def test_what_is_cut_before_stays_cut():
    within = {"a": draw(6, 8) > -0.5, "b": None, "c": None}
    pruned = run(constraint=Intersection((Support(within), HALF)))
    assert not np.any(np.asarray(pruned.support["a"]) & ~within["a"])
    assert np.asarray(pruned.support["a"]).sum() == 24


@pytest.mark.slow
def test_operators_with_one_input_share_one_gram(monkeypatch):
    seen = []
    sums = calibration.sums_of
    monkeypatch.setattr(calibration, "sums_of", lambda form, *rest: seen.append(form.n_in) or sums(form, *rest))
    params = {name: draw(6, 4) for name in "qkv"} | {"o": draw(4, 6)}

    def attention(p, x):
        x = jnp.asarray(x)
        return (jax.nn.softmax(x @ p["q"] @ (x @ p["k"]).T) @ (x @ p["v"])) @ p["o"]

    pruned = run(attention, params, [BATCHES[0]])
    assert seen == [6, 4]
    assert [entry["layer"] for entry in pruned.layers] == ["q", "k", "v", "o"]


@pytest.mark.slow
def test_operators_with_one_input_share_its_factors(monkeypatch):
    seen, inner = [], factors._metric_on_host
    monkeypatch.setattr(
        factors, "_metric_on_host", lambda ready, *rest: seen.append(len(ready.gram)) or inner(ready, *rest)
    )
    params = {name: draw(6, 4) for name in "qkv"} | {"o": draw(12, 6)}

    def heads(p, x):
        x = jnp.asarray(x)
        return jnp.concatenate([jnp.tanh(x @ p[name]) for name in "qkv"], axis=-1) @ p["o"]

    pruned = run(heads, params, solver=ADMM(levels=1, iterations=3))
    assert seen == [6, 12]
    x = np.concatenate(BATCHES)
    gram = po.curvature.Gram.checked(jnp.asarray(x.T @ x / len(x)))
    for name in "qkv":
        alone = po.Problem(po.objectives.Reconstruction(jnp.asarray(params[name]), gram, 0.01), subject_to=HALF)
        found = po.solve(alone, ADMM(levels=1, iterations=3))
        np.testing.assert_allclose(pruned.params[name], found.value, atol=1e-9)


@pytest.mark.slow
def test_repeated_blocks_are_compiled_once():
    params = {str(i): {"up": jnp.asarray(draw(6, 9)), "down": jnp.asarray(draw(9, 6))} for i in range(6)}

    def blocks(p, x):
        x = jnp.asarray(x)
        for i in range(6):
            x = x + jnp.tanh(x @ p[str(i)]["up"]) @ p[str(i)]["down"]
        return x

    before = segment._run._cache_size()
    pruned = run(blocks, params, [jnp.asarray(BATCHES[0])], solver=Score())
    assert len(pruned.layers) == 12
    assert segment._run._cache_size() - before == 2  # from up to down, from down to the next up


@pytest.mark.parametrize("scanned", ["scan", "reverse", "fori"])
@pytest.mark.slow
def test_scanned_layers_are_their_own_layers(scanned):
    stack = {"w": draw(3, 6, 6)}
    order = (2, 1, 0) if scanned == "reverse" else (0, 1, 2)

    def fn(p, x):
        step = lambda x, w: (jnp.maximum(x @ w, 0.0), None)  # noqa: E731
        if scanned == "fori":
            return jax.lax.fori_loop(0, 3, lambda i, x: step(x, p["w"][i])[0], jnp.asarray(x))
        return jax.lax.scan(step, jnp.asarray(x), p["w"], reverse=scanned == "reverse")[0]

    pruned = run(fn, stack)
    x, new = np.concatenate(BATCHES), np.zeros((3, 6, 6))
    for i in order:
        new[i] = one_layer(stack["w"][i], x)
        x = relu(x @ new[i])
    assert_same(pruned.params, {"w": new})
    assert [entry["layer"] for entry in pruned.layers] == [f"w[{i}]" for i in order]
    assert np.asarray(pruned.support["w"]).sum() == 54


@pytest.mark.slow
def test_shared_weights_see_all_their_inputs():
    """A recurrent network: one matrix at every step, its Gram the sum over the steps of the network as it was."""
    params = {"in": draw(6, 5), "again": draw(5, 5)}

    def rnn(p, x):
        h = jnp.asarray(x) @ p["in"]
        return jax.lax.scan(lambda h, _: (jnp.tanh(h @ p["again"]), None), h, None, length=3)[0]

    pruned = run(rnn, params)
    x = np.concatenate(BATCHES)
    w_in = one_layer(params["in"], x)
    h, seen = x @ w_in, []
    for _ in range(3):
        seen.append(h)
        h = np.tanh(h @ params["again"])
    assert_same(pruned.params, {"in": w_in, "again": one_layer(params["again"], np.concatenate(seen))})


@pytest.mark.slow
def test_experts_are_problems_of_their_own():
    params = {"experts": draw(3, 6, 4)}
    routes = [np.array([0, 0, 1, 1, 1, 0, 1])]

    def mixture(p, batch):
        x, route = batch
        gate = jax.nn.one_hot(route, 3, dtype=x.dtype)
        return jnp.einsum("te,td,edf->tf", gate, x, p["experts"], optimize=[(0, 1), (0, 1)])

    def sorted_mixture(p, batch):
        x, route = (jnp.asarray(part) for part in batch)
        order = jnp.argsort(route, stable=True)
        sizes = jnp.sum(route[:, None] == jnp.arange(3)[None], axis=0).astype(jnp.int32)
        return jax.lax.ragged_dot(x[order], p["experts"], sizes)

    x = BATCHES[0]
    pruned = run(sorted_mixture, params, [(x, routes[0])])
    # One budget of 36 of 72: the third keeps its half by magnitude, the others share 24 by the layer's error.
    grams = [x[routes[0] == e].T @ x[routes[0] == e] for e in (0, 1)]
    rows = [np.diagonal(h) + 0.01 * np.trace(h) / len(h) for h in grams]
    scores = np.stack([r[:, None] * w**2 for r, w in zip(rows, params["experts"][:2], strict=True)])
    masks = scores >= np.sort(scores.reshape(-1))[-24]
    assert masks[0].sum() != 12
    for e, h in enumerate(grams):
        wanted = refit(params["experts"][e], h, masks[e], 0.01 * np.trace(h) / len(h))
        np.testing.assert_allclose(pruned.params["experts"][e], wanted, rtol=1e-8)
    assert pruned.layers[0]["notes"] == ["experts{2} saw no input: pruned by magnitude"]
    third = params["experts"][2]
    np.testing.assert_array_equal(np.asarray(pruned.support["experts"][2]), kept_by_saliency(third, np.eye(6), 12))
    assert set(pruned.solutions) == {"experts{0}", "experts{1}", "experts{2}"}


def test_convolutions_by_hand():
    image, kernel = draw(4, 5, 5, 2), draw(3, 3, 2, 3)

    def fn(p, x):
        numbers = ("NHWC", "HWIO", "NHWC")
        return jax.lax.conv_general_dilated(jnp.asarray(x), p["k"], (1, 1), "VALID", dimension_numbers=numbers)

    pruned = run(fn, {"k": kernel}, [image[:3], image[3:]])
    windows = [image[n, i : i + 3, j : j + 3].ravel() for n in range(4) for i in range(3) for j in range(3)]
    wanted = one_layer(kernel.reshape(18, 3), np.array(windows)).reshape(3, 3, 2, 3)
    assert_same(pruned.params, {"k": wanted})


@pytest.mark.slow
def test_half_precision_weights_are_solved_in_float32():
    params = {name: jnp.asarray(w, jnp.bfloat16) for name, w in WEIGHTS.items()}
    pruned = run(lambda p, x: mlp(p, x.astype(jnp.bfloat16)), params, solver=Score())
    assert pruned.params["a"].dtype == jnp.bfloat16
    kept = np.asarray(pruned.support["a"])
    np.testing.assert_array_equal(np.asarray(pruned.params["a"])[kept], np.asarray(params["a"])[kept])


class Killed(Exception):
    pass


def killed_at(monkeypatch, layer):
    """`solve` of the plan that dies at the given layer; the list of its calls."""
    solve, calls = po.solve, []

    def dying(*args, **words):
        calls.append(1)
        if len(calls) > layer:
            raise Killed
        return solve(*args, **words)

    monkeypatch.setattr(layer_task, "solve", dying)
    return calls


@pytest.mark.parametrize("layer", [0, 1, 2])
def test_a_killed_run_continues_to_the_same_bits(tmp_path, monkeypatch, layer):
    whole = run(target="network")
    with monkeypatch.context() as patch:
        killed_at(patch, layer)
        with pytest.raises(Killed):
            run(target="network", run_dir=tmp_path)
    with monkeypatch.context() as patch:
        calls = killed_at(patch, 99)
        again = run(target="network", run_dir=tmp_path)
        assert len(calls) == 3 - layer
    assert_identical(again.params, whole.params)
    assert_identical(again.support, whole.support)
    assert {n: s.objective for n, s in again.solutions.items()} == {n: s.objective for n, s in whole.solutions.items()}
    assert [e["relative_error"] for e in again.layers] == [e["relative_error"] for e in whole.layers]


def test_a_folder_belongs_to_one_run(tmp_path):
    run(run_dir=tmp_path / "run")
    folder = tmp_path / "run"
    for words, named in (
        ({"constraint": Cardinality(sparsity=0.6)}, "constraint"),
        ({"solver": Score()}, "solver"),
        ({"damping": 0.1}, "damping"),
        ({"target": "network"}, "target"),
        ({"batches": BATCHES[:2]}, "batches"),
        ({"params": {**WEIGHTS, "c": 2 * WEIGHTS["c"]}}, "params"),
        ({"constraint": Intersection((Support({"a": draw(6, 8) > -1}), HALF))}, "constraint"),
    ):
        with pytest.raises(ValueError, match=f"run_dir.*other {named}; repeat that call"):
            run(run_dir=folder, **words)
    file = folder / "layer-00001.safetensors"
    file.write_bytes(file.read_bytes()[:-9])
    with pytest.raises(ValueError, match=r"layer-00001.*damaged.*delete it"):
        run(run_dir=folder)
    (tmp_path / "else").mkdir()
    (tmp_path / "else" / "thesis.tex").write_text("x")
    with pytest.raises(ValueError, match="holds other files"):
        run(run_dir=tmp_path / "else")
    with pytest.raises(ValueError, match="is a file"):
        run(run_dir=file)


def test_prune_goes_layer_by_layer_in_stages():
    pruned = po.prune(mlp, WEIGHTS, BATCHES, HALF, method="wanda_refit", progress=False)
    assert_same(pruned.params, by_hand(BATCHES))
    schedule = po.plans.Iterative(3)
    staged = po.prune(mlp, WEIGHTS, BATCHES, HALF, method="wanda", schedule=schedule, progress=False)
    assert staged.kept == pruned.kept
    assert [len(stage["layers"]) for stage in staged.history] == [3, 3, 3]
    kept = [stage["kept"] for stage in staged.history]
    assert kept == sorted(kept, reverse=True)


def test_leaves_that_no_operator_reads_are_listed_or_refused():
    params = {**WEIGHTS, "position": draw(1, 6)}

    def fn(p, x):
        return mlp(p, jnp.asarray(x) + p["position"])

    pruned = run(fn, params)
    assert pruned.history[0]["left_out"].keys() == {"position"}
    assert "left out: position" in repr(pruned)
    assert pruned.support["position"] is None
    with pytest.raises(ValueError, match=r"no operator can be captured for 'position': it meets data in add"):
        run(fn, params, leaves=["a", "position"])
    with pytest.raises(ValueError, match=r"'aa' matches no leaf; the paths are \['a'"):
        run(leaves=["aa"])


def test_bad_input():
    with pytest.raises(ValueError, match="the inputs of 'a' are zero in all batches"):
        run(batches=[np.zeros((4, 6))])
    with pytest.raises(ValueError, match="target='dense' is unknown; pass 'layer', 'network' or 'stream'"):
        run(target="dense")
    with pytest.raises(ValueError, match=r"damping=\[0.1, 0.2\] is no single number; pass those to try as dampings="):
        run(damping=[0.1, 0.2])
    with pytest.raises(ValueError, match="damping=-1 is no number >= 0"):
        run(damping=-1)
    for dampings in ("a", np.array([[0.1, np.nan]])):
        with pytest.raises(ValueError, match="is no number >= 0 and no sequence of them"):
            LayerMethod(REFIT, dampings=dampings)
    with pytest.raises(TypeError, match="solver is 'wanda'; pass a pruneopt Solver"):
        run(solver="wanda")
    with pytest.raises(
        ValueError, match=r"method='fisher' models the whole network's loss; pass one of wanda, .*Solver"
    ):
        layerwise(mlp, WEIGHTS, BATCHES, HALF, "fisher")
    with pytest.raises(
        ValueError, match=r"method='wand' is unknown; pass one of random, .*a row of your own, or a Sol"
    ):
        layerwise(mlp, WEIGHTS, BATCHES, HALF, "wand")
    with pytest.raises(TypeError, match=r"constraint is 0.5; pass a pruneopt Constraint"):
        run(constraint=0.5)
    with pytest.raises(ValueError, match="of: leaf 'b' matches none"):
        run(constraint=ByPath({"a": HALF}))
    with pytest.raises(ValueError, match="weights have shape"):
        run(weights=lambda batch: np.ones(5))
    with pytest.raises(ValueError, match="batch 1 has structure"):
        run(batches=[BATCHES[0], (BATCHES[1],)])
    with pytest.raises(ValueError, match=r"mask 'a' has shape \(2, 2\), its leaf has \(6, 8\)"):
        run(constraint=Support({"a": np.ones((2, 2), bool), "b": None, "c": None}))


def test_a_network_that_changes_with_the_batch_is_refused():
    def fn(p, x):
        return mlp(p, x) if len(x) > 3 else jnp.asarray(x) @ p["a"]

    with pytest.raises(ValueError, match="it must be one network"):
        run(fn)


# ------------------------------------------------------------------------- what fresh eyes found


@pytest.mark.parametrize("what", ["fn", "key"])
def test_a_folder_knows_its_function_and_key(tmp_path, what):
    run(run_dir=tmp_path, key=0)
    other = {"fn": lambda p, x: jnp.tanh(mlp(p, x))} if what == "fn" else {"key": 1}
    with pytest.raises(ValueError, match=f"holds a run with other .*{what}"):
        run(run_dir=tmp_path, **{"key": 0} | other)
    assert_identical(run(run_dir=tmp_path, key=0).params, run(key=0).params)


def test_damaged_folders_are_said_to_be(tmp_path):
    run(run_dir=tmp_path)
    layers = sorted(tmp_path.glob("layer-*"))
    layers[0].write_bytes(layers[1].read_bytes())
    with pytest.raises(ValueError, match="is damaged"):
        run(run_dir=tmp_path)
    (tmp_path / "run.json").write_text("[]")
    with pytest.raises(ValueError, match="is damaged"):
        run(run_dir=tmp_path)


def test_a_mask_in_the_function_and_the_support_agree():
    w, m = draw(6, 8), np.random.default_rng(3).random((6, 8)) < 0.5
    fn = lambda p, x: jnp.asarray(x) @ (p["w"] * p["m"])  # noqa: E731
    pruned = run(fn, {"w": w, "m": m.astype(np.float64)}, constraint=HALF, solver=Score(), leaves="w")
    kept = np.asarray(pruned.support["w"])
    assert not np.any(np.asarray(pruned.params["w"])[~kept])
    assert pruned.kept == kept.sum() == 24


@pytest.mark.parametrize("bad", [-1.0, np.nan, np.inf])
def test_bad_position_weights(bad):
    with pytest.raises(ValueError, match="weights hold a NaN, an infinity or a negative"):
        run(weights=lambda x: np.full(len(x), bad))
    with pytest.raises(ValueError, match="weights hold a NaN, an infinity or a negative"):
        po.structure.capture(mlp, WEIGHTS, BATCHES, weights=lambda x: np.full(len(x), bad))


def test_held_out_zeros_choose_nothing():
    with pytest.raises(ValueError, match="held_out: the inputs of 'a' are zero"):
        run(held_out=[0 * BATCHES[0]])


@pytest.mark.slow
def test_overflow_inside_the_network_names_the_layer():
    fn = lambda p, x: jnp.log(-jnp.abs(jnp.asarray(x) @ p["a"])) @ p["z"]  # noqa: E731
    with pytest.raises(ValueError, match="the inputs of 'z' overflow or are not a number"):
        run(fn, {"a": draw(6, 3), "z": draw(3, 4)})


def test_masks_are_boolean():
    with pytest.raises(TypeError, match="mask 'a' has dtype float64"):
        run(constraint=Support({"a": np.full(WEIGHTS["a"].shape, 0.3)}))


def test_the_layers_name_is_in_its_constraints_error():
    with pytest.raises(ValueError, match="layer 'a'"):
        run(constraint=NM(2, 5))


def test_complex_products_are_refused():
    phases = jax.lax.complex(jnp.cos(jnp.arange(6.0)), jnp.sin(jnp.arange(6.0)))
    with pytest.raises(ValueError, match="complex"):
        run(
            lambda p, x: jnp.abs(x @ jax.lax.complex(p["w"], 0 * p["w"])),
            {"w": jnp.asarray(draw(6, 4))},
            [phases[None]],
        )


def test_an_unreadable_use_is_noted():
    fn = lambda p, x: jnp.asarray(x) @ p["w"] + (3 * jnp.asarray(x)) @ jnp.tanh(p["w"])  # noqa: E731
    history = run(fn, {"w": draw(6, 4)}).layers
    assert any("a use that cannot be read" in note for note in history[0]["notes"])


def test_an_init_that_is_not_finite():
    x = BATCHES[0]
    f = po.objectives.Reconstruction(jnp.asarray(WEIGHTS["a"]), po.curvature.Gram.from_inputs(jnp.asarray(x)))
    with pytest.raises(ValueError, match="init holds a NaN"):
        po.solve(po.Problem(f, subject_to=HALF), ADMM(), init=np.nan * jnp.asarray(WEIGHTS["a"]))


@pytest.mark.slow
def test_a_layer_that_would_collapse_is_named():
    p = {"first": jnp.ones((2, 2), jnp.float32), "second": jnp.ones((2, 2), jnp.float32)}
    x = np.random.default_rng(0).standard_normal((8, 2)).astype(np.float32)
    with pytest.raises(ValueError, match=r"layer 'first': .* keeps no weight of the matrix: the layer would collapse"):
        layerwise(
            lambda p, x: jnp.tanh(x @ p["first"]) @ p["second"],
            p,
            [x],
            Cardinality(sparsity=0.9),
            Score(),
            progress=False,
        )
