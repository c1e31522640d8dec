"""Two models on the same questions: what can be said of their difference.

Accuracies of two models vary together from draw to draw, since both find the same questions hard. So only the
questions that one of them answers and the other does not carry weight: McNemar's exact test counts them
(Psychometrika 12, 1947), and a paired bootstrap draws questions, for both at once.
"""

import numpy as np
import pandas as pd
from scipy.stats import binomtest, bootstrap

from simdiff_utils import SimDiffError

_N_DRAWS = 2000


def compare_answers(rows: pd.DataFrame, base: frozenset[int], seed: int = 0) -> pd.DataFrame:
    """Every set against one of them, task by task and over all tasks.

    Args:
        rows: of `evaluate_tasks`, one metric a task, with hits.
        base: the set that the others are compared with, such as the dense model's (empty).
        seed: draws the questions.

    Returns:
        one row per other set and task, and one with task "mean": removed, task, n (questions), difference
        (of accuracy, this set's less the base's; of the mean, each task counts alike), low and high (95 %,
        paired bootstrap, questions drawn within each task), gained and lost (questions that only this set,
        or only the base answers), p (McNemar's exact test, two-sided).

    Raises:
        SimDiffError: a set was not asked the same questions as the base, or a metric has no hits.
    """
    answers = {}
    for row in rows.itertuples():
        if not isinstance(row.hits, str):
            raise SimDiffError(f"{row.metric} of {row.task} counts answers in parts: give another metric.")
        hits = np.array(list(row.hits), dtype=int)
        if answers.setdefault(frozenset(row.removed), {}).setdefault(row.task, hits) is not hits:
            raise SimDiffError(f"{row.task} is there twice: give one metric a task.")
    theirs, table = answers.get(base, {}), []
    for removed, mine in answers.items():
        if {task: len(hits) for task, hits in mine.items()} != {t: len(hits) for t, hits in theirs.items()}:
            raise SimDiffError(f"layers {sorted(removed)} and {sorted(base)} were asked other questions.")
        differences = {task: [mine[task] - theirs[task]] for task in mine}  # 1, 0 or -1 for each question
        differences["mean"] = [one for (one,) in differences.values()]
        if removed != base:
            for task, ones in differences.items():
                table.append({"removed": sorted(removed), "task": task} | _compare(ones, seed))
    return pd.DataFrame(table)


def _compare(differences: list[np.ndarray], seed: int) -> dict:
    def mean(*tasks: np.ndarray, axis: int = -1) -> np.ndarray:
        return np.mean([task.mean(axis=axis) for task in tasks], axis=0)

    low, high = -1.0, 1.0  # a single question says nothing about spread
    if min(map(len, differences)) > 1:
        draw = np.random.default_rng(seed)
        low, high = bootstrap(
            differences, mean, n_resamples=_N_DRAWS, method="percentile", rng=draw
        ).confidence_interval
    every = np.concatenate(differences)
    gained, lost = int((every > 0).sum()), int((every < 0).sum())
    p = binomtest(gained, gained + lost).pvalue if gained + lost else 1.0
    counts = {"n": len(every), "gained": gained, "lost": lost, "p": p}
    return {"difference": float(mean(*differences)), "low": low, "high": high} | counts
