"""The closing summary of a run, tables as committed, figures for the README."""

import json
import shutil
from pathlib import Path

import pandas as pd

from simdiff_utils import SimDiffError
from simdiff_utils.files import read_json, repository_root


def newest_results(root: Path) -> dict[str, Path]:
    """Folder of the newest result of each notebook, for the model that ran last; {notebook: folder}.

    Raises:
        SimDiffError: no notebook has finished under `root`.
    """
    finished = sorted(root.glob("*/[0-9][0-9]*_*/result.json"), key=lambda path: path.stat().st_mtime)
    if not finished:
        raise SimDiffError(f"no notebook has finished under {root}; run `make workbook` first.")
    model_folder = finished[-1].parent.parent
    newest = {
        read_json(path)["notebook"]: path.parent for path in finished if path.parent.parent == model_folder
    }
    return dict(sorted(newest.items()))


def summarise(root: Path) -> str:
    """What the newest run made, in words: per notebook its headline, and where everything lies."""
    newest = newest_results(root)
    lines = [f"Results in {next(iter(newest.values())).parent}"]
    for notebook, folder in newest.items():
        result = read_json(folder / "result.json")
        lines.append(
            f"\n{notebook}  ({result['seconds']:.0f} s, peak memory {result['peak_memory_gib']:.1f} GiB)"
        )
        lines += [f"  {name}: {value}" for name, value in result["headline"].items()]
        files = [path.name for path in sorted(folder.iterdir()) if path.suffix in (".csv", ".png")]
        lines.append(f"  tables and figures in {folder}: {', '.join(files)}")
    executed = sorted((root / "batch").glob("*/executed/*.ipynb"), key=lambda path: path.stat().st_mtime)
    if executed:
        lines.append(f"\nexecuted notebooks: {executed[-1].parent}")
    return "\n".join(lines)


def stored_table(name: str) -> pd.DataFrame:
    """A table as committed in the repository, by its path there: what the workbook measured, or what was
    published."""
    path = repository_root(Path(__file__)) / name
    if not path.exists():
        raise SimDiffError(f"{name} is not in {path.parent}; run the workbook from its repository.")
    return pd.read_csv(path, comment="#")


def publish_figures(root: Path, target: Path) -> None:
    """Copy the newest results' figures to `target`, each with its numbers as CSV under the settings that made
    them."""
    target.mkdir(exist_ok=True)
    for notebook, folder in newest_results(root).items():
        result = read_json(folder / "result.json")
        facts = {
            "notebook": notebook,
            **{name: result["origin"][name] for name in ("model", "text", "machine")},
            "settings": {name: value for name, value in result["settings"].items() if name != "result_file"},
        }
        head = "".join(
            f"# {name}: {json.dumps(value, ensure_ascii=False)}\n" for name, value in facts.items()
        )
        for picture in sorted(folder.glob("*.png")):
            numbers = picture.with_suffix(".csv")
            if numbers.exists():
                shutil.copy(picture, target / picture.name)
                (target / numbers.name).write_text(
                    head + numbers.read_text(encoding="utf-8"), encoding="utf-8"
                )
