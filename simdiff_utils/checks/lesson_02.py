"""Exercises of notebook 02: ranking, crossings, what a search sees, and saturation."""

import math

import numpy as np

from simdiff_utils.checks import Exercise

_IMPORTANCE = [
    (np.array([0.4, 0.1, 0.3, 0.2, 0.9]), 2),
    (np.array([0.5, 0.5, 0.1, 0.5]), 2),
    (np.array([0.3, 0.1] * 20), 27),  # many ties: an unstable sort mixes them up
]


def _order(importance: np.ndarray) -> np.ndarray:
    return np.argsort(importance, kind="stable")


choose_removed = Exercise(
    right=lambda importance, k: {int(i) for i in _order(importance)[:k]},
    cases=_IMPORTANCE,
    mistakes=[
        (
            lambda x, k: {int(i) for i in _order(x)[-k:]},
            "these are the most important layers; the least important go.",
        ),
        (lambda x, k: {float(v) for v in np.sort(x)[:k]}, "these are importances, not layers: use argsort."),
        (lambda x, k: {int(i) + 1 for i in _order(x)[:k]}, "layers are counted from 0."),
        (lambda x, k: {int(i) for i in _order(x)[k:]}, "these are the layers that stay."),
        (
            lambda x, k: {len(x) - 1 - int(i) for i in _order(x[::-1])[:k]},
            "on a tie the earlier layer goes first: sort stably.",
        ),
    ],
)


def _crossing(a: tuple[float, float], b: tuple[float, float]) -> float:
    """Where the lines from a[0] to a[1] and from b[0] to b[1] meet."""
    return (b[0] - a[0]) / ((a[1] - a[0]) - (b[1] - b[0]))


# two layers, each (I_sim, I_diff): the alpha at which they are equally important
crossing = Exercise(
    right=_crossing,
    cases=[((0.1, 0.9), (0.3, 0.6)), ((0.02, 0.8), (0.05, 0.55)), ((0.1, 0.5), (0.2, 0.9))],
    mistakes=[
        (
            lambda a, b: -_crossing(a, b),
            "the sign is turned: at alpha 0 the second layer is higher, and the first climbs faster.",
        ),
        (lambda a, b: (b[0] - a[0]) / (a[1] - b[1]), "the slope of a line is I_diff - I_sim, not I_diff."),
        (
            lambda a, b: a[0] + (a[1] - a[0]) * _crossing(a, b),
            "this is the importance at the crossing, not alpha.",
        ),
        (lambda a, b: 1 - _crossing(a, b), "this is 1 - alpha: Eq. 7 gives alpha to I_diff."),
        (
            lambda a, b: 1 / _crossing(a, b),
            "this is upside down: the distance at alpha 0 goes above the difference of slopes.",
        ),
    ],
)

# I_sim in [0, 1], I_diff in [0.5, 1): a float64 sigmoid is exactly 1 from which whole number on?
saturated_from = Exercise(
    right=lambda: next(x for x in range(100) if 1 / (1 + math.exp(-x)) == 1),
    cases=[()],
    mistakes=[
        (lambda: 17, "that is where float32 saturates (16.6); the package computes in float64."),
        (lambda: 16, "exp(-x) has to fall below half the spacing of floats at 1, which is about 1e-16."),
        (lambda: 7, "that is where bfloat16 saturates."),
        (lambda: 6, "that is where bfloat16 saturates."),
        (lambda: 746, "exp underflows there, far above: the 1 that is added swallows it long before."),
        (lambda: 36, "close: at 36 one bit still differs."),
    ],
    why="MSSD is a sum over hundreds of numbers. From 37 on it no longer tells layers apart.",
)

# how many evaluations does Algorithm 1 make until the interval is no longer than 0.01?
probes_of_ternary_search = Exercise(
    right=2 * math.ceil(math.log(0.01) / math.log(2 / 3)),
    mistakes=[
        (math.ceil(math.log(0.01) / math.log(2 / 3)), "each round has two probes."),
        (2 * math.ceil(math.log(0.01) / math.log(1 / 3)), "each round keeps two thirds, not one third."),
        (2 * math.ceil(math.log(0.01) / math.log(1 / 2)), "that would be halving; a round keeps two thirds."),
        (
            2 * math.floor(math.log(0.01) / math.log(2 / 3)),
            "the interval has to be no longer than 0.01: one more round.",
        ),
        (100, "that is a grid of steps of 0.01."),
    ],
    why="And there are rarely more than ten different sets: most probes measure a set again.",
)

# a staircase over alpha with two valleys: does the search of Algorithm 1 find the lowest step of it?
ternary_misses = Exercise(
    right="no",
    mistakes=[
        ("yes", "its first two probes decide which third is thrown away, and the lowest step may lie there.")
    ],
    why="Ternary search is right for one valley. A staircase may have several.",
)
