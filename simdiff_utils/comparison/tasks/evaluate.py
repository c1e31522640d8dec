"""Benchmark tasks by lm-eval, in process, on the model in memory: many sets of removed layers in one pass.

No checkpoint is written. A result is kept as a small JSON file under a key of all that it depends on, task by
task, so that a killed run goes on where it was and a second one computes nothing.
"""

import copy
import functools
import hashlib
import json
import logging
import math
import random
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from tqdm.auto import tqdm
from transformers import PreTrainedTokenizerBase

from simdiff_utils import SimDiffError
from simdiff_utils.comparison.tasks.load import TaskData, TaskRows
from simdiff_utils.engine.decoder import Decoder
from simdiff_utils.engine.surgery import check_removed
from simdiff_utils.files import read_kept, write_kept

Removed = frozenset[int]

SUITES = {
    "zero_shot": (
        "boolq",
        "piqa",
        "hellaswag",
        "winogrande",
        "arc_easy",
        "arc_challenge",
        "openbookqa",
        "mathqa",
    ),
    "nlu": ("hellaswag", "piqa", "wsc273", "coqa", "boolq", "race", "race_middle", "c3", "ocnli"),
}
# Cells of the paper's second suite that stay empty, each with the sentence that stands there.
BLANK = {
    "cmnli": "CMNLI is no task of lm-eval, and no copy of its rows could be had to try one with; OCNLI, the other "
    "inference set of the same Chinese benchmark, is given in a column of its own.",
    "xsum": "XSum is scored by ROUGE on written summaries, and lm-eval has no task of its own for that.",
}
COLUMNS = [
    "removed",
    "task",
    "task_version",
    "metric",
    "value",
    "stderr",
    "n_samples",
    "n_shots",
    "limit",
    "source",
    "split",
    "data_sha256",
]
_SEEDS = (0, 1234)  # lm-eval's own: of `random`, and of numpy, torch and the draw of few-shot examples


def evaluate_tasks(
    decoder: Decoder | Callable[[], Decoder],
    tokenizer: PreTrainedTokenizerBase,
    sets: Iterable[Removed],
    tasks: Iterable[str],
    data: TaskData,
    limit: int | None = None,
    n_shots: int = 0,
    chat_template: bool = False,
    folder: Path | None = None,
    identity: Mapping[str, object] | None = None,
    batch_tokens: int = 512,
) -> pd.DataFrame:
    """Results of every task for the model without each set of layers, with lm-eval's own standard errors.

    Args:
        decoder: the model, or a function that loads it; called only where something has to be computed.
        sets: 0-based layer indices to leave out; the empty set is the dense model.
        tasks: names in lm-eval, or of ours (`lm_eval_tasks/`).
        limit: only the first so many documents of each task, as lm-eval takes them: no random sample. None:
            all.
        n_shots: solved examples before each question.
        chat_template: wrap every question in the tokenizer's chat template.
        folder: where results are kept; None: nowhere.
        identity: whatever else results depend on, for their key: hash of the weights, dtype, hash of the
            code.
        batch_tokens: tokens of a forward pass; a longer question is a pass of its own.

    Returns:
        one row per task, set and metric: removed (sorted list), task, task_version, metric (acc, acc_norm,
        em, f1), value (0 to 1), stderr (NaN where lm-eval gives none: a single document), n_samples, n_shots,
        limit (None: all), source, split, data_sha256.

    Raises:
        SimDiffError: no such task, no rows for it, no such layer, no chat template, nothing to draw shots
            from; a task that has to write text while the model is streamed.
    """
    sets = tuple(dict.fromkeys(sets))
    if limit is not None and limit < 1:
        raise SimDiffError(f"limit must be at least 1 document, or None for all, got {limit}.")
    if n_shots < 0:
        raise SimDiffError(f"n_shots must be 0 or more, got {n_shots}.")
    if chat_template and not tokenizer.chat_template:
        raise SimDiffError("this tokenizer has no chat template: set chat_template = False.")
    shared = {
        "lm_eval": version("lm_eval"),
        "tokenizer": _hash_tokenizer(tokenizer),
        "limit": limit,
        "n_shots": n_shots,
        "chat_template": tokenizer.chat_template if chat_template else None,
        "identity": dict(identity or {}),
    }
    with _quiet():
        jobs = [_Job.plan(data.find(task), shared, sets, folder) for task in dict.fromkeys(tasks)]
    waiting = [job for job in jobs if job.unknown]
    if waiting:
        decoder = decoder if isinstance(decoder, Decoder) else decoder()
        for removed in sets:
            check_removed(removed, decoder.n_layers)
        writing = next((job.rows.task for job in waiting if job.rows.generates), None)
        if writing and decoder.streamed:
            raise SimDiffError(
                f"{writing} has the model write text, which it cannot while it is streamed from disk: "
                "raise memory_gib where there is room, or leave the task out."
            )
    for job in (bar := tqdm(waiting, desc="tasks", leave=False)):
        bar.set_description(job.rows.task)
        with _quiet():
            _compute(job, decoder, tokenizer, batch_tokens)
    table = pd.DataFrame(
        [row for job in jobs for removed in sets for row in job.known[removed]], columns=COLUMNS
    )
    return table.astype({"value": float, "stderr": float})


def average_accuracy(rows: pd.DataFrame, dense: Removed = frozenset()) -> pd.DataFrame:
    """AVG of the paper's first suite: the mean of plain `acc` over its eight tasks, and what of it is
    retained.

    Args:
        rows: as `evaluate_tasks` gives them, one result for each set and task.
        dense: the set whose average is 100 % of RP.

    Returns:
        one row per set: removed, metric ("AVG"; where only seven of the tasks are there "AVG-7", which
        belongs in no column of AVG), value, stderr (tasks are independent: root of the summed squares over
        their number), n_tasks, missing (the tasks that are not there), RP (percent; NaN where the dense model
        has no average of the same).

    Raises:
        SimDiffError: two results for one set and task.
    """
    accuracies = rows[(rows["metric"] == "acc") & rows["task"].isin(SUITES["zero_shot"])]
    table = []
    for removed, one in accuracies.groupby(accuracies["removed"].map(tuple), sort=False):
        if one["task"].duplicated().any():
            raise SimDiffError(
                f"{one['task'][one['task'].duplicated()].iloc[0]} has two results for layers "
                f"{list(removed)}: average those of one evaluation."
            )
        missing = [task for task in SUITES["zero_shot"] if task not in set(one["task"])]
        table.append(
            {
                "removed": list(removed),
                "metric": f"AVG-{len(one)}" if missing else "AVG",
                "value": one["value"].mean(),
                "n_tasks": len(one),
                "missing": missing,
                "stderr": math.sqrt((one["stderr"] ** 2).sum(skipna=False)) / len(one),
            }
        )
    base = next((row for row in table if row["removed"] == sorted(dense)), None)
    for row in table:
        same = base is not None and row["missing"] == base["missing"]
        row["RP"] = row["value"] / base["value"] * 100 if same else math.nan
    return pd.DataFrame(table, columns=["removed", "metric", "value", "stderr", "n_tasks", "missing", "RP"])


@dataclass
class _Job:
    """One task for all sets: what its results depend on, where they are kept, and those that are known."""

    rows: TaskRows
    facts: dict
    paths: dict[Removed, Path | None]
    known: dict[Removed, list[dict]]

    @property
    def unknown(self) -> tuple[Removed, ...]:
        return tuple(removed for removed in self.paths if removed not in self.known)

    @classmethod
    def plan(cls, rows: TaskRows, shared: dict, sets: tuple[Removed, ...], folder: Path | None) -> "_Job":
        facts = shared | {
            "task": rows.task,
            "task_version": rows.version,
            "source": rows.source,
            "split": rows.split,
            "data_sha256": rows.sha256,
            "shots_sha256": rows.shots_sha256() if shared["n_shots"] else "",
        }
        paths = {removed: folder and _path(Path(folder), removed, facts) for removed in sets}
        known = {
            removed: kept["results"] for removed, path in paths.items() if path and (kept := read_kept(path))
        }
        return cls(rows, facts, paths, known)


def _path(folder: Path, removed: Removed, facts: dict) -> Path:
    key = json.dumps(facts | {"removed": sorted(removed)}, sort_keys=True, default=str)
    name = f"{facts['task']}-{f'without-{len(removed)}' if removed else 'dense'}"
    return folder / f"{name}-{hashlib.sha256(key.encode()).hexdigest()[:16]}.json"


def _compute(job: _Job, decoder: Decoder, tokenizer: PreTrainedTokenizerBase, batch_tokens: int) -> None:
    """All sets that are not known in one pass, then lm-eval's metrics set by set."""
    import lm_eval  # here, not above: both are slow to import, and not needed for what is known

    from simdiff_utils.comparison.tasks.lm import SetsLM

    task = job.rows.build()
    if task.get_config("num_fewshot") != 0:  # a task file that says 0 is not overruled, as in lm-eval
        task.set_config("num_fewshot", job.facts["n_shots"])
    task.set_fewshot_seed(_SEEDS[1])
    _build_requests_once(task)
    model = SetsLM(
        decoder, copy.deepcopy(tokenizer), job.unknown, batch_tokens
    )  # lm-eval gives it a padding token
    chat = job.facts["chat_template"] is not None
    for model.removed in job.unknown:
        answer = lm_eval.evaluate(
            lm=model,
            task_dict={"tasks": {job.rows.task: task}},
            limit=job.facts["limit"],
            log_samples=False,
            apply_chat_template=chat,
            fewshot_as_multiturn=chat,
        )
        results = _results(answer, model.removed, job)
        if job.paths[model.removed]:
            write_kept(job.paths[model.removed], {"results": results, "depends_on": job.facts})
        job.known[model.removed] = results


def _build_requests_once(task: object) -> None:
    """Let a task keep its requests from one evaluation to the next: they are the same for every set."""
    build, built = task.build_all_requests, []

    def build_once(**kwargs) -> None:
        if not built:
            build(**kwargs)
            built.append(True)
        for request in task.instances:
            request.resps, request.filtered_resps = [], {}

    task.build_all_requests = build_once


def _results(answer: dict, removed: Removed, job: _Job) -> list[dict]:
    """lm-eval's `metric,filter` and `metric_stderr,filter` as one row per metric."""
    task = job.rows.task
    measured = answer["results"][task]
    rows = []
    for name, value in measured.items():
        metric, _, filtered = name.partition(",")
        if not filtered or metric.endswith("_stderr"):
            continue
        stderr = measured[f"{metric}_stderr,{filtered}"]
        rows.append(
            {
                "removed": sorted(removed),
                "task": task,
                "task_version": job.rows.version,
                "metric": metric if filtered == "none" else name,
                "value": float(value),
                "stderr": None if isinstance(stderr, str) else float(stderr),  # "N/A": one document
                "n_samples": answer["n-samples"][task]["effective"],
                "n_shots": answer["n-shot"][task],
                "limit": job.facts["limit"],
                "source": job.rows.source,
                "split": job.rows.split,
                "data_sha256": job.rows.sha256,
            }
        )
    return rows


def _hash_tokenizer(tokenizer: PreTrainedTokenizerBase) -> str:
    """Hash of all that turns text into tokens; padding and truncation, set by whoever used it last, do not
    enter."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    parts = json.loads(backend.to_str()) if backend else tokenizer.get_vocab()
    parts = {name: part for name, part in parts.items() if name not in ("padding", "truncation")}
    special = {name: str(token) for name, token in tokenizer.special_tokens_map.items()}
    return hashlib.sha256(
        json.dumps([type(tokenizer).__name__, parts, special], sort_keys=True).encode()
    ).hexdigest()


@contextmanager
def _quiet() -> Iterator[None]:
    """lm-eval, datasets and transformers say nothing, and random numbers go on afterwards as if nothing had
    been."""
    import datasets
    import lm_eval.api.task
    from transformers.utils import logging as transformers_logging

    with ExitStack() as restore:
        restore.enter_context(warnings.catch_warnings())
        warnings.simplefilter("ignore")
        for name in ("lm_eval", "datasets", "huggingface_hub"):
            logger = logging.getLogger(name)
            restore.callback(logger.setLevel, logger.level)
            logger.setLevel(logging.CRITICAL)
        restore.callback(transformers_logging.set_verbosity, transformers_logging.get_verbosity())
        transformers_logging.set_verbosity_error()
        if not datasets.are_progress_bars_disabled():
            restore.callback(datasets.enable_progress_bars)
            datasets.disable_progress_bars()
        bar = lm_eval.api.task.tqdm
        restore.callback(setattr, lm_eval.api.task, "tqdm", bar)
        lm_eval.api.task.tqdm = functools.partial(bar, disable=True)
        restore.callback(random.setstate, random.getstate())
        restore.callback(np.random.set_state, np.random.get_state())
        restore.enter_context(torch.random.fork_rng(devices=range(torch.cuda.device_count())))
        random.seed(_SEEDS[0])
        np.random.seed(_SEEDS[1])
        torch.manual_seed(_SEEDS[1])
        yield
