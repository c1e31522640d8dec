"""Pictures of notebook 03; every function returns the Figure."""

import matplotlib.pyplot as plt
import pandas as pd
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from simdiff_utils.style import COLOURS, DASHES, MARKERS, NAMES, plain_log_axis


def plot_comparison(table: pd.DataFrame, dense: float, n_blocks: int) -> Figure:
    """Test perplexity over the number of layers removed, one line per criterion."""
    figure, axis = plt.subplots(figsize=(9, 4.4))
    for criterion, group in table.groupby("criterion", sort=False):
        axis.plot(
            group["n_remove"],
            group["test_perplexity"],
            marker=MARKERS[criterion],
            ls=DASHES[criterion],
            ms=12 if criterion == "cosine" else 7,
            mfc="white" if criterion == "cosine" else None,
            color=COLOURS[criterion],
            label=NAMES[criterion],
        )
    axis.axhline(dense, color=COLOURS["dense"], lw=1.2, ls=":", label=f"dense, {dense:.1f}")
    axis.set(
        xlabel="layers removed",
        ylabel="test perplexity (log scale)",
        yscale="log",
        title=f"Perplexity on {n_blocks} blocks of the test split",
    )
    plain_log_axis(axis.yaxis)
    axis.xaxis.set_major_locator(MaxNLocator(integer=True))
    axis.legend()
    return figure
