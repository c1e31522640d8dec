"""Capture against a float64 oracle written from the formulas alone, fed the same float32 hidden states."""

import gc
import weakref

import numpy as np
import pytest
import torch

from simdiff_utils import capture, models
from simdiff_utils.capture import STATISTICS, LayerStatistics, measure_capture_memory
from simdiff_utils.checkpoints import checkpoint_folder
from simdiff_utils.decoder import Decoder, stream_decoder
from simdiff_utils.settings import SimDiffError, repository_root

FINAL_NORMS = ("norm", "ln_f", "final_layer_norm")


def capture_statistics(model, blocks, batch_size=2) -> LayerStatistics:
    return capture.capture_statistics(Decoder(model), blocks, batch_size)


def gather_states(model, blocks, batch_size) -> np.ndarray:
    """H(1)..H(L+1) as [L + 1, samples, seq, d]: what enters each layer, and what enters the final norm."""
    parent, _ = models.layers_path(model)
    final_norm = next(getattr(parent, name) for name in FINAL_NORMS if hasattr(parent, name))
    places = [*models.decoder_layers(model), final_norm]
    seen = [[] for _ in places]

    def recorder(states):
        return lambda _module, args, kwargs: states.append((args or [kwargs["hidden_states"]])[0].float().clone())

    handles = [place.register_forward_pre_hook(recorder(states), with_kwargs=True)
               for place, states in zip(places, seen, strict=True)]
    with torch.inference_mode():
        for batch in blocks.split(batch_size):
            model(input_ids=batch, use_cache=False)
    for handle in handles:
        handle.remove()
    return np.stack([torch.cat(states).numpy() for states in seen])


def measure_in_float64(states: np.ndarray) -> np.ndarray:
    """SimDiff's raw measurements by the book, token by token: [3, L, seq], means over the samples."""
    n_states, n_samples, seq_len, width = states.shape
    means = np.zeros((3, n_states - 1, seq_len))
    for i in range(n_states - 1):
        for j in range(seq_len):
            for b in range(n_samples):
                before = states[i, b, j].astype(np.float64)
                after = states[i + 1, b, j].astype(np.float64)
                cosine = np.dot(before, after) / (np.linalg.norm(before) * np.linalg.norm(after))
                change = after - before
                means[0, i, j] += (1 - cosine) / n_samples
                means[1, i, j] += np.dot(change, change) / n_samples
                means[2, i, j] += np.sum(np.abs(change)) / width / n_samples
    return means


def assert_equals_oracle(statistics: LayerStatistics, states: np.ndarray, by_position_rtol: float = 1e-5) -> None:
    expected = measure_in_float64(states)
    table = statistics.table()
    for name, values in zip(STATISTICS, expected, strict=True):
        np.testing.assert_allclose(table[name], values.mean(1), rtol=1e-5, atol=0, err_msg=name)
        np.testing.assert_allclose(table[f"{name}_without_first"], values[:, 1:].mean(1), rtol=1e-5, atol=0)
    np.testing.assert_allclose(statistics.by_position, expected, rtol=by_position_rtol, atol=0)


@pytest.mark.parametrize("batch_size", [2, 5])
def test_capture_equals_the_oracle(tiny, blocks, batch_size):
    captured = capture_statistics(tiny, blocks, batch_size)
    assert_equals_oracle(captured, gather_states(tiny, blocks, batch_size))
    assert captured.n_samples == len(blocks)


def test_capture_equals_the_oracle_in_bfloat16(make_tiny, blocks):
    model = make_tiny("qwen2").bfloat16()
    assert_equals_oracle(capture_statistics(model, blocks, 2), gather_states(model, blocks, 2))


def test_the_oracle_sees_a_last_layer_measured_after_the_final_norm(tiny, blocks, monkeypatch):
    parent, n_layers = models.layers_path(tiny)[0], len(models.decoder_layers(tiny))
    final_norm = next(getattr(parent, name) for name in FINAL_NORMS if hasattr(parent, name))
    original, calls = capture.measure_tokens, []

    def mutant(h_in, h_out):
        calls.append(1)
        return original(h_in, final_norm(h_out) if len(calls) % n_layers == 0 else h_out)

    monkeypatch.setattr(capture, "measure_tokens", mutant)
    captured, states = capture_statistics(tiny, blocks, 2), gather_states(tiny, blocks, 2)
    with pytest.raises(AssertionError):
        assert_equals_oracle(captured, states)
    expected = measure_in_float64(states)  # all other layers are right
    np.testing.assert_allclose(captured.by_position[:, :-1], expected[:, :-1], rtol=1e-5)


def test_real_layers_return_both_kinds(make_tiny, blocks):
    """The families at hand cover a tensor and a tuple; if a new transformers changes that, choose others."""
    kinds = {}
    for name in ("llama", "falcon"):
        model = make_tiny(name)
        models.decoder_layers(model)[0].register_forward_hook(
            lambda _layer, _args, output, name=name: kinds.update({name: type(output)}))
        model(blocks)
    assert kinds == {"llama": torch.Tensor, "falcon": tuple}


def test_batch_size_changes_nothing_beyond_rounding(tiny, blocks):
    one_by_one = capture_statistics(tiny, blocks, 1).by_position
    for batch_size in (2, 3, 5, 99):
        np.testing.assert_allclose(capture_statistics(tiny, blocks, batch_size).by_position, one_by_one, rtol=1e-3)
        np.testing.assert_allclose(capture_statistics(tiny, blocks, batch_size).by_position.mean(2),
                                   one_by_one.mean(2), rtol=1e-5)


def test_an_identity_layer_measures_zero(llama, blocks):
    layer = models.decoder_layers(llama)[2]
    for weight in (layer.self_attn.o_proj.weight, layer.mlp.down_proj.weight):
        torch.nn.init.zeros_(weight)
    by_position = capture_statistics(llama, blocks).by_position
    assert not by_position[:, 2].any()
    assert (np.delete(by_position, 2, axis=1) > 0).all()


def test_only_the_decoder_stack_runs(llama, blocks):
    llama.lm_head.register_forward_pre_hook(lambda *_: pytest.fail("the head ran"))
    capture_statistics(llama, blocks)


def test_memory_is_independent_of_the_number_of_samples(llama, blocks, monkeypatch):
    """No tensor of one layer and batch outlives the next one's: nothing is stored per sample."""
    original, alive, most = capture.measure_tokens, [], 0

    def watching(h_in, h_out):
        nonlocal most
        per_token = original(h_in, h_out)
        alive.extend([weakref.ref(h_out), weakref.ref(per_token)])
        most = max(most, sum(ref() is not None for ref in alive))
        return per_token

    monkeypatch.setattr(capture, "measure_tokens", watching)
    captured = capture_statistics(llama, blocks.repeat(4, 1), 1)
    gc.collect()
    assert captured.by_position.shape == (3, len(models.decoder_layers(llama)), blocks.shape[1])
    assert len(alive) == 2 * 20 * 6
    assert most <= 4
    assert not any(ref() is not None for ref in alive)


def test_streamed_capture_is_equal_to_the_last_bit(make_tiny, blocks, tmp_path):
    for name in ("llama", "gemma3", "falcon"):
        model = make_tiny(name)
        model.save_pretrained(tmp_path / name)
        for room in (float("inf"), 0):
            streamed = capture.capture_statistics(stream_decoder(tmp_path / name, "float32", room), blocks, 2)
            np.testing.assert_array_equal(streamed.by_position, capture_statistics(model, blocks, 2).by_position)


@pytest.mark.slow
def test_peak_memory_is_measured_both_ways(make_tiny, tmp_path):
    make_tiny("llama").save_pretrained(tmp_path)
    measured = measure_capture_memory(tmp_path, "float32", [4, 2], 16)
    assert measured["way"].tolist() == ["in memory"] * 2 + ["streamed"] * 2
    assert measured["n_samples"].tolist() == [2, 4] * 2
    assert measured["peak_gib"].between(0.1, 4).all()
    assert measured["states_gib"].tolist() == [0, 0, 2 * 16 * 32 * 4 / 2**30, 4 * 16 * 32 * 4 / 2**30]


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_state_that_is_not_finite_names_layer_and_dtype(llama, blocks, bad):
    with torch.no_grad():
        models.decoder_layers(llama)[3].mlp.down_proj.weight[0, 0] = bad
    with pytest.raises(SimDiffError, match=r"layer 3 .*torch\.float32"):
        capture_statistics(llama, blocks)


def test_an_overflow_in_float16_names_layer_and_dtype(llama, blocks):
    with torch.no_grad():
        models.decoder_layers(llama)[4].mlp.down_proj.weight *= 1e6
    capture_statistics(llama, blocks)  # float32 has room for it
    with pytest.raises(SimDiffError, match=r"layer 4 .*torch\.float16"):
        capture_statistics(llama.half(), blocks)


def test_statistics_survive_the_disk(llama, blocks, tmp_path):
    captured = capture_statistics(llama, blocks)
    captured.save(tmp_path)
    loaded = LayerStatistics.load(tmp_path)
    np.testing.assert_array_equal(loaded.by_position, captured.by_position)
    assert loaded.by_position.dtype == np.float64
    assert loaded.n_samples == captured.n_samples
    assert {path.name for path in tmp_path.iterdir()} == {"statistics.safetensors", "statistics.csv"}


def test_the_table_has_one_row_per_layer_and_counts_every_position():
    by_position = np.arange(3 * 2 * 4, dtype=np.float64).reshape(3, 2, 4)
    table = LayerStatistics(by_position, 7).table()
    assert table["layer_idx"].tolist() == [0, 1]
    assert table["cosine_distance"].tolist() == [1.5, 5.5]
    assert table["masd"].tolist() == [17.5, 21.5]
    assert table["mssd_without_first"].tolist() == [10.0, 14.0]


@pytest.mark.slow
def test_capture_equals_the_oracle_on_smollm2():
    folder = checkpoint_folder("embedded:smollm2-135m-instruct")
    model = models.load_model(folder, "float32").cpu()
    text = (repository_root() / "LICENSE").read_text(encoding="utf-8")  # English prose that every clone has
    blocks = models.load_tokenizer(folder)(text, return_tensors="pt")["input_ids"][0, :3 * 96].view(3, 96)
    # A single token may turn by as little as 1e-3, where float32 leaves four digits; the means keep them all.
    assert_equals_oracle(capture_statistics(model, blocks, 2), gather_states(model, blocks, 2), by_position_rtol=1e-4)
