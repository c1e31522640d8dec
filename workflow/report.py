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
_AXES = (
    "model",
    "seed",
    "criterion",
    "n_remove",
    "repair",
    "training",
)  # what tells the runs of one notebook apart


def write_report(
    batch: Path, runs: Mapping[str, NotebookRun], target: Path, failed: Mapping[str, str] | None = None
) -> None:
    """Write the report of a grid.

    Args:
        batch: folder of the result files; links to the executed notebooks are relative to the report.
        runs: see `grid.plan_runs`; those without a result are listed as missing.
        target: the HTML file; it appears whole or not at all.
        failed: result file -> the sentence that says why there is none.
    """
    failed = failed or {}
    found = {name: read_kept(batch / name) for name in runs}
    notebooks = []
    for notebook in NOTEBOOKS.values():
        mine = [(name, run) for name, run in runs.items() if run.notebook == notebook]
        done = [_describe(batch, name, run, found[name], target) for name, run in mine if found[name]]
        missing = [
            {"name": _title(run), "why": failed.get(name, "not run yet"), **_links(batch, name, run, target)}
            for name, run in mine
            if not found[name]
        ]
        if mine:
            notebooks.append(
                {
                    "name": notebook,
                    "title": notebook.replace("_", " · ", 1).replace("_", " "),
                    "runs": done,
                    "missing": missing,
                    "overview": _overview(done),
                }
            )
    origins = pd.DataFrame([result["origin"] for result in found.values() if result])
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    page = environment.get_template("report.html").render(
        notebooks=notebooks,
        n_runs=len(runs),
        n_done=sum(map(bool, found.values())),
        n_failed=len(failed),
        facts={
            word: sorted(set(origins[column].dropna().astype(str)))
            for word, column in (
                ("models", "model"),
                ("text", "text"),
                ("machine", "machine"),
                ("revision", "git_revision"),
                ("code (sha256)", "code_sha256"),
            )
            if column in origins
        },
        first=min(origins["time"], default="") if len(origins) else "",
        last=max(origins["time"], default="") if len(origins) else "",
    )
    with write_whole(target) as partial:
        partial.write_text(page, encoding="utf-8")


def _describe(batch: Path, name: str, run: NotebookRun, result: Mapping, target: Path) -> dict:
    """What the page shows of one run."""
    folder = Path(result["folder"])
    tables = {path.stem: pd.read_csv(path) for path in sorted(folder.glob("*.csv"))}
    figures = {
        path.stem: base64.b64encode(path.read_bytes()).decode() for path in sorted(folder.glob("*.png"))
    }
    return {
        "name": _title(run),
        "id": name.replace("/", "-").removesuffix(".json"),
        "headline": result["headline"],
        "figures": figures,
        "tables": {
            key: {"html": _table(table.head(_MANY)), "n_rows": len(table), "n_shown": min(_MANY, len(table))}
            for key, table in tables.items()
        },
        "seconds": result["seconds"],
        "peak_memory_gib": result["peak_memory_gib"],
        "origin": result["origin"],
        "settings": result["settings"],
        **_links(batch, name, run, target),
        "axes": {axis: run.settings[axis] for axis in _AXES if axis in run.settings},
    }


def _title(run: NotebookRun) -> str:
    settings = run.settings
    words = [Path(settings["model"]).name if os.path.isabs(settings["model"]) else settings["model"]]
    if "criterion" in settings:
        words.append(f"{settings['criterion']}, K = {settings['n_remove']}")
    if "training" in settings:
        words.append(
            " + ".join(w for w in (settings.get("repair", "none"), settings["training"]) if w != "none")
            or "no recovery"
        )
    if settings.get("seed"):
        words.append(f"seed {settings['seed']}")
    return " · ".join(words)


def _links(batch: Path, name: str, run: NotebookRun, target: Path) -> dict:
    """Addresses of the executed notebook and of what was said, relative to the report; only of those that are
    there."""
    result = batch / name
    executed = result.parent / "executed" / f"{run.notebook}{result.stem[2:]}.ipynb"
    files = {"executed notebook": executed, "log": result.with_suffix(".log")}
    return {
        "links": {word: os.path.relpath(path, target.parent) for word, path in files.items() if path.exists()}
    }


def _overview(done: list[dict]) -> str:
    """The headlines of one notebook's runs, a row for each; columns that all share are left out where there
    are several."""
    rows = [
        run["axes"]
        | {key: value for key, value in run["headline"].items() if key != "checkpoint"}
        | {"seconds": run["seconds"], "peak memory (GiB)": run["peak_memory_gib"]}
        for run in done
    ]
    table = pd.DataFrame(rows)
    alike = [axis for axis in _AXES if axis in table and len(table) > 1 and table[axis].nunique() == 1]
    return _table(
        table.drop(columns=alike).map(
            lambda cell: ", ".join(map(str, cell)) if isinstance(cell, list) else cell
        )
    )


def _table(table: pd.DataFrame) -> str:
    """HTML of a table; pandas escapes what stands in it."""
    return table.to_html(index=False, border=0, na_rep="", float_format=lambda number: f"{number:.4g}")
