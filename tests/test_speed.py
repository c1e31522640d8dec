"""Speed: counts against sums done by hand, the decode loop against generate, the order of measuring, the summary."""

import numpy as np
import pandas as pd
import pytest
import torch

from simdiff_utils import speed
from simdiff_utils.settings import SimDiffError
from simdiff_utils.speed import (
    decode,
    ideal_speedup,
    measure_peak_memory,
    measure_speed,
    parameters_read_per_token,
    prefill,
    summarise_speed,
)

D, MLP, VOCAB, N_LAYERS, HEAD_DIM = 32, 48, 97, 6, 8
LLAMA_LAYER = 2 * D * D + 2 * D * 16 + 3 * D * MLP + 2 * D  # q and o, k and v (2 heads of 8), the MLP, two norms
GPT2_LAYER = 4 * D * D + 4 * D + 8 * D * D + 5 * D + 4 * D  # attention, MLP of 4 d, biases, two norms with bias
GEMMA_LAYER = LLAMA_LAYER + 2 * D + 2 * HEAD_DIM  # two more norms around the blocks, one each on q and k
HEAD = VOCAB * D


@pytest.mark.parametrize(("name", "expected"), [
    ("llama", N_LAYERS * LLAMA_LAYER + D + HEAD),  # untied: the head is read, the embedding is not
    ("llama-tied", N_LAYERS * LLAMA_LAYER + D + HEAD),  # tied: the one matrix is read as the head
    ("gpt2", N_LAYERS * GPT2_LAYER + 2 * D + HEAD),  # the learned positions are a row lookup, too
    ("gemma3", N_LAYERS * GEMMA_LAYER + D + HEAD),
])
def test_parameters_read_equal_a_count_by_hand(make_tiny, name, expected):
    assert parameters_read_per_token(make_tiny(name)) == expected


def test_ideal_speedup_is_the_ratio_of_the_weights_read(make_tiny):
    dense, pruned = make_tiny("llama-tied"), make_tiny("llama-tied", num_hidden_layers=4)
    fixed = D + HEAD
    assert ideal_speedup(dense, pruned) == pytest.approx((6 * LLAMA_LAYER + fixed) / (4 * LLAMA_LAYER + fixed))
    assert ideal_speedup(dense, dense) == 1


@pytest.mark.parametrize("name", ["llama", "llama-tied", "gpt2", "gemma3", "falcon"])
def test_prefill_and_decode_give_the_tokens_of_generate(make_tiny, blocks, name):
    model = make_tiny(name)
    prompt = blocks[:2]
    first, cache = prefill(model, prompt)
    assert first.shape == (2, 1)
    assert cache.get_seq_length() == 20
    tokens = torch.cat([prompt, first, decode(model, first, cache, 12)], dim=1)
    assert cache.get_seq_length() == 32
    model.generation_config.eos_token_id = None  # ours never stops early
    expected = model.generate(prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=13, do_sample=False)
    torch.testing.assert_close(tokens, expected)


def test_a_model_without_cache_is_refused(llama, blocks, monkeypatch):
    forward = llama.forward
    monkeypatch.setattr(llama, "forward", lambda **kw: forward(**(kw | {"use_cache": False})))
    with pytest.raises(SimDiffError, match="KV cache holds 0 tokens where 20 were read"):
        prefill(llama, blocks)


SIZES = dict(batch_size=2, prefill_len=10, prompt_len=4, n_new_tokens=3)


def test_models_take_turns_in_alternating_order_after_one_warm_up_each(make_tiny, monkeypatch):
    models = {"dense": make_tiny("llama"), "pruned": make_tiny("llama", num_hidden_layers=3)}
    calls = []
    time_once = speed._time_once

    def record(model, passage, prompt, n_new_tokens):
        calls.append("dense" if model is models["dense"] else "pruned")
        assert passage.shape == (2, 10)
        assert prompt.shape == (2, 4)
        return time_once(model, passage, prompt, n_new_tokens)

    monkeypatch.setattr(speed, "_time_once", record)
    samples = measure_speed(models, **SIZES, n_repeats=4)
    assert sorted(calls[:2]) == ["dense", "pruned"]
    assert calls[2:] == ["dense", "pruned", "pruned", "dense"] * 2
    assert list(samples["model"][::2]) == calls[2:]
    assert (samples.groupby(["model", "phase"])["repeat"].apply(list).map(sorted).map(tuple) == (0, 1, 2, 3)).all()
    assert set(samples.loc[samples["phase"] == "prefill", "tokens"]) == {20}
    assert set(samples.loc[samples["phase"] == "decode", "tokens"]) == {6}
    assert (samples["seconds"] > 0).all()
    np.testing.assert_allclose(samples["tokens_per_s"], samples["tokens"] / samples["seconds"])


def test_each_timed_phase_runs_the_passes_it_names(llama, monkeypatch):
    lengths, forward = [], llama.forward
    monkeypatch.setattr(llama, "forward", lambda input_ids, **kw: (lengths.append(tuple(input_ids.shape)),
                                                                    forward(input_ids, **kw))[1])
    measure_speed({"one": llama}, **SIZES, n_repeats=2)
    assert lengths == [(2, 10), (2, 4), (2, 1), (2, 1), (2, 1)] * 3


def test_more_tokens_than_the_context_holds_are_refused(llama):
    with pytest.raises(SimDiffError, match="reads 65 tokens, dense's context holds 64"):
        measure_speed({"dense": llama}, **(SIZES | {"prefill_len": 65}), n_repeats=1)


def test_summary_pairs_the_repeats():
    dense, pruned = [1.0, 2.0, 4.0, 8.0], [0.5, 1.0, 2.0, 16.0]  # drifts by 8; always twice as fast, but once
    samples = pd.DataFrame([
        {"model": name, "phase": "decode", "repeat": i, "seconds": s, "tokens": 8, "tokens_per_s": 8 / s}
        for i, pair in enumerate(zip(dense, pruned, strict=True)) for name, s in zip(("z", "a"), pair, strict=True)])
    table = summarise_speed(samples).set_index("model")
    assert list(table.index) == ["z", "a"]  # the order measured in, not the alphabet's
    assert table.loc["z", ["speedup", "speedup_q25", "speedup_q75"]].tolist() == [1, 1, 1]
    assert table.loc["a", "speedup"] == 2
    assert table.loc["a", "speedup_q25"] == pytest.approx(np.quantile([2, 2, 2, 0.5], 0.25))
    assert table.loc["z", "tokens_per_s"] == pytest.approx(np.median([8, 4, 2, 1]))
    assert table.loc["z", "tokens_per_s_q75"] == pytest.approx(np.quantile([8, 4, 2, 1], 0.75))
    assert table.loc["a", "seconds"] == 1.5
    assert (table["n_repeats"] == 4).all()


def test_peak_memory_is_the_fresh_process_own(llama, tmp_path):
    llama.save_pretrained(tmp_path)
    ballast = torch.ones(2**28)  # 1 GiB here must not appear there
    memory = measure_peak_memory(tmp_path, torch.float32, **SIZES)
    assert ballast[0] == 1
    assert set(memory) == {"peak_mem_gib", "baseline_mem_gib"}
    assert 0 <= memory["baseline_mem_gib"] <= memory["peak_mem_gib"] < 0.9


def test_failure_of_the_fresh_process_is_one_sentence(tmp_path):
    with pytest.raises(SimDiffError, match="^Measuring the memory of .* failed: .") as caught:
        measure_peak_memory(tmp_path, torch.float32, **SIZES)
    assert "\n" not in str(caught.value)
