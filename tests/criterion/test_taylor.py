"""Shortened-LLM's Taylor score against torch's own gradients, sample by sample."""

import numpy as np
import pytest
import torch

from simdiff_utils.criterion import peers
from simdiff_utils.engine.decoder import Decoder
from simdiff_utils.engine.load import decoder_layers
from tests.criterion.by_hand import N_LAYERS, Oracle, block_loss, lowest, text


def gradients_by_hand(oracle, name, blocks):
    """For each layer its weights and, sample by sample, the gradients of the sample's mean
    loss."""
    weights = oracle.weights(name)
    flat = [w for layer in weights for w in layer]
    by_sample = [
        torch.autograd.grad(
            block_loss(oracle.model(input_ids=block[None], use_cache=False).logits[0], block), flat
        )
        for block in blocks
    ]
    by_sample = [iter(gradients) for gradients in by_sample]
    return [[(w.detach(), [next(gradients) for gradients in by_sample]) for w in layer] for layer in weights]


def test_taylor_sums_weight_times_summed_gradient_entry_by_entry(peer):
    assert peers.N_TAYLOR == 10 < len(peer.calibration)
    found = gradients_by_hand(peer.oracle, peer.name, peer.calibration[:10])
    expected = [sum((w * sum(gs)).abs().sum().item() for w, gs in layer) for layer in found]
    scores = peers.taylor_scores(peer.evidence.decoder(), peer.calibration[:10])
    assert scores.dtype == np.float64 and scores.shape == (N_LAYERS,)
    np.testing.assert_allclose(scores, expected, rtol=1e-4)
    assert peer.chosen("taylor", 2) == lowest(expected, 2, without={0, 1, 2, 3, 7, 8})
    for other in (
        [sum(sum((w * g).abs().sum() for g in gs).item() for w, gs in layer) for layer in found],  # by sample
        [sum((w * sum(gs)).sum().abs().item() for w, gs in layer) for layer in found],  # by matrix
        [sum((w * w * sum(gs)).abs().sum().item() for w, gs in layer) for layer in found],
    ):
        assert (abs(scores / np.array(other) - 1) > 0.01).all(), "the formula's neighbours would be seen"


def test_of_the_calibration_samples_the_first_ten_are_taken(small):
    llama = small("llama")
    decoder = llama.evidence.decoder()
    few, many = (peers.taylor_scores(decoder, llama.calibration[:n]) for n in (10, 12))
    np.testing.assert_array_equal(few, many)
    assert (peers.taylor_scores(decoder, llama.calibration[:9]) != few).all()


def test_each_samples_loss_is_a_mean_and_the_samples_gradients_are_added(small):
    llama = small("llama")
    decoder = llama.evidence.decoder()
    one = peers.taylor_scores(decoder, llama.calibration[:1])
    twice = peers.taylor_scores(decoder, llama.calibration[:1].repeat(2, 1))
    np.testing.assert_allclose(twice, 2 * one, rtol=1e-5)


def test_an_expert_that_no_token_reaches_has_no_say(deep):
    model = deep("mixtral")
    with torch.no_grad():
        for layer in decoder_layers(model):
            layer.mlp.gate.weight[2:] = 0
            layer.mlp.gate.weight[:2] *= 100
    oracle, blocks = Oracle(model), text(5, 2)
    expected = [
        sum((w * sum(gs)).abs().sum().item() for w, gs in layer)
        for layer in gradients_by_hand(oracle, "mixtral", blocks)
    ]
    np.testing.assert_allclose(peers.taylor_scores(Decoder(model), blocks), expected, rtol=1e-3)


@pytest.mark.parametrize("fails", [False, True])
def test_taylor_leaves_gradients_and_weights_as_they_were(deep, monkeypatch, fails):
    model = deep("gpt2")
    for n, parameter in enumerate(model.parameters()):
        parameter.requires_grad_(n % 3 > 0)
        if n % 5:
            parameter.grad = torch.full_like(parameter, n)
    before = [
        (p.requires_grad, p.grad, None if p.grad is None else p.grad.clone()) for p in model.parameters()
    ]
    weights = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    decoder, blocks = Decoder(model), text(6, 3)
    if fails:
        losses = iter([peers.cross_entropy] * 2)  # two samples go well

        def fail(*args):
            try:
                return next(losses)(*args)
            except StopIteration:
                raise KeyboardInterrupt from None

        monkeypatch.setattr(peers, "cross_entropy", fail)
        with pytest.raises(KeyboardInterrupt):
            peers.taylor_scores(decoder, blocks)
    else:
        np.testing.assert_array_equal(
            peers.taylor_scores(decoder, blocks), peers.taylor_scores(Decoder(deep("gpt2")), blocks)
        )
    for parameter, (requires_grad, grad, value) in zip(model.parameters(), before, strict=True):
        assert parameter.requires_grad == requires_grad and parameter.grad is grad
        assert grad is None or torch.equal(parameter.grad, value)
    assert all(torch.equal(tensor, weights[name]) for name, tensor in model.state_dict().items())
    assert not model.training
