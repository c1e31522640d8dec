"""One look for every picture: colours, markers and dashes by name, axes. Layer indices are 0-based."""

import seaborn as sns
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter

from simdiff_utils.criterion.propose import METHODS

# Okabe-Ito colours: told apart by colour-blind readers; markers and dashes tell them apart in grey.
NAMES = {
    "dense": "dense",
    "pruned": "pruned",
    "recovered": "recovered",
    **{name: method.label for name, method in METHODS.items()},
}
COLOURS = {
    "dense": "#333333",
    "cosine": "#E69F00",
    "mssd": "#0072B2",
    "masd": "#009E73",
    "log-mssd": "#56B4E9",
    "relative": "#D55E00",
    "portfolio": "#CC79A7",
    "angular": "#F0E442",
    "tail": "#999999",
    "random": "#999999",
    "magnitude": "#999999",
    "taylor": "#777777",
    "one-shot": "#777777",
    "sleb": "#000000",
    "window": "#777777",
    "entrodrop": "#777777",
    "laco": "#999999",
    "pruned": "#D55E00",
    "recovered": "#CC79A7",
}
MARKERS = {
    "dense": "D",
    "cosine": "o",
    "mssd": "s",
    "masd": "^",
    "log-mssd": "v",
    "relative": "P",
    "portfolio": "*",
    "angular": "d",
    "tail": "<",
    "random": ".",
    "magnitude": "x",
    "taylor": "+",
    "one-shot": "1",
    "sleb": "X",
    "window": "p",
    "entrodrop": "h",
    "laco": ">",
    "pruned": "v",
    "recovered": "P",
}
_DOTTED, _DASHDOT = (0, (1, 1)), (0, (3, 1, 1, 1))
DASHES = {
    "cosine": "-",
    "mssd": "--",
    "masd": "-.",
    "log-mssd": ":",
    "relative": (0, (5, 1)),
    "portfolio": "-",
    "angular": _DOTTED,
    "tail": _DASHDOT,
    "random": _DOTTED,
    "magnitude": _DASHDOT,
    "taylor": ":",
    "one-shot": (0, (5, 1)),
    "sleb": "-",
    "window": "--",
    "entrodrop": "-.",
    "laco": _DOTTED,
}


def use_style() -> None:
    """The look of every picture in the workbook."""
    sns.set_theme(
        context="notebook",
        style="ticks",
        rc={
            "figure.figsize": (8.5, 3.2),
            "figure.dpi": 70,
            "figure.constrained_layout.use": True,
            "axes.grid": True,
            "grid.color": "#e6e6e6",
            "axes.spines.top": False,
            "axes.spines.right": False,
            "axes.titlesize": "medium",
            "legend.frameon": False,
            "savefig.facecolor": "white",
        },
    )


def layer_axis(axis: Axes) -> None:
    axis.set_xlabel("layer index")
    axis.xaxis.set_major_locator(MaxNLocator(integer=True))


def plain_log_axis(axis: Axis) -> None:
    """Numbers such as 200 and 5,000 on a logarithmic axis."""
    axis.set_major_locator(LogLocator(subs=(1, 2, 5), numticks=12))
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.10g}"))
    axis.set_minor_formatter(NullFormatter())
