"""What the rows of a comparison say, as tables."""

import json
from collections.abc import Iterable

import pandas as pd
from pandas.io.formats.style import Styler

from simdiff_utils import SimDiffError, registry
from simdiff_utils.comparison.rows import PERPLEXITY
from simdiff_utils.criterion.race import verdict
from simdiff_utils.results import stored_table
from simdiff_utils.style import NAMES

ROWS = "06_comparison.csv"  # in figures/: what the workbook has measured
SIBLINGS = {  # the paper's model -> what can be had: same shape, trained on from it with code, four bits
    "Qwen/Qwen2.5-0.5B": "Qwen2.5-Coder-0.5B-Instruct",
    "Qwen/Qwen2.5-1.5B": "Qwen2.5-Coder-1.5B-Instruct",
}
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
    rows = stored_table(f"figures/{ROWS}")
    if model not in set(rows["model"]):
        raise SimDiffError(
            f"the workbook has measured {' and '.join(rows['model'].unique())}, not {model}: "
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


def show_verdicts(verdicts: pd.DataFrame) -> Styler:
    """Perplexity, verdict and ratio to ShortGPT with its interval: a row a criterion, a column a cell.

    Args:
        verdicts: of `compare_with_shortgpt`.
    """

    def words(row: object) -> str:
        number = f"{row.perplexity:,.1f}" if row.perplexity < 1e4 else f"{row.perplexity:.0e}"
        ratio = f" ({row.ratio:.2f}, {row.low:.2f} to {row.high:.2f})"
        told = "" if row.verdict == "same set" or row.ratio >= 100 else ratio
        return f"{number} · {row.verdict}{told}"

    cells = verdicts.assign(
        words=[words(row) for row in verdicts.itertuples()],
        model=[model.split(",")[0] for model in verdicts["model"]],
    )
    wide = cells.pivot_table(
        index="criterion", columns=["model", "n_remove"], values="words", aggfunc="first", sort=False
    )
    return wide.rename(index=NAMES).fillna("").style


def show_published(published: pd.DataFrame, sources: Iterable[str]) -> Styler:
    """Published cells of some tables of the paper, each beside what was measured here of the model itself or
    of its sibling.

    Args:
        published: of `beside_published`.
    """
    cells = published[published["source"].isin(list(sources))].fillna({"note": ""})
    cells = cells[cells["n_remove"].notna()].astype({"n_remove": int})
    words = []
    for row in cells.itertuples():
        found = row.measured if pd.notna(row.measured) else row.sibling
        words.append(f"{row.value:g} / " + ("" if pd.isna(found) else f"{found:.1f}"))
    by = [NAMES.get(name, name) for name in cells["criterion"]]
    cells = cells.assign(words=words, by=by)
    index = ["source", "model", "n_remove", "by"]
    wide = cells.pivot_table(index=index, columns="metric", values="words", aggfunc="first", sort=False)
    return wide.fillna("").style


def reproduction_rows() -> pd.DataFrame:
    """The workbook's own measurements on siblings of the paper's models (benchmarks/reproduction.py)."""
    return stored_table("benchmarks/results/reproduction.csv")


def beside_published(rows: pd.DataFrame) -> pd.DataFrame:
    """The paper's published numbers, each with what was measured of the same criterion, K and metric, NaN
    where nobody did: `measured` on the same model, `sibling` on the one that `SIBLINGS` names."""
    table = stored_table("notebooks/published.csv")
    keys = ["model", "criterion", "n_remove", "metric"]
    siblings = reproduction_rows()
    theirs = {label: name for name, label in SIBLINGS.items()}
    siblings["model"] = [
        next((name for label, name in theirs.items() if model.startswith(label)), model)
        for model in siblings["model"]
    ]
    percent = {"AVG": 100}  # as the paper gives it
    for column, found in (("measured", rows), ("sibling", siblings)):
        mine = found[found["seed"] == 0].drop_duplicates(keys).set_index(keys)["value"]
        table[column] = [
            mine.get(tuple(key), float("nan")) * percent.get(key[3], 1) for key in table[keys].to_numpy()
        ]
    return table
