"""The bound: counts against sums done by hand, against real caches and torch's own count of operations."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText

from simdiff_utils import SimDiffError
from simdiff_utils.engine.weights import skeleton
from simdiff_utils.models.shapes import paper_config
from simdiff_utils.speed import bound
from simdiff_utils.speed.bound import Rates, Work, bound_phases, count_pass, ideal_seconds, measure_rates
from simdiff_utils.speed.generate import Protocol, fill_cache, new_cache
from simdiff_utils.speed.timing import without_layers
from tests.families import OTHERS, WRAPPERS
from tests.helpers import FAMILIES

D, MLP, VOCAB, N_LAYERS, HEAD_DIM = 32, 48, 97, 6, 8
LLAMA_LAYER = 2 * D * D + 2 * D * 16 + 3 * D * MLP + 2 * D  # q, o; k, v (2 heads of 8); MLP; two norms
GPT2_LAYER = 4 * D * D + 4 * D + 8 * D * D + 5 * D + 4 * D  # attention, MLP of 4 d, biases, norms with bias
GEMMA_LAYER = LLAMA_LAYER + 2 * D + 2 * HEAD_DIM  # two more norms around the blocks, one each on q and k
MIXTRAL_LAYER = LLAMA_LAYER + 4 * D + 3 * D * MLP  # a router for four experts, two of them read
HEAD = VOCAB * D


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("llama", N_LAYERS * LLAMA_LAYER + D + HEAD),  # untied: the head is read, the embedding is not
        ("llama-tied", N_LAYERS * LLAMA_LAYER + D + HEAD),  # tied: the one matrix is read as the head
        ("gpt2", N_LAYERS * GPT2_LAYER + 2 * D + HEAD),  # the learned positions are a row lookup, too
        ("gemma3", N_LAYERS * GEMMA_LAYER + D + HEAD),
        ("mixtral", N_LAYERS * MIXTRAL_LAYER + D + HEAD),
    ],
)
def test_parameters_read_equal_a_count_by_hand(make_tiny, name, expected):
    model = make_tiny(name)
    assert count_pass(model, batch_size=1, n_tokens=1).weight_bytes == 4 * expected
    assert count_pass(model.to(torch.bfloat16), batch_size=1, n_tokens=1).weight_bytes == 2 * expected


def test_more_tokens_call_more_experts(make_tiny):
    model = make_tiny("mixtral")
    one, many = (count_pass(model, batch_size=n, n_tokens=1).weight_bytes for n in (1, 200))
    assert many - one == 4 * N_LAYERS * 2 * 3 * D * MLP  # the two that one token leaves
    llama = count_pass(make_tiny("llama"), batch_size=200, n_tokens=1)
    assert llama.weight_bytes == 4 * (N_LAYERS * LLAMA_LAYER + D + HEAD)


def test_experts_without_a_number_are_refused(make_tiny):
    model = make_tiny("mixtral")
    model.config.num_experts_per_tok = 0
    with pytest.raises(SimDiffError, match="does not say num_experts_per_tok"):
        count_pass(model, batch_size=1, n_tokens=1)


def test_a_vision_tower_is_not_read():
    config = AutoConfig.for_model("gemma3", **WRAPPERS["gemma3"])
    whole = AutoModelForImageTextToText.from_config(config).eval()
    text = AutoModelForCausalLM.from_config(config.get_text_config()).eval()
    works = [count_pass(model, batch_size=1, n_tokens=5, n_cached=3) for model in (whole, text)]
    assert works[0] == works[1]


@pytest.mark.parametrize("name", ["lfm2", "falcon_h1", "mamba"])
def test_states_beside_keys_and_values_are_refused(name):
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(name, **OTHERS[name])).eval()
    with pytest.raises(SimDiffError, match="cannot be timed with a KV cache"):
        count_pass(model, batch_size=1, n_tokens=1)


@pytest.mark.parametrize("name", ["llama", "gemma3", "gpt2", "falcon", "mixtral", "gpt-oss", "gpt-neo"])
def test_the_keys_and_values_counted_are_those_of_a_real_cache(make_tiny, name):
    model = make_tiny(name)
    cache = fill_cache(model, new_cache(model), 3, 20)
    seen = []
    update = type(cache).update
    type(cache).update = lambda self, *given: seen.append(update(self, *given)) or seen[-1]
    try:
        with torch.inference_mode():
            model(input_ids=torch.zeros(3, 1, dtype=torch.long), past_key_values=cache, use_cache=True)
    finally:
        type(cache).update = update
    attended = sum(states.nbytes for pair in seen for states in pair)
    assert count_pass(model, batch_size=3, n_tokens=1, n_cached=20).kv_bytes == attended


@pytest.mark.parametrize("name", ["llama", "llama-tied", "gemma3", "gpt2", "falcon", "opt"])
def test_the_operations_are_those_that_torch_counts(make_tiny, name):
    """torch counts a masked score like any other, so that what it counts of attention is the whole square."""
    model = make_tiny(name)
    model.set_attn_implementation("eager")
    for batch_size, n_tokens in ((1, 1), (2, 7)):  # below every window
        ids = torch.zeros(batch_size, n_tokens, dtype=torch.long)
        counter = FlopCounterMode(display=False)
        with counter, torch.no_grad():
            model(input_ids=ids, use_cache=True)
        n_heads, width = 4, 8
        masked = n_tokens**2 - n_tokens * (n_tokens + 1) // 2
        attention = 4 * batch_size * N_LAYERS * n_heads * width * masked
        head = 2 * model.get_output_embeddings().weight.numel() * batch_size * (n_tokens - 1)
        expected = counter.get_total_flops() - attention - head
        found = count_pass(model, batch_size=batch_size, n_tokens=n_tokens).operations
        rotary = 2 * batch_size * n_tokens * width // 2  # the angles are a product, too, of one row
        assert 0 <= expected - found <= 2 * rotary


def test_a_window_bounds_what_a_sliding_layer_attends_to(make_tiny):
    gemma, llama = make_tiny("gemma3"), make_tiny("llama")  # four of six layers see 8 tokens; 2 heads of 8
    per_token = 4 * 2 * 2 * 8  # bytes of one layer's key and value
    assert count_pass(llama, batch_size=1, n_tokens=1, n_cached=39).kv_bytes == 6 * 40 * per_token
    assert count_pass(gemma, batch_size=1, n_tokens=1, n_cached=39).kv_bytes == (2 * 40 + 4 * 8) * per_token
    near, all_before = sum(min(i + 1, 8) for i in range(40)), 40 * 41 // 2
    n_weights = sum(p.numel() for n, p in gemma.named_parameters() if "layers" in n and p.dim() == 2)
    attention = 4 * 4 * 8 * (4 * near + 2 * all_before)  # 4 heads of 8
    found = count_pass(gemma, batch_size=1, n_tokens=40).operations
    assert found == 2 * (40 * n_weights + HEAD) + attention


def test_llama_8b_without_twelve_layers():
    """The published case: 1.54 by weights; 128 KiB of keys and values a token; nothing of 16 GB is
    allocated."""
    dense, pruned = (
        skeleton(paper_config("meta-llama/Llama-3.1-8B", n_layers=n), torch.bfloat16).to("meta")
        for n in (32, 20)
    )
    work = [count_pass(model, batch_size=16, n_tokens=1, n_cached=1023) for model in (dense, pruned)]
    assert work[0].weight_bytes == 2 * (8030261248 - 128256 * 4096)  # all parameters but the input embedding
    assert work[0].weight_bytes / work[1].weight_bytes == pytest.approx(1.5355, abs=5e-4)
    assert work[0].kv_bytes == 16 * 1024 * 131072
    assert work[1].kv_bytes == 16 * 1024 * 131072 * 20 // 32


def test_the_phases_of_a_protocol(llama):
    rates = Rates(bandwidth=1e3, matrix_rate=1e9, device="CPU", n_threads=1)
    protocol = Protocol(batch_size=3, prompt_len=10, n_new_tokens=8)
    table = bound_phases(llama, protocol, rates).set_index("phase")
    assert table["n_passes"].to_dict() == {"prefill": 1, "decode": 8}
    prompt = count_pass(llama, batch_size=3, n_tokens=10)
    assert Work(*table.loc["prefill", ["weight_bytes", "kv_bytes", "operations"]]) == prompt
    every = [count_pass(llama, batch_size=3, n_tokens=1, n_cached=10 + i).kv_bytes for i in range(8)]
    assert table.loc["decode", "kv_bytes"] * 8 == pytest.approx(sum(every), rel=0.05)
    decode = table.loc["decode"]
    assert decode["ideal_seconds"] == pytest.approx(8 * (decode["weight_bytes"] + decode["kv_bytes"]) / 1e3)
    assert list(bound_phases(llama, Protocol(1, 10, 0), rates)["phase"]) == ["prefill"]
    some = bound_phases(llama, Protocol(1, 10, 8, n_timed_steps=2), rates)
    assert "decode (integrated)" in set(some["phase"])


def test_a_model_without_some_layers_has_less_to_do_by_just_those(make_tiny):
    dense = make_tiny("gemma3")
    with without_layers(dense, frozenset({2, 3})) as pruned:  # a full and a sliding one
        more, less = (count_pass(m, batch_size=1, n_tokens=1, n_cached=39) for m in (dense, pruned))
        assert more.weight_bytes - less.weight_bytes == 4 * 2 * GEMMA_LAYER
        assert more.kv_bytes - less.kv_bytes == (40 + 8) * 4 * 2 * 2 * 8


def test_the_ideal_time_is_the_longer_of_reading_and_computing():
    rates = Rates(bandwidth=100.0, matrix_rate=1000.0, device="CPU", n_threads=1)
    assert ideal_seconds(Work(weight_bytes=300, kv_bytes=200, operations=1000), rates) == 5
    assert ideal_seconds(Work(weight_bytes=300, kv_bytes=200, operations=9000), rates) == 9


def test_the_rates_of_this_machine_are_of_its_order(monkeypatch):
    monkeypatch.setattr(bound, "_N_TRIES", 1)
    rates = measure_rates(torch.device("cpu"), torch.float32)
    assert 1e9 < rates.bandwidth < 1e12
    assert 1e9 < rates.matrix_rate < 1e14
    assert rates.n_threads == torch.get_num_threads()


def test_an_untied_model_and_its_config_agree():
    """Counting needs no weights: the meta device gives what the real modules give."""
    config = AutoConfig.for_model(**FAMILIES["llama"])
    real, meta = AutoModelForCausalLM.from_config(config).eval(), skeleton(config).to("meta")
    assert count_pass(real, batch_size=2, n_tokens=5) == count_pass(meta, batch_size=2, n_tokens=5)
