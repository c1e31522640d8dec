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
