"""Recovery: recipes, rows, and training on tiny models against a float64 oracle of the merge."""

import copy
import gzip
import json

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from simdiff_utils import recovery
from simdiff_utils.recovery import (
    PRESETS,
    Recipe,
    alpaca_dataset,
    block_dataset,
    lora_config,
    pad_rows,
    recipe_for,
    train_lora,
)
from simdiff_utils.settings import SimDiffError

TINY = Recipe(data="text", learning_rate=1e-2, batch_size=4, micro_batch_size=2, dropout=0.0, max_steps=4)


def test_published_recipe_is_table_6():
    recipe = PRESETS["published"]
    assert recipe == Recipe(
        data="tatsu-lab/alpaca", learning_rate=3e-4, batch_size=32, micro_batch_size=4, dropout=0.05, max_steps=0,
        epochs=1, max_length=256, rank=8, lora_alpha=16, n_validation=2000,
        target_modules=("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"))


def test_recipe_keeps_the_presets_values_where_zero_is_given():
    assert recipe_for("demo") == PRESETS["demo"]
    changed = recipe_for("published", learning_rate=1e-3, max_steps=5)
    assert (changed.learning_rate, changed.max_steps, changed.batch_size) == (1e-3, 5, 32)
    with pytest.raises(SimDiffError, match="demo, published"):
        recipe_for("quick")


# ---- rows ------------------------------------------------------------------------------------------------------------

ROWS = [{"instruction": f"w{10 + i}", "input": "w5" if i % 2 else "", "output": f"w{40 + i} w7"} for i in range(30)]


def write_rows(path, rows):
    text = json.dumps(rows) if ".jsonl" not in path.name else "".join(json.dumps(row) + "\n" for row in rows)
    with (gzip.open if path.suffix == ".gz" else open)(path, "wt", encoding="utf-8") as file:
        file.write(text)
    return str(path)


@pytest.mark.parametrize("name", ["rows.json", "rows.jsonl", "rows.json.gz", "rows.jsonl.gz"])
def test_alpaca_rows_are_prompt_and_answer_without_eos(tmp_path, tokenizer, name):
    train, validation = alpaca_dataset(write_rows(tmp_path / name, ROWS), tokenizer, max_length=256, seed=0)
    assert (len(train), len(validation)) == (27, 3)  # a tenth, where that is fewer than 2000
    everything = [row["input_ids"] for row in train + validation]
    for ids in everything:
        n = next(i for i in ids if 10 <= i < 40)
        assert 5 in ids if n % 2 else 5 not in ids  # the input, where there is one
        assert ids[-2:] == [30 + n, 7]  # ends with the answer's last word
        assert tokenizer.eos_token_id not in ids
    assert sorted(map(tuple, everything)) == sorted(set(map(tuple, everything)))  # every row once


def test_eos_that_the_tokenizer_appends_is_taken_off(tmp_path, tokenizer):
    from tokenizers.processors import TemplateProcessing

    appending = copy.deepcopy(tokenizer)
    appending.backend_tokenizer.post_processor = TemplateProcessing(single="$A <eos>", special_tokens=[("<eos>", 2)])
    assert appending("w5")["input_ids"] == [5, 2]
    source = write_rows(tmp_path / "rows.json", ROWS)
    assert alpaca_dataset(source, appending, 256, seed=0) == alpaca_dataset(source, tokenizer, 256, seed=0)


def test_alpaca_rows_are_cut_and_drawn_by_the_seed(tmp_path, tokenizer):
    source = write_rows(tmp_path / "rows.json", ROWS)
    train, _ = alpaca_dataset(source, tokenizer, max_length=8, seed=0)
    assert {len(row["input_ids"]) for row in train} == {8}
    assert alpaca_dataset(source, tokenizer, 256, seed=1) == alpaca_dataset(source, tokenizer, 256, seed=1)
    assert alpaca_dataset(source, tokenizer, 256, seed=1) != alpaca_dataset(source, tokenizer, 256, seed=2)
    assert len(alpaca_dataset(source, tokenizer, 256, seed=0, n_validation=2)[1]) == 2


def test_template_is_alpacas():
    text = recovery.ALPACA_WITH_INPUT.format(instruction="Add.", input="1, 2", output="3")
    assert text.endswith("### Instruction:\nAdd.\n\n### Input:\n1, 2\n\n### Response:\n3")
    assert "### Input" not in recovery.ALPACA_WITHOUT_INPUT


def test_braces_in_a_row_are_text(tmp_path, tokenizer):
    rows = [{"instruction": "{input} {x}", "input": "", "output": "{}"}] * 2
    assert alpaca_dataset(write_rows(tmp_path / "rows.json", rows), tokenizer, 256, seed=0)


@pytest.mark.parametrize(("row", "sentence"), [
    ({"instruction": "a", "output": "b"}, "Row 31 of .*rows.json has no text 'input'"),
    ({"instruction": "a", "input": "", "output": None}, "Row 31 of .*rows.json has no text 'output'"),
    ("just a string", "Row 31 of .*rows.json has no text 'instruction'"),
])
def test_a_row_not_in_alpaca_form_is_named(tmp_path, tokenizer, row, sentence):
    with pytest.raises(SimDiffError, match=sentence):
        alpaca_dataset(write_rows(tmp_path / "rows.json", [*ROWS, row]), tokenizer, 256, seed=0)


def test_sources_that_cannot_be_read(tmp_path, tokenizer):
    with pytest.raises(SimDiffError, match="There is no file .*gone.jsonl"):
        alpaca_dataset(str(tmp_path / "gone.jsonl"), tokenizer, 256, seed=0)
    broken = tmp_path / "broken.jsonl"
    broken.write_text('{"instruction": "a",\n')
    with pytest.raises(SimDiffError, match="no JSON lines file"):
        alpaca_dataset(str(broken), tokenizer, 256, seed=0)
    with pytest.raises(SimDiffError, match="holds 0 rows"):
        alpaca_dataset(write_rows(tmp_path / "empty.json", []), tokenizer, 256, seed=0)
    with pytest.raises(SimDiffError, match="nobody/no-such-data could not be loaded .* offline"):
        alpaca_dataset("nobody/no-such-data", tokenizer, 256, seed=0)


def test_padding_is_never_a_label_and_the_prompt_always_is():
    batch = pad_rows([{"input_ids": [5, 6, 7]}, {"input_ids": [8, 9]}], pad_token_id=0)
    assert batch["input_ids"].tolist() == [[5, 6, 7], [8, 9, 0]]
    assert batch["labels"].tolist() == [[-100, 6, 7], [-100, 9, -100]]  # position 0 is nobody's target
    assert batch["attention_mask"].tolist() == [[1, 1, 1], [1, 1, 0]]


# ---- training --------------------------------------------------------------------------------------------------------

@pytest.fixture
def pattern():
    """Blocks [8, 20] that count up and wrap round: easy to learn, unknown to a random model."""
    return (torch.arange(20) + torch.arange(8)[:, None]) % 12 + 5


def train(model, tokenizer, blocks, folder, recipe=TINY, dtype=torch.float32, seed=0):
    return train_lora(model, tokenizer, block_dataset(blocks), block_dataset(blocks[:2]), recipe, folder, dtype, seed)


@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma3"])
def test_loss_falls_and_the_log_tells_it(make_tiny, tokenizer, pattern, tmp_path, name):
    recipe = Recipe(data="text", learning_rate=2e-2, batch_size=8, micro_batch_size=4, dropout=0.0, max_steps=12)
    model, log, n_trained = train(make_tiny(name), tokenizer, pattern, tmp_path, recipe)
    assert list(log.columns) == ["step", "loss", "eval_loss", "seconds"]
    assert log["step"].tolist() == list(range(13))
    assert log["eval_loss"].notna().tolist() == [True, *[False] * 11, True]
    assert np.isnan(log["loss"][0])
    assert log["loss"].iloc[-1] < 0.8 * log["loss"][1]
    assert log["eval_loss"].iloc[-1] < 0.8 * log["eval_loss"][0]
    assert log["seconds"].is_monotonic_increasing
    assert n_trained == sum(p.numel() for p in load_file(tmp_path / "adapter/adapter_model.safetensors").values())
    with torch.inference_mode():  # the merged model is what was evaluated last
        assert model(pattern[:2], labels=pattern[:2]).loss.item() == pytest.approx(log["eval_loss"].iloc[-1], rel=1e-3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["llama-tied", "gpt2"])
def test_merged_weights_are_the_old_ones_plus_scaled_b_a(make_tiny, tokenizer, pattern, tmp_path, name, dtype):
    model = make_tiny(name)
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    config = model.config.to_dict()
    merged, _, _ = train(model, tokenizer, pattern, tmp_path, dtype=dtype)
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
        update = 2.0 * adapter[key.replace("lora_A", "lora_B")].double() @ tensor.double()  # lora_alpha / rank = 2
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
    recipe = Recipe(data="text", learning_rate=1e-2, batch_size=4, micro_batch_size=2, dropout=0.3, max_steps=3)
    logs = [train(make_tiny("llama"), tokenizer, pattern, tmp_path / str(i), recipe, seed=seed)[1]
            for i, seed in enumerate((0, 0, 1))]
    losses = [log["loss"][1:].tolist() for log in logs]
    assert losses[0] == losses[1]
    assert losses[0] != losses[2]


def test_micro_batches_make_the_step_of_the_whole_batch(make_tiny, tokenizer, tmp_path):
    """Rows of unequal length: the mean is over the batch's tokens, not over the micro-batches' means."""
    rows = [{"input_ids": list(range(5, 5 + n))} for n in (3, 20, 7, 12)]
    weights = []
    for micro_batch_size in (1, 4):
        recipe = Recipe(data="text", learning_rate=1e-2, batch_size=4, micro_batch_size=micro_batch_size, dropout=0.0,
                        max_steps=2)
        model, log, _ = train_lora(make_tiny("llama"), tokenizer, rows, None, recipe, tmp_path, torch.float32, seed=0)
        weights.append(log["loss"].tolist())
        assert log["step"].tolist() == [1, 2]
        assert log["eval_loss"].isna().all()
    np.testing.assert_allclose(*weights, rtol=1e-3)


def test_other_names_mean_all_linear_layers(make_tiny):
    assert lora_config(make_tiny("llama"), TINY).target_modules == set(recovery.PROJECTIONS)
    for name in ("gpt2", "gpt-neox", "phi3"):  # phi3 has o_proj and down_proj, but the others fused
        assert lora_config(make_tiny(name), TINY).target_modules == "all-linear"


def test_nothing_but_the_adapter_is_written_and_nothing_is_printed(llama, tokenizer, pattern, tmp_path, capsys):
    train(llama, tokenizer, pattern, tmp_path)
    assert {p.name for p in tmp_path.rglob("*") if p.is_file()} <= {
        "adapter_config.json", "adapter_model.safetensors", "README.md"}
    out, err = capsys.readouterr()
    assert out == ""
    assert "LoRA recovery" in err  # the bar
    assert "{'loss'" not in err
    assert "warn" not in err.lower()


def test_interrupted_training_leaves_the_model_as_it_was(llama, tokenizer, pattern, tmp_path, monkeypatch):
    before = copy.deepcopy(llama)
    monkeypatch.setattr(recovery.Trainer, "training_step", lambda *args, **kwargs: interrupt())

    def interrupt():
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(llama, tokenizer, pattern, tmp_path)
    assert llama.config.to_dict() == before.config.to_dict()
    assert llama.state_dict().keys() == before.state_dict().keys()
    assert not (tmp_path / "adapter").exists()


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("CUDA out of memory"), MemoryError(), RuntimeError(
    "[enforce fail at alloc_cpu.cpp:127] DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes.")])
def test_out_of_memory_says_what_to_lower(llama, tokenizer, pattern, tmp_path, monkeypatch, error):
    def fail(*args, **kwargs):
        raise error
    monkeypatch.setattr(recovery.Trainer, "training_step", fail)
    with pytest.raises(SimDiffError, match="lower micro_batch_size first"):
        train(llama, tokenizer, pattern, tmp_path)


def test_requests_that_cannot_be_trained(llama, tokenizer, pattern, tmp_path):
    with pytest.raises(SimDiffError, match="nothing to train on"):
        train(llama, tokenizer, pattern[:0], tmp_path)
    with pytest.raises(SimDiffError, match="float16"):
        train(llama, tokenizer, pattern, tmp_path, dtype=torch.float16)
    with pytest.raises(SimDiffError, match="batch_size 4 is no multiple of the 3"):
        train(llama, tokenizer, pattern, tmp_path, Recipe(
            data="text", learning_rate=1e-2, batch_size=4, micro_batch_size=3, dropout=0.0, max_steps=1))
