"""Perplexity against a float64 sum over the tokens, whole and without layers."""

import math

import numpy as np
import pytest
import torch

from simdiff_utils import SimDiffError
from simdiff_utils.engine import logits as logits_module
from simdiff_utils.engine.decoder import Decoder
from simdiff_utils.engine.load import decoder_layers
from simdiff_utils.engine.perplexity import (
    block_losses,
    check_perplexity_ratio,
    perplexity,
    perplexity_interval,
)
from simdiff_utils.engine.surgery import layers_removed


@torch.inference_mode()
def losses_token_by_token(model, blocks):
    losses = []
    for block in blocks:
        logits = model(input_ids=block[None], use_cache=False).logits[0].double().numpy()
        nats = [
            math.log(np.exp(logits[t] - logits[t].max()).sum()) + logits[t].max() - logits[t, block[t + 1]]
            for t in range(len(block) - 1)
        ]
        losses.append(sum(nats) / len(nats))
    return losses


def test_losses_equal_a_sum_over_the_tokens(tiny, blocks):
    np.testing.assert_allclose(
        block_losses(Decoder(tiny), blocks)[0], losses_token_by_token(tiny, blocks), rtol=1e-5
    )


@pytest.mark.parametrize("removed", [frozenset({0}), frozenset({1, 3, 5})])
@pytest.mark.parametrize("name", ["llama", "gemma3", "gpt2"])
def test_losses_without_layers(make_tiny, blocks, name, removed):
    tiny = make_tiny(name)
    dense, pruned = block_losses(Decoder(tiny), blocks, (frozenset(), removed))
    with layers_removed(tiny, removed):
        np.testing.assert_allclose(pruned, losses_token_by_token(tiny, blocks), rtol=1e-5)
    assert (abs(pruned - dense) > 1e-3).any()
    alone = block_losses(Decoder(tiny), blocks)[0]
    np.testing.assert_array_equal(alone, dense)  # whole again, and the same without company


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
    monkeypatch.setattr(logits_module, "CHUNK", 7)
    monkeypatch.setattr(decoder, "logits", lambda hidden: most.append(hidden.shape[:2]) or original(hidden))
    np.testing.assert_allclose(block_losses(decoder, blocks), expected, rtol=1e-5)
    assert set(most) == {(7, 1), (5, 1)}  # 19 positions of each block are predicted


@pytest.mark.parametrize("removed", [{6}, {-1}, {0, 17}, set(range(6))])
def test_sets_that_name_no_layers_are_refused(llama, blocks, removed):
    with pytest.raises(SimDiffError, match="layers 0 to 5"):
        block_losses(Decoder(llama), blocks, (frozenset(removed),))


@pytest.fixture
def two_models():
    """Losses of two models on 40 blocks: the blocks differ by much and alike for both, the models by 0.1
    nats."""
    rng = np.random.default_rng(5)
    difficulty = rng.normal(3, 0.5, 40)
    return difficulty + 0.1 + rng.normal(0, 0.03, 40), difficulty + rng.normal(0, 0.03, 40)


def test_the_interval_holds_the_perplexity_and_narrows_with_confidence(two_models):
    losses, _ = two_models
    low, high = perplexity_interval(losses)
    assert low < perplexity(losses) < high and type(low) is type(high) is float
    lower, higher = perplexity_interval(losses, confidence=0.99)
    assert lower < low and high < higher
    error = losses.std() / math.sqrt(40)  # what the central limit theorem says
    np.testing.assert_allclose(
        np.log([low, high]), losses.mean() + np.array([-1.96, 1.96]) * error, atol=0.2 * error
    )


def test_the_ratio_is_paired_block_by_block(two_models):
    pruned, dense = two_models
    low, high = perplexity_interval(pruned, dense)
    assert 1 < low < perplexity(pruned) / perplexity(dense) < high
    widths = [np.ptp(np.log(perplexity_interval(losses))) for losses in two_models]
    assert math.log(high / low) < 0.2 * math.hypot(*widths)  # as wide as were they of different text
    back = perplexity_interval(dense, pruned)
    np.testing.assert_allclose(back, (1 / high, 1 / low), rtol=0.01)


def test_losses_that_do_not_differ_leave_no_doubt(two_models):
    losses, _ = two_models
    assert perplexity_interval(losses, losses) == (1, 1)
    assert perplexity_interval(losses, losses.copy()) == (1, 1)
    assert perplexity_interval(np.full(4, math.log(7))) == pytest.approx((7, 7))


def test_one_block_says_nothing_about_spread():
    one = np.array([2.0])
    assert perplexity_interval(one) == (1, math.inf)
    assert perplexity_interval(one, one) == (0, math.inf)


def test_the_same_seed_gives_the_same_interval(two_models):
    pruned, dense = two_models
    assert perplexity_interval(pruned, dense, seed=3) == perplexity_interval(pruned, dense, seed=3)
    assert perplexity_interval(pruned, dense, seed=3) != perplexity_interval(pruned, dense, seed=4)
    assert perplexity_interval(pruned) == perplexity_interval(list(pruned))


def test_the_interval_holds_the_truth_as_often_as_it_says():
    rng = np.random.default_rng(0)
    intervals = [perplexity_interval(rng.normal(3, 0.4, 30)) for _ in range(200)]
    held = sum(low <= math.exp(3) <= high for low, high in intervals)
    assert 0.88 * 200 <= held < 200  # of 30 blocks a little short of 95 %; always would be too wide


def test_the_ratio_gate():
    check_perplexity_ratio(1e9, 10, 0)  # 0 is off
    check_perplexity_ratio(15, 10, 1.5)
    with pytest.raises(SimDiffError, match="1.51 times .* max_perplexity_ratio = 1.5"):
        check_perplexity_ratio(15.1, 10, 1.5)
