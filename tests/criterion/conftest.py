"""Tiny models of nine layers with all that criteria may look at, and models whose losses are made up."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from simdiff_utils.capture.statistics import capture_statistics
from simdiff_utils.criterion import race
from simdiff_utils.criterion.candidates import Evidence
from simdiff_utils.criterion.race import Evaluator
from simdiff_utils.engine.decoder import Decoder
from simdiff_utils.engine.perplexity import block_losses
from tests.criterion.by_hand import N_LAYERS, NAMES, Oracle, Small, blank_statistics, text
from tests.helpers import FAMILIES, MIXED


@pytest.fixture(scope="session")
def deep(make_tiny):
    """Function: family and number of layers -> a fresh tiny model."""

    def make(name, n_layers=N_LAYERS):
        changes = {"n_layer" if name == "gpt2" else "num_hidden_layers": n_layers}
        if "layer_types" in FAMILIES[name]:
            changes["layer_types"] = (MIXED * 4)[:n_layers]
        return make_tiny(name, **changes)

    return make


@pytest.fixture(scope="session")
def small(deep):
    """Function: family -> a tiny model and its oracle, made once. Tests leave them as they are."""
    made = {}

    def make(name):
        if name not in made:
            model = deep(name)
            decoder, calibration, validation = Decoder(model), text(3, 12), text(4, 6)
            evaluator = Evaluator(decoder, validation, batch_size=6)
            evidence = Evidence(
                capture_statistics(decoder, calibration, 12),
                lambda: decoder,
                lambda: calibration,
                lambda: evaluator,
                exact=True,
            )
            made[name] = Small(name, model, Oracle(model), calibration, validation, evidence)
        return made[name]

    return make


@pytest.fixture(scope="session", params=NAMES)
def peer(request, small):
    """A test that asks for this runs once per family."""
    return small(request.param)


@pytest.fixture(scope="session")
def states(peer):
    """By hand: [L + 2, samples, seq, d] of the calibration text; the last is after the final norm, a trap."""
    assert (peer.calibration == 0).any()
    return peer.oracle.states(peer.calibration)


@pytest.fixture
def made_up(monkeypatch):
    """Function: loss of a set -> evidence of a made-up model of n layers whose losses those are, by block
    noisier."""

    def make(loss, n_layers=N_LAYERS, n_blocks=8, **more):
        noise = np.random.default_rng(0).normal(0, 1, n_blocks)

        def look_up(_decoder, blocks, sets, *_args, **_kwargs):
            return np.array(
                [[loss(removed) + noise[int(block)] for block in blocks[:, 0]] for removed in sets]
            )

        monkeypatch.setattr(race, "block_losses", look_up)
        numbered = torch.arange(n_blocks)[:, None].expand(-1, 2)  # each block's first token is its number
        evaluator = Evaluator(SimpleNamespace(n_layers=n_layers), numbered)
        return Evidence(blank_statistics(n_layers), evaluator=lambda: evaluator, **more)

    return make


@pytest.fixture
def computed(monkeypatch):
    """What `block_losses` is asked for from here on: (sets, number of blocks) per call."""
    calls = []

    def spy(decoder, blocks, sets, *args, **kwargs):
        calls.append((set(sets), len(blocks)))
        return block_losses(decoder, blocks, sets, *args, **kwargs)

    monkeypatch.setattr(race, "block_losses", spy)
    return calls
