"""LaCo's walk and its merges against the released code's rule on state dicts in float64."""

import copy
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from simdiff_utils.criterion import laco
from simdiff_utils.criterion.candidates import Evidence
from simdiff_utils.criterion.propose import count_passes, propose
from simdiff_utils.criterion.race import Evaluator
from simdiff_utils.engine.decoder import Decoder
from simdiff_utils.engine.load import decoder_layers
from tests.criterion.by_hand import (
    N_LAYERS,
    NAMES,
    Oracle,
    blank_statistics,
    cosine,
    refusal,
    removed_by,
    text,
)

THRESHOLDS = [n / 100 for n in range(95, -1, -5)]


def walk_by_hand(n_layers, similarity, threshold, n_remove, span, interval):
    """The released walk over a stack of layers, ended where enough are gone; where every merge is accepted,
    the interval ends at layer 0."""
    stack, merges = list(range(n_layers)), ()
    at = max(0, (n_layers - 1) - (min(span, n_remove) + 1))  # HIGHEST_LAY - MERGE_LAYERS
    while at >= 0 and len(stack) > n_layers - n_remove:
        n_left = n_remove - (n_layers - len(stack))
        n_folded = min(span, n_left, len(stack) - at - 1)
        tried = (*merges, (stack[at], tuple(stack[at + 1 : at + 1 + n_folded])))
        if similarity(tried) > threshold:
            merges = tried
            stack = stack[: at + 1] + stack[at + 1 + n_folded :]
            at -= interval
            if at < 0 and threshold == -2:
                at = 0
            assert at < len(stack) - 1 or len(stack) == n_layers - n_remove  # the authors start again there
        else:
            at -= 1
    return merges, len(stack) == n_layers - n_remove


def choose_by_hand(n_layers, similarity, n_remove, span=3, interval=2):
    """Merges at the highest threshold that gets there, and that threshold."""
    for threshold in (*THRESHOLDS, -2):
        merges, arrived = walk_by_hand(n_layers, similarity, threshold, n_remove, span, interval)
        if arrived:
            return merges, threshold
    return None


class LacoByHand:
    """LaCo's released rule on state dicts in float64."""

    def __init__(self, model, blocks):
        self.oracle, self.blocks, self.known, self.compared = Oracle(model), blocks, {}, set()
        self.dense = [
            {n: p.detach().clone() for n, p in layer.named_parameters()} for layer in self.oracle.layers
        ]
        self.states = self._states(self.dense, ())

    def _states(self, weights, removed):
        """After the final norm, those of a sample as one vector."""
        for layer, theta in zip(self.oracle.layers, weights, strict=True):
            layer.load_state_dict(theta, strict=False)
        with self.oracle.passed_by(removed):
            states = self.oracle.states(self.blocks)[-1]
        return states.reshape(len(states), -1)

    def similarity(self, merges):
        """Mean cosine to the dense states, the matrices of each layer that stays replaced, merge by merge."""
        self.compared.add(merges)
        if merges not in self.known:
            weights = list(self.dense)
            for stays, folded in merges:
                merged = dict(weights[stays])
                for n in merged:
                    for k in folded:
                        if merged[n].dim() > 1 and not n.endswith("bias"):
                            merged[n] = merged[n] + (weights[k][n] - merged[n])
                weights[stays] = merged
            self.known[merges] = cosine(self._states(weights, removed_by(merges)), self.states).mean()
        return self.known[merges]

    def choose(self, n_remove, span=3, interval=2):
        """Merges, how many models were compared (the dense one too), and the threshold."""
        self.compared = set()
        merges, threshold = choose_by_hand(N_LAYERS, self.similarity, n_remove, span, interval)
        return merges, len(self.compared) + 1, threshold


@pytest.fixture(scope="session")
def gentle(deep):
    """Function: family -> a tiny model of weaker layers (some merges keep its states), and the rule by
    hand."""
    made = {}

    def make(name):
        if name not in made:
            model = deep(name)
            with torch.no_grad():
                for i, layer in enumerate(decoder_layers(model)):
                    for parameter in layer.parameters():
                        parameter.mul_((1 + 0.5 * np.sin(2.1 * i)) / 4 if parameter.dim() > 1 else 1)
            made[name] = model, LacoByHand(model, text(3, 4))
        return made[name]

    return make


@pytest.mark.parametrize(
    ("name", "n_remove"), [*(("llama", k) for k in (1, 3, 4, 8)), *((name, 5) for name in NAMES[1:])]
)
def test_laco_walks_as_released_at_the_highest_threshold_that_gets_there(gentle, name, n_remove):
    model, by_hand = gentle(name)
    blocks = text(3, 4)
    weights = {n: tensor.clone() for n, tensor in model.state_dict().items()}
    expected, n_models, threshold = by_hand.choose(n_remove)
    assert threshold > -2
    assert all(abs(c - t) > 1e-5 for c in by_hand.known.values() for t in THRESHOLDS), "no call is close"
    assert laco.merge_layers(Decoder(model), blocks, n_remove) == (expected, n_models)
    assert len(removed_by(expected)) == n_remove
    assert all(torch.equal(tensor, weights[n]) for n, tensor in model.state_dict().items())


@pytest.mark.parametrize(("span", "interval"), [(1, 1), (2, 3), (4, 1)])
def test_laco_walks_with_other_spans_and_intervals(gentle, span, interval):
    model, by_hand = gentle("llama")
    for n_remove in (2, 4):
        expected, n_models, _ = by_hand.choose(n_remove, span, interval)
        found = laco.merge_layers(Decoder(model), text(3, 4), n_remove, span, interval)
        assert found == (expected, n_models)
        assert max(len(folded) for _, folded in expected) <= span


def test_lacos_candidate_tells_its_merges_and_its_models(gentle):
    model, by_hand = gentle("llama")
    decoder, calibration = Decoder(model), torch.cat([text(3, 4), text(11, 3)])  # four samples are compared
    evidence = Evidence(blank_statistics(N_LAYERS), lambda: decoder, lambda: calibration)
    (found,) = propose("laco", evidence, 4)
    merges, n_models, _ = by_hand.choose(4)
    assert (found.edit.merges, found.n_models, found.proposed_by) == (merges, n_models, "laco")
    assert found.removed == removed_by(merges)
    assert count_passes("laco", [found], N_LAYERS, 4) == n_models


@settings(derandomize=True, deadline=None, max_examples=150)
@given(
    n_layers=st.integers(2, 14),
    data=st.data(),
    span=st.integers(1, 5),
    interval=st.integers(1, 4),
    kind=st.sampled_from(["high", "low", "mixed", "mixed"]),
    seed=st.integers(0, 99),
)
def test_laco_always_takes_out_as_many_layers_as_asked_for(n_layers, data, span, interval, kind, seed):
    n_remove = data.draw(st.integers(1, n_layers - 1))
    rng, angles = np.random.default_rng(seed), {(): 0.0}

    def angle(merges):
        return angles.setdefault(merges, {"high": 0.1, "low": 2.9, "mixed": rng.uniform(0, np.pi)}[kind])

    def states(_decoder, _blocks, merges):
        """One sample in a plane, turned away from the dense model's by a made-up angle."""
        return torch.tensor([[np.cos(angle(merges)), np.sin(angle(merges))]])

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(laco, "_last_states", states)
        merges, n_models = laco.merge_layers(
            SimpleNamespace(n_layers=n_layers, streamed=False), text(0, 1), n_remove, span, interval
        )
    stack = list(range(n_layers))
    for stays, folded in merges:
        at = stack.index(stays)
        assert 1 <= len(folded) <= span and tuple(stack[at + 1 : at + 1 + len(folded)]) == folded
        del stack[at + 1 : at + 1 + len(folded)]
    assert len(stack) == n_layers - n_remove and stack[0] == 0
    assert removed_by(merges) == {*range(n_layers)} - {*stack}
    assert n_models == len(angles)
    assert (
        merges == choose_by_hand(n_layers, lambda tried: np.cos(angles[tried]), n_remove, span, interval)[0]
    )


@pytest.mark.parametrize(("n_layers", "n_remove"), [(5, 4), (8, 7), (2, 1)])
def test_laco_reaches_one_layer(deep, n_layers, n_remove):
    merges, _ = laco.merge_layers(Decoder(deep("llama", n_layers)), text(3, 2), n_remove)
    assert removed_by(merges) == set(range(1, n_layers))


def test_laco_looks_at_the_states_after_the_final_norm(gentle):
    """A norm of weight 0 but for one feature leaves the others no say."""
    model, usual = gentle("llama")
    usual.choose(3)
    changed = copy.deepcopy(model)
    with torch.no_grad():
        changed.model.norm.weight.zero_()
        changed.model.norm.weight[0] = 1
    by_hand = LacoByHand(changed, text(3, 4))
    assert laco.merge_layers(Decoder(changed), text(3, 4), 3) == by_hand.choose(3)[:2]
    shared = usual.known.keys() & by_hand.known.keys()
    assert shared and all(abs(usual.known[merges] - by_hand.known[merges]) > 0.01 for merges in shared)


@pytest.mark.parametrize("last", [False, True])
def test_layers_whose_states_are_not_finite_are_refused_not_ranked(deep, last):
    model = deep("llama")
    with torch.no_grad():
        decoder_layers(model)[-1 if last else 5].mlp.down_proj.weight.fill_(float("nan"))
    decoder, blocks = Decoder(model), text(3, 3)
    evidence = Evidence(
        blank_statistics(N_LAYERS), lambda: decoder, lambda: blocks, lambda: Evaluator(decoder, blocks)
    )
    for criterion in ("magnitude", "taylor", "entrodrop", "laco", "one-shot", "sleb"):
        assert 'dtype="float32"' in refusal(propose, criterion, evidence, 1)


def test_laco_refuses_layers_that_are_not_built_alike(make_tiny):
    model = make_tiny("qwen3-moe")  # layers 1 and 4 have no experts
    weights = {n: tensor.clone() for n, tensor in model.state_dict().items()}
    sentence = refusal(laco.merge_layers, Decoder(model), text(3, 2), 2)
    assert "layers [2, 3, 4] of Qwen3MoeForCausalLM are not built alike" in sentence
    assert all(torch.equal(tensor, weights[n]) for n, tensor in model.state_dict().items())
