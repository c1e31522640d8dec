"""Removal and export against models built by hand from the kept layers, in every family."""

import copy
import json
import re

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from simdiff_utils import surgery
from simdiff_utils.models import checkpoint_folder, decoder_layers, load_model, load_tokenizer
from simdiff_utils.settings import SimDiffError
from simdiff_utils.surgery import export_pruned, layers_removed, verify_reload

N_LAYERS = 6
SETS = [frozenset(s) for s in ({0}, {5}, {0, 2, 5}, {2, 3, 4})]  # first, last, scattered, contiguous
sets = pytest.mark.parametrize("removed", SETS, ids=lambda s: "-".join(map(str, sorted(s))))
MIXED = ["sliding_attention", "sliding_attention", "full_attention"] * 2  # the layer types of the tiny Gemma 3


def build_by_hand(model, removed):
    """A new model of the same class with only the kept layers: config and weights cut here, not by our code."""
    kept = [i for i in range(N_LAYERS) if i not in removed]
    config = copy.deepcopy(model.config)
    config.num_hidden_layers = len(kept)
    if getattr(config, "layer_types", None):
        config.layer_types = [config.layer_types[i] for i in kept]
    weights = {}
    for name, tensor in model.state_dict().items():
        found = re.fullmatch(r"(.*\.(?:layers|h)\.)(\d+)(\..*)", name)
        if not found:
            weights[name] = tensor
        elif int(found[2]) in kept:
            weights[f"{found[1]}{kept.index(int(found[2]))}{found[3]}"] = tensor
    built = type(model)(config).eval()
    built.load_state_dict(weights)
    return built


@torch.inference_mode()
def logits_of(model, blocks):
    return model(input_ids=blocks, use_cache=False).logits.clone()


def assert_cache_agrees(model, blocks):
    """Greedy generation with the KV cache: same tokens as without, and logits equal up to rounding."""
    arguments = dict(attention_mask=torch.ones_like(blocks[:2]), max_new_tokens=12, do_sample=False, eos_token_id=None,
                     pad_token_id=0, output_logits=True, return_dict_in_generate=True)
    cached = model.generate(blocks[:2], use_cache=True, **arguments)
    plain = model.generate(blocks[:2], use_cache=False, **arguments)
    assert cached.past_key_values is not None and plain.past_key_values is None
    torch.testing.assert_close(torch.stack(cached.logits), torch.stack(plain.logits), rtol=1e-3, atol=1e-3)
    assert cached.sequences.tolist() == plain.sequences.tolist()
    return plain.sequences


@sets
def test_the_rest_computes_what_a_model_built_by_hand_does(tiny, blocks, removed):
    expected = build_by_hand(tiny, removed)
    with layers_removed(tiny, removed) as pruned:
        torch.testing.assert_close(logits_of(pruned, blocks), logits_of(expected, blocks), rtol=1e-5, atol=1e-5)
        tokens = assert_cache_agrees(pruned, blocks)
    assert tokens.tolist() == assert_cache_agrees(expected, blocks).tolist()


@sets
def test_a_neighbour_removed_instead_would_be_seen(tiny, blocks, removed):
    """The test above can fail: the tiny models are made such that every layer matters."""
    neighbours = {frozenset(removed - {i} | {i + step}) for i in removed for step in (-1, 1)
                  if 0 <= i + step < N_LAYERS and i + step not in removed}
    assert neighbours
    expected = logits_of(build_by_hand(tiny, removed), blocks)
    for other in (*neighbours, frozenset()):
        with layers_removed(tiny, other):
            assert (logits_of(tiny, blocks) - expected).abs().max() > 0.1


@pytest.mark.parametrize("name", ["llama", "gemma3", "gpt2"])
def test_cached_generation_needs_the_layers_renumbered(make_tiny, blocks, monkeypatch, name):
    monkeypatch.setattr(surgery, "_renumber", lambda layers, kept: lambda: None)
    model = make_tiny(name)
    with layers_removed(model, frozenset({0, 2})), pytest.raises((AssertionError, IndexError)):
        assert_cache_agrees(model, blocks)


def state_of(model):
    numbers = {name: module.layer_idx for name, module in model.named_modules() if hasattr(module, "layer_idx")}
    return copy.deepcopy(model.config.to_dict()), numbers, [id(layer) for layer in decoder_layers(model)]


@sets
def test_the_model_is_whole_again_afterwards(tiny, blocks, removed):
    before, dense = state_of(tiny), logits_of(tiny, blocks)
    with layers_removed(tiny, removed):
        assert state_of(tiny) != before
        assert len(decoder_layers(tiny)) == N_LAYERS - len(removed) == tiny.config.num_hidden_layers
    assert state_of(tiny) == before
    assert torch.equal(logits_of(tiny, blocks), dense)
    with pytest.raises(KeyboardInterrupt), layers_removed(tiny, removed):
        raise KeyboardInterrupt
    assert state_of(tiny) == before
    assert torch.equal(logits_of(tiny, blocks), dense)


def test_the_model_is_whole_again_when_the_removal_itself_fails(llama, blocks, monkeypatch):
    before, dense = state_of(llama), logits_of(llama, blocks)

    def fail(config, kept):
        raise RuntimeError("a config that refuses to be cut")

    monkeypatch.setattr(surgery, "_cut_config", fail)
    with pytest.raises(RuntimeError), layers_removed(llama, frozenset({1})):
        pass
    assert state_of(llama) == before
    assert torch.equal(logits_of(llama, blocks), dense)


def test_weights_are_shared_not_copied(llama):
    addresses = {p.data_ptr() for p in llama.parameters()}
    with layers_removed(llama, frozenset({1, 4})):
        assert {p.data_ptr() for p in llama.parameters()} < addresses


def test_the_empty_set_removes_nothing(tiny, blocks):
    dense = logits_of(tiny, blocks)
    with layers_removed(tiny, frozenset()):
        assert torch.equal(logits_of(tiny, blocks), dense)


@settings(derandomize=True, deadline=None, max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(removed=st.frozensets(st.integers(0, N_LAYERS - 1), min_size=1, max_size=N_LAYERS - 1))
def test_any_proper_subset_can_be_removed(make_tiny, removed):
    model = make_tiny("gemma3")
    layers = list(decoder_layers(model))
    kept = [i for i in range(N_LAYERS) if i not in removed]
    with layers_removed(model, removed):
        assert [id(layer) for layer in decoder_layers(model)] == [id(layers[i]) for i in kept]
        assert [layer.self_attn.layer_idx for layer in decoder_layers(model)] == list(range(len(kept)))
        assert model.config.layer_types == [MIXED[i] for i in kept]
    assert [layer.self_attn.layer_idx for layer in layers] == list(range(N_LAYERS))
    assert model.config.layer_types == MIXED


@pytest.mark.parametrize("removed", [{6}, {-1}, {0, 17}, set(range(6))])
def test_sets_that_cannot_be_removed_are_refused(llama, removed):
    before = state_of(llama)
    with pytest.raises(SimDiffError, match="layers 0 to 5"), layers_removed(llama, frozenset(removed)):
        pytest.fail("the block ran")
    assert state_of(llama) == before


# ---- export --------------------------------------------------------------------------------------------------


@sets
def test_plain_transformers_loads_the_export(tiny, tokenizer, blocks, tmp_path, removed):
    before = state_of(tiny)
    export_pruned(tiny, tokenizer, removed, tmp_path)
    assert [state_of(tiny)[i] for i in (1, 2)] == [before[i] for i in (1, 2)]  # save_pretrained writes into the config
    assert tiny.config.num_hidden_layers == N_LAYERS

    reloaded, report = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(report.values()), report  # nothing missing, unexpected or of another shape
    assert reloaded.config.num_hidden_layers == N_LAYERS - len(removed) == len(decoder_layers(reloaded))
    torch.testing.assert_close(logits_of(reloaded, blocks), logits_of(build_by_hand(tiny, removed), blocks),
                               rtol=1e-5, atol=1e-5)
    assert_cache_agrees(reloaded, blocks)
    assert verify_reload(tiny, removed, tmp_path, blocks[:1]) <= 1e-5


def test_the_tokenizer_travels_with_the_export(llama, tokenizer, tmp_path):
    export_pruned(llama, tokenizer, frozenset({1}), tmp_path)
    assert AutoTokenizer.from_pretrained(tmp_path)("w5 w7")["input_ids"] == [5, 7]


def test_per_layer_entries_of_the_config_are_cut(make_tiny, tokenizer, tmp_path):
    export_pruned(make_tiny("gemma3"), tokenizer, frozenset({1, 2}), tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["num_hidden_layers"] == 4
    assert config["layer_types"] == ["sliding_attention", "sliding_attention", "sliding_attention", "full_attention"]


def test_lists_that_only_happen_to_be_as_long_are_left_alone(make_tiny, tokenizer, tmp_path):
    model = make_tiny("llama", eos_token_id=[2, 3, 4, 5, 6, 7])
    export_pruned(model, tokenizer, frozenset({1}), tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["eos_token_id"] == [2, 3, 4, 5, 6, 7]


@pytest.mark.parametrize("name, heads", [("llama", 1), ("llama-tied", 0), ("gemma3", 0), ("gpt2", 0)])
def test_the_file_holds_the_kept_layers_and_a_tied_matrix_once(make_tiny, tokenizer, tmp_path, name, heads):
    model = make_tiny(name)
    removed = frozenset({0, 3})
    export_pruned(model, tokenizer, removed, tmp_path)
    files = list(tmp_path.glob("*.safetensors"))
    stored = {key: tensor for file in files for key, tensor in load_file(file).items()}
    assert sum("lm_head" in key for key in stored) == heads
    assert sum(tensor.shape == (97, 32) for tensor in stored.values()) == 1 + heads
    dropped = sum(p.numel() for i in removed for p in decoder_layers(model)[i].parameters())
    assert sum(tensor.numel() for tensor in stored.values()) == sum(p.numel() for p in model.parameters()) - dropped
    assert not list(tmp_path.glob("*.bin"))


def test_verify_reload_refuses_another_checkpoint(llama, tokenizer, blocks, tmp_path):
    export_pruned(llama, tokenizer, frozenset({1}), tmp_path)
    assert verify_reload(llama, frozenset({1}), tmp_path, blocks[:1]) == pytest.approx(0, abs=1e-5)
    with pytest.raises(SimDiffError, match="gives other logits"):
        verify_reload(llama, frozenset({2}), tmp_path, blocks[:1])
    assert len(decoder_layers(llama)) == N_LAYERS


def test_verify_reload_refuses_logits_that_are_not_finite(llama, tokenizer, blocks, tmp_path):
    with torch.no_grad():
        llama.lm_head.weight[0, 0] = float("nan")
    export_pruned(llama, tokenizer, frozenset({1}), tmp_path)
    with pytest.raises(SimDiffError):
        verify_reload(llama, frozenset({1}), tmp_path, blocks[:1])


def test_export_in_bfloat16_keeps_the_dtype(llama, tokenizer, blocks, tmp_path):
    llama.save_pretrained(tmp_path / "dense")
    model = load_model(tmp_path / "dense", "bfloat16")
    export_pruned(model, tokenizer, frozenset({2, 3}), tmp_path / "pruned")
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "pruned").dtype == torch.bfloat16
    assert verify_reload(model, frozenset({2, 3}), tmp_path / "pruned", blocks[:1]) <= 1e-2


def test_an_export_can_be_pruned_and_exported_again(make_tiny, tokenizer, blocks, tmp_path):
    model = make_tiny("gemma3")
    export_pruned(model, tokenizer, frozenset({1}), tmp_path / "once")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "once").eval()
    export_pruned(again, tokenizer, frozenset({0, 4}), tmp_path / "twice")  # 0 and 5 in the dense model's numbers
    twice = AutoModelForCausalLM.from_pretrained(tmp_path / "twice").eval()
    expected = build_by_hand(model, {0, 1, 5})
    torch.testing.assert_close(logits_of(twice, blocks), logits_of(expected, blocks), rtol=1e-5, atol=1e-5)


# ---- the real model ----------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_smollm2_without_layers_generates_the_same_with_and_without_cache(tmp_path):
    folder = checkpoint_folder("embedded:smollm2-135m-instruct")
    model, tokenizer, removed = load_model(folder, "float32"), load_tokenizer(folder), frozenset({3, 10, 11, 28})
    export_pruned(model, tokenizer, removed, tmp_path)
    tokens = tokenizer("The capital of France is", return_tensors="pt")["input_ids"].to(model.device)
    assert verify_reload(model, removed, tmp_path, tokens) < 1e-3
    exported = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert exported.config.num_hidden_layers == 26
    assert exported.lm_head.weight is exported.model.embed_tokens.weight
    with layers_removed(model, removed):
        in_memory = assert_cache_agrees(model, tokens)
    assert assert_cache_agrees(exported, tokens.cpu()).tolist() == in_memory.tolist()
