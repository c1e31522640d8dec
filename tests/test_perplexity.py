"""Perplexity against a float64 sum over the tokens, whole and without layers."""

import math

import numpy as np
import pytest
import torch

from simdiff_utils import perplexity as perplexity_module
from simdiff_utils.decoder import Decoder
from simdiff_utils.models import decoder_layers
from simdiff_utils.perplexity import block_losses, check_perplexity_ratio, perplexity
from simdiff_utils.settings import SimDiffError
from simdiff_utils.surgery import layers_removed


@torch.inference_mode()
def losses_token_by_token(model, blocks):
    losses = []
    for block in blocks:
        logits = model(input_ids=block[None], use_cache=False).logits[0].double().numpy()
        nats = [math.log(np.exp(logits[t] - logits[t].max()).sum()) + logits[t].max() - logits[t, block[t + 1]]
                for t in range(len(block) - 1)]
        losses.append(sum(nats) / len(nats))
    return losses


def test_losses_equal_a_sum_over_the_tokens(tiny, blocks):
    np.testing.assert_allclose(block_losses(Decoder(tiny), blocks)[0], losses_token_by_token(tiny, blocks), rtol=1e-5)


@pytest.mark.parametrize("removed", [frozenset({0}), frozenset({1, 3, 5})])
def test_losses_without_layers(tiny, blocks, removed):
    dense, pruned = block_losses(Decoder(tiny), blocks, (frozenset(), removed))
    with layers_removed(tiny, removed):
        np.testing.assert_allclose(pruned, losses_token_by_token(tiny, blocks), rtol=1e-5)
    assert (abs(pruned - dense) > 1e-3).any()
    np.testing.assert_array_equal(block_losses(Decoder(tiny), blocks)[0], dense)  # whole again, and alone the same


@pytest.mark.parametrize("batch_size", [1, 2, 3, 5, 99])
def test_batch_size_and_order_of_the_blocks_do_not_matter(llama, blocks, batch_size):
    decoder = Decoder(llama)
    expected = block_losses(decoder, blocks, batch_size=1)
    assert expected.shape == (1, 5) and expected.dtype == np.float64
    np.testing.assert_allclose(block_losses(decoder, blocks, batch_size=batch_size), expected, rtol=1e-5)
    flipped = block_losses(decoder, blocks.flip(0), batch_size=batch_size)
    np.testing.assert_allclose(flipped, expected[:, ::-1], rtol=1e-5)


def test_a_model_that_knows_nothing_has_the_vocabulary_as_perplexity(llama, blocks):
    torch.nn.init.zeros_(llama.lm_head.weight)
    losses = block_losses(Decoder(llama), blocks)
    np.testing.assert_allclose(losses, math.log(97), rtol=1e-6)
    assert perplexity(losses) == pytest.approx(97, rel=1e-6)


def test_perplexity_is_the_exponential_of_the_mean_loss():
    assert perplexity(np.array([math.log(2), math.log(8)])) == pytest.approx(4)  # not the mean of 2 and 8
    assert type(perplexity(np.array([1.0]))) is float


def test_losses_that_are_not_finite_are_refused(llama, blocks):
    with torch.no_grad():
        decoder_layers(llama)[2].mlp.down_proj.weight[0, 0] = float("nan")
    with pytest.raises(SimDiffError, match=r"layers \[0, 1\].*not finite in torch\.float32"):
        block_losses(Decoder(llama), blocks, (frozenset({0, 1}),))
    assert len(decoder_layers(llama)) == 6
    assert np.isfinite(block_losses(Decoder(llama), blocks, (frozenset({2}),))).all()


def test_the_logits_of_few_positions_are_held_at_once(make_tiny, blocks, monkeypatch):
    decoder, most = Decoder(make_tiny("gemma2")), []
    expected = block_losses(decoder, blocks)
    original = decoder.logits
    monkeypatch.setattr(perplexity_module, "_CHUNK", 7)
    monkeypatch.setattr(decoder, "logits", lambda hidden: most.append(hidden.shape[:2]) or original(hidden))
    np.testing.assert_allclose(block_losses(decoder, blocks), expected, rtol=1e-5)
    assert set(most) == {(1, 7), (1, 5)}  # 19 positions are predicted


@pytest.mark.parametrize("removed", [{6}, {-1}, {0, 17}, set(range(6))])
def test_sets_that_name_no_layers_are_refused(llama, blocks, removed):
    with pytest.raises(SimDiffError, match="layers 0 to 5"):
        block_losses(Decoder(llama), blocks, (frozenset(removed),))


def test_the_ratio_gate():
    check_perplexity_ratio(1e9, 10, 0)  # 0 is off
    check_perplexity_ratio(15, 10, 1.5)
    with pytest.raises(SimDiffError, match="1.51 times .* max_perplexity_ratio = 1.5"):
        check_perplexity_ratio(15.1, 10, 1.5)
