"""Pictures of recovery: the loss while training, the ladder of one run, and the rungs that the workbook has
measured."""

import matplotlib.pyplot as plt
import pandas as pd
from matplotlib.figure import Figure

from simdiff_utils.style import COLOURS

RUNGS = {
    "magnitude": ("x", "#999999", ":"),
    "linear": ("s", "#0072B2", ":"),
    "lora": ("o", "#E69F00", "-"),
    "distillation": ("^", "#009E73", "-"),
    "linear+lora": ("D", "#D55E00", "--"),
    "linear+distillation": ("P", "#CC79A7", "--"),
}  # marker, colour, dashes


def plot_training(log: pd.DataFrame, dense: float, pruned: float) -> Figure:
    """Left, the loss over the tokens seen; right, the share of the lost log-perplexity that is back.

    Args:
        log: of `recovery.Trained`.
        dense, pruned: loss on the validation blocks of the dense and the pruned model, in nats per token.
    """
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 3.6))
    train, held_out = log.dropna(subset=["loss"]), log.dropna(subset=["eval_loss"])
    left.plot(
        train["tokens"] / 1000,
        train["loss"],
        marker="o",
        ms=4,
        color=COLOURS["recovered"],
        label="training batches",
    )
    left.plot(
        held_out["tokens"] / 1000,
        held_out["eval_loss"],
        "D--",
        ms=7,
        color=COLOURS["dense"],
        label="validation blocks, next token",
    )
    left.set(ylabel="loss, nats per token")
    left.legend(loc="upper center", bbox_to_anchor=(0.5, 1.2), ncols=2, fontsize=9)
    share = 100 * (pruned - held_out["eval_loss"]) / (pruned - dense)
    right.plot(held_out["tokens"] / 1000, share, "P-", ms=8, color=COLOURS["recovered"])
    right.axhline(100, color=COLOURS["dense"], lw=1.2)
    end = held_out["tokens"].max() / 1000
    right.text(end, 97, "dense", fontsize=9, va="top", ha="right")
    right.axhline(0, color=COLOURS["pruned"], lw=1.2, ls="--")
    right.text(end, 2, "pruned", fontsize=9, va="bottom", ha="right")
    right.set(ylabel="lost log-perplexity\nrecovered, % (validation)", ylim=(min(-5, share.min() - 5), 105))
    for axis in (left, right):
        axis.set(xlabel="thousand tokens seen")
    return figure


def plot_ladder(table: pd.DataFrame) -> Figure:
    """Test perplexity of the dense, the pruned and the healed models, each with the share recovered (see
    `Ladder`)."""
    figure, axis = plt.subplots(figsize=(8, 0.6 + 0.45 * len(table)))
    colours = [COLOURS[name if name in ("dense", "pruned") else "recovered"] for name in table["rung"]]
    bars = axis.barh(table["rung"], table["perplexity"], color=colours, height=0.65)
    labels = [
        f"{row.perplexity:.1f}" + (f"   {row.share:.0%} recovered" if 2 <= row.Index else "")
        for row in table.itertuples()
    ]
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
    figure, axes = plt.subplots(
        1, len(titles), figsize=(1 + 4 * len(titles), 3.9), sharey=True, squeeze=False
    )
    for axis, (case, title) in zip(axes[0], titles.items(), strict=True):
        for rung, (marker, colour, dashes) in RUNGS.items():
            curve = curves[(curves["case"] == case) & (curves["rung"] == rung)]
            if len(curve):
                share = (
                    100
                    * (curve["pruned_loss"] - curve["eval_loss"])
                    / (curve["pruned_loss"] - curve["dense_loss"])
                )
                axis.plot(
                    curve["tokens"] / 1000, share, marker=marker, color=colour, ls=dashes, ms=6, label=rung
                )
            untrained = table[(table["case"] == case) & (table["rung"] == rung) & (table["n_trained"] == 0)]
            if len(untrained):
                axis.plot(
                    untrained["n_tokens"] / 1000,
                    100 * untrained["share"],
                    marker=marker,
                    color=colour,
                    ls="",
                    ms=8,
                    label=f"{rung} (no training, test split)",
                )
        axis.axhline(0, color=COLOURS["pruned"], lw=1.2, ls="--")
        axis.set(title=title, xlabel="thousand tokens seen")
    axes[0][0].set(ylabel="lost log-perplexity\nrecovered, % (validation)")
    found = {
        label: line for axis in axes[0] for line, label in zip(*axis.get_legend_handles_labels(), strict=True)
    }
    figure.legend(found.values(), found.keys(), loc="outside lower center", ncols=3, fontsize=9)
    return figure
