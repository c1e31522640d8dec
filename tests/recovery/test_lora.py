"""Recovery: recipes, rows, and training on tiny models against a float64 oracle of the merge."""

import copy
import dataclasses
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from safetensors.torch import load_file

from simdiff_utils import SimDiffError
from simdiff_utils.engine import logits
from simdiff_utils.engine.decoder import Decoder
from simdiff_utils.recovery import trainer
from simdiff_utils.recovery.distillation import distillation_loss
from simdiff_utils.recovery.lora import train_lora
from simdiff_utils.recovery.recipe import PRESETS, PROJECTIONS, Recipe, lora_config, recipe_for
from simdiff_utils.recovery.training_rows import block_rows

ROOT = Path(__file__).resolve().parents[2]
TINY = Recipe(
    data="text",
    learning_rate=1e-2,
    batch_size=4,
    micro_batch_size=2,
    dropout=0.0,
    max_steps=4,
    n_evaluations=4,
)


def tiny(**changes):
    return dataclasses.replace(TINY, **changes)


def test_published_recipe_is_table_6():
    recipe = PRESETS["published"]
    assert recipe == Recipe(
        data="tatsu-lab/alpaca",
        learning_rate=3e-4,
        batch_size=32,
        micro_batch_size=4,
        dropout=0.05,
        max_steps=0,
        epochs=1,
        max_length=256,
        rank=8,
        lora_alpha=16,
        n_validation=2000,
        n_evaluations=10,
        target_modules=("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"),
    )


def test_recipe_keeps_the_presets_values_where_zero_is_given():
    assert recipe_for("published") == PRESETS["published"]
    changed = recipe_for("published", learning_rate=1e-3, max_steps=40, max_length=0, target_modules=())
    assert changed == dataclasses.replace(PRESETS["published"], learning_rate=1e-3, max_steps=40)
    with pytest.raises(SimDiffError, match="demo, published"):
        recipe_for("quick")


@pytest.mark.parametrize("max_steps, wanted", [(1, 1), (8, 2), (11, 2), (196, 10)])
def test_short_trainings_are_evaluated_at_most_every_fourth_step(max_steps, wanted):
    assert recipe_for("demo", max_steps=max_steps) == dataclasses.replace(
        PRESETS["demo"], max_steps=max_steps, n_evaluations=wanted
    )


# ---- training


@pytest.fixture
def pattern():
    """Blocks [8, 20] that count up and wrap round: easy to learn, unknown to a random model."""
    return (torch.arange(20) + torch.arange(8)[:, None]) % 12 + 5


def train(model, tokenizer, blocks, folder, recipe=TINY, dtype=torch.float32, seed=0, **teacher):
    return train_lora(
        model, tokenizer, block_rows(blocks, blocks[:2], tokenizer), recipe, folder, dtype, seed, **teacher
    )


@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma3"])
def test_loss_falls_and_the_log_tells_it(make_tiny, tokenizer, pattern, tmp_path, name):
    recipe = tiny(max_steps=12, learning_rate=2e-2, batch_size=8, micro_batch_size=4)
    trained = train(make_tiny(name), tokenizer, pattern, tmp_path, recipe)
    model, log = trained.model, trained.log
    assert list(log.columns) == ["step", "tokens", "loss", "eval_loss", "learning_rate", "seconds"]
    assert log["step"].tolist() == list(range(13))
    assert log["tokens"].tolist() == [160 * step for step in range(13)]
    assert log.loc[log["eval_loss"].notna(), "step"].tolist() == [0, 3, 6, 9, 12]
    assert np.isnan(log["loss"][0])
    assert log["loss"].iloc[-1] < 0.8 * log["loss"][1]
    assert log["eval_loss"].iloc[-1] < 0.8 * log["eval_loss"][0]
    assert log["seconds"].is_monotonic_increasing
    adapter = load_file(tmp_path / "adapter/adapter_model.safetensors")
    assert trained.n_trained == sum(p.numel() for p in adapter.values())
    with torch.inference_mode():  # the merged model is what was evaluated last
        loss = model(pattern[:2], labels=pattern[:2]).loss.item()
    assert loss == pytest.approx(log["eval_loss"].iloc[-1], rel=1e-3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["llama-tied", "gpt2"])
def test_merged_weights_are_the_old_ones_plus_scaled_b_a(
    make_tiny, tokenizer, pattern, tmp_path, name, dtype
):
    model = make_tiny(name)
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    config = model.config.to_dict()
    merged = train(model, tokenizer, pattern, tmp_path, dtype=dtype).model
    adapter = load_file(tmp_path / "adapter/adapter_model.safetensors")
    after = merged.state_dict()
    assert after.keys() == before.keys()
    assert merged is model
    assert merged.config.to_dict() == config
    assert not merged.training
    changed = set()
    for key, tensor in adapter.items():
        if "lora_A" not in key:
            continue
        module = key.removeprefix("base_model.model.").removesuffix(".lora_A.weight")
        scale = 2.0  # lora_alpha / rank
        update = scale * adapter[key.replace("lora_A", "lora_B")].double() @ tensor.double()
        update = update.T if name == "gpt2" else update  # whose weights are stored transposed
        expected = before[f"{module}.weight"].double() + update
        assert update.abs().max() > 1e-4
        assert after[f"{module}.weight"].dtype == torch.float32
        torch.testing.assert_close(after[f"{module}.weight"].double(), expected, rtol=0, atol=1e-6)
        changed.add(f"{module}.weight")
    assert len(changed) == 6 * (4 if name == "gpt2" else 7)
    for key in before.keys() - changed:  # embedding, head, norms, biases
        assert torch.equal(after[key], before[key]), key


def test_same_seed_same_log_other_seed_another(make_tiny, tokenizer, pattern, tmp_path):
    recipe = tiny(dropout=0.3, max_steps=2, n_evaluations=1)
    logs = [
        train(make_tiny("llama"), tokenizer, pattern, tmp_path / str(i), recipe, seed=seed).log
        for i, seed in enumerate((0, 0, 1))
    ]
    losses = [log["loss"][1:].tolist() for log in logs]
    assert losses[0] == losses[1]
    assert losses[0] != losses[2]


def unequal_rows(tokenizer):
    nothing = block_rows(torch.ones(1, 2, dtype=torch.long), torch.ones(0, 2), tokenizer)
    rows = [{"input_ids": list(range(5, 5 + n))} for n in (3, 20, 7, 12)]
    return dataclasses.replace(nothing, train=rows)


def test_micro_batches_make_the_step_of_the_whole_batch(make_tiny, tokenizer, tmp_path):
    """Rows of unequal length: the mean is over the batch's tokens, not over the micro-batches' means."""
    rows = unequal_rows(tokenizer)
    losses = []
    for micro_batch_size in (1, 4):
        recipe = tiny(micro_batch_size=micro_batch_size, max_steps=2)
        log = train_lora(make_tiny("llama"), tokenizer, rows, recipe, tmp_path, torch.float32, seed=0).log
        losses.append(log["loss"].tolist())
        assert log["step"].tolist() == [1, 2]
        assert log["eval_loss"].isna().all()
    np.testing.assert_allclose(*losses, rtol=1e-3)


def last_names(config) -> set[str]:
    return {path.rpartition(".")[2] for path in config.target_modules}


def test_other_names_mean_all_projections_of_the_layers(make_tiny):
    assert last_names(lora_config(make_tiny("llama"), TINY)) == set(PROJECTIONS)
    for name, projections in {
        "gpt2": "c_attn c_proj c_fc",
        "falcon": "query_key_value dense dense_h_to_4h dense_4h_to_h",  # of a class below nn.Linear
        "phi3": "qkv_proj o_proj gate_up_proj down_proj",
    }.items():
        assert last_names(lora_config(make_tiny(name), TINY)) == set(projections.split())


def test_nothing_but_the_adapter_is_written_and_nothing_is_printed(
    llama, tokenizer, pattern, tmp_path, capsys
):
    train(llama, tokenizer, pattern, tmp_path)
    assert {p.name for p in tmp_path.rglob("*") if p.is_file()} <= {
        "adapter_config.json",
        "adapter_model.safetensors",
        "README.md",
    }
    out, err = capsys.readouterr()
    assert out == ""
    assert "LoRA recovery" in err  # the bar
    assert "{'loss'" not in err
    assert "warn" not in err.lower()


def test_interrupted_training_leaves_the_model_as_it_was(llama, tokenizer, pattern, tmp_path, monkeypatch):
    before = copy.deepcopy(llama)
    monkeypatch.setattr(trainer.AdapterTrainer, "training_step", lambda *args, **kwargs: interrupt())

    def interrupt():
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(llama, tokenizer, pattern, tmp_path)
    assert llama.config.to_dict() == before.config.to_dict()
    assert llama.state_dict().keys() == before.state_dict().keys()
    assert not (tmp_path / "adapter").exists()


CPU_ALLOCATOR = "DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes. Error code 12"


@pytest.mark.parametrize(
    "error", [torch.OutOfMemoryError("CUDA out of memory"), MemoryError(), RuntimeError(CPU_ALLOCATOR)]
)
def test_out_of_memory_says_what_to_lower(llama, tokenizer, pattern, tmp_path, monkeypatch, error):
    def fail(*args, **kwargs):
        raise error

    monkeypatch.setattr(trainer.AdapterTrainer, "training_step", fail)
    with pytest.raises(SimDiffError, match="lower micro_batch_size first"):
        train(llama, tokenizer, pattern, tmp_path)


def test_requests_that_cannot_be_trained(llama, tokenizer, pattern, tmp_path):
    with pytest.raises(SimDiffError, match="nothing to train on"):
        train(llama, tokenizer, pattern[:0], tmp_path)
    with pytest.raises(SimDiffError, match="float16"):
        train(llama, tokenizer, pattern, tmp_path, dtype=torch.float16)
    with pytest.raises(SimDiffError, match="batch_size 4 is no multiple of the 3"):
        train(llama, tokenizer, pattern, tmp_path, tiny(micro_batch_size=3))


def test_modules_the_layers_do_not_have_are_named(llama):
    with pytest.raises(
        SimDiffError, match="names query, and the layers of Llama.* have down_proj, gate_proj"
    ):
        lora_config(llama, tiny(target_modules=("q_proj", "query")))
    chosen = lora_config(llama, tiny(target_modules=("q_proj",)))
    assert last_names(chosen) == {"q_proj"}


def test_rows_beyond_the_context_are_refused(llama, tokenizer, tmp_path):
    with pytest.raises(SimDiffError, match="65 tokens, and the model was built for 64: lower max_length"):
        train(llama, tokenizer, torch.ones(4, 65, dtype=torch.long), tmp_path)


def test_a_loss_that_is_lost_stops_the_training(llama, tokenizer, pattern, tmp_path):
    with torch.no_grad():
        llama.lm_head.weight[0] = float("inf")
    with pytest.raises(SimDiffError, match="not finite any more at step 1: lower learning_rate"):
        rows = block_rows(pattern, pattern[:0], tokenizer)
        train_lora(llama, tokenizer, rows, TINY, tmp_path, torch.float32, seed=0)


def test_curves_for_tensorboard(llama, tokenizer, pattern, tmp_path):
    train(llama, tokenizer, pattern, tmp_path, tiny(report_to="tensorboard"))
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    curves = EventAccumulator(str(tmp_path / "curves"))
    curves.Reload()
    assert [event.step for event in curves.Scalars("train/loss")] == [1, 2, 3, 4]
    assert [event.step for event in curves.Scalars("eval/loss")] == [0, 1, 2, 3, 4]


@pytest.mark.parametrize("distilled", [False, True])
def test_gradient_checkpointing_changes_no_loss(make_tiny, tokenizer, pattern, tmp_path, distilled):
    teacher = {"teacher": Decoder(make_tiny("llama"))} if distilled else {}
    recipes = [tiny(max_steps=2, n_evaluations=1, gradient_checkpointing=saving) for saving in (False, True)]
    logs = [train(make_tiny("gemma3"), tokenizer, pattern, tmp_path, each, **teacher).log for each in recipes]
    np.testing.assert_allclose(*(log["loss"][1:] for log in logs), rtol=1e-6)


# ---- distillation


@pytest.mark.parametrize("name", ["llama", "llama-tied", "gpt2", "gemma3"])
def test_distillation_loss_and_its_gradient_are_those_of_whole_logits(make_tiny, monkeypatch, name):
    student, teacher = Decoder(make_tiny(name).double()), Decoder(make_tiny(name, seed=1).double())
    monkeypatch.setattr(logits, "CHUNK", 4)
    states, wanted = torch.randn(2, 11, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    states.requires_grad_()
    tokens = torch.randint(97, (11,), generator=torch.Generator().manual_seed(1))
    # a later factor must reach the gradient
    loss = 3 * distillation_loss(student, teacher, states, wanted, tokens)
    (found,) = torch.autograd.grad(loss, states)
    p = teacher.logits(wanted[None])[0].detach().softmax(-1)
    q = student.logits(states[None])[0].softmax(-1)
    oracle = 1.5 * ((p * (p.log() - q.log())).sum() - q.log()[range(11), tokens].sum())
    (gradient,) = torch.autograd.grad(oracle, states)
    assert loss.item() == pytest.approx(oracle.item(), rel=1e-5)  # the softmax is float32
    torch.testing.assert_close(found, gradient, rtol=1e-4, atol=1e-6)


def test_a_teacher_that_is_the_same_model_leaves_half_the_next_tokens_loss(
    make_tiny, tokenizer, pattern, tmp_path
):
    teachers, recipe = ({}, {"teacher": Decoder(make_tiny("llama"))}), tiny(max_steps=1)
    logs = [train(make_tiny("llama"), tokenizer, pattern, tmp_path, recipe, **each).log for each in teachers]
    first = [log["loss"][1] for log in logs]
    assert first[1] == pytest.approx(first[0] / 2, rel=1e-5)  # before the first update


@pytest.mark.parametrize("name", ["llama", "gemma3", "falcon"])  # falcon's layers return tuples
def test_distillation_brings_the_student_near_the_teacher(make_tiny, tokenizer, pattern, tmp_path, name):
    recipe = tiny(max_steps=12, learning_rate=2e-2, batch_size=8, micro_batch_size=4, n_evaluations=1)
    teacher = Decoder(make_tiny(name, seed=1))
    log = train(make_tiny(name), tokenizer, pattern, tmp_path, recipe, teacher=teacher).log
    assert log["loss"].iloc[-1] < 0.8 * log["loss"][1]


def test_padding_teaches_nothing(make_tiny, tokenizer, tmp_path):
    """Rows of unequal length, distilled in one batch and one by one: the mean is over the batch's
    predictions."""
    rows, teacher = unequal_rows(tokenizer), Decoder(make_tiny("llama", seed=1))
    losses = []
    for size in (1, 4):
        recipe = tiny(micro_batch_size=size, max_steps=2)
        log = train_lora(make_tiny("llama"), tokenizer, rows, recipe, tmp_path, torch.float32, 0, teacher).log
        losses.append(log["loss"].tolist())
    np.testing.assert_allclose(*losses, rtol=1e-3)


# ---- going on after a kill

LONG = tiny(dropout=0.3, max_steps=24, n_evaluations=12)
CHILD = """
import sys
from pathlib import Path
import torch
from tests import helpers
from tests.recovery import test_lora as t
folder = Path(sys.argv[1])
pattern = (torch.arange(20) + torch.arange(11)[:, None]) % 12 + 5
model, tokenizer = helpers.build_tiny("llama"), helpers.build_tokenizer()
teacher = helpers.build_tiny("llama", seed=1)
log = t.train(model, tokenizer, pattern, folder, t.LONG, teacher=t.Decoder(teacher)).log
log.to_csv(f"{folder}.csv", index=False)
"""


def start_child(folder):
    command = [sys.executable, "-c", CHILD, str(folder)]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT)}
    quiet = dict(stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    return subprocess.Popen(command, env=environment, **quiet)


@pytest.mark.slow
def test_a_killed_training_goes_on_as_if_nothing_had_happened(tmp_path):
    undisturbed, killed = (start_child(tmp_path / name) for name in ("whole", "killed"))
    folder, n_kills = tmp_path / "killed", 0
    wanted = int(np.random.default_rng().integers(2, 20))  # a random step, another in each run of this test
    while killed.poll() is None:
        reached = max((int(path.name.rpartition("-")[2]) for path in folder.glob("checkpoint-*")), default=0)
        if n_kills < 2 and reached >= wanted:
            killed.send_signal(signal.SIGKILL)
            killed.wait()
            assert not (tmp_path / "killed.csv").exists()
            killed, n_kills, wanted = start_child(folder), n_kills + 1, 20
        time.sleep(0.02)
    assert undisturbed.wait() == 0, undisturbed.stderr.read()
    assert killed.returncode == 0, killed.stderr.read()
    both = ("whole", "killed")
    whole, resumed = (pd.read_csv(tmp_path / f"{name}.csv").drop(columns="seconds") for name in both)
    assert n_kills >= 1
    assert len(whole) == 25
    pd.testing.assert_frame_equal(whole, resumed, check_exact=True)
    adapters = [load_file(tmp_path / name / "adapter/adapter_model.safetensors") for name in both]
    assert all(torch.equal(adapters[0][name], adapters[1][name]) for name in adapters[0])
    assert [path.name for path in folder.iterdir()] == ["adapter"]


def interrupt_at(step, monkeypatch):
    """Ctrl-C at the end of a step; everything else as it is."""
    original = trainer._Bar.on_step_end

    def on_step_end(self, args, state, control, **kwargs):
        original(self, args, state, control, **kwargs)
        if state.global_step == step:
            raise KeyboardInterrupt

    monkeypatch.setattr(trainer._Bar, "on_step_end", on_step_end)


def test_a_checkpoint_cut_off_while_it_was_saved_is_not_used(
    make_tiny, tokenizer, pattern, tmp_path, monkeypatch
):
    recipe, cut = dataclasses.replace(LONG, max_steps=8, n_evaluations=4), tmp_path / "cut"
    undisturbed = train(make_tiny("llama"), tokenizer, pattern, tmp_path / "whole", recipe).log
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        interrupt_at(7, patch)
        train(make_tiny("llama"), tokenizer, pattern, cut, recipe)
    assert sorted(path.name for path in cut.glob("checkpoint-*")) == ["checkpoint-4", "checkpoint-6"]
    (cut / "checkpoint-6" / "complete.json").unlink()
    (cut / "checkpoint-6" / "optimizer.pt").write_bytes(b"PK")
    log = train(make_tiny("llama"), tokenizer, pattern, cut, recipe).log
    assert log.drop(columns="seconds").equals(undisturbed.drop(columns="seconds"))
    assert log["seconds"].is_monotonic_increasing


@pytest.mark.parametrize("change", ["recipe", "rows", "weights", "seed", "marker"])
def test_checkpoints_of_another_training_are_refused(
    make_tiny, tokenizer, pattern, tmp_path, monkeypatch, change
):
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        interrupt_at(5, patch)
        train(make_tiny("llama"), tokenizer, pattern, tmp_path, LONG)
    if change == "marker":
        (tmp_path / "training.json").unlink()
    model = make_tiny("llama", seed=int(change == "weights"))
    rows, seed = pattern + (change == "rows"), int(change == "seed")
    recipe = dataclasses.replace(LONG, learning_rate=2e-2) if change == "recipe" else LONG
    with pytest.raises(SimDiffError, match="holds checkpoints of another training"):
        train(model, tokenizer, rows, tmp_path, recipe, seed=seed)
    assert (tmp_path / "checkpoint-4").exists()
