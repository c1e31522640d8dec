"""Checkpoints: names that users give, what is refused and with which sentence."""

import errno
import json
import os
import shutil
import struct
import time
from pathlib import Path
from unittest.mock import Mock

import gguf
import numpy as np
import pytest
import torch
from huggingface_hub import errors as hub_errors
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    BertConfig,
    BertForMaskedLM,
    Mxfp4Config,
    T5Config,
    T5ForConditionalGeneration,
)

from simdiff_utils import SimDiffError
from simdiff_utils.engine.load import load_model, load_tokenizer, pick_device
from simdiff_utils.files import read_json
from simdiff_utils.models import checkpoints, gguf_files
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
    assert "transformers cannot load the GGUF file model.gguf: " in refusal(tmp_path / "model.gguf")
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


# ---- turned into plain weights, once ---------------------------------------------------------------


def write_gguf(path: Path, said: int = 6, lost: str = "", more: dict[str, tuple] | None = None) -> Path:
    """A llama of 6 blocks with random weights and a tokenizer of pieces."""
    writer = gguf.GGUFWriter(str(path), "llama")
    writer.add_context_length(64)
    writer.add_embedding_length(32)
    writer.add_block_count(said)
    writer.add_feed_forward_length(48)
    writer.add_head_count(4)
    writer.add_head_count_kv(2)
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_rope_freq_base(10000.0)
    writer.add_vocab_size(97)
    writer.add_tokenizer_model("llama")
    writer.add_tokenizer_pre("default")
    writer.add_token_list(["<unk>", "<s>", "</s>", *(f"\u2581w{i}" for i in range(3, 97))])
    writer.add_token_scores([-float(i) for i in range(97)])
    writer.add_token_types([2, 3, 3] + [1] * 94)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    shapes = {"token_embd": (97, 32), "output_norm": (32,), "output": (97, 32)}
    square = {"attn_q": (32, 32), "attn_k": (16, 32), "attn_v": (16, 32), "attn_output": (32, 32)}
    layer = {"attn_norm": (32,), "ffn_norm": (32,)} | square
    layer |= {"ffn_gate": (48, 32), "ffn_up": (48, 32), "ffn_down": (32, 48)}
    shapes |= {f"blk.{i}.{name}": shape for i in range(6) for name, shape in layer.items()}
    rng = np.random.default_rng(0)
    for name, shape in (shapes | (more or {})).items():
        if name != lost:
            writer.add_tensor(f"{name}.weight", rng.standard_normal(shape).astype(np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.fixture
def cache(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("SIMDIFF_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def test_a_gguf_file_that_is_not_whole_is_refused_and_leaves_nothing(cache, tmp_path):
    found = resolve_checkpoint(str(write_gguf(tmp_path / "whole.gguf")))
    assert load_model(found.folder, "float32").config.num_hidden_layers == 6
    lost = refusal(write_gguf(tmp_path / "lost.gguf", lost="blk.2.ffn_up"))
    assert "the GGUF file lost.gguf holds no model.layers.2.mlp.up_proj.weight" in lost
    assert "holds no model.layers.6." in refusal(write_gguf(tmp_path / "said.gguf", said=8))
    part = "is one of 2 parts: join them with `llama-gguf-split --merge`"
    assert part in refusal(write_gguf(tmp_path / "m-00001-of-00002.gguf", lost="blk.5.ffn_up"))
    (tmp_path / "pointer.gguf").write_text("version https://git-lfs.github.com/spec/v1\n")
    assert "is a git-lfs pointer" in refusal(tmp_path / "pointer.gguf")
    assert list((cache / "checkpoints").iterdir()) == [found.folder]


def store(folder: Path, change, **config) -> None:
    """Weights changed one by one, and a quantization_config that says so."""
    state = {}
    for name, tensor in load_file(folder / "model.safetensors").items():
        state |= change(name, tensor)
    save_file(state, folder / "model.safetensors", {"format": "pt"})
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"quantization_config": config}))


def test_fp8_is_dequantised_once_as_its_scales_say(folder, llama, cache, blocks):
    expected = {}

    def to_fp8(name, weight):
        if not name.endswith("_proj.weight"):
            return {name: weight}
        scale = weight.abs().max() / 448
        packed = (weight / scale).to(torch.float8_e4m3fn)
        expected[name] = packed.float() * scale
        return {name: packed, f"{name}_scale_inv": scale.reshape(1, 1)}

    how = dict(quant_method="fp8", fmt="e4m3", activation_scheme="dynamic", weight_block_size=[128, 128])
    store(folder, to_fp8, **how)
    found = resolve_checkpoint(str(folder))
    assert found.folder.is_relative_to(cache) and found.label == "tiny-llama"
    assert resolve_checkpoint(str(folder)) == found and load_tokenizer(found.folder)("w9")["input_ids"] == [9]
    weights = dict(load_model(found.folder, "float32").named_parameters())
    for name, weight in expected.items():
        torch.testing.assert_close(weights[name], weight, rtol=1e-6, atol=0)
    assert "quantization_config" not in json.loads((found.folder / "config.json").read_text())


def test_mxfp4_is_dequantised_once_and_read_again_as_it_was(make_tiny, tokenizer, tmp_path, cache, blocks):
    folder, generator = tmp_path / "oss", torch.Generator().manual_seed(1)
    model = make_tiny("gpt-oss", hidden_size=64, intermediate_size=64, head_dim=16)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)

    def pack(name, weight):
        if not name.endswith(("experts.gate_up_proj", "experts.down_proj")):
            return {name: weight}
        shape = (weight.shape[0], weight.shape[2], weight.shape[1] // 32)
        numbers = torch.randint(0, 256, (*shape, 16), dtype=torch.uint8, generator=generator)
        return {f"{name}_blocks": numbers, f"{name}_scales": torch.full(shape, 124, dtype=torch.uint8)}

    store(folder, pack, quant_method="mxfp4", modules_to_not_convert=["lm_head"])
    plain = Mxfp4Config(dequantize=True)
    expected = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, quantization_config=plain)
    found = load_model(resolve_checkpoint(str(folder)).folder, "float32")
    torch.testing.assert_close(found(blocks).logits, expected.eval()(blocks).logits, rtol=1e-4, atol=1e-4)


def test_a_config_that_names_no_architecture_is_taken_by_its_family(folder):
    config = json.loads((folder / "config.json").read_text())
    del config["architectures"]
    (folder / "config.json").write_text(json.dumps(config))
    assert resolve_checkpoint(str(folder)).folder == folder


def test_a_large_gguf_file_is_kept_in_bfloat16_in_shards_and_equals_what_transformers_loads(
    cache, tmp_path, monkeypatch
):
    file = write_gguf(tmp_path / "model.gguf")
    whole = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file=file.name, dtype=torch.float32)
    for limit, dtype, n_files in ((2**30, torch.float32, 1), (4, torch.bfloat16, 1), (4, torch.bfloat16, 6)):
        monkeypatch.setattr(gguf_files, "_FLOAT32_BYTES", limit)
        monkeypatch.setattr(gguf_files, "_SHARD_BYTES", 2**30 if n_files == 1 else 20_000)
        folder = gguf_files.convert_gguf(file, tmp_path / f"{dtype}-{n_files}")
        assert len(list(folder.glob("*.safetensors"))) == n_files
        if n_files > 1:
            index = read_json(folder / "model.safetensors.index.json")["weight_map"]
            assert set(index) == {name for name, _ in whole.named_parameters()}
        model = AutoModelForCausalLM.from_pretrained(folder)
        assert model.dtype == dtype and model.config.architectures == ["LlamaForCausalLM"]
        for (name, found), (_, expected) in zip(
            model.named_parameters(), whole.named_parameters(), strict=True
        ):
            assert torch.equal(found, expected.to(dtype)), name
        assert model.generation_config.eos_token_id == whole.generation_config.eos_token_id == 2


def test_a_tensor_that_transformers_would_pass_over_is_refused(cache, tmp_path):
    """Llama 3's scaled rotary frequencies lie in such a one."""
    file = write_gguf(tmp_path / "scaled.gguf", more={"rope_freqs": (4,)})
    assert "holds rope_freqs.weight, which transformers does not read" in refusal(file)
