"""The committed numbers follow from each other by today's code: statistics -> alpha path -> sets ->
verdicts."""

import io
import json
from pathlib import Path

import pandas as pd
import pytest

from simdiff_utils.comparison.tables import compare_with_shortgpt
from simdiff_utils.criterion.alpha import trace_path
from simdiff_utils.criterion.equations import choose_removed, cosine_scores, fuse, normalise
from simdiff_utils.registry import of_kind

ROOT = Path(__file__).parents[2]
FIGURES = ROOT / "figures"


def read(name: str) -> pd.DataFrame:
    text = (FIGURES / f"{name}.csv").read_text(encoding="utf-8")
    table = pd.read_csv(io.StringIO("".join(f"{line}\n" for line in text.splitlines() if line[:2] != "# ")))
    if "removed" in table:
        table["removed"] = table["removed"].map(json.loads)
    return table


@pytest.fixture(scope="module")
def statistics():
    return read("01_statistics")


def test_the_alpha_path_of_the_stored_statistics_is_the_stored_path(statistics):
    path, stored = trace_path(*normalise(statistics, "masd")), read("02_map")
    assert path["removed"].tolist() == stored["removed"].tolist()
    assert path["n_tied"].tolist() == stored["n_tied"].tolist()
    assert path["degenerate"].tolist() == stored["degenerate"].tolist()
    assert path[["low", "high"]].to_numpy() == pytest.approx(stored[["low", "high"]].to_numpy(), rel=1e-9)


def test_the_stored_sets_are_those_of_the_stored_statistics(statistics):
    sets = read("02_sets")
    for row in sets[sets["criterion"] == "cosine"].itertuples():
        assert frozenset(row.removed) == choose_removed(cosine_scores(statistics), row.n_remove)
    fused = sets[sets["criterion"].isin(of_kind("line"))]
    assert len(fused) == 4 * fused["n_remove"].nunique()
    for row in fused.itertuples():
        scores = fuse(*normalise(statistics, row.criterion), row.alpha)
        assert frozenset(row.removed) == choose_removed(scores, row.n_remove)


def test_the_stored_verdicts_follow_from_the_stored_rows():
    rows = read("06_comparison")
    stored = read("06_over_layers").set_index(["model", "n_remove", "criterion"])["verdict"]
    found = compare_with_shortgpt(rows).set_index(["model", "n_remove", "criterion"])["verdict"]
    models = stored.index.get_level_values("model").unique()
    assert found[found.index.get_level_values("model").isin(models)].to_dict() == stored.to_dict()


def test_the_readme_and_the_start_page_name_every_lesson_with_its_minutes():
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    lessons = pd.read_csv(ROOT / "benchmarks" / "results" / "lessons.csv", comment="#")
    assert lessons["lesson"].tolist() == [
        path.stem for path in sorted((ROOT / "notebooks").glob("[0-9]*.ipynb"))
    ]
    for row in lessons.itertuples():
        (line,) = [line for line in readme.splitlines() if f"(notebooks/{row.lesson}.ipynb) |" in line]
        number = row.lesson.partition("_")[0]
        assert f"[{number} · {row.title}]" in line and row.question in line
        assert (
            f" {row.seconds} s" in line
            and f" {row.peak_gib} GiB |" in line
            and f" {row.reader_minutes} min" in line
        )
