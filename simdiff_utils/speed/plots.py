"""Pictures of notebook 05; every function returns the Figure."""

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from simdiff_utils.style import COLOURS, MARKERS

_PARTS = ["#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#F0E442"]
_REST = "#BBBBBB"


def plot_speed(samples: pd.DataFrame, ideals: dict[str, float]) -> Figure:
    """Tokens per second of every run of each phase; dashed, what the bound leaves the pruned model over the
    dense one.

    Args:
        samples: of one way, batch size and number of layers removed (see `measure_speed`).
        ideals: phase -> ideal speedup.
    """
    phases = list(dict.fromkeys(samples["phase"]))
    figure, axes = plt.subplots(1, len(phases), figsize=(10, 3.2), squeeze=False)
    for axis, phase in zip(axes[0], phases, strict=True):
        part = samples[samples["phase"] == phase]
        medians = part.groupby("model", sort=False)["tokens_per_s"].median().reindex(["dense", "pruned"])
        for y, (name, median) in enumerate(medians.items()):
            values = part.loc[part["model"] == name, "tokens_per_s"]
            axis.barh(y, median, color=COLOURS[name], alpha=0.35, height=0.6)
            axis.plot(values, np.full(len(values), y), MARKERS[name], color=COLOURS[name], ms=6, mfc="white")
        axis.axvline(medians["dense"] * ideals[phase], color="#333333", ls="--", lw=1.2)
        axis.text(
            medians["dense"] * ideals[phase], -0.6, f"ideal ×{ideals[phase]:.2f} ", fontsize=9, ha="right"
        )
        axis.set(
            title=phase,
            xlabel="tokens per second",
            yticks=range(2),
            yticklabels=list(medians.index),
            ylim=(1.5, -0.8),
            xlim=(0, None),
        )
        axis.grid(axis="y", visible=False)
    return figure


def plot_depth(table: pd.DataFrame, published: pd.DataFrame | None = None) -> Figure:
    """Speedup over the share of layers removed, a panel per phase: measured with its interval, the bound as a
    line.

    Args:
        table: label, phase, n_remove, n_layers, speedup, speedup_low, speedup_high, ideal_speedup; a line per
            label.
        published: share (of layers removed) and speedup of the paper's Table 4, drawn beside decode.
    """
    phases = sorted(dict.fromkeys(table["phase"]), key=lambda phase: phase != "prefill")
    labels = list(dict.fromkeys(table["label"]))
    figure, axes = plt.subplots(
        1, len(phases), figsize=(5.2 * len(phases) + 1.5, 3.8), squeeze=False, sharey=True
    )
    for axis, phase in zip(axes[0], phases, strict=True):
        for label, line in table[table["phase"] == phase].groupby("label", sort=False):
            line, number = line.sort_values("n_remove"), labels.index(label)
            share, colour = line["n_remove"] / line["n_layers"], _PARTS[number % len(_PARTS)]
            axis.plot([0, *share], [1, *line["ideal_speedup"]], color=colour, lw=1.2, ls="--")
            aside = 0.004 * (
                number - (len(labels) - 1) / 2
            )  # so that intervals at the same share can be told apart
            axis.errorbar(
                share + aside,
                line["speedup"],
                [line["speedup"] - line["speedup_low"], line["speedup_high"] - line["speedup"]],
                fmt="osD^vP"[number % 6],
                color=colour,
                ms=6,
                capsize=3,
                mfc="white",
                label=label,
            )
        if published is not None and phase.startswith("decode"):
            axis.plot(
                published["share"],
                published["speedup"],
                "x",
                color="#333333",
                ms=7,
                mew=1.5,
                label="LLaMA3.1-8B on an A40 (published)",
            )
        axis.axhline(1, color="#999999", lw=0.8)
        axis.set(title=phase, xlabel="share of layers removed")
        axis.xaxis.set_major_formatter(lambda value, _: f"{value:.0%}")
    axes[0][0].set_ylabel("times as fast as dense\n(dashed: bound)")
    handles = {
        label: handle
        for axis in axes[0]
        for handle, label in zip(*axis.get_legend_handles_labels(), strict=True)
    }
    figure.legend(
        handles.values(), handles.keys(), loc="outside lower center", ncols=min(5, len(handles)), fontsize=9
    )
    return figure


def plot_step(parts: pd.DataFrame, ideals: dict[str, float]) -> Figure:
    """Where a decode step's time goes: a bar per model, its parts side by side; the tick is the bound.

    Args:
        parts: model, part, seconds (see `time_parts`).
        ideals: model -> seconds of an ideal step.
    """
    models = list(dict.fromkeys(parts["model"]))
    figure, axis = plt.subplots(figsize=(9, 0.9 + 0.7 * len(models)))
    names = list(dict.fromkeys(parts["part"]))
    for y, model in enumerate(models):
        left = 0.0
        for name in names:
            width = 1000 * parts.loc[(parts["model"] == model) & (parts["part"] == name), "seconds"].sum()
            colour = _REST if name == "rest" else _PARTS[names.index(name) % len(_PARTS)]
            axis.barh(
                y,
                width,
                left=left,
                color=colour,
                height=0.6,
                edgecolor="white",
                label=name if y == 0 else None,
            )
            if width:
                axis.text(left + width / 2, y, f"{width:.1f}", ha="center", va="center", fontsize=8)
            left += width
        axis.plot(
            [1000 * ideals[model]] * 2,
            [y - 0.42, y + 0.42],
            color="black",
            lw=2.5,
            label="bound" if y == 0 else None,
        )
    axis.set(
        yticks=range(len(models)),
        yticklabels=models,
        xlabel="milliseconds of one decode step",
        xlim=(0, None),
    )
    axis.invert_yaxis()
    axis.grid(axis="y", visible=False)
    figure.legend(loc="outside upper center", ncols=len(names) + 1, fontsize=9)
    return figure


def plot_memory(memory: pd.DataFrame) -> Figure:
    """Peak memory as stacked bars: weights, KV cache, the rest; without what the process takes before
    loading.

    Args:
        memory: model, weights, kv_cache, other, in GiB (see `measure_peak_memory`).
    """
    figure, axis = plt.subplots(figsize=(9, 0.9 + 0.7 * len(memory)))
    left = np.zeros(len(memory))
    for name, label, colour in (
        ("weights", "weights", _PARTS[0]),
        ("kv_cache", "KV cache", _PARTS[1]),
        ("other", "activations and other", _REST),
    ):
        axis.barh(
            memory["model"], memory[name], left=left, color=colour, height=0.6, edgecolor="white", label=label
        )
        left = left + memory[name].to_numpy()
    for y, total in enumerate(left):
        axis.text(total, y, f" {total:.2f}", va="center", fontsize=9)
    axis.set(xlabel="peak memory, GiB")
    axis.margins(x=0.12)
    axis.invert_yaxis()
    axis.grid(axis="y", visible=False)
    figure.legend(loc="outside upper center", ncols=3, fontsize=9)
    return figure
