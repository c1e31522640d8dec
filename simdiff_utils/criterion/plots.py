"""Pictures of notebook 02; every function returns the Figure."""

from itertools import pairwise

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.colors import ListedColormap
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, MultipleLocator

from simdiff_utils.criterion.alpha import trace_path
from simdiff_utils.criterion.equations import fuse, normalise, normalise_difference, normalise_similarity
from simdiff_utils.style import layer_axis, look, note, plain_log_axis, shared_legend

_DARK = "#333333"
_STAR = dict(marker="*", ls="", color="white", mec="black")


def plot_normalised(table: pd.DataFrame) -> Figure:
    """I_sim and both I_diff per layer: what Eq. 5 and 6 leave of the raw measurements."""
    figure, axis = plt.subplots()
    lines = {
        "cosine": ("I_sim, cosine distance / 2 (Eq. 6)", normalise_similarity(table["cosine_distance"])),
        "mssd": ("I_diff, sigmoid(MSSD) (Eq. 5)", normalise_difference(table["mssd"])),
        "masd": ("I_diff, sigmoid(MASD) (Eq. 5)", normalise_difference(table["masd"])),
    }
    for name, (label, values) in lines.items():
        axis.plot(table["layer_idx"], values, **look(name, ms=5, label=label))
    axis.set(ylabel="normalised importance", ylim=(-0.04, 1.08))
    layer_axis(axis)
    axis.legend(loc="center left", bbox_to_anchor=(1, 0.5))
    return figure


def plot_plane(table: pd.DataFrame, criterion: str, n_remove: int, alphas: list[float]) -> Figure:
    """Layers by angle (I_sim) and magnitude (I_diff); for each alpha the line of equal importance that cuts
    off n_remove layers below it: it turns from upright (alpha 0: angle alone) to level (alpha 1: magnitude
    alone)."""
    i_sim, i_diff = normalise(table, criterion)
    own, room = look(criterion), 0.05 * np.ptp(i_diff)
    right = 1.25 * np.quantile(i_sim, 0.8)  # the few layers that turn far more would squeeze all others
    limits = (0.6 * i_sim.min(), right, i_diff.min() - room, i_diff.max() + room)
    figure, axis = plt.subplots(figsize=(8.5, 4.6))
    for layer_idx, (x, y) in enumerate(zip(np.minimum(i_sim, right), i_diff, strict=True)):
        marker, offset = ("o", (4, 3)) if x < right else (">", (6, -3))
        axis.plot(x, y, marker, ms=5, color=own["color"], clip_on=False)
        note(axis, layer_idx, (x, y), offset, annotation_clip=False)
    x = np.linspace(*limits[:2], 200)
    for dash, alpha in zip(("-", "--", "-.", ":"), alphas, strict=False):
        ranked = np.sort(fuse(i_sim, i_diff, alpha))
        cut = ranked[n_remove - 1 : n_remove + 1].mean()
        places = ([cut, cut], limits[2:]) if not alpha else (x, (cut - (1 - alpha) * x) / alpha)
        axis.plot(*places, ls=dash, color=_DARK, lw=1.2, label=f"α = {alpha:g}")
    axis.axis(limits)
    axis.set(xlabel="angle, I_sim (▸: farther right than shown)", ylabel="magnitude, I_diff")
    axis.set_title(f"{own['label']}: {n_remove} layers lie left of and below each line")
    axis.legend(loc="upper left")
    return figure


def plot_lines(table: pd.DataFrame, criterion: str, n_remove: int, highest_alpha: float = 1.0) -> Figure:
    """Importance of every layer over alpha: straight lines. The layers below the thick border go.

    Dotted: where the chosen set changes, with the layer that goes from there on (+) and the one that stays
    again (-); their lines are coloured. What all lines have in common, alpha times the smallest I_diff, is
    taken off: it changes no rank, and they come apart.
    """
    i_sim, i_diff = normalise(table, criterion)
    path = trace_path(i_sim, i_diff)
    path = path[(path["n_remove"] == n_remove) & ~path["degenerate"] & (path["low"] < highest_alpha)]
    alphas = np.linspace(0, highest_alpha, 801)
    scores = np.array([fuse(i_sim, i_diff - i_diff.min(), alpha) for alpha in alphas])  # [n_alphas, n_layers]
    border, own = np.sort(scores, 1)[:, n_remove - 1], look(criterion)
    figure, axis = plt.subplots(figsize=(8.5, 3.8))
    axis.plot(alphas, scores, color="#c8c8c8", lw=0.8)
    thick = dict(color=own["color"], lw=5, alpha=0.45, zorder=3)
    axis.plot(alphas, border, **thick, label=f"place {n_remove} of the ranking: the border")
    top = 1.6 * border.max()
    shown = set()
    for before, after in pairwise(path.itertuples()):
        goes, stays = set(after.removed) - set(before.removed), set(before.removed) - set(after.removed)
        axis.axvline(after.low, color=_DARK, ls=":", lw=1)
        words = "".join(f"+{i} " for i in sorted(goes)) + "".join(f"−{i} " for i in sorted(stays))
        note(axis, words.strip(), (after.low, top), (2, -9), color=_DARK, rotation=90, va="top")
        shown |= goes | stays
    for colour, layer_idx in zip(plt.get_cmap("tab10").colors, sorted(shown), strict=False):
        axis.plot(alphas, scores[:, layer_idx], color=colour, lw=1.3, label=f"layer {layer_idx}")
    axis.set(xlabel="α", ylabel="importance\n(less α · smallest I_diff)", xlim=(0, highest_alpha))
    axis.set(ylim=(scores.min() - 0.02 * top, top))
    axis.set_title(f"{own['label']}: the {n_remove} layers on and below the thick line go")
    axis.legend(loc="center left", bbox_to_anchor=(1, 0.5), fontsize=9)
    return figure


def plot_chain(chain: pd.DataFrame, choices: pd.DataFrame, dense: float) -> Figure:
    """A search that removes one layer after another: perplexity over K, and what it has cost by then; beside
    it criteria that choose each K anew.

    Args:
        chain: of `stage.chain`.
        choices: rows of `stage.choices`; a line for each criterion.
        dense: perplexity of the dense model.
    """
    figure, axes = plt.subplots(1, 2, figsize=(10, 3.8))
    own = look("lazy")
    axes[0].plot(chain["n_remove"], chain["perplexity"], **own)
    for row in chain.iloc[1:].itertuples():
        note(axes[0], row.layer_idx, (row.n_remove, row.perplexity), (2, -11), color=_DARK)
    axes[1].plot(chain["n_remove"], chain["n_asked"], **own)
    for criterion, rows in choices.groupby("criterion", sort=False):
        its = look(criterion)
        axes[0].plot([0, *rows["n_remove"]], [dense, *rows["validation_perplexity"]], **its)
        axes[1].plot(rows["n_remove"], rows["n_evaluations"], **its)
    axes[0].set(ylabel="validation perplexity (log scale)", yscale="log")
    plain_log_axis(axes[0].yaxis)
    axes[0].set_title("numbers: the layer that this step removes", fontsize=10)
    axes[1].set(ylabel="sets evaluated, in all", ylim=(0, None))
    for axis in axes:
        axis.set_xlabel("layers removed, K")
        axis.xaxis.set_major_locator(MaxNLocator(integer=True))
    shared_legend(figure, axes, loc="outside lower center", ncols=4)
    return figure


def plot_alpha_map(path: pd.DataFrame, criterion: str, best: pd.DataFrame) -> Figure:
    """Which set alpha chooses, for every alpha and every number of layers: one cell a set, shaded by how many
    of its layers ShortGPT would keep.

    Args:
        path: of `alpha_path`.
        best: rows of `choices` for this criterion: a star on the interval of lowest validation perplexity.
    """
    path = path[~path["degenerate"]]
    at_zero = {row.n_remove: set(row.removed) for row in path[path["low"] == 0].itertuples()}
    differing = np.array([len(set(row.removed) - at_zero[row.n_remove]) for row in path.itertuples()])
    shades = plt.cm.ScalarMappable(plt.Normalize(0, max(1, differing.max())), plt.get_cmap("cividis_r"))
    figure, axis = plt.subplots(figsize=(8.5, 4.2))
    cells = dict(height=0.92, color=shades.to_rgba(differing), edgecolor="white", linewidth=0.6)
    axis.barh(path["n_remove"], path["high"] - path["low"], left=path["low"], **cells)
    found = best.dropna(subset=["alpha"])
    axis.plot(found["alpha"], found["n_remove"], **_STAR, ms=13, label="lowest validation perplexity")
    _alpha_axis(axis)
    axis.set(xlabel="α (0: angle alone, 1: magnitude alone; cube-root axis)", xlim=(0, 1))
    axis.set(ylabel="layers removed, K", ylim=(path["n_remove"].max() + 0.5, 0.5))
    axis.set_title(f"{look(criterion)['label']}: {len(path)} sets in all, one cell each", loc="left")
    axis.grid(False)
    axis.yaxis.set_major_locator(MultipleLocator(2))
    figure.colorbar(shades, ax=axis, label="layers that differ from ShortGPT's set")
    if len(found):
        axis.legend(loc="lower right", bbox_to_anchor=(1, 1), borderaxespad=0)
    return figure


def plot_steps(steps: pd.DataFrame, probes: pd.DataFrame, criterion: str, n_remove: int) -> Figure:
    """Perplexity over alpha: a step for each set, with its 95 % interval; on top what the ternary search
    probed."""
    figure, axis = plt.subplots(figsize=(9, 3.3))
    own = look(criterion)
    for row in steps[~steps["degenerate"]].itertuples():
        ends = [row.low, row.high]
        axis.fill_between(ends, row.perplexity_low, row.perplexity_high, color=own["color"], alpha=0.2, lw=0)
        axis.plot(ends, [row.perplexity] * 2, color=own["color"], lw=2.5, solid_capstyle="butt")
    alone = steps[steps["degenerate"]]
    if len(alone):
        axis.plot(alone["low"], alone["perplexity"], "x", color=own["color"], label="chosen at a tie alone")
    for repeated, group in probes.groupby("repeated"):
        fill, what = ("white", "set seen before") if repeated else ("black", "new set")
        mark = dict(marker=own["marker"], ls="", ms=7, color="black", mfc=fill)
        label = f"ternary search: {what} ({len(group)})"
        axis.plot(group["alpha"], group["perplexity"], **mark, label=label)
    best = steps.loc[steps["perplexity"].idxmin()]
    label = f"lowest step: {best['perplexity']:.1f}"
    axis.plot((best["low"] + best["high"]) / 2, best["perplexity"], **_STAR, ms=16, label=label)
    _alpha_axis(axis)
    axis.set(xlabel="α (cube-root axis)", xlim=np.power((-0.02, 1.02), 3))
    axis.set(ylabel="validation perplexity", yscale="log")
    counted = f"{len(steps)} sets in all, {len(probes)} probes of the ternary search"
    axis.set_title(f"{own['label']}, {n_remove} layers removed: {counted}", fontsize=11)
    plain_log_axis(axis.yaxis)
    axis.legend(loc="center left", bbox_to_anchor=(1, 0.5))
    return figure


def _alpha_axis(axis: Axes) -> None:
    """A cube-root axis from 0 to 1: stretched near 0, where the sets crowd."""
    axis.set_xscale("function", functions=(np.cbrt, lambda root: np.power(root, 3)))
    ticks = [0, 0.001, 0.01, 0.05, 0.2, 0.5, 1]
    axis.set_xticks(ticks, labels=[f"{tick:g}" for tick in ticks])


def plot_stability(agreement: pd.DataFrame) -> Figure:
    """Agreement of two independent calibration draws over their size: of the ranking, and of the chosen set;
    whiskers: 5 and 95 % of the pairs of draws."""
    figure, axes = plt.subplots(1, 2, figsize=(9, 3), sharex=True)
    labels = {"kendall_tau": "Kendall's tau of the two rankings", "overlap": "share of layers in common"}
    sizes = sorted(agreement["n_samples"].unique())
    for axis, (quantity, label) in zip(axes, labels.items(), strict=True):
        groups = agreement[agreement["quantity"] == quantity].groupby("criterion", sort=False)
        for place, (name, rows) in enumerate(groups):
            # beside each other, so that the whiskers do not lie on each other
            x = rows["n_samples"] * (1 + 0.06 * (place - (len(groups) - 1) / 2))
            whiskers = [rows["median"] - rows["low"], rows["high"] - rows["median"]]
            axis.errorbar(x, rows["median"], yerr=whiskers, **look(name, lw=1, capsize=2))
        axis.set(xscale="log", xlabel="calibration samples in each draw", ylabel=label, ylim=(None, 1.02))
        axis.set_xticks(sizes, labels=sizes)
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
        cells, own = np.zeros((len(grid), n_layers)), look(criterion)
        for row in choices[choices["criterion"] == criterion].itertuples():
            cells[grid.index(row.n_remove), row.removed] = 1
        shades = ListedColormap(["#f2f2f2", own["color"]])
        axis.pcolormesh(cells, cmap=shades, vmin=0, vmax=1, edgecolors="white", linewidth=1)
        axis.set(title=own["label"], xlabel="layer index")
        axis.set_yticks(np.arange(len(grid)) + 0.5, labels=grid)
        axis.set_xticks(np.arange(0, n_layers, 5) + 0.5, labels=range(0, n_layers, 5))
        axis.grid(False)
    for axis in axes[:, 0]:
        axis.set_ylabel("layers removed")
    return figure
