"""The ladder of recovery on the embedded models, 200,000 tokens for the rungs that train; and what our loop
costs.

    python -m benchmarks.recovery smollm2-6 --data ../shared/data [--rungs linear lora linear+distillation]
    python -m benchmarks.recovery smollm2-6 --data ../shared/data --tasks
    python -m benchmarks.recovery alpaca --data ../shared/data
    python -m benchmarks.recovery overhead

Each rung is a stage of a run in runs/: what is there is read, and a training that was killed goes on. After
each rung its row goes to results/recovery.csv and its curve to results/recovery_curves.csv. `--tasks` asks
the dense model and each rung 200 questions of each zero-shot task instead, into results/recovery_tasks.csv.
`alpaca` is the published recipe, once, on the Alpaca rows of the data folder. `overhead` runs our loop and a
bare PEFT + Trainer loop on the same rows in turn.
"""

import argparse
import json
import statistics
import time
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import pandas as pd
import torch
from peft import get_peft_model
from transformers import Trainer, TrainingArguments

from benchmarks.comparison import EMBEDDED
from simdiff_utils import provenance
from simdiff_utils.comparison.tasks.evaluate import evaluate_tasks
from simdiff_utils.comparison.tasks.load import TaskData
from simdiff_utils.comparison.tasks.suites import SUITES, average_accuracy
from simdiff_utils.criterion.stage import losses
from simdiff_utils.engine.decoder import Decoder
from simdiff_utils.engine.load import load_model
from simdiff_utils.engine.perplexity import block_losses, perplexity
from simdiff_utils.files import write_whole
from simdiff_utils.models.checkpoints import resolve_checkpoint
from simdiff_utils.pruning.stage import pruned_checkpoint
from simdiff_utils.recovery import stage
from simdiff_utils.recovery.lora import train_lora
from simdiff_utils.recovery.recipe import lora_config
from simdiff_utils.recovery.training_rows import pad_rows, pad_token_id
from simdiff_utils.run import Run
from simdiff_utils.settings import Settings
from simdiff_utils.text.blocks import token_blocks
from simdiff_utils.text.corpus import load_wikitext2_test

RESULTS, KEY = Path(__file__).parent / "results", ["case", "rung"]
CASES = {
    "smollm2-6": ("smollm2", 6),
    "smollm2-9": ("smollm2", 9),
    "gemma-4": ("gemma", 4),
    "alpaca": ("smollm2", 6),
}
RUNGS = {
    "pruned": ("none", "none"),
    "magnitude": ("magnitude", "none"),
    "linear": ("linear", "none"),
    "lora": ("none", "lora"),
    "distillation": ("none", "distillation"),
    "linear+lora": ("linear", "lora"),
    "linear+distillation": ("linear", "distillation"),
}
SHARED = dict(
    dtype="float32",
    train_dtype="bfloat16",
    batch_size=4,
    n_samples=64,
    n_validation=16,
    n_test=64,
    criterion="portfolio",
    max_steps=196,
)  # steps of 4 x 256 tokens
N_WINDOWS, WINDOW_LEN = 16, 2048  # of WikiText-2's test split
N_QUESTIONS, TASK_DTYPE = 200, "bfloat16"


def open_run(case: str, data: Path) -> Run:
    """The run of a case, pruned and with nothing healed yet."""
    model, n_remove = CASES[case]
    settings = dict(model=EMBEDDED[model], n_remove=n_remove, **SHARED)
    if case == "alpaca":
        rows = str(data / "alpaca" / "alpaca_5000.jsonl.gz")
        settings |= dict(preset="published", train_data=rows, max_steps=0)
    return Run(Settings(**settings))


def open_rung(run: Run, name: str) -> Run:
    """The same run, healed as a rung says."""
    repair, training = RUNGS[name]
    return run.replace(repair=repair, training=training)


def climb(case: str, rungs: list[str], data: Path) -> None:
    """Every rung on Wikipedia's test split and on WikiText-2's, a row each as soon as it is there."""
    run = open_run(case, data)
    windows = token_blocks(run.tokenizer, load_wikitext2_test(str(data)), WINDOW_LEN)
    windows = windows[np.sort(np.random.default_rng(0).permutation(len(windows))[:N_WINDOWS])]
    facts = {
        "case": case,
        "model": run.checkpoint.label,
        "removed": json.dumps(sorted(stage.removed(run))),
        "machine": provenance.describe_machine(),
        "torch": torch.__version__,
    }
    sets = {"dense": frozenset(), "pruned": stage.removed(run)}
    baselines = {
        name: perplexity(block_losses(run.decoder, windows, (removed,), batch_size=1)[0])
        for name, removed in sets.items()
    }
    held_out = {f"{name}_loss": losses(run, "validation", removed).mean() for name, removed in sets.items()}
    lost = np.log(baselines["pruned"] / baselines["dense"])
    for name in rungs:
        rung, table = open_rung(run, name), stage.compare_rungs(run, [RUNGS[name]])
        wikitext2 = baselines["pruned"]
        if name != "pruned":
            healed = Decoder(load_model(stage.healed_checkpoint(rung), "float32"))
            wikitext2 = perplexity(block_losses(healed, windows, batch_size=1)[0])
        dense, last = table.iloc[0].to_dict(), table.iloc[-1].to_dict()
        share = 1 - np.log(wikitext2 / baselines["dense"]) / lost
        add({"rung": "dense", "wikitext2_perplexity": baselines["dense"]} | dense | facts)
        add(last | {"rung": name, "wikitext2_perplexity": wikitext2, "wikitext2_share": share} | facts)
        if rung.settings.training != "none":
            log = pd.read_csv(stage.train(rung) / "log.csv").dropna(subset=["eval_loss"])
            log["tokens"] += last["n_tokens"] - log["tokens"].iloc[-1]  # those of a repair before it
            curve = log[["step", "tokens", "eval_loss", "seconds"]].assign(**held_out, case=case, rung=name)
            add_rows(curve, RESULTS / "recovery_curves.csv", KEY)


def ask(case: str, rungs: list[str], data: Path) -> None:
    """The zero-shot tasks of the dense model and of every rung, a row each as soon as it is there."""
    run = open_run(case, data)
    for name in ("dense", *rungs):
        folder = run.checkpoint.folder if name == "dense" else stage.healed_checkpoint(open_rung(run, name))
        scores = evaluate_tasks(
            lambda folder=folder: Decoder(load_model(folder, TASK_DTYPE)),
            run.tokenizer,
            [frozenset()],
            SUITES["zero_shot"],
            TaskData(data),
            N_QUESTIONS,
            folder=run.folder / "tasks",
            identity={"weights": resolve_checkpoint(str(folder)).sha256, "dtype": TASK_DTYPE},
        )
        average = average_accuracy(scores).iloc[0]
        row = {"case": case, "rung": name, average["metric"]: average["value"], "stderr": average["stderr"]}
        row |= scores[scores["metric"] == "acc"].set_index("task")["value"].to_dict()
        row |= {"limit": N_QUESTIONS, "dtype": TASK_DTYPE, "machine": provenance.describe_machine()}
        add_rows(pd.DataFrame([row | {"torch": torch.__version__}]), RESULTS / "recovery_tasks.csv", KEY)
        print(row, flush=True)


def add(row: dict) -> None:
    add_rows(pd.DataFrame([row]), RESULTS / "recovery.csv", KEY)
    print(row, flush=True)


def add_rows(rows: pd.DataFrame, path: Path, key: list[str]) -> None:
    """Put rows into a table in the place of those with the same key."""
    if path.exists():
        old, new = pd.read_csv(path), set(rows[key].itertuples(index=False, name=None))
        stays = [pair not in new for pair in old[key].itertuples(index=False, name=None)]
        rows = pd.concat([old[stays], rows])
    with write_whole(path) as partial:
        rows.to_csv(partial, index=False, float_format="%.6g")


def measure_overhead(n_pairs: int = 5) -> None:
    """Seconds of 16 steps in our loop over those in a bare one, in turn."""
    run = Run(Settings(**SHARED | dict(model=EMBEDDED["smollm2"], n_remove=6, max_steps=16)))
    rows, recipe, ratios = stage.training_rows(run), stage.recipe(run), []
    rows.validation.clear()

    def ours(model: torch.nn.Module, folder: str) -> None:
        train_lora(model, run.tokenizer, rows, recipe, Path(folder), torch.float32, 0)

    def bare(model: torch.nn.Module, folder: str) -> None:
        collate = partial(pad_rows, pad_token_id=pad_token_id(run.tokenizer))
        args = TrainingArguments(
            output_dir=folder,
            max_steps=recipe.max_steps,
            learning_rate=recipe.learning_rate,
            use_cpu=True,
            per_device_train_batch_size=recipe.micro_batch_size,
            gradient_accumulation_steps=recipe.batch_size // recipe.micro_batch_size,
            report_to="none",
            save_strategy="no",
            remove_unused_columns=False,
            label_names=["labels"],
        )
        model = get_peft_model(model, lora_config(model, recipe))
        Trainer(model=model, args=args, train_dataset=rows.train, data_collator=collate).train()

    for _ in range(n_pairs):
        seconds = {}
        for train in (bare, ours):
            model = load_model(pruned_checkpoint(run), "float32")
            with TemporaryDirectory() as folder:
                started = time.perf_counter()
                train(model, folder)
                seconds[train.__name__] = time.perf_counter() - started
        ratios.append(seconds["ours"] / seconds["bare"])
        print(f"{seconds}, ratio {ratios[-1]:.3f}", flush=True)
    print(
        f"ours / bare: median {statistics.median(ratios):.3f} of {n_pairs} pairs, {min(ratios):.3f} to "
        f"{max(ratios):.3f}; {provenance.describe_machine()}"
    )


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("what", choices=[*CASES, "overhead"])
    parser.add_argument("--data", type=Path, help="folder with wikitext2/ and alpaca/")
    parser.add_argument("--rungs", nargs="+", choices=RUNGS, default=None)
    parser.add_argument("--tasks", action="store_true", help="ask the zero-shot tasks instead")
    given = parser.parse_args()
    if given.what == "overhead":
        measure_overhead()
        return
    rungs = given.rungs or (["lora"] if given.what == "alpaca" else list(RUNGS))
    (ask if given.tasks else climb)(given.what, rungs, given.data)


if __name__ == "__main__":
    main()
