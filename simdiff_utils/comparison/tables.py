"""What the rows of a comparison say."""

import json
from pathlib import Path

import pandas as pd
from scipy import stats

from simdiff_utils.comparison.rows import COLUMNS, PERPLEXITY
from simdiff_utils.settings import SimDiffError, repository_root

ROWS = "06_comparison.csv"  # in figures/: what the workbook has measured
_REPOSITORY = repository_root(Path(__file__).parent)  # wherever the notebook that asks is run


# ---- what the rows say
# ---------------------------------------------------------------------------------------------
def stored_rows(model: str) -> pd.DataFrame:
    """The workbook's own measurements, as committed: of all its models, the one named among them.

    Args:
        model: the checkpoint's label.
    """
    path = _REPOSITORY / "figures" / ROWS
    rows = pd.read_csv(path, comment="#") if path.exists() else pd.DataFrame(columns=COLUMNS)
    if model not in set(rows["model"]):
        raise SimDiffError(
            f"the workbook has measured {' and '.join(rows['model'].unique()) or 'nothing'}, not {model}: "
            "set measure = True to measure it here."
        )
    return rows.assign(removed=rows["removed"].map(json.loads))


def compare_with_shortgpt(rows: pd.DataFrame) -> pd.DataFrame:
    """Every method against ShortGPT's set at the same K, by the paired interval over windows.

    Returns:
        one row per (model, n_remove, method), random by its first seed: perplexity, ratio, low, high, and
        verdict ("same set", "better", "worse", or "no difference shown" where the interval holds 1).
    """
    keys, first = ["model", "n_remove", "method"], rows[rows["seed"] == 0]
    shortgpt = (
        first[first["method"] == "cosine"]
        .drop_duplicates(["model", "n_remove"])
        .set_index(["model", "n_remove"])["removed"]
    )
    table = first[first["metric"] == "ratio_to_cosine"][[*keys, "removed", "value", "low", "high"]]
    table = table.rename(columns={"value": "ratio"}).merge(
        first[first["metric"] == PERPLEXITY][[*keys, "value"]].rename(columns={"value": "perplexity"}),
        on=keys,
    )
    table["verdict"] = [
        "same set"
        if row.removed == shortgpt[row.model, row.n_remove] and row.ratio == 1
        else "better"
        if row.high < 1
        else "worse"
        if row.low > 1
        else "no difference shown"
        for row in table.itertuples()
    ]
    return table


def rank_agreement(rows: pd.DataFrame) -> pd.DataFrame:
    """Whether perplexity and zero-shot average order the sets alike, at each K and over all.

    Returns:
        one row per (model, n_remove; "all"): n_sets (distinct, dense not among them), kendall_tau of accuracy
        and falling perplexity (1: the same order; NaN for a single set).
    """
    first = rows[(rows["seed"] == 0) & (rows["n_remove"] > 0)]
    wide = first.assign(removed=first["removed"].map(tuple)).pivot_table(
        index=["model", "n_remove", "removed"], columns="metric", values="value"
    )
    if "AVG" not in wide:
        return pd.DataFrame(columns=["model", "n_remove", "n_sets", "kendall_tau"])
    wide = wide.dropna(subset=["AVG"]).reset_index()
    parts = [
        *wide.groupby(["model", "n_remove"]),
        *(((model, "all"), part) for model, part in wide.groupby("model")),
    ]
    return pd.DataFrame(
        [
            {
                "model": model,
                "n_remove": n_remove,
                "n_sets": len(part),
                "kendall_tau": float(stats.kendalltau(part["AVG"], -part[PERPLEXITY]).statistic),
            }
            for (model, n_remove), part in parts
        ]
    )


def beside_published(rows: pd.DataFrame) -> pd.DataFrame:
    """The paper's published numbers, each with what was measured of the same model, method, K and metric;
    else NaN."""
    table = pd.read_csv(_REPOSITORY / "notebooks" / "published.csv")
    keys = ["model", "method", "n_remove", "metric"]
    mine = rows[rows["seed"] == 0].drop_duplicates(keys).set_index(keys)["value"]
    scale = {"AVG": 100}  # the paper gives percent
    table["measured"] = [
        mine.get(tuple(key), float("nan")) * scale.get(key[3], 1) for key in table[keys].to_numpy()
    ]
    return table
