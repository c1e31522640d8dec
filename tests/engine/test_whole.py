"""A checkpoint is loaded whole or refused in one sentence, in memory and streamed alike."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from simdiff_utils import SimDiffError
from simdiff_utils.engine.decoder import Decoder, stream_decoder
from simdiff_utils.engine.load import load_model, load_tokenizer, read_config
from simdiff_utils.engine.whole import check_folder
from tests.helpers import logits_of

POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 2471645608\n"


@pytest.fixture
def folder(llama, tokenizer, tmp_path) -> Path:
    llama.save_pretrained(tmp_path / "m")
    tokenizer.save_pretrained(tmp_path / "m")
    return tmp_path / "m"


@pytest.fixture
def sharded(llama, tmp_path) -> Path:
    llama.save_pretrained(tmp_path / "shards", max_shard_size="20KB")
    return tmp_path / "shards"


def change_weights(folder: Path, lost: tuple = (), **more: torch.Tensor) -> None:
    state = load_file(folder / "model.safetensors")
    state = {name: tensor for name, tensor in (state | more).items() if name not in lost}
    save_file(state, folder / "model.safetensors", {"format": "pt"})


def change_json(folder: Path, file: str = "config.json", **changes: object) -> None:
    path = folder / file
    content = json.loads(path.read_text()) if path.exists() else {}
    path.write_text(json.dumps(content | changes))


def refusal(do, *arguments) -> str:
    with pytest.raises(SimDiffError) as error:
        do(*arguments)
    assert "\n" not in str(error.value)
    return str(error.value)


def stream(folder: Path) -> torch.Tensor:
    decoder = stream_decoder(folder, "float32")
    states = next(states for _, _, states in decoder.run(torch.tensor([[5, 6, 7, 8]]), 1))
    return decoder.logits(states)


# ---- weights -------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["lm_head.weight", "model.norm.weight", "model.layers.3.mlp.up_proj.weight"])
def test_a_lost_weight_is_named_in_memory_and_streamed(folder, name):
    change_weights(folder, lost=(name,))
    assert f"m holds no {name} of LlamaForCausalLM" in refusal(load_model, folder, "float32")
    assert name.split("layers.3.")[-1] in refusal(stream, folder)


@pytest.mark.parametrize(
    "name",
    [
        "model.layers.2.self_attn.q_norm.weight",
        "model.layers.2.mlp.up_proj.weight_scale",
        "model.extra.weight",
    ],
)
def test_a_weight_that_the_model_would_have_to_run_is_refused(folder, name):
    change_weights(folder, **{name: torch.ones(8)})
    said = f"m holds a {name} that LlamaForCausalLM does not have"
    assert said in refusal(load_model, folder, "float32") and said in refusal(stream, folder)


@pytest.mark.parametrize("name", ["v_head.summary.weight", "mtp.0.weight", "model.layers.6.eh_proj.weight"])
def test_a_head_or_a_layer_that_nobody_runs_is_let_be(folder, llama, name):
    change_weights(folder, **{name: torch.ones(8, 32)})
    ids = torch.tensor([[5, 6, 7, 8]])
    expected = logits_of(llama, ids)
    torch.testing.assert_close(logits_of(load_model(folder, "float32"), ids), expected)
    torch.testing.assert_close(stream(folder), expected)


def test_a_weight_of_another_shape_is_refused(folder):
    change_weights(folder, **{"model.norm.weight": torch.ones(16)})
    said = refusal(load_model, folder, "float32")
    assert "m holds a model.norm.weight of another shape than LlamaForCausalLM has" in said
    assert "m holds no model.norm.weight of LlamaForCausalLM" in refusal(stream, folder)


# ---- files ---------------------------------------------------------------------------------------


def test_adapter_files_are_refused_beside_weights_and_in_their_place(folder):
    change_json(folder, "adapter_config.json", peft_type="LORA", base_model_name_or_path="org/base")
    for load in (load_model, stream):
        assert "holds adapter_config.json beside whole weights" in refusal(load, folder)
    (folder / "model.safetensors").rename(folder / "adapter_model.safetensors")
    assert "holds an adapter (adapter_config.json) and no whole model" in refusal(load_model, folder)


def test_an_index_without_metadata_is_read(sharded, llama, blocks):
    index = json.loads((sharded / "model.safetensors.index.json").read_text())
    (sharded / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index["weight_map"]}))
    torch.testing.assert_close(logits_of(load_model(sharded, "float32"), blocks), logits_of(llama, blocks))


@pytest.mark.parametrize(
    ("index", "words"),
    [
        (None, "no model.safetensors.index.json that says what is in which"),
        ("{}", "is no index of weight files"),
        ("[1]", "is no index of weight files"),
        ('{"weight_map": {"a": "elsewhere.safetensors"}}', "lacks elsewhere.safetensors"),
        (POINTER, "is a git-lfs pointer"),
    ],
)
def test_a_lost_or_damaged_index_is_a_sentence(sharded, index, words):
    path = sharded / "model.safetensors.index.json"
    path.unlink() if index is None else path.write_text(index)
    assert words in refusal(load_model, sharded) and words in refusal(stream, sharded)


def test_a_weight_file_of_another_name_is_a_sentence(folder):
    (folder / "model.safetensors").rename(folder / "model.fp16.safetensors")
    assert "holds model.fp16.safetensors, and transformers looks for model" in refusal(load_model, folder)


def test_pointers_are_told_from_files(folder, sharded):
    sorted(sharded.glob("model-*.safetensors"))[1].write_text(POINTER)
    assert "run `git lfs pull`" in refusal(load_model, sharded)
    (folder / "tokenizer.json").write_text(POINTER)
    assert "tokenizer.json in m is a git-lfs pointer" in refusal(load_tokenizer, folder)


def test_a_folder_without_tokenizer_says_so(sharded):
    assert "shards has no tokenizer" in refusal(load_tokenizer, sharded)


# ---- quantised -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "method", ["gptq", "awq", "bitsandbytes", "compressed-tensors", "torchao", "my_int8", "fp8"]
)
def test_quantised_weights_are_refused_where_they_are_to_be_run(folder, method):
    change_json(folder, quantization_config={"quant_method": method})
    for load in (load_model, stream):
        assert f"m is quantised ({method})" in refusal(load, folder)


def test_a_config_that_promises_what_the_weights_are_not_is_refused(folder):
    change_json(folder, quantization_config={"quant_method": "mxfp4"})
    assert "says that its weights are quantised (mxfp4), and none is" in refusal(check_folder, folder, True)


def test_packed_weights_without_a_config_are_refused(folder):
    name = "model.layers.2.mlp.up_proj.weight"
    change_weights(folder, **{name: torch.ones(48, 32).to(torch.float8_e4m3fn)})
    assert f"{name} in m is stored in 8 bits or fewer" in refusal(load_model, folder)


# ---- options of a run that somebody saved ----------------------------------------------------------


def test_saved_options_of_a_run_are_not_obeyed(folder, llama, blocks):
    change_json(folder, _attn_implementation="flash_attention_2", return_dict=False, use_cache=False)
    config = read_config(folder)
    assert config.use_cache and config.return_dict and config.num_hidden_layers == 6
    torch.testing.assert_close(logits_of(load_model(folder, "float32"), blocks), logits_of(llama, blocks))


def test_folders_may_be_given_as_text(folder, blocks):
    loaded = Decoder(load_model(str(folder), "float32"))
    assert loaded.n_layers == stream_decoder(str(folder), "float32").n_layers == 6
    assert load_tokenizer(str(folder))("w9")["input_ids"] == [9]
    shutil.rmtree(folder)
    assert "cannot read the config" in refusal(read_config, str(folder))
