"""The paper's claim on two models of its family: Tables 3 and 5 of SimDiff on Qwen2.5-Coder.

    python -m benchmarks.reproduction 0.5b --data ../shared/data [--grid 8 12] [--windows 32] [--samples 32]
                                           [--seq-len 2048] [--validation 2] [--tasks 8 12]
                                           [--text embedded:wikipedia]

Not the paper's models but their siblings: same shape, trained on from the same base with code, instruct-
tuned, 4 bits. Calibrated as published, on WikiText-2's training split (from the data folder in its tokens
version, where rare words are <unk>; raw where the hub is asked), perplexity on its test split by the
literature's protocol. The published ternary search is a criterion of its own here.

Goes on where it stopped, on another machine too: what is measured lies in runs/ and in the ledger
(benchmarks/results/reproduction.jsonl), which is written after an interrupt as well. Tables are written
anew after each run, and hold no cell that was not measured: reproduction.csv; reproduction_alpha.csv, the
validation perplexity of every set that alpha can choose (Figure 4); reproduction_samples.csv, what fewer
calibration samples would have chosen; and with --tasks reproduction_answers.csv, McNemar's test and paired
intervals of every set's answers against ShortGPT's. An empty --grid checks one layer by hand and measures
nothing.
"""

import argparse
import json
import shutil
from pathlib import Path

import numpy as np
import pandas as pd
import torch

from benchmarks.comparison import EMBEDDED, read_ledger, write_ledger, write_rows
from simdiff_utils import provenance
from simdiff_utils.capture import stage as capture
from simdiff_utils.capture.statistics import capture_statistics
from simdiff_utils.comparison.rows import FOLDER, PERPLEXITY, measure
from simdiff_utils.comparison.tasks.paired import compare_answers
from simdiff_utils.criterion import stage
from simdiff_utils.criterion.alpha import trace_path
from simdiff_utils.criterion.equations import choose_removed, cosine_scores, normalise
from simdiff_utils.engine.load import decoder_stack
from simdiff_utils.files import read_kept
from simdiff_utils.run import Run
from simdiff_utils.settings import Settings

GRID = [4, 6, 8, 10, 12]
CRITERIA = "cosine mssd masd log-mssd relative portfolio sleb floating".split()
PUBLISHED_SEARCH = ["mssd", "masd"]
TASK_CRITERIA = "cosine mssd masd relative portfolio".split()
RESULTS = Path("benchmarks/results")


def calibration_text(data: str) -> str:
    """WikiText-2's training split under a name that says what it is."""
    if not data:
        return "wikitext2"
    target = provenance.runs_root() / "texts" / "wikitext2-train-tokens.txt.gz"
    target.parent.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(Path(data) / "wikitext2" / "wiki.train.tokens.gz", target)
    return str(target)


def steps_over_alpha(run: Run) -> pd.DataFrame:
    """Perplexity over alpha on the validation text, each set on all of it: the paper's Figure 4."""
    parts = [
        stage.steps(run, name, n_remove).assign(criterion=name)
        for name in PUBLISHED_SEARCH
        for n_remove in run.grid
    ]
    return pd.concat(parts, ignore_index=True)


def effect_of_samples(run: Run, rows: pd.DataFrame) -> pd.DataFrame:
    """What the first few calibration samples alone would have chosen.

    Returns:
        one row per (criterion, n_remove, n_samples): shared, the layers in common with ShortGPT's set from
        all samples; for SimDiff instead, whether some alpha still chooses the set that was chosen.
    """
    captured, found = capture.statistics(run), []
    chosen = rows[rows["criterion"].isin(["cosine", "masd"])].drop_duplicates(["criterion", "n_remove"])
    for n_samples in [n for n in (1, 2, 4, 8, 16, 32, 64, 128) if n < captured.n_samples]:
        table = captured.table_of(np.arange(n_samples))
        path = trace_path(*normalise(table, "masd"))
        for row in chosen.itertuples():
            removed = set(json.loads(row.removed))
            if row.criterion == "cosine":
                now = choose_removed(cosine_scores(table), row.n_remove)
                facts = {"shared": len(removed & now)}
            else:
                sets = path.loc[path["n_remove"] == row.n_remove, "removed"]
                facts = {"still_chosen": any(removed == set(each) for each in sets)}
            found.append(
                {"criterion": row.criterion, "n_remove": row.n_remove, "n_samples": n_samples} | facts
            )
    return pd.DataFrame(found)


def paired_answers(run: Run, rows: pd.DataFrame) -> pd.DataFrame:
    """Every set that was asked the tasks against ShortGPT's of as many layers, question by question."""
    files = sorted((run.folder / FOLDER / "tasks").glob("**/*.json"))
    asked = pd.DataFrame([row for file in files for row in (read_kept(file) or {}).get("results", [])])
    parts = []
    for n_remove in run.settings.task_grid:
        cosine = rows[(rows["criterion"] == "cosine") & (rows["n_remove"] == n_remove)]["removed"].iloc[0]
        of_size = asked["removed"].map(len).isin([0, n_remove]) & (asked["metric"] == "acc")
        table = compare_answers(asked[of_size], frozenset(json.loads(cosine)))
        parts.append(table.assign(n_remove=n_remove))
    return pd.concat(parts, ignore_index=True)


@torch.inference_mode()
def check_one_layer(run: Run) -> None:
    """Eq. 2 to 4 of one layer by hand, in float64, from the states that transformers itself collects."""
    block, layer_idx = run.blocks("train")[:1], run.n_layers // 2
    states = decoder_stack(run.model)(block, use_cache=False, output_hidden_states=True).hidden_states
    before, after = states[layer_idx].double(), states[layer_idx + 1].double()
    by_hand = {
        "cosine_distance": (1 - torch.cosine_similarity(before, after, dim=-1)).mean().item(),
        "mssd": (after - before).square().sum(-1).mean().item(),
        "masd": (after - before).abs().mean().item(),
    }
    captured = capture_statistics(run.decoder, block).table()
    for name, expected in by_hand.items():
        found = captured[name][layer_idx]
        print(f"layer {layer_idx}, {name}: {found:.8g}, by hand {expected:.8g}", flush=True)
        if abs(found / expected - 1) > 1e-5:
            raise RuntimeError(f"{name} of layer {layer_idx} differs from its formula")


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("model", choices=["0.5b", "1.5b"])
    parser.add_argument(
        "--data", default="", help="folder with wikitext2/ and the tasks' rows; empty: the hub"
    )
    parser.add_argument(
        "--text", default="", help="that chooses the sets; empty: WikiText-2's training split, as published"
    )
    parser.add_argument("--grid", type=int, nargs="*", default=GRID, help="numbers of layers to remove")
    parser.add_argument("--criteria", nargs="+", default=CRITERIA)
    parser.add_argument("--windows", type=int, default=32, help="of 2,048 tokens of the test split")
    parser.add_argument("--samples", type=int, default=32, help="of calibration")
    parser.add_argument("--seq-len", type=int, default=2048, help="tokens a sample, and a validation block")
    parser.add_argument("--validation", type=int, default=4, help="blocks on which sets are compared")
    parser.add_argument("--tasks", type=int, nargs="*", default=[], help="numbers of layers for the tasks")
    parser.add_argument("--dtype", default="float32")
    given = parser.parse_args()
    settings = Settings(
        model=EMBEDDED[f"qwen-{given.model}"],
        text=given.text or calibration_text(given.data),
        dtype=given.dtype,
        batch_size=1 if given.seq_len > 1024 else 4,
        n_samples=given.samples,
        seq_len=given.seq_len,
        n_validation=given.validation,
        n_remove_grid=given.grid or GRID,
        n_windows=given.windows,
        data_folder=given.data,
        criteria=given.criteria,
        task_criteria=TASK_CRITERIA,
        task_grid=given.tasks,
        n_stories=0,
    )
    run, tables, ledger = Run(settings), [], RESULTS / "reproduction.jsonl"
    check_one_layer(run)
    if not given.grid:
        return
    published = [name for name in PUBLISHED_SEARCH if name in given.criteria]
    ternary = run.replace(search="ternary", criteria=["cosine", *published], task_grid=[])
    runs = [run, ternary] if published else [run]
    for each in runs:
        read_ledger(each, ledger)
    try:
        tables = [measure(each) for each in runs]
    finally:
        write_ledger(runs, ledger)
    if published:
        probed = tables[1][tables[1]["criterion"].isin(published)]
        tables[1] = probed.assign(criterion=probed["criterion"] + ", ternary search")
    rows = pd.concat(tables, ignore_index=True)
    calibration = (
        f"calibration {given.samples} x {given.seq_len}, validation {given.validation} x {given.seq_len} "
        f"tokens of {run.corpus.label}"
    )
    rows["provenance"] = rows["provenance"] + f", {calibration}"
    command = f"python -m benchmarks.reproduction {given.model} --grid {' '.join(map(str, given.grid))}"
    command += f" --windows {given.windows} --samples {given.samples} --seq-len {given.seq_len}"
    command += f" --validation {given.validation} --dtype {given.dtype}"
    command += f" --criteria {' '.join(given.criteria)}"
    command += f" --tasks {' '.join(map(str, given.tasks))}" if given.tasks else ""
    command += (f" --text {given.text}" if given.text else "") + " --data DATA"
    model = run.checkpoint.label
    found = {
        "reproduction.csv": rows,
        "reproduction_alpha.csv": steps_over_alpha(run).assign(model=model),
        "reproduction_samples.csv": effect_of_samples(run, rows).assign(model=model),
    }
    if given.tasks:
        found["reproduction_answers.csv"] = paired_answers(run, rows).assign(model=model)
    for name, table in found.items():
        write_rows(table, RESULTS / name, command)
    print(rows[rows["metric"].isin([PERPLEXITY, "AVG"])].drop(columns="provenance").to_string(), flush=True)


if __name__ == "__main__":
    main()
