"""Which sets of layers may be removed at all, and the lowest of them: all, or those that keep a pattern.

Some families alternate kinds of layers (Gemma 3: five with sliding attention, one with full), and tools that
know the pattern by heart (llama.cpp) read a cut model right only where its layers repeat it.
"""

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from fractions import Fraction

import numpy as np
import pandas as pd

from simdiff_utils.criterion.alpha import PATH, exact_lines, trace_path
from simdiff_utils.criterion.equations import choose_removed


@dataclass(frozen=True)
class Cuts:
    """The sets that may be removed: the layers that stay are, place by place, of the kinds that the dense
    model has there. The last layers always may.

    Attributes:
        kinds: a whole number a layer, the same for layers of one kind (`surgery.layer_kinds`); where all are
            the same, any set may be removed.
    """

    kinds: tuple[int, ...]

    @property
    def any_set(self) -> bool:
        """Whether there is no pattern to keep."""
        return len(set(self.kinds)) == 1

    def allows(self, removed: Collection[int]) -> bool:
        """Whether a set, 0-based, may be removed."""
        kept = [kind for layer_idx, kind in enumerate(self.kinds) if layer_idx not in removed]
        return tuple(kept) == self.kinds[: len(kept)]

    def lowest(self, scores: Sequence, n_remove: int) -> frozenset[int]:
        """The set of n_remove layers whose scores add up to least; ties go to the earlier layer.

        Without a pattern that is Eq. 8 and 9, see `choose_removed`; with one, a shortest path.

        Args:
            scores: a number a layer, of any kind that adds and compares.
        """
        return choose_removed(scores, n_remove) if self.any_set else self._shortest(scores, n_remove)[0]

    def completes(self, removed: frozenset[int], n_remove: int, protected: frozenset[int]) -> bool:
        """Whether some set of n_remove layers that may go holds all of `removed` and none of `protected`."""
        wanted = np.zeros(len(self.kinds))
        wanted[list(removed)], wanted[list(protected)] = -1, 1
        found = self.lowest(wanted, n_remove)
        return removed <= found and not protected & found

    def trace_path(self, i_sim: np.ndarray, i_diff: np.ndarray) -> pd.DataFrame:
        """The table of `alpha.trace_path`, of the sets that may be removed.

        A set's sum of importances is linear in alpha, too, and the sets that some alpha chooses are the lower
        envelope of these lines: where the best sets at two alphas cross, either a third is lower (and the
        search goes on to both sides) or nothing lies between them (Eisner and Severance, 1976).
        """
        if self.any_set:
            return trace_path(i_sim, i_diff)
        lines, rows = exact_lines(i_sim, i_diff), []
        for n_remove in range(1, len(lines)):

            def best(alpha: Fraction, n_remove: int = n_remove) -> tuple[frozenset[int], int]:
                return self._shortest([start + slope * alpha for start, slope in lines], n_remove)

            def height(removed: frozenset[int], alpha: Fraction) -> Fraction:
                return sum(lines[i][0] + lines[i][1] * alpha for i in removed)

            def crossings(left: frozenset[int], right: frozenset[int]) -> list[tuple]:
                """Of the sets from left to right, where each but the first begins: (alpha, set)."""
                rise = height(right, 1) - height(right, 0) - height(left, 1) + height(left, 0)
                if not rise:  # parallel lines, both the lowest somewhere: a tie everywhere
                    return []
                alpha = Fraction(height(left, 0) - height(right, 0), rise)
                middle = best(alpha)[0]
                if height(middle, alpha) == height(left, alpha):
                    return [(alpha, right)]
                return crossings(left, middle) + crossings(middle, right)

            zero, one = Fraction(0), Fraction(1)
            found = [(zero, best(zero)[0])]
            found += crossings(found[0][1], best(one)[0])
            ends = [alpha for alpha, _ in found[1:]] + [one]
            for (low, removed), high in zip(found, ends, strict=True):
                n_tied = best((low + high) / 2)[1]
                rows.append((n_remove, low, high, sorted(removed), low == high, n_tied))
        return pd.DataFrame(rows, columns=PATH).astype({"low": float, "high": float})

    def _shortest(self, scores: Sequence, n_remove: int) -> tuple[frozenset[int], int]:
        """The lowest set, and how many sets are as low."""
        # ways[n]: sum, layers and number of sets, of what can go from a layer on when n before it are gone
        ways = {n_remove: (0, (), 1)}
        for layer_idx in reversed(range(len(self.kinds))):
            further = {}
            for n_gone in range(min(layer_idx, n_remove) + 1):
                options = []
                if n_gone + 1 in ways:
                    total, removed, n_tied = ways[n_gone + 1]
                    options.append((scores[layer_idx] + total, (layer_idx, *removed), n_tied))
                if n_gone in ways and self.kinds[layer_idx] == self.kinds[layer_idx - n_gone]:
                    options.append(ways[n_gone])
                if options:
                    total, removed, _ = min(options)
                    tied = sum(option[2] for option in options if option[0] == total)
                    further[n_gone] = (total, removed, tied)
            ways = further
        return frozenset(ways[0][1]), ways[0][2]
