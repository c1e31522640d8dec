"""The paper's published numbers, which notebook 06 sets beside ours: a slip of the pen is seen."""

import re
from pathlib import Path

import pandas as pd
import pytest

from simdiff_utils.models.shapes import PAPER_MODELS
from simdiff_utils.registry import CRITERIA

ELSEWHERE = {
    "dense",
    "llm-pruner",
    "slicegpt",
    "shortened-llm",
}  # in the paper, and not in the registry of criteria
PLACE = ["source", "model", "criterion", "n_remove", "metric"]


@pytest.fixture(scope="module")
def published() -> pd.DataFrame:
    return pd.read_csv(Path(__file__).parents[2] / "notebooks" / "published.csv").fillna({"note": ""})


def test_names_are_known_and_no_number_stands_twice(published):
    assert not published.duplicated(PLACE).any()
    assert set(published["criterion"]) <= CRITERIA.keys() | ELSEWHERE
    assert set(published["model"]) == set(PAPER_MODELS)
    assert set(published["source"]) == {
        "Table 1",
        "Table 2",
        "Table 3",
        "Table 4",
        "Table 5",
        "Figure 5",
        "Table A.7",
    }
    assert (published["n_remove"].notna() | published["ratio"].notna()).all()
    assert published["value"].gt(0).all()


def test_retained_performance_is_the_average_over_the_dense_one(published):
    """Both are rounded to 0.01; where the note says what the paper divided by instead, it is that."""
    rows = published.fillna({"n_remove": -1, "ratio": -1}).set_index([*PLACE[:-1], "ratio", "metric"])
    dense = {key[1::4]: value for key, value in rows["value"].items() if key[2] == "dense"}  # (model, metric)
    n_odd = 0
    for (*place, metric), row in rows[rows.index.get_level_values("metric").str.endswith("RP")].iterrows():
        average = rows.at[(*place, metric.replace("RP", "AVG")), "value"]
        of_dense = average / dense[place[1], metric.replace("RP", "AVG").removeprefix("LoRA-")] * 100
        divisor = re.search(r"divides by ([\d.]+)", row["note"])
        assert (row["value"] == pytest.approx(of_dense, abs=0.02)) == (divisor is None), (place, metric)
        if divisor:
            n_odd += 1
            assert row["value"] == pytest.approx(average / float(divisor[1]) * 100, abs=0.02), (place, metric)
    assert n_odd == 6


def test_a_number_given_once_stands_with_both_forms(published):
    once = published[published["note"] == "given once for both forms"]
    forms = once.pivot(index=["source", "model", "n_remove", "metric"], columns="criterion", values="value")
    assert list(forms) == ["masd", "mssd"] and (forms["masd"] == forms["mssd"]).all()
