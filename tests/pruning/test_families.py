"""Many more families, each once along the whole way: streamed, cut, opened again, cached, adapted."""

import re

import pytest
import torch
from peft import get_peft_model
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText

from simdiff_utils.engine.decoder import Decoder, open_decoder, stream_decoder
from simdiff_utils.engine.load import decoder_layers, load_model
from simdiff_utils.engine.perplexity import block_losses
from simdiff_utils.engine.surgery import layers_removed
from simdiff_utils.models.checkpoints import resolve_checkpoint
from simdiff_utils.pruning.export import export_pruned, verify_export
from simdiff_utils.recovery.lora import train_lora
from simdiff_utils.recovery.recipe import Recipe, lora_config
from simdiff_utils.recovery.training_rows import block_rows
from tests.families import OTHERS, WRAPPERS
from tests.helpers import N_LAYERS, logits_of
from tests.pruning.test_export import FACTS

REMOVED = frozenset({1, 4})
REMOVED_FROM = {"recurrent_gemma": frozenset({0, 1, 2})}
INFINITE = (
    "mamba2",
    "falcon_h1",
)  # transformers writes (0, inf) as an object, and reads it back by itself alone
RECIPE = Recipe(data="text", learning_rate=1e-2, batch_size=2, micro_batch_size=2, dropout=0.0, max_steps=1)


def save(folder, tokenizer, loader, model_type, sizes):
    torch.manual_seed(0)
    model = loader.from_config(AutoConfig.for_model(model_type, **sizes)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return model


def go_the_whole_way(model, loader, removed, blocks, tmp_path):
    """From a checkpoint's name to one that plain transformers opens: its folder, and the model that it is."""
    dense, pruned = tmp_path / "dense", tmp_path / "pruned"
    assert resolve_checkpoint(str(dense)).folder == dense
    decoder = open_decoder(dense, "float32")
    losses, streamed = (
        torch.as_tensor(block_losses(way, blocks, (frozenset(), removed), batch_size=3))
        for way in (decoder, stream_decoder(dense, "float32"))
    )
    probabilities = logits_of(model, blocks)[:, :-1].double().log_softmax(-1)
    expected = -probabilities.gather(2, blocks[:, 1:, None]).mean((1, 2))
    torch.testing.assert_close(losses[0], expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(streamed, losses, rtol=1e-4, atol=1e-4)

    export_pruned(dense, removed, pruned, FACTS)
    verify_export(decoder, removed, Decoder(load_model(pruned, "float32")), blocks[:1])
    reloaded, report = loader.from_pretrained(pruned, output_loading_info=True)
    assert not any(report.values()), report
    with layers_removed(decoder.model, removed) as cut:
        torch.testing.assert_close(logits_of(reloaded.eval(), blocks), logits_of(cut, blocks))
    asked = dict(attention_mask=torch.ones_like(blocks), max_new_tokens=6, eos_token_id=None, do_sample=False)
    ways = (reloaded.generate(blocks, pad_token_id=0, use_cache=cache, **asked) for cache in (True, False))
    assert torch.equal(*ways)
    return pruned, reloaded


@pytest.mark.parametrize("model_type", OTHERS)
def test_a_family_goes_the_whole_way(model_type, tokenizer, blocks, tmp_path):
    model = save(tmp_path / "dense", tokenizer, AutoModelForCausalLM, model_type, OTHERS[model_type])
    if model_type in INFINITE:
        assert "Infinity" in (tmp_path / "dense" / "config.json").read_text()
    removed = REMOVED_FROM.get(model_type, REMOVED)
    _, reloaded = go_the_whole_way(model, AutoModelForCausalLM, removed, blocks, tmp_path)
    adapted = get_peft_model(reloaded, lora_config(reloaded, RECIPE))
    adapted(input_ids=blocks, labels=blocks, use_cache=False).loss.backward()
    learning = {name: p.grad is not None for name, p in adapted.named_parameters() if p.requires_grad}
    # a weight that a mixer multiplies by itself has no adapter, nor has a router
    assert all(learning.values()) and len(learning) >= 2 * (N_LAYERS - len(removed))


@pytest.mark.parametrize("model_type", WRAPPERS)
def test_a_model_with_a_vision_tower_goes_the_whole_way(model_type, tokenizer, blocks, tmp_path):
    loader = AutoModelForImageTextToText
    model = save(tmp_path / "dense", tokenizer, loader, model_type, WRAPPERS[model_type])
    pruned, reloaded = go_the_whole_way(model, loader, REMOVED, blocks, tmp_path)
    before, after = (load_file(folder / "model.safetensors") for folder in (tmp_path / "dense", pruned))
    tower = [name for name in before if re.search("vis|projector", name)]
    assert tower and all(torch.equal(before[name], after[name]) for name in tower)
    weights = {name: parameter.clone() for name, parameter in reloaded.named_parameters()}
    rows = block_rows(blocks[:2], blocks[:0], tokenizer)
    trained = train_lora(reloaded, tokenizer, rows, RECIPE, tmp_path / "lora", torch.float32, seed=0).model
    changed = {name for name, p in trained.named_parameters() if not torch.equal(weights[name], p)}
    inside = {id(p) for p in decoder_layers(trained).parameters()}
    assert changed and all(id(trained.get_parameter(name)) in inside for name in changed)
