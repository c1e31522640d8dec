"""Choosing alpha, the balance between similarity and difference: the published search, and every choice there
is.

A layer's importance is linear in alpha (Eq. 7), from I_sim at 0 to I_diff at 1. So the ranking changes only
where two layers' lines cross, the sets that any alpha can choose can be listed without evaluating one, and
perplexity over alpha is a step function.
"""

from collections import defaultdict
from fractions import Fraction
from itertools import combinations
from math import comb

import numpy as np
import pandas as pd


def trace_path(i_sim: np.ndarray, i_diff: np.ndarray) -> pd.DataFrame:
    """Every set that some alpha in [0, 1] chooses, for every number of layers, in exact arithmetic.

    The float64 scores are taken as the rational numbers that they are; crossings are compared as fractions,
    so that nearly equal lines give no set that is not there and lose none. Lines are swept from alpha 0 to 1,
    and at each crossing the neighbours that meet there change places. Every set's alphas form one interval.

    Ties go to the earlier layer, as in `choose_removed`. At a crossing of two lines that gives the set of one
    side. Where three or more meet, or at the ends of [0, 1], it can give a set of neither side: a row of its
    own, `degenerate`, with low = high.

    Args:
        i_sim, i_diff: finite scores per layer [n_layers], at alpha 0 and at alpha 1.

    Returns:
        one row per set, by n_remove (1 to n_layers - 1), then alpha: n_remove, low, high (float64, the
        interval's ends), removed (a sorted list), degenerate (bool), n_tied (how many sets a different
        tie-break could choose in its place on the whole interval, itself included: 1 = no tie).
    """
    start, slope = _exact_lines(i_sim, i_diff)
    n_layers = len(start)
    meeting: dict[Fraction, set[int]] = defaultdict(set)
    for i, j in combinations(range(n_layers), 2):
        if slope[i] != slope[j]:
            alpha = Fraction(start[j] - start[i], slope[i] - slope[j])
            if 0 < alpha < 1:
                meeting[alpha] |= {i, j}
    order = sorted(range(n_layers), key=lambda i: (start[i], slope[i], i))
    sweep = _Sweep(order, list(zip(start, slope, strict=True)))
    sweep.note_ties(Fraction(0), _tied_runs(order, start))
    for alpha in sorted(meeting):
        heights = [s * alpha.denominator + d * alpha.numerator for s, d in zip(start, slope, strict=True)]
        runs = _tied_runs(order, heights, sorted(order.index(i) for i in meeting[alpha]))
        sweep.note_ties(alpha, runs)
        for first, run in runs:
            sweep.swap(alpha, first, sorted(run, key=lambda i: (slope[i], i)))
    sweep.note_ties(Fraction(1), _tied_runs(order, [s + d for s, d in zip(start, slope, strict=True)]))
    return sweep.table()


class _Sweep:
    """The order of the lines as alpha grows, and the sets that it has given on the way."""

    def __init__(self, order: list[int], lines: list[tuple]) -> None:
        self.order, self._lines, self._rows = order, lines, []
        self._since = [Fraction(0)] * len(order)  # by n_remove: where the present set began

    def note_ties(self, alpha: Fraction, runs: list[tuple[int, list[int]]]) -> None:
        """Add the sets that the tie-break gives at this alpha alone."""
        for first, run in runs:
            before = self.order[first : first + len(run)]
            after = sorted(run, key=lambda i: (self._lines[i][1], i))
            for n in range(1, len(run)):
                chosen = set(sorted(run)[:n])
                neighbours = [
                    set(side[:n]) for side, inside in ((before, alpha > 0), (after, alpha < 1)) if inside
                ]
                if chosen not in neighbours:
                    self._add(first + n, alpha, alpha, {*self.order[:first], *chosen}, comb(len(run), n))

    def swap(self, alpha: Fraction, first: int, run: list[int]) -> None:
        """Put the lines that meet at this alpha into the order that they have above it."""
        for n_remove in range(first + 1, first + len(run)):
            self._close(n_remove, alpha)
        self.order[first : first + len(run)] = run

    def table(self) -> pd.DataFrame:
        for n_remove in range(1, len(self.order)):
            self._close(n_remove, Fraction(1))
        rows = sorted(self._rows, key=lambda row: (row["n_remove"], row["low"], row["high"]))
        table = pd.DataFrame(rows, columns=["n_remove", "low", "high", "removed", "degenerate", "n_tied"])
        return table.astype({"low": float, "high": float})

    def _close(self, n_remove: int, alpha: Fraction) -> None:
        line = self._lines[self.order[n_remove - 1]]
        same = [
            n for n, i in enumerate(self.order) if self._lines[i] == line
        ]  # lines that are one and the same
        n_tied = comb(len(same), sum(n < n_remove for n in same))
        self._add(n_remove, self._since[n_remove], alpha, set(self.order[:n_remove]), n_tied)
        self._since[n_remove] = alpha

    def _add(self, n_remove: int, low: Fraction, high: Fraction, removed: set[int], n_tied: int) -> None:
        self._rows.append(
            {
                "n_remove": n_remove,
                "low": low,
                "high": high,
                "removed": sorted(removed),
                "degenerate": low == high,
                "n_tied": n_tied,
            }
        )


def _exact_lines(i_sim: np.ndarray, i_diff: np.ndarray) -> tuple[list[int], list[int]]:
    """Start and slope of every line as whole numbers: floats are multiples of powers of two, so one scale
    fits all."""
    ends = [[Fraction(float(value)) for value in values] for values in (i_sim, i_diff)]
    scale = max(value.denominator for values in ends for value in values)
    start, end = ([int(value * scale) for value in values] for values in ends)
    return start, [e - s for s, e in zip(start, end, strict=True)]


def _tied_runs(
    order: list[int], heights: list[int], positions: list[int] | None = None
) -> list[tuple[int, list[int]]]:
    """Neighbours in the order that are equally high: (first position, layers), for runs of two and more.

    Args:
        positions: where to look, ascending; None: everywhere.
    """
    runs: list[tuple[int, list[int]]] = []
    end = 0
    for first in positions if positions is not None else range(len(order)):
        if first < end:
            continue
        while first and heights[order[first - 1]] == heights[order[first]]:
            first -= 1
        end = first + 1
        while end < len(order) and heights[order[end]] == heights[order[first]]:
            end += 1
        if end - first > 1:
            runs.append((first, order[first:end]))
    return runs
