"""Every criterion on the embedded models: the rows and figures that notebook 06 and the README show.

    python -m benchmarks.comparison smollm2 --data ../shared/data [--grid 3 6] [--windows 64] [--tasks [3 6]]
                                                 [--stories 100]

Takes hours on two cores and goes on where it stopped: what is measured lies in runs/, and in the committed
ledger (figures/06_ledger.jsonl, a line for each choice, each set's losses and each task's scores), so that
another machine can go on as well. After each model the ledger and figures/06_comparison.csv are written.
Cells not measured stay empty.
"""

import argparse
import json
from fnmatch import fnmatch
from pathlib import Path

import pandas as pd
import torch

from simdiff_utils import provenance
from simdiff_utils.comparison.rows import FOLDER, measure
from simdiff_utils.comparison.tables import ROWS
from simdiff_utils.criterion.stage import choice_file
from simdiff_utils.files import read_kept, write_kept, write_whole
from simdiff_utils.registry import CRITERIA
from simdiff_utils.run import Run
from simdiff_utils.settings import Settings

EMBEDDED = {  # how the benchmarks' command lines call the models that need no hub
    "smollm2": "embedded:smollm2-135m-instruct",
    "gemma": "embedded:gemma-3-270m",
    "qwen-0.5b": "embedded:qwen2.5-coder-0.5b-instruct",
    "qwen-1.5b": "embedded:qwen2.5-coder-1.5b-instruct",
}
# Gemma's head of 262,144 words takes hours in float32; bfloat16 is three times as fast where it is multiplied
MODELS = {"smollm2": ("float32", [3, 6, 8, 9], [3, 6]), "gemma": ("bfloat16", [2, 4, 5, 6], [4])}
SHARED = dict(batch_size=4, n_samples=64, n_validation=16, criteria=list(CRITERIA))
LEDGER = "06_ledger.jsonl"
MEASURED = ("losses-wikitext2-*", "tasks")  # below FOLDER: facts that outlive changes of the code


def choice_folders(run: Run) -> set[Path]:
    """Where today's code keeps the run's choices: the folder's name carries the key."""
    return {choice_file(run, name, 1).parent for name in run.settings.criteria}


def read_ledger(run: Run, path: Path) -> None:
    """Put what the ledger holds of the run's model where the run looks for it, unless it is there.

    A choice that other code made would lie elsewhere: it is left out, and made again.
    """
    choices, measured = choice_folders(run), run.folder / FOLDER
    for entry in map(json.loads, path.read_text().splitlines() if path.exists() else []):
        target = provenance.runs_root() / entry["file"]
        stage = target.relative_to(measured).parts[0] if target.is_relative_to(measured) else ""
        wanted = target.parent in choices or any(fnmatch(stage, pattern) for pattern in MEASURED)
        if wanted and not target.exists():
            write_kept(target, entry["data"])


def write_ledger(runs: list[Run], path: Path) -> None:
    """Put all that was measured of the runs' one model into the ledger, and what today's code chose.

    Lines of other models stay.
    """
    lines, run = path.read_text().splitlines() if path.exists() else [], runs[0]
    lines = [line for line in lines if not json.loads(line)["file"].startswith(f"{run.folder.name}/")]
    folders = set().union(*map(choice_folders, runs))
    files = [file for folder in folders for file in folder.glob("*.json")]
    files += [file for stage in MEASURED for file in (run.folder / FOLDER).glob(f"{stage}/**/*.json")]
    files.sort()
    kept = {file.relative_to(provenance.runs_root()).as_posix(): read_kept(file) for file in files}
    lines += [json.dumps({"file": name, "data": data}) for name, data in kept.items() if data]
    with write_whole(path) as partial:
        partial.write_text("\n".join(lines) + "\n", encoding="utf-8")


def write_rows(rows: pd.DataFrame, path: Path, command: str) -> None:
    """Put the rows of one model into the table, in the place of those that were there; rows of other models
    stay, and so do their facts above it."""
    model, facts, parts = rows["model"].iloc[0], {}, {}
    if path.exists():
        facts = dict(json.loads(line[2:]) for line in path.read_text().splitlines() if line.startswith("# "))
        parts = dict(list(pd.read_csv(path, comment="#").groupby("model", sort=False)))
    before = facts.get(model, {}).get("machine", "").split(" and ")  # each machine did a part
    machines = [*before, provenance.describe_machine()]
    facts[model] = {
        "command": command,
        "machine": " and ".join(dict.fromkeys(filter(None, machines))),
        "torch": torch.__version__,
    }
    table = pd.concat((parts | {model: rows}).values(), ignore_index=True)
    head = "".join(f"# {json.dumps(pair)}\n" for pair in facts.items())
    with write_whole(path) as partial:
        partial.write_text(head + table.to_csv(index=False, float_format="%.6g"), encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("model", choices=MODELS)
    parser.add_argument(
        "--data", default="", help="folder with wikitext2/ and the tasks' rows; empty: the hub"
    )
    parser.add_argument(
        "--grid", type=int, nargs="+", help="numbers of layers to remove (default: the model's)"
    )
    parser.add_argument("--windows", type=int, default=64)
    parser.add_argument(
        "--tasks", type=int, nargs="*", help="numbers of layers for the tasks (default: none)"
    )
    parser.add_argument("--stories", type=int, default=100, help="of CoQA, beside the tasks; 0: none")
    parser.add_argument("--figures", type=Path, default=Path("figures"))
    given = parser.parse_args()
    dtype, grid, task_grid = MODELS[given.model]
    task_grid = [] if given.tasks is None else given.tasks or task_grid
    run = Run(
        Settings(
            model=EMBEDDED[given.model],
            dtype=dtype,
            n_remove_grid=given.grid or grid,
            data_folder=given.data,
            n_windows=given.windows,
            task_grid=task_grid,
            n_stories=given.stories,
            **SHARED,
        )
    )
    read_ledger(run, given.figures / LEDGER)
    grid = " ".join(map(str, run.grid))
    command = f"python -m benchmarks.comparison {given.model} --grid {grid} --windows {given.windows}"
    if task_grid:
        command += f" --tasks {' '.join(map(str, task_grid))} --stories {given.stories}"
    rows = measure(run)
    write_rows(rows, given.figures / ROWS, command)
    write_ledger([run], given.figures / LEDGER)
    print(rows[rows["metric"].isin(["wikitext2_perplexity", "AVG"])].to_string(), flush=True)


if __name__ == "__main__":
    main()
