"""The notebooks: what they hold, that their checked cells really check, and batch runs with other parameters.

`make test` has run every notebook under nbval just before; the stages made there are read here
(SIMDIFF_RUNS).
"""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import nbformat
import pandas as pd
import pytest
import yaml
from papermill import inspect_notebook

from simdiff_utils.models.shapes import PAPER_MODELS
from simdiff_utils.parameters import MORE, readable
from simdiff_utils.settings import Settings

ROOT = Path(__file__).parents[2]
NOTEBOOKS = sorted((ROOT / "notebooks").glob("[0-9]*.ipynb"))
CHECKED = "nbval-check-output"
TINY = ["n_samples: 4", "seq_len: 16"]


@pytest.fixture(params=NOTEBOOKS, ids=lambda path: path.stem)
def notebook(request) -> Path:
    return request.param


def code_cells(path: Path, tag: str | None = None) -> list:
    cells = nbformat.read(path, as_version=4).cells
    return [c for c in cells if c.cell_type == "code" and (tag is None or tag in c.metadata.get("tags", []))]


def run_command(command: list, **environment: str) -> subprocess.CompletedProcess:
    """Run a command; once more where its kernel never started.

    Jupyter picks a kernel's ports, frees them, and lets the kernel bind them a second later: another test's
    kernel may be quicker. That says nothing of a notebook.
    """

    def run() -> subprocess.CompletedProcess:
        return subprocess.run(
            [str(word) for word in command],
            cwd=ROOT,
            env=os.environ | environment,
            capture_output=True,
            text=True,
        )

    done = run()
    return run() if "Kernel died before replying to kernel_info" in done.stdout + done.stderr else done


def test_there_are_six_lessons_and_an_appendix():
    numbers = [path.stem.partition("_")[0] for path in NOTEBOOKS]
    assert numbers == ["01", "02", "02b", "03", "04", "05", "06"]


def test_notebook_is_small_and_executed(notebook):
    cells = code_cells(notebook)
    assert len(cells) <= 25
    parameters = code_cells(notebook, "parameters")  # a line each
    assert max(cell.source.count("\n") + 1 for cell in cells if cell not in parameters) <= 25
    assert all(cell.execution_count for cell in cells), "commit the notebook executed: make notebooks"
    checked = code_cells(notebook, CHECKED)
    assert checked and all(cell.outputs for cell in checked), "nbval passes a checked cell without output"
    metadata = nbformat.read(notebook, as_version=4).metadata
    assert not {"papermill", "widgets"} & set(metadata)
    assert notebook.stat().st_size < 400_000


def test_notebook_holds_no_path_of_a_machine(notebook):
    assert not re.search(r"/(home|root|Users|work|tmp)/", notebook.read_text(encoding="utf-8"))


def test_parameters_are_settings_with_their_defaults(notebook):
    (cell,) = code_cells(notebook, "parameters")
    lines = cell.source.splitlines()
    assert len(lines) <= 20 and "# rarely changed" in lines, "what a first reader changes stands on top"
    assert all("  # " in line for line in lines if line != "# rarely changed"), (
        "every parameter has a comment"
    )
    assert cell.metadata["jupyter"]["source_hidden"], "JupyterLab shows the cell folded"
    namespace: dict = {}
    exec(cell.source, namespace)
    defaults = dict(Settings()) | {MORE: {}}
    names = set(inspect_notebook(str(notebook)))
    assert names <= {"model", "text", "pruned", MORE, *readable(notebook.stem[:2])}
    for name in names:
        assert namespace[name] == defaults[name] and type(namespace[name]) is type(defaults[name]), name


@pytest.mark.slow
def test_a_mutated_number_in_a_checked_cell_is_seen(tmp_path):
    """Of the quickest notebook; that the others' checked cells hold outputs is tested above."""
    notebook = NOTEBOOKS[-1]
    copy = tmp_path / notebook.name
    content = nbformat.read(notebook, as_version=4)
    (cell,) = [c for c in content.cells if CHECKED in c.metadata.get("tags", [])]
    output = next(o for o in cell.outputs if o.output_type == "stream" and o.name == "stdout")
    digits = [match.start() for match in re.finditer(r"\d", output.text)]
    at = digits[len(digits) // 2]
    output.text = output.text[:at] + str((int(output.text[at]) + 1) % 10) + output.text[at + 1 :]
    nbformat.write(content, copy)
    done = run_command(
        [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "--nbval-lax", copy], TQDM_DISABLE="1"
    )
    assert done.returncode == 1, done.stdout[-3000:]
    assert "1 failed" in done.stdout and "mismatch 'stdout'" in done.stdout, done.stdout[-3000:]


def run_papermill(
    number: str, tmp_path: Path, *parameters: str, **environment: str
) -> subprocess.CompletedProcess:
    (notebook,) = [path for path in NOTEBOOKS if path.stem.startswith(f"{number}_")]
    result = tmp_path / "result.json"
    words = [word for parameter in (*parameters, f"result_file: '{result}'") for word in ("-y", parameter)]
    return run_command(
        [
            sys.executable,
            "-m",
            "papermill",
            notebook,
            tmp_path / "out.ipynb",
            "--cwd",
            notebook.parent,
            "--no-progress-bar",
            *words,
        ],
        SIMDIFF_RUNS=str(tmp_path / "runs"),
        IPYTHONDIR=str(tmp_path / "ipython"),
        **environment,
    )


@pytest.mark.slow
def test_the_whole_graph_with_other_parameters(tiny_model, tiny_text, data_folder, tmp_path):
    """Snakemake, papermill, all six notebooks, a model and a text of the user's own."""
    settings = dict(
        n_samples=4,
        seq_len=16,
        n_validation=2,
        n_test=2,
        n_remove_grid="[1,2]",
        criteria="[cosine,masd,portfolio]",
        prompt_len=8,
        n_new_tokens=4,
        n_pairs=2,
        max_steps=2,
        learning_rate=0.02,
        max_length=16,
        training="distillation",
        repair="linear",
        eps=0.2,
        prompt="w1 w2",
        data_folder=data_folder,
        window_len=12,
        n_windows=4,
        task_limit=4,
        n_stories=0,
        task_grid="[2]",
        task_criteria="[cosine,portfolio]",
    )
    done = run_command(
        [
            sys.executable,
            "-m",
            "snakemake",
            "--cores",
            "1",
            "--quiet",
            "all",
            "--config",
            f"model={tiny_model}",
            f"text={tiny_text}",
            "n_remove=2",
            "criterion=masd",
            "recovery=true",
            "speed=true",
            "comparison=true",
            *(f"{name}={value}" for name, value in settings.items()),
        ],
        SIMDIFF_RUNS=str(tmp_path / "runs"),
    )
    assert done.returncode == 0, done.stderr[-3000:]
    results = sorted(path.stem.rpartition("-")[0] for path in (tmp_path / "runs" / "batch").glob("*/*.json"))
    assert results == ["01", "02", "03-masd-2", "04-masd-2", "05-masd-2", "06"]
    assert len(list((tmp_path / "runs").glob("*/capture-*"))) == 1, "all read the same capture"
    (report,) = (tmp_path / "runs" / "batch").glob("report-*.html")
    assert "6 of 6 notebook runs are done" in report.read_text(encoding="utf-8")
    summary = run_command([sys.executable, "-m", "simdiff_utils", "results", tmp_path / "runs"])
    assert "pruned test perplexity" in summary.stdout and "speedup" in summary.stdout


@pytest.mark.slow
def test_the_papers_grid_asks_for_the_comparison_of_each_model_alone(tmp_path):
    """A dry run: nothing is asked of the hub (offline here), nothing is run."""
    grid = yaml.safe_load((ROOT / "workflow" / "grids" / "paper.yaml").read_text(encoding="utf-8"))
    assert sorted(grid["model"]) == sorted(grid["n_remove_grid"]) == sorted(PAPER_MODELS)
    done = run_command(
        [
            sys.executable,
            "-m",
            "snakemake",
            "-n",
            "-p",
            "--cores",
            "all",
            "--configfile",
            "workflow/grids/paper.yaml",
        ],
        SIMDIFF_RUNS=str(tmp_path / "runs"),
    )
    assert done.returncode == 0, done.stderr[-3000:]
    said = done.stdout + done.stderr
    assert dict(re.findall(r"^(\w+) +(\d+)$", said, re.MULTILINE)) == {
        "comparison": "7",
        "report": "1",
        "all": "1",
        "total": "9",
    }
    assert said.count("would not start: ") == 7  # and says so of each model
    for model, n_removes in grid["n_remove_grid"].items():
        (given,) = {line for line in re.findall(r"-y '(\{.*\})'", said) if f" model: {model}," in line}
        parameters = yaml.safe_load(given)
        assert parameters["n_remove_grid"] == parameters["task_grid"] == n_removes
        assert parameters["measure"] is True and parameters["criteria"] == grid["criteria"]
        assert re.search(r"/06-[0-9a-f]{8}\.json$", parameters["result_file"])
    assert not list((tmp_path / "runs").glob("**/*.json"))


@pytest.mark.slow
def test_the_comparison_measures_a_model_of_ones_own(tiny_model, tiny_text, data_folder, tmp_path):
    done = run_papermill(
        "06",
        tmp_path,
        f"model: '{tiny_model}'",
        f"text: '{tiny_text}'",
        "n_samples: 4",
        "n_validation: 2",
        "measure: true",
        f"data_folder: '{data_folder}'",
        "window_len: 12",
        "n_windows: 4",
        "n_remove_grid: [1, 2]",
        "criteria: [cosine, masd, random, sleb, window, entrodrop, laco, portfolio]",
        "task_criteria: [cosine, sleb]",
        "task_grid: [2]",
        "task_limit: 4",
        "more: {n_stories: 0, seq_len: 32}",
    )
    assert done.returncode == 0, done.stderr[-3000:]
    (folder,) = (tmp_path / "runs").glob("*/06_comparison-*")
    rows = pd.read_csv(folder / "06_rows.csv")
    assert set(rows["model"]) == {"tiny"} and {"dense", "random", "laco"} < set(rows["criterion"])
    assert set(rows.loc[rows["metric"] == "AVG", "criterion"]) == {"dense", "cosine", "sleb"}
    pictures = {path.stem.removeprefix("06_") for path in folder.glob("*.png")}
    assert pictures == {"ranking", "over_layers", "reproduction", "searches", "alpha", "gain"}


@pytest.mark.slow
def test_an_export_to_a_folder_of_ones_own(tiny_model, tiny_text, tmp_path):
    parameters = [
        f"model: '{tiny_model}'",
        f"text: '{tiny_text}'",
        *TINY,
        "n_validation: 2",
        "n_remove_grid: [1, 2]",
        "n_remove: 2",
        "n_test: 2",
        "criterion: masd",
        "more: {alpha: 0.5, prompt: w1 w2}",
        f"export_to: '{tmp_path / 'mine'}'",
    ]
    done = run_papermill("03", tmp_path, *parameters)
    assert done.returncode == 0, done.stderr[-2000:]
    pruning = json.loads((tmp_path / "mine" / "pruning.json").read_text())
    assert len(pruning["removed"]) == 2 and len(pruning["scores"]) == 6 and pruning["alpha"] == 0.5
    assert pruning["origin"]["versions"]["torch"] and len(pruning["calibration_sha256"]) == 64
    card = (tmp_path / "mine" / "README.md").read_text()
    assert (
        "without 2 of 6 layers" in card
        and "test tokens" in card
        and not re.search(r"/(home|root|tmp)/", card)
    )
    (made,) = (tmp_path / "runs").glob("*/prune-*/model")
    assert sorted(f.name for f in made.iterdir()) == sorted(f.name for f in (tmp_path / "mine").iterdir())
    again = run_papermill("03", tmp_path, *parameters)
    assert again.returncode != 0 and "mine exists already" in again.stderr
    again = run_papermill("03", tmp_path, *parameters, "overwrite: true")
    assert again.returncode == 0, again.stderr[-2000:]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("number", "parameters", "sentence"),
    [
        ("01", [*TINY, "n_sampels: 8"], "unknown parameter n_sampels"),
        (
            "03",
            [*TINY, "n_validation: 2", "n_remove_grid: [1, 2]", "n_remove: 2", "max_perplexity_ratio: 0.01"],
            "above max_perplexity_ratio",
        ),
        ("06", ["n_samples: 4", "more: {eps: 2.0}"], "eps must lie between 0 and 1"),
    ],
)
def test_bad_input_is_one_sentence_and_leaves_nothing(
    number, parameters, sentence, tiny_model, tiny_text, tmp_path
):
    """Three kernels, for what papermill and a kernel make of it; the sentences themselves are in
    test_bad_input."""
    done = run_papermill(number, tmp_path, f"model: '{tiny_model}'", f"text: '{tiny_text}'", *parameters)
    assert done.returncode != 0
    last = [line for line in done.stderr.splitlines() if line.strip()][-1]
    assert sentence in last and last.startswith("SimDiffError: "), done.stderr[-2000:]
    assert not (tmp_path / "result.json").exists()
    assert not list((tmp_path / "runs").glob("*/prune-*"))
