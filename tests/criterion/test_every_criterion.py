"""What all criteria have in common, on tiny models: what they look at, protect and leave behind; and the
plain ones (ShortGPT, angular block, random, last layers) by hand."""

import re
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
import torch

from simdiff_utils.criterion import peers
from simdiff_utils.criterion.candidates import Evidence
from simdiff_utils.criterion.propose import propose
from simdiff_utils.criterion.race import Evaluator
from simdiff_utils.engine.decoder import stream_decoder
from simdiff_utils.engine.load import decoder_layers
from simdiff_utils.registry import CRITERIA
from tests.criterion.by_hand import N_LAYERS, NUMBERS, blank_statistics, cosine, lowest, refusal
from tests.helpers import logits_of

# ---- random, tail


@pytest.mark.parametrize(
    ("seed", "n_layers", "order"),
    [
        (0, 8, [2, 4, 3, 6, 5, 0, 1, 7]),
        (1, 8, [5, 0, 1, 4, 2, 6, 3, 7]),
        (2, 8, [6, 5, 7, 2, 3, 4, 0, 1]),
        (
            0,
            30,
            [
                2,
                11,
                26,
                21,
                10,
                4,
                28,
                16,
                23,
                6,
                18,
                25,
                3,
                29,
                8,
                0,
                19,
                12,
                20,
                13,
                7,
                5,
                17,
                14,
                22,
                9,
                27,
                24,
                1,
                15,
            ],
        ),
    ],
)
def test_random_draws_the_same_on_every_machine(seed, n_layers, order):
    evidence = Evidence(blank_statistics(n_layers), seed=seed)
    sets = [frozenset(), *(propose("random", evidence, k)[0].removed for k in range(1, n_layers))]
    assert [min(larger - smaller) for smaller, larger in pairwise(sets)] == order[:-1]
    assert all(smaller < larger and len(larger) == len(smaller) + 1 for smaller, larger in pairwise(sets))
    assert {type(i) for i in sets[-1]} == {int}


def test_random_draws_differ_by_seed_and_reach_every_layer():
    drawn = [propose("random", Evidence(blank_statistics(N_LAYERS), seed=seed), 3) for seed in range(60)]
    assert all(len(candidates) == 1 for candidates in drawn)
    sets = [candidates[0].removed for candidates in drawn]
    assert len(set(sets)) > 40 and frozenset().union(*sets) == set(range(N_LAYERS))
    assert CRITERIA["random"].n_seeds > 1 and {m.n_seeds for n, m in CRITERIA.items() if n != "random"} == {1}


def test_tail_and_random_look_at_nothing_but_the_number_of_layers(small):
    given = small("llama").evidence
    bare = Evidence(blank_statistics(N_LAYERS))
    for k in NUMBERS:
        assert propose("tail", bare, k)[0].removed == set(range(N_LAYERS - k, N_LAYERS))
        for criterion in ("tail", "random"):
            assert propose(criterion, bare, k) == propose(criterion, given, k)


# ---- ShortGPT, angular block


def test_cosine_is_shortgpts_block_influence(peer, states):
    influence = [(1 - cosine(states[i], states[i + 1])).mean() for i in range(N_LAYERS)]
    for k in NUMBERS:
        assert peer.chosen("cosine", k) == lowest(influence, k)


def test_angular_is_the_block_over_which_the_last_token_turns_least(peer, states):
    last = states[:, :, -1]
    for k in NUMBERS:
        turned = [(np.arccos(cosine(last[i], last[i + k])) / np.pi).mean() for i in range(N_LAYERS - k + 1)]
        first = int(np.argmin(turned))
        assert peer.chosen("angular", k) == set(range(first, first + k))


# ---- all of them: what they may look at, what they protect, what they leave behind


LOOKS_AT = {
    "magnitude": {"decoder"},
    "taylor": {"decoder", "calibration"},
    "entrodrop": {"decoder", "calibration"},
    "laco": {"decoder", "calibration"},
    "one-shot": {"evaluator"},
    "sleb": {"evaluator"},
    "floating": {"evaluator"},
}


@pytest.mark.parametrize("criterion", CRITERIA)
def test_a_criterion_asks_for_what_is_costly_only_where_it_needs_it(small, criterion):
    asked = set()
    given = small("llama").evidence

    def spy(name):
        return lambda: asked.add(name) or getattr(given, name)()

    propose(criterion, Evidence(given.statistics, *map(spy, ("decoder", "calibration", "evaluator"))), 2)
    assert asked == LOOKS_AT.get(criterion, set())


@pytest.mark.parametrize("criterion", CRITERIA)
def test_no_criterion_proposes_what_it_protects_and_all_propose_as_many_as_asked_for(small, criterion):
    llama = small("llama")
    protected = CRITERIA[criterion].protected(N_LAYERS)
    first_four_and_last_two = {0, 1, 2, 3, 7, 8}
    assert protected == {
        "magnitude": first_four_and_last_two,
        "taylor": first_four_and_last_two,
        "one-shot": first_four_and_last_two,
        "entrodrop": {0, 1, 8},
        "sleb": {0, 8},
    }.get(criterion, set())
    for k in (1, 3, N_LAYERS - 1 - (criterion == "laco")):
        if k > N_LAYERS - len(protected):
            continue
        for candidate in llama.proposed(criterion, k):
            assert type(candidate.removed) is frozenset and {type(i) for i in candidate.removed} == {int}
            assert len(candidate.removed) == k and candidate.removed <= set(range(N_LAYERS)) - protected
            assert (candidate.edit and candidate.edit.removed) == (
                candidate.removed if criterion == "laco" else None
            )


@pytest.mark.parametrize("scores", ["magnitude", "taylor"])
def test_the_first_four_and_the_last_two_are_protected_however_low_they_score(monkeypatch, scores):
    values = np.array([0.1, 0.2, 0.3, 0.4, 9, 7, 8, 0.5, 0.0])
    monkeypatch.setattr(peers, f"{scores}_scores", lambda *_: values)
    evidence = Evidence(blank_statistics(N_LAYERS), lambda: None, lambda: torch.zeros(1, 2))
    for k, expected in ((1, {5}), (2, {5, 6}), (3, {4, 5, 6})):
        assert propose(scores, evidence, k)[0].removed == expected
    assert values.max() == 9  # the scores themselves are not touched


@pytest.mark.parametrize(
    ("criterion", "n_layers", "most"),
    [
        ("magnitude", 9, 3),
        ("magnitude", 6, 0),
        ("magnitude", 3, 0),
        ("taylor", 9, 3),
        ("taylor", 6, 0),
        ("sleb", 9, 7),
        ("cosine", 9, 9),
        ("one-shot", 9, 3),
        ("entrodrop", 9, 6),
    ],
)
def test_more_layers_than_a_criterion_may_touch_are_refused_before_any_work(
    made_up, criterion, n_layers, most
):
    def costly():
        pytest.fail("scored what cannot be removed")

    evidence = made_up(lambda removed: costly(), n_layers, decoder=costly, calibration=costly)
    for n_remove in (most + 1, most + 2):
        sentence = refusal(propose, criterion, evidence, n_remove)
        assert f"remove {n_remove}" in sentence and "protect" in sentence
        listed = re.findall(r"\d+", sentence.partition("[")[2].partition("]")[0])
        assert all(int(i) < n_layers for i in listed)


@pytest.mark.parametrize("name", ["llama", "mixtral"])
def test_streamed_from_disk_a_criterion_gives_the_same_or_one_sentence(small, tmp_path, name):
    peer = small(name)
    peer.model.save_pretrained(tmp_path)
    decoder = stream_decoder(tmp_path, "float32")
    evaluator = Evaluator(decoder, peer.validation, batch_size=6)
    evidence = replace(peer.evidence, decoder=lambda: decoder, evaluator=lambda: evaluator)
    for criterion in ("magnitude", "entrodrop", "one-shot", "sleb"):
        assert propose(criterion, evidence, 2) == peer.proposed(criterion, 2)
    passes = []
    decoder.run = lambda *_, **__: passes.append(1)
    for criterion in ("taylor", "laco"):
        sentence = refusal(propose, criterion, evidence, 2)
        assert criterion in sentence and "in memory: raise memory_gib" in sentence
    assert not passes, "refused before anything is read"
    assert all(p.is_meta for layer in decoder_layers(decoder.model) for p in layer.parameters())


@pytest.mark.parametrize("name", ["gemma3", "falcon", "mixtral"])
def test_no_criterion_leaves_a_trace_in_the_model(small, name):
    peer = small(name)
    assert {p.requires_grad for p in peer.model.parameters()} == {True}
    weights = {n: tensor.clone() for n, tensor in peer.model.state_dict().items()}
    logits, layers = logits_of(peer.model, peer.validation), [*map(id, decoder_layers(peer.model))]
    for criterion in LOOKS_AT:
        peer.proposed(criterion, 2)
    assert all(torch.equal(tensor, weights[n]) for n, tensor in peer.model.state_dict().items())
    assert [*map(id, decoder_layers(peer.model))] == layers and not peer.model.training
    assert all(p.requires_grad and p.grad is None for p in peer.model.parameters())
    assert torch.equal(logits_of(peer.model, peer.validation), logits)
