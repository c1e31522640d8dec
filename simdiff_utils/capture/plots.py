"""Pictures of notebook 01; every function returns the Figure."""

import matplotlib.pyplot as plt
import pandas as pd
import seaborn as sns
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure

from simdiff_utils.capture.statistics import STATISTICS, LayerStatistics
from simdiff_utils.style import layer_axis, look

_PANELS = {  # statistic -> criterion whose colour it has, label
    "cosine_distance": ("cosine", "cosine distance (Eq. 2)"),
    "mssd": ("mssd", "MSSD, activation² (Eq. 3)"),
    "masd": ("masd", "MASD, activation (Eq. 4)"),
    "relative_update": ("relative", "relative update (ours)"),
}
_GREY = "#555555"


def plot_layer_statistics(captured: LayerStatistics, title: str) -> Figure:
    """The raw measurements per layer, with position 0 (filled) and without it (hollow)."""
    table = captured.table()
    layers = table["layer_idx"]
    figure, axes = plt.subplots(1, len(_PANELS), figsize=(14, 3.2))
    hollow = dict(marker="o", ms=5, mfc="white", ls=":", color=_GREY, label="without position 0")
    for axis, (name, (criterion, label)) in zip(axes, _PANELS.items(), strict=True):
        axis.plot(layers, table[name], **look(criterion, marker="o", ls="-", ms=4, label="all positions"))
        axis.plot(layers, table[f"{name}_without_first"], **hollow)
        axis.set(ylabel=label, yscale="log")
        layer_axis(axis)
    axes[2].legend(loc="upper left", fontsize=9)
    seq_len = captured.by_position.shape[2]
    figure.suptitle(f"{title} · mean over {captured.n_samples} samples of {seq_len} tokens")
    return figure


def plot_positions(captured: LayerStatistics, n_positions: int = 24) -> Figure:
    """MSSD of every layer at the first positions: where its mass sits."""
    mssd = pd.DataFrame(captured.by_position[STATISTICS.index("mssd"), :, :n_positions])
    figure, axis = plt.subplots(figsize=(9, 4.2))
    bar = {"label": "MSSD at this position, activation²"}
    sns.heatmap(mssd, norm=LogNorm(), cmap="cividis", ax=axis, cbar_kws=bar)
    axis.set(xlabel="position in the sample", ylabel="layer index", title="MSSD by layer and position")
    axis.invert_yaxis()
    axis.tick_params(axis="y", rotation=0)
    return figure
