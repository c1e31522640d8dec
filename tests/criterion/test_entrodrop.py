"""EntroDrop's entropies against distances sorted by hand."""

import numpy as np
import pytest
import torch

from simdiff_utils.criterion import peers
from tests.criterion.by_hand import lowest, refusal, text


def log_distance(states, k):
    """Mean over the samples, each alone, and its tokens of the log of the distance to the k-th neighbour;
    states [samples, seq, d]."""
    return np.mean(
        [
            np.log(np.sort(np.linalg.norm(np.delete(sample, t, axis=0) - token, axis=1))[k - 1])
            for sample in states
            for t, token in enumerate(sample)
        ]
    )


@pytest.fixture(scope="session")
def log_distances(states):
    """By hand, for the 25th neighbour: before each layer, after the last, after the final norm."""
    return np.array([log_distance(depth, 25) for depth in states])


def test_entrodrop_is_the_increase_of_the_nearest_neighbour_entropy(peer, states, log_distances):
    assert peers.N_NEIGHBOURS == 25
    increases = states.shape[-1] * (log_distances[1:-1] - log_distances[:-2])
    found = peers.entropy_increases(peer.evidence.decoder(), peer.calibration)
    assert found.dtype == np.float64
    np.testing.assert_allclose(found, increases, rtol=1e-4, atol=1e-4)
    for k in (1, 4, 6):
        assert peer.chosen("entrodrop", k) == lowest(increases, k, without={0, 1, 8})
    normed = states.shape[-1] * (log_distances[-1] - log_distances[-3])  # the last layer after the final norm
    assert abs(normed - found[-1]) > 1


def test_a_samples_neighbours_are_its_own(small):
    """Tokens of other samples, however near, are none."""
    llama = small("llama")
    decoder, blocks = llama.evidence.decoder(), text(7, 1)
    alone = peers.entropy_increases(decoder, blocks)
    np.testing.assert_allclose(peers.entropy_increases(decoder, blocks.repeat(3, 1)), alone, rtol=1e-6)


@pytest.mark.parametrize("k", [1, 3, 10])
def test_the_number_of_neighbours_does_not_count_the_token_itself(small, k):
    llama = small("llama")
    blocks = text(7, 2)
    distances = [
        log_distance(depth, k) for depth in llama.oracle.states(blocks)[1:-1]
    ]  # equal words are one before
    found = peers.entropy_increases(llama.evidence.decoder(), blocks, k)
    np.testing.assert_allclose(found[1:], 32 * np.diff(distances), rtol=1e-4, atol=1e-4)


def test_entrodrop_needs_more_tokens_in_a_sample_than_neighbours(small):
    decoder = small("llama").evidence.decoder()
    assert np.isfinite(peers.entropy_increases(decoder, torch.arange(26)[None])).all()
    sentence = refusal(peers.entropy_increases, decoder, text(0, 5, 25))
    assert "the 25-th neighbour" in sentence and "samples have 25 tokens: raise seq_len" in sentence


def test_entrodrop_looks_at_no_more_tokens_of_a_sample_than_its_distances_can_hold(small, monkeypatch):
    decoder = small("llama").evidence.decoder()
    monkeypatch.setattr(peers, "N_ENTROPY_TOKENS", 40)
    longer = text(9, 3, 60)
    np.testing.assert_array_equal(
        peers.entropy_increases(decoder, longer), peers.entropy_increases(decoder, longer[:, :40])
    )


def test_equal_words_leave_layer_0_the_last_to_go(small):
    """30 tokens of one word coincide before layer 0: no distance, whatever rounding makes of it; nothing
    breaks."""
    llama = small("llama")
    blocks = text(10, 2, 60)
    blocks[:, ::2] = 7
    found = peers.entropy_increases(llama.evidence.decoder(), blocks)
    states = llama.oracle.states(blocks)
    others = states[0][:, 1::2, None] - states[0][:, None]  # of the tokens between, to all of their sample
    logs = np.log(np.sort(np.linalg.norm(others, axis=-1), axis=-1)[..., 25])
    smallest = np.log(np.finfo(np.float32).tiny)
    expected = 32 * (log_distance(states[1], 25) - (logs.mean() + smallest) / 2)
    np.testing.assert_allclose(found[0], expected, rtol=1e-4)
    assert np.isfinite(found).all() and found.argmax() == 0
