"""A criterion of one's own: a function and a row of the registry, or a function named in the settings."""

import importlib
import os
import sys

import matplotlib
import numpy as np
import pytest

from simdiff_utils import SimDiffError, registry, style
from simdiff_utils.capture import stage as capture
from simdiff_utils.comparison.rows import PERPLEXITY, measure
from simdiff_utils.criterion import stage
from simdiff_utils.criterion.plots import plot_sets
from simdiff_utils.run import Run
from simdiff_utils.settings import Settings

matplotlib.use("agg")
MASD = """
def my_score(statistics):
    return statistics["masd"]
"""
OWN = "my_module:my_score"


@pytest.fixture
def write_module(tmp_path, monkeypatch):
    """Function: text -> `my_module.py` beside the notebook has it."""
    folder = tmp_path / "beside"
    folder.mkdir()
    monkeypatch.syspath_prepend(folder)

    def write(text):
        (folder / "my_module.py").write_text(text, encoding="utf-8")
        importlib.invalidate_caches()

    yield write
    sys.modules.pop("my_module", None)
    registry._SEEN.pop("my_module", None)


@pytest.fixture
def settings(tiny_model, tiny_text, data_folder, tmp_path, monkeypatch):
    monkeypatch.setenv("SIMDIFF_RUNS", str(tmp_path / "runs"))
    return Settings(
        model=str(tiny_model),
        text=str(tiny_text),
        n_samples=4,
        seq_len=16,
        n_validation=2,
        criteria=["cosine"],
        n_remove_grid=[1, 2],
        n_remove=2,
        data_folder=str(data_folder),
        window_len=12,
        n_windows=2,
        task_grid=[],
    )


def smallest(values, n):
    return sorted(np.argsort(values, kind="stable")[:n].tolist())


def test_a_new_criterion_is_a_function_and_a_row(write_module, settings, monkeypatch):
    write_module(MASD)
    row = registry.Criterion("plain MASD", "nobody", OWN, protects=(1, 0), color="#123456")
    monkeypatch.setitem(registry.CRITERIA, "plain-masd", row)
    run = Run(settings.replace(criterion="plain-masd", criteria=["cosine", "plain-masd"]))
    masd = capture.statistics(run).table()["masd"].to_numpy(copy=True)
    masd[0] = np.inf  # protected
    table = stage.choices(run, [1, 2])
    mine = table[table["criterion"] == "plain-masd"]
    assert mine["removed"].tolist() == [smallest(masd, 1), smallest(masd, 2)]
    assert stage.removed(run) == frozenset(smallest(masd, 2))
    rows = measure(run)
    measured = rows[(rows["criterion"] == "plain-masd") & (rows["metric"] == PERPLEXITY)]
    assert list(measured["n_remove"]) == [1, 2] and np.isfinite(measured["value"]).all()
    assert style.look("plain-masd")["color"] == "#123456"


def test_a_new_criterion_is_drawn(write_module, settings, monkeypatch):
    write_module(MASD)
    monkeypatch.setitem(registry.CRITERIA, "plain-masd", registry.Criterion("plain MASD", "nobody", OWN))
    run = Run(settings)
    for name in ("plain-masd", OWN):
        figure = plot_sets(stage.choices(run, [1, 2], ["cosine", name]), run.n_layers)
        assert registry.find(name).label in [axis.get_title() for axis in figure.axes]


def test_ones_own_function_chooses_as_by_hand_and_is_imported_only_when_named(write_module, settings):
    write_module(MASD)
    run = Run(settings.replace(criterion=OWN, criteria=["cosine", OWN]))
    stage.choices(run, [2], ["cosine", "masd"])
    assert "my_module" not in sys.modules
    masd = capture.statistics(run).table()["masd"]
    assert stage.chosen(run)["removed"] == smallest(masd, 2) and "my_module" in sys.modules
    assert stage.choices(run, [1])["removed"].tolist()[1] == smallest(masd, 1)
    rows = measure(run)
    assert set(rows[rows["criterion"] == OWN]["n_remove"]) == {1, 2}


def test_an_edited_file_is_another_criterion_in_the_same_kernel_too(write_module, settings):
    write_module(MASD)
    run = Run(settings)
    table, place = capture.statistics(run).table(), stage.choice_file(run, OWN, 2)
    plain = stage.choice_file(run, "masd", 2)
    first = stage.choices(run, [2], [OWN])
    write_module(MASD.replace('statistics["masd"]', '-statistics["masd"]'))
    assert stage.choice_file(run, OWN, 2) != place and stage.choice_file(run, "masd", 2) == plain
    edited = stage.choices(run, [2], [OWN])
    assert edited["removed"].tolist() == [smallest(-table["masd"], 2)] != first["removed"].tolist()
    write_module(MASD)  # as it was: what was chosen then is read
    os.utime(place, (0, 0))
    assert stage.choices(run, [2], [OWN]).equals(first) and place.stat().st_mtime == 0


def test_a_file_edited_before_the_package_first_looks_is_seen_as_it_is(write_module, settings):
    write_module(MASD)
    assert importlib.import_module("my_module")  # in a cell, before the run
    write_module(MASD.replace('statistics["masd"]', '-statistics["masd"]'))
    run = Run(settings)
    expected = smallest(-capture.statistics(run).table()["masd"], 2)
    assert stage.choices(run, [2], [OWN])["removed"].tolist() == [expected]


@pytest.mark.parametrize(
    ("name", "text", "sentence"),
    [
        ("nowhere:my_score", MASD, "criterion nowhere:my_score is not found .*put nowhere.py beside"),
        ("my_module:other", MASD, "my_module has no function other"),
        (OWN, "my_score = 3", "my_module has no function my_score"),
        (OWN, "def my_score(s): return s['masd'][:3]", r"scores of shape \(3,\) and the model has 6 layers"),
        (OWN, "def my_score(s): return 1.0", r"scores of shape \(\) and the model has 6 layers"),
        (OWN, "def my_score(s): return ['much'] * 6", "gives no numbers .*return one float a layer"),
        (OWN, "def my_score(s): return None", "return one float a layer"),
        (OWN, "def my_score(s): return [0, 0, float('nan'), 0, 0, 0]", "gives layer 2 a score that is not"),
        (OWN, "def my_score(s): return [float('inf')] * 6", "gives layer 0 a score that is not finite"),
    ],
)
def test_what_is_wrong_with_ones_own_function_is_one_sentence(write_module, settings, name, text, sentence):
    write_module(text)
    run = Run(settings.replace(criterion=name))
    with pytest.raises(SimDiffError, match=sentence) as error:
        stage.chosen(run)
    assert "\n" not in str(error.value) and str(error.value).endswith(".")


@pytest.mark.parametrize("name", ["my_module", "my_module:", ":my_score", "my module:my_score", "a:b:c", 3])
def test_a_name_that_is_no_module_and_function_is_refused_by_the_settings(name):
    with pytest.raises(SimDiffError, match="criteria must be a list of some of cosine"):
        Settings(criteria=[name])
