"""Models: names that users give, what is refused and with which sentence, structure, sizes of the paper's models."""

import json
import shutil
import struct
import time
from pathlib import Path
from unittest.mock import Mock

import pytest
import torch
from huggingface_hub import errors as hub_errors
from torch import nn
from transformers import BertConfig, BertForMaskedLM, T5Config, T5ForConditionalGeneration

from simdiff_utils import models
from simdiff_utils.models import (
    PAPER_MODELS,
    count_parameters,
    decoder_layers,
    decoder_stack,
    generate_text,
    load_model,
    load_tokenizer,
    pick_dtype,
    resolve_checkpoint,
)
from simdiff_utils.settings import SimDiffError


@pytest.fixture
def folder(llama, tokenizer, tmp_path) -> Path:
    """A small local checkpoint."""
    path = tmp_path / "tiny-llama"
    llama.save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path


def refusal(model) -> str:
    """The one sentence with which a model is refused."""
    with pytest.raises(SimDiffError) as error:
        resolve_checkpoint(str(model))
    sentence = str(error.value)
    assert "\n" not in sentence, sentence
    return sentence


# ---- found ---------------------------------------------------------------------------------------------------


def test_a_local_folder_is_found_loaded_and_named(folder, llama, blocks, monkeypatch):
    checkpoint = resolve_checkpoint(str(folder))
    assert (checkpoint.folder, checkpoint.label) == (folder, "tiny-llama")
    loaded = load_model(checkpoint.folder, "float32")
    assert not loaded.training and loaded.dtype == torch.float32 and loaded.device == models.pick_device()
    torch.testing.assert_close(loaded.cpu()(blocks).logits, llama(blocks).logits)
    assert load_tokenizer(checkpoint.folder)("w9")["input_ids"] == [9]
    monkeypatch.chdir(folder.parent)
    assert resolve_checkpoint("tiny-llama").sha256 == checkpoint.sha256  # a relative path, not a hub id
    assert resolve_checkpoint(".//tiny-llama/").label == "tiny-llama"


def test_the_hash_follows_weights_and_config_not_place_or_time(folder, llama, tmp_path):
    before = resolve_checkpoint(str(folder)).sha256
    shutil.copytree(folder, tmp_path / "elsewhere", copy_function=shutil.copyfile)
    assert resolve_checkpoint(str(tmp_path / "elsewhere")).sha256 == before
    with torch.no_grad():
        llama.lm_head.weight[0, 0] += 1
    llama.save_pretrained(folder)
    changed = resolve_checkpoint(str(folder)).sha256
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"rms_norm_eps": 1e-3}))
    assert len({before, changed, resolve_checkpoint(str(folder)).sha256}) == 3


def test_a_hub_id_is_downloaded_without_pickled_weights(folder, monkeypatch):
    asked = {}

    def download(hub_id, allow_patterns, **options):
        asked.update(hub_id=hub_id, patterns=allow_patterns)
        return str(folder)

    monkeypatch.setattr(models, "snapshot_download", download)
    checkpoint = resolve_checkpoint("HuggingFaceTB/SmolLM2-135M")
    assert (checkpoint.folder, checkpoint.label) == (folder, "HuggingFaceTB/SmolLM2-135M")
    assert asked["hub_id"] == "HuggingFaceTB/SmolLM2-135M"
    assert {"*.json", "*.safetensors"} <= set(asked["patterns"])
    assert not any("bin" in pattern or "pt" in pattern or pattern == "*" for pattern in asked["patterns"])


# ---- refused -------------------------------------------------------------------------------------------------


def test_an_encoder_decoder_is_refused(tmp_path):
    T5ForConditionalGeneration(T5Config(vocab_size=50, d_model=16, d_kv=8, d_ff=16, num_layers=2, num_heads=2)
                               ).save_pretrained(tmp_path)
    assert "no decoder-only language model (its architecture is T5ForConditionalGeneration)" in refusal(tmp_path)


def test_a_masked_language_model_is_refused(tmp_path):
    BertForMaskedLM(BertConfig(vocab_size=50, hidden_size=16, num_hidden_layers=2, num_attention_heads=2,
                               intermediate_size=16)).save_pretrained(tmp_path)
    assert "no decoder-only language model (its architecture is BertForMaskedLM)" in refusal(tmp_path)


def test_pickled_weights_are_refused(folder):
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    assert "has no .safetensors weights, and pickled ones are not read" in refusal(folder)


def test_a_folder_without_or_with_a_broken_config_is_refused(folder):
    (folder / "config.json").write_text("{ this is no JSON")
    assert "cannot read the config" in refusal(folder)
    (folder / "config.json").write_text('{"model_type": "of-the-future", "architectures": ["FutureForCausalLM"]}')
    assert "cannot read the config" in refusal(folder)
    (folder / "config.json").unlink()
    assert "holds no config.json" in refusal(folder)


@pytest.mark.parametrize("model", ["../../etc", "no/such/folder", "a;b", "$(id)", "a b", "~nobody/x", "/nowhere/at/all",
                                   "org/..", "-x/y", "org/name\n", "https://huggingface.co/org/name", "org\\name"])
def test_what_is_no_id_never_reaches_the_hub(model, monkeypatch, tmp_path):
    empty = tmp_path / "a" / "b" / "c"
    empty.mkdir(parents=True)
    monkeypatch.chdir(empty)
    monkeypatch.setattr(models, "snapshot_download", lambda *_, **__: pytest.fail("the hub was asked"))
    assert repr(model) in refusal(model)


def test_an_unknown_embedded_model_is_refused():
    sentence = refusal("embedded:gpt-17")
    assert "'gpt-17'" in sentence and "smollm2-135m-instruct" in sentence
    assert "smollm2-135m-instruct" in refusal("embedded:wikipedia")  # an asset, but a text


def test_an_unreachable_hub_says_at_once_what_to_do_offline():
    started = time.perf_counter()
    sentence = refusal("nobody/no-such-model-for-simdiff")  # HF_HUB_OFFLINE is set for all tests
    assert "cannot be reached" in sentence and "offline, name a local folder" in sentence
    assert time.perf_counter() - started < 5


def hub_error(kind, status):
    return kind("the hub's own long words", response=Mock(status_code=status, headers={}))


@pytest.mark.parametrize("error, words", [
    (hub_error(hub_errors.GatedRepoError, 403), ["is gated", "accept the licence on its page", "`hf auth login`"]),
    (hub_error(hub_errors.RepositoryNotFoundError, 404), ["the hub has no model org/name"]),
    (hub_error(hub_errors.HfHubHTTPError, 503), ["cannot be reached", "offline, name a local folder"]),
    (hub_errors.LocalEntryNotFoundError("not cached"), ["cannot be reached", "offline, name a local folder"]),
    (ConnectionError("no route"), ["cannot be reached", "offline, name a local folder"]),
    (hub_errors.HTTPError("a proxy said no"), ["cannot be reached", "offline, name a local folder"]),
])
def test_errors_of_the_hub_become_a_sentence(monkeypatch, error, words):
    def download(*_, **__):
        raise error

    monkeypatch.setattr(models, "snapshot_download", download)
    sentence = refusal("org/name")
    assert all(word in sentence for word in words), sentence


@pytest.mark.parametrize("content", [b"", b"another kind of file" * 50, b"GGUF" + struct.pack("<IQQ", 3, 0, 0),
                                     b"GGUF, but not really",
                                     b"GGUF" + struct.pack("<IQQ", 3, 9, 9)],
                         ids=["empty", "other", "no metadata", "short", "cut off"])
def test_a_broken_gguf_file_is_refused_and_leaves_nothing(tmp_path, monkeypatch, content):
    monkeypatch.setenv("SIMDIFF_CACHE", str(tmp_path / "cache"))
    (tmp_path / "model.gguf").write_bytes(content)
    assert "model.gguf cannot be read as a GGUF model" in refusal(tmp_path / "model.gguf")
    assert not [path for path in (tmp_path / "cache").rglob("*") if path.name != "checkpoints"]


def test_a_gguf_file_that_is_not_there_is_no_matter_of_the_hub(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in (tmp_path / "missing.gguf", "folder/missing.gguf", "missing.gguf"):
        sentence = refusal(name)
        assert "missing.gguf" in sentence and "cannot be reached" not in sentence


def test_an_empty_name_is_refused():
    assert "''" in refusal("")


# ---- dtype and structure ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("cuda, cpu, expected", [
    (False, {"avx2": True, "amx_bf16": False, "avx512_bf16": False}, torch.float32),
    (False, {}, torch.float32),
    (False, {"amx_bf16": True}, torch.bfloat16),
    (False, {"avx512_bf16": True}, torch.bfloat16),
    (True, {}, torch.bfloat16),
])
def test_auto_is_bfloat16_only_where_the_hardware_has_it(monkeypatch, cuda, cpu, expected):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda)
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: cpu)
    assert pick_dtype("auto") == expected
    assert [pick_dtype(name) for name in ("float32", "bfloat16", "float16")] == [torch.float32, torch.bfloat16,
                                                                                 torch.float16]


def test_decoder_layers_are_found_in_every_family(tiny):
    layers = decoder_layers(tiny)
    assert len(layers) == 6 == len({id(layer) for layer in layers})
    assert len({type(layer) for layer in layers}) == 1
    n_whole = sum(p.numel() for p in tiny.parameters())
    assert n_whole / 2 < sum(p.numel() for layer in layers for p in layer.parameters()) < n_whole
    assert layers in list(decoder_stack(tiny).children())
    assert tiny.get_output_embeddings() not in list(decoder_stack(tiny).modules())


def test_a_model_of_two_or_no_such_lists_is_refused(llama):
    llama.model.twin = nn.ModuleList(nn.Identity() for _ in range(6))
    with pytest.raises(SimDiffError, match="LlamaForCausalLM has 2 lists of 6 modules"):
        decoder_layers(llama)
    del llama.model.twin
    llama.model.other = nn.ModuleList(nn.Identity() for _ in range(5))  # of another length: no doubt
    assert decoder_layers(llama) is llama.model.layers
    llama.model.layers = nn.ModuleList(llama.model.layers[:4])
    with pytest.raises(SimDiffError, match="LlamaForCausalLM has 0 lists of 6 modules"):
        decoder_layers(llama)


def test_greedy_text_equals_the_likeliest_word_each_time(llama, tokenizer):
    llama.generation_config.eos_token_id = None
    ids = [5, 6, 7]
    for _ in range(8):
        ids.append(llama(torch.tensor([ids])).logits[0, -1].argmax().item())
    words = generate_text(llama, tokenizer, "w5 w6 w7", n_new_tokens=8)
    assert words == tokenizer.decode(ids, skip_special_tokens=True) and words.startswith("w5 w6 w7")


# ---- the paper's models ------------------------------------------------------------------------------------------

# Published on the models' own pages.
KNOWN_PARAMETERS = {
    "Qwen/Qwen2.5-0.5B": 494_032_768,
    "Qwen/Qwen2.5-1.5B": 1_543_714_304,
    "Qwen/Qwen2.5-3B": 3_085_938_688,
    "meta-llama/Llama-2-7b-hf": 6_738_415_616,
    "mistralai/Mistral-7B-v0.3": 7_248_023_552,
    "meta-llama/Llama-3.1-8B": 8_030_261_248,
    "meta-llama/Llama-2-13b-hf": 13_015_864_320,
}


def test_the_paper_has_seven_models():
    assert list(PAPER_MODELS) == list(KNOWN_PARAMETERS)


@pytest.mark.parametrize("hub_id", KNOWN_PARAMETERS)
def test_parameters_of_the_papers_models(hub_id):
    assert count_parameters(hub_id) == KNOWN_PARAMETERS[hub_id]
