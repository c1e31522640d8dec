"""Candidates: sets of layers that a criterion proposes, and the evidence that it may look at."""

from collections.abc import Callable, Collection
from dataclasses import dataclass, field

import numpy as np
import pandas as pd
from torch import Tensor

from simdiff_utils import SimDiffError
from simdiff_utils.capture.statistics import LayerStatistics
from simdiff_utils.criterion.cuts import Cuts
from simdiff_utils.criterion.equations import normalise
from simdiff_utils.criterion.race import Edit, Evaluator
from simdiff_utils.engine.decoder import Decoder


@dataclass(frozen=True)
class Candidate:
    """A set of layers to remove.

    Attributes:
        removed: 0-based layer indices.
        proposed_by: the criterion, or the part of the portfolio.
        low, high: the interval of alpha that chooses it; NaN where no alpha is involved.
        n_tied: sets that another tie-break could choose in its place, itself included.
        edit: what else is done to the model (LaCo folds layers into those that stay).
        n_models: models that had to be run to propose it, beyond what `Criterion.passes` counts.
    """

    removed: frozenset[int]
    proposed_by: str
    low: float = float("nan")
    high: float = float("nan")
    n_tied: int = 1
    edit: Edit | None = None
    n_models: int = 0


def _not_given() -> None:
    raise SimDiffError(
        "this criterion looks at more than the layer statistics: give Evidence the decoder, the calibration "
        "blocks and the evaluator as well."
    )


@dataclass(frozen=True)
class Evidence:
    """All that a criterion may look at. What is costly to have is a function, called only where it is needed.

    Attributes:
        statistics: of one pass over the calibration samples.
        decoder: the model.
        calibration: token ids [n_samples, seq_len].
        evaluator: losses of any set of layers on validation text.
        seed: of what is drawn at random.
        alpha: "auto", or the one alpha at which criteria that fuse two measurements rank.
        search: with alpha "auto": "path" for every set that some alpha chooses, "ternary" for Algorithm 1.
        eps, max_iterations: of the ternary search.
        confidence, exact: of a search's races, see `Evaluator.race`.
        protected: layers that always stay, 0-based.
        kinds: of the layers, where only sets that keep their pattern may be removed; (): any set may.
    """

    statistics: LayerStatistics
    decoder: Callable[[], Decoder] = field(default=_not_given, repr=False)
    calibration: Callable[[], Tensor] = field(default=_not_given, repr=False)
    evaluator: Callable[[], Evaluator] = field(default=_not_given, repr=False)
    seed: int = 0
    alpha: float | str = "auto"
    search: str = "path"
    eps: float = 0.01
    max_iterations: int = 50
    confidence: float = 0.99
    exact: bool = False
    protected: Collection[int] = ()
    kinds: tuple[int, ...] = ()
    _paths: dict[str, pd.DataFrame] = field(default_factory=dict, init=False, repr=False)
    _scores: dict[str, np.ndarray] = field(default_factory=dict, init=False, repr=False)

    @property
    def n_layers(self) -> int:
        """Decoder layers of the model."""
        return self.statistics.by_position.shape[1]

    def remember(self, criterion: str, score: Callable[[], np.ndarray]) -> np.ndarray:
        """Scores of the layers, which depend on no number of layers to remove: computed once."""
        if criterion not in self._scores:
            self._scores[criterion] = score()
        return self._scores[criterion].copy()

    @property
    def cuts(self) -> Cuts:
        """The sets that may be removed."""
        return Cuts(self.kinds or (0,) * self.n_layers, frozenset(self.protected))

    def alpha_path(self, criterion: str) -> pd.DataFrame:
        """Every set that some alpha chooses, for all n_remove, see `Cuts.trace_path`; computed once."""
        if criterion not in self._paths:
            self._paths[criterion] = self.cuts.trace_path(*normalise(self.statistics.table(), criterion))
        return self._paths[criterion]
