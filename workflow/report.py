"""A grid's report: one HTML file that needs nothing but itself, with what every notebook run found."""

import base64
import os
from collections.abc import Mapping
from pathlib import Path

import pandas as pd
from jinja2 import Environment, FileSystemLoader, StrictUndefined

from simdiff_utils.files import read_kept, write_whole
from workflow.plan import NOTEBOOKS, NotebookRun

_MANY = 200  # rows of a table that are shown; the file has all
# tell a notebook's runs apart
_AXES = ("model", "seed", "criterion", "n_remove", "target", "repair", "training")
_FACTS = {  # word on the page -> column of the results' origins
    "models": "model",
    "text": "text",
    "machine": "machine",
    "revision": "git_revision",
    "code (sha256)": "code_sha256",
}


def write_report(
    batch: Path, runs: Mapping[str, NotebookRun], target: Path, failed: Mapping[str, str] | None = None
) -> None:
    """Write the report of a grid.

    Args:
        batch: folder of the result files; links to the executed notebooks are relative to the report.
        runs: see `plan.plan_runs`; those without a result are listed as missing.
        target: the HTML file; it appears whole or not at all.
        failed: result file -> the sentence that says why there is none.
    """
    failed = failed or {}
    found = {name: read_kept(batch / name) for name in runs}
    sections = []
    for notebook in NOTEBOOKS.values():
        mine = {name: run for name, run in runs.items() if run.notebook == notebook}
        done = [_describe(batch, name, run, found[name], target) for name, run in mine.items() if found[name]]
        missing = [
            {"name": _title(run), "why": failed.get(name, "not run yet"), **_links(batch, name, run, target)}
            for name, run in mine.items()
            if not found[name]
        ]
        if mine:
            title = notebook.replace("_", " · ", 1).replace("_", " ")
            section = {"name": notebook, "title": title, "runs": done, "missing": missing}
            sections.append(section | {"overview": _overview(done)})

    origins = [result["origin"] for result in found.values() if result]
    times = sorted(origin["time"] for origin in origins) or [""]
    facts = {
        word: sorted({str(origin[column]) for origin in origins if origin.get(column) is not None})
        for word, column in _FACTS.items()
    }
    template = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    ).get_template("report.html")
    page = template.render(
        notebooks=sections,
        n_runs=len(runs),
        n_done=sum(map(bool, found.values())),
        n_failed=len(failed),
        facts={word: values for word, values in facts.items() if values},
        first=times[0],
        last=times[-1],
    )
    with write_whole(target) as partial:
        partial.write_text(page, encoding="utf-8")


def _describe(batch: Path, name: str, run: NotebookRun, result: Mapping, target: Path) -> dict:
    """What the page shows of one run."""
    folder = Path(result["folder"])
    tables = {path.stem: pd.read_csv(path) for path in sorted(folder.glob("*.csv"))}
    figures = {path.stem: path.read_bytes() for path in sorted(folder.glob("*.png"))}
    shown = ("headline", "seconds", "peak_memory_gib", "origin", "settings")
    return {
        "name": _title(run),
        "id": name.replace("/", "-").removesuffix(".json"),
        "axes": {axis: run.settings[axis] for axis in _AXES if axis in run.settings},
        "figures": {stem: base64.b64encode(data).decode() for stem, data in figures.items()},
        "tables": {
            stem: {"html": _table(table.head(_MANY)), "n_rows": len(table), "n_shown": min(_MANY, len(table))}
            for stem, table in tables.items()
        },
        **{word: result[word] for word in shown},
        **_links(batch, name, run, target),
    }


def _title(run: NotebookRun) -> str:
    settings = run.settings
    model = settings["model"]
    words = [Path(model).name if os.path.isabs(model) else model]
    if "criterion" in settings:
        how_many = f"K = {settings['n_remove']}" if "n_remove" in settings else settings["target"]
        words.append(f"{settings['criterion']}, {how_many}")
    if "training" in settings:
        healed = [word for word in (settings.get("repair", "none"), settings["training"]) if word != "none"]
        words.append(" + ".join(healed) or "no recovery")
    if settings.get("seed"):
        words.append(f"seed {settings['seed']}")
    return " · ".join(words)


def _links(batch: Path, name: str, run: NotebookRun, target: Path) -> dict:
    """Addresses of the executed notebook and of what was said, relative to the report; only of those that are
    there."""
    result = batch / name
    executed = result.parent / "executed" / f"{run.notebook}{result.stem[2:]}.ipynb"
    files = {"executed notebook": executed, "log": result.with_suffix(".log")}
    links = {word: os.path.relpath(path, target.parent) for word, path in files.items() if path.exists()}
    return {"links": links}


def _overview(done: list[dict]) -> str:
    """The headlines of one notebook's runs, a row for each; columns that all share are left out where there
    are several."""
    rows = []
    for run in done:
        found = {word: value for word, value in run["headline"].items() if word != "checkpoint"}
        costs = {"seconds": run["seconds"], "peak memory (GiB)": run["peak_memory_gib"]}
        rows.append(run["axes"] | found | costs)
    table = pd.DataFrame(rows)
    alike = [axis for axis in _AXES if axis in table and len(table) > 1 and table[axis].nunique() == 1]
    table = table.drop(columns=alike)
    return _table(table.map(lambda cell: ", ".join(map(str, cell)) if isinstance(cell, list) else cell))


def _table(table: pd.DataFrame) -> str:
    """HTML of a table; pandas escapes what stands in it."""
    return table.to_html(index=False, border=0, na_rep="", float_format=lambda number: f"{number:.4g}")
