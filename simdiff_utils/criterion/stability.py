"""How much a ranking of the layers owes to the calibration samples that happened to be drawn."""

from collections.abc import Mapping

import numpy as np
import pandas as pd
from scipy import stats

from simdiff_utils import SimDiffError, registry
from simdiff_utils.capture.statistics import LayerStatistics
from simdiff_utils.criterion.equations import choose_removed, fuse, normalise


def rank_scores(statistics: Mapping[str, np.ndarray], criterion: str, alpha: float) -> np.ndarray:
    """Importance per layer, float64 [n_layers], of a criterion that sees the statistics alone.

    Args:
        alpha: at which a criterion ranks that fuses two measurements; any other has none.
    """
    found = registry.find(criterion)
    if found.gives == "line":
        return fuse(*normalise(statistics, criterion), alpha)
    if found.gives != "scores" or found.sees != ("statistics",):
        raise SimDiffError(
            f"{criterion} gives no scores from the statistics alone, so they rank nothing by it."
        )
    return np.asarray(registry.load(criterion)(statistics), dtype=np.float64)


def agree(one: np.ndarray, other: np.ndarray, n_remove: int) -> tuple[float, float]:
    """Kendall's tau-b of two rankings in [-1, 1], and the share of n_remove layers that both would remove."""
    tau = stats.kendalltau(one, other).statistic
    overlap = len(choose_removed(one, n_remove) & choose_removed(other, n_remove)) / n_remove
    return float(tau), overlap


def measure_stability(
    captured: LayerStatistics,
    alphas: Mapping[str, float],
    n_remove: int,
    sizes: list[int],
    n_draws: int = 200,
    seed: int = 0,
) -> pd.DataFrame:
    """Agreement between two calibration draws of equal size, by bootstrap from the samples of one capture.

    Args:
        alphas: criterion -> the alpha at which it ranks; cosine distance has none.
        sizes: samples in each draw (drawn with replacement from those captured).

    Returns:
        one row per (criterion, n_samples, quantity: kendall_tau or overlap): median, low and high (5 and 95
        %) over the pairs of draws.
    """
    rng = np.random.default_rng(seed)
    rows = []
    for size in sizes:
        draws = rng.integers(captured.n_samples, size=(n_draws, 2, size))
        tables = [[captured.table_of(samples) for samples in pair] for pair in draws]
        for criterion, alpha in alphas.items():
            found = np.array(
                [
                    agree(*(rank_scores(table, criterion, alpha) for table in pair), n_remove)
                    for pair in tables
                ]
            )
            for quantity, values in zip(("kendall_tau", "overlap"), found.T, strict=True):
                low, median, high = np.quantile(values, [0.05, 0.5, 0.95])
                rows.append(
                    {
                        "criterion": criterion,
                        "n_samples": size,
                        "quantity": quantity,
                        "median": median,
                        "low": low,
                        "high": high,
                    }
                )
    return pd.DataFrame(rows)
