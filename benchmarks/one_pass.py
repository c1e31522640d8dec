"""Does a number of the calibration pass tell on which models the size of the update helps?

    python -m benchmarks.one_pass [--models smollm2 gemma qwen-0.5b qwen-1.5b] [--samples 64]

Of each model, captured on Wikipedia: Spearman's rank correlation over the layers of the cosine distance and
MASD (with the 95 % interval of redrawn calibration samples); how many layers the sigmoid of Eq. 5 saturates;
the largest MSSD over the median. Beside them, from the stored measurements, the lowest ratio of perplexities
that SimDiff-MASD's set reaches to ShortGPT's at any K. To results/one_pass.csv.
"""

import argparse
from pathlib import Path

import numpy as np
import pandas as pd
from scipy.stats import spearmanr

from benchmarks.comparison import EMBEDDED, write_rows
from simdiff_utils.capture import stage as capture
from simdiff_utils.comparison.tables import ROWS
from simdiff_utils.criterion.equations import count_saturated
from simdiff_utils.results import stored_table
from simdiff_utils.run import Run
from simdiff_utils.settings import Settings

RESULT, N_DRAWS = Path("benchmarks/results/one_pass.csv"), 1000
MEASURED = (f"figures/{ROWS}", "benchmarks/results/reproduction.csv")


def look_at(run: Run) -> dict:
    """The model's row."""
    captured, draw = capture.statistics(run), np.random.default_rng(0)

    def correlate(samples: np.ndarray) -> float:
        table = captured.table_of(samples)
        return spearmanr(table["cosine_distance"], table["masd"]).statistic

    n, table = captured.n_samples, captured.table()
    drawn = [correlate(draw.integers(0, n, n)) for _ in range(N_DRAWS)]
    low, high = np.quantile(drawn, [0.025, 0.975])
    return {
        "model": run.checkpoint.label,
        "n_layers": run.n_layers,
        "rank_correlation": correlate(np.arange(n)),
        "low": low,
        "high": high,
        "saturated_mssd": count_saturated(table["mssd"]),
        "saturated_masd": count_saturated(table["masd"]),
        "mssd_over_median": table["mssd"].max() / table["mssd"].median(),
    }


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--models", nargs="+", choices=EMBEDDED, default=list(EMBEDDED))
    parser.add_argument("--samples", type=int, default=64, help="of calibration, 256 tokens each")
    parser.add_argument("--dtype", default="bfloat16")
    given = parser.parse_args()
    rows = pd.concat(map(stored_table, MEASURED))
    gains = rows[(rows["metric"] == "ratio_to_cosine") & (rows["criterion"] == "masd")]
    lowest = gains.groupby("model")["value"].min()
    for name in given.models:
        found = look_at(Run(Settings(model=EMBEDDED[name], dtype=given.dtype, n_samples=given.samples)))
        found["lowest_ratio_of_masd"] = lowest.get(found["model"], np.nan)
        command = f"python -m benchmarks.one_pass --models {name} --samples {given.samples}"
        write_rows(pd.DataFrame([found]), RESULT, f"{command} --dtype {given.dtype}")
        print(found, flush=True)


if __name__ == "__main__":
    main()
