"""The registry of methods: name -> candidate sets of layers, from the one-pass statistics alone.

A method that has one candidate has chosen; of several, the one of lowest validation perplexity is taken.
"""

from collections.abc import Callable
from dataclasses import dataclass

import pandas as pd

from simdiff_utils.alpha import trace_path
from simdiff_utils.capture import LayerStatistics
from simdiff_utils.criteria import FORMS, PUBLISHED_FORMS, choose_removed, count_saturated, normalise

N_BLOCKS = 3  # contiguous blocks that the portfolio tries


@dataclass(frozen=True)
class Candidate:
    """A set of layers to remove.

    Attributes:
        removed: 0-based layer indices.
        proposed_by: the method, or the part of the portfolio.
        low, high: the interval of alpha that chooses it; NaN where no alpha is involved.
        n_tied: sets that another tie-break could choose in its place, itself included.
    """

    removed: frozenset[int]
    proposed_by: str
    low: float = float("nan")
    high: float = float("nan")
    n_tied: int = 1


Proposal = Callable[[LayerStatistics, int], list[Candidate]]


@dataclass(frozen=True)
class Method:
    """How candidates are proposed: `propose(statistics, n_remove)`, and the method's label and source."""

    label: str
    source: str
    propose: Proposal


def alpha_path(statistics: LayerStatistics, form: str) -> pd.DataFrame:
    """`trace_path` of a form of SimDiff on captured statistics."""
    return trace_path(*normalise(statistics.table(), form))


def summarise_forms(statistics: LayerStatistics, grid: list[int]) -> pd.DataFrame:
    """What each form of SimDiff can choose at all on these statistics.

    Returns:
        one row per form: saturated (layers whose I_diff is exactly 1 in float64; 0 for forms without a sigmoid), for
        every number of layers K in `grid` a column "sets, K=..." (how many sets some alpha chooses, exact ties
        included), and shortgpt: True where, for every K in the grid, no alpha below 1 chooses any set but that of
        cosine distance alone.
    """
    rows = []
    for form in FORMS:
        path = alpha_path(statistics, form)
        path = path[path["n_remove"].isin(grid)]
        saturated = count_saturated(statistics.table()[form]) if form in PUBLISHED_FORMS else 0
        rows.append({"form": form, "saturated": saturated,
                     **{f"sets, K={k}": int((path["n_remove"] == k).sum()) for k in grid},
                     "shortgpt": bool(((path["low"] == 0) & (path["high"] == 1) | (path["low"] == 1)).all())})
    return pd.DataFrame(rows)


def _propose_path(form: str) -> Proposal:
    def propose(statistics: LayerStatistics, n_remove: int) -> list[Candidate]:
        path = alpha_path(statistics, form)
        return [Candidate(frozenset(row.removed), form, row.low, row.high, row.n_tied)
                for row in path[path["n_remove"] == n_remove].itertuples()]
    return propose


def _propose_cosine(statistics: LayerStatistics, n_remove: int) -> list[Candidate]:
    """ShortGPT: the smallest cosine distances."""
    return [Candidate(choose_removed(statistics.table()["cosine_distance"].to_numpy(), n_remove), "cosine")]


def _propose_blocks(n_blocks: int) -> Proposal:
    """Contiguous blocks over which the last token's state turns least, best first."""
    def propose(statistics: LayerStatistics, n_remove: int) -> list[Candidate]:
        turned = statistics.angular_distance.diagonal(n_remove)  # [n_layers - n_remove + 1], by first layer
        return [Candidate(frozenset(range(first, first + n_remove)), "angular")
                for first in map(int, turned.argsort(kind="stable")[:n_blocks])]
    return propose


def _propose_tail(statistics: LayerStatistics, n_remove: int) -> list[Candidate]:
    n_layers = statistics.by_position.shape[1]
    return [Candidate(frozenset(range(n_layers - n_remove, n_layers)), "tail")]


def _propose_all(statistics: LayerStatistics, n_remove: int) -> list[Candidate]:
    """Union of the alpha paths of every form (each holds ShortGPT's set at alpha 0), a few blocks, and the tail."""
    proposals = [*map(_propose_path, FORMS), _propose_blocks(N_BLOCKS), _propose_tail]
    every = [candidate for propose in proposals for candidate in propose(statistics, n_remove)]
    first: dict[frozenset[int], Candidate] = {}
    for candidate in every:
        first.setdefault(candidate.removed, candidate)
    return list(first.values())


_SIMDIFF = "SimDiff, arXiv:2604.19520"
METHODS: dict[str, Method] = {
    "cosine": Method("cosine (ShortGPT)", "ShortGPT, arXiv:2403.03853", _propose_cosine),
    **{form: Method(f"SimDiff-{form.upper()}", _SIMDIFF, _propose_path(form)) for form in PUBLISHED_FORMS},
    "log-mssd": Method("log-MSSD (ours)", "this workbook, after " + _SIMDIFF, _propose_path("log-mssd")),
    "relative": Method("relative (ours)", "this workbook, after " + _SIMDIFF, _propose_path("relative")),
    "angular": Method("angular block", "Gromov et al., arXiv:2403.17887", _propose_blocks(1)),
    "tail": Method("last layers", "none", _propose_tail),
    "portfolio": Method("portfolio (ours)", "this workbook", _propose_all),
}
