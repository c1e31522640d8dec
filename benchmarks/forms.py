"""Every criterion on both embedded models: chosen on validation text, compared on test text with paired
intervals.

    python -m benchmarks.forms benchmarks/results/forms.csv

Candidate sets are raced on the validation blocks at the default confidence; `to_cosine` is the ratio of test
perplexity to ShortGPT's at the same number of layers, with the 95 % paired bootstrap interval over blocks.
Captures and losses are kept in runs/: started again, the script goes on where it stopped.
"""

import sys
from pathlib import Path

import pandas as pd
import torch

from simdiff_utils import provenance
from simdiff_utils.criterion.stage import compare
from simdiff_utils.registry import CRITERIA
from simdiff_utils.run import Run
from simdiff_utils.settings import Settings

MODELS = {"embedded:smollm2-135m-instruct": [3, 6, 8, 9, 12], "embedded:gemma-3-270m": [2, 4, 5, 6]}
SHARED = {"dtype": "bfloat16", "batch_size": 4, "n_validation": 32, "n_test": 32, "criteria": list(CRITERIA)}


def main(target: Path) -> None:
    tables = []
    for model, grid in MODELS.items():
        table = compare(Run(Settings(model=model, n_remove_grid=grid, **SHARED)), grid)
        tables.append(table.assign(model=model))
        print(table.to_string(), flush=True)
    table = pd.concat(tables, ignore_index=True)
    table.insert(0, "model", table.pop("model"))
    seq_len, n_samples = Settings().seq_len, Settings().n_samples
    text = (
        f"# python -m benchmarks.forms · calibration {n_samples} x {seq_len}, validation "
        f"{SHARED['n_validation']} x {seq_len}, test {SHARED['n_test']} x {seq_len} tokens of English "
        f"Wikipedia, about a hundred articles; {SHARED['dtype']}\n"
        f"# {provenance.describe_machine()} · torch {torch.__version__}\n"
    )
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_text(text + table.to_csv(index=False, float_format="%.5g"), encoding="utf-8")
    print("wrote", target)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
