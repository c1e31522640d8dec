"""The committed figures: each has its numbers beside it, made by the notebook as it is committed, on its own
settings."""

import io
import json
from pathlib import Path

import pandas as pd
import pytest
from papermill import inspect_notebook

from simdiff_utils.comparison.rows import COLUMNS, PERPLEXITY
from simdiff_utils.comparison.tables import ROWS
from simdiff_utils.registry import CRITERIA
from simdiff_utils.settings import Settings

ROOT = Path(__file__).parents[2]
FIGURES = ROOT / "figures"
OF_BENCHMARKS = {"06_searches": "search.csv", "06_alpha": "reproduction_alpha.csv"}
PICTURES = sorted(path.stem for path in FIGURES.glob("*.png"))
DEFAULTS = dict(Settings())


def read_table(name):
    """Facts above the table ({name: value}), and the table."""
    lines = (FIGURES / name).read_text(encoding="utf-8").splitlines()
    facts = [line[2:] for line in lines if line.startswith("# ")]
    return facts, pd.read_csv(io.StringIO("\n".join(line for line in lines if not line.startswith("# "))))


@pytest.mark.parametrize("name", PICTURES)
def test_a_figures_settings_are_those_of_the_committed_notebook(name):
    facts, table = read_table(f"{name}.csv")
    facts = {key: json.loads(value) for key, _, value in (fact.partition(": ") for fact in facts)}
    (notebook,) = (ROOT / "notebooks").glob(f"{facts['notebook']}.ipynb")
    assert name[:2] == facts["notebook"][:2] and facts["machine"] and facts["text"] and len(table)
    compared = [key for key in inspect_notebook(str(notebook)) if key in facts["settings"]]
    assert {"model", "text"} & set(compared)
    for key in compared:
        assert facts["settings"][key] == DEFAULTS[key], (
            f"{key}: run `make notebooks` and commit figures/ with it"
        )


def test_there_is_no_table_of_a_picture_that_is_gone():
    stored = {Path(ROWS).stem, "05_speed_depth", "05_speed_samples"}  # read by the notebooks, drawn there
    tables = {path.stem for path in FIGURES.glob("*.csv")} - stored
    assert tables == set(PICTURES)


def test_every_picture_is_shown_somewhere():
    pages = [ROOT / "README.md", *(ROOT / "docs").glob("*.md")]
    shown = "".join(page.read_text(encoding="utf-8") for page in pages)
    notebooks = {path.name[:2] for path in (ROOT / "notebooks").glob("[0-9]*.ipynb")}
    assert all(f"figures/{name}.png" in shown or name[:2] in notebooks for name in PICTURES)


@pytest.fixture(scope="module")
def measured():
    facts, rows = read_table(ROWS)
    return dict(map(json.loads, facts)), rows


def test_measured_rows_are_tidy_and_say_how_they_were_made(measured):
    facts, rows = measured
    assert list(rows.columns) == list(COLUMNS)
    assert set(facts) == set(rows["model"])
    assert not rows.duplicated(["model", "criterion", "n_remove", "seed", "metric"]).any()
    assert set(rows["criterion"]) <= {*CRITERIA, "dense"}
    for model, fact in facts.items():
        assert fact["machine"] and fact["torch"] and model in set(rows["model"])
        assert fact["command"].startswith("python -m benchmarks.comparison")
        words = fact["command"].split()
        n_windows = int(words[words.index("--windows") + 1])
        here = rows[(rows["model"] == model) & (rows["metric"] == PERPLEXITY)]
        assert (here["n"] == n_windows).all() and here["provenance"].str.contains(f"{n_windows} of ").all()
        assert (here["low"] <= here["value"]).all() and (here["value"] <= here["high"]).all()
        grid = words[words.index("--grid") + 1 : words.index("--windows")]
        assert set(here["n_remove"]) == {0, *map(int, grid)}
        assert all(len(json.loads(row.removed)) == row.n_remove for row in here.itertuples())


@pytest.mark.parametrize("name, source", OF_BENCHMARKS.items())
def test_notebook_06_draws_what_a_benchmark_has_measured(name, source):
    stored = pd.read_csv(ROOT / "benchmarks" / "results" / source, comment="#")
    if name == "06_alpha":  # one criterion, and no set that is chosen at a tie alone
        stored = stored[(stored["criterion"] == "masd") & ~stored["degenerate"]].reset_index(drop=True)
    pd.testing.assert_frame_equal(read_table(f"{name}.csv")[1], stored)


@pytest.mark.parametrize("name", [n for n in PICTURES if n.startswith("06_") and n not in OF_BENCHMARKS])
def test_notebook_06_draws_the_committed_rows(measured, name):
    """Its figures are of the stored measurements: the numbers beside each are among them, digit for digit."""
    path = ROOT / "benchmarks" / "results" / "reproduction.csv"  # of the paper's siblings
    rows = pd.concat([measured[1], pd.read_csv(path, comment="#")])
    rows = rows.set_index(["model", "criterion", "n_remove", "seed", "metric"])["value"]
    table = read_table(f"{name}.csv")[1]
    if "metric" not in table:  # one row a set, a column for each metric
        table = table.rename(columns={"perplexity": "value"}).assign(metric=PERPLEXITY, seed=0)
    assert len(table)
    for row in table.itertuples():
        assert rows[row.model, row.criterion, row.n_remove, row.seed, row.metric] == pytest.approx(
            row.value, rel=1e-12
        )
