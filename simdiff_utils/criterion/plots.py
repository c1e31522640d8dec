"""Pictures of notebook 02; every function returns the Figure."""

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.colors import ListedColormap
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from simdiff_utils.capture.statistics import STATISTICS, LayerStatistics
from simdiff_utils.criterion.equations import fuse, normalise, normalise_difference, normalise_similarity
from simdiff_utils.style import layer_axis, look, note, plain_log_axis

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


def plot_sinks(captured: LayerStatistics) -> Figure:
    """Share of each layer's MSSD that position 0 holds, and that the 0.1 % of tokens with the largest update
    hold."""
    mssd = captured.by_position[STATISTICS.index("mssd")]
    n_layers, seq_len = mssd.shape
    figure, axis = plt.subplots()
    layers = np.arange(n_layers)
    axis.bar(layers, captured.top_mssd, color="#bbbbbb", label="top 0.1 % of tokens, wherever they are")
    axis.plot(layers, mssd[:, 0] / mssd.sum(1), **look("mssd", ls="", label="position 0"))
    equal = f"one position of {seq_len}, if all were equal"
    axis.axhline(1 / seq_len, ls="--", lw=1, color=_DARK, label=equal)
    axis.set(ylabel="share of the layer's MSSD", ylim=(0, None))
    layer_axis(axis)
    axis.legend(loc="upper left", bbox_to_anchor=(1, 1))
    return figure


def plot_plane(table: pd.DataFrame, criterion: str, n_remove: int, alphas: list[float]) -> Figure:
    """Layers by angle (I_sim) and magnitude (I_diff); for each alpha the line of equal importance that cuts
    off n_remove layers below it: it turns from upright (alpha 0: angle alone) to level (alpha 1: magnitude
    alone)."""
    i_sim, i_diff = normalise(table, criterion)
    own, room = look(criterion), 0.05 * np.ptp(i_diff)
    right = 1.25 * np.quantile(i_sim, 0.8)  # the few layers that turn far more would squeeze all others
    limits = (0.6 * i_sim.min(), right, i_diff.min() - room, i_diff.max() + room)
    figure, axis = plt.subplots(figsize=(7.5, 3.7))
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
    axis.legend(loc="center left", bbox_to_anchor=(1.04, 0.5))
    return figure


def plot_lines(table: pd.DataFrame, criterion: str, n_remove: int, highest_alpha: float = 1.0) -> Figure:
    """Importance of every layer over alpha: straight lines. Thick: the border above which layers stay.

    Wherever the chosen set changes the border has a kink; it has others, where two of the layers that go
    change places. What all lines have in common, alpha times the smallest I_diff, is taken off: it changes no
    rank, and they come apart.
    """
    i_sim, i_diff = normalise(table, criterion)
    alphas = np.linspace(0, highest_alpha, 801)
    scores = np.array([fuse(i_sim, i_diff - i_diff.min(), alpha) for alpha in alphas])  # [n_alphas, n_layers]
    ranked, own = np.sort(scores, 1), look(criterion)
    figure, axis = plt.subplots(figsize=(7.5, 3.1))
    axis.plot(alphas, scores, color="#999999", lw=0.8)
    for layer_idx, score in enumerate(scores[-1]):
        note(axis, layer_idx, (alphas[-1], score), (3, -3), fontsize=7)
    axis.plot(alphas, ranked[:, n_remove - 1], color=own["color"], lw=2.5)
    top = ranked[:, min(n_remove + 5, len(i_sim) - 1)].max()
    axis.set(xlabel="α", ylabel="I − α · smallest I_diff", xlim=(0, highest_alpha))
    axis.set(ylim=(scores.min() - 0.02 * top, 1.05 * top))
    axis.set_title(f"{own['label']}: the {n_remove} layers on and below the thick line go")
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
    axis.yaxis.set_major_locator(MaxNLocator(integer=True))
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
    axis.set(ylabel="validation perplexity (log scale)", yscale="log")
    counted = f"{len(steps)} sets in all, {len(probes)} probes of the ternary search"
    axis.set_title(f"{own['label']}, {n_remove} layers removed: {counted}")
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
