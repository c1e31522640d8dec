"""Exercises of notebook 06: what an interval says, and how many questions it takes."""

import numpy as np

from simdiff_utils.checks import Exercise

# the 95 % interval of a ratio to ShortGPT's perplexity -> "better", "worse", or "no difference shown"
verdict = Exercise(
    right=lambda low, high: "better" if high < 1 else "worse" if low > 1 else "no difference shown",
    cases=[(0.7, 0.9), (1.1, 1.3), (0.9, 1.2), (0.5, 1.0), (1.0, 1.3), (0.9, 0.99), (1.01, 1.2)],
    mistakes=[
        (
            lambda lo, hi: "worse" if hi < 1 else "better" if lo > 1 else "no difference shown",
            "a perplexity below 1 times ShortGPT's is better: turn it around.",
        ),
        (
            lambda lo, hi: "better" if lo < 1 else "worse",
            "look at both ends: only if all of it is on one side of 1 has something been shown.",
        ),
        (
            lambda lo, hi: "better" if (lo + hi) / 2 < 1 else "worse",
            "the middle may lie below 1 by chance; the interval decides.",
        ),
        (
            lambda lo, hi: "better" if hi < 1 else "worse",
            "an interval that holds 1 shows no difference, and that is a third answer.",
        ),
        (
            lambda lo, hi: "better" if hi <= 1 else "worse" if lo >= 1 else "no difference shown",
            "an interval that ends at 1 holds it.",
        ),
    ],
)

# accuracy p over n questions: its standard error
standard_error = Exercise(
    right=lambda p, n: float(np.sqrt(p * (1 - p) / n)),
    cases=[(0.4, 200), (0.5, 1600)],
    mistakes=[
        (lambda p, n: p * (1 - p) / n, "this is the variance; take the root."),
        (
            lambda p, n: float(np.sqrt(p * (1 - p) / (n - 1))),
            "close: divide by n, not by n - 1; with a share p nothing is estimated from a mean.",
        ),
        (lambda p, n: float(1 / np.sqrt(n)), "p (1 - p) is missing."),
        (
            lambda p, n: float(np.sqrt(p * (1 - p))),
            "divide by n under the root: more questions, a smaller error.",
        ),
        (
            lambda p, n: float(1.96 * np.sqrt(p * (1 - p) / n)),
            "this is the half width of a 95 % interval: 1.96 times the standard error.",
        ),
        (lambda p, n: float(np.sqrt(p / n)), "p times 1 minus p, not p alone."),
    ],
    why="With 200 questions at 40 %, it is 3.5 points. That is why accuracy cannot order our sets.",
)

# which criterion would you use on a model of your own, and what would you measure?
your_choice = Exercise(
    right="measure",
    mistakes=[
        ("masd", "on SmolLM2 it is ShortGPT's set, on Gemma it is better: which one is your model?"),
        ("cosine", "it is the cheapest; on Gemma without six layers its set is broken."),
        ("mssd", "where the sigmoid saturates, it is ShortGPT; is it saturated on your model?"),
        ("sleb", "it wins where many layers go; is your text like ours, and can you afford the passes?"),
    ],
    why="Compare candidate sets on validation text of your own kind, and report on text that chose nothing.",
)
