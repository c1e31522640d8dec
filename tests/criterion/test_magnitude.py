"""Shortened-LLM's magnitude: sums of absolute weights by hand."""

import numpy as np
import pytest
import torch

from simdiff_utils.criterion import peers
from simdiff_utils.criterion.candidates import Evidence
from simdiff_utils.criterion.propose import propose
from simdiff_utils.engine.decoder import Decoder
from simdiff_utils.engine.load import decoder_layers
from tests.criterion.by_hand import MATRICES, N_LAYERS, NAMES, Oracle, blank_statistics, is_weight, lowest


@pytest.mark.parametrize("name", [*NAMES, "gpt-oss"])
def test_magnitude_sums_all_weights_without_biases(name, deep):
    model = deep(name)
    oracle = Oracle(model)
    expected = [sum(w.detach().abs().sum().item() for w in layer) for layer in oracle.weights(name)]
    assert all(len(layer) >= len(MATRICES[name]) + 1 + (name != "falcon") for layer in oracle.weights(name))
    np.testing.assert_allclose(peers.magnitude_scores(Decoder(model)), expected, rtol=1e-6)
    evidence = Evidence(blank_statistics(N_LAYERS), decoder=lambda: Decoder(model))
    for k in (1, 2, 3):
        (found,) = propose("magnitude", evidence, k)
        assert found.removed == lowest(expected, k, without={0, 1, 2, 3, 7, 8})


@pytest.mark.parametrize("name", [*NAMES, "gpt-oss"])
def test_neither_biases_nor_signs_change_a_magnitude(name, deep):
    model = deep(name)
    before = peers.magnitude_scores(Decoder(model))
    others = 0
    with torch.no_grad():
        for layer in decoder_layers(model):
            for n, parameter in layer.named_parameters():
                if is_weight(n, name):
                    parameter.neg_()
                else:
                    parameter.mul_(1000)
                    others += 1
    assert others >= N_LAYERS or name in ("llama", "gemma3", "mixtral")  # which have no biases
    np.testing.assert_array_equal(peers.magnitude_scores(Decoder(model)), before)


def test_a_magnitude_is_summed_in_float64(deep):
    model = deep("llama").to(torch.bfloat16)
    expected = [sum(w.detach().abs().sum().item() for w in layer) for layer in Oracle(model).weights("llama")]
    np.testing.assert_allclose(peers.magnitude_scores(Decoder(model)), expected, rtol=1e-9)
