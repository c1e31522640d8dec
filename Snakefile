# The notebooks as a graph of files: 01 and 02 once per model, 03 per criterion and number of layers, then 04 and 05
# where asked. `make workbook` runs one model, one criterion, one number; many are named in a file or on the line:
#
#     snakemake --configfile notebooks/grids/smoke.yaml          (-n: only show what would run)
#     snakemake --config 'model=[embedded:smollm2-135m-instruct, some/folder]' 'n_remove=[3, 6]' speed=true
#     snakemake --config pruning=false comparison=true 'n_remove_grid=[3, 6]' data_folder=some/folder
#     snakemake --workflow-profile notebooks/grids/slurm --configfile notebooks/grids/paper.yaml      (on a Slurm cluster)
#
# 06, the comparison, runs once per model and needs none of the others: it measures the methods in `criteria` at the
# numbers in `n_remove_grid`, and asks the tasks at those in `task_grid`.
#
# Config keys: `recovery`, `speed`, `comparison` (true: run 04, 05, 06; `recovery` may list rungs, as in
# `recovery: [linear, lora, linear+distillation]`), `pruning` (false: 03 only where 04 or 05 needs it), and any setting of
# simdiff_utils/settings.py. Of these model, seed, criterion and n_remove may be lists, and every other may be a mapping
# from each model to its value, as in `n_remove_grid: {some/model: [3, 6], another/one: [8]}`. `gpu_gib`, the memory of one
# GPU of a cluster, makes Slurm jobs ask for as many as the model needs. What `make` was given comes in the environment. All
# is checked before anything starts: names and values (`grid.plan_runs`), models, memory and disk (`resources.check_grid`).
#
# At the end, and when a run fails, all results stand in one page: runs/batch/report-HASH.html.
#
# A run's proof is its result file, written by the notebook's last cell; its log is the executed notebook, which stays
# when the run fails. Both lie in runs/batch/, in a folder for each model; a result's name ends in a hash of the settings
# that its notebook reads. Snakemake's options that every run wants are in profiles/default.

import functools
import hashlib
import math
import os
import re
import shutil
import sys
import time
from pathlib import Path

import filelock
import yaml
from simdiff_utils.files import read_kept
from simdiff_utils.grid import encode_config, plan_runs, read_config
from simdiff_utils.report import write_report
from simdiff_utils.resources import ModelSize, Needs, check_grid, estimate_needs, look_up
from simdiff_utils.settings import SimDiffError

ROOT = Path(workflow.basedir)
NOTEBOOKS = ROOT / "notebooks"
# The notebooks run in their own folder: let them see the same run root as this file, whatever it was relative to.
os.environ["SIMDIFF_RUNS"] = str(Path(os.environ.get("SIMDIFF_RUNS") or ROOT / "runs").resolve())
BATCH = Path(os.environ["SIMDIFF_RUNS"]) / "batch"
STARTED = time.time()


def hold(batch):
    """Keep a second run out of this folder for as long as this process lives; a run that was killed holds nothing.

    Snakemake's own locks and marks lie in the same folder and outlive a kill: they are taken away by whoever holds ours.
    """
    lock = filelock.FileLock(batch / "lock", timeout=0)
    try:
        lock.acquire()
    except filelock.Timeout:
        raise SimDiffError(f"another run is writing to {batch}: wait for it, stop it, or set SIMDIFF_RUNS to another "
                           "folder.") from None
    for state in ("locks", "incomplete"):  # a result file is whole or not there: none that is there is incomplete
        shutil.rmtree(batch / ".snakemake" / state, ignore_errors=True)
    for result in RUNS:
        if read_kept(batch / result) is None:  # damaged: no proof of anything
            (batch / result).unlink(missing_ok=True)
    return lock


def parameters(wildcards, output):
    """The notebook's parameters as one line of YAML; shell-quoted where it is used, so that values stay data."""
    given = RUNS[output[0]].settings | {"result_file": str((BATCH / output[0]).resolve())}
    return yaml.safe_dump(given, default_flow_style=True, width=math.inf, allow_unicode=True).strip()


def before(number):
    """Input function of a notebook's rule: the results that come before, whose time of writing says nothing.

    One that was lost and is made again is not waited for by a result that is there: that would make both again.
    """
    def results_before(wildcards):
        result = f"{wildcards.model}/{number}-{wildcards.run}.json"
        there = (BATCH / result).exists()
        return ancient([earlier for earlier in RUNS[result].after if not there or (BATCH / earlier).exists()])

    return results_before


def failures() -> dict[str, str]:
    """Result file -> one sentence, for each notebook that stopped in this run: the last line of what papermill said."""
    found = {}
    for result in map(Path, RUNS):
        words = result.with_suffix(".log")
        if not result.exists() and words.exists() and words.stat().st_mtime >= STARTED:
            *_, sentence = words.read_text(encoding="utf-8").strip().splitlines() or ["it said nothing"]
            found[str(result)] = sentence.removeprefix("SimDiffError: ")
    return found


def needs(wildcards, input) -> Needs:
    """What the job that runs this notebook asks of a batch system."""
    run = RUNS[f"{wildcards.model}/{Path(input.notebook).name[:2]}-{wildcards.run}.json"]
    return estimate_needs(run, size_of(run.settings["model"]), GPU_GIB)


LIMITS = dict(mem_mb=lambda wildcards, input: math.ceil(1024 * needs(wildcards, input).memory_gib),
              runtime=lambda wildcards, input: needs(wildcards, input).minutes,
              gpu=lambda wildcards, input: needs(wildcards, input).n_gpus)


@functools.cache
def size_of(model) -> ModelSize:
    try:
        return look_up(model)
    except SimDiffError:  # a dry run goes on, and has said so; nothing else gets here
        return ModelSize(0, 1, 0, 0, False)


try:
    asked = read_config(config, os.environ)
    # Snakemake writes its config into the command lines of the processes it starts: as one word without any sign that a
    # shell reads, whatever a model or a text is called.
    workflow.config_settings.config_args = [f"encoded={encode_config(config)}"]
    RUNS = plan_runs(asked, NOTEBOOKS)
    GPU_GIB = asked.get("gpu_gib", 0)
    REPORT = f"report-{hashlib.sha256(' '.join(sorted(RUNS)).encode()).hexdigest()[:8]}.html"  # of just these runs
    if workflow.is_main_process:
        there = {result for result in RUNS if (BATCH / result).exists()}
        print(f"{len(RUNS)} notebook runs, {len(there)} of them there, in {BATCH}", file=sys.stderr)
        problems = check_grid(RUNS, there, BATCH, workflow.local_exec, GPU_GIB)
        if workflow.output_settings.dryrun:  # `workflow.dryrun` is not known yet while this file is read
            print("".join(f"would not start: {problem}\n" for problem in problems), file=sys.stderr, end="")
        else:
            if problems:
                raise SimDiffError("\nsimdiff: ".join(problems))
            BATCH.mkdir(parents=True, exist_ok=True)
            LOCK = hold(BATCH)
except SimDiffError as error:
    sys.exit(f"simdiff: {error}")


workdir: BATCH  # so that Snakemake's own state lies beside what it describes


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
CODE, TASKS = (sorted(str(path) for path in (ROOT / "simdiff_utils").glob(files))
               for files in ("*.py", "lm_eval_tasks/*.*"))


wildcard_constraints:
    model="[a-z0-9-]+",
    run="[a-z0-9-]+",


rule all:
    input:
        list(RUNS),  # asked for beside the report, which a failed run leaves, too
        REPORT,
    default_target: True


rule report:
    input:
        list(RUNS),
        code=CODE,
    output:
        REPORT,
    localrule: True
    run:
        write_report(BATCH, RUNS, BATCH / REPORT)


rule calibration_capture:
    input:
        before("01"),
        notebook=NOTEBOOKS / "01_calibration_capture.ipynb",
        code=CODE,
    output:
        "{model}/01-{run}.json",
    log:
        "{model}/executed/01_calibration_capture-{run}.ipynb",
    params:
        parameters=parameters,
        words=lambda wildcards, output: str(Path(output[0]).with_suffix(".log")),
    threads: workflow.cores
    resources:
        **LIMITS,
    shell:
        RUN


use rule calibration_capture as criterion_derivation with:
    input:
        before("02"),
        notebook=NOTEBOOKS / "02_criterion_derivation.ipynb",
        code=CODE,
    output:
        "{model}/02-{run}.json",
    log:
        "{model}/executed/02_criterion_derivation-{run}.ipynb",


use rule calibration_capture as pruning with:
    input:
        before("03"),
        notebook=NOTEBOOKS / "03_pruning.ipynb",
        code=CODE,
    output:
        "{model}/03-{run}.json",
    log:
        "{model}/executed/03_pruning-{run}.ipynb",


use rule calibration_capture as lora_recovery with:
    input:
        before("04"),
        notebook=NOTEBOOKS / "04_lora_recovery.ipynb",
        code=CODE,
    output:
        "{model}/04-{run}.json",
    log:
        "{model}/executed/04_lora_recovery-{run}.ipynb",


use rule calibration_capture as speedup_measurement with:
    input:
        before("05"),
        notebook=NOTEBOOKS / "05_speedup_measurement.ipynb",
        code=CODE,
    output:
        "{model}/05-{run}.json",
    log:
        "{model}/executed/05_speedup_measurement-{run}.ipynb",
    resources:
        **LIMITS,
        slurm_extra="--exclusive",  # what is timed shares a node with nobody


use rule calibration_capture as comparison with:
    input:
        before("06"),
        notebook=NOTEBOOKS / "06_comparison.ipynb",
        published=NOTEBOOKS / "published.csv",
        code=CODE + TASKS,
    output:
        "{model}/06-{run}.json",
    log:
        "{model}/executed/06_comparison-{run}.ipynb",


onerror:
    failed = failures()
    write_report(BATCH, RUNS, BATCH / REPORT, failed)
    print("\n".join(["The run stopped.", *(f"{Path(result).stem}: {why}\n  (all that was said: {Path(result).with_suffix('.log').resolve()})"
                                           for result, why in failed.items()), f"Report: {BATCH / REPORT}"]), file=sys.stderr)


onsuccess:
    print(f"Report: {BATCH / REPORT}", file=sys.stderr)
