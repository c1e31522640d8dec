"""EntroDrop's entropies against distances sorted by hand."""

import numpy as np
import pytest
import torch

from simdiff_utils.criterion import peers
from tests.criterion.by_hand import lowest, refusal, text


def log_distance(states, k):
    """Mean over the tokens of the log of the distance to the k-th neighbour; states [samples, seq, d]."""
    tokens = states.reshape(-1, states.shape[-1])
    return np.mean(
        [
            np.log(np.sort(np.linalg.norm(np.delete(tokens, t, axis=0) - token, axis=1))[k - 1])
            for t, token in enumerate(tokens)
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
    for k in (1, 4, 8):
        assert peer.chosen("entrodrop", k) == lowest(increases, k)
    normed = states.shape[-1] * (log_distances[-1] - log_distances[-3])  # the last layer after the final norm
    assert abs(normed - found[-1]) > 1


@pytest.mark.parametrize("k", [1, 3, 10])
def test_the_number_of_neighbours_does_not_count_the_token_itself(small, k):
    llama = small("llama")
    blocks = text(7, 2)
    distances = [
        log_distance(depth, k) for depth in llama.oracle.states(blocks)[1:-1]
    ]  # equal words are one before
    found = peers.entropy_increases(llama.evidence.decoder(), blocks, k)
    np.testing.assert_allclose(found[1:], 32 * np.diff(distances), rtol=1e-4, atol=1e-4)


def test_entrodrop_needs_more_tokens_than_neighbours(small):
    decoder = small("llama").evidence.decoder()
    assert np.isfinite(peers.entropy_increases(decoder, torch.arange(26)[None])).all()
    for blocks in (torch.arange(25)[None], text(0, 5, 5), text(0, 25, 1)):
        sentence = refusal(peers.entropy_increases, decoder, blocks)
        assert (
            "the 25-th neighbour" in sentence
            and "there are 25 tokens: raise n_samples or seq_len" in sentence
        )


def test_entrodrop_looks_at_no_more_tokens_than_its_distances_can_hold(small, monkeypatch):
    decoder = small("llama").evidence.decoder()
    monkeypatch.setattr(peers, "N_ENTROPY_TOKENS", 90)
    blocks, longer = text(8, 7), text(9, 3, 60)
    np.testing.assert_array_equal(
        peers.entropy_increases(decoder, blocks), peers.entropy_increases(decoder, blocks[:4])
    )
    np.testing.assert_array_equal(
        peers.entropy_increases(decoder, longer), peers.entropy_increases(decoder, longer[:1])
    )
    monkeypatch.setattr(peers, "N_ENTROPY_TOKENS", 40)
    np.testing.assert_array_equal(
        peers.entropy_increases(decoder, longer), peers.entropy_increases(decoder, longer[:1, :40])
    )


def test_equal_words_leave_layer_0_the_last_to_go(small):
    """40 tokens of one word coincide before layer 0: no distance, whatever rounding makes of it; nothing
    breaks."""
    llama = small("llama")
    blocks = text(10, 4)
    blocks[:, ::2] = 7
    found = peers.entropy_increases(llama.evidence.decoder(), blocks)
    states = llama.oracle.states(blocks)
    others = states[0][:, 1::2].reshape(-1, 1, 32) - states[0].reshape(
        1, -1, 32
    )  # of the tokens between, to all
    logs = np.log(np.sort(np.linalg.norm(others, axis=-1), axis=1)[:, 25])
    smallest = np.log(np.finfo(np.float32).tiny)
    expected = 32 * (log_distance(states[1], 25) - (logs.mean() + smallest) / 2)
    np.testing.assert_allclose(found[0], expected, rtol=1e-4)
    assert np.isfinite(found).all() and found.argmax() == 0
