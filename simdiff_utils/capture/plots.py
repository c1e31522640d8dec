"""Pictures of notebook 01; every function returns the Figure."""

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter

from simdiff_utils.capture.statistics import STATISTICS, LayerStatistics
from simdiff_utils.style import COLOURS, layer_axis

_AXIS = {
    "cosine_distance": "cosine distance (Eq. 2)",
    "mssd": "MSSD, activation² (Eq. 3)",
    "masd": "MASD, activation (Eq. 4)",
    "relative_update": "relative update (ours)",
}
_COLOUR_OF = {"cosine_distance": "cosine", "mssd": "mssd", "masd": "masd", "relative_update": "relative"}


def plot_layer_statistics(captured: LayerStatistics, title: str) -> Figure:
    """The raw measurements per layer, with position 0 (filled) and without it (hollow)."""
    table = captured.table()
    figure, axes = plt.subplots(1, len(STATISTICS), figsize=(14, 3.2))
    for axis, name in zip(axes, STATISTICS, strict=True):
        colour = COLOURS[_COLOUR_OF[name]]
        axis.plot(table["layer_idx"], table[name], marker="o", ms=4, color=colour, label="all positions")
        axis.plot(
            table["layer_idx"],
            table[f"{name}_without_first"],
            marker="o",
            ms=5,
            mfc="white",
            ls=":",
            color="#555555",
            label="without position 0",
        )
        axis.set(ylabel=_AXIS[name], yscale="log")
        layer_axis(axis)
    axes[2].legend(loc="upper left", fontsize=9)
    figure.suptitle(
        f"{title} · mean over {captured.n_samples} samples of {captured.by_position.shape[2]} tokens"
    )
    return figure


def plot_capture_memory(measured: pd.DataFrame, seq_len: int) -> Figure:
    """Peak memory of a capture over the number of samples, both ways; dotted: extrapolated by the states
    kept."""
    figure, axis = plt.subplots(figsize=(8, 3.6))
    for (way, rows), colour, marker in zip(
        measured.groupby("way"), ("#0072B2", "#D55E00"), ("s", "o"), strict=True
    ):
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
    sns.heatmap(
        pd.DataFrame(mssd[:, :n_positions]),
        norm=LogNorm(),
        cmap="cividis",
        ax=axis,
        cbar_kws={"label": "MSSD at this position, activation²"},
    )
    axis.set(xlabel="position in the sample", ylabel="layer index", title="MSSD by layer and position")
    axis.invert_yaxis()
    axis.tick_params(axis="y", rotation=0)
    return figure
