"""The registry of methods: name -> candidate sets of layers, SimDiff's forms, the peers and the portfolio
alike.

A method that has one candidate has chosen; of several, the one of lowest validation perplexity is taken.
"""

from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import pandas as pd
from torch import Tensor

from simdiff_utils.capture.statistics import LayerStatistics
from simdiff_utils.criterion import laco, peers
from simdiff_utils.criterion.alpha import trace_path
from simdiff_utils.criterion.equations import (
    FORMS,
    PUBLISHED_FORMS,
    choose_removed,
    count_saturated,
    normalise,
)
from simdiff_utils.criterion.race import Evaluator
from simdiff_utils.criterion.search import greedy, leave_one_out
from simdiff_utils.engine.decoder import Decoder
from simdiff_utils.engine.surgery import Merge
from simdiff_utils.settings import SimDiffError

N_BLOCKS = 3  # contiguous blocks that the portfolio tries


@dataclass(frozen=True)
class Candidate:
    """A set of layers to remove.

    Attributes:
        removed: 0-based layer indices.
        proposed_by: the method, or the part of the portfolio.
        low, high: the interval of alpha that chooses it; NaN where no alpha is involved.
        n_tied: sets that another tie-break could choose in its place, itself included.
        merges: weights folded into layers that stay before the others go (LaCo alone).
        n_models: models that had to be run to propose it, beyond what `Method.passes` counts.
    """

    removed: frozenset[int]
    proposed_by: str
    low: float = float("nan")
    high: float = float("nan")
    n_tied: int = 1
    merges: tuple[Merge, ...] = ()
    n_models: int = 0


def _not_given() -> None:
    raise SimDiffError(
        "this method looks at more than the layer statistics: give Evidence the decoder, the "
        "calibration blocks and the evaluator as well."
    )


@dataclass(frozen=True)
class Evidence:
    """All that a method may look at. What is costly to have is a function, called only by methods that need
    it.

    Attributes:
        statistics: of one pass over the calibration samples.
        decoder: the model.
        calibration: token ids [n_samples, seq_len].
        evaluator: losses of any set of layers on validation text.
        seed: of what is drawn at random.
        confidence, exact: of a search's races, see `Evaluator.race`.
    """

    statistics: LayerStatistics
    decoder: Callable[[], Decoder] = field(default=_not_given, repr=False)
    calibration: Callable[[], Tensor] = field(default=_not_given, repr=False)
    evaluator: Callable[[], Evaluator] = field(default=_not_given, repr=False)
    seed: int = 0
    confidence: float = 0.99
    exact: bool = False

    @property
    def n_layers(self) -> int:
        """Decoder layers of the model."""
        return self.statistics.by_position.shape[1]


Proposal = Callable[[Evidence, int], list[Candidate]]


@dataclass(frozen=True)
class Method:
    """How candidates are proposed, and what that costs.

    Attributes:
        label, source: for tables and pictures.
        propose: (evidence, n_remove) -> candidates.
        passes: (n_layers, n_remove) -> passes of the model over its calibration or validation text before
            anything is compared; candidates that have to be compared cost one more each (`count_passes`).
        gradients: whether passes take gradients (a forward and a backward count as three).
        protected: n_layers -> layers that are never removed.
        n_seeds: how many draws a comparison shows.
    """

    label: str
    source: str
    propose: Proposal
    passes: Callable[[int, int], int] = lambda n_layers, n_remove: 1
    gradients: bool = False
    protected: Callable[[int], frozenset[int]] = lambda n_layers: frozenset()
    n_seeds: int = 1


def count_passes(method: Method, candidates: list[Candidate], n_layers: int, n_remove: int) -> int:
    """Passes that finding the set takes, as the peers' papers count them: each over all of its text, none
    shared."""
    n_compared = len({candidate.removed for candidate in candidates})
    return (
        method.passes(n_layers, n_remove)
        + max(candidate.n_models for candidate in candidates)
        + (n_compared if n_compared > 1 else 0)
    )


def alpha_path(statistics: LayerStatistics, form: str) -> pd.DataFrame:
    """`trace_path` of a form of SimDiff on captured statistics."""
    return trace_path(*normalise(statistics.table(), form))


def summarise_forms(statistics: LayerStatistics, grid: list[int]) -> pd.DataFrame:
    """What each form of SimDiff can choose at all on these statistics.

    Returns:
        one row per form: saturated (layers whose I_diff is exactly 1 in float64; 0 for forms without a
        sigmoid), for every number of layers K in `grid` a column "sets, K=..." (how many sets some alpha
        chooses, exact ties included), and shortgpt: True where, for every K in the grid, no alpha below 1
        chooses any set but that of cosine distance alone.
    """
    rows = []
    for form in FORMS:
        path = alpha_path(statistics, form)
        path = path[path["n_remove"].isin(grid)]
        saturated = count_saturated(statistics.table()[form]) if form in PUBLISHED_FORMS else 0
        rows.append(
            {
                "form": form,
                "saturated": saturated,
                **{f"sets, K={k}": int((path["n_remove"] == k).sum()) for k in grid},
                "shortgpt": bool(((path["low"] == 0) & (path["high"] == 1) | (path["low"] == 1)).all()),
            }
        )
    return pd.DataFrame(rows)


def _propose_path(form: str) -> Proposal:
    def propose(evidence: Evidence, n_remove: int) -> list[Candidate]:
        path = alpha_path(evidence.statistics, form)
        return [
            Candidate(frozenset(row.removed), form, row.low, row.high, row.n_tied)
            for row in path[path["n_remove"] == n_remove].itertuples()
        ]

    return propose


def _propose_lowest(name: str, score: Callable[[Evidence], np.ndarray]) -> Proposal:
    """The layers of smallest score that the method does not protect; ties go to the earlier layer."""

    def propose(evidence: Evidence, n_remove: int) -> list[Candidate]:
        n_layers, protected = evidence.n_layers, sorted(METHODS[name].protected(evidence.n_layers))
        if n_remove > n_layers - len(protected):
            raise SimDiffError(
                f"{name} protects layers {protected} of {n_layers} and cannot remove {n_remove}: "
                "remove fewer, or choose another method."
            )
        scores = np.array(score(evidence), dtype=np.float64)
        if not np.isfinite(scores).all():
            raise SimDiffError(
                f"{name} gives layer {int(np.isfinite(scores).argmin())} a score that is not finite; "
                'run with dtype="float32".'
            )
        scores[protected] = np.inf
        return [Candidate(choose_removed(scores, n_remove), name)]

    return propose


def _propose_blocks(n_blocks: int) -> Proposal:
    """Contiguous blocks over which the last token's state turns least, best first."""

    def propose(evidence: Evidence, n_remove: int) -> list[Candidate]:
        turned = evidence.statistics.angular_distance.diagonal(
            n_remove
        )  # [n_layers - n_remove + 1], by first layer
        return [
            Candidate(frozenset(range(first, first + n_remove)), "angular")
            for first in map(int, turned.argsort(kind="stable")[:n_blocks])
        ]

    return propose


def _propose_tail(evidence: Evidence, n_remove: int) -> list[Candidate]:
    return [Candidate(frozenset(range(evidence.n_layers - n_remove, evidence.n_layers)), "tail")]


def _propose_random(evidence: Evidence, n_remove: int) -> list[Candidate]:
    drawn = np.random.default_rng(evidence.seed).permutation(
        evidence.n_layers
    )  # a smaller set lies in a larger one
    return [Candidate(frozenset(map(int, drawn[:n_remove])), "random")]


def _propose_windows(evidence: Evidence, n_remove: int) -> list[Candidate]:
    """Every contiguous block: the losses decide."""
    return [
        Candidate(frozenset(range(first, first + n_remove)), "window")
        for first in range(evidence.n_layers - n_remove + 1)
    ]


def _propose_sleb(evidence: Evidence, n_remove: int) -> list[Candidate]:
    protected = METHODS["sleb"].protected(evidence.n_layers)
    removed = greedy(
        evidence.evaluator(), n_remove, protected, confidence=evidence.confidence, exact=evidence.exact
    )
    return [Candidate(frozenset(removed), "sleb")]


def _propose_laco(evidence: Evidence, n_remove: int) -> list[Candidate]:
    merges, n_models = laco.merge_layers(evidence.decoder(), evidence.calibration()[: laco.N_LACO], n_remove)
    return [
        Candidate(
            frozenset(layer_idx for _, folded in merges for layer_idx in folded),
            "laco",
            merges=merges,
            n_models=n_models,
        )
    ]


def _propose_all(evidence: Evidence, n_remove: int) -> list[Candidate]:
    """Union of the alpha paths of every form (each holds ShortGPT's set at alpha 0), a few blocks, and the
    tail."""
    proposals = [*map(_propose_path, FORMS), _propose_blocks(N_BLOCKS), _propose_tail]
    every = [candidate for propose in proposals for candidate in propose(evidence, n_remove)]
    first: dict[frozenset[int], Candidate] = {}
    for candidate in every:
        first.setdefault(candidate.removed, candidate)
    return list(first.values())


def _no_pass(_n_layers: int, _n_remove: int) -> int:
    return 0


def _ends(n_first: int, n_last: int) -> Callable[[int], frozenset[int]]:
    return lambda n_layers: frozenset(i for i in range(n_layers) if i < n_first or i >= n_layers - n_last)


_SIMDIFF, _SHORTENED = "SimDiff, arXiv:2604.19520", "Shortened-LLM, arXiv:2402.02834"
METHODS: dict[str, Method] = {
    "cosine": Method(
        "cosine (ShortGPT)",
        "ShortGPT, arXiv:2403.03853",
        _propose_lowest("cosine", lambda evidence: evidence.statistics.table()["cosine_distance"]),
    ),
    **{form: Method(f"SimDiff-{form.upper()}", _SIMDIFF, _propose_path(form)) for form in PUBLISHED_FORMS},
    "log-mssd": Method("log-MSSD (ours)", "this workbook, after " + _SIMDIFF, _propose_path("log-mssd")),
    "relative": Method("relative (ours)", "this workbook, after " + _SIMDIFF, _propose_path("relative")),
    "portfolio": Method("portfolio (ours)", "this workbook", _propose_all),
    "angular": Method("angular block", "Gromov et al., arXiv:2403.17887", _propose_blocks(1)),
    "tail": Method("last layers", "none", _propose_tail, _no_pass),
    "random": Method("random", "none", _propose_random, _no_pass, n_seeds=3),
    "magnitude": Method(
        "magnitude (Mag+)",
        _SHORTENED,
        _propose_lowest("magnitude", lambda evidence: peers.magnitude_scores(evidence.decoder())),
        _no_pass,
        protected=_ends(4, 2),
    ),
    "taylor": Method(
        "Taylor+",
        _SHORTENED,
        _propose_lowest(
            "taylor",
            lambda evidence: peers.taylor_scores(
                evidence.decoder(), evidence.calibration()[: peers.N_TAYLOR]
            ),
        ),
        lambda n_layers, n_remove: 3,
        gradients=True,
        protected=_ends(4, 2),
    ),
    "one-shot": Method(
        "one-shot perplexity",
        _SHORTENED,
        _propose_lowest("one-shot", lambda evidence: leave_one_out(evidence.evaluator()).mean(1)),
        lambda n_layers, n_remove: n_layers,
    ),
    "sleb": Method(
        "SLEB (greedy)",
        "SLEB, arXiv:2402.09025",
        _propose_sleb,
        lambda n_layers, n_remove: sum(n_layers - step - 2 for step in range(n_remove)),
        protected=_ends(1, 1),
    ),
    "window": Method("best window", "AMD Quark", _propose_windows, _no_pass),
    "entrodrop": Method(
        "EntroDrop, per layer",
        "EntroDrop, arXiv:2504.03794",
        _propose_lowest(
            "entrodrop", lambda evidence: peers.entropy_increases(evidence.decoder(), evidence.calibration())
        ),
    ),
    "laco": Method("LaCo", "LaCo, arXiv:2402.11187", _propose_laco, _no_pass),
}
