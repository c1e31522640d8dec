"""Paired tests of answers, held to sums by hand."""

from math import comb

import numpy as np
import pandas as pd
import pytest

from simdiff_utils import SimDiffError
from simdiff_utils.comparison.tasks.paired import compare_answers

DENSE, PRUNED = frozenset(), frozenset({1, 2})


def answers(**hits):
    """Rows of two sets: task -> (the dense model's answers, the pruned one's)."""
    return pd.DataFrame(
        {"removed": sorted(removed), "task": task, "metric": "acc", "hits": pair[place]}
        for task, pair in hits.items()
        for place, removed in enumerate((DENSE, PRUNED))
    )


def test_only_questions_that_one_of_them_answers_count():
    rows = answers(piqa=("1111100000" * 4, "1100010000" * 4), sciq=("1" * 20, "1" * 20))
    table = compare_answers(rows, DENSE).set_index("task")
    piqa, mean = table.loc["piqa"], table.loc["mean"]
    assert (piqa["gained"], piqa["lost"], piqa["n"]) == (4, 12, 40)
    assert piqa["difference"] == pytest.approx(-8 / 40) and mean["difference"] == pytest.approx(-4 / 40)
    assert piqa["p"] == pytest.approx(2 * sum(comb(16, k) for k in range(5)) / 2**16)
    assert piqa["low"] < piqa["difference"] < piqa["high"] < 0.05
    assert table.loc["sciq", ["difference", "low", "high"]].tolist() == [0, 0, 0]
    assert table.loc["sciq", "p"] == 1 and mean["n"] == 60


def test_the_interval_is_that_of_the_paired_differences():
    draw = np.random.default_rng(3)
    dense = (draw.random(400) < 0.6).astype(int)
    pruned = np.where(draw.random(400) < 0.1, 1 - dense, dense)
    words = ["".join(map(str, hits)) for hits in (dense, pruned)]
    (row, _) = compare_answers(answers(piqa=words), DENSE).to_dict("records")
    half = 1.96 * (pruned - dense).std() / 400**0.5
    assert row["high"] - row["low"] == pytest.approx(2 * half, rel=0.1)  # 0.06, where unpaired it is 0.14
    turned = compare_answers(answers(piqa=words), PRUNED).iloc[0]
    assert turned["difference"] == -row["difference"] and turned["p"] == pytest.approx(row["p"])


def test_what_cannot_be_paired_is_refused():
    rows = answers(piqa=("110", "101"))
    with pytest.raises(SimDiffError, match="other questions"):
        compare_answers(pd.concat([rows, answers(sciq=("1", "1")).iloc[:1]]), DENSE)
    with pytest.raises(SimDiffError, match="is there twice"):
        compare_answers(pd.concat([rows, rows]), DENSE)
    with pytest.raises(SimDiffError, match="another metric"):
        compare_answers(rows.assign(hits=None), DENSE)
    with pytest.raises(SimDiffError, match="other questions"):
        compare_answers(rows, frozenset({7}))


def test_a_single_question_says_nothing_about_spread():
    table = compare_answers(answers(piqa=("1", "0"), sciq=("110", "100")), DENSE).set_index("task")
    assert (
        table.loc["piqa", ["low", "high"]].tolist() == [-1, 1] == table.loc["mean", ["low", "high"]].tolist()
    )
    assert table.loc["sciq", "low"] <= table.loc["sciq", "difference"] <= table.loc["sciq", "high"] <= 0
