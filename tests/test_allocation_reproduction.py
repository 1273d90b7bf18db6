"""The head-to-head of allocations at toy size."""

import math

import pytest

from paper_reproductions.head_to_head import allocation

pytestmark = pytest.mark.default_flags


@pytest.mark.slow
@pytest.mark.usefixtures("optimised")
def test_all_rows_keep_the_same_number_of_weights_and_predictions_are_printed(folder, capsys):
    words = ["--method", "wanda", "--draws", "1", "--segments", "2", "--measured", "2", "--test-segments", "2"]
    found = allocation.main([*words, "--levels", "0.6", "--generations", "1", "--step", "0.2"])
    printed = capsys.readouterr().out
    rows = [line for line in printed.splitlines() if ", perplexity " in line]
    assert len(rows) == len(found) == 7
    assert all("kept 90,624," in row for row in rows)
    assert [", predicted " in row for row in rows] == [False] * 5 + [True] * 2
    assert all(math.isfinite(scores[0][0]) and scores[0][0] > 4.4 for scores in found.values())
