"""The head-to-head of allocations at toy size."""

import math

import pytest

from paper_reproductions.head_to_head import allocation

pytestmark = pytest.mark.default_flags


@pytest.mark.slow
@pytest.mark.usefixtures("optimised")
def test_allocations_keep_the_same_number_of_weights_and_ours_is_the_best(folder, capsys):
    words = ["--method", "wanda", "--draws", "1", "--segments", "2", "--measured", "2", "--test-segments", "2"]
    found = allocation.main([*words, "--levels", "0.6", "--generations", "1"])
    printed = capsys.readouterr().out
    rows = [line for line in printed.splitlines() if ", perplexity " in line]
    assert len(rows) == len(found) == 7
    assert all("kept 90,624," in row for row in rows)
    value = {name: scores[0][0] for (name, _), scores in found.items()}
    assert all(math.isfinite(v) for v in value.values())
    assert value["allocated"] < min(value["uniform"], value["by_size"], value["ATP"])
