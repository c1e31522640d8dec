"""Choosing alpha, the balance between similarity and difference (SimDiff, Algorithm 1)."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import pandas as pd

from simdiff_utils.criteria import choose_removed, fuse


@dataclass(frozen=True)
class AlphaSearch:
    """What a search found: the best alpha probed, its set, and every probe.

    Attributes:
        alpha: in [0, 1]; the first probe that reached the lowest perplexity.
        removed: layers to remove, 0-based.
        perplexity: of the model without them.
        probes: one row per probe: alpha, perplexity, removed (a sorted list), repeated (set seen before).
    """

    alpha: float
    removed: frozenset[int]
    perplexity: float
    probes: pd.DataFrame


def search_ternary(l_sim: np.ndarray, l_diff: np.ndarray, n_remove: int,
                   evaluate: Callable[[frozenset[int]], float],
                   eps: float = 0.01, max_iterations: int = 50) -> AlphaSearch:
    """Algorithm 1: narrow [0, 1] by thirds towards the alpha of lower perplexity, keep the best alpha seen.

    Perplexity over alpha is a step function and need not be unimodal, so the search can miss the best set.

    Args:
        l_sim, l_diff: raw measurements per layer [n_layers] (Eq. 2; Eq. 3 or 4).
        n_remove: layers to remove.
        evaluate: perplexity of the model without a set of layers; called once per distinct set.
        eps: stop when the interval is no longer than this (not published).
        max_iterations: stop after as many halvings by thirds (not published).
    """
    known: dict[frozenset[int], float] = {}
    probes: list[dict] = []

    def probe(alpha: float) -> float:
        removed = choose_removed(fuse(l_sim, l_diff, alpha), n_remove)
        repeated = removed in known
        if not repeated:
            known[removed] = evaluate(removed)
        probes.append({"alpha": alpha, "perplexity": known[removed], "removed": sorted(removed), "repeated": repeated})
        return known[removed]

    left, right = 0.0, 1.0
    for _ in range(max_iterations):
        if right - left <= eps:
            break
        m1 = left + (right - left) / 3
        m2 = right - (right - left) / 3
        if probe(m1) > probe(m2):
            left = m1
        else:
            right = m2
    best = min(probes, key=lambda p: p["perplexity"])  # min keeps the first of equals
    return AlphaSearch(best["alpha"], frozenset(best["removed"]), best["perplexity"], pd.DataFrame(probes))
