"""Pictures of notebook 03; every function returns the Figure."""

import matplotlib.pyplot as plt
import pandas as pd
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from simdiff_utils.style import look, plain_log_axis


def plot_comparison(table: pd.DataFrame, dense: float, n_blocks: int) -> Figure:
    """Test perplexity over the number of layers removed, one line per criterion."""
    figure, axis = plt.subplots(figsize=(9, 4.4))
    for criterion, group in table.groupby("criterion", sort=False):
        # ShortGPT's set is often another criterion's, too: its large hollow mark lets the other be seen
        own = dict(ms=12, mfc="white") if criterion == "cosine" else dict(ms=7)
        axis.plot(group["n_remove"], group["test_perplexity"], **look(criterion, **own))
    axis.axhline(dense, color=look("dense")["color"], lw=1.2, ls=":", label=f"dense, {dense:.1f}")
    axis.set(xlabel="layers removed", ylabel="test perplexity (log scale)", yscale="log")
    axis.set_title(f"Perplexity on {n_blocks} blocks of the test split")
    plain_log_axis(axis.yaxis)
    axis.xaxis.set_major_locator(MaxNLocator(integer=True))
    axis.legend()
    return figure


def plot_cut(n_layers: int, removed: frozenset[int]) -> Figure:
    """The residual stream before and after: above the dense model's layers, those removed hollow, below the
    layers that stay, under their new indices."""
    figure, axis = plt.subplots(figsize=(10, 2.2))
    kept = [layer_idx for layer_idx in range(n_layers) if layer_idx not in removed]
    axis.hlines([1, 0], -1, [n_layers, len(kept)], color="#333333", lw=1, zorder=0)  # the stream

    def draw(place: int, y: int, gone: bool) -> None:
        edge = look("pruned" if gone else "dense")["color"]
        face, ink = ("white", edge) if gone else (edge, "white")
        axis.bar(place, 0.5, width=0.78, bottom=y - 0.25, color=face, edgecolor=edge)
        axis.text(place, y, str(place), color=ink, fontsize=8, ha="center", va="center")

    for layer_idx in range(n_layers):
        draw(layer_idx, 1, layer_idx in removed)
    for new_idx, layer_idx in enumerate(kept):
        draw(new_idx, 0, False)
        axis.plot([layer_idx, new_idx], [0.73, 0.27], color="#bbbbbb", lw=0.8)
    axis.set(yticks=[1, 0], yticklabels=["dense", "pruned"], xticks=[], ylim=(-0.4, 1.4))
    axis.set_frame_on(False)
    axis.tick_params(left=False)
    return figure
