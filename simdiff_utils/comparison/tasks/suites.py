"""The paper's two suites of benchmark tasks, and the average over the first."""

import math

import pandas as pd

from simdiff_utils import SimDiffError

ZERO_SHOT = "boolq piqa hellaswag winogrande arc_easy arc_challenge openbookqa mathqa"
NLU = "hellaswag piqa wsc273 coqa boolq race race_middle c3 ocnli"
SUITES = {"zero_shot": tuple(ZERO_SHOT.split()), "nlu": tuple(NLU.split())}
# Cells of the paper's second suite that stay empty, each with the sentence that stands there.
BLANK = {
    "cmnli": "CMNLI is no task of lm-eval, and no copy of its rows could be had to try one with; OCNLI, the "
    "other inference set of the same Chinese benchmark, is given in a column of its own.",
    "xsum": "XSum is scored by ROUGE on written summaries, and lm-eval has no task of its own for that.",
}


def average_accuracy(rows: pd.DataFrame, dense: frozenset[int] = frozenset()) -> pd.DataFrame:
    """AVG of the paper's first suite: mean plain `acc` over its eight tasks, and what of it is retained.

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
