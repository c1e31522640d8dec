"""Pictures of notebook 02; every function returns the Figure."""

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.colors import ListedColormap
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from simdiff_utils.capture.statistics import STATISTICS, LayerStatistics
from simdiff_utils.criterion.equations import (
    choose_removed,
    fuse,
    normalise,
    normalise_difference,
    normalise_similarity,
)
from simdiff_utils.style import COLOURS, DASHES, MARKERS, NAMES, layer_axis, plain_log_axis


def plot_normalised(table: pd.DataFrame) -> Figure:
    """I_sim and both I_diff per layer: what Eq. 5 and 6 leave of the raw measurements."""
    figure, axis = plt.subplots()
    lines = {
        "cosine": ("I_sim, cosine distance / 2 (Eq. 6)", normalise_similarity(table["cosine_distance"])),
        "mssd": ("I_diff, sigmoid(MSSD) (Eq. 5)", normalise_difference(table["mssd"])),
        "masd": ("I_diff, sigmoid(MASD) (Eq. 5)", normalise_difference(table["masd"])),
    }
    for name, (label, values) in lines.items():
        axis.plot(
            table["layer_idx"],
            values,
            marker=MARKERS[name],
            ls=DASHES[name],
            ms=5,
            color=COLOURS[name],
            label=label,
        )
    axis.set(ylabel="normalised importance", ylim=(-0.04, 1.08))
    layer_axis(axis)
    axis.legend(loc="center left", bbox_to_anchor=(1, 0.5))
    return figure


def plot_sinks(captured: LayerStatistics) -> Figure:
    """Share of each layer's MSSD that position 0 holds, and that the 0.1 % of tokens with the largest update
    hold."""
    mssd = captured.by_position[STATISTICS.index("mssd")]
    n_layers, seq_len = mssd.shape
    figure, axis = plt.subplots()
    layers = np.arange(n_layers)
    axis.bar(layers, captured.top_mssd, color="#bbbbbb", label="top 0.1 % of tokens, wherever they are")
    axis.plot(layers, mssd[:, 0] / mssd.sum(1), MARKERS["mssd"], color=COLOURS["mssd"], label="position 0")
    axis.axhline(
        1 / seq_len, ls="--", lw=1, color="#333333", label=f"one position of {seq_len}, if all were equal"
    )
    axis.set(ylabel="share of the layer's MSSD", ylim=(0, None))
    layer_axis(axis)
    axis.legend(loc="upper left", bbox_to_anchor=(1, 1))
    return figure


def plot_plane(table: pd.DataFrame, form: str, n_remove: int, alphas: list[float]) -> Figure:
    """Layers by angle (I_sim) and magnitude (I_diff); for each alpha the line of equal importance that cuts
    off n_remove layers below it: it turns from upright (alpha 0: angle alone) to level (alpha 1: magnitude
        alone)."""
    i_sim, i_diff = normalise(table, form)
    right = 1.25 * np.quantile(i_sim, 0.8)  # the few layers that turn far more would squeeze all others
    limits = (
        0.6 * i_sim.min(),
        right,
        i_diff.min() - 0.05 * np.ptp(i_diff),
        i_diff.max() + 0.05 * np.ptp(i_diff),
    )
    figure, axis = plt.subplots(figsize=(7.5, 3.7))
    for layer_idx, (x, y) in enumerate(zip(i_sim, i_diff, strict=True)):
        inside = x < right
        axis.plot(min(x, right), y, "o" if inside else ">", ms=5, color=COLOURS[form], clip_on=False)
        axis.annotate(
            str(layer_idx),
            (min(x, right), y),
            textcoords="offset points",
            xytext=(4, 3) if inside else (6, -3),
            fontsize=8,
            annotation_clip=False,
        )
    x = np.linspace(*limits[:2], 200)
    for dash, alpha in zip(("-", "--", "-.", ":"), alphas, strict=False):
        ranked = np.sort(fuse(i_sim, i_diff, alpha))
        cut = ranked[n_remove - 1 : n_remove + 1].mean()
        places = ([cut, cut], limits[2:]) if not alpha else (x, (cut - (1 - alpha) * x) / alpha)
        axis.plot(*places, ls=dash, color="#333333", lw=1.2, label=f"α = {alpha:g}")
    axis.axis(limits)
    axis.set(
        xlabel="angle, I_sim (▸: farther right than shown)",
        ylabel="magnitude, I_diff",
        title=f"{NAMES[form]}: {n_remove} layers lie left of and below each line",
    )
    axis.legend(loc="center left", bbox_to_anchor=(1.04, 0.5))
    return figure


def plot_lines(table: pd.DataFrame, form: str, n_remove: int, highest_alpha: float = 1.0) -> Figure:
    """Importance of every layer over alpha: straight lines. Thick: the border above which layers stay; its
    kinks are where the chosen set changes. What all lines have in common, alpha times the smallest I_diff, is
    taken off: it changes no rank, and they come apart."""
    i_sim, i_diff = normalise(table, form)
    alphas = np.linspace(0, highest_alpha, 801)
    scores = np.array([fuse(i_sim, i_diff - i_diff.min(), alpha) for alpha in alphas])  # [n_alphas, n_layers]
    figure, axis = plt.subplots(figsize=(7.5, 3.1))
    axis.plot(alphas, scores, color="#999999", lw=0.8)
    for layer_idx in choose_removed(scores[-1], len(i_sim)):
        axis.annotate(
            str(layer_idx),
            (alphas[-1], scores[-1, layer_idx]),
            textcoords="offset points",
            xytext=(3, -3),
            fontsize=7,
        )
    axis.plot(alphas, np.sort(scores, 1)[:, n_remove - 1], color=COLOURS[form], lw=2.5)
    top = np.sort(scores, 1)[:, min(n_remove + 5, len(i_sim) - 1)].max()
    axis.set(
        xlabel="α",
        ylabel="I − α · smallest I_diff",
        ylim=(scores.min() - 0.02 * top, 1.05 * top),
        xlim=(0, highest_alpha),
        title=f"{NAMES[form]}: the {n_remove} layers on and below the thick line go",
    )
    return figure


def plot_alpha_map(path: pd.DataFrame, form: str, best: pd.DataFrame) -> Figure:
    """Which set alpha chooses, for every alpha and every number of layers: one cell a set, shaded by how many
    of its layers ShortGPT would keep. The axis of alpha is stretched near 0, where the sets crowd.

    Args:
        path: of `methods.alpha_path`.
        best: rows of `choices` for this form: a star on the interval of lowest validation perplexity.
    """
    path = path[~path["degenerate"]]
    at_zero = {row.n_remove: set(row.removed) for row in path[path["low"] == 0].itertuples()}
    differing = np.array([len(set(row.removed) - at_zero[row.n_remove]) for row in path.itertuples()])
    figure, axis = plt.subplots(figsize=(8.5, 4.2))
    colours = plt.get_cmap("cividis_r")
    most = max(1, differing.max())
    for row, n in zip(path.itertuples(), differing, strict=True):
        left, right = np.cbrt([row.low, row.high])
        axis.barh(
            row.n_remove,
            right - left,
            left=left,
            height=0.92,
            color=colours(n / most),
            edgecolor="white",
            linewidth=0.6,
        )
    alphas = best["alpha"].dropna()
    axis.plot(
        np.cbrt(alphas),
        best.loc[alphas.index, "n_remove"],
        "*",
        ms=13,
        color="white",
        mec="black",
        label="lowest validation perplexity",
    )
    ticks = [0, 0.001, 0.01, 0.05, 0.2, 0.5, 1]
    axis.set(
        xticks=np.cbrt(ticks),
        xticklabels=[f"{tick:g}" for tick in ticks],
        xlim=(0, 1),
        ylim=(path["n_remove"].max() + 0.5, 0.5),
        xlabel="α (0: angle alone, 1: magnitude alone; cube-root axis)",
        ylabel="layers removed, K",
    )
    axis.set_title(f"{NAMES[form]}: {len(path)} sets in all, one cell each", loc="left")
    axis.grid(False)
    axis.yaxis.set_major_locator(MaxNLocator(integer=True))
    figure.colorbar(
        plt.cm.ScalarMappable(cmap=colours, norm=plt.Normalize(0, most)),
        ax=axis,
        label="layers of the set that ShortGPT keeps",
    )
    if len(alphas):
        axis.legend(loc="lower right", bbox_to_anchor=(1, 1), borderaxespad=0)
    return figure


def plot_steps(steps: pd.DataFrame, probes: pd.DataFrame, form: str, n_remove: int) -> Figure:
    """Perplexity over alpha: a step for each set, with its 95 % interval; on top what the ternary search
    probed."""
    figure, axis = plt.subplots(figsize=(9, 3.3))
    colour = COLOURS[form]
    for row in steps[~steps["degenerate"]].itertuples():
        ends = np.cbrt([row.low, row.high])
        axis.fill_between(ends, row.perplexity_low, row.perplexity_high, color=colour, alpha=0.2, lw=0)
        axis.plot(ends, [row.perplexity] * 2, color=colour, lw=2.5, solid_capstyle="butt")
    alone = steps[steps["degenerate"]]
    if len(alone):
        axis.plot(
            np.cbrt(alone["low"]), alone["perplexity"], "x", color=colour, label="chosen at a tie alone"
        )
    for repeated, group in probes.groupby("repeated"):
        axis.plot(
            np.cbrt(group["alpha"]),
            group["perplexity"],
            MARKERS[form],
            ms=7,
            color="black",
            mfc="white" if repeated else "black",
            ls="",
            label=f"ternary search: {'set seen before' if repeated else 'new set'} ({len(group)})",
        )
    best = steps.loc[steps["perplexity"].idxmin()]
    axis.plot(
        np.cbrt((best["low"] + best["high"]) / 2),
        best["perplexity"],
        "*",
        ms=16,
        color="white",
        mec="black",
        label=f"lowest step: {best['perplexity']:.1f}",
    )
    ticks = [0, 0.001, 0.01, 0.05, 0.2, 0.5, 1]
    axis.set(
        xticks=np.cbrt(ticks),
        xticklabels=[f"{tick:g}" for tick in ticks],
        xlim=(-0.02, 1.02),
        yscale="log",
        xlabel="α (cube-root axis)",
        ylabel="validation perplexity (log scale)",
        title=f"{NAMES[form]}, {n_remove} layers removed: {len(steps)} sets in all, "
        f"{len(probes)} probes of the ternary search",
    )
    plain_log_axis(axis.yaxis)
    axis.legend(loc="center left", bbox_to_anchor=(1, 0.5))
    return figure


def plot_stability(agreement: pd.DataFrame) -> Figure:
    """Agreement of two independent calibration draws over their size: of the ranking, and of the chosen set;
    whiskers: 5 and 95 % of the pairs of draws."""
    figure, axes = plt.subplots(1, 2, figsize=(9, 3), sharex=True)
    for axis, (quantity, label) in zip(
        axes,
        (("kendall_tau", "Kendall's tau of the two rankings"), ("overlap", "share of layers in common")),
        strict=True,
    ):
        groups = agreement[agreement["quantity"] == quantity].groupby("criterion", sort=False)
        for place, (name, rows) in enumerate(groups):
            beside = 1 + 0.06 * (
                place - (len(groups) - 1) / 2
            )  # so that the whiskers do not lie on each other
            axis.errorbar(
                rows["n_samples"] * beside,
                rows["median"],
                fmt=MARKERS[name],
                ls=DASHES[name],
                lw=1,
                yerr=[rows["median"] - rows["low"], rows["high"] - rows["median"]],
                capsize=2,
                color=COLOURS[name],
                label=NAMES[name],
            )
        axis.set(xscale="log", xlabel="calibration samples in each draw", ylabel=label, ylim=(None, 1.02))
        axis.set_xticks(
            sorted(agreement["n_samples"].unique()), labels=sorted(agreement["n_samples"].unique())
        )
        axis.minorticks_off()
    axes[1].legend(loc="lower right")
    return figure


def plot_sets(choices: pd.DataFrame, n_layers: int) -> Figure:
    """Which layers each criterion removes, one panel per criterion, one row per number of layers."""
    grid = sorted(choices["n_remove"].unique())
    criteria = list(dict.fromkeys(choices["criterion"]))
    n_rows = -(-len(criteria) // 3)
    size = (10, n_rows * (1 + 0.24 * len(grid)))
    figure, axes = plt.subplots(n_rows, min(3, len(criteria)), figsize=size, sharey=True, squeeze=False)
    for axis in axes.flat[len(criteria) :]:
        axis.set_visible(False)
    for axis, criterion in zip(axes.flat, criteria, strict=False):
        cells = np.zeros((len(grid), n_layers))
        for row in choices[choices["criterion"] == criterion].itertuples():
            cells[grid.index(row.n_remove), row.removed] = 1
        axis.pcolormesh(
            cells,
            cmap=ListedColormap(["#f2f2f2", COLOURS[criterion]]),
            vmin=0,
            vmax=1,
            edgecolors="white",
            linewidth=1,
        )
        axis.set(
            title=NAMES[criterion],
            yticks=np.arange(len(grid)) + 0.5,
            yticklabels=grid,
            xticks=np.arange(0, n_layers, 5) + 0.5,
            xticklabels=range(0, n_layers, 5),
            xlabel="layer index",
        )
        axis.grid(False)
    for axis in axes[:, 0]:
        axis.set_ylabel("layers removed")
    return figure
