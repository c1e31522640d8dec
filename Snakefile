# The notebooks as a graph of files: 01 and 02 once per model, 03 per criterion and number of layers, then 04 and 05
# where asked. `make workbook` runs one model, one criterion, one number; many are named in a file or on the line:
#
#     snakemake --cores all --config 'model=[embedded:smollm2-135m-instruct, some/folder]' 'n_remove=[3, 6]' speed=true
#     snakemake --cores all --config pruning=false comparison=true 'n_remove_grid=[3, 6]' data_folder=some/folder
#     snakemake --cores all --configfile notebooks/grids/paper.yaml
#
# 06, the comparison, runs once per model and needs none of the others: it measures the methods in `criteria` at the
# numbers in `n_remove_grid`, and asks the tasks at those in `task_grid`; `measure=false` shows the workbook's own rows.
#
# Config keys: `recovery`, `speed`, `comparison` (true: run 04, 05, 06), `pruning` (false: 03 only where 04 or 05 needs
# it), and any setting of simdiff_utils/settings.py. Of these model, criterion and n_remove may be lists, and every
# other may be a mapping from each model to its value, as in `n_remove_grid: {some/model: [3, 6], another/one: [8]}`.
# What `make` was given comes in the environment, see FROM_MAKE.
# A rule's proof is its result file, written by the notebook's last cell; its log is the executed notebook, which
# stays when the run fails. Both lie in runs/batch/, in a folder named after the model and a hash of all settings.

import ast
import contextlib
import dataclasses
import functools
import hashlib
import json
import math
import os
import re
import sys
import time
from pathlib import Path

import yaml
from simdiff_utils.settings import Settings, SimDiffError

FROM_MAKE = {"model": "SIMDIFF_MODEL", "text": "SIMDIFF_TEXT", "n_remove": "SIMDIFF_K",
             "criterion": "SIMDIFF_CRITERION", "alpha": "SIMDIFF_ALPHA", "dtype": "SIMDIFF_DTYPE"}
ASKED = {"pruning": "03", "recovery": "04", "speed": "05", "comparison": "06"}  # config key -> notebook
LOCAL = {"model": "*", "text": "*", "data_folder": "*/*"}  # settings that may name a folder -> its files
NOTEBOOKS = Path(workflow.basedir) / "notebooks"
# The notebooks run in their own folder: let them see the same run root as this file, whatever it was relative to.
os.environ["SIMDIFF_RUNS"] = str(Path(os.environ.get("SIMDIFF_RUNS") or Path(workflow.basedir) / "runs").resolve())
BATCH = os.path.relpath(Path(os.environ["SIMDIFF_RUNS"]) / "batch")
STARTED = time.time()


def read_asked():
    """Config and what `make` was given, as {setting: value}; words become what the setting's type wants."""
    asked = dict(config)
    asked |= {name: os.environ[variable] for name, variable in FROM_MAKE.items() if os.environ.get(variable)}
    types = {field.name: field.type for field in dataclasses.fields(Settings)}
    return {name: convert(value, types.get(name)) for name, value in asked.items()}


def convert(value, wanted):
    """A word, or each word of a list or mapping, as the setting's type wants it; Settings refuses what is no such."""
    if isinstance(value, list):
        return [convert(item, wanted) for item in value]
    if isinstance(value, dict):
        return {model: convert(item, wanted) for model, item in value.items()}
    with contextlib.suppress(KeyError, ValueError):
        if isinstance(value, str):
            return {int: int, list[int]: int, float: float, float | str: float,
                    bool: {"true": True, "false": False}.__getitem__}[wanted](value)
    return value


def plan(asked):
    """What to run, as {folder: its settings} and the list of result files wanted.

    Raises:
        SimDiffError: an unknown name, a wrong type or value.
    """
    asked = dict(asked)
    wanted = [number for key, number in ASKED.items() if str(asked.pop(key, key == "pruning")).lower() == "true"]
    if not wanted:
        raise SimDiffError(f"nothing is asked for: one of {', '.join(ASKED)} has to be true.")
    models, criteria, n_removes = (value if isinstance(value := asked.pop(key, getattr(Settings, key)), list) else [value]
                                   for key in ("model", "criterion", "n_remove"))
    unknown = set(asked) - {field.name for field in dataclasses.fields(Settings)}
    if unknown:
        raise SimDiffError(f"unknown config key {', '.join(sorted(unknown))}; see the head of the Snakefile.")
    folders, results = {}, []
    for model in models:
        Settings(model=model)
        given = {"model": model} | {name: pick(name, value, model) for name, value in asked.items()}
        for criterion in criteria:
            for n_remove in n_removes:
                Settings(**given, criterion=criterion, n_remove=n_remove)
        # 02 chooses the sets for every number asked, so that 03 finds its own among them
        grid = given.get("n_remove_grid", Settings().n_remove_grid)
        if wanted != ["06"] and not set(n_removes) <= set(grid):
            given["n_remove_grid"] = sorted({*grid, *n_removes})
        given = {name: locate(value) if name in LOCAL else value for name, value in given.items()}
        folder = name_folder(given)
        folders[folder] = given
        results += [f"{BATCH}/{folder}/{number}-{criterion}-{n_remove}.json"
                    for number in wanted if number != "06" for criterion in criteria for n_remove in n_removes]
        results += [f"{BATCH}/{folder}/06.json"] if "06" in wanted else []
    return folders, results


def pick(name, value, model):
    """A setting's value for one model, where the config maps each model to its own."""
    if not isinstance(value, dict):
        return value
    if model not in value:
        raise SimDiffError(f"{name} is given per model and names no {model}; it names {', '.join(map(str, value))}.")
    return value[model]


def locate(name):
    """An existing file or folder by its full path, since the notebooks run elsewhere; any other name as it is."""
    path = Path(name).expanduser()
    return str(path.resolve()) if name and path.exists() else name


def name_folder(given):
    """Name for the results of these settings: the model's, and a hash of all; local files count with their state."""
    state = [(str(path), path.stat().st_size, path.stat().st_mtime_ns)
             for name, files in LOCAL.items() if Path(given.get(name, "")).is_absolute()
             for root in [Path(given[name])] for path in sorted([root, *root.glob(files)]) if path.is_file()]
    digest = hashlib.sha256(json.dumps([given, state], sort_keys=True).encode()).hexdigest()
    words = re.sub("[^a-z0-9]+", "-", Path(given["model"]).name.lower()).strip("-")
    return f"{words[:60] or 'model'}-{digest[:8]}"


@functools.cache
def declared(notebook):
    """Names in the notebook's parameters cell (papermill's own reader passes over those of a union type)."""
    cells = json.loads(Path(notebook).read_text(encoding="utf-8"))["cells"]
    source = "".join("".join(cell["source"]) for cell in cells if "parameters" in cell["metadata"].get("tags", []))
    return {node.target.id for node in ast.parse(source).body if isinstance(node, ast.AnnAssign)}


def parameters(wildcards, input, output):
    """The notebook's parameters as one line of YAML; shell-quoted where it is used, so that values stay data."""
    # whoever asks for 06 here wants it measured; the notebook's own default shows what the workbook has
    given = {"measure": True} | FOLDERS[wildcards.folder] | {"result_file": str(Path(output[0]).resolve())}
    if "criterion" in wildcards.keys():
        given |= {"criterion": wildcards.criterion, "n_remove": int(wildcards.n_remove)}
    given = {name: value for name, value in given.items() if name in declared(input.notebook)}
    return yaml.safe_dump(given, default_flow_style=True, width=math.inf, allow_unicode=True).strip()


def failures():
    """One sentence for each notebook that stopped in this run: the last line of what papermill said."""
    for words in sorted(Path(BATCH).glob("*/[0-9]*.log")):
        if words.stat().st_mtime >= STARTED and not words.with_suffix(".json").exists():
            *_, sentence = words.read_text(encoding="utf-8").strip().splitlines() or ["it said nothing"]
            yield f"{words.stem}: {sentence.removeprefix('SimDiffError: ')}\n  (all that was said: {words})"


try:
    FOLDERS, RESULTS = plan(read_asked())
except SimDiffError as error:
    sys.exit(f"simdiff: {error}")

# Snakemake's own words on each job, and on a failed one, say less than the notebook's heading, bars and sentence.
logger.addFilter(lambda record: not str(record.msg).startswith(
    ("Building DAG", "Using shell", "Select jobs", "Execute ", "RuleException", "Shutting down", "Exiting because",
     "Complete log", "WorkflowError:\nAt least one job did not complete")))

# Notebooks never run beside each other: each uses every core, and 05 measures time.
# The bars of the notebook's cells go to the terminal as they are; papermill's own words are kept for `onerror`.
# An error in a cell would only come again, so the one retry is left to kernels that died or never started; it is not
# Snakemake's `retries`, which deletes the executed notebook of the first try.
RUN = """
IPYTHONDIR=$(mktemp -d); export IPYTHONDIR; trap 'rm -rf "$IPYTHONDIR"' EXIT; trap 'exit 130' INT TERM
run() {{
  TQDM_MININTERVAL=1 {sys.executable:q} -m papermill --cwd {NOTEBOOKS:q} --no-progress-bar --stderr-file - \
    -y {params.parameters:q} {input.notebook:q} {log:q} 2> {params.words:q}
}}
echo "== $(basename {log:q} .ipynb) =="
run || {{ ! grep -q PapermillExecutionError {params.words:q} && echo "once more" && run; }}
"""
CODE, TASKS = (sorted(str(path) for path in (Path(workflow.basedir) / "simdiff_utils").glob(files))
               for files in ("*.py", "lm_eval_tasks/*.*"))


wildcard_constraints:
    folder="[a-z0-9-]+",
    criterion="[a-z-]+",
    n_remove="[0-9]+",


rule all:
    input:
        RESULTS,
    default_target: True


rule calibration_capture:
    input:
        notebook=NOTEBOOKS / "01_calibration_capture.ipynb",
        code=CODE,
    output:
        BATCH + "/{folder}/01.json",
    log:
        BATCH + "/{folder}/executed/01_calibration_capture.ipynb",
    params:
        parameters=parameters,
        words=lambda wildcards, output: str(Path(output[0]).with_suffix(".log")),
    threads: workflow.cores
    shell:
        RUN


use rule calibration_capture as criterion_derivation with:
    input:
        BATCH + "/{folder}/01.json",
        notebook=NOTEBOOKS / "02_criterion_derivation.ipynb",
        code=CODE,
    output:
        BATCH + "/{folder}/02.json",
    log:
        BATCH + "/{folder}/executed/02_criterion_derivation.ipynb",


use rule calibration_capture as pruning with:
    input:
        BATCH + "/{folder}/02.json",
        notebook=NOTEBOOKS / "03_pruning.ipynb",
        code=CODE,
    output:
        BATCH + "/{folder}/03-{criterion}-{n_remove}.json",
    log:
        BATCH + "/{folder}/executed/03_pruning-{criterion}-{n_remove}.ipynb",


use rule calibration_capture as lora_recovery with:
    input:
        BATCH + "/{folder}/03-{criterion}-{n_remove}.json",
        notebook=NOTEBOOKS / "04_lora_recovery.ipynb",
        code=CODE,
    output:
        BATCH + "/{folder}/04-{criterion}-{n_remove}.json",
    log:
        BATCH + "/{folder}/executed/04_lora_recovery-{criterion}-{n_remove}.ipynb",


use rule calibration_capture as speedup_measurement with:
    input:
        BATCH + "/{folder}/03-{criterion}-{n_remove}.json",
        notebook=NOTEBOOKS / "05_speedup_measurement.ipynb",
        code=CODE,
    output:
        BATCH + "/{folder}/05-{criterion}-{n_remove}.json",
    log:
        BATCH + "/{folder}/executed/05_speedup_measurement-{criterion}-{n_remove}.ipynb",


use rule calibration_capture as comparison with:
    input:
        notebook=NOTEBOOKS / "06_comparison.ipynb",
        published=NOTEBOOKS / "published.csv",
        code=CODE + TASKS,
    output:
        BATCH + "/{folder}/06.json",
    log:
        BATCH + "/{folder}/executed/06_comparison.ipynb",


onerror:
    print("\n".join(["The run stopped.", *failures()]), file=sys.stderr)
