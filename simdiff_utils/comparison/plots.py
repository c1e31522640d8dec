"""Pictures of notebook 06, drawn from the tidy rows of `comparison`; every function returns the Figure."""

import matplotlib.pyplot as plt
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from simdiff_utils.comparison.rows import PERPLEXITY
from simdiff_utils.style import look, note, plain_log_axis, shared_legend

_LABEL = "WikiText-2 test perplexity"
# perplexity drawn at the edge: the order of broken models is not worth the room of the others
_COLLAPSED = 2000
_BROKEN = 10  # times the panel's lowest, likewise in the ranking, where intervals are to be seen
_MAIN = ("cosine", "masd", "relative", "portfolio", "sleb", "floating")  # drawn in colour, with intervals
_OTHERS = dict(color="#cfcfcf", lw=0.8, marker="", ls="-", zorder=1, label="the other criteria")


def plot_ranking(rows: pd.DataFrame, model: str, n_remove: int) -> Figure:
    """Perplexity of every criterion on one model at one number of layers, as a point with its 95 % interval,
    best on top. Hollow: the very set that ShortGPT removes."""
    rows = rows[(rows["metric"] == PERPLEXITY) & (rows["model"] == model)]
    panel, dense = rows[rows["n_remove"] == n_remove], rows[rows["n_remove"] == 0]["value"].iloc[0]
    order = list(panel.groupby("criterion")["value"].median().sort_values(kind="stable").index)
    figure, axis = plt.subplots(figsize=(8, 1.0 + 0.26 * len(order)))
    axis.axvline(dense, color=look("dense")["color"], ls=":", lw=1.2, label="dense")
    _rank(axis, panel, order)
    axis.set_title(f"{_brief(model)}, {n_remove} layers removed")
    beyond = f"at the right edge: above {_BROKEN} times the lowest"
    axis.set_xlabel(f"{_LABEL}; bars: 95 % interval; dotted: dense;\nhollow: ShortGPT's own set; {beyond}")
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


def plot_over_layers(rows: pd.DataFrame) -> Figure:
    """Perplexity over the number of layers removed, a panel a model, the dense model at 0; the main criteria
    in colour with bands of 95 %, all others (random: the median draw) in grey; the paper's Figures 1 and
    5."""
    figure, panels = _panels(rows[rows["metric"] == PERPLEXITY])
    for axis, here in panels:
        _draw_lines(axis, here)
        axis.set_ylim(None, min(_COLLAPSED, 1.3 * here["value"].max()))
    shared_legend(figure, [axis for axis, _ in panels], loc="outside lower center", ncols=4)
    return figure


def plot_reproduction(rows: pd.DataFrame, published: pd.DataFrame, siblings: dict[str, str]) -> Figure:
    """Perplexity over the number of layers removed, as in the paper's Figure 5: measured on models that are
    to be had (lines), beside what the paper reports of their siblings (crosses).

    Args:
        rows: tidy rows of those models.
        published: source, model, criterion, n_remove, metric, value.
        siblings: published model -> how the label of the one measured begins.
    """
    figure, panels = _panels(rows[rows["metric"] == PERPLEXITY])
    for axis, here in panels:
        _draw_lines(axis, here)
        (theirs,) = [name for name, label in siblings.items() if here["model"].iloc[0].startswith(label)]
        said = published[(published["model"] == theirs) & (published["metric"] == PERPLEXITY)]
        for name in ("cosine", "masd"):
            its, own = said[said["criterion"] == name], look(name)
            label = f"{own['label']}, {theirs.rpartition('/')[2]} (published)"
            axis.plot(its["n_remove"], its["value"], "x", color=own["color"], ms=8, mew=2, label=label)
    shared_legend(figure, [axis for axis, _ in panels], loc="outside lower center", ncols=3)
    return figure


def plot_gain(rows: pd.DataFrame) -> Figure:
    """What SimDiff-MASD's set gains on ShortGPT's (ratio of perplexities, 95 % paired), over what ShortGPT's
    costs (ratio to the dense model's): a point a number of layers, which stands beside it."""
    rows = rows.groupby("model").filter(lambda its: {"cosine", "masd"} <= set(its["criterion"]))
    figure, axis = plt.subplots(figsize=(7.5, 4.4))
    for marker, (model, its) in zip("osD^vP", rows.groupby("model", sort=False), strict=False):
        found = its.set_index(["criterion", "metric", "n_remove"])[["value", "low", "high"]].sort_index()
        masd = found.loc["masd", "ratio_to_cosine"]
        cost = found.loc["cosine", PERPLEXITY]["value"] / found.loc["dense", PERPLEXITY]["value"].iloc[0]
        ends = masd[["low", "high"]].sub(masd["value"], axis=0).abs().to_numpy().T
        axis.errorbar(cost, masd["value"], ends, fmt=marker, ms=7, capsize=3, label=_brief(model))
        for n_remove, value in masd["value"].items():
            note(axis, n_remove, (cost[n_remove], value), (5, 5))
    axis.axhline(1, color="#333333", ls=":", lw=1.2)
    axis.set(xscale="log", xlabel="perplexity without ShortGPT's set, over the dense model's")
    axis.set(yscale="log", ylabel="without SimDiff-MASD's set,\nover ShortGPT's")
    for side in (axis.xaxis, axis.yaxis):
        plain_log_axis(side)
    axis.legend()
    return figure


def plot_searches(rows: pd.DataFrame) -> Figure:
    """What searches find, over SLEB's greedy search, with bands of 95 % (paired); how long each took for all
    K together stands beside its name.

    Args:
        rows: of benchmarks/search.py: model, contender, n_remove, seconds (up to this K, the largest first),
            test_to_sleb with its interval: the ratio of perplexities on other text of the same kind.
    """
    figure, panels = _panels(rows)
    for axis, here in panels:
        for name, its in here.sort_values("n_remove").groupby("contender", sort=False):
            own = look(name, ms=6, lw=1.8)
            label = f"{own['label']}: {its['seconds'].max():,.0f} s"
            axis.plot(its["n_remove"], its["test_to_sleb"], **own | {"label": label})
            ends = its["test_to_sleb_low"], its["test_to_sleb_high"]
            axis.fill_between(its["n_remove"], *ends, color=own["color"], alpha=0.1, lw=0)
        axis.set(xlabel="layers removed, K", ylabel="test perplexity, over SLEB's")
        axis.xaxis.set_major_locator(MaxNLocator(integer=True))
        axis.legend()
    return figure


def _draw_lines(axis: Axes, here: pd.DataFrame) -> None:
    """One model's perplexities over the number of layers removed."""
    for name in dict.fromkeys(here["criterion"]):
        its = here[here["criterion"].isin([name, "dense"])]
        line = its.groupby("n_remove")[["value", "low", "high"]].median()
        if len(line) > 1:
            own = look(name, ms=6, lw=1.8) if name in _MAIN else _OTHERS
            axis.plot(line["value"], **own)
            if name in _MAIN:
                axis.fill_between(line.index, line["low"], line["high"], color=own["color"], alpha=0.1, lw=0)
    axis.set(xlabel="layers removed, K", ylabel=_LABEL, yscale="log")
    axis.set_ylim(0.8 * here.loc[here["n_remove"] == 0, "value"].iloc[0], None)
    plain_log_axis(axis.yaxis)
    axis.xaxis.set_major_locator(MaxNLocator(integer=True))


def _panels(rows: pd.DataFrame) -> tuple[Figure, list[tuple[Axes, pd.DataFrame]]]:
    """A figure with a panel for each model: its axis, entitled, and its rows."""
    models = rows["model"].unique()
    figure, axes = plt.subplots(1, len(models), figsize=(5 * len(models), 4.4), squeeze=False)
    for axis, model in zip(axes[0], models, strict=True):
        axis.set_title(_brief(model))
    return figure, [(axis, rows[rows["model"] == model]) for axis, model in zip(axes[0], models, strict=True)]


def _brief(model: str) -> str:
    """The model's name without what was done to its file."""
    return model.split(",")[0]
