"""The ladder of recovery, on a tiny model: its rungs, what they cost, what is written, and the entry for
launchers."""

import json
import os
import subprocess
import sys

import numpy as np
import pandas as pd
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from simdiff_utils import SimDiffError
from simdiff_utils.recovery import stage
from simdiff_utils.run import Run
from simdiff_utils.settings import Settings

SMALL = dict(
    seq_len=16,
    n_samples=8,
    n_validation=4,
    n_test=4,
    n_remove=2,
    criterion="tail",
    learning_rate=1e-2,
    max_steps=4,
    max_length=16,
    train_dtype="float32",
)


@pytest.fixture
def ladder(tiny_model, tiny_text, tmp_path, monkeypatch):
    """Function: settings -> a ladder on the tiny model, in a run folder of its own."""
    monkeypatch.setenv("SIMDIFF_RUNS", str(tmp_path / "runs"))
    return lambda **settings: Run(Settings(model=str(tiny_model), text=str(tiny_text), **(SMALL | settings)))


RUNGS = [
    ("none", "none"),
    ("magnitude", "none"),
    ("linear", "none"),
    ("none", "lora"),
    ("none", "distillation"),
    ("linear", "distillation"),
]


def test_every_rung_is_made_once_and_measured_as_it_was_written(ladder):
    run = ladder()
    table = stage.compare_rungs(run, RUNGS)
    assert table["rung"].tolist() == [
        "dense",
        "pruned",
        "magnitude",
        "linear",
        "lora",
        "distillation",
        "linear + distillation",
    ]
    assert table["share"][0] == 1
    assert table["share"][1] == 0
    lost = np.log(table["perplexity"][1] / table["perplexity"][0])
    np.testing.assert_allclose(table["share"], np.log(table["perplexity"][1] / table["perplexity"]) / lost)
    assert table["n_tokens"].tolist() == [0, 0, 128, 128, 256, 256, 384]
    trained = table["n_trained"] > 0
    assert trained.tolist() == [False] * 4 + [True] * 3
    assert (table["seconds"] > 0).tolist()[4:] == [True] * 3  # a repair of so small a model rounds to none
    assert (table["seconds"][:2] == 0).all()
    for pair in RUNGS[1:]:
        rung = run.replace(repair=pair[0], training=pair[1])
        model = AutoModelForCausalLM.from_pretrained(stage.recovered_checkpoint(rung)).eval()
        blocks = run.blocks("test")
        with torch.inference_mode():
            loss = np.mean([model(input_ids=block[None], labels=block[None]).loss.item() for block in blocks])
        row = table[table["rung"] == stage.rung_name(rung)].iloc[0]
        assert row["perplexity"] == pytest.approx(np.exp(loss), rel=1e-4)
    before = {path: path.stat().st_mtime_ns for path in run.folder.rglob("*.safetensors")}
    pd.testing.assert_frame_equal(stage.compare_rungs(ladder(), RUNGS), table)
    assert before == {path: path.stat().st_mtime_ns for path in run.folder.rglob("*.safetensors")}


def test_the_pruned_model_alone_is_a_table_too(ladder):
    table = stage.compare_rungs(ladder(), [("none", "none")])
    assert table["rung"].tolist() == ["dense", "pruned"]
    assert table[["seconds", "n_tokens", "n_trained", "share"]].to_numpy().tolist() == [
        [0, 0, 0, 1],
        [0, 0, 0, 0],
    ]


def test_what_a_recovery_leaves(ladder):
    run = ladder(repair="linear", training="lora", report_to="tensorboard")
    folder = stage.train(run)
    assert {path.name for path in folder.iterdir()} == {
        "model",
        "adapter",
        "curves",
        "log.csv",
        "result.json",
        "hashes.json",
    }
    assert not list(run.folder.glob("training-*"))
    facts = json.loads((folder / "model" / "pruning.json").read_text())
    assert facts["recovery"]["recovery"] == "LoRA, 4 steps, float32, plain text"
    assert facts["recovery"]["repair"].startswith("linear, without training, at ")
    card = (folder / "model" / "README.md").read_text()
    assert "| repair | linear, without training" in card
    assert "unchanged before the recovery" in card
    log = pd.read_csv(folder / "log.csv")
    assert log["step"].tolist() == [0, 1, 2, 3, 4]
    assert log["eval_loss"].notna().tolist() == [True, False, False, False, True]


def test_export_in_16_bit_to_a_folder_of_the_users(ladder, tmp_path):
    run = ladder(
        repair="linear", training="lora", export_dtype="bfloat16", export_to=str(tmp_path / "healed")
    )
    assert stage.recovered_checkpoint(run) == tmp_path / "healed"
    tensors = load_file(tmp_path / "healed" / "model.safetensors")
    assert {tensor.dtype for tensor in tensors.values()} == {torch.bfloat16}
    whole = stage.recovered_checkpoint(ladder(repair="linear", training="lora"))
    for name, tensor in load_file(whole / "model.safetensors").items():
        assert torch.equal(tensor.bfloat16(), tensors[name])  # rounded once, after all that was learned
    with pytest.raises(SimDiffError, match="healed exists already"):
        stage.recovered_checkpoint(run)


def test_rows_of_a_file_through_the_alpaca_template(ladder, tmp_path):
    path = tmp_path / "rows.jsonl"
    rows = [{"instruction": f"w{5 + i}", "input": "", "output": "w7 w8"} for i in range(30)]
    path.write_text("\n".join(map(json.dumps, rows)))
    run = ladder(train_data=str(path), max_length=64)
    facts = json.loads((stage.train(run) / "result.json").read_text())
    assert facts["template"] == "Alpaca"
    assert facts["n_steps"] == 4


def launch(command, tmp_path, ladder_settings, tiny_model, tiny_text):
    arguments = [
        text
        for name, value in (ladder_settings | {"model": tiny_model, "text": tiny_text}).items()
        for text in (f"--{name}", str(value))
    ]
    environment = os.environ | {"SIMDIFF_RUNS": str(tmp_path / "runs"), "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [sys.executable, "-m", *command, "simdiff_utils.recovery.train", *arguments],
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )


def test_entry_refuses_in_one_sentence(tmp_path, tiny_model, tiny_text):
    done = launch([], tmp_path, SMALL | {"training": "magic"}, tiny_model, tiny_text)
    assert done.returncode == 1
    assert (
        done.stderr.strip()
        .splitlines()[-1]
        .startswith("simdiff: training must be one of none, lora, distillation")
    )


@pytest.mark.slow
def test_two_processes_train_the_same_steps_as_one(ladder, tmp_path, tiny_model, tiny_text):
    """Under accelerate, on two CPU processes: each takes half of every batch, and the gradients are
    averaged."""
    training = {"training": "distillation", "micro_batch_size": 2}  # LoRA, and a teacher beside it
    settings = SMALL | training | {"export_to": str(tmp_path / "healed")}
    done = launch(
        [
            "accelerate.commands.launch",
            "--cpu",
            "--num_processes",
            "2",
            "--num_machines",
            "1",
            "--mixed_precision",
            "no",
            "--dynamo_backend",
            "no",
            "-m",
        ],
        tmp_path,
        settings,
        tiny_model,
        tiny_text,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("healed") == 1
    (log,) = (tmp_path / "runs").rglob("log.csv")
    two = pd.read_csv(log)
    log.parent.rename(tmp_path / "elsewhere")
    one = pd.read_csv(stage.train(ladder(**training)) / "log.csv")
    assert two["tokens"].tolist() == one["tokens"].tolist()
    np.testing.assert_allclose(two["eval_loss"], one["eval_loss"], rtol=1e-3)
    assert (tmp_path / "healed" / "model.safetensors").exists()
