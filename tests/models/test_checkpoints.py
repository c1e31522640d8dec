"""Checkpoints: names that users give, what is refused and with which sentence."""

import errno
import json
import os
import shutil
import struct
import time
from pathlib import Path
from unittest.mock import Mock

import pytest
import torch
from huggingface_hub import errors as hub_errors
from transformers import BertConfig, BertForMaskedLM, T5Config, T5ForConditionalGeneration

from simdiff_utils import SimDiffError
from simdiff_utils.engine.load import load_model, load_tokenizer, pick_device
from simdiff_utils.models import checkpoints
from simdiff_utils.models.checkpoints import resolve_checkpoint


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


# ---- found ---------------------------------------------------------------------------------------


def test_a_local_folder_is_found_loaded_and_named(folder, llama, blocks, monkeypatch):
    checkpoint = resolve_checkpoint(str(folder))
    assert (checkpoint.folder, checkpoint.label) == (folder, "tiny-llama")
    loaded = load_model(checkpoint.folder, "float32")
    assert not loaded.training and loaded.dtype == torch.float32 and loaded.device == pick_device()
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

    monkeypatch.setattr(checkpoints, "snapshot_download", download)
    checkpoint = resolve_checkpoint("HuggingFaceTB/SmolLM2-135M")
    assert (checkpoint.folder, checkpoint.label) == (folder, "HuggingFaceTB/SmolLM2-135M")
    assert asked["hub_id"] == "HuggingFaceTB/SmolLM2-135M"
    assert {"*.json", "*.safetensors"} <= set(asked["patterns"])
    assert not any("bin" in pattern or "pt" in pattern or pattern == "*" for pattern in asked["patterns"])


def test_large_files_are_hashed_once_ever(folder, tmp_path, monkeypatch):
    monkeypatch.setenv("SIMDIFF_CACHE", str(tmp_path / "cache"))
    plain = resolve_checkpoint(str(folder)).sha256
    weights, read = folder / "model.safetensors", []
    original = checkpoints.hash_file
    monkeypatch.setattr(checkpoints, "hash_file", lambda path: read.append(path.name) or original(path))
    with weights.open("ab") as file:
        file.truncate(2**27)  # a hole in the file: it takes no disk
    changed = resolve_checkpoint(str(folder)).sha256
    assert resolve_checkpoint(str(folder)).sha256 == changed != plain
    assert read.count("model.safetensors") == 1
    os.utime(weights, (1, 1))  # touched since: read again
    assert resolve_checkpoint(str(folder)).sha256 == changed and read.count("model.safetensors") == 2


def test_the_hubs_cache_names_the_hash_itself(folder, tmp_path, monkeypatch):
    blob = tmp_path / "blobs" / ("a" * 64)
    blob.parent.mkdir()
    (folder / "model.safetensors").rename(blob)
    (folder / "model.safetensors").symlink_to(blob)
    monkeypatch.setattr(
        checkpoints, "hash_file", lambda path: "b" * 64 if path.name == "config.json" else 1 / 0
    )
    resolve_checkpoint(str(folder))


# ---- refused -------------------------------------------------------------------------------------


def test_an_encoder_decoder_is_refused(tmp_path):
    T5ForConditionalGeneration(
        T5Config(vocab_size=50, d_model=16, d_kv=8, d_ff=16, num_layers=2, num_heads=2)
    ).save_pretrained(tmp_path)
    assert "no decoder-only language model (its architecture is T5ForConditionalGeneration)" in refusal(
        tmp_path
    )


def test_a_masked_language_model_is_refused(tmp_path):
    BertForMaskedLM(
        BertConfig(
            vocab_size=50, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=16
        )
    ).save_pretrained(tmp_path)
    assert "no decoder-only language model (its architecture is BertForMaskedLM)" in refusal(tmp_path)


def test_pickled_weights_are_refused(folder):
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    assert "has no .safetensors weights, and pickled ones are not read" in refusal(folder)


def test_a_folder_without_or_with_a_broken_config_is_refused(folder):
    (folder / "config.json").write_text("{ this is no JSON")
    assert "cannot read the config" in refusal(folder)
    (folder / "config.json").write_text(
        '{"model_type": "of-the-future", "architectures": ["FutureForCausalLM"]}'
    )
    assert "cannot read the config" in refusal(folder)
    (folder / "config.json").unlink()
    assert "holds no config.json" in refusal(folder)


@pytest.mark.parametrize(
    "model",
    [
        "../../etc",
        "no/such/folder",
        "a;b",
        "$(id)",
        "a b",
        "~nobody/x",
        "/nowhere/at/all",
        "org/..",
        "-x/y",
        "org/name\n",
        "https://huggingface.co/org/name",
        "org\\name",
    ],
)
def test_what_is_no_id_never_reaches_the_hub(model, monkeypatch, tmp_path):
    empty = tmp_path / "a" / "b" / "c"
    empty.mkdir(parents=True)
    monkeypatch.chdir(empty)
    monkeypatch.setattr(checkpoints, "snapshot_download", lambda *_, **__: pytest.fail("the hub was asked"))
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


@pytest.mark.parametrize(
    "error, words",
    [
        (
            hub_error(hub_errors.GatedRepoError, 403),
            ["is gated", "accept the licence on its page", "`hf auth login`"],
        ),
        (hub_error(hub_errors.RepositoryNotFoundError, 404), ["the hub has no model org/name"]),
        (hub_error(hub_errors.HfHubHTTPError, 503), ["cannot be reached", "offline, name a local folder"]),
        (
            hub_errors.LocalEntryNotFoundError("not cached"),
            ["cannot be reached", "offline, name a local folder"],
        ),
        (ConnectionError("no route"), ["cannot be reached", "offline, name a local folder"]),
        (OSError(errno.ENOSPC, "No space left on device"), ["the disk is too full for org/name", "HF_HOME"]),
        (hub_errors.HTTPError("a proxy said no"), ["cannot be reached", "offline, name a local folder"]),
    ],
)
def test_errors_of_the_hub_become_a_sentence(monkeypatch, error, words):
    def download(*_, **__):
        raise error

    monkeypatch.setattr(checkpoints, "snapshot_download", download)
    sentence = refusal("org/name")
    assert all(word in sentence for word in words), sentence


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"another kind of file" * 50,
        b"GGUF" + struct.pack("<IQQ", 3, 0, 0),
        b"GGUF, but not really",
        b"GGUF" + struct.pack("<IQQ", 3, 9, 9),
    ],
    ids=["empty", "other", "no metadata", "short", "cut off"],
)
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


def test_code_that_comes_with_a_model_is_not_run_unasked(tmp_path):
    (tmp_path / "config.json").write_text(
        json.dumps(
            {
                "model_type": "mine",
                "architectures": ["MineForCausalLM"],
                "auto_map": {"AutoConfig": "configuration.Mine"},
            }
        )
    )
    (tmp_path / "configuration.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    with pytest.raises(
        SimDiffError, match="needs code that comes with it: read that code, then set trust_remote_code"
    ):
        resolve_checkpoint(str(tmp_path))
    assert not (tmp_path / "ran").exists()
