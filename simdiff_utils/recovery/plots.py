"""Pictures of recovery: what two models expect, the loss while training, the ladder of one run, and the rungs
that the workbook has measured."""

import matplotlib.pyplot as plt
import pandas as pd
from matplotlib.figure import Figure

from simdiff_utils.style import look, note, shared_legend

RUNGS = {
    "lora": dict(marker="o", color="#E69F00", ls="-"),
    "distillation": dict(marker="^", color="#009E73", ls="-"),
    "linear+distillation": dict(marker="P", color="#CC79A7", ls="--"),
}


def plot_next_token(words: list[str], dense: list[float], pruned: list[float], came: int) -> Figure:
    """What two models expect at one place of a text: the probabilities of a few words, as pairs of bars.

    Args:
        words: the words, the most likely of the dense model first.
        dense, pruned: their probabilities.
        came: which of the words stands in the text.
    """
    figure, axis = plt.subplots(figsize=(8, 0.6 + 0.36 * len(words)))
    places = range(len(words))
    for name, values, aside in (("dense", dense, -0.2), ("pruned", pruned, 0.2)):
        own = dict(color=look(name)["color"], label=name)
        axis.barh([y + aside for y in places], values, height=0.38, **own)
    axis.set(
        yticks=places, yticklabels=[repr(word) for word in words], xlabel="probability of the next token"
    )
    axis.get_yticklabels()[came].set(fontweight="bold")
    axis.invert_yaxis()
    axis.grid(axis="y", visible=False)
    axis.legend(loc="lower right", fontsize=9)
    return figure


def plot_training(log: pd.DataFrame, dense: float, pruned: float) -> Figure:
    """The loss on held-out text over the tokens seen, between the dense and the pruned model's; faint, the
    training batches.

    Args:
        log: of `recovery.lora.Trained`.
        dense, pruned: loss on the validation blocks of the dense and the pruned model, in nats per token.
    """
    figure, axis = plt.subplots(figsize=(8, 3.4))
    train, held_out = log.dropna(subset=["loss"]), log.dropna(subset=["eval_loss"])
    seen = held_out["tokens"] / 1000
    axis.plot(train["tokens"] / 1000, train["loss"], ".", color="#999999", label="training batches")
    axis.plot(seen, held_out["eval_loss"], **look("recovered", ms=8, label="held-out text"))
    for name, loss in (("dense", dense), ("pruned", pruned)):
        axis.axhline(loss, color=look(name)["color"], lw=1.2, ls="--")
        note(axis, name, (seen.max(), loss), (-4, 3), ha="right")
    axis.set(xlabel="thousand tokens seen", ylabel="loss, nats per token")
    figure.legend(loc="outside upper center", ncols=2, fontsize=9)
    return figure


def plot_ladder(table: pd.DataFrame) -> Figure:
    """Test perplexity of the dense, the pruned and the healed models, each with the share recovered (see
    `Ladder`)."""
    figure, axis = plt.subplots(figsize=(8, 0.6 + 0.45 * len(table)))
    names = [name if name in ("dense", "pruned") else "recovered" for name in table["rung"]]
    colours = [look(name)["color"] for name in names]
    bars = axis.barh(table["rung"], table["perplexity"], color=colours, height=0.65)
    back = [f"   {share:.0%} won back" if i >= 2 else "" for i, share in enumerate(table["share"])]
    labels = [f"{value:.1f}{share}" for value, share in zip(table["perplexity"], back, strict=True)]
    axis.bar_label(bars, labels, padding=4, fontsize=10)
    axis.set(xlabel="test perplexity")
    axis.invert_yaxis()
    axis.margins(x=0.3)
    axis.grid(axis="y", visible=False)
    return figure


def plot_rungs(curves: pd.DataFrame, titles: dict[str, str]) -> Figure:
    """What each rung wins back over the tokens it has seen, on held-out text, a panel for each case. Where a
    curve starts above 0, a repair without training came before.

    Args:
        curves: evaluations while training: case, rung, tokens, eval_loss, dense_loss, pruned_loss (nats per
            token).
        titles: case -> what stands above its panel.
    """
    size = (1 + 4 * len(titles), 3.9)
    figure, axes = plt.subplots(1, len(titles), figsize=size, sharey=True, squeeze=False)
    for axis, (case, title) in zip(axes[0], titles.items(), strict=True):
        for rung, own in RUNGS.items():
            curve = curves[(curves["case"] == case) & (curves["rung"] == rung)]
            if len(curve):
                lost = curve["pruned_loss"] - curve["dense_loss"]
                share = 100 * (curve["pruned_loss"] - curve["eval_loss"]) / lost
                axis.plot(curve["tokens"] / 1000, share, **own, ms=6, label=rung)
        axis.axhline(0, color=look("pruned")["color"], lw=1.2, ls="--")
        axis.set(title=title, xlabel="thousand tokens seen")
    axes[0, 0].set_ylabel("share won back, %\n(validation)")
    shared_legend(figure, axes[0], loc="outside lower center", ncols=4)
    return figure
