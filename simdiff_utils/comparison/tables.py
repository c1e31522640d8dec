"""What the rows of a comparison say, as tables."""

import json
from pathlib import Path

import pandas as pd
from scipy import stats

from simdiff_utils import SimDiffError, registry
from simdiff_utils.comparison.rows import COLUMNS, PERPLEXITY
from simdiff_utils.criterion.race import verdict
from simdiff_utils.files import repository_root

ROWS = "06_comparison.csv"  # in figures/: what the workbook has measured
_REPOSITORY = repository_root(Path(__file__).parent)  # wherever the notebook that asks is run
_SET = ["model", "n_remove", "criterion"]


def describe_criteria(n_layers: int = 32, n_remove: int = 8) -> pd.DataFrame:
    """The registry as a table: one row a criterion, its source, what it sees, costs and protects."""
    rows = []
    for name, row in registry.CRITERIA.items():
        protected = row.protected(n_layers)
        rows.append(
            {
                "name": name,
                "criterion": row.label,
                "source": row.source,
                f"passes before comparing (L={n_layers}, K={n_remove})": row.passes(n_layers, n_remove),
                "sees": ", ".join(row.sees),
                "then compares sets": "yes" if row.compares else "",
                f"never removes (of {n_layers})": ", ".join(map(str, sorted(protected))),
            }
        )
    return pd.DataFrame(rows)


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
    """Every criterion against ShortGPT's set at the same K, by the paired interval over windows.

    Returns:
        one row per (model, n_remove, criterion), random by its first seed: perplexity, ratio, low, high, and
        verdict (see `race.verdict`).
    """
    first = rows[rows["seed"] == 0]
    cosine = first[first["criterion"] == "cosine"].drop_duplicates(["model", "n_remove"])
    shortgpt = cosine.set_index(["model", "n_remove"])["removed"]
    ratios = first[first["metric"] == "ratio_to_cosine"][[*_SET, "removed", "value", "low", "high"]]
    perplexities = first[first["metric"] == PERPLEXITY][[*_SET, "value"]]
    table = ratios.rename(columns={"value": "ratio"}).merge(
        perplexities.rename(columns={"value": "perplexity"}), on=_SET
    )
    table["verdict"] = [
        verdict(row.removed == shortgpt[row.model, row.n_remove] and row.ratio == 1, row.low, row.high)
        for row in table.itertuples()
    ]
    return table


def rank_agreement(rows: pd.DataFrame) -> pd.DataFrame:
    """Whether perplexity and zero-shot average order the sets alike, at each K and over all.

    Returns:
        one row per (model, n_remove; "all"): n_sets (distinct, dense not among them), kendall_tau of accuracy
        and falling perplexity (1: the same order; NaN for a single set).
    """
    columns = ["model", "n_remove", "n_sets", "kendall_tau"]
    first = rows[(rows["seed"] == 0) & (rows["n_remove"] > 0)]
    first = first.assign(removed=first["removed"].map(tuple))
    wide = first.pivot_table(index=["model", "n_remove", "removed"], columns="metric", values="value")
    if "AVG" not in wide:
        return pd.DataFrame(columns=columns)
    wide = wide.dropna(subset=["AVG"]).reset_index()
    whole = [((model, "all"), part) for model, part in wide.groupby("model")]
    table = []
    for (model, n_remove), part in [*wide.groupby(["model", "n_remove"]), *whole]:
        tau = float(stats.kendalltau(part["AVG"], -part[PERPLEXITY]).statistic)
        table.append((model, n_remove, len(part), tau))
    return pd.DataFrame(table, columns=columns)


def beside_published(rows: pd.DataFrame) -> pd.DataFrame:
    """The paper's published numbers, each with what was measured of the same model, criterion, K and metric;
    else NaN."""
    table = pd.read_csv(_REPOSITORY / "notebooks" / "published.csv")
    keys = ["model", "criterion", "n_remove", "metric"]
    mine = rows[rows["seed"] == 0].drop_duplicates(keys).set_index(keys)["value"]
    percent = {"AVG": 100}  # as the paper gives it
    table["measured"] = [
        mine.get(tuple(key), float("nan")) * percent.get(key[3], 1) for key in table[keys].to_numpy()
    ]
    return table
