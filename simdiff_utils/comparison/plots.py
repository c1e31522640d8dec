"""Pictures of notebook 06, all drawn from the tidy rows of `comparison`; every function returns the
Figure."""

from collections.abc import Iterable

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, NullFormatter, PercentFormatter

from simdiff_utils.comparison.rows import PERPLEXITY
from simdiff_utils.style import look, note, plain_log_axis, shared_legend

_SHORT = {PERPLEXITY: "WikiText-2 test perplexity", "AVG": "zero-shot average, acc"}
# perplexity drawn at the edge: the order of broken models is not worth the room of the others
_COLLAPSED = 2000
_BROKEN = 10  # times the panel's lowest, likewise in the ranking, where intervals are to be seen
_MAIN = ("cosine", "mssd", "masd", "relative", "portfolio", "sleb")  # drawn thick, with their intervals
_BESIDE = dict(loc="center left", bbox_to_anchor=(1, 0.5))


def plot_ranking(rows: pd.DataFrame) -> Figure:
    """Perplexity of every criterion as a point with its 95 % interval, a panel for each model and number of
    layers removed.

    Criteria are ordered by their mean log-perplexity over the panels, best on top. Hollow: the very set that
    ShortGPT removes.
    """
    rows = rows[rows["metric"] == PERPLEXITY]
    pruned, criteria = rows[rows["n_remove"] > 0], _order(rows)
    n_models, n_columns = rows["model"].nunique(), max(pruned.groupby("model")["n_remove"].nunique())
    size = (3.1 * n_columns + 1.5, n_models * (1.0 + 0.24 * len(criteria)))
    figure, axes = plt.subplots(n_models, n_columns, figsize=size, sharey=True, squeeze=False)
    for axis in axes.flat:
        axis.set_visible(False)
    places = {model: iter(line) for model, line in zip(rows["model"].unique(), axes, strict=True)}
    for (model, n_remove), panel in pruned.groupby(["model", "n_remove"], sort=False):
        axis = next(places[model])
        axis.set_visible(True)
        dense = rows.loc[(rows["model"] == model) & (rows["n_remove"] == 0), "value"].iloc[0]
        axis.axvline(dense, color=look("dense")["color"], ls=":", lw=1.2)
        _rank(axis, panel, criteria)
        axis.set_title(f"{_brief(model)}\n{n_remove} layers removed", fontsize=10)
    meaning = "bars: 95 % interval; dotted: dense;\nhollow: ShortGPT's own set"
    edge = f"at the right edge: above {_BROKEN} times the lowest"
    figure.supxlabel(f"{_SHORT[PERPLEXITY]} (log scale); {meaning}; {edge}", fontsize=10)
    return figure


def _rank(axis: Axes, panel: pd.DataFrame, criteria: list[str]) -> None:
    """One model at one number of layers: a row for each criterion, in the order given."""
    shortgpt = [(row.removed, row.value) for row in panel[panel["criterion"] == "cosine"].itertuples()]
    edge = _BROKEN * panel["value"].min()
    for row in panel.itertuples():
        y, own = criteria.index(row.criterion), look(row.criterion, ls="", ms=8, clip_on=False)
        low, value, high = (min(x, edge) for x in (row.low, row.value, row.high))
        axis.plot([low, high], [y, y], color=own["color"], lw=2, alpha=0.6, solid_capstyle="butt")
        # the perplexity, too: LaCo may remove the same layers, and has merged them into others
        hollow = (row.removed, row.value) in shortgpt and own["marker"] not in "x+1"  # which have no inside
        axis.plot(value, y, **own, mfc="white" if hollow else None)
    axis.set_xscale("log")
    axis.set_xlim(None, min(edge, 1.2 * panel["value"].max()))
    plain_log_axis(axis.xaxis)
    axis.set_yticks(range(len(criteria)), labels=[look(name)["label"] for name in criteria])
    axis.set_ylim(len(criteria) - 0.5, -0.5)


def plot_over_layers(rows: pd.DataFrame, criteria: Iterable[str], metric: str = PERPLEXITY) -> Figure:
    """A metric (perplexity or "AVG") over the number of layers removed, a line per criterion that has it
    (random: the median draw), the dense model at 0, bands of 95 % about the main criteria; the paper's
    Figures 1 and 5."""
    figure, panels = _panels(rows[rows["metric"] == metric])
    for axis, here in panels:
        dense = here.loc[here["n_remove"] == 0, "value"].iloc[0]
        for name in criteria:
            its = here[here["criterion"].isin([name, "dense"])]
            line = its.groupby("n_remove")[["value", "low", "high"]].median()
            if len(line) > 1:
                thick = dict(ms=7, lw=2) if name in _MAIN else dict(ms=5, lw=1)
                own = look(name, **thick, mfc="white" if name == "cosine" else None)
                axis.plot(line["value"], **own)
                if name in _MAIN:
                    band = dict(color=own["color"], alpha=0.1, lw=0)
                    axis.fill_between(line.index, line["low"], line["high"], **band)
        axis.set(xlabel="layers removed, K", ylabel=_SHORT[metric])
        if metric == PERPLEXITY:
            axis.set(yscale="log", ylim=(0.8 * dense, min(_COLLAPSED, 1.3 * here["value"].max())))
            plain_log_axis(axis.yaxis)
        else:
            axis.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
        axis.xaxis.set_major_locator(MaxNLocator(integer=True))
    shared_legend(axis, [axis], **_BESIDE)
    return figure


def plot_cost(rows: pd.DataFrame) -> Figure:
    """What finding the set costs against what it is worth: passes over text, and the log of perplexity over
    dense; criteria measured at every K."""
    figure, panels = _panels(rows)
    for axis, here in panels:
        wide = here.pivot_table("value", ["criterion", "n_remove"], "metric", aggfunc="median")
        dense = wide.loc[("dense", 0), PERPLEXITY]
        lost = np.log(wide[PERPLEXITY] / dense)[wide["passes"].notna()]
        measured = lost.groupby("criterion").size()
        for name in dict.fromkeys(here["criterion"]):
            if measured.get(name, 0) == measured.max():  # a mean over fewer K would flatter
                passes, own = wide.loc[name, "passes"].loc[lost[name].index], look(name)
                axis.plot(passes.mean(), lost[name].mean(), **own | dict(ls="", ms=9))
                axis.plot(passes, lost[name], ls=own["ls"], lw=0.6, color=own["color"], alpha=0.5)
        axis.set(xlabel="passes over calibration or validation text", xlim=(-0.2, None))
        axis.set_xscale("symlog", linthresh=1)
        axis.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
        axis.set(ylabel="ln(perplexity / dense), mean over K", yscale="log")
        axis.yaxis.set_major_locator(plt.LogLocator(subs=(1, 2, 5)))
        axis.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
        axis.yaxis.set_minor_formatter(NullFormatter())
    shared_legend(axis, [each for each, _ in panels], **_BESIDE)
    return figure


def plot_disagreement(rows: pd.DataFrame) -> Figure:
    """Zero-shot average against perplexity: if the two ordered the sets alike, the points would fall from
    left to right."""
    first = rows[rows["seed"] == 0]
    keys = ["model", "criterion", "n_remove"]
    both = first[first["metric"] == "AVG"].merge(
        first.loc[first["metric"] == PERPLEXITY, [*keys, "value"]], on=keys, suffixes=("", "_perplexity")
    )
    figure, panels = _panels(both, height=3.6)
    for axis, here in panels:
        for row in here.itertuples():
            place = (row.value_perplexity, row.value)
            axis.errorbar(*place, yerr=1.96 * row.stderr, **look(row.criterion, ls="", ms=8, capsize=2))
            note(axis, f"K={row.n_remove}", place, (6, 4))
        axis.set(xscale="log", xlabel=_SHORT[PERPLEXITY] + " (log scale)", ylabel=_SHORT["AVG"])
        plain_log_axis(axis.xaxis)
        axis.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
    shared_legend(axis, [axis], **_BESIDE)
    return figure


def _panels(rows: pd.DataFrame, height: float = 4) -> tuple[Figure, list[tuple[Axes, pd.DataFrame]]]:
    """A figure with a panel for each model: its axis, entitled, and its rows."""
    models = rows["model"].unique()
    size = (5 * len(models) + 2.5, height)
    figure, axes = plt.subplots(1, len(models), figsize=size, squeeze=False)
    for axis, model in zip(axes[0], models, strict=True):
        axis.set_title(_brief(model))
    return figure, [(axis, rows[rows["model"] == model]) for axis, model in zip(axes[0], models, strict=True)]


def _order(rows: pd.DataFrame) -> list[str]:
    """Criteria by their mean log-perplexity over models and numbers of layers, best first; less the mean of
    each such panel, or one that was not measured in the worst of them would seem better."""
    cells = rows[rows["n_remove"] > 0].assign(cell=lambda r: np.log(r["value"]))
    cells = cells.groupby(["model", "n_remove", "criterion"])["cell"].median().reset_index()
    cells["cell"] -= cells.groupby(["model", "n_remove"])["cell"].transform("mean")
    return list(cells.groupby("criterion", sort=False)["cell"].mean().sort_values(kind="stable").index)


def _brief(model: str) -> str:
    """The model's name without what was done to its file."""
    return model.split(",")[0]
