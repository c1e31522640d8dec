"""One look for every picture: how each criterion is drawn (from the registry), axes, legends."""

from collections.abc import Iterable

import seaborn as sns
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.figure import Figure
from matplotlib.legend import Legend
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter

from simdiff_utils import registry

_MODELS = {  # what is no criterion
    "dense": {"color": "#333333", "marker": "D", "ls": "-", "label": "dense"},
    "pruned": {"color": "#D55E00", "marker": "v", "ls": "-", "label": "pruned"},
    "recovered": {"color": "#CC79A7", "marker": "P", "ls": "-", "label": "recovered"},
    "lazy": {"color": "#000000", "marker": "s", "ls": "-.", "label": "lazy greedy chain"},
}
NAMES = {name: look["label"] for name, look in _MODELS.items()} | {
    name: row.label for name, row in registry.CRITERIA.items()
}


def look(name: str, **changes: object) -> dict[str, object]:
    """Colour, marker, line and label of a criterion, or of the dense, pruned or recovered model, for
    `axis.plot`.

    Args:
        changes: what is to be different in this picture.
    """
    if name in _MODELS:
        return _MODELS[name] | changes
    row = registry.find(name)
    return {"color": row.color, "marker": row.marker, "ls": row.ls, "label": row.label} | changes


def shared_legend(place: Figure | Axes, axes: Iterable[Axes], **where: object) -> Legend:
    """One legend for several panels, in a figure or beside an axis; what several show stands there once."""
    pairs = [pair for axis in axes for pair in zip(*axis.get_legend_handles_labels(), strict=True)]
    found = {label: handle for handle, label in pairs}
    return place.legend(found.values(), found.keys(), **({"fontsize": 9} | where))


def note(axis: Axes, text: object, place: tuple[float, float], offset: tuple[float, float], **looks) -> None:
    """A word in small letters, `offset` points away from its place."""
    given = {"fontsize": 8} | looks
    axis.annotate(str(text), place, textcoords="offset points", xytext=offset, **given)


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
    """Layer indices along x."""
    axis.set_xlabel("layer index")
    axis.xaxis.set_major_locator(MaxNLocator(integer=True))


def plain_log_axis(axis: Axis) -> None:
    """Numbers such as 200 and 5,000 on a logarithmic axis."""
    axis.set_major_locator(LogLocator(subs=(1, 2, 5), numticks=12))
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.10g}"))
    axis.set_minor_formatter(NullFormatter())
