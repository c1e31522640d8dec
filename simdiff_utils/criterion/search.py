"""Searches that evaluate sets: one layer at a time, greedily, and Algorithm 1 of SimDiff."""

from collections.abc import Callable

import numpy as np
import pandas as pd

from simdiff_utils import SimDiffError, registry, require
from simdiff_utils.criterion.candidates import Candidate, Evidence
from simdiff_utils.criterion.cuts import Cuts
from simdiff_utils.criterion.equations import choose_removed, fuse
from simdiff_utils.criterion.race import Evaluator


def leave_one_out(evaluator: Evaluator) -> np.ndarray:
    """Losses without each single layer, float64 [n_layers, n_blocks]."""
    return evaluator.losses([frozenset({layer_idx}) for layer_idx in range(evaluator.n_layers)])


def one_shot_scores(evaluator: Evaluator) -> np.ndarray:
    """Mean loss without each single layer, float64 [n_layers] (Shortened-LLM, arXiv:2402.02834)."""
    return leave_one_out(evaluator).mean(1)


def greedy(
    evaluator: Evaluator,
    n_remove: int,
    protected: frozenset[int] = frozenset(),
    cuts: Cuts | None = None,
    **race,
) -> list[int]:
    """Remove, one after another, the layer whose loss over the blocks is smallest without it (SLEB's search).

    Args:
        n_remove: layers to remove.
        protected: never removed (SLEB: the first and the last).
        cuts: the sets of n_remove layers that may be removed; None: all.
        race: as in `Evaluator.race`, for each step; `exact=True` evaluates every candidate in full.

    Returns:
        layers in the order of removal: the first k are the search's answer for k layers.
    """
    if n_remove > evaluator.n_layers - max(1, len(protected)):
        raise SimDiffError(
            f"cannot remove {n_remove} of {evaluator.n_layers} layers while {len(protected)} are "
            "protected; one has to stay: remove or protect fewer."
        )
    chosen: list[int] = []
    for step in range(n_remove):
        tried = next_sets(evaluator, chosen, n_remove, protected, cuts)
        chosen += evaluator.race({step: tried}, **race).winners[step] - {*chosen}
    return chosen


def next_sets(
    evaluator: Evaluator, chosen: list[int], n_remove: int, protected: frozenset[int], cuts: Cuts | None
) -> list[frozenset[int]]:
    """The sets of one more layer from which n_remove can still be reached."""
    left = [i for i in range(evaluator.n_layers) if i not in {*chosen, *protected}]
    tried = [frozenset({*chosen, layer_idx}) for layer_idx in left]
    if cuts:
        tried = [removed for removed in tried if cuts.completes(removed, n_remove, protected)]
    require(
        tried,
        f"no {n_remove} layers keep the pattern and hold none of {sorted(protected)}: "
        "remove another number, or choose a criterion that protects none.",
    )
    return tried


def sleb_sets(evidence: Evidence, n_remove: int) -> list[Candidate]:
    """SLEB (arXiv:2402.09025): the set that greedy removal reaches."""
    protected = registry.find("sleb").protected(evidence.n_layers)
    race = {"confidence": evidence.confidence, "exact": evidence.exact}
    return [
        Candidate(frozenset(greedy(evidence.evaluator(), n_remove, protected, evidence.cuts, **race)), "sleb")
    ]


def search_ternary(
    i_sim: np.ndarray,
    i_diff: np.ndarray,
    n_remove: int,
    evaluate: Callable[[frozenset[int]], float],
    eps: float = 0.01,
    max_iterations: int = 50,
    remember: bool = True,
    choose: Callable[[np.ndarray, int], frozenset[int]] = choose_removed,
) -> pd.DataFrame:
    """Algorithm 1 of SimDiff: narrow [0, 1] by thirds towards the alpha of lower perplexity.

    Perplexity over alpha is a step function and need not be unimodal, so the search can miss the best set.

    Args:
        i_sim, i_diff: normalised measurements per layer [n_layers] (Eq. 6; Eq. 5).
        n_remove: layers to remove.
        evaluate: perplexity of the model without a set of layers.
        eps: stop when the interval is no longer than this (not published).
        max_iterations: stop after as many rounds of two probes (not published).
        remember: evaluate each distinct set once; else every probe, as published.
        choose: importance and n_remove -> the set removed (Eq. 8 and 9).

    Returns:
        one row per probe: alpha, perplexity, removed (a sorted list), repeated (set seen before). The
        search's answer is the first row of lowest perplexity.
    """
    known: dict[frozenset[int], float] = {}
    probes: list[dict] = []

    def probe(alpha: float) -> float:
        removed = choose(fuse(i_sim, i_diff, alpha), n_remove)
        repeated = removed in known
        if not (repeated and remember):
            known[removed] = evaluate(removed)
        probes.append(
            {"alpha": alpha, "perplexity": known[removed], "removed": sorted(removed), "repeated": repeated}
        )
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
    return pd.DataFrame(probes)
