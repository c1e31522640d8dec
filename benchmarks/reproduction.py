"""The paper's claim on two models of its family: Tables 3 and 5 of SimDiff on Qwen2.5-Coder.

    python -m benchmarks.reproduction 0.5b --data ../shared/data [--grid 8 12] [--windows 32] [--samples 32]
                                           [--seq-len 2048] [--validation 4] [--tasks 8 12]

Not the paper's models but their siblings: same shape, trained on from the same base with code, instruct-
tuned, 4 bits. Calibrated as published, on WikiText-2's training split (from the data folder in its tokens
version, where rare words are <unk>; raw where the hub is asked), perplexity on its test split by the
literature's protocol. The published ternary search is a criterion of its own here.

Goes on where it stopped, on another machine too: what is measured lies in runs/ and in the ledger
(benchmarks/results/reproduction.jsonl); benchmarks/results/reproduction.csv is written anew after each run.
Cells not measured are not in it.
"""

import argparse
import shutil
from pathlib import Path

import pandas as pd
import torch

from benchmarks.comparison import read_ledger, write_ledger, write_rows
from simdiff_utils import provenance
from simdiff_utils.capture.statistics import capture_statistics
from simdiff_utils.comparison.rows import PERPLEXITY, measure
from simdiff_utils.engine.load import decoder_stack
from simdiff_utils.run import Run
from simdiff_utils.settings import Settings

MODELS = {size: f"embedded:qwen2.5-coder-{size}-instruct" for size in ("0.5b", "1.5b")}
GRID = [4, 6, 8, 10, 12]
CRITERIA = "cosine mssd masd log-mssd relative portfolio sleb".split()
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
    parser.add_argument("model", choices=MODELS)
    parser.add_argument(
        "--data", default="", help="folder with wikitext2/ and the tasks' rows; empty: the hub"
    )
    parser.add_argument("--grid", type=int, nargs="+", default=GRID, help="numbers of layers to remove")
    parser.add_argument("--criteria", nargs="+", default=CRITERIA)
    parser.add_argument("--windows", type=int, default=32, help="of 2,048 tokens of the test split")
    parser.add_argument("--samples", type=int, default=32, help="of calibration")
    parser.add_argument("--seq-len", type=int, default=2048, help="tokens a sample, and a validation block")
    parser.add_argument("--validation", type=int, default=4, help="blocks on which sets are compared")
    parser.add_argument("--tasks", type=int, nargs="*", default=[], help="numbers of layers for the tasks")
    parser.add_argument("--dtype", default="float32")
    given = parser.parse_args()
    settings = Settings(
        model=MODELS[given.model],
        text=calibration_text(given.data),
        dtype=given.dtype,
        batch_size=1 if given.seq_len > 1024 else 4,
        n_samples=given.samples,
        seq_len=given.seq_len,
        n_validation=given.validation,
        n_remove_grid=given.grid,
        n_windows=given.windows,
        data_folder=given.data,
        criteria=given.criteria,
        task_criteria=TASK_CRITERIA,
        task_grid=given.tasks,
        n_stories=0,
    )
    run, tables, runs = Run(settings), [], []
    check_one_layer(run)
    read_ledger(run, RESULTS / "reproduction.jsonl")
    published = [name for name in PUBLISHED_SEARCH if name in given.criteria]
    for search in ("path", "ternary"):
        own = given.criteria if search == "path" else published
        if own:
            this = run.replace(search=search, criteria=list(dict.fromkeys(["cosine", *own])))
            runs.append(this)
            read_ledger(this, RESULTS / "reproduction.jsonl")
            rows = measure(this)
            if search == "ternary":
                rows = rows[rows["criterion"].isin(published)]
                rows = rows.assign(criterion=rows["criterion"] + ", ternary search")
            tables.append(rows)
            write_ledger(runs, RESULTS / "reproduction.jsonl")
    rows = pd.concat(tables, ignore_index=True)
    calibration = (
        f"calibration {given.samples} x {given.seq_len}, validation {given.validation} x {given.seq_len} "
        f"tokens of {run.corpus.label}"
    )
    rows["provenance"] = rows["provenance"] + f", {calibration}"
    command = f"python -m benchmarks.reproduction {given.model} --grid {' '.join(map(str, given.grid))}"
    command += f" --windows {given.windows} --samples {given.samples} --seq-len {given.seq_len}"
    command += f" --validation {given.validation} --dtype {given.dtype}"
    write_rows(rows, RESULTS / "reproduction.csv", command)
    print(rows[rows["metric"].isin([PERPLEXITY, "AVG"])].drop(columns="provenance").to_string(), flush=True)


if __name__ == "__main__":
    main()
