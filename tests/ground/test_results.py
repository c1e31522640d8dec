"""The closing summary: the newest result of each notebook of the model that ran last."""

import os

import pytest

from simdiff_utils import SimDiffError, results
from simdiff_utils.files import write_json


def finish_notebook(root, model, name, seconds, **headline):
    folder = root / model / f"{name}-0123"
    write_json(
        folder / "result.json",
        {"notebook": name, "headline": headline, "seconds": seconds, "peak_memory_gib": 1.5},
    )
    return folder


def test_the_summary_shows_the_newest_result_of_each_notebook_of_the_newest_model(tmp_path):
    places = [
        finish_notebook(tmp_path, "model-a", "01_capture", 10, layers="30 of a"),
        finish_notebook(tmp_path, "model-b", "01_capture", 11, layers="30 old"),
        tmp_path / "model-b" / "01_capture-4567",
        finish_notebook(tmp_path, "model-b", "02_criterion", 12, sets=5),
    ]
    write_json(
        places[2] / "result.json",
        {"notebook": "01_capture", "headline": {"layers": "30 new"}, "seconds": 13, "peak_memory_gib": 1.5},
    )
    (places[3] / "choices.csv").touch()
    for age, place in enumerate(reversed(places)):
        os.utime(place / "result.json", (1e9 - age, 1e9 - age))
    summary = results.summarise(tmp_path)
    assert "Results in " + str(tmp_path / "model-b") in summary
    assert "layers: 30 new" in summary and "sets: 5" in summary and "13 s, peak memory 1.5 GiB" in summary
    assert "30 old" not in summary and "30 of a" not in summary
    assert str(places[3]) in summary and "choices.csv" in summary


def test_without_a_finished_notebook_the_summary_says_so(tmp_path):
    with pytest.raises(SimDiffError, match="no notebook has finished"):
        results.summarise(tmp_path)
