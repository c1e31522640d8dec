"""Pictures of notebook 05; every function returns the Figure."""

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from simdiff_utils.style import look, note, plain_log_axis, shared_legend

_PARTS = ["#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#F0E442"]
_MARKS = "osD^vP"
_REST, _DARK = "#BBBBBB", "#333333"
_BAR = dict(height=0.6, edgecolor="white")
_MIDDLE = dict(ha="center", va="center", fontsize=8)


_GAINS = {"gib": "weights, GiB", "params": "parameters", "decode_speedup": "decode speedup, by the bound"}


def plot_gains(
    gained: pd.DataFrame, comparison: pd.DataFrame, target: tuple[str, float, bool] | None
) -> Figure:
    """Quality lost against what is gained, a point for each K: perplexity over dense, above size and above
    speed.

    Args:
        gained: of `target.gains`, K = 0 among them.
        comparison: rows of `criterion.stage.compare`; a line for each criterion.
        target: quantity, bound and whether it is in units of the dense model, drawn in; None: there is none.
    """
    quantity, bound, relative = target or ("", 0.0, False)
    size = "params" if quantity == "params" else "gib"
    figure, axes = plt.subplots(1, 2, figsize=(9.5, 3.6), sharey=True)
    by_k = gained.set_index("n_remove")
    for axis, name in zip(axes, (size, "decode_speedup"), strict=True):
        for criterion, line in comparison.groupby("criterion", sort=False):
            line = line.sort_values("n_remove")
            x = [by_k.loc[0, name], *by_k.loc[line["n_remove"], name]]
            axis.plot(x, [1, *line["ratio"]], **look(criterion, ms=6, lw=1.5))
        for k, place in zip(line["n_remove"], zip(x[1:], line["ratio"], strict=True), strict=True):
            note(axis, f"K={k}", place, (3, -12))
        if quantity == name:
            at = bound * (by_k.loc[0, name] if relative and name != "decode_speedup" else 1)
            axis.axvline(at, color=_DARK, ls="--", lw=1.2, label="target")
        if quantity == "perplexity" and relative:
            axis.axhline(bound, color=_DARK, ls="--", lw=1.2, label="target")
        axis.set(xlabel=_GAINS[name], yscale="log")
    axes[0].invert_xaxis()  # to the right is more gained, in both panels
    axes[0].set_ylabel("perplexity / dense (log scale)")
    plain_log_axis(axes[0].yaxis)
    shared_legend(figure, axes, loc="outside lower center", ncols=4)
    return figure


def plot_drafts(table: pd.DataFrame) -> Figure:
    """Drafts by K: the share of drafted tokens that the dense model keeps, and its tokens per second with the
    draft over those alone.

    Args:
        table: criterion, n_remove, acceptance, speedup; a line for each criterion.
    """
    figure, axes = plt.subplots(1, 2, figsize=(9.5, 3.2))
    for axis, name in zip(axes, ("acceptance", "speedup"), strict=True):
        for criterion, line in table.groupby("criterion", sort=False):
            line = line.sort_values("n_remove")
            axis.plot(line["n_remove"], line[name], **look(criterion, ms=6))
        axis.set(xlabel="layers that the draft lacks, K", ylim=(0, None))
        axis.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes[0].set_ylabel("drafted tokens accepted")
    axes[1].set_ylabel("tokens/s over the\ndense model alone")
    axes[1].axhline(1, color="#999999", lw=0.8)
    shared_legend(figure, axes, loc="outside lower center", ncols=4)
    return figure


def plot_speed(samples: pd.DataFrame, ideals: dict[str, float]) -> Figure:
    """Tokens per second of every run of each phase; dashed, what the bound leaves the pruned model over the
    dense one.

    Args:
        samples: of one way, batch size and number of layers removed (see `measure_speed`).
        ideals: phase -> ideal speedup.
    """
    phases, models = list(dict.fromkeys(samples["phase"])), ["dense", "pruned"]
    figure, axes = plt.subplots(1, len(phases), figsize=(10, 3.2), squeeze=False)
    for axis, phase in zip(axes[0], phases, strict=True):
        runs = samples[samples["phase"] == phase].groupby("model")["tokens_per_s"]
        for y, name in enumerate(models):
            values = runs.get_group(name)
            axis.barh(y, values.median(), color=look(name)["color"], alpha=0.35, height=0.6)
            axis.plot(values, np.full(len(values), y), **look(name, ls="", ms=6, mfc="white"))
        ideal = runs.get_group("dense").median() * ideals[phase]
        axis.axvline(ideal, color=_DARK, ls="--", lw=1.2)
        axis.text(ideal, -0.6, f"ideal ×{ideals[phase]:.2f} ", fontsize=9, ha="right")
        axis.set(title=phase, xlabel="tokens per second", xlim=(0, None))
        axis.set(yticks=range(2), yticklabels=models, ylim=(1.5, -0.8))
        axis.grid(axis="y", visible=False)
    return figure


def plot_depth(table: pd.DataFrame, published: pd.DataFrame | None = None) -> Figure:
    """Speedup over the share of layers removed, a panel per phase: measured with its interval, the bound as a
    line.

    Args:
        table: label, phase, n_remove, n_layers, speedup, speedup_low, speedup_high, ideal_speedup; a line per
            label.
        published: share (of layers removed) and speedup of the paper's Table 4, drawn beside decode.
    """
    phases = sorted(dict.fromkeys(table["phase"]), key=lambda phase: phase != "prefill")
    labels = list(dict.fromkeys(table["label"]))
    size = (5.2 * len(phases) + 1.5, 3.8)
    figure, axes = plt.subplots(1, len(phases), figsize=size, squeeze=False, sharey=True)
    for axis, phase in zip(axes[0], phases, strict=True):
        for label, line in table[table["phase"] == phase].groupby("label", sort=False):
            line, number = line.sort_values("n_remove"), labels.index(label)
            share, colour = line["n_remove"] / line["n_layers"], _PARTS[number % len(_PARTS)]
            axis.plot([0, *share], [1, *line["ideal_speedup"]], color=colour, lw=1.2, ls="--")
            # a little aside, so that intervals at the same share can be told apart
            aside = 0.004 * (number - (len(labels) - 1) / 2)
            speedup = line["speedup"]
            whiskers = [speedup - line["speedup_low"], line["speedup_high"] - speedup]
            own = dict(fmt=_MARKS[number % len(_MARKS)], color=colour, ms=6, capsize=3, mfc="white")
            axis.errorbar(share + aside, speedup, whiskers, **own, label=label)
        if published is not None and phase.startswith("decode"):
            cross = dict(color=_DARK, ms=7, mew=1.5, label="LLaMA3.1-8B on an A40 (published)")
            axis.plot(published["share"], published["speedup"], "x", **cross)
        axis.axhline(1, color="#999999", lw=0.8)
        axis.set(title=phase, xlabel="share of layers removed")
        axis.xaxis.set_major_formatter(lambda value, _: f"{value:.0%}")
    axes[0, 0].set_ylabel("times as fast as dense\n(dashed: bound)")
    n_entries = len(labels) + (published is not None)
    shared_legend(figure, axes[0], loc="outside lower center", ncols=min(5, n_entries))
    return figure


def plot_step(parts: pd.DataFrame, ideals: dict[str, float]) -> Figure:
    """Where a decode step's time goes: a bar per model, its parts side by side; the tick is the bound.

    Args:
        parts: model, part, seconds (see `time_parts`).
        ideals: model -> seconds of an ideal step.
    """
    models, names = (list(dict.fromkeys(parts[column])) for column in ("model", "part"))
    colours = {name: _PARTS[i % len(_PARTS)] for i, name in enumerate(names)} | {"rest": _REST}
    seconds = parts.groupby(["model", "part"])["seconds"].sum()
    figure, axis = plt.subplots(figsize=(9, 0.9 + 0.7 * len(models)))
    for y, model in enumerate(models):
        left = 0.0
        for name in names:
            width = 1000 * seconds.get((model, name), 0.0)
            axis.barh(y, width, left=left, color=colours[name], **_BAR, label=name)
            if width:
                ink = "white" if name == names[0] else _DARK  # the first colour is the only dark one
                axis.text(left + width / 2, y, f"{width:.1f}", color=ink, **_MIDDLE)
            left += width
        bound = [1000 * ideals[model]] * 2
        axis.plot(bound, [y - 0.42, y + 0.42], color="black", lw=2.5, label="bound")
    axis.set(yticks=range(len(models)), yticklabels=models, xlim=(0, None))
    axis.set(xlabel="milliseconds of one decode step")
    axis.invert_yaxis()
    axis.grid(axis="y", visible=False)
    shared_legend(figure, [axis], loc="outside upper center", ncols=len(names) + 1)
    return figure
