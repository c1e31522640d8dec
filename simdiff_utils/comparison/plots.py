"""Pictures of notebook 06, all drawn from the tidy rows of `comparison`; every function returns the
Figure."""

from collections.abc import Iterable

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, NullFormatter, PercentFormatter

from simdiff_utils.comparison.rows import PERPLEXITY
from simdiff_utils.style import COLOURS, DASHES, MARKERS, NAMES, plain_log_axis

_SHORT = {PERPLEXITY: "WikiText-2 test perplexity", "AVG": "zero-shot average, acc"}
_COLLAPSED = (
    2000  # perplexity drawn at the edge: the order of broken models is not worth the room of the others
)
_BROKEN = 10  # times the panel's lowest, likewise in the ranking, where intervals are to be seen


def plot_ranking(rows: pd.DataFrame) -> Figure:
    """Perplexity of every method as a point with its 95 % interval, a panel for each model and number of
    layers removed.

    Methods are ordered by their mean log-perplexity over the panels, best on top. Hollow: the very set that
    ShortGPT removes.
    """
    rows = rows[rows["metric"] == PERPLEXITY]
    methods = _order(rows)
    panels = list(rows[rows["n_remove"] > 0].groupby(["model", "n_remove"], sort=False))
    n_columns = max(rows[rows["n_remove"] > 0].groupby("model")["n_remove"].nunique())
    n_models = rows["model"].nunique()
    figure, axes = plt.subplots(
        n_models,
        n_columns,
        figsize=(3.1 * n_columns + 1.5, n_models * (1.0 + 0.24 * len(methods))),
        sharey=True,
        squeeze=False,
    )
    for axis in axes.flat:
        axis.set_visible(False)
    places = {model: iter(line) for model, line in zip(rows["model"].unique(), axes, strict=True)}
    for (model, n_remove), panel in panels:
        axis = next(places[model])
        axis.set_visible(True)
        shortgpt = [(row.removed, row.value) for row in panel[panel["criterion"] == "cosine"].itertuples()]
        dense = rows.loc[(rows["model"] == model) & (rows["n_remove"] == 0), "value"].iloc[0]
        edge = _BROKEN * panel["value"].min()
        for row in panel.itertuples():
            y, colour = methods.index(row.criterion), COLOURS[row.criterion]
            low, value, high = (min(x, edge) for x in (row.low, row.value, row.high))
            axis.plot([low, high], [y, y], color=colour, lw=2, alpha=0.6, solid_capstyle="butt")
            # LaCo may remove the same layers, and has merged them into others
            hollow = (row.removed, row.value) in shortgpt and MARKERS[row.criterion] not in "x+1"
            axis.plot(
                value,
                y,
                MARKERS[row.criterion],
                color=colour,
                ms=8,
                mfc="white" if hollow else None,
                clip_on=False,
            )
        axis.axvline(dense, color=COLOURS["dense"], ls=":", lw=1.2)
        axis.set(xscale="log")
        axis.set_xlim(None, min(edge, 1.2 * panel["value"].max()))
        plain_log_axis(axis.xaxis)
        axis.set_title(f"{_brief(model)}\n{n_remove} layers removed", fontsize=10)
        axis.set(
            yticks=range(len(methods)),
            yticklabels=[NAMES[method] for method in methods],
            ylim=(len(methods) - 0.5, -0.5),
        )
    figure.supxlabel(
        f"{_SHORT[PERPLEXITY]} (log scale); bars: 95 % interval; dotted: dense;\nhollow: ShortGPT's own set; "
        f"at the right edge: above {_BROKEN} times the lowest",
        fontsize=10,
    )
    return figure


def plot_over_layers(rows: pd.DataFrame, methods: Iterable[str], metric: str = PERPLEXITY) -> Figure:
    """A metric (perplexity or "AVG") over the number of layers removed, a line per method that has it
    (random: the median draw), the dense model at 0, bands of 95 % about the main methods; the paper's Figures
    1 and 5."""
    rows = rows[rows["metric"] == metric]
    models = list(rows["model"].unique())
    figure, axes = plt.subplots(1, len(models), figsize=(5 * len(models) + 2.5, 4), squeeze=False)
    for axis, model in zip(axes[0], models, strict=True):
        here = rows[rows["model"] == model]
        dense = here.loc[here["n_remove"] == 0, "value"].iloc[0]
        for name in methods:
            line = (
                here[here["criterion"].isin([name, "dense"])]
                .groupby("n_remove")[["value", "low", "high"]]
                .median()
            )
            if len(line) > 1:
                main = name in ("cosine", "mssd", "masd", "relative", "portfolio", "sleb")
                axis.plot(
                    line["value"],
                    marker=MARKERS[name],
                    ls=DASHES[name],
                    color=COLOURS[name],
                    ms=7 if main else 5,
                    lw=2 if main else 1,
                    mfc="white" if name == "cosine" else None,
                    label=NAMES[name],
                )
                if main:
                    axis.fill_between(
                        line.index, line["low"], line["high"], color=COLOURS[name], alpha=0.1, lw=0
                    )
        axis.set(title=_brief(model), xlabel="layers removed, K", ylabel=_SHORT[metric])
        if metric == PERPLEXITY:
            axis.set(yscale="log", ylim=(0.8 * dense, min(_COLLAPSED, 1.3 * here["value"].max())))
            plain_log_axis(axis.yaxis)
        else:
            axis.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
        axis.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes[0, -1].legend(loc="center left", bbox_to_anchor=(1, 0.5), fontsize=9)
    return figure


def plot_cost(rows: pd.DataFrame) -> Figure:
    """What finding the set costs against what it is worth: passes over text, and the log of perplexity over
    dense."""
    models = list(rows["model"].unique())
    figure, axes = plt.subplots(1, len(models), figsize=(5 * len(models) + 2.5, 4), squeeze=False)
    for axis, model in zip(axes[0], models, strict=True):
        here = rows[rows["model"] == model]
        wide = here.pivot_table(
            index=["criterion", "n_remove"], columns="metric", values="value", aggfunc="median"
        )
        dense = wide.loc[("dense", 0), PERPLEXITY]
        lost = np.log(wide[PERPLEXITY] / dense)[wide["passes"].notna()]
        for name in dict.fromkeys(here["criterion"]):
            if name in lost.index:
                passes = wide.loc[name, "passes"].loc[lost[name].index]
                axis.plot(
                    passes.mean(),
                    lost[name].mean(),
                    MARKERS[name],
                    ms=9,
                    color=COLOURS[name],
                    label=NAMES[name],
                )
                axis.plot(passes, lost[name], ls=DASHES[name], lw=0.6, color=COLOURS[name], alpha=0.5)
        axis.set(
            title=_brief(model),
            xlabel="passes over calibration or validation text",
            yscale="log",
            ylabel="ln(perplexity / dense), mean over K",
        )
        axis.set_xscale("symlog", linthresh=1)
        axis.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
        axis.set_xlim(-0.2, None)
        axis.yaxis.set_major_locator(plt.LogLocator(subs=(1, 2, 5)))
        axis.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
        axis.yaxis.set_minor_formatter(NullFormatter())
    axes[0, -1].legend(loc="center left", bbox_to_anchor=(1, 0.5), fontsize=9)
    return figure


def plot_disagreement(rows: pd.DataFrame) -> Figure:
    """Zero-shot average against perplexity: if the two ordered the sets alike, the points would fall from
    left to right."""
    models = list(rows.loc[rows["metric"] == "AVG", "model"].unique())
    figure, axes = plt.subplots(1, len(models), figsize=(5 * len(models) + 2.5, 3.6), squeeze=False)
    for axis, model in zip(axes[0], models, strict=True):
        here = rows[(rows["model"] == model) & (rows["seed"] == 0)]
        for row in here[here["metric"] == "AVG"].itertuples():
            other = here[
                (here["metric"] == PERPLEXITY)
                & (here["criterion"] == row.criterion)
                & (here["n_remove"] == row.n_remove)
            ]
            if len(other):
                axis.errorbar(
                    other["value"].iloc[0],
                    row.value,
                    yerr=1.96 * row.stderr,
                    fmt=MARKERS[row.criterion],
                    ms=8,
                    color=COLOURS[row.criterion],
                    capsize=2,
                    label=NAMES[row.criterion],
                )
                axis.annotate(
                    f"K={row.n_remove}",
                    (other["value"].iloc[0], row.value),
                    textcoords="offset points",
                    xytext=(6, 4),
                    fontsize=8,
                )
        axis.set(
            title=_brief(model),
            xscale="log",
            xlabel=_SHORT[PERPLEXITY] + " (log scale)",
            ylabel=_SHORT["AVG"],
        )
        plain_log_axis(axis.xaxis)
        axis.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
    handles = dict(zip(*reversed(axes[0, -1].get_legend_handles_labels()), strict=True))
    axes[0, -1].legend(
        handles.values(), handles.keys(), loc="center left", bbox_to_anchor=(1, 0.5), fontsize=9
    )
    return figure


def _order(rows: pd.DataFrame) -> list[str]:
    """Methods by their mean log-perplexity over models and numbers of layers, best first."""
    cells = rows[rows["n_remove"] > 0].assign(cell=lambda r: np.log(r["value"]))
    cells = cells.groupby(["model", "n_remove", "criterion"])["cell"].median().reset_index()
    return list(cells.groupby("criterion", sort=False)["cell"].mean().sort_values(kind="stable").index)


def _brief(model: str) -> str:
    """The model's name without what was done to its file."""
    return model.split(",")[0]
