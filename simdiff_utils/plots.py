"""One style, one function per picture. Every function returns the Figure; layer indices are 0-based."""

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.axes import Axes
from matplotlib.colors import ListedColormap, LogNorm
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter

from simdiff_utils.capture import STATISTICS, LayerStatistics
from simdiff_utils.criteria import fuse, normalise, normalise_difference, normalise_similarity

# Okabe-Ito colours: told apart by colour-blind readers; markers and dashes tell them apart in grey.
NAMES = {"dense": "dense", "cosine": "cosine (ShortGPT)", "mssd": "SimDiff-MSSD", "masd": "SimDiff-MASD",
         "pruned": "pruned", "recovered": "recovered"}
COLOURS = {"dense": "#333333", "cosine": "#E69F00", "mssd": "#0072B2", "masd": "#009E73",
           "pruned": "#D55E00", "recovered": "#CC79A7"}
MARKERS = {"dense": "D", "cosine": "o", "mssd": "s", "masd": "^", "pruned": "v", "recovered": "P"}
DASHES = {"cosine": "-", "mssd": "--", "masd": "-."}
_AXIS = {"cosine_distance": "cosine distance (Eq. 2)", "mssd": "MSSD, activation² (Eq. 3)",
         "masd": "MASD, activation (Eq. 4)"}
_COLOUR_OF = {"cosine_distance": "cosine", "mssd": "mssd", "masd": "masd"}


def use_style() -> None:
    """The look of every picture in the workbook."""
    sns.set_theme(context="notebook", style="ticks", rc={
        "figure.figsize": (9, 3.6), "figure.dpi": 72, "figure.constrained_layout.use": True, "axes.grid": True,
        "grid.color": "#e6e6e6", "axes.spines.top": False, "axes.spines.right": False, "axes.titlesize": "medium",
        "legend.frameon": False, "savefig.facecolor": "white"})


def plot_layer_statistics(captured: LayerStatistics, title: str) -> Figure:
    """The three raw measurements per layer, with position 0 (filled) and without it (hollow)."""
    table = captured.table()
    figure, axes = plt.subplots(1, 3, figsize=(12, 3.4))
    for axis, name in zip(axes, _AXIS, strict=True):
        colour = COLOURS[_COLOUR_OF[name]]
        axis.plot(table["layer_idx"], table[name], marker="o", ms=4, color=colour, label="all positions")
        axis.plot(table["layer_idx"], table[f"{name}_without_first"], marker="o", ms=5, mfc="white", ls=":",
                  color="#555555", label="without position 0")
        axis.set(ylabel=_AXIS[name], yscale="log")
        _layer_axis(axis)
    axes[2].legend(loc="upper left")
    figure.suptitle(f"{title} · mean over {captured.n_samples} samples of {captured.by_position.shape[2]} tokens")
    return figure


def plot_capture_memory(measured: pd.DataFrame, seq_len: int) -> Figure:
    """Peak memory of a capture over the number of samples, both ways; dotted: extrapolated by the states kept."""
    figure, axis = plt.subplots(figsize=(8, 3.6))
    for (way, rows), colour, marker in zip(measured.groupby("way"), ("#0072B2", "#D55E00"), ("s", "o"), strict=True):
        last = rows.iloc[-1]
        per_sample = last["states_gib"] / last["n_samples"]
        reach = np.linspace(last["n_samples"], 32 * last["n_samples"], 50)
        axis.plot(reach, last["peak_gib"] + per_sample * (reach - last["n_samples"]), ls=":", color=colour)
        axis.plot(rows["n_samples"], rows["peak_gib"], marker=marker, color=colour, label=f"{way}, measured")
    axis.plot([], [], ls=":", color="#555555", label="extrapolated: only the kept states grow")
    axis.set(xscale="log", xlabel=f"calibration samples of {seq_len} tokens")
    axis.set(ylabel="peak resident memory, GiB", ylim=0)
    axis.xaxis.set_major_formatter(FuncFormatter(lambda n, _: f"{n:g}"))
    axis.legend(loc="lower right")
    return figure


def plot_positions(captured: LayerStatistics, n_positions: int = 24) -> Figure:
    """MSSD of every layer at the first positions: where its mass sits."""
    mssd = captured.by_position[STATISTICS.index("mssd")]
    n_positions = min(n_positions, mssd.shape[1])
    figure, axis = plt.subplots(figsize=(9, 4.2))
    sns.heatmap(pd.DataFrame(mssd[:, :n_positions]), norm=LogNorm(), cmap="cividis", ax=axis,
                cbar_kws={"label": "MSSD at this position, activation²"})
    axis.set(xlabel="position in the sample", ylabel="layer index", title="MSSD by layer and position")
    axis.invert_yaxis()
    axis.tick_params(axis="y", rotation=0)
    return figure


def plot_normalised(table: pd.DataFrame) -> Figure:
    """I_sim and both I_diff per layer: what Eq. 5 and 6 leave of the raw measurements."""
    figure, axis = plt.subplots()
    lines = {"cosine": ("I_sim, cosine distance / 2 (Eq. 6)", normalise_similarity(table["cosine_distance"])),
             "mssd": ("I_diff, sigmoid(MSSD) (Eq. 5)", normalise_difference(table["mssd"])),
             "masd": ("I_diff, sigmoid(MASD) (Eq. 5)", normalise_difference(table["masd"]))}
    for name, (label, values) in lines.items():
        axis.plot(table["layer_idx"], values, marker=MARKERS[name], ls=DASHES[name], ms=5, color=COLOURS[name],
                  label=label)
    axis.set(ylabel="normalised importance", ylim=(-0.04, 1.08))
    _layer_axis(axis)
    axis.legend(loc="center left", bbox_to_anchor=(1, 0.5))
    return figure


def plot_importance(table: pd.DataFrame, criterion: str, alphas: list[float]) -> Figure:
    """Rank of every layer (0 is removed first) for several alphas: how the order turns."""
    figure, axis = plt.subplots()
    for shade, alpha in zip(np.linspace(0.75, 0.0, len(alphas)), alphas, strict=True):
        importance = fuse(*normalise(table, criterion), alpha)
        ranks = np.argsort(np.argsort(importance, kind="stable"), kind="stable")
        axis.plot(table["layer_idx"], ranks, marker="o", ms=4, color=str(shade), label=f"α = {alpha:g}")
    axis.set(ylabel="rank (0 is removed first)", title=f"Ranking by {NAMES[criterion]}")
    _layer_axis(axis)
    axis.legend(loc="center left", bbox_to_anchor=(1, 0.5))
    return figure


def plot_probes(probes: pd.DataFrame, criterion: str, n_remove: int, at_zero: float) -> Figure:
    """Perplexity at every alpha that the ternary search tried; hollow where the set had been seen before.

    Args:
        at_zero: perplexity at alpha 0 (cosine distance alone), a dashed line.
    """
    figure, axis = plt.subplots()
    for repeated, group in probes.groupby("repeated"):
        axis.plot(group["alpha"], group["perplexity"], MARKERS[criterion], ms=9, color=COLOURS[criterion],
                  mfc="white" if repeated else COLOURS[criterion],
                  label="set seen before" if repeated else "new set, evaluated")
    for step, (alpha, value) in enumerate(zip(probes["alpha"], probes["perplexity"], strict=True)):
        if step < 6:
            axis.annotate(str(step + 1), (alpha, value), textcoords="offset points", xytext=(0, 9), ha="center",
                          fontsize=9)
    axis.axhline(at_zero, ls="--", color=COLOURS["cosine"], label=f"α = 0, cosine: {at_zero:.1f}")
    axis.set(xlabel="α (0: direction alone, 1: magnitude alone)", ylabel="validation perplexity (log scale)",
             xlim=(-0.03, 1.03), yscale="log",
             title=f"{NAMES[criterion]}, {n_remove} layers removed: {len(probes)} probes, "
                   f"{int((~probes['repeated']).sum())} sets")
    axis.margins(y=0.2)
    _plain_log_axis(axis)
    axis.legend(loc="center left", bbox_to_anchor=(1, 0.5))
    return figure


def plot_sets(choices: pd.DataFrame, n_layers: int) -> Figure:
    """Which layers each criterion removes, one panel per criterion, one row per number of layers."""
    grid = sorted(choices["n_remove"].unique())
    criteria = list(dict.fromkeys(choices["criterion"]))
    figure, axes = plt.subplots(1, len(criteria), figsize=(13, 0.9 + 0.34 * len(grid)), sharey=True, squeeze=False)
    for axis, criterion in zip(axes[0], criteria, strict=True):
        cells = np.zeros((len(grid), n_layers))
        for row in choices[choices["criterion"] == criterion].itertuples():
            cells[grid.index(row.n_remove), row.removed] = 1
        axis.pcolormesh(cells, cmap=ListedColormap(["#f2f2f2", COLOURS[criterion]]), vmin=0, vmax=1,
                        edgecolors="white", linewidth=1)
        axis.set(title=NAMES[criterion], yticks=np.arange(len(grid)) + 0.5, yticklabels=grid,
                 xticks=np.arange(0, n_layers, 5) + 0.5, xticklabels=range(0, n_layers, 5), xlabel="layer index")
        axis.grid(False)
    axes[0][0].set_ylabel("layers removed")
    return figure


def plot_comparison(table: pd.DataFrame, dense: float, n_blocks: int) -> Figure:
    """Test perplexity over the number of layers removed, one line per criterion."""
    figure, axis = plt.subplots(figsize=(8, 4))
    for criterion, group in table.groupby("criterion", sort=False):
        axis.plot(group["n_remove"], group["test_perplexity"], marker=MARKERS[criterion], ls=DASHES[criterion],
                  ms=12 if criterion == "cosine" else 7, mfc="white" if criterion == "cosine" else None,
                  color=COLOURS[criterion], label=NAMES[criterion])
    axis.axhline(dense, color=COLOURS["dense"], lw=1.2, ls=":", label=f"dense, {dense:.1f}")
    axis.set(xlabel="layers removed", ylabel="test perplexity (log scale)", yscale="log",
             title=f"Perplexity on {n_blocks} blocks of the test split")
    _plain_log_axis(axis)
    axis.xaxis.set_major_locator(MaxNLocator(integer=True))
    axis.legend()
    return figure


def plot_training(log: pd.DataFrame) -> Figure:
    """Loss over the steps of recovery; points on held-out blocks where it was measured."""
    figure, axis = plt.subplots(figsize=(7, 3.6))
    train, held_out = log.dropna(subset=["loss"]), log.dropna(subset=["eval_loss"])
    axis.plot(train["step"], train["loss"], marker="o", ms=4, color=COLOURS["recovered"], label="training batches")
    axis.plot(held_out["step"], held_out["eval_loss"], "D--", ms=7, color=COLOURS["dense"], label="validation blocks")
    axis.set(xlabel="optimiser step", ylabel="loss, nats per token")
    axis.xaxis.set_major_locator(MaxNLocator(integer=True))
    axis.legend()
    return figure


def plot_recovery(perplexities: dict[str, float]) -> Figure:
    """Test perplexity of the dense, the pruned and the recovered model."""
    figure, axis = plt.subplots(figsize=(6, 3))
    names = list(perplexities)
    bars = axis.barh([NAMES[n] for n in names], list(perplexities.values()), color=[COLOURS[n] for n in names])
    axis.bar_label(bars, fmt="%.1f", padding=4)
    axis.set(xlabel="test perplexity")
    axis.invert_yaxis()
    axis.margins(x=0.12)
    return figure


def plot_speed(measurements: pd.DataFrame, ideal: float) -> Figure:
    """Tokens per second of every repeat of prefill and of decode; dashed, what the weights allow decode."""
    phases = list(dict.fromkeys(measurements["phase"]))
    figure, axes = plt.subplots(1, len(phases), figsize=(10, 3.2), squeeze=False)
    for axis, phase in zip(axes[0], phases, strict=True):
        part = measurements[measurements["phase"] == phase]
        medians = part.groupby("model", sort=False)["tokens_per_s"].median()
        for y, (name, median) in enumerate(medians.items()):
            values = part.loc[part["model"] == name, "tokens_per_s"]
            axis.barh(y, median, color=COLOURS[name], alpha=0.35, height=0.6)
            axis.plot(values, np.full(len(values), y), MARKERS[name], color=COLOURS[name], ms=6, mfc="white")
        if phase == "decode":  # prefill is bound by arithmetic, not by the weights read
            axis.axvline(medians.iloc[0] * ideal, color="#333333", ls="--", lw=1.2)
            axis.text(medians.iloc[0] * ideal, -0.6, f" ideal ×{ideal:.2f}", fontsize=9)
        axis.set(title=phase, xlabel="tokens per second", yticks=range(len(medians)), yticklabels=list(medians.index),
                 ylim=(len(medians) - 0.5, -0.8), xlim=(0, None))
        axis.grid(axis="y", visible=False)
    return figure


def _layer_axis(axis: Axes) -> None:
    axis.set_xlabel("layer index")
    axis.xaxis.set_major_locator(MaxNLocator(integer=True))


def _plain_log_axis(axis: Axes) -> None:
    axis.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5), numticks=12))
    axis.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.10g}"))
    axis.yaxis.set_minor_formatter(NullFormatter())
