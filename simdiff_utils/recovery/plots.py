"""Pictures of recovery: the loss while training, the ladder of one run, and the rungs that the workbook has
measured."""

import matplotlib.pyplot as plt
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from simdiff_utils.style import look, shared_legend

RUNGS = {
    "magnitude": dict(marker="x", color="#999999", ls=":"),
    "linear": dict(marker="s", color="#0072B2", ls=":"),
    "lora": dict(marker="o", color="#E69F00", ls="-"),
    "distillation": dict(marker="^", color="#009E73", ls="-"),
    "linear+lora": dict(marker="D", color="#D55E00", ls="--"),
    "linear+distillation": dict(marker="P", color="#CC79A7", ls="--"),
}
_SHARE = "lost log-perplexity\nrecovered, % (validation)"


def plot_training(log: pd.DataFrame, dense: float, pruned: float) -> Figure:
    """Left, the loss over the tokens seen; right, the share of the lost log-perplexity that is back.

    Args:
        log: of `recovery.lora.Trained`.
        dense, pruned: loss on the validation blocks of the dense and the pruned model, in nats per token.
    """
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 3.6))
    train, held_out = log.dropna(subset=["loss"]), log.dropna(subset=["eval_loss"])
    seen = held_out["tokens"] / 1000
    batches = look("recovered", marker="o", ms=4, label="training batches")
    left.plot(train["tokens"] / 1000, train["loss"], **batches)
    left.plot(
        seen, held_out["eval_loss"], **look("dense", ls="--", ms=7, label="validation blocks, next token")
    )
    left.set(ylabel="loss, nats per token")
    left.legend(loc="upper center", bbox_to_anchor=(0.5, 1.2), ncols=2, fontsize=9)
    share = _percent_back(held_out["eval_loss"], dense, pruned)
    right.plot(seen, share, **look("recovered", ms=8))
    right.axhline(100, color=look("dense")["color"], lw=1.2)
    right.text(seen.max(), 97, "dense", fontsize=9, va="top", ha="right")
    _draw_pruned(right)
    right.text(seen.max(), 2, "pruned", fontsize=9, va="bottom", ha="right")
    right.set(ylabel=_SHARE, ylim=(min(-5, share.min() - 5), 105))
    for axis in (left, right):
        axis.set(xlabel="thousand tokens seen")
    return figure


def plot_ladder(table: pd.DataFrame) -> Figure:
    """Test perplexity of the dense, the pruned and the healed models, each with the share recovered (see
    `Ladder`)."""
    figure, axis = plt.subplots(figsize=(8, 0.6 + 0.45 * len(table)))
    names = [name if name in ("dense", "pruned") else "recovered" for name in table["rung"]]
    colours = [look(name)["color"] for name in names]
    bars = axis.barh(table["rung"], table["perplexity"], color=colours, height=0.65)
    back = [f"   {share:.0%} recovered" if i >= 2 else "" for i, share in enumerate(table["share"])]
    labels = [f"{value:.1f}{share}" for value, share in zip(table["perplexity"], back, strict=True)]
    axis.bar_label(bars, labels, padding=4, fontsize=10)
    axis.set(xlabel="test perplexity")
    axis.invert_yaxis()
    axis.margins(x=0.3)
    axis.grid(axis="y", visible=False)
    return figure


def plot_rungs(curves: pd.DataFrame, table: pd.DataFrame, titles: dict[str, str]) -> Figure:
    """What each rung wins back over the tokens it has seen, a panel for each case.

    Args:
        curves: evaluations while training: case, rung, tokens, eval_loss, dense_loss, pruned_loss (nats per
            token).
        table: the rungs at their end: case, rung, n_tokens, share (of the test split), n_trained.
        titles: case -> what stands above its panel.
    """
    size = (1 + 4 * len(titles), 3.9)
    figure, axes = plt.subplots(1, len(titles), figsize=size, sharey=True, squeeze=False)
    for axis, (case, title) in zip(axes[0], titles.items(), strict=True):
        for rung, own in RUNGS.items():
            curve = curves[(curves["case"] == case) & (curves["rung"] == rung)]
            if len(curve):
                share = _percent_back(curve["eval_loss"], curve["dense_loss"], curve["pruned_loss"])
                axis.plot(curve["tokens"] / 1000, share, **own, ms=6, label=rung)
            ends = table[(table["case"] == case) & (table["rung"] == rung) & (table["n_trained"] == 0)]
            if len(ends):
                alone = own | dict(ls="", ms=8, label=f"{rung} (no training, test split)")
                axis.plot(ends["n_tokens"] / 1000, 100 * ends["share"], **alone)
        _draw_pruned(axis)
        axis.set(title=title, xlabel="thousand tokens seen")
    axes[0, 0].set_ylabel(_SHARE)
    shared_legend(figure, axes[0], loc="outside lower center", ncols=3)
    return figure


def _percent_back(loss: pd.Series, dense: float | pd.Series, pruned: float | pd.Series) -> pd.Series:
    return 100 * (pruned - loss) / (pruned - dense)


def _draw_pruned(axis: Axes) -> None:
    axis.axhline(0, color=look("pruned")["color"], lw=1.2, ls="--")
