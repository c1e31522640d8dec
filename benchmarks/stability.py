"""How a ranking of the layers, and the set chosen in the end, change with what one happens to calibrate on.

    python -m benchmarks.stability benchmarks/results/stability.csv --texts c4.jsonl wikitext2.jsonl

Against a reference of 512 samples of 256 tokens of the embedded text in float32: fewer samples (two
independent draws of the same size against each other), other seeds, lengths, texts (local files, of the names
given), and bfloat16. Tau and overlap are of the rankings at the alpha that the reference chooses, with 5 and
95 % bootstrap quantiles over the samples of both sides. `chosen` is the set of lowest perplexity on the alpha
path, on the same validation blocks for all. Captures and losses are kept in runs/: started again, the script
goes on where it stopped.
"""

import argparse
from pathlib import Path

import numpy as np
import pandas as pd
import torch

from simdiff_utils import provenance
from simdiff_utils.capture import stage as capture
from simdiff_utils.capture.statistics import STATISTICS, LayerStatistics
from simdiff_utils.criterion import stage
from simdiff_utils.criterion.candidates import Evidence
from simdiff_utils.criterion.propose import propose
from simdiff_utils.criterion.stability import agree, measure_stability, rank_scores
from simdiff_utils.engine.perplexity import perplexity
from simdiff_utils.run import Run
from simdiff_utils.settings import Settings

MODELS = {"embedded:smollm2-135m-instruct": 6, "embedded:gemma-3-270m": 4}
CRITERIA = ["cosine", "mssd", "masd", "log-mssd", "relative"]
RAW = dict(zip(CRITERIA, ["cosine_distance", "mssd", "masd", "mssd", "relative_update"], strict=True))
SIZES = [8, 16, 32, 64, 128, 256, 512]
N_SAMPLES, SEQ_LEN, N_VALIDATION, N_DRAWS = 512, 256, 16, 200


def variations(texts: list[str]) -> list[tuple[str, str, dict]]:
    """(what varies, its value, settings that differ from the reference's)."""
    return [
        *(("seed", str(seed), {"seed": seed, "n_samples": 32}) for seed in (1, 2, 3, 4)),
        *(("length", str(n), {"seq_len": n, "n_samples": 64}) for n in (64, 128, 512, 1024)),
        *(("text", Path(text).name, {"text": text, "n_samples": 128}) for text in texts),
        ("dtype", "bfloat16", {"dtype": "bfloat16", "n_samples": 128}),
    ]


def against(
    one: LayerStatistics, other: LayerStatistics, paired: bool, criterion: str, n_remove: int, alpha: float
) -> dict:
    """Agreement of two captures; `paired`: they hold the same samples, which are then drawn together."""
    rng = np.random.default_rng(0)

    def agreement(samples: np.ndarray, others: np.ndarray) -> tuple[float, float]:
        """Kendall's tau and the overlap of the chosen sets, on the samples drawn of each."""
        tables = one.table_of(samples), other.table_of(others)
        return agree(*(rank_scores(table, criterion, alpha) for table in tables), n_remove)

    found = []
    for _ in range(N_DRAWS):
        samples = rng.integers(one.n_samples, size=one.n_samples)
        others = samples if paired else rng.integers(other.n_samples, size=other.n_samples)
        found.append(agreement(samples, others))
    whole = agreement(np.arange(one.n_samples), np.arange(other.n_samples))
    row = {}
    for name, value, drawn in zip(("kendall_tau", "overlap"), whole, zip(*found, strict=True), strict=True):
        low, high = np.quantile(drawn, [0.05, 0.95])
        row |= {name: value, f"{name}_low": low, f"{name}_high": high}
    raw = STATISTICS.index(RAW[criterion])
    here, there = (c.by_sample[raw].mean(1) for c in (one, other))
    return row | {"largest_change": float(np.abs(here / there - 1).max())}


def measure(model: str, n_remove: int, texts: list[str]) -> list[dict]:
    """The rows of one model."""
    rows = []
    base = Settings(model=model, n_samples=N_SAMPLES, seq_len=SEQ_LEN, n_validation=N_VALIDATION)
    run = Run(base)
    reference, evaluator = capture.statistics(run), stage.evaluator(run, "validation")

    def choose(captured: LayerStatistics, criterion: str) -> dict:
        candidates = propose(criterion, Evidence(captured), n_remove)
        winner = evaluator.race({0: [c.removed for c in candidates]}, exact=True).winners[0]
        first = next(c for c in candidates if c.removed == winner)
        return {
            "alpha": np.mean([first.low, first.high]),
            "chosen": sorted(winner),
            "validation_perplexity": perplexity(evaluator.losses([winner])[0]),
        }

    chosen = {criterion: choose(reference, criterion) for criterion in CRITERIA}
    alphas = {
        criterion: 0.0 if np.isnan(facts["alpha"]) else facts["alpha"] for criterion, facts in chosen.items()
    }

    def add(varied: str, value: str, criterion: str, **facts) -> None:
        rows.append(
            {"model": model, "n_remove": n_remove, "varied": varied, "value": value, "criterion": criterion}
            | facts
        )

    for criterion in CRITERIA:
        add("reference", f"{N_SAMPLES} x {SEQ_LEN}", criterion, **chosen[criterion])
        table = measure_stability(reference, {criterion: alphas[criterion]}, n_remove, SIZES, N_DRAWS)
        for size, part in table.groupby("n_samples"):
            part = part.set_index("quantity")
            facts = {
                f"{quantity}{end}": part.loc[quantity, column]
                for quantity in ("kendall_tau", "overlap")
                for end, column in (("", "median"), ("_low", "low"), ("_high", "high"))
            }
            add("samples", size, criterion, alpha=alphas[criterion], **facts)
    # the samples of bfloat16, in float32
    same = capture.statistics(Run(base.replace(n_samples=128)))
    for varied, value, differing in variations(texts):
        captured = capture.statistics(Run(base.replace(**differing)))
        paired = varied == "dtype"
        for criterion in CRITERIA:
            alpha, beside = alphas[criterion], same if paired else reference
            facts = choose(captured, criterion) | {"alpha": alpha}
            facts |= against(captured, beside, paired, criterion, n_remove, alpha)
            add(varied, value, criterion, **facts)
        print(model, varied, value, flush=True)
    return rows


def main(target: Path, texts: list[str]) -> None:
    rows = [row for model, n_remove in MODELS.items() for row in measure(model, n_remove, texts)]
    table = pd.DataFrame(rows)
    text = (
        f"# python -m benchmarks.stability · reference {N_SAMPLES} x {SEQ_LEN} tokens of "
        "English Wikipedia, about a hundred articles, float32; validation perplexity on "
        f"{N_VALIDATION} x {SEQ_LEN} of its tokens; seeds: 32 samples, lengths: 64, texts and dtype: 128\n"
        f"# {provenance.describe_machine()} · torch {torch.__version__}\n"
    )
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_text(text + table.to_csv(index=False, float_format="%.5g"), encoding="utf-8")
    print("wrote", target)


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("target", type=Path)
    parser.add_argument("--texts", nargs="*", default=[])
    main(**vars(parser.parse_args()))
