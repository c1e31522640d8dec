"""The pruned model as a draft of the dense one: what share of its tokens is kept, and whether that is faster.

    python -m benchmarks.drafts smollm2 gemma [--grid 3 6 9 12] [--prompts 6] [--healed 6]

Prompts of 64 tokens from Wikipedia's test articles, 48 tokens after each, greedily, one at a time; five
tokens drafted at once. --healed: also the checkpoint without so many layers (portfolio) after LoRA at its
defaults.
"""

import argparse
from contextlib import ExitStack
from pathlib import Path

import numpy as np
import pandas as pd

from benchmarks.comparison import EMBEDDED, write_rows
from simdiff_utils.criterion import stage as criterion
from simdiff_utils.engine.load import load_model, pick_dtype
from simdiff_utils.recovery import stage as recovery
from simdiff_utils.run import Run
from simdiff_utils.settings import Settings
from simdiff_utils.speed.draft import N_DRAFTED, measure_draft
from simdiff_utils.speed.timing import without_layers

GRIDS = {"smollm2": [3, 6, 9, 12], "gemma": [2, 4, 6, 8], "qwen-0.5b": [4, 8, 12]}
CRITERIA = ["cosine", "portfolio"]
PROMPT_LEN, N_NEW_TOKENS = 64, 48
TARGET = Path("benchmarks/results/drafts.csv")


def summarise(table: pd.DataFrame, drafts: dict[str, dict]) -> pd.DataFrame:
    """A row a draft: acceptance over all tokens, and the geometric mean over prompts of tokens/s over the
    dense model's in the same turn."""
    alone = table[table["draft"] == ""].set_index("prompt")["seconds"]
    rows = []
    for name, facts in drafts.items():
        its = table[table["draft"] == name]
        logs = np.log(alone.loc[its["prompt"]].to_numpy() / its["seconds"].to_numpy())
        half = 1.96 * logs.std(ddof=1) / len(logs) ** 0.5
        speedup = np.exp([logs.mean(), logs.mean() - half, logs.mean() + half])
        rows.append(
            facts
            | {
                "acceptance": its["accepted"].sum() / its["drafted"].sum(),
                **dict(zip(("speedup", "speedup_low", "speedup_high"), speedup, strict=True)),
                "tokens_per_s_dense": N_NEW_TOKENS / alone.mean(),
                "same_text": int(its["same_text"].sum()),
                "n_prompts": len(its),
            }
        )
    return pd.DataFrame(rows)


def measure(model: str, given: argparse.Namespace) -> None:
    name, grid = EMBEDDED[model], GRIDS[model]
    settings = Settings(model=name, criteria=CRITERIA, n_remove_grid=given.grid or grid)
    run = Run(settings)
    dtype = str(pick_dtype("auto")).removeprefix("torch.")
    dense = load_model(run.checkpoint.folder, dtype)
    prompts = run.replace(n_test=given.prompts).blocks("test")[:, :PROMPT_LEN]
    chosen = criterion.choices(run, run.grid, CRITERIA)
    facts, models = {}, {}
    with ExitStack() as stack:
        for row in chosen.itertuples():
            key = f"{row.criterion}-{row.n_remove}"
            facts[key] = {"criterion": row.criterion, "n_remove": row.n_remove, "removed": row.removed}
            facts[key]["healed"] = False
            models[key] = stack.enter_context(without_layers(dense, frozenset(row.removed)))
        for n_remove in given.healed:
            healed = run.replace(criterion="portfolio", n_remove=n_remove, training="lora")
            checkpoint = recovery.healed_checkpoint(healed)
            key = f"healed-{n_remove}"
            removed = sorted(recovery.removed(healed))
            facts[key] = {"criterion": "portfolio", "n_remove": n_remove, "removed": removed, "healed": True}
            models[key] = load_model(checkpoint, dtype)
        measure_draft(dense, models, prompts[:1, :8], 8)  # warm
        table = measure_draft(dense, models, prompts, N_NEW_TOKENS)
    rows = summarise(table, facts).assign(model=run.checkpoint.label, dtype=dtype, n_drafted=N_DRAFTED)
    command = f"python -m benchmarks.drafts {model} --prompts {given.prompts}"
    command += f" --healed {' '.join(map(str, given.healed))}" if given.healed else ""
    write_rows(rows, TARGET, command)
    print(rows.drop(columns="model").to_string(), flush=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("models", nargs="+", choices=GRIDS)
    parser.add_argument("--grid", type=int, nargs="+", help="numbers of layers (default: the model's)")
    parser.add_argument("--prompts", type=int, default=6)
    parser.add_argument("--healed", type=int, nargs="*", default=[])
    given = parser.parse_args()
    for model in given.models:
        measure(model, given)
