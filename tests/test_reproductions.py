"""The scripts of paper_reproductions at toy size, and what they claim to measure against measured figures."""

import json
import math
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import test_checkpoints

import pruneopt as po
from paper_reproductions.benbaki_2023 import mlpnet, retrained, stages
from paper_reproductions.evci_2020 import run as evci
from paper_reproductions.fang_2023 import run as fang
from paper_reproductions.frankle_2019 import run as frankle
from paper_reproductions.frantar_2023 import run as frantar
from paper_reproductions.louizos_2018 import run as louizos
from paper_reproductions.meng_2024 import run as meng
from paper_reproductions.networks import decoder, resnet20
from paper_reproductions.networks.lenet300 import living
from paper_reproductions.yu_2022 import run as yu

pytestmark = pytest.mark.default_flags
SCRIPTS = Path(frantar.__file__).parents[1]


@pytest.mark.slow
@pytest.mark.parametrize("config", [test_checkpoints.LLAMA, test_checkpoints.OPT], ids=["llama-7b", "opt-125m"])
def test_a_checkpoint_in_a_folder_is_pruned_and_its_claims_are_printed(tmp_path, capsys, config):
    """A tiny network of random weights under a known name."""
    name = {"llama": "llama-7b", "opt": "opt-125m"}[config["model_type"]]
    folder = tmp_path / name
    folder.mkdir()
    config = config | {"max_position_embeddings": 8, "hidden_size": 16, "intermediate_size": 16, "ffn_dim": 16}
    config |= {"num_attention_heads": 2, "word_embed_proj_dim": 16, "head_dim": 8, "num_key_value_heads": 1}
    config |= {"num_hidden_layers": 1}
    test_checkpoints.write(folder, config)
    rng = np.random.default_rng(3)
    for part, size in (("test", 50), ("calibrate", 300)):
        np.save(tmp_path / f"{part}.npy", rng.integers(0, 23, size))
    words = [
        "--model",
        str(folder),
        "--test",
        str(tmp_path / "test.npy"),
        "--calibrate",
        str(tmp_path / "calibrate.npy"),
    ]
    words += ["--segments", "6", "--methods", "magnitude", "sparsegpt", "--levels", "50%"]
    found = frantar.main(words)
    said = json.loads((SCRIPTS / "frantar_2023" / "claimed.json").read_text())["perplexity"][name]
    printed = capsys.readouterr().out
    assert f"[{said['dense']}]" in printed
    row = next(line for line in printed.splitlines() if line.startswith("sparsegpt") and "[" in line)
    assert f"[{said['50%']['sparsegpt']:g}]" in row
    assert set(found) == {(method, "50%") for method in ("magnitude", "sparsegpt")}
    assert all(math.isfinite(value) and seconds > 0 for value, _, seconds in found.values())


def test_a_model_needs_its_texts(tmp_path):
    with pytest.raises(SystemExit, match="--model needs --test and --calibrate"):
        frantar.main(["--model", str(tmp_path)])


@pytest.mark.slow
def test_admm_grad_is_no_worse_than_its_mask_with_the_old_weights():
    rng = np.random.default_rng(0)
    x = rng.standard_normal((60, 12)) @ rng.standard_normal((12, 12))
    h, w0 = x.T @ x, rng.standard_normal((12, 8))
    for level, kept in (("0.5", 48), ("2:4", 48), ("0.9", 9)):
        w, mask = meng.admm_grad(h, w0, level)
        assert mask.sum() == kept
        assert not np.any(w[~mask])
        assert meng.error(h, w0, w) < meng.error(h, w0, w0 * mask)


@pytest.mark.slow
def test_a_width_that_eight_does_not_divide_is_pruned_to_half_the_pattern():
    layer = {"w2": np.ones((12, 4), np.float32), "wq": np.ones((16, 4), np.float32)}
    network = decoder.Decoder({"layers": {"0": layer}}, None, ["layers/*/w*"])
    layer = frantar.pruned(network, None, "magnitude", "4:8")["layers"]["0"]
    masks = {name: np.asarray(w) != 0 for name, w in layer.items()}
    assert (masks["w2"].reshape(3, 4, 4).sum(1) == 2).all()
    assert (masks["wq"].reshape(2, 8, 4).sum(1) == 4).all()


@pytest.mark.slow
@pytest.mark.usefixtures("optimised")
def test_one_layer_has_the_peers_errors(folder, capsys):
    """The figures of the peers' own code on this layer, with their own weights and with the best on their supports."""
    own, best, after = meng.main(["--layers", "resnet20_l3_conv", "--levels", "0.7"])
    expected = {
        "magnitude": (1.590e-1, 4.230e-2),
        "Wanda": (1.490e-1, 4.186e-2),
        "SparseGPT": (4.960e-2, 3.780e-2),
        "ALPS": (2.855e-2, 2.855e-2),
    }
    for method, errors in expected.items():
        at = ("resnet20_l3_conv", "0.7", method)
        # Theirs cuts int(576 * 0.7) weights of an output, ours keeps int(576 * 0.3): one fewer.
        assert (own[at], best[at]) == pytest.approx(errors, rel=0.015 if method == "Wanda" else 0.005), method
    errors = {method: own["resnet20_l3_conv", "0.7", method] for method in meng.METHODS}
    assert errors["best"] < errors["ALPS"] < errors["ADMM-Grad"] < errors["SparseGPT"] < errors["Wanda"]
    none, few, exact = (
        after["resnet20_l3_conv", "0.7"][kind][0] for kind in ("none", "10 conjugate gradients", "exact")
    )
    assert exact <= few < 1.01 * exact < 0.3 * none
    assert "best weights on each method's support" in capsys.readouterr().out


@pytest.mark.slow
@pytest.mark.usefixtures("optimised")
def test_stories_at_toy_size(folder, capsys):
    words = ["--draws", "1", "--segments", "8", "--test-segments", "6", "--levels", "2:4"]
    found = frantar.main([*words, "--methods", "magnitude", "wanda", "sparsegpt", "balanced"])
    score = {method: value for (method, _), (value, _, _) in found.items()}
    assert 5 < score["balanced"] < score["sparsegpt"] < score["wanda"] < score["magnitude"]
    assert "stories260k, dense: " in capsys.readouterr().out


@pytest.mark.parametrize("paper", ["frantar_2023", "meng_2024"])
def test_claims_say_where_they_come_from(paper):
    claimed = json.loads((SCRIPTS / paper / "claimed.json").read_text())
    assert claimed["sources"]
    assert claimed["verified"]
    assert "not" in claimed["note"]
    for levels in claimed.get("perplexity", {}).values():
        for level, row in levels.items():
            assert level == "dense" or set(row) <= set(frantar.METHODS)
            assert level == "dense" or min(row.values()) > levels["dense"]


def test_what_is_left_of_a_sparse_lenet():
    masks = {"fc1": np.zeros((784, 300), bool), "fc2": np.zeros((300, 100), bool), "fc3": np.zeros((100, 10), bool)}
    masks["fc1"][3, :2] = masks["fc1"][5, 7] = True  # neuron 7 goes nowhere
    masks["fc2"][:2, 4] = masks["fc2"][9, 8] = True  # neuron 9 comes from nowhere
    masks["fc3"][4, :5] = masks["fc3"][8, 1] = True
    sizes, zeros = living(masks)
    assert sizes == [2, 2, 2]
    assert zeros == 1 - (2 + 2 + 6) / (4 + 4 + 20)


@pytest.mark.slow
def test_the_scripts_of_sparse_training_run_and_meet_their_counts(folder, optimised, monkeypatch, capsys):
    found = evci.main(["--steps", "60"])
    assert {name for name, _ in found} == {"RigL", "SET", "static", "gradual magnitude", "dense"}
    assert found["dense", 0][:2] == ([784, 300, 100], 0.0)
    assert capsys.readouterr().out.count("6,622 weights") == 4  # 2,352 + 3,270 + 1,000
    monkeypatch.setattr(frankle, "LEVELS", (1,))
    found = frankle.main(["--steps", "20", "--rounds", "1"])
    assert [round(found[i, "ticket", 0][0], 3) for i in range(2)] == [1.0, 0.8]
    assert found[1, "reinitialised", 0][0] == found[1, "ticket", 0][0]
    monkeypatch.setattr(louizos, "GATE_RATES", {"gates": 1e-3})
    found = louizos.main(["--steps", "30"])
    assert all(100 - error > 30 for _, error, _ in found.values())


def figures(printed, name):
    """The first number of the last line that begins with `name`."""
    line = [line for line in printed.splitlines() if line.startswith(name)][-1]
    return float(line.removeprefix(name).split()[0])


@pytest.mark.slow
def test_tables_of_one_stage_run_on_mlpnet(folder, monkeypatch, capsys):
    methods = ["magnitude", "M-FAC", "CHITA, each step refitted"]
    words = ["--seeds", "1", "--examples", "60", "--sparsities", "0.5", "--methods", *methods]
    monkeypatch.setattr(sys, "argv", ["mlpnet.py", *words])
    mlpnet.main()
    printed = capsys.readouterr().out.split("Q, the first draw")[0]
    assert figures(printed, "magnitude") == pytest.approx(93.93, abs=0.01)  # as the paper has it
    assert all(92 < figures(printed, name) < 95 for name in methods)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["CHITA, each step refitted", "CHITA, 50 iterations"])
def test_stages_run_on_mlpnet(folder, monkeypatch, capsys, name):
    few = lambda *given: replace(stages.mlpnet_task(*given), stages=3, groups=40, judged=2)  # noqa: E731
    monkeypatch.setitem(stages.TASKS, "mlpnet", few)
    monkeypatch.setattr(sys, "argv", ["stages.py", "--seeds", "1", "--sparsities", "0.5", "--methods", name])
    stages.main()
    assert figures(capsys.readouterr().out.split("CPU seconds")[0], name) > 90


@pytest.mark.slow
@pytest.mark.parametrize("name", ["gradual magnitude", "gradual, Fisher^1/4", "one cut, then Adam"])
def test_retraining_runs_on_mlpnet(folder, monkeypatch, capsys, name):
    def few(*given):
        task, *others = retrained.mlpnet_task(*given)
        return replace(task, seen=5 * 20 * 64, piece=20), *others

    monkeypatch.setitem(retrained.TASKS, "mlpnet", (few, (name,), (0.8,)))
    monkeypatch.setattr(sys, "argv", ["retrained.py", "--seeds", "1"])
    retrained.main()
    assert figures(capsys.readouterr().out, f"{name} 0.002") > 92


def narrow(folder):
    """The first half of the channels inside each block of ResNet-20: (masked params, what shrink makes of them)."""
    params = resnet20.load_chita(folder)
    masks = jax.tree.map(lambda w: np.ones(w.shape, bool), params)
    for block in (masks[s][b] for s in resnet20.STAGES for b in resnet20.BLOCKS):
        half = block["conv1"]["kernel"].shape[-1] // 2
        block["conv2"]["kernel"][:, :, half:] = False
    images = np.random.default_rng(0).standard_normal((6, 32, 32, 3), np.float32)
    small = po.shrink(resnet20.forward, params, images, masks)
    return jax.tree.map(np.multiply, params, masks), small, images


@pytest.mark.slow
def test_a_shrunk_resnet_trains_as_the_masked_one_does(folder):
    """Batch norm by the batch, running statistics and gradients: what is left has them unchanged."""
    masked, small, images = narrow(folder)

    def trained(params, fn):
        logits, updates = fn(params, images)
        return jnp.sum(logits**2), (logits, updates)

    both = {}
    for name, params in (("masked", masked), ("small", small.params)):
        both[name] = jax.jit(jax.grad(partial(trained, fn=resnet20.train_forward), has_aux=True))(params)
    (wide, (logits, moved)), (gradient, (found, updates)) = both["masked"], both["small"]
    np.testing.assert_allclose(found, logits, rtol=1e-3, atol=1e-3)
    for of, like in ((updates, moved), (gradient, wide)):
        jax.tree.map(partial(np.testing.assert_allclose, rtol=2e-2, atol=2e-2), of, small.shrink_like(like))
    cut = small.of(resnet20.train_forward, images)(small.params, images)
    jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-4), cut, (found, updates))


@pytest.mark.slow
def test_statistics_move_without_a_gradient_and_a_settled_network_computes_the_same(folder):
    _, small, images = narrow(folder)
    labels = np.arange(6)
    rest = po.plans.settle(resnet20.forward, small.params, [images])
    before, after = (resnet20.forward(p, images) for p in (small.params, rest))
    np.testing.assert_allclose(after, before, rtol=1e-3, atol=1e-3)

    def loss(params):
        logits = jax.nn.log_softmax(resnet20.train_forward(params, images)[0])
        return -jnp.mean(logits[jnp.arange(6), labels])

    slope, moved = jax.grad(loss)(rest), resnet20.train_forward(rest, images)[1]
    given = jax.tree.map(jnp.array, rest)
    found, _ = fang.step(given, fang.OPTIMIZER.init(given), rest, (images, labels), 0.1, 0.0, 1.0)
    np.testing.assert_allclose(found["norm1"]["var"], moved["norm1"]["var"], rtol=1e-6)
    for name in ("stage1", "stage3"):
        w, g = (tree[name]["1"]["conv1"]["kernel"] for tree in (rest, slope))
        expected = w - 0.1 * 1.9 * (g + fang.DECAY * w)  # Nesterov's first step
        np.testing.assert_allclose(found[name]["1"]["conv1"]["kernel"], expected, rtol=1e-3, atol=1e-4)


@pytest.mark.slow
def test_the_same_fine_tuning_of_cut_channels_at_toy_size(folder, monkeypatch, capsys):
    monkeypatch.delenv("PEERS", raising=False)
    monkeypatch.setattr(fang, "HELD", 100)
    monkeypatch.setattr(fang.structured, "ANEW", 100)
    monkeypatch.setattr(fang.structured, "MEASURED", 50)
    words = ["--rows", "magnitude", *fang.OURS[1:], "--images", "100", "--shares", "0.51", "--steps", "1", "2"]
    found = fang.main([*words, "--rates", "0.01", "1e3"])
    printed = capsys.readouterr().out
    assert "ours alone" in printed
    assert printed.count("FLOPs 0.5") == 2
    assert printed.count("2 steps at 0.01") == 2  # the rate that does not destroy the network
    assert set(found) == {(row, 0.51, steps) for row in fang.OURS[1:] for steps in (0, 1, 2)}
    assert found[fang.OURS[1], 0.51, 0] == found[fang.OURS[2], 0.51, 0]
    assert found[fang.OURS[1], 0.51, 2] != found[fang.OURS[2], 0.51, 2]


@pytest.mark.slow
def test_a_network_comes_back_from_pytorch(folder):
    torch = pytest.importorskip("torch")
    _, small, images = narrow(folder)
    network = fang.module(torch, small.params)
    jax.tree.map(np.testing.assert_array_equal, fang.arrays(network), small.params)
    logits = network(torch.from_numpy(images.transpose(0, 3, 1, 2).copy())).detach().numpy()
    np.testing.assert_allclose(logits, resnet20.forward(small.params, images), rtol=1e-3, atol=1e-3)


@pytest.mark.slow
@pytest.mark.usefixtures("optimised")
def test_channels_are_cut_by_their_traces_at_toy_size(folder, monkeypatch, capsys):
    monkeypatch.setattr(yu, "HELD", 32)
    monkeypatch.setattr(yu, "BATCH", 8)
    words = ["--ratio", "0.5", "--images", "16", "--steps", "2", "--tried", "1", "--rates", "0.01"]
    found = yu.main([*words, "--rows", "Hessian trace (HAP)", "magnitude"])
    share = {name: figures[0] for (name, _), figures in found.items()}
    assert 0.3 < share["Hessian trace (HAP)"] < 0.8
    assert 0 <= share["Hessian trace (HAP)"] - share["magnitude"] < 0.02  # within its FLOPs, and no more channels fit
    printed = capsys.readouterr().out
    widths = [int(n) for n in printed.split("widths [")[1].split("]")[0].split(",")]
    assert sum(widths) == 336 - int(0.5 * 336)
