"""Speed: the decode loop against generate, what is timed against the export, the order of measuring, the
summary."""

import sys
import time

import numpy as np
import pandas as pd
import pytest
import torch
from transformers import DynamicCache, StaticCache

from simdiff_utils import SimDiffError
from simdiff_utils.speed import timing
from simdiff_utils.speed.generate import PROTOCOLS, Protocol, compile_step, decode, fill_cache, prefill
from simdiff_utils.speed.memory import measure_peak_memory
from simdiff_utils.speed.parts import time_parts
from simdiff_utils.speed.timing import check_layers, measure_speed, summarise_speed, without_layers
from tests.helpers import SETS, build_by_hand, logits_of


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
    expected = model.generate(
        prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=13, do_sample=False
    )
    torch.testing.assert_close(tokens, expected)


def test_a_model_without_cache_is_refused(llama, blocks, monkeypatch):
    forward = llama.forward
    monkeypatch.setattr(llama, "forward", lambda **kw: forward(**(kw | {"use_cache": False})))
    with pytest.raises(SimDiffError, match="KV cache holds 0 tokens where 20 were read"):
        prefill(llama, blocks)


def test_a_static_cache_and_a_growing_one_give_the_same_tokens(make_tiny, blocks):
    for name in ("llama", "gemma3"):
        model = make_tiny(name)
        growing = decode(model, *prefill(model, blocks[:2]), 12)
        cache = StaticCache(config=model.config, max_cache_len=40)
        assert torch.equal(growing, decode(model, *prefill(model, blocks[:2], cache), 12))


@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma3", "falcon"])
def test_a_filled_cache_is_the_shape_that_reading_gives(make_tiny, blocks, name):
    model = make_tiny(name)
    read = prefill(model, blocks[:2], DynamicCache(config=model.config))[1]
    filled = fill_cache(model, DynamicCache(config=model.config), 2, 20)
    assert filled.get_seq_length() == 20
    assert [layer.keys.shape for layer in filled.layers] == [layer.keys.shape for layer in read.layers]
    decode(model, blocks[:2, :1], filled, 3)  # raises where the cache does not grow as it should


@pytest.mark.parametrize(
    ("name", "removed"), [("llama", SETS[2]), ("gpt2", SETS[2]), ("gemma3", frozenset({3, 4, 5}))]
)  # of gemma's three kinds one whole period, since each layer has to keep its kind
def test_a_model_on_shared_weights_is_the_one_built_by_hand(make_tiny, blocks, name, removed):
    model = make_tiny(name)
    before = logits_of(model, blocks)
    with without_layers(model, removed) as shallow:
        expected = logits_of(build_by_hand(model, removed), blocks)
        torch.testing.assert_close(logits_of(shallow, blocks), expected)
        assert {p.data_ptr() for p in shallow.parameters()} <= {p.data_ptr() for p in model.parameters()}
        assert torch.equal(logits_of(model, blocks), before)
        check_layers(model, shallow, removed)


def test_the_wrong_layers_cannot_be_timed(make_tiny):
    dense = make_tiny("llama")
    right, other = frozenset({2, 3}), frozenset({1, 4})
    pruned = build_by_hand(dense, right)
    protocol = Protocol(1, 4, 2)
    measure_speed(dense, {right: pruned}, protocol, 1)
    with pytest.raises(SimDiffError, match="Layer 1 of the model to be timed is not layer 2 of the dense"):
        measure_speed(dense, {other: pruned}, protocol, 1)
    with pytest.raises(SimDiffError, match="has 4 layers where 3 should be left"):
        measure_speed(dense, {frozenset({1, 2, 3}): pruned}, protocol, 1)
    with torch.no_grad():
        next(iter(pruned.model.layers[3].parameters()))[0, 0] += 1e-3
    with pytest.raises(SimDiffError, match="Layer 3"):
        measure_speed(dense, {right: pruned}, protocol, 1)


PROTOCOL = Protocol(batch_size=2, prompt_len=10, n_new_tokens=3)


def test_models_take_turns_in_alternating_order_after_warm_up(make_tiny, monkeypatch):
    dense = make_tiny("llama")
    calls, time_run = [], timing._time_run

    def record(model, step, compiled, prompt, protocol):
        calls.append("dense" if model is dense else "pruned")
        assert prompt.shape == (2, 10)
        seconds = time_run(model, step, compiled, prompt, protocol)
        once = (1.0, np.nan, np.nan)
        return seconds | {"prefill": once, "decode": once}  # stable at once

    monkeypatch.setattr(timing, "_time_run", record)
    with without_layers(dense, SETS[3]) as pruned:
        samples = measure_speed(dense, {SETS[3]: pruned}, PROTOCOL, 4)
    assert len(calls) == 2 * (2 + 4)  # two rounds that agree, then those that count
    assert calls[4:] == ["dense", "pruned", "pruned", "dense"] * 2
    assert list(samples["model"][::2]) == calls[4:]
    assert all(sorted(pairs) == [0, 1, 2, 3] for _, pairs in samples.groupby(["model", "phase"])["pair"])
    assert set(samples.loc[samples["phase"] == "prefill", "tokens"]) == {20}
    assert set(samples.loc[samples["phase"] == "decode", "tokens"]) == {6}
    assert set(samples.loc[samples["model"] == "pruned", "n_remove"]) == {3}
    np.testing.assert_allclose(samples["tokens_per_s"], samples["tokens"] / samples["seconds"])


def test_a_machine_that_never_settles_is_warmed_up_a_bounded_number_of_rounds(llama, monkeypatch):
    seconds = iter(2.0**n for n in range(100))
    monkeypatch.setattr(timing, "_time_run", lambda *_: {"prefill": (next(seconds), 0.0, 0.0)})
    assert len(measure_speed(llama, {}, Protocol(1, 4, 0), 2)) == 2
    assert next(seconds) == 2.0 ** (timing.MAX_WARM_UP + 2)


def test_each_timed_phase_runs_the_passes_it_names(llama, monkeypatch):
    lengths, forward = [], llama.forward

    def record(input_ids, **others):
        lengths.append(tuple(input_ids.shape))
        return forward(input_ids, **others)

    monkeypatch.setattr(llama, "forward", record)
    measure_speed(llama, {}, PROTOCOL, 2)
    run = [(2, 10), (2, 1), (2, 1), (2, 1)]
    assert len(lengths) % 4 == 0
    assert lengths == run * (len(lengths) // 4)


def test_prefill_alone_has_no_decode(llama):
    assert set(measure_speed(llama, {}, Protocol(1, 8, 0), 1)["phase"]) == {"prefill"}
    assert PROTOCOLS["prefill"].n_new_tokens == 0


def test_an_integrated_decode_is_the_sum_over_a_line(llama, monkeypatch):
    """A step that takes a second per cached token: the integral over the lengths is the sum, whatever is
    timed."""
    clock = [0.0]

    def step(_step, token, cache, n_new_tokens, stamps):
        for i in range(n_new_tokens):
            clock[0] += cache.get_seq_length() + i
            stamps.append(clock[0])

    monkeypatch.setattr(timing, "decode", step)
    monkeypatch.setattr(timing, "now", lambda _device: clock.__setitem__(0, clock[0] + 1e-6) or clock[0])
    samples = measure_speed(llama, {}, Protocol(1, 4, 40, n_timed_steps=4), 1)
    row = samples[samples["phase"] == "decode (integrated)"].iloc[0]
    assert row["tokens"] == 40
    # beyond the ends it is held, not extended
    assert row["seconds"] == pytest.approx(sum(range(4, 44)), rel=0.02)
    assert np.isnan(row["median_step"])  # not every step was timed


def test_the_time_per_token_is_that_of_its_own_step(llama, monkeypatch):
    """Nine steps of a second, then one of eleven."""
    clock = [0.0]

    def step(_step, token, cache, n_new_tokens, stamps):
        stamps += [clock[0] + i + 1 + 10 * (i == 9) for i in range(n_new_tokens)]

    monkeypatch.setattr(timing, "decode", step)
    monkeypatch.setattr(timing, "now", lambda _device: clock[0])
    samples = measure_speed(llama, {}, Protocol(1, 4, 10), 1)
    row = samples[samples["phase"] == "decode"].iloc[0]
    assert (row["seconds"], row["median_step"]) == (20, 1)
    assert row["p99_step"] == pytest.approx(np.quantile([1] * 9 + [11], 0.99))


def test_more_tokens_than_the_context_holds_are_refused(llama):
    with pytest.raises(SimDiffError, match="reads 65 tokens, the model's context holds 64"):
        measure_speed(llama, {}, Protocol(1, 60, 5), 1)


@pytest.mark.slow
def test_a_compiled_step_gives_the_eager_tokens(make_tiny, blocks):
    model = make_tiny("llama", num_hidden_layers=1)  # the compiler takes its time layer by layer
    eager = decode(model, *prefill(model, blocks[:2]), 8)
    cache = StaticCache(config=model.config, max_cache_len=32)
    assert torch.equal(eager, decode(compile_step(model), *prefill(model, blocks[:2], cache), 8))


def test_a_step_that_does_not_compile_is_one_sentence(llama, monkeypatch):
    def fail(**_):
        raise torch._dynamo.exc.InternalTorchDynamoError("no compiler\nin 300 lines")

    monkeypatch.setattr(timing, "compile_step", lambda _model: fail)
    with pytest.raises(SimDiffError, match="cannot be compiled here .*: set compiled = False"):
        measure_speed(llama, {}, PROTOCOL, 1, compiled=True)


def test_summary_pairs_the_rounds():
    dense, pruned = [1.0, 2.0, 4.0, 8.0], [0.5, 1.0, 2.0, 16.0]  # drifts by 8; always twice as fast, but once
    same = {"phase": "decode", "way": "eager", "batch_size": 1, "tokens": 8, "p99_step": np.nan}
    samples = pd.DataFrame(
        {
            "model": name,
            "n_remove": n,
            "pair": i,
            "seconds": s,
            "tokens_per_s": 8 / s,
            "median_step": s / 8,
            **same,
        }
        for i, pair in enumerate(zip(dense, pruned, strict=True))
        for name, n, s in zip(("dense", "pruned"), (0, 3), pair, strict=True)
    )
    table = summarise_speed(samples).set_index("model")
    assert table.loc["dense", ["speedup", "speedup_low", "speedup_high"]].tolist() == [1, 1, 1]
    logs = np.log([2, 2, 2, 0.5])
    half = 3.182446 * logs.std(ddof=1) / 2  # Student's t for three degrees of freedom
    assert table.loc["pruned", "speedup"] == pytest.approx(np.exp(logs.mean()))
    assert table.loc["pruned", "speedup_low"] == pytest.approx(np.exp(logs.mean() - half))
    assert table.loc["pruned", "speedup_high"] == pytest.approx(np.exp(logs.mean() + half))
    assert table.loc["dense", "tokens_per_s"] == pytest.approx(np.median([8, 4, 2, 1]))
    assert table.loc["dense", "tokens_per_s_q75"] == pytest.approx(np.quantile([8, 4, 2, 1], 0.75))
    assert table.loc["pruned", "seconds"] == 1.5 and table.loc["pruned", "median_step"] == 1.5 / 8
    one = summarise_speed(samples[samples["pair"] == 0]).set_index("model").loc["pruned"]
    assert (one["speedup"], one["speedup_low"], one["speedup_high"]) == (2, 0, np.inf)


@pytest.mark.parametrize("name", ["llama", "gpt2", "falcon"])
def test_the_parts_of_a_step_are_there_and_add_up_to_about_a_step(make_tiny, name):
    model = make_tiny(name)
    started = time.perf_counter()
    table = time_parts({"dense": model, "again": model}, Protocol(1, 8, 0), n_steps=4)
    assert set(table["model"]) == {"dense", "again"}
    parts = table[table["model"] == "dense"].set_index("part")["seconds"]
    assert {"head", "rest", "norms"} <= set(parts.index)
    assert (parts > 0).all()
    assert parts.sum() < time.perf_counter() - started
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_peak_memory_is_the_fresh_process_own(llama, tmp_path):
    llama.save_pretrained(tmp_path)
    ballast = torch.ones(2**28)  # 1 GiB here must not appear there
    memory = measure_peak_memory(tmp_path, torch.float32, PROTOCOL)
    assert ballast[0] == 1
    assert set(memory) == {"peak", "baseline", "weights", "kv_cache", "other"}
    assert 0 <= memory["baseline"] <= memory["peak"] < 0.9
    assert memory["weights"] == pytest.approx(4 * sum(p.numel() for p in llama.parameters()) / 2**30)
    n_numbers = 6 * 2 * 2 * 16 * 13  # layers, K and V, batch, width, tokens
    assert memory["kv_cache"] == pytest.approx(4 * n_numbers / 2**30)


def test_failure_of_the_fresh_process_is_one_sentence(tmp_path, monkeypatch):
    python = tmp_path / "python"
    python.write_text("#!/bin/sh\necho Traceback >&2\necho 'OSError: no weights' >&2\nexit 1\n")
    python.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(python))
    with pytest.raises(SimDiffError, match="^Measuring the memory of .* failed: OSError: no weights$"):
        measure_peak_memory(tmp_path, torch.float32, PROTOCOL)
