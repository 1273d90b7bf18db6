"""The head-to-heads of structured pruning at toy size."""

import argparse

import numpy as np
import pytest

from paper_reproductions.head_to_head import latency_budget, structured, structured_minilm
from paper_reproductions.networks import minilm

pytestmark = [pytest.mark.default_flags, pytest.mark.slow, pytest.mark.usefixtures("optimised")]


def test_rows_of_one_budget_and_the_cost_of_each_program(folder, monkeypatch):
    """MLPNet: reconstruction at equal widths is better than magnitude, and allocated widths than equal ones."""
    monkeypatch.setattr(structured, "MEASURED", 250)
    given = argparse.Namespace(images=500, shares=[0.5], rows=structured.ROWS)
    found = structured.run(structured.MLPNet(folder), 0, given)
    flops, plain, *_ = np.array([found[row, 0.5] for row in structured.ROWS]).T
    assert np.all(flops <= 0.5)
    assert np.all(flops > 0.4)
    assert plain[0] + 5 < plain[1] <= plain[2] + 1
    assert plain[2] > 90


def test_widths_within_a_budget_of_seconds(folder, monkeypatch, capsys):
    monkeypatch.setattr(structured, "MEASURED", 50)
    monkeypatch.setattr(structured, "ANEW", 50)
    given = argparse.Namespace(batch=16, faster=[1.2], images=100, rounds=5)
    ((faster, said, took, plain, fresh),) = latency_budget.run(structured.ResNet20(folder), 0, given)
    widths = capsys.readouterr().out.split("widths [")[1].split("]")[0].split(", ")
    assert all(int(width) % 8 == 0 for width in widths)
    assert said >= faster
    assert took > 0.9
    assert min(plain, fresh) > 30


def test_heads_and_neurons_of_a_sentence_encoder(folder, monkeypatch, capsys):
    try:
        minilm.locate()
    except FileNotFoundError as error:
        pytest.skip(str(error))
    monkeypatch.setattr(structured_minilm, "TESTED", 16)
    monkeypatch.setattr(structured_minilm, "ASIDE", 8)
    monkeypatch.setattr(structured_minilm, "MEASURED", 1)
    monkeypatch.setattr(structured_minilm, "STEP", {"heads": 6, "neurons": 768})
    monkeypatch.setattr("sys.argv", ["structured_minilm", "--lines", "16", "--length", "32"])
    structured_minilm.main()
    printed = capsys.readouterr().out.splitlines()
    rows = [next(line for line in printed if line.startswith(f"{name}  ")) for name in structured_minilm.ROWS]
    cosine, flops = (np.array([float(row.split()[-k]) for row in rows]) for k in (4, 2))
    assert np.allclose(flops, 0.5, atol=0.01)
    assert np.all(cosine[1:] > cosine[0])
    assert cosine[-1] > 0.6
