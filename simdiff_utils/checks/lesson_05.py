"""Exercises of notebook 05: the bound, fair ratios, and what a draft gains."""

import numpy as np

from simdiff_utils.checks import Exercise

# parameters of one layer, of the head, layers, layers removed: the ideal decode speedup by weights
ideal_speedup = Exercise(
    right=lambda layer, head, n, k: (n * layer + head) / ((n - k) * layer + head),
    cases=[(10.0, 40.0, 30, 6), (10.0, 0.0, 32, 8)],
    mistakes=[
        (lambda a, h, n, k: n / (n - k), "the head stays: it is read in every step, before and after."),
        (lambda a, h, n, k: ((n - k) * a + h) / (n * a + h), "dense goes above pruned."),
        (lambda a, h, n, k: (n * a + h) / ((n - k) * a), "the head is read by both models."),
        (lambda a, h, n, k: k / n, "this is the share of layers removed."),
        (lambda a, h, n, k: n * a / ((n - k) * a + h), "the dense model reads its head, too."),
    ],
    why="With a large head, removing layers pays less.",
)

_TIMES = [
    (np.array([1.0, 2.0, 4.0]), np.array([0.5, 0.8, 3.5])),
    (np.array([1.0, 3.0, 1.5]), np.array([0.9, 1.0, 1.1])),
]

# seconds of the dense and the pruned model, run in turns: the speedup as the geometric mean over pairs
speedup_of_pairs = Exercise(
    right=lambda dense, pruned: float(np.exp(np.log(dense / pruned).mean())),
    cases=_TIMES,
    mistakes=[
        (
            lambda a, b: float(a.sum() / b.sum()),
            "this is a ratio of sums: a slow moment of the machine weighs more.",
        ),
        (
            lambda a, b: float((a / b).mean()),
            "the arithmetic mean of ratios is too friendly: 2 and 0.5 should cancel.",
        ),
        (
            lambda a, b: float(np.exp(np.log(b / a).mean())),
            "pruned over dense is the share of time that is left.",
        ),
        (
            lambda a, b: float(np.median(a / b)),
            "this is the median of the ratios; the geometric mean uses every pair.",
        ),
        (lambda a, b: float((a - b).mean()), "this is a difference in seconds."),
        (lambda a, b: float(np.log(a / b).mean()), "this is the log; take exp."),
    ],
)

# weights that a step reads, bytes of each, bytes that the machine reads in a second: tokens a second at most
tokens_per_second = Exercise(
    right=lambda n_weights, bytes_each, bandwidth: bandwidth / (n_weights * bytes_each),
    cases=[(134.5e6, 2, 17e9), (1e9, 4, 20e9)],
    mistakes=[
        (lambda n, b, w: w / n, "a weight takes several bytes."),
        (lambda n, b, w: n * b / w, "this is seconds a token; tokens a second is its inverse."),
        (lambda n, b, w: w / (n * b * 8), "bytes, not bits."),
        (lambda n, b, w: w * b / n, "a wider weight takes longer: its bytes go below the line."),
        (lambda n, b, w: w / (2 * n * b), "reading once is enough: one step reads every weight once."),
    ],
)
