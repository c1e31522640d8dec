"""What a run keeps: sound stages are read, damaged ones made again; and what the keys know."""

import json
import shutil
from pathlib import Path

import pandas as pd
import pytest

from simdiff_utils import SimDiffError, provenance
from simdiff_utils.capture import stage as capture
from simdiff_utils.criterion import stage
from simdiff_utils.pruning import stage as pruning
from simdiff_utils.pruning.stage import pruned_checkpoint
from simdiff_utils.recovery import stage as recovery
from simdiff_utils.run import is_sound
from simdiff_utils.settings import Settings
from simdiff_utils.speed import stage as speed

GRID = [1, 2, 4]


@pytest.fixture(scope="module")
def settings(settings):
    return settings.replace(criteria=["cosine", "masd"])


def cut_off(path):
    path.write_bytes(path.read_bytes()[:-7])


def alter(path):
    """One digit of a number, so that the file still reads well."""
    content = bytearray(path.read_bytes())
    at = max(i for i, byte in enumerate(content) if chr(byte) in "0123456789")
    content[at] = ord("1") if content[at] != ord("1") else ord("2")
    path.write_bytes(bytes(content))


def lose(path):
    path.unlink()


@pytest.mark.parametrize("damage", [cut_off, alter, lose])
def test_a_damaged_file_is_made_again_with_the_same_content(make_run, damage, capsys):
    run = make_run()
    folder = pruned_checkpoint(run).parent
    before = stage.compare(run, GRID), capture.statistics(run).table()
    kept = [
        *run.folder.glob("capture-*/statistics.safetensors"),
        *run.folder.glob("losses-validation-*/without-*.json"),
        *run.folder.glob("losses-test-*/dense.json"),
        *run.folder.glob("choices-*/*.json"),
        *folder.glob("model/model*.safetensors"),
        folder / "result.json",
    ]
    assert len(kept) > 8
    contents = {path: path.read_bytes() for path in kept}
    for path in kept:
        damage(path)
    again = make_run()
    assert pruned_checkpoint(again).parent == folder
    pd.testing.assert_frame_equal(stage.compare(again, GRID), before[0])
    pd.testing.assert_frame_equal(capture.statistics(again).table(), before[1])
    assert "is damaged" in capsys.readouterr().err
    losses = {
        path: path.read_bytes() == content for path, content in contents.items() if path.name != "result.json"
    }
    assert sum(losses.values()) >= len(losses) - 1, losses  # a set that only a race asked for may stay away
    assert is_sound(folder) and json.loads((folder / "result.json").read_text())["stage"] == "prune"


def test_a_sound_stage_is_not_made_again(make_run):
    run = make_run()
    capture.statistics(run)
    (folder,) = run.folder.glob("capture-*")
    written = (folder / "result.json").stat().st_mtime_ns
    capture.statistics(make_run())
    assert (folder / "result.json").stat().st_mtime_ns == written


# ---- keys


def where(run):
    """Where a run looks for its stages; "comparison" is a choice that notebook 06 asks for."""
    return {
        "capture": run.stage_folder("capture", capture.ROOM, capture.GROUPS),
        "losses": stage.evaluator(run, "test")._folder,
        "choice": stage.choice_file(run, "masd", 2),
        "comparison": stage.choice_file(run, "portfolio", 2),
        "prune": run.stage_folder("prune", pruning.ROOM, pruning.GROUPS),
        "recovery": run.stage_folder("recovery", recovery.ROOM, recovery.RECOVERY),
        "speed": run.stage_folder("speed", speed.ROOM, speed.GROUPS),
    }


@pytest.fixture(scope="module")
def package(tmp_path_factory):
    """A copy of the package, to be edited."""
    folder = tmp_path_factory.mktemp("package") / "simdiff_utils"
    return Path(shutil.copytree(Path(provenance.__file__).parent, folder))


@pytest.fixture
def keys(make_run, package, monkeypatch):
    """Function: an edit of a file of the package (old text, new text) -> stages whose keys it changes."""
    monkeypatch.setattr(provenance, "_PACKAGE", package)
    run = make_run()

    def now():
        provenance.code_digest.cache_clear()
        for name in [name for name in run.shared if name[0] == "losses"]:
            del run.shared[name]  # or the evaluator would keep the folder that it began with
        return where(run)

    def changed(file, old, new):
        before, path = now(), package / file
        text = path.read_text(encoding="utf-8")
        assert old in text
        path.write_text(text.replace(old, new, 1), encoding="utf-8")
        try:
            after = now()
        finally:
            path.write_text(text, encoding="utf-8")
        return {name for name in before if before[name] != after[name]}

    yield changed
    provenance.code_digest.cache_clear()


EVERY = {"capture", "losses", "choice", "comparison", "prune", "recovery", "speed"}
CHOOSING = {"choice", "comparison", "prune", "recovery"}


@pytest.mark.parametrize(
    ("file", "old", "new", "expected"),
    [
        # what computes nothing
        ("engine/decoder.py", '"""', '"""Mended. ', set()),
        ("criterion/race.py", "\n_FIRST_SLICE = 4  # blocks", "\n\n_FIRST_SLICE = (4)  # tokens", set()),
        (
            "criterion/peers.py",
            "    if decoder.streamed:",
            "    # a comment\n    if decoder.streamed:",
            set(),
        ),
        ("criterion/plots.py", "figsize=(8.5, 4.6)", "figsize=(8, 4)", set()),
        ("capture/plots.py", "import", "import sys\nimport", set()),
        ("style.py", '"#333333"', '"#222222"', set()),
        ("comparison/tables.py", '"yes"', '"indeed"', set()),
        ("comparison/rows.py", "_WINDOWS_AT_ONCE = 2", "_WINDOWS_AT_ONCE = 3", set()),
        ("settings.py", '"be at least 1"', '"be 1 or more"', set()),
        ("__main__.py", "import", "import sys\nimport", set()),
        # what does
        ("engine/perplexity.py", "import", "import sys\nimport", EVERY),
        ("files.py", "import contextlib", "import sys\nimport contextlib", EVERY),
        ("capture/equations.py", "import", "import sys\nimport", EVERY - {"losses"}),
        ("text/blocks.py", "import", "import sys\nimport", EVERY - {"losses"}),
        ("criterion/peers.py", "N_TAYLOR = 10", "N_TAYLOR = 11", CHOOSING | {"speed"}),
        ("registry.py", "protects=(4, 2)", "protects=(4, 3)", CHOOSING | {"speed"}),
        ("pruning/export.py", "import", "import sys\nimport", {"prune", "recovery", "speed"}),
        ("recovery/repair.py", "import", "import sys\nimport", {"recovery"}),
        ("speed/timing.py", "import", "import sys\nimport", {"speed"}),
    ],
)
def test_a_key_changes_with_code_that_computes_and_with_no_other(keys, file, old, new, expected):
    assert keys(file, old, new) == expected


def test_the_report_of_a_grid_lies_outside_the_package():
    """So what the workflow says or draws changes no key."""
    files = provenance.code_files("simdiff_utils")
    assert files and not [path for path in files if "workflow" in path.parts or path.name == "plots.py"]


@pytest.mark.parametrize(
    ("setting", "expected"),
    [
        ({"n_samples": 3}, EVERY - {"losses", "speed"}),
        ({"seed": 1}, EVERY - {"losses", "speed"}),
        ({"confidence": 0.9}, {"choice", "comparison", "prune"}),
        ({"n_validation": 5}, {"choice", "comparison", "prune"}),
        ({"n_remove": 3}, {"prune"}),
        ({"n_test": 5}, {"losses", "prune"}),
        ({"preset": "published"}, {"recovery"}),
        ({"n_pairs": 3}, {"speed"}),
        ({"batch_size": 1, "memory_gib": 5.0, "prompt": "w3", "n_remove_grid": [1], "window_len": 9}, set()),
    ],
)
def test_a_setting_makes_old_what_depends_on_it(make_run, setting, expected):
    run = make_run()
    before, after = where(run), where(run.replace(**setting))
    assert {name for name in before if before[name] != after[name]} == expected


@pytest.mark.parametrize(("n_layers", "grid"), [(2, [1]), (3, [1]), (7, [6]), (40, [6, 8, 12])])
def test_the_default_grid_fits_a_model_of_any_depth(make_run, make_tiny, tokenizer, tmp_path, n_layers, grid):
    make_tiny("llama", num_hidden_layers=n_layers).save_pretrained(tmp_path / "m")
    tokenizer.save_pretrained(tmp_path / "m")
    default = Settings()
    run = make_run(model=str(tmp_path / "m"), n_remove_grid=default.n_remove_grid, n_remove=default.n_remove)
    assert run.grid == grid


def test_a_model_of_one_layer_has_none_to_lose(make_run, make_tiny, tokenizer, tmp_path):
    make_tiny("llama", num_hidden_layers=1).save_pretrained(tmp_path / "m")
    with pytest.raises(SimDiffError, match="a model of one layer has none"):
        make_run(model=str(tmp_path / "m"), n_remove_grid=Settings().n_remove_grid)
