"""Grids: which notebook runs a config asks for, what they come after, and what a later change leaves
alone."""

import json
import re
import shutil
from collections import Counter
from itertools import product
from pathlib import Path

import pytest
import yaml

from simdiff_utils import SimDiffError
from simdiff_utils.parameters import MORE
from simdiff_utils.settings import Settings
from workflow import plan as plan_module
from workflow.plan import ASKED, NOTEBOOKS, NotebookRun, declared, plan_runs, read_config

ROOT = Path(__file__).parents[2]
FOLDER, GRIDS = ROOT / "notebooks", ROOT / "workflow" / "grids"
AFTER = {"01": set(), "02": {"01"}, "03": {"01", "02"}, "04": {"03"}, "05": {"03"}, "06": set()}
SMOLLM2, GEMMA = "embedded:smollm2-135m-instruct", "embedded:gemma-3-270m"


def plan(**asked) -> dict[str, NotebookRun]:
    return plan_runs(read_config(asked, {}), FOLDER)


def number_of(name: str) -> str:
    """Of the notebook that writes a result file."""
    return name.split("/")[1][:2]


def short(runs) -> list[str]:
    """Results without the hash of their settings."""
    return sorted(name.rsplit("-", 1)[0] for name in runs)


def test_one_model_alone_is_captured_derived_and_pruned():
    assert short(plan()) == [f"embedded-smollm2-135m-instruct/{name}" for name in ("01", "02", "03-masd-6")]


def test_every_axis_is_crossed_and_what_is_shared_is_there_once():
    runs = plan(
        model=[SMOLLM2, GEMMA],
        seed=[0, 1],
        criterion=["cosine", "masd"],
        n_remove=[2, 4, 5],
        recovery=["linear", "linear+lora"],
        speed=True,
        comparison=True,
    )
    counts = Counter(map(number_of, runs))
    assert counts == {"01": 4, "02": 4, "03": 24, "04": 48, "05": 24, "06": 4}
    healed = [run for name, run in runs.items() if "/04-masd-4-linear-lora-" in name]
    assert len(healed) == 4
    assert {(run.settings["repair"], run.settings["training"]) for run in healed} == {("linear", "lora")}
    found = {(run.settings["model"], run.settings["seed"]) for run in healed}
    assert found == set(product((SMOLLM2, GEMMA), (0, 1)))


def test_a_run_comes_after_those_whose_stages_it_reads():
    runs = plan(n_remove=[2, 4], recovery=True, speed=True, comparison=True)
    for name, run in runs.items():
        assert set(map(number_of, run.after)) == AFTER[number_of(name)]
        assert all(earlier in runs for earlier in run.after)
        if number_of(name) in ("04", "05"):
            (pruned,) = run.after
            assert runs[pruned].settings["n_remove"] == run.settings["n_remove"]


def test_a_number_of_layers_that_is_added_leaves_the_others_alone():
    asked = dict(criterion=["cosine", "masd"], recovery=True, speed=True)
    before, after = plan(n_remove=[2, 4], **asked), plan(n_remove=[2, 4, 7], **asked)
    kept = before.keys() & after.keys()
    gone, new = Counter(map(number_of, before.keys() - kept)), Counter(map(number_of, after.keys() - kept))
    assert gone == {"02": 1}  # which chooses for all numbers at once
    assert new == {"02": 1, "03": 2, "04": 2, "05": 2}
    (chosen,) = [run for name, run in after.items() if "/02-" in name]
    assert {2, 4, 7} <= set(chosen.settings["n_remove_grid"])


@pytest.mark.parametrize(
    ("change", "again"),
    [
        (dict(n_pairs=2), {"05"}),
        (dict(max_steps=3), {"04"}),
        (dict(n_test=3), {"03", "04", "05"}),
        (dict(seq_len=64), set(NOTEBOOKS)),
        (dict(n_windows=4), {"06"}),
        (dict(n_validation=9), {"02", "03", "04", "05", "06"}),
    ],
)
def test_a_setting_that_is_changed_reruns_what_reads_it(change, again):
    asked = dict(recovery=True, speed=True, comparison=True)
    before, after = plan(**asked), plan(**asked, **change)
    assert set(map(number_of, after.keys() - before.keys())) == again


def test_a_file_of_ones_own_counts_with_its_state(tmp_path):
    text = tmp_path / "notes.txt"
    text.write_text("one")
    first = set(plan(text=str(text)))
    assert set(plan(text=str(text))) == first
    text.write_text("two words")
    assert not first & set(plan(text=str(text)))
    assert all(run.settings["text"] == str(text) for run in plan(text=str(text)).values())


def test_a_criterion_of_ones_own_counts_with_its_file(tmp_path):
    file = tmp_path / "own" / "scores.py"
    file.parent.mkdir()
    file.write_text("one")

    def name(**settings):
        return plan_module._name_result("03", {"model": SMOLLM2, "n_remove": 6} | settings, "", tmp_path)

    def names():
        return name(criterion="own.scores:turned"), name(criterion="masd", criteria=["own.scores:turned"])

    first = names()
    assert names() == first and "/03-own-scores-turned-6-" in first[0]
    others = name(criterion="masd", criteria=["cosine"]), name(criterion="gone:turned")
    file.write_text("two words")
    assert not set(first) & set(names())
    assert others == (name(criterion="masd", criteria=["cosine"]), name(criterion="gone:turned"))


def test_a_setting_may_differ_from_model_to_model():
    grids = {SMOLLM2: [3], GEMMA: [2, 4]}
    runs = plan(model=[SMOLLM2, GEMMA], pruning=False, comparison=True, n_remove_grid=grids)
    assert {run.settings["model"]: run.settings["n_remove_grid"] for run in runs.values()} == grids
    assert all(run.settings["measure"] is True for run in runs.values())


def test_a_target_stands_in_the_place_of_a_number_of_layers():
    asked = read_config({}, {"SIMDIFF_TARGET": "decode_speedup >= 1.25"})
    runs = plan(**asked, recovery=True, speed=True)
    by_number = {Path(result).name[:2]: (result, run) for result, run in runs.items()}
    for number in ("03", "04", "05"):
        result, run = by_number[number]
        assert f"/{number}-masd-decode-speedup-1-25-" in result and "n_remove" not in run.settings
        given = {**run.parameters, **run.parameters.get("more", {})}
        assert given["target"] == "decode_speedup >= 1.25"
    assert by_number["02"][1].settings["n_remove_grid"] == [6, 8, 12]


def test_words_become_what_the_setting_wants():
    config = {"n_remove": ["3", 4], "alpha": ".5", "exact": "true", "text": "1", "learning_rate": "1e-4"}
    config |= {"n_remove_grid": {SMOLLM2: ["2", "3"]}, "n_test": "many", "criteria": ["masd"], "seed": 2.5}
    asked = read_config(config, {"SIMDIFF_K": "7", "SIMDIFF_DTYPE": "", "HOME": "x"})
    wanted = {"n_remove": 7, "alpha": 0.5, "exact": True, "text": "1", "learning_rate": 1e-4}
    wanted |= {"n_remove_grid": {SMOLLM2: [2, 3]}, "n_test": "many", "criteria": ["masd"], "seed": 2.5}
    assert asked == wanted
    assert read_config({"n_remove": ["3", 4], "alpha": "auto"}, {}) == {"n_remove": [3, 4], "alpha": "auto"}


@pytest.mark.parametrize(
    ("asked", "sentence"),
    [
        (dict(n_sampels=3), "unknown config key n_sampels"),
        (dict(n_samples="many"), "n_samples must be a whole number"),
        (dict(criterion=["cosine", "masq"]), "criterion must be one of"),
        (dict(n_remove=[]), "n_remove is an empty list"),
        (dict(pruning=False), "nothing is asked for"),
        (dict(gpu_gib="many"), "gpu_gib has to be the memory of one GPU in GiB"),
        (dict(speed="perhaps"), "speed has to be true or false; got 'perhaps'"),
        (dict(recovery=["lora", "magic"]), "there is no rung 'magic'"),
        (dict(recovery=["lora+distillation+none"]), "there is no rung"),
        (dict(n_remove=3, target="gib <= 1"), "n_remove .K. and target both say how many layers go"),
        (dict(target="gib >= 1"), "target must be params, gib or perplexity <= a number"),
        (dict(n_pairs=3), "no notebook of this grid takes n_pairs"),
        (
            dict(model=[SMOLLM2, GEMMA], n_test={SMOLLM2: 3}),
            "n_test is given per model and names no embedded:gemma-3-270m",
        ),
    ],
)
def test_a_bad_config_is_one_sentence(asked, sentence):
    with pytest.raises(SimDiffError, match=sentence) as caught:
        plan(**asked)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "model", ["a model; rm -rf $(HOME)", "../../../no/such", 'it\'s "quoted"/`id`', "日本語", "-rf"]
)
def test_a_models_name_is_data_never_a_path(model):
    for name, run in plan(model=model).items():
        folder, file = name.split("/")
        assert re.fullmatch("[a-z0-9][a-z0-9-]*", folder)
        assert file.endswith(".json") and run.settings["model"] == model


@pytest.mark.parametrize("number", NOTEBOOKS)
def test_parameters_are_read_from_the_notebook_itself(number):
    names = declared(FOLDER / f"{NOTEBOOKS[number]}.ipynb")
    assert {"model", "text", "seed", "result_file"} <= set(names) <= {*Settings.model_fields, MORE}


@pytest.mark.parametrize(
    ("written", "sentence"),
    [
        ("n_samples: str = '8'", "takes n_samples as str, and the setting is int"),
        ("colour: str = ''", "which is no setting"),
    ],
)
def test_a_notebook_with_another_parameter_is_refused(tmp_path, written, sentence):
    for name in NOTEBOOKS.values():
        shutil.copy(FOLDER / f"{name}.ipynb", tmp_path)
    path = tmp_path / "01_calibration_capture.ipynb"
    notebook = json.loads(path.read_text(encoding="utf-8"))
    (cell,) = [cell for cell in notebook["cells"] if "parameters" in cell["metadata"].get("tags", [])]
    cell["source"] = written
    path.write_text(json.dumps(notebook), encoding="utf-8")
    with pytest.raises(SimDiffError, match=sentence):
        plan_runs({}, tmp_path)


@pytest.mark.parametrize("path", sorted(GRIDS.glob("*.yaml")), ids=lambda path: path.stem)
def test_the_committed_grids_are_valid(path):
    grid = yaml.safe_load(path.read_text(encoding="utf-8"))
    runs = plan_runs(read_config(grid, {}), FOLDER)
    assert any(grid.get(key) for key in ASKED) and runs
