"""Exercises of notebook 03: the edit itself, perplexity, and a difference that is real."""

import numpy as np

from simdiff_utils.checks import Exercise

_LOSSES = [(np.array([2.0, 3.0, 7.0]),), (np.array([1.0, 1.0]),)]

# old index -> new index of the layers that stay
renumbering = Exercise(
    right=lambda n_layers, removed: {
        old: new for new, old in enumerate(i for i in range(n_layers) if i not in removed)
    },
    cases=[(6, {2, 3}), (5, {0, 4})],
    mistakes=[
        (
            lambda n, r: dict(enumerate(i for i in range(n) if i not in r)),
            "this maps new to old; the cache is looked up by the new index.",
        ),
        (
            lambda n, r: {i: i for i in range(n) if i not in r},
            "the layers keep their old numbers: the KV cache would have holes.",
        ),
        (
            lambda n, r: {old: new for new, old in enumerate((i for i in range(n) if i not in r), start=1)},
            "layers are counted from 0.",
        ),
        (lambda n, r: {old: new for new, old in enumerate(sorted(r))}, "these are the layers that go."),
        (lambda n, r: {i: i for i in range(n)}, "the removed layers are still in it."),
    ],
)

perplexity = Exercise(
    right=lambda losses: float(np.exp(losses.mean())),
    cases=_LOSSES,
    mistakes=[
        (
            lambda x: float(np.exp(x).mean()),
            "you took the mean of the perplexities of the blocks; take the mean loss first, then exp.",
        ),
        (lambda x: float(x.mean()), "this is the loss; perplexity is exp of it."),
        (lambda x: float(2 ** x.mean()), "the losses are in nats: the base is e, not 2."),
        (lambda x: float(np.exp(x.sum())), "this is exp of the sum; take the mean over blocks."),
        (
            lambda x: float(np.exp(-x.mean())),
            "exp of the negative loss is the mean probability; perplexity is its inverse.",
        ),
    ],
)

_PAIRS = [
    (np.array([2.0, 3.0, 4.0]), np.array([1.8, 2.9, 3.9])),
    (np.array([2.0, 2.5]), np.array([2.0, 2.6])),
]

# of two models on the same blocks: the ratio of their perplexities
paired_ratio = Exercise(
    right=lambda losses, base: float(np.exp((losses - base).mean())),
    cases=_PAIRS,
    mistakes=[
        (lambda a, b: float(np.exp((b - a).mean())), "the first model goes above the second."),
        (
            lambda a, b: float(a.mean() / b.mean()),
            "this is a ratio of losses; take exp of the mean difference.",
        ),
        (lambda a, b: float((a - b).mean()), "the differences are of losses: exp is missing."),
        (
            lambda a, b: float(np.exp(a.mean()) - np.exp(b.mean())),
            "this is a difference of perplexities; the ratio does not depend on how hard the text is.",
        ),
        (lambda a, b: float(np.exp(a - b).mean()), "take the mean of the differences first, then exp."),
    ],
)

# a ratio of perplexities of 0.93 with the 95 % interval (0.86, 1.01): what has been shown?
is_it_real = Exercise(
    right="no difference shown",
    mistakes=[
        ("better", "the interval holds 1: with other text of this kind the order may turn."),
        ("nothing", "say it as the tables do: no difference shown."),
        ("equal", "no difference shown is not the same as equal: the interval reaches down to 0.86."),
        ("worse", "all of the interval would have to lie above 1."),
    ],
    why="More blocks make the interval narrower. Then it may be shown.",
)
