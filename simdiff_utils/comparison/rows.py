"""What notebook 06 measures: every criterion on one model under one protocol, as tidy rows.

Which set a criterion chooses is notebook 02's stage. Losses on WikiText-2 and answers to tasks are facts of
weights, sets, text and protocol: they outlive changes of this code, so that a comparison of many hours
survives a new plot. `PROTOCOL` is raised when what is measured changes.
"""

import functools
import itertools
import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
from torch import LongTensor
from tqdm.auto import tqdm

from simdiff_utils import SimDiffError, registry
from simdiff_utils.comparison.tasks.evaluate import evaluate_tasks
from simdiff_utils.comparison.tasks.load import TaskData
from simdiff_utils.comparison.tasks.suites import SUITES, average_accuracy
from simdiff_utils.criterion.laco import Merges
from simdiff_utils.criterion.propose import count_passes, propose
from simdiff_utils.criterion.race import Evaluator
from simdiff_utils.criterion.stage import choices, evidence
from simdiff_utils.engine.perplexity import perplexity, perplexity_interval
from simdiff_utils.files import hash_facts
from simdiff_utils.run import Run, hash_blocks
from simdiff_utils.text.blocks import token_blocks
from simdiff_utils.text.corpus import load_wikitext2_test

PROTOCOL = "1"
PERPLEXITY = "wikitext2_perplexity"
FOLDER = "comparison"  # below the model's: losses, task scores; choices lie beside it
_WINDOWS_AT_ONCE = 2  # what a kill can lose
_CHOSEN = ("n_remove", "criterion", "seed", "removed", "merges", "n_passes")
COLUMNS = (
    *("model", "criterion", "n_remove", "seed", "removed"),
    *("metric", "value", "stderr", "low", "high", "n", "split", "provenance"),
)


def measure(run: Run) -> pd.DataFrame:
    """Everything asked for, measured; what is there already is read.

    Returns:
        tidy, one row per number (`COLUMNS`): criterion "dense" has n_remove 0; metrics are
        wikitext2_perplexity (stderr by the delta method, low and high the ends of a 95 % bootstrap interval
        over windows), ratio_to_cosine (of perplexities, paired by window), passes (what finding the set
        costs), and for the criteria of `settings.task_criteria` acc, acc_norm, f1 ... of each task, AVG (or
        AVG-7) and RP.
    """
    chosen = chosen_sets(run)
    rows = pd.DataFrame([*_perplexity_rows(run, chosen), *_task_rows(run, chosen)], columns=COLUMNS)
    return rows.assign(
        model=run.checkpoint.label, removed=[json.dumps(removed) for removed in rows["removed"]]
    )


def chosen_sets(run: Run) -> pd.DataFrame:
    """The set of each criterion, K and seed, the dense model first: columns `_CHOSEN`."""
    criteria = run.settings.criteria
    chosen = [dict(zip(_CHOSEN, (0, "dense", 0, [], [], 0), strict=True))]
    seeded = [name for name in criteria if registry.find(name).n_seeds > 1]
    if single := [name for name in criteria if name not in seeded]:
        chosen += choices(run, run.grid, single).assign(seed=0)[list(_CHOSEN)].to_dict("records")
    seen = evidence(run) if seeded else None
    for n_remove, name in itertools.product(run.grid, seeded):
        for seed in range(registry.find(name).n_seeds):
            (drawn,) = propose(name, replace(seen, seed=seed), n_remove)
            n_passes = count_passes(name, [drawn], run.n_layers, n_remove)
            facts = (n_remove, name, seed, sorted(drawn.removed), [], n_passes)
            chosen.append(dict(zip(_CHOSEN, facts, strict=True)))
    return pd.DataFrame(chosen)


# ---- perplexity


def windows(run: Run) -> LongTensor:
    """WikiText-2's test split by the literature's protocol: joined, tokenised once, all windows of
    `settings.window_len` tokens that do not overlap (each beginning with BOS where the tokenizer prepends
    it)."""
    s = run.settings
    return run.once(
        ("wikitext2", s.data_folder, s.window_len),
        lambda: token_blocks(run.tokenizer, load_wikitext2_test(s.data_folder), s.window_len),
    )


def _perplexity_rows(run: Run, chosen: pd.DataFrame) -> Iterator[dict]:
    all_windows, s = windows(run), run.settings
    if s.n_windows > len(all_windows):
        raise SimDiffError(
            f"WikiText-2's test split has {len(all_windows)} windows of {s.window_len} tokens, "
            f"{s.n_windows} were asked for: lower n_windows or window_len."
        )
    order = np.random.default_rng(0).permutation(len(all_windows))  # more windows later: these again
    losses = _window_losses(run, chosen, order[: s.n_windows])
    models = list(zip(chosen.itertuples(), losses, strict=True))
    shortgpt = {row.n_remove: values for row, values in models if row.criterion == "cosine"}
    facts = {
        "n": s.n_windows,
        "split": "WikiText-2 test",
        "provenance": _provenance(
            run, f"{s.n_windows} of {len(all_windows)} windows of {s.window_len} tokens"
        ),
    }
    for row, values in models:
        shared = _of(row) | facts
        value, (low, high) = perplexity(values), perplexity_interval(values)
        spread = float(np.std(values, ddof=1) / np.sqrt(len(values))) if len(values) > 1 else float("nan")
        yield shared | {
            "metric": PERPLEXITY,
            "value": value,
            "stderr": value * spread,
            "low": low,
            "high": high,
        }
        if row.n_remove in shortgpt:
            base = shortgpt[row.n_remove]
            low, high = perplexity_interval(values, base)
            ratio = perplexity(values - base)
            yield shared | {"metric": "ratio_to_cosine", "value": ratio, "low": low, "high": high}
            yield shared | {"metric": "passes", "value": row.n_passes, "n": 1, "split": ""}


def _window_losses(run: Run, chosen: pd.DataFrame, which: np.ndarray) -> list[np.ndarray]:
    """Losses of every chosen model on some windows, float64 [n_windows] each, a few windows at a time."""
    key = {
        "model": run.checkpoint.sha256,
        "dtype": run.settings.dtype,
        "window_len": run.settings.window_len,
        "windows": hash_blocks(windows(run)),
        "protocol": PROTOCOL,
    }
    plain = Evaluator(
        run.decoder, windows(run), 1, run.folder / FOLDER / f"losses-wikitext2-{hash_facts(key)}"
    )
    models = [(Merges.read(row.merges), frozenset(row.removed)) for row in chosen.itertuples()]
    evaluators = {edit: plain.edited(edit) for edit, _ in models}
    size = len(which) if run.decoder.streamed else _WINDOWS_AT_ONCE  # streamed, each pass reads all weights
    starts = range(0, len(which), size)
    for start in tqdm(starts, desc=f"WikiText-2, {size} windows at once", unit="pass"):
        for edit, evaluator in evaluators.items():
            sets = [removed for own, removed in models if own == edit]
            evaluator.losses(sets, np.sort(which[start : start + size]))
    return [evaluators[edit].losses([removed], which)[0] for edit, removed in models]


# ---- tasks


def _task_rows(run: Run, chosen: pd.DataFrame) -> Iterator[dict]:
    """Accuracy and F1 of the criteria and numbers of layers asked for, and of the dense model."""
    s = run.settings
    if not s.task_criteria or not s.task_grid:
        return
    wanted = chosen["criterion"].isin(s.task_criteria) & chosen["n_remove"].isin(s.task_grid)
    asked = chosen[(wanted | (chosen["n_remove"] == 0)) & ~chosen["merges"].astype(bool)]
    scores = _task_scores(run, [frozenset(removed) for removed in asked["removed"]])
    averages = average_accuracy(scores) if s.suite == "zero_shot" else pd.DataFrame(columns=["removed"])
    documents = {"provenance": _provenance(run, f"{s.task_limit or 'all'} documents a task")}
    for row in asked.itertuples():
        for score in scores[scores["removed"].map(tuple) == tuple(row.removed)].itertuples():
            version = f"lm-eval task version {score.task_version}, first documents"
            yield (
                _of(row)
                | _with_interval(score.value, score.stderr)
                | {
                    "metric": f"{score.task} {score.metric}",
                    "n": score.n_samples,
                    "split": f"{score.split} ({score.source})",
                    "provenance": _provenance(run, version, f"data {score.data_sha256[:8]}"),
                }
            )
        for average in averages[averages["removed"].map(tuple) == tuple(row.removed)].itertuples():
            shared = _of(row) | documents | {"n": average.n_tasks}
            yield shared | _with_interval(average.value, average.stderr) | {"metric": average.metric}
            yield shared | {"metric": average.metric.replace("AVG", "RP"), "value": average.RP}


def _task_scores(run: Run, sets: list[frozenset[int]]) -> pd.DataFrame:
    """The suite's tasks, and CoQA's stories, as far as there are rows for them."""
    s = run.settings
    data = TaskData(Path(s.data_folder).expanduser() if s.data_folder else None)
    missing = data.missing((*SUITES[s.suite], "coqa"))
    evaluate = functools.partial(
        evaluate_tasks,
        lambda: run.decoder,
        run.tokenizer,
        sets,
        data=data,
        chat_template=s.chat_template,
        folder=run.folder / FOLDER / "tasks",
        identity={"model": run.checkpoint.sha256, "dtype": s.dtype, "protocol": PROTOCOL},
    )
    tasks = [task for task in SUITES[s.suite] if task not in (*missing, "coqa")]
    scores = evaluate(tasks=tasks, limit=s.task_limit or None)
    if s.n_stories and "coqa" not in missing and not run.decoder.streamed:  # it generates with the cache
        scores = pd.concat([scores, evaluate(tasks=["coqa"], limit=s.n_stories)])
    return scores


def _of(row: object) -> dict:
    """Which model a number belongs to."""
    return {name: getattr(row, name) for name in ("criterion", "n_remove", "seed", "removed")}


def _provenance(run: Run, *facts: str) -> str:
    return ", ".join((*facts, run.settings.dtype, f"weights {run.checkpoint.sha256[:8]}"))


def _with_interval(value: float, stderr: float) -> dict:
    """The ends of the 95 % interval by the normal distribution, as lm-eval's standard errors are meant."""
    return {"value": value, "stderr": stderr, "low": value - 1.96 * stderr, "high": value + 1.96 * stderr}
