"""Which sets of layers may be removed at all, and the lowest of them: all, those without a protected layer,
or those that keep a pattern.

Some families alternate kinds of layers (Gemma 3: five with sliding attention, one with full), and tools that
know the pattern by heart (llama.cpp) read a cut model right only where its layers repeat it.
"""

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from fractions import Fraction

import numpy as np
import pandas as pd

from simdiff_utils import require
from simdiff_utils.criterion.alpha import PATH, exact_lines, trace_path
from simdiff_utils.criterion.equations import choose_removed


@dataclass(frozen=True)
class Cuts:
    """The sets that may be removed: the layers that stay are, place by place, of the kinds that the dense
    model has there. The last layers always may.

    Attributes:
        kinds: a whole number a layer, the same for layers of one kind (`surgery.layer_kinds`); where all are
            the same, there is no pattern to keep.
        protected: layers that always stay, 0-based.
    """

    kinds: tuple[int, ...]
    protected: frozenset[int] = frozenset()

    @property
    def _no_pattern(self) -> bool:
        return len(set(self.kinds)) == 1

    @property
    def _free(self) -> list[int]:
        """Layers that may go."""
        return [layer_idx for layer_idx in range(len(self.kinds)) if layer_idx not in self.protected]

    def allows(self, removed: Collection[int]) -> bool:
        """Whether a set, 0-based, may be removed."""
        kept = [kind for layer_idx, kind in enumerate(self.kinds) if layer_idx not in removed]
        return tuple(kept) == self.kinds[: len(kept)] and self.protected.isdisjoint(removed)

    def check(self, n_remove: int) -> None:
        """Refuse a number of layers of which no set may be removed."""
        protected = f" while layers {sorted(self.protected)} are protected" if self.protected else ""
        pattern = "" if self._no_pattern else " and the pattern is kept"
        require(
            self._lowest([0] * len(self.kinds), n_remove),
            f"cannot remove {n_remove} of {len(self.kinds)} layers{protected}{pattern}: remove fewer, or "
            "protect fewer.",
        )

    def lowest(self, scores: Sequence, n_remove: int) -> frozenset[int]:
        """The set of n_remove layers whose scores add up to least; ties go to the earlier layer.

        Without a pattern that is Eq. 8 and 9, see `choose_removed`; with one, a shortest path.

        Args:
            scores: a number a layer, of any kind that adds and compares.

        Raises:
            SimDiffError: see `check`.
        """
        self.check(n_remove)
        return self._lowest(scores, n_remove)

    def _lowest(self, scores: Sequence, n_remove: int) -> frozenset[int] | None:
        if not self._no_pattern:
            found = self._shortest(scores, n_remove)
            return found and found[0]
        free = self._free
        if n_remove > min(len(free), len(self.kinds) - 1):
            return None
        places = choose_removed([scores[layer_idx] for layer_idx in free], n_remove)
        return frozenset(free[place] for place in places)

    def completes(self, removed: frozenset[int], n_remove: int, protected: frozenset[int]) -> bool:
        """Whether some set of n_remove layers that may go holds all of `removed` and none of `protected`."""
        wanted = np.zeros(len(self.kinds))
        wanted[list(removed)], wanted[list(protected)] = -1, 1
        found = self._lowest(wanted, n_remove)
        return found is not None and removed <= found and not protected & found

    def trace_path(self, i_sim: np.ndarray, i_diff: np.ndarray) -> pd.DataFrame:
        """The table of `alpha.trace_path`, of the sets that may be removed.

        A set's sum of importances is linear in alpha, too, and the sets that some alpha chooses are the lower
        envelope of these lines: where the best sets at two alphas cross, either a third is lower (and the
        search goes on to both sides) or nothing lies between them (Eisner and Severance, 1976).
        """
        return self._trace_free(i_sim, i_diff) if self._no_pattern else self._trace_pattern(i_sim, i_diff)

    def _trace_free(self, i_sim: np.ndarray, i_diff: np.ndarray) -> pd.DataFrame:
        free = self._free
        path = trace_path(np.asarray(i_sim)[free], np.asarray(i_diff)[free])
        path["removed"] = [[free[place] for place in places] for places in path["removed"]]
        if self.protected:  # these stay: all others may go at once
            path = pd.concat([path, pd.DataFrame([(len(free), 0.0, 1.0, free, False, 1)], columns=PATH)])
        return path.reset_index(drop=True)

    def _trace_pattern(self, i_sim: np.ndarray, i_diff: np.ndarray) -> pd.DataFrame:
        lines, rows = exact_lines(i_sim, i_diff), []
        for n_remove in range(1, len(lines)):
            if not self._shortest([0] * len(lines), n_remove):
                continue

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

    def _shortest(self, scores: Sequence, n_remove: int) -> tuple[frozenset[int], int] | None:
        """The lowest set, and how many sets are as low; None: no set may go."""
        # ways[n]: sum, layers and number of sets, of what can go from a layer on when n before it are gone
        ways = {n_remove: (0, (), 1)}
        for layer_idx in reversed(range(len(self.kinds))):
            further = {}
            for n_gone in range(min(layer_idx, n_remove) + 1):
                options = []
                if n_gone + 1 in ways and layer_idx not in self.protected:
                    total, removed, n_tied = ways[n_gone + 1]
                    options.append((scores[layer_idx] + total, (layer_idx, *removed), n_tied))
                if n_gone in ways and self.kinds[layer_idx] == self.kinds[layer_idx - n_gone]:
                    options.append(ways[n_gone])
                if options:
                    total, removed, _ = min(options)
                    tied = sum(option[2] for option in options if option[0] == total)
                    further[n_gone] = (total, removed, tied)
            ways = further
        return (frozenset(ways[0][1]), ways[0][2]) if 0 in ways else None
