"""Capture against a float64 oracle written from the formulas alone, fed the same float32 hidden states."""

import gc
import weakref

import numpy as np
import pandas as pd
import pytest
import torch

from simdiff_utils import SimDiffError
from simdiff_utils.capture import statistics as capture
from simdiff_utils.capture.statistics import STATISTICS, LayerStatistics
from simdiff_utils.criterion.equations import normalise
from simdiff_utils.engine import load as models
from simdiff_utils.engine.decoder import Decoder, stream_decoder
from simdiff_utils.files import repository_root
from simdiff_utils.models.checkpoints import checkpoint_folder
from simdiff_utils.registry import of_kind

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
        return lambda _module, args, kwargs: states.append(
            (args or [kwargs["hidden_states"]])[0].float().clone()
        )

    handles = [
        place.register_forward_pre_hook(recorder(states), with_kwargs=True)
        for place, states in zip(places, seen, strict=True)
    ]
    with torch.inference_mode():
        for batch in blocks.split(batch_size):
            model(input_ids=batch, use_cache=False)
    for handle in handles:
        handle.remove()
    return np.stack([torch.cat(states).numpy() for states in seen])


def measure_in_float64(states: np.ndarray) -> np.ndarray:
    """The raw measurements by the book, token by token: [4, L, samples, seq]."""
    n_states, n_samples, seq_len, width = states.shape
    measured = np.zeros((4, n_states - 1, n_samples, seq_len))
    for i in range(n_states - 1):
        for b in range(n_samples):
            for j in range(seq_len):
                before = states[i, b, j].astype(np.float64)
                after = states[i + 1, b, j].astype(np.float64)
                cosine = np.dot(before, after) / (np.linalg.norm(before) * np.linalg.norm(after))
                change = after - before
                measured[0, i, b, j] = 1 - cosine
                measured[1, i, b, j] = np.dot(change, change)
                measured[2, i, b, j] = np.sum(np.abs(change)) / width
                measured[3, i, b, j] = np.linalg.norm(change) / np.linalg.norm(before)
    return measured


def top_share(mssd: np.ndarray) -> np.ndarray:
    """Share of each layer's MSSD [L, samples, seq] in its largest tokens, one in a thousand."""
    tokens = np.sort(mssd.reshape(len(mssd), -1), axis=1)
    n_top = max(1, round(0.001 * tokens.shape[1]))
    return tokens[:, -n_top:].sum(1) / tokens.sum(1)


def angles_between_depths(states: np.ndarray) -> np.ndarray:
    """Angular distance of the last token's states at any two depths, mean over the samples: [L + 1, L +
    1]."""
    last = states[:, :, -1].astype(np.float64)
    angles = np.zeros((len(last), len(last)))
    for i, before in enumerate(last):
        for j, after in enumerate(last):
            for x, y in zip(before, after, strict=True):
                cosine = np.dot(x, y) / (np.linalg.norm(x) * np.linalg.norm(y))
                angles[i, j] += np.arccos(min(cosine, 1)) / np.pi / len(before)
    return angles


def assert_equals_oracle(
    statistics: LayerStatistics, states: np.ndarray, by_position_rtol: float = 1e-5
) -> None:
    measured = measure_in_float64(states)
    expected = measured.mean(2)
    table = statistics.table()
    for name, values in zip(STATISTICS, expected, strict=True):
        np.testing.assert_allclose(table[name], values.mean(1), rtol=1e-5, atol=0, err_msg=name)
        np.testing.assert_allclose(table[f"{name}_without_first"], values[:, 1:].mean(1), rtol=1e-5, atol=0)
    np.testing.assert_allclose(statistics.by_position, expected, rtol=by_position_rtol, atol=0)
    np.testing.assert_allclose(statistics.by_sample, measured.mean(3), rtol=by_position_rtol, atol=0)
    np.testing.assert_allclose(statistics.top_mssd, top_share(measured[1]), rtol=1e-5, atol=0)
    np.testing.assert_array_equal(table["top_mssd"], statistics.top_mssd)
    np.testing.assert_allclose(
        statistics.angular_distance, angles_between_depths(states), rtol=1e-5, atol=1e-7
    )


def assert_identical(statistics: LayerStatistics, other: LayerStatistics) -> None:
    for name, values in vars(statistics).items():
        np.testing.assert_array_equal(getattr(other, name), values, err_msg=name)
        assert values.dtype == getattr(other, name).dtype == np.float64


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
    expected = measure_in_float64(states).mean(2)  # all other layers are right
    np.testing.assert_allclose(captured.by_position[:, :-1], expected[:, :-1], rtol=1e-5)


def test_real_layers_return_both_kinds(make_tiny, blocks):
    """The families at hand cover a tensor and a tuple; if a new transformers changes that, choose others."""
    kinds = {}
    for name in ("llama", "falcon"):
        model = make_tiny(name)
        models.decoder_layers(model)[0].register_forward_hook(
            lambda _layer, _args, output, name=name: kinds.update({name: type(output)})
        )
        model(blocks)
    assert kinds == {"llama": torch.Tensor, "falcon": tuple}


def test_samples_keep_their_place(llama, blocks):
    """The numbers of a sample alone, wherever it stands and whatever the batch: resampling depends on it."""
    together = capture_statistics(llama, blocks, 2)
    for place, block in enumerate(blocks):
        alone = capture_statistics(llama, block[None])
        np.testing.assert_allclose(together.by_sample[:, :, place], alone.by_sample[:, :, 0], rtol=1e-5)
    swapped = capture_statistics(llama, blocks.flip(0), 2)
    np.testing.assert_allclose(swapped.by_sample, together.by_sample[:, :, ::-1], rtol=1e-5)
    assert np.ptp(together.by_sample, axis=2).min() > 0  # no two alike, or the order would not show
    np.testing.assert_allclose(together.by_sample.mean(2), together.by_position.mean(2), rtol=1e-12)


@pytest.mark.parametrize("n_samples, batch_size, n_top", [(74, 10, 1), (150, 7, 3), (150, 150, 3)])
def test_the_top_tokens_are_found_across_batches(llama, n_samples, batch_size, n_top):
    """One in a thousand, rounded: more than one where there are many tokens, out of whichever batch they
    come."""
    blocks = torch.randint(3, 97, (n_samples, 20), generator=torch.Generator().manual_seed(2))
    states = gather_states(llama, blocks, batch_size).astype(np.float64)
    mssd = ((states[1:] - states[:-1]) ** 2).sum(-1)
    captured = capture_statistics(llama, blocks, batch_size)
    np.testing.assert_allclose(captured.top_mssd, top_share(mssd), rtol=1e-5)
    largest = np.argsort(-mssd.reshape(len(mssd), -1), axis=1)[:, :n_top]
    if n_top > 1 and batch_size < 20:
        assert any(len(set(found // (20 * batch_size))) > 1 for found in largest)  # not all in one batch


def test_one_outlier_token_shows_as_the_top_share(llama, blocks):
    """What the statistic is for: a single token that holds nearly all of a layer's MSSD."""

    def add_outlier(_layer, _args, output):
        output[0, 3] += 1000
        return output

    models.decoder_layers(llama)[2].register_forward_hook(add_outlier)
    top_mssd = capture_statistics(llama, blocks, 5).top_mssd
    assert top_mssd[2] > 0.99 and np.delete(top_mssd, 2).max() < 0.9


def test_angular_distance_is_a_distance_between_depths(tiny, blocks):
    angular = capture_statistics(tiny, blocks).angular_distance
    n_depths = len(models.decoder_layers(tiny)) + 1
    assert angular.shape == (n_depths, n_depths) and ((0 <= angular) & (angular <= 1)).all()
    assert not angular.diagonal().any() and (angular + np.eye(n_depths) > 0).all()
    np.testing.assert_allclose(angular, angular.T, rtol=1e-12)


def test_the_last_tokens_alone_are_kept(llama, blocks, monkeypatch):
    """A view of one token would keep the states of the whole batch alive: streamed, those of every layer and
    batch."""
    original, kept = capture._LastTokens.add, []

    def watching(self, *args):
        original(self, *args)
        kept.extend(state for states in self._states.values() for state in states)

    monkeypatch.setattr(capture._LastTokens, "add", watching)
    capture_statistics(llama, blocks, 2)
    assert kept and all(state.untyped_storage().nbytes() == state.nbytes for state in kept)


def test_batch_size_changes_nothing_beyond_rounding(tiny, blocks):
    one_by_one = capture_statistics(tiny, blocks, 1)
    for batch_size in (2, 3, 5, 99):
        captured = capture_statistics(tiny, blocks, batch_size)
        np.testing.assert_allclose(captured.by_position, one_by_one.by_position, rtol=1e-3)
        np.testing.assert_allclose(captured.by_position.mean(2), one_by_one.by_position.mean(2), rtol=1e-5)
        np.testing.assert_allclose(captured.by_sample, one_by_one.by_sample, rtol=1e-3)
        np.testing.assert_allclose(captured.top_mssd, one_by_one.top_mssd, rtol=1e-4)
        np.testing.assert_allclose(
            captured.angular_distance, one_by_one.angular_distance, rtol=1e-4, atol=1e-7
        )


def test_an_identity_layer_measures_zero(llama, blocks):
    layer = models.decoder_layers(llama)[2]
    for weight in (layer.self_attn.o_proj.weight, layer.mlp.down_proj.weight):
        torch.nn.init.zeros_(weight)
    captured = capture_statistics(llama, blocks)
    for values in (captured.by_position, captured.by_sample, captured.top_mssd[None]):
        assert not values[:, 2].any()
        assert (np.delete(values, 2, axis=1) > 0).all()
    assert captured.angular_distance[2, 3] < 1e-7 < captured.angular_distance[3, 4]


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
    assert captured.by_position.shape == (4, len(models.decoder_layers(llama)), blocks.shape[1])
    assert len(alive) == 2 * 20 * 6
    assert most <= 4
    assert not any(ref() is not None for ref in alive)


def test_streamed_capture_is_equal_to_the_last_bit(make_tiny, blocks, tmp_path):
    for name in ("llama", "gemma3", "falcon"):
        model = make_tiny(name)
        model.save_pretrained(tmp_path / name)
        for room in (float("inf"), 0):
            streamed = capture.capture_statistics(stream_decoder(tmp_path / name, "float32", room), blocks, 2)
            assert_identical(streamed, capture_statistics(model, blocks, 2))


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
    assert_identical(loaded, captured)
    assert set(vars(loaded)) == {"by_position", "by_sample", "top_mssd", "angular_distance"}
    assert loaded.n_samples == captured.n_samples == len(blocks)
    pd.testing.assert_frame_equal(pd.read_csv(tmp_path / "statistics.csv"), captured.table(), rtol=1e-12)
    assert {path.name for path in tmp_path.iterdir()} == {"statistics.safetensors", "statistics.csv"}


def test_the_table_has_one_row_per_layer_and_counts_every_position():
    by_position = np.arange(4 * 2 * 4, dtype=np.float64).reshape(4, 2, 4)
    statistics = LayerStatistics(by_position, np.zeros((4, 2, 7)), np.array([0.25, 0.5]), np.zeros((3, 3)))
    table = statistics.table()
    assert statistics.n_samples == 7
    assert table["layer_idx"].tolist() == [0, 1]
    assert table["cosine_distance"].tolist() == [1.5, 5.5]
    assert table["masd"].tolist() == [17.5, 21.5]
    assert table["relative_update"].tolist() == [25.5, 29.5]
    assert table["mssd_without_first"].tolist() == [10.0, 14.0]
    assert table["top_mssd"].tolist() == [0.25, 0.5]


def test_a_table_of_some_samples_counts_each_as_often_as_it_is_drawn():
    by_sample = np.arange(4 * 2 * 3, dtype=np.float64).reshape(4, 2, 3)
    statistics = LayerStatistics(np.zeros((4, 2, 5)), by_sample, np.zeros(2), np.zeros((3, 3)))
    table = statistics.table_of(np.array([2, 0, 2, 2]))
    assert list(table) == list(STATISTICS)
    assert table["cosine_distance"].tolist() == [1.5, 4.5]  # (2 + 0 + 2 + 2) / 4, (5 + 3 + 5 + 5) / 4
    assert table["relative_update"].tolist() == [19.5, 22.5]
    assert statistics.table_of(np.array([1]))["mssd"].tolist() == [7, 10]


def test_a_table_of_all_samples_is_the_table_and_serves_every_form(llama, blocks):
    captured = capture_statistics(llama, blocks)
    table, of_all = captured.table(), captured.table_of(np.arange(len(blocks)))
    for name in STATISTICS:
        np.testing.assert_allclose(of_all[name], table[name], rtol=1e-12)
    for form in of_kind("line"):
        np.testing.assert_allclose(normalise(of_all, form), normalise(table, form), rtol=1e-9, atol=1e-12)


@pytest.mark.slow
def test_capture_equals_the_oracle_on_smollm2():
    folder = checkpoint_folder("embedded:smollm2-135m-instruct")
    model = models.load_model(folder, "float32").cpu()
    text = (repository_root() / "LICENSE").read_text(encoding="utf-8")  # English prose that every clone has
    blocks = models.load_tokenizer(folder)(text, return_tensors="pt")["input_ids"][0, : 3 * 96].view(3, 96)
    # A single token may turn by as little as 1e-3, where float32 leaves four digits; the means keep them all.
    assert_equals_oracle(
        capture_statistics(model, blocks, 2), gather_states(model, blocks, 2), by_position_rtol=1e-4
    )
