"""Benchmark tasks by lm-eval, in process, on the model in memory: many sets of removed layers in one pass.

No checkpoint is written. A result is kept as a small JSON file under a key of all that it depends on, task by
task, so that a killed run goes on where it was and a second one computes nothing.
"""

import copy
import functools
import logging
import random
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from importlib.metadata import version
from pathlib import Path

import lm_eval
import numpy as np
import pandas as pd
import torch
from tqdm.auto import tqdm
from transformers import PreTrainedTokenizerBase

from simdiff_utils import SimDiffError
from simdiff_utils.comparison.tasks.jobs import Job, Removed, hash_tokenizer, origin
from simdiff_utils.comparison.tasks.lm import SetsLM
from simdiff_utils.comparison.tasks.load import TaskData
from simdiff_utils.engine.decoder import Decoder
from simdiff_utils.engine.surgery import check_removed

COLUMNS = (
    "removed task task_version metric value stderr hits n_samples limit source split data_sha256".split()
)
_SEEDS = (0, 1234)  # lm-eval's own: of `random`, and of numpy and torch


def evaluate_tasks(
    decoder: Decoder | Callable[[], Decoder],
    tokenizer: PreTrainedTokenizerBase,
    sets: Iterable[Removed],
    tasks: Iterable[str],
    data: TaskData,
    limit: int | None = None,
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
        limit: only the first so many documents of each task, as lm-eval takes them; None: all.
        chat_template: wrap every question in the tokenizer's chat template.
        folder: where results are kept; None: nowhere.
        identity: what else results depend on, for their key: hash of the weights, dtype, hash of the code.
        batch_tokens: tokens of a forward pass; a longer question is a pass of its own.

    Returns:
        one row per task, set and metric: removed (sorted list), task, task_version, metric (acc, acc_norm,
        em, f1), value (0 to 1), stderr (NaN where lm-eval gives none: a single document), hits (a 0 or 1 for
        each document, in their order; None where answers count in parts), n_samples, limit (None: all),
        source, split, data_sha256.

    Raises:
        SimDiffError: no such task, no rows for it, no such layer, no chat template; a task that has
            to write text while the model is streamed.
    """
    sets = tuple(dict.fromkeys(sets))
    if limit is not None and limit < 1:
        raise SimDiffError(f"limit must be at least 1 document, or None for all, got {limit}.")
    if chat_template and not tokenizer.chat_template:
        raise SimDiffError("this tokenizer has no chat template: set chat_template = False.")
    shared = {
        "lm_eval": version("lm_eval"),
        "tokenizer": hash_tokenizer(tokenizer),
        "limit": limit,
        "chat_template": tokenizer.chat_template if chat_template else None,
        "identity": dict(identity or {}),
    }
    with _quiet():
        jobs = [Job.plan(data.find(task), shared, sets, folder) for task in dict.fromkeys(tasks)]
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
    rows = [row for job in jobs for removed in sets for row in job.known[removed]]
    return pd.DataFrame(rows, columns=COLUMNS).astype({"value": float, "stderr": float})


def _compute(job: Job, decoder: Decoder, tokenizer: PreTrainedTokenizerBase, batch_tokens: int) -> None:
    """All sets that are not known in one pass, then lm-eval's metrics set by set."""
    task = job.rows.build()
    task.set_config("num_fewshot", 0)
    _build_requests_once(task)
    # lm-eval gives the tokenizer a padding token
    model = SetsLM(decoder, copy.deepcopy(tokenizer), job.unknown, batch_tokens)
    chat = job.facts["chat_template"] is not None
    for model.removed in job.unknown:
        answer = lm_eval.evaluate(
            lm=model,
            task_dict={"tasks": {job.rows.task: task}},
            limit=job.facts["limit"],
            log_samples=True,  # for the answers to single documents
            apply_chat_template=chat,
            fewshot_as_multiturn=chat,
        )
        job.keep(model.removed, _results(answer, model.removed, job))


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


def _results(answer: dict, removed: Removed, job: Job) -> list[dict]:
    """lm-eval's `metric,filter` and `metric_stderr,filter` as one row per metric."""
    task = job.rows.task
    shared = {"removed": sorted(removed), "task": task, "task_version": job.rows.version}
    shared |= {"n_samples": answer["n-samples"][task]["effective"], "limit": job.facts["limit"]}
    measured, single, rows = answer["results"][task], answer["samples"][task], []
    for name, value in measured.items():
        metric, _, filtered = name.partition(",")
        if not filtered or metric.endswith("_stderr"):
            continue
        stderr = measured[f"{metric}_stderr,{filtered}"]
        scores = [one[metric] for one in single if one["filter"] == filtered]
        numbers = {
            "metric": metric if filtered == "none" else name,
            "value": float(value),
            "stderr": None if isinstance(stderr, str) else float(stderr),  # "N/A": one document
            "hits": "".join(f"{score:.0f}" for score in scores) if set(scores) <= {0, 1} else None,
        }
        rows.append(shared | numbers | origin(job.rows))
    return rows


@contextmanager
def _quiet() -> Iterator[None]:
    """lm-eval, datasets and transformers say nothing, and random numbers go on afterwards where they were."""
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
