"""Every choice of alpha, the balance of similarity and difference.

A layer's importance is linear in alpha (Eq. 7), from I_sim at 0 to I_diff at 1. So the ranking changes only
where two layers' lines cross, the sets that any alpha can choose can be listed without evaluating one, and
perplexity over alpha is a step function.
"""

from fractions import Fraction
from itertools import combinations
from math import comb

import numpy as np
import pandas as pd

PATH = ["n_remove", "low", "high", "removed", "degenerate", "n_tied"]  # columns of an alpha path


def trace_path(i_sim: np.ndarray, i_diff: np.ndarray) -> pd.DataFrame:
    """Every set that some alpha in [0, 1] chooses, for every number of layers, in exact arithmetic.

    The float64 scores are taken as the rational numbers that they are; crossings are compared as fractions,
    so that nearly equal lines give no set that is not there and lose none. Between two crossings the order
    of the lines does not change: sorting them at every crossing and just above it finds every set. A set's
    alphas form one interval.

    Ties go to the earlier layer, as in `choose_removed`. At a crossing of two lines that gives the set of one
    side. Where three or more meet, or at the ends of [0, 1], it can give a set of neither side: a row of its
    own, `degenerate`, with low = high.

    Args:
        i_sim, i_diff: finite scores per layer [n_layers], at alpha 0 and at alpha 1 (Eq. 7).

    Returns:
        one row per set, by n_remove (1 to n_layers - 1), then alpha: n_remove, low, high (float64, the
        interval's ends), removed (a sorted list), degenerate (bool), n_tied (how many sets a different
        tie-break could choose in its place on the whole interval, itself included: 1 = no tie).
    """
    lines = exact_lines(i_sim, i_diff)
    layers = range(len(lines))
    crossings = {Fraction(t - s, d - e) for (s, d), (t, e) in combinations(lines, 2) if d != e}
    zero, one = Fraction(0), Fraction(1)
    since = [zero] * len(lines)  # by n_remove: where its present set began
    rows: list[tuple] = []
    # sorting is stable: layers that are equal in all that is compared stay in order, the earlier first
    below = sorted(layers, key=lambda i: lines[i])  # by height at 0, then slope: the order just above 0
    for alpha in [zero, *sorted(a for a in crossings if zero < a < one), one]:
        # start + slope * alpha, times the denominator of alpha, so that they stay whole numbers
        heights = [s * alpha.denominator + d * alpha.numerator for s, d in lines]
        here = sorted(layers, key=lambda i: heights[i])
        # of lines that meet here, the one of the smallest slope is the lowest from here on
        above = sorted(here, key=lambda i: (heights[i], lines[i][1])) if alpha < one else below
        # before the first and after the last place that differs, all three orders choose the same set
        moved = [place for place in layers if not below[place] == here[place] == above[place]]
        for n in range(moved[0] + 1, moved[-1] + 1) if moved else []:
            old, tied, new = (set(order[:n]) for order in (below, here, above))
            if new != old:
                rows.append((n, since[n], alpha, sorted(old), False, _count_tied(below, n, lines)))
                since[n] = alpha
            if tied not in (old, new):
                rows.append((n, alpha, alpha, sorted(tied), True, _count_tied(here, n, heights)))
        below = above
    rows += [(n, since[n], one, sorted(below[:n]), False, _count_tied(below, n, lines)) for n in layers[1:]]
    table = pd.DataFrame(sorted(rows), columns=PATH)
    return table.astype({"low": float, "high": float})


def _count_tied(order: list[int], n: int, level: list) -> int:
    """How many sets rank as low as the order's first n: any choice among the layers level with the n-th."""
    tied = [level[i] == level[order[n - 1]] for i in order]
    return comb(sum(tied), sum(tied[:n]))


def exact_lines(i_sim: np.ndarray, i_diff: np.ndarray) -> list[tuple[int, int]]:
    """(start, slope) of every line as whole numbers: floats are whole over powers of 2, so one scale does."""
    ends = [[Fraction(float(value)) for value in values] for values in (i_sim, i_diff)]
    scale = max(value.denominator for values in ends for value in values)
    start, end = ([int(value * scale) for value in values] for values in ends)
    return [(s, e - s) for s, e in zip(start, end, strict=True)]
