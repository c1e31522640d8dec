"""Benchmark tasks by lm-eval, in process, on the model in memory: many sets of removed layers in one pass.

No checkpoint is written. A result is kept as a small JSON file under a key of all that it depends on, task by task,
so that a killed run goes on where it was and a second one computes nothing.
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
from importlib.metadata import version
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from tqdm.auto import tqdm
from transformers import PreTrainedTokenizerBase

from simdiff_utils.decoder import Decoder
from simdiff_utils.files import read_json, write_json
from simdiff_utils.settings import SimDiffError, check_removed
from simdiff_utils.task_data import TaskData, TaskRows

Removed = frozenset[int]

SUITES = {
    "zero_shot": ("boolq", "piqa", "hellaswag", "winogrande", "arc_easy", "arc_challenge", "openbookqa", "mathqa"),
    "nlu": ("hellaswag", "piqa", "wsc273", "coqa", "boolq", "race", "race_middle", "c3", "ocnli"),
}
# Cells of the paper's second suite that stay empty, each with the sentence that stands there.
BLANK = {
    "cmnli": "CMNLI is no task of lm-eval and its rows are in none of our sources; OCNLI, the other Chinese inference "
             "set of the same benchmark, is given in a column of its own.",
    "xsum": "XSum is scored by ROUGE on written summaries, for which lm-eval has no task of its own.",
}
COLUMNS = ["removed", "task", "task_version", "metric", "value", "stderr", "n_samples", "n_shots", "limit", "source",
           "split", "data_sha256"]


def evaluate_tasks(decoder: Decoder | Callable[[], Decoder], tokenizer: PreTrainedTokenizerBase,
                   sets: Iterable[Removed], tasks: Iterable[str], data: TaskData, limit: int | None = None,
                   n_shots: int = 0, chat_template: bool = False, folder: Path | None = None,
                   identity: Mapping[str, object] | None = None, batch_tokens: int = 1024) -> pd.DataFrame:
    """Results of every task for the model without each set of layers, with lm-eval's own standard errors.

    Args:
        decoder: the model, or a function that loads it; it is called only where something has to be computed.
        sets: 0-based layer indices to leave out; the empty set is the dense model.
        tasks: names in lm-eval, or of ours.
        limit: only the first so many documents of each task, as lm-eval takes them: not a random sample. None: all.
        n_shots: solved examples before each question.
        chat_template: wrap every question in the tokenizer's chat template.
        folder: where results are kept; None: nowhere.
        identity: whatever else results depend on, for the key: hash of the weights, dtype, hash of the code.
        batch_tokens: tokens of a forward pass.

    Returns:
        one row per set, task and metric: removed (sorted list), task, task_version, metric (acc, acc_norm, em, f1),
        value (a share, 0 to 1), stderr (NaN for a single document), n_samples, n_shots, limit (None: all), source,
        split, data_sha256.

    Raises:
        SimDiffError: no such task, no rows, no such layer, no chat template; a task that generates text on a
            streamed model.
    """
    sets, tasks = list(dict.fromkeys(sets)), list(dict.fromkeys(tasks))
    if limit is not None and limit < 1:
        raise SimDiffError(f"limit must be at least 1 document, or None for all, got {limit}.")
    if chat_template and not tokenizer.chat_template:
        raise SimDiffError("this tokenizer has no chat template: set chat_template = False.")
    rows = []
    load = functools.cache(lambda: decoder if isinstance(decoder, Decoder) else decoder())
    shared = {"lm_eval": version("lm_eval"), "tokenizer": _hash_tokenizer(tokenizer), "limit": limit,
              "n_shots": n_shots, "chat_template": tokenizer.chat_template if chat_template else None,
              "identity": dict(identity or {})}
    for task in (bar := tqdm(tasks, desc="tasks", leave=False)):
        bar.set_description(task)
        with _quiet():
            found = data.find(task)
            facts = shared | {"task": task, "task_version": found.version, "source": found.source,
                              "split": found.split, "data_sha256": found.sha256,
                              "shots_sha256": found.shots_sha256() if n_shots else None}
            kept = {removed: _path(folder, removed, facts) for removed in sets}
            known = {removed: read_json(path)["rows"] for removed, path in kept.items() if path and path.exists()}
            missing = tuple(removed for removed in sets if removed not in known)
            for removed, results in _compute(load, tokenizer, missing, found, facts, batch_tokens) if missing else ():
                known[removed] = results
                if folder:
                    write_json(kept[removed], {"rows": results, "depends_on": facts})
        rows += [row for removed in sets for row in known[removed]]
    table = pd.DataFrame(rows, columns=COLUMNS)
    return table.astype({"value": float, "stderr": float})


def average_accuracy(rows: pd.DataFrame, dense: Removed = frozenset()) -> pd.DataFrame:
    """AVG of the paper's first suite: the mean of plain `acc` over its eight tasks, and what of it is retained.

    Args:
        rows: as `evaluate_tasks` gives them.
        dense: the set whose average is 100 % of RP.

    Returns:
        one row per set: removed, metric ("AVG"; "AVG-7" where only seven of the tasks are there: never to be put in
        the column of AVG), value, stderr (tasks are independent: root of the summed squares, over their number),
        n_tasks, missing (tasks that are not there), RP (percent; NaN where the dense model's average is of others).
    """
    accuracies = rows[(rows.metric == "acc") & rows.task.isin(SUITES["zero_shot"])]
    table = []
    for key, one in accuracies.groupby(accuracies.removed.map(tuple), sort=False):
        missing = [task for task in SUITES["zero_shot"] if task not in set(one.task)]
        name = "AVG" if not missing else f"AVG-{len(one)}"
        table.append({"removed": list(key), "metric": name, "value": one.value.mean(),
                      "stderr": math.sqrt((one.stderr ** 2).sum(skipna=False)) / len(one), "n_tasks": len(one),
                      "missing": missing})
    base = next((row for row in table if row["removed"] == sorted(dense)), None)
    for row in table:
        alike = base is not None and row["missing"] == base["missing"]
        row["RP"] = row["value"] / base["value"] * 100 if alike else float("nan")
    return pd.DataFrame(table, columns=["removed", "metric", "value", "stderr", "n_tasks", "missing", "RP"])


def _compute(load: Callable[[], Decoder], tokenizer: PreTrainedTokenizerBase, sets: tuple[Removed, ...],
             found: TaskRows, facts: dict, batch_tokens: int) -> Iterator[tuple[Removed, list[dict]]]:
    """Set by set the result rows of one task; all sets are computed with the first."""
    import lm_eval  # here, not above: slow to import, and not needed for what is known

    from simdiff_utils.task_lm import SetsLM

    decoder = load()
    for removed in sets:
        check_removed(removed, decoder.n_layers)
    task = found.build()
    if facts["n_shots"] and task.get_config("num_fewshot") != 0:  # 0 in a task file is never overruled, as in lm-eval
        task.set_config("num_fewshot", facts["n_shots"])
    elif task.get_config("num_fewshot") is None:
        task.set_config("num_fewshot", 0)
    task.set_fewshot_seed(1234)  # lm-eval's own
    _build_requests_once(task)
    model = SetsLM(decoder, copy.deepcopy(tokenizer), sets, batch_tokens)
    for model.removed in sets:
        answer = lm_eval.evaluate(lm=model, task_dict={"tasks": {found.task: task}}, limit=facts["limit"],
                                  log_samples=False, apply_chat_template=facts["chat_template"] is not None,
                                  fewshot_as_multiturn=facts["chat_template"] is not None)
        results, n_samples = answer["results"][found.task], answer["n-samples"][found.task]["effective"]
        rows = []
        for name, value in results.items():
            metric, _, filtered = name.partition(",")
            if filtered and not metric.endswith("_stderr"):
                stderr = results[f"{metric}_stderr,{filtered}"]
                rows.append({"removed": sorted(model.removed), "task": found.task, "task_version": found.version,
                             "metric": metric, "value": float(value),
                             "stderr": None if isinstance(stderr, str) else float(stderr), "n_samples": n_samples,
                             "n_shots": answer["n-shot"][found.task], "limit": facts["limit"], "source": found.source,
                             "split": found.split, "data_sha256": found.sha256})
        yield model.removed, rows


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


def _path(folder: Path | None, removed: Removed, facts: dict) -> Path | None:
    if folder is None:
        return None
    key = hashlib.sha256(json.dumps(facts | {"removed": sorted(removed)}, sort_keys=True).encode()).hexdigest()[:16]
    return Path(folder) / f"{facts['task']}-{f'without-{len(removed)}' if removed else 'dense'}-{key}.json"


def _hash_tokenizer(tokenizer: PreTrainedTokenizerBase) -> str:
    """Hash of all that turns text into tokens; padding and truncation, set by whoever used it last, do not enter."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    parts = json.loads(backend.to_str()) if backend else tokenizer.get_vocab()
    parts = {name: part for name, part in parts.items() if name not in ("padding", "truncation")}
    special = {name: str(token) for name, token in tokenizer.special_tokens_map.items()}
    return hashlib.sha256(json.dumps([type(tokenizer).__name__, parts, special], sort_keys=True).encode()).hexdigest()


@contextmanager
def _quiet() -> Iterator[None]:
    """lm-eval, datasets and transformers say nothing, and random numbers go on afterwards as if nothing had been."""
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
        restore.enter_context(torch.random.fork_rng(devices=[]))
        random.seed(0), np.random.seed(1234), torch.manual_seed(1234)  # lm-eval's own seeds
        yield
