"""Removal in memory against models built by hand from the kept layers, in every family."""

import copy
import re

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from transformers import AutoConfig, AutoModelForCausalLM

from simdiff_utils import SimDiffError
from simdiff_utils.engine import surgery
from simdiff_utils.engine.decoder import Decoder, stream_decoder
from simdiff_utils.engine.load import decoder_layers
from simdiff_utils.engine.surgery import layers_merged, layers_removed, plan_cut
from tests.helpers import MIXED, N_LAYERS, SETS, TINY, build_by_hand, logits_of, merge_by_hand

sets = pytest.mark.parametrize("removed", SETS, ids=lambda s: "-".join(map(str, sorted(s))))
TOLERANCE = 1e-5


def assert_cache_agrees(model, blocks):
    """Greedy generation with the KV cache: same tokens as without, and logits equal up to rounding."""
    arguments = dict(
        attention_mask=torch.ones_like(blocks[:2]),
        max_new_tokens=12,
        do_sample=False,
        eos_token_id=None,
        pad_token_id=0,
        output_logits=True,
        return_dict_in_generate=True,
    )
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
        torch.testing.assert_close(
            logits_of(pruned, blocks), logits_of(expected, blocks), rtol=TOLERANCE, atol=TOLERANCE
        )
        tokens = assert_cache_agrees(pruned, blocks)
    assert tokens.tolist() == assert_cache_agrees(expected, blocks).tolist()


@pytest.mark.parametrize("name", ["llama", "gemma3", "gpt2"])
def test_cached_generation_needs_the_layers_renumbered(make_tiny, blocks, monkeypatch, name):
    plan = surgery.plan_cut
    monkeypatch.setattr(surgery, "plan_cut", lambda model, removed: (plan(model, removed)[0], []))
    model = make_tiny(name)
    with layers_removed(model, frozenset({0, 2})), pytest.raises((AssertionError, IndexError)):
        assert_cache_agrees(model, blocks)


def state_of(model):
    numbers = {
        name: module.layer_idx for name, module in model.named_modules() if hasattr(module, "layer_idx")
    }
    return copy.deepcopy(model.config.to_dict()), numbers, [id(layer) for layer in decoder_layers(model)]


def test_the_model_is_whole_again_afterwards(tiny, blocks):
    removed, before, dense = frozenset({0, 2, 5}), state_of(tiny), logits_of(tiny, blocks)
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

    def fail(model, kept):
        raise RuntimeError("a list that refuses to be replaced")

    monkeypatch.setattr(surgery, "layers_replaced", fail)
    with pytest.raises(RuntimeError), layers_removed(llama, frozenset({1})):
        pass
    assert state_of(llama) == before
    assert torch.equal(logits_of(llama, blocks), dense)


def test_weights_are_shared_not_copied(llama):
    addresses = {p.data_ptr() for p in llama.parameters()}
    with layers_removed(llama, frozenset({1, 4})):
        assert {p.data_ptr() for p in llama.parameters()} < addresses


def test_the_empty_set_removes_nothing(llama, blocks):
    dense = logits_of(llama, blocks)
    with layers_removed(llama, frozenset()):
        assert torch.equal(logits_of(llama, blocks), dense)


@settings(
    derandomize=True,
    deadline=None,
    max_examples=25,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
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


# ---- refused by structure, not by name -----------------------------------------------------------


@pytest.mark.parametrize(
    "family, changes, removed, words",
    [
        ("diffllama", {}, {0}, "lambda_init"),  # each layer's constant is computed from its place
        ("minimax", {}, {1}, "num_hidden_layers"),
        ("recurrent_gemma", {}, {0}, "temporal_block"),  # kinds of layers at fixed places
    ],
)
def test_layers_that_depend_on_their_place_are_refused(family, changes, removed, words):
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **TINY | changes)).eval()
    before = state_of(model)
    with pytest.raises(SimDiffError, match=words) as error, layers_removed(model, frozenset(removed)):
        pytest.fail("the block ran")
    assert type(model).__name__ in str(error.value) and "\n" not in str(error.value)
    assert state_of(model) == before


def test_lists_of_layer_indices_and_dense_layers_before_the_experts_are_cut(make_tiny):
    config, _ = plan_cut(make_tiny("qwen3-moe"), frozenset({0, 2}))
    assert config.mlp_only_layers == [0, 2]  # 1 and 4 of the dense model
    sizes = TINY | dict(
        num_key_value_heads=4,
        moe_intermediate_size=16,
        n_routed_experts=4,
        num_experts_per_tok=2,
        n_group=1,
        topk_group=1,
        first_k_dense_replace=2,
    )
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model("glm4_moe", **sizes)).eval()
    for removed, expected in (({0}, 1), ({0, 1}, 0), ({4}, 2)):
        assert plan_cut(model, frozenset(removed))[0].first_k_dense_replace == expected


def test_lists_that_only_happen_to_be_as_long_are_left_alone(make_tiny):
    config, _ = plan_cut(make_tiny("llama", eos_token_id=[2, 3, 4, 5, 6, 7]), frozenset({1}))
    assert config.eos_token_id == [2, 3, 4, 5, 6, 7]
    assert config.num_hidden_layers == 5


# ---- merged, LaCo's rule -------------------------------------------------------------------------


# the last two: merged ones again
MERGES = [((1, (2, 3)),), ((4, (5,)), (2, (3, 4))), ((2, (3, 4, 5)), (0, (1, 2)))]


@pytest.mark.parametrize("merges", MERGES, ids=str)
@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma3", "falcon", "mixtral"])
def test_merged_layers_have_the_matrices_of_the_last_one_folded_and_their_own_norms(
    make_tiny, blocks, name, merges
):
    model = make_tiny(name)
    expected = merge_by_hand(model, merges)
    dense, logits = copy.deepcopy(model.state_dict()), logits_of(model, blocks)
    removed = frozenset(i for _, folded in merges for i in folded)
    with layers_merged(model, merges):
        assert len(decoder_layers(model)) == N_LAYERS == model.config.num_hidden_layers
        for key, tensor in model.state_dict().items():
            torch.testing.assert_close(tensor, expected.state_dict()[key], rtol=1e-6, atol=1e-6)
        changed = {key for key, tensor in model.state_dict().items() if not torch.equal(tensor, dense[key])}
        with layers_removed(model, removed):
            torch.testing.assert_close(
                logits_of(model, blocks),
                logits_of(build_by_hand(expected, removed), blocks),
                rtol=1e-4,
                atol=1e-4,
            )
    of_layer = {i: {key for key in dense if re.search(rf"\.(layers|h)\.{i}\.", key)} for i, _ in merges}
    stays = {key for keys in of_layer.values() for key in keys if dense[key].dim() > 1 and "bias" not in key}
    assert changed == stays, "the matrices of the layers that stay, and nothing else"
    assert all(torch.equal(tensor, dense[key]) for key, tensor in model.state_dict().items())
    assert torch.equal(logits_of(model, blocks), logits)


@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma3", "falcon", "mixtral"])
def test_one_layer_folded_in_is_the_lower_one_removed_but_for_its_norms(make_tiny, blocks, name):
    """In gemma3 both are of one kind of attention."""
    model = make_tiny(name)
    layers = decoder_layers(model)
    with torch.no_grad():
        for parameter, other in zip(layers[3].parameters(), layers[4].parameters(), strict=True):
            if parameter.dim() == 1:
                other.copy_(parameter)
    expected = logits_of(build_by_hand(model, {3}), blocks)
    with layers_merged(model, ((3, (4,)),)), layers_removed(model, frozenset({4})):
        torch.testing.assert_close(logits_of(model, blocks), expected, rtol=1e-4, atol=1e-4)


def test_merges_keep_the_dtype(make_tiny):
    model = make_tiny("llama").to(torch.bfloat16)
    merges = ((1, (2, 3, 4)),)
    expected = merge_by_hand(model, merges).state_dict()
    with layers_merged(model, merges):
        for key, tensor in model.state_dict().items():
            assert tensor.dtype == torch.bfloat16 and torch.equal(tensor, expected[key])


def test_weights_are_whole_again_after_an_error_in_a_merge_or_inside(make_tiny):
    model = make_tiny("qwen3-moe")
    dense, key = copy.deepcopy(model.state_dict()), "model.layers.2.self_attn.q_proj.weight"
    with pytest.raises(KeyboardInterrupt), layers_merged(model, ((2, (3,)), (2, (3,)))):
        assert not torch.equal(model.state_dict()[key], dense[key])
        raise KeyboardInterrupt
    assert all(torch.equal(tensor, dense[key]) for key, tensor in model.state_dict().items())
    unlike = ((2, (3,)), (0, (1,)))  # layer 1 has no experts
    with pytest.raises(SimDiffError) as error, layers_merged(model, unlike):
        pytest.fail("the block ran")
    assert str(error.value) == (
        "layers [0, 1] of Qwen3MoeForCausalLM are not built alike and cannot be merged; use a "
        "criterion that only removes layers."
    )
    assert all(torch.equal(tensor, dense[key]) for key, tensor in model.state_dict().items())


def test_streamed_weights_are_not_merged(tiny_model):
    decoder = stream_decoder(tiny_model, "float32")
    with (
        pytest.raises(SimDiffError, match="needs the model in memory: raise memory_gib"),
        layers_merged(decoder.model, ((0, (1,)),)),
    ):
        pytest.fail("the block ran")


def test_no_merge_changes_nothing(llama, blocks):
    dense = logits_of(llama, blocks)
    with layers_merged(llama, ()):
        assert torch.equal(logits_of(llama, blocks), dense)


@pytest.mark.parametrize("name", ["llama", "gemma3", "mixtral"])
def test_the_models_own_hidden_states_are_those_of_its_layers_before_inside_and_after(
    make_tiny, blocks, name
):
    """transformers puts its hooks on what stands in the layers' places when states are first asked for."""
    expected = make_tiny(name)(input_ids=blocks, output_hidden_states=True).hidden_states
    for asked_by in ("config", "call"):
        model = make_tiny(name)
        options = {"output_hidden_states": True} if asked_by == "call" else {}
        model.config.output_hidden_states = asked_by == "config"
        Decoder(model)
        with layers_removed(model, frozenset({0, 1})) as cut:
            assert len(cut(input_ids=blocks, **options).hidden_states) == len(expected) - 2
        found = model(input_ids=blocks, **options).hidden_states
        assert len(found) == len(expected)
        assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))
