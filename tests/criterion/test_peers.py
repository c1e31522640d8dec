"""Every peer's layers against a hand computation of its paper's formula in float64, on tiny models' own
forward.

Nothing of ours is in the hand computations: hooks on the layers, layers passed by, numpy, torch's own
gradients. Token 0, which the models' configs call padding, is a word like any other in the texts.
"""

import copy
import re
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import pairwise
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from simdiff_utils.capture.statistics import LayerStatistics, capture_statistics
from simdiff_utils.criterion import laco, peers
from simdiff_utils.criterion import race as evaluator_module
from simdiff_utils.criterion.propose import METHODS, Evidence, count_passes
from simdiff_utils.criterion.race import Evaluator
from simdiff_utils.engine.decoder import Decoder, stream_decoder
from simdiff_utils.engine.load import decoder_layers
from simdiff_utils import SimDiffError
from simdiff_utils.registry import CRITERIA
from tests.helpers import FAMILIES, MIXED, VOCAB_SIZE, logits_of

N_LAYERS = 9  # Shortened-LLM's methods protect six
NUMBERS = range(1, N_LAYERS)
NAMES = ["llama", "gpt2", "gemma3", "falcon", "mixtral"]
THRESHOLDS = [n / 100 for n in range(95, -1, -5)]
LLAMA = ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj"]
MATRICES = {  # what Mag and Taylor sum over, by hand
    "llama": [*LLAMA, "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"],
    "gemma3": [*LLAMA, "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"],
    "gpt2": ["attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj"],
    "falcon": [
        "self_attention.query_key_value",
        "self_attention.dense",
        "mlp.dense_h_to_4h",
        "mlp.dense_4h_to_h",
    ],
    "mixtral": [*LLAMA, "mlp.gate", "mlp.experts.gate_up_proj", "mlp.experts.down_proj"],
    "gpt-oss": [*LLAMA, "mlp.router", "mlp.experts.gate_up_proj", "mlp.experts.down_proj"],
}


# ---- the models, and the formulas by hand --------------------------------------------------------


class Oracle:
    """A copy of a model in float64, and what its own forward says of its layers."""

    def __init__(self, model):
        self.model = copy.deepcopy(model).double()
        if hasattr(self.model.config, "num_local_experts"):
            self.model.set_experts_implementation("eager")  # the fast one knows no float64
        stack = self.model.base_model
        self.layers = list(stack.layers if hasattr(stack, "layers") else stack.h)
        self.final_norm = stack.norm if hasattr(stack, "norm") else stack.ln_f
        self.returns_tuple = "Falcon" in type(model).__name__
        self._losses = {}

    @contextmanager
    def passed_by(self, removed):
        """Some layers answer with what they are given."""
        for i in removed:
            self.layers[i].forward = lambda hidden_states, *_, **__: (
                (hidden_states,) if self.returns_tuple else hidden_states
            )
        try:
            yield
        finally:
            for i in removed:
                del self.layers[i].forward

    @torch.inference_mode()
    def states(self, blocks):
        """What enters each layer, and the final norm; then what leaves the norm: [L + 2, samples, seq, d]."""
        seen = []
        handles = [
            place.register_forward_pre_hook(
                lambda _module, args, kwargs: seen.append((args or [kwargs["hidden_states"]])[0].clone()),
                with_kwargs=True,
            )
            for place in (*self.layers, self.final_norm)
        ]
        handles.append(
            self.final_norm.register_forward_hook(lambda _module, _args, out: seen.append(out.clone()))
        )
        self.model(input_ids=blocks, use_cache=False)
        for handle in handles:
            handle.remove()
        return torch.stack(seen).numpy()

    @torch.inference_mode()
    def loss(self, blocks, removed=()):
        """Mean loss in nats per token without some layers."""
        key = frozenset(removed)
        if key not in self._losses:
            with self.passed_by(key):
                logits = self.model(input_ids=blocks, use_cache=False).logits
            self._losses[key] = float(
                np.mean([block_loss(*pair).item() for pair in zip(logits, blocks, strict=True)])
            )
        return self._losses[key]

    def matrices(self, name):
        """The weights of the linear maps of each layer, by their names."""
        return [
            [p for n, p in layer.named_parameters() if re.sub(r"\.weight$", "", n) in MATRICES[name]]
            for layer in self.layers
        ]


def block_loss(logits, tokens):
    """Mean over the positions of -log p(next token), in nats."""
    return -logits[:-1].log_softmax(-1)[torch.arange(len(tokens) - 1), tokens[1:]].mean()


@dataclass(frozen=True)
class Small:
    """A tiny model with all that methods may look at, and its oracle."""

    name: str
    model: torch.nn.Module
    oracle: Oracle
    calibration: torch.Tensor
    validation: torch.Tensor
    evidence: Evidence

    def proposed(self, method, n_remove):
        return METHODS[method].propose(self.evidence, n_remove)

    def chosen(self, method, n_remove):
        (candidate,) = self.proposed(method, n_remove)
        assert candidate.proposed_by == method and np.isnan(candidate.low) and np.isnan(candidate.high)
        return candidate.removed


def lowest(scores, n, without=()):
    return frozenset(
        [i for _, i in sorted((score, i) for i, score in enumerate(scores)) if i not in without][:n]
    )


def text(seed, n_blocks, seq_len=20):
    return torch.randint(0, VOCAB_SIZE, (n_blocks, seq_len), generator=torch.Generator().manual_seed(seed))


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

        monkeypatch.setattr(evaluator_module, "block_losses", look_up)
        numbered = torch.arange(n_blocks)[:, None].expand(-1, 2)  # each block's first token is its number
        evaluator = Evaluator(SimpleNamespace(n_layers=n_layers), numbered)
        return Evidence(blank_statistics(n_layers), evaluator=lambda: evaluator, **more)

    return make


def blank_statistics(n_layers):
    return LayerStatistics(
        np.ones((4, n_layers, 2)),
        np.ones((4, n_layers, 2)),
        np.ones(n_layers),
        np.ones((n_layers + 1, n_layers + 1)),
    )


def refusal(call, *args, **kwargs):
    """The sentence that a call is refused with."""
    with pytest.raises(SimDiffError) as error:
        call(*args, **kwargs)
    sentence = str(error.value)
    assert "\n" not in sentence and sentence.endswith(".") and len(sentence) < 250
    return sentence


# ---- random, tail --------------------------------------------------------------------------------


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
    sets = [frozenset(), *(METHODS["random"].propose(evidence, k)[0].removed for k in range(1, n_layers))]
    assert [min(larger - smaller) for smaller, larger in pairwise(sets)] == order[:-1]
    assert all(smaller < larger and len(larger) == len(smaller) + 1 for smaller, larger in pairwise(sets))
    assert {type(i) for i in sets[-1]} == {int}


def test_random_draws_differ_by_seed_and_reach_every_layer():
    drawn = [
        METHODS["random"].propose(Evidence(blank_statistics(N_LAYERS), seed=seed), 3) for seed in range(60)
    ]
    assert all(len(candidates) == 1 for candidates in drawn)
    sets = [candidates[0].removed for candidates in drawn]
    assert len(set(sets)) > 40 and frozenset().union(*sets) == set(range(N_LAYERS))
    assert METHODS["random"].n_seeds > 1 and {m.n_seeds for n, m in METHODS.items() if n != "random"} == {1}


def test_tail_and_random_look_at_nothing_but_the_number_of_layers(small):
    given = small("llama").evidence
    bare = Evidence(blank_statistics(N_LAYERS))
    for k in NUMBERS:
        assert METHODS["tail"].propose(bare, k)[0].removed == set(range(N_LAYERS - k, N_LAYERS))
        for method in ("tail", "random"):
            assert METHODS[method].propose(bare, k) == METHODS[method].propose(given, k)


# ---- ShortGPT, angular block ---------------------------------------------------------------------


def cosine(a, b):
    return (a * b).sum(-1) / (np.linalg.norm(a, axis=-1) * np.linalg.norm(b, axis=-1))


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


# ---- magnitude -----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [*NAMES, "gpt-oss"])
def test_magnitude_sums_the_matrices_without_norms_and_biases(name, deep):
    model = deep(name)
    oracle = Oracle(model)
    expected = [sum(w.detach().abs().sum().item() for w in layer) for layer in oracle.matrices(name)]
    assert all(len(layer) == len(MATRICES[name]) for layer in oracle.matrices(name))
    np.testing.assert_allclose(peers.magnitude_scores(Decoder(model)), expected, rtol=1e-6)
    evidence = Evidence(blank_statistics(N_LAYERS), decoder=lambda: Decoder(model))
    for k in (1, 2, 3):
        (found,) = METHODS["magnitude"].propose(evidence, k)
        assert found.removed == lowest(expected, k, without={0, 1, 2, 3, 7, 8})


@pytest.mark.parametrize("name", [*NAMES, "gpt-oss"])
def test_neither_norms_nor_biases_nor_signs_change_a_magnitude(name, deep):
    model = deep(name)
    before = peers.magnitude_scores(Decoder(model))
    others = 0
    with torch.no_grad():
        for layer in decoder_layers(model):
            for n, parameter in layer.named_parameters():
                if re.sub(r"\.weight$", "", n) in MATRICES[name]:
                    parameter.neg_()
                else:
                    parameter.mul_(1000)
                    others += 1
    assert others >= 2 * N_LAYERS
    np.testing.assert_array_equal(peers.magnitude_scores(Decoder(model)), before)


def test_a_magnitude_is_summed_in_float64(deep):
    model = deep("llama").to(torch.bfloat16)
    expected = [
        sum(w.detach().abs().sum().item() for w in layer) for layer in Oracle(model).matrices("llama")
    ]
    np.testing.assert_allclose(peers.magnitude_scores(Decoder(model)), expected, rtol=1e-9)


# ---- Taylor --------------------------------------------------------------------------------------


def gradients_by_hand(oracle, name, blocks):
    """For each layer the weights of its matrices and, sample by sample, the gradients of the sample's mean
    loss."""
    weights = oracle.matrices(name)
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


@pytest.mark.parametrize(
    ("method", "function", "n_samples"),
    [("taylor", "taylor_scores", 10), ("laco", "merge_layers", 4), ("entrodrop", "entropy_increases", 12)],
)
def test_of_the_calibration_samples_the_first_few_are_taken(small, monkeypatch, method, function, n_samples):
    llama, taken, original = small("llama"), [], getattr(peers, function)
    monkeypatch.setattr(
        peers, function, lambda _, blocks, *rest: taken.append(blocks) or original(_, blocks, *rest)
    )
    llama.chosen(method, 2)
    assert torch.equal(taken[0], llama.calibration[:n_samples])


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


# ---- searches: one-shot perplexity, SLEB, windows ------------------------------------------------


def test_one_shot_ranks_the_losses_without_each_single_layer(peer):
    losses = [peer.oracle.loss(peer.validation, {i}) for i in range(N_LAYERS)]
    for k in NUMBERS:
        assert peer.chosen("one-shot", k) == lowest(losses, k)


def test_sleb_is_a_greedy_search_by_hand(peer):
    chosen, n_looked_at = [], 0
    for k in range(1, N_LAYERS - 1):
        losses = {
            i: peer.oracle.loss(peer.validation, {*chosen, i})
            for i in range(1, N_LAYERS - 1)
            if i not in chosen
        }
        n_looked_at += len(losses)
        chosen.append(min(losses, key=losses.get))
        assert peer.chosen("sleb", k) == set(chosen)
        assert METHODS["sleb"].passes(N_LAYERS, k) == n_looked_at


def test_sleb_races_with_the_confidence_it_is_given(small):
    llama = small("llama")
    raced = replace(llama.evidence, exact=False, confidence=0.999)
    assert METHODS["sleb"].propose(raced, 3)[0].removed == llama.chosen("sleb", 3)
    with pytest.raises(SimDiffError, match="confidence must lie between 0 and 1, got 7"):
        METHODS["sleb"].propose(replace(raced, confidence=7), 1)


def test_windows_are_all_contiguous_blocks_and_the_losses_decide(peer):
    evaluator = peer.evidence.evaluator()
    for k in (1, 2, 5, 8):
        windows = [set(range(first, first + k)) for first in range(N_LAYERS - k + 1)]
        found = [candidate.removed for candidate in peer.proposed("window", k)]
        assert found == windows and len(found) == N_LAYERS - k + 1 and max(found[-1]) == N_LAYERS - 1
        losses = [peer.oracle.loss(peer.validation, window) for window in windows]
        assert evaluator.race({k: found}, exact=True).winners[k] == windows[int(np.argmin(losses))]


@pytest.mark.parametrize("planted", range(N_LAYERS))
def test_every_layer_can_be_chosen_by_its_loss_the_first_and_the_last_too(made_up, planted):
    evidence = made_up(lambda removed: 5 - (planted in removed) + 0.01 * sum(removed))
    assert METHODS["one-shot"].propose(evidence, 1)[0].removed == {planted}
    evidence = made_up(lambda removed: 5 - (planted in removed) - (planted + 1 in removed))
    if planted + 1 < N_LAYERS:
        sets = [candidate.removed for candidate in METHODS["window"].propose(evidence, 2)]
        assert evidence.evaluator().race({0: sets}).winners[0] == {planted, planted + 1}


@pytest.mark.parametrize("n_remove", range(1, N_LAYERS - 1))
def test_sleb_takes_neither_the_first_nor_the_last_layer_however_good(made_up, n_remove):
    order = [0, 8, 4, 2, 6, 1, 7, 3, 5]  # from the layer that is missed least
    evidence = made_up(lambda removed: 5 + 0.1 * sum(order.index(i) for i in removed))
    assert METHODS["sleb"].propose(evidence, n_remove)[0].removed == set(order[2 : 2 + n_remove])


# ---- EntroDrop -----------------------------------------------------------------------------------


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


# ---- LaCo ----------------------------------------------------------------------------------------


def walk_by_hand(n_layers, similarity, threshold, n_remove, span, interval):
    """The paper's walk over a stack of layers; where every merge is accepted, the interval ends at layer
    0."""
    stack, merges = list(range(n_layers)), ()
    at = n_layers - 1 - min(span, n_remove)
    while at >= 0 and len(stack) > n_layers - n_remove:
        n_left = n_remove - (n_layers - len(stack))
        n_folded = min(span, n_left)
        tried = (*merges, (stack[at], tuple(stack[at + 1 : at + 1 + n_folded])))
        if similarity(tried) > threshold:
            merges = tried
            stack = stack[: at + 1] + stack[at + 1 + n_folded :]
            at -= interval
            if at < 0 and threshold == -2:
                at = 0
            if at > len(stack) - 1 - min(span, n_left - n_folded):
                at = len(stack) - 1 - min(span, n_left - n_folded)
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
    """LaCo's rule on state dicts in float64."""

    def __init__(self, model, blocks):
        self.oracle, self.blocks, self.known, self.compared = Oracle(model), blocks, {}, set()
        self.dense = [
            {n: p.detach().clone() for n, p in layer.named_parameters()} for layer in self.oracle.layers
        ]
        self.states = self._states(self.dense, ())

    def _states(self, weights, removed):
        """Before the final norm."""
        for layer, theta in zip(self.oracle.layers, weights, strict=True):
            layer.load_state_dict(theta, strict=False)
        with self.oracle.passed_by(removed):
            return self.oracle.states(self.blocks)[-2]

    def similarity(self, merges):
        """Mean cosine to the dense states with theta_l + sum_k (theta_{l+k} - theta_l) for every merge, in
        order."""
        self.compared.add(merges)
        if merges not in self.known:
            weights = list(self.dense)
            for stays, folded in merges:
                weights[stays] = {
                    n: theta + sum(weights[k][n] - theta for k in folded)
                    for n, theta in weights[stays].items()
                }
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


def removed_by(merges):
    return frozenset(i for _, folded in merges for i in folded)


@pytest.mark.parametrize(
    ("name", "n_remove"), [*(("llama", k) for k in (1, 3, 4, 8)), *((name, 5) for name in NAMES[1:])]
)
def test_laco_walks_as_its_paper_says_at_the_highest_threshold_that_gets_there(gentle, name, n_remove):
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
    (found,) = METHODS["laco"].propose(evidence, 4)
    merges, n_models, _ = by_hand.choose(4)
    assert (found.merges, found.n_models, found.proposed_by) == (merges, n_models, "laco")
    assert found.removed == removed_by(merges)
    assert count_passes(METHODS["laco"], [found], N_LAYERS, 4) == n_models


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
        """One token in a plane, turned away from the dense model's by a made-up angle."""
        return torch.tensor([[np.cos(angle(merges)), np.sin(angle(merges))]])

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(peers, "_last_states", states)
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


def test_laco_looks_at_the_states_before_the_final_norm(gentle):
    """A norm of weight 0 but for one feature would make every cosine 1 or -1."""
    model, by_hand = gentle("llama")
    expected = by_hand.choose(3)[:2]
    weight = model.model.norm.weight.detach().clone()
    try:
        with torch.no_grad():
            model.model.norm.weight.zero_()
            model.model.norm.weight[0] = 1
        assert laco.merge_layers(Decoder(model), text(3, 4), 3) == expected
    finally:
        model.model.norm.weight.data.copy_(weight)


@pytest.mark.parametrize("last", [False, True])
def test_layers_whose_states_are_not_finite_are_refused_not_ranked(deep, last):
    model = deep("llama")
    with torch.no_grad():
        decoder_layers(model)[-1 if last else 5].mlp.down_proj.weight.fill_(float("nan"))
    decoder, blocks = Decoder(model), text(3, 3)
    evidence = Evidence(
        blank_statistics(N_LAYERS), lambda: decoder, lambda: blocks, lambda: Evaluator(decoder, blocks)
    )
    for method in ("magnitude", "taylor", "entrodrop", "laco", "one-shot", "sleb"):
        assert 'dtype="float32"' in refusal(METHODS[method].propose, evidence, 1)


def test_laco_refuses_layers_that_are_not_built_alike(make_tiny):
    model = make_tiny("qwen3-moe")  # layers 1 and 4 have no experts
    weights = {n: tensor.clone() for n, tensor in model.state_dict().items()}
    sentence = refusal(laco.merge_layers, Decoder(model), text(3, 2), 2)
    assert "layers [3, 4, 5] of Qwen3MoeForCausalLM are not built alike" in sentence
    assert all(torch.equal(tensor, weights[n]) for n, tensor in model.state_dict().items())


# ---- all of them: what they may look at, what they protect, what they leave behind ---------------

LOOKS_AT = {
    "magnitude": {"decoder"},
    "taylor": {"decoder", "calibration"},
    "entrodrop": {"decoder", "calibration"},
    "laco": {"decoder", "calibration"},
    "one-shot": {"evaluator"},
    "sleb": {"evaluator"},
}


@pytest.mark.parametrize("method", CRITERIA)
def test_a_method_asks_for_what_is_costly_only_where_it_needs_it(small, method):
    asked = set()
    given = small("llama").evidence

    def spy(name):
        return lambda: asked.add(name) or getattr(given, name)()

    METHODS[method].propose(Evidence(given.statistics, *map(spy, ("decoder", "calibration", "evaluator"))), 2)
    assert asked == LOOKS_AT.get(method, set())


@pytest.mark.parametrize("method", CRITERIA)
def test_no_method_proposes_what_it_protects_and_all_propose_as_many_as_asked_for(small, method):
    llama = small("llama")
    protected = METHODS[method].protected(N_LAYERS)
    first_four_and_last_two = {0, 1, 2, 3, 7, 8}
    assert protected == {
        "magnitude": first_four_and_last_two,
        "taylor": first_four_and_last_two,
        "sleb": {0, 8},
    }.get(method, set())
    for k in (1, 3, N_LAYERS - 1 - (method == "laco")):
        if k > N_LAYERS - len(protected):
            continue
        for candidate in llama.proposed(method, k):
            assert type(candidate.removed) is frozenset and {type(i) for i in candidate.removed} == {int}
            assert len(candidate.removed) == k and candidate.removed <= set(range(N_LAYERS)) - protected
            assert removed_by(candidate.merges) == (candidate.removed if method == "laco" else set())


@pytest.mark.parametrize("scores", ["magnitude", "taylor"])
def test_the_first_four_and_the_last_two_are_protected_however_low_they_score(monkeypatch, scores):
    values = np.array([0.1, 0.2, 0.3, 0.4, 9, 7, 8, 0.5, 0.0])
    monkeypatch.setattr(peers, f"{scores}_scores", lambda *_: values)
    evidence = Evidence(blank_statistics(N_LAYERS), lambda: None, lambda: torch.zeros(1, 2))
    for k, expected in ((1, {5}), (2, {5, 6}), (3, {4, 5, 6})):
        assert METHODS[scores].propose(evidence, k)[0].removed == expected
    assert values.max() == 9  # the scores themselves are not touched


@pytest.mark.parametrize(
    ("method", "n_layers", "most"),
    [
        ("magnitude", 9, 3),
        ("magnitude", 6, 0),
        ("magnitude", 3, 0),
        ("taylor", 9, 3),
        ("taylor", 6, 0),
        ("sleb", 9, 7),
        ("cosine", 9, 9),
        ("one-shot", 9, 9),
        ("entrodrop", 9, 9),
    ],
)
def test_more_layers_than_a_method_may_touch_are_refused_before_any_work(made_up, method, n_layers, most):
    def costly():
        pytest.fail("scored what cannot be removed")

    evidence = made_up(lambda removed: costly(), n_layers, decoder=costly, calibration=costly)
    for n_remove in (most + 1, most + 2):
        sentence = refusal(METHODS[method].propose, evidence, n_remove)
        assert f"remove {n_remove}" in sentence and "protect" in sentence
        listed = re.findall(r"\d+", sentence.partition("[")[2].partition("]")[0])
        assert all(int(i) < n_layers for i in listed)


@pytest.mark.parametrize("name", ["llama", "mixtral"])
def test_streamed_from_disk_a_method_gives_the_same_or_one_sentence(small, tmp_path, name):
    peer = small(name)
    peer.model.save_pretrained(tmp_path)
    decoder = stream_decoder(tmp_path, "float32")
    evaluator = Evaluator(decoder, peer.validation, batch_size=6)
    evidence = replace(peer.evidence, decoder=lambda: decoder, evaluator=lambda: evaluator)
    for method in ("magnitude", "entrodrop", "one-shot", "sleb"):
        assert METHODS[method].propose(evidence, 2) == peer.proposed(method, 2)
    passes = []
    decoder.run = lambda *_, **__: passes.append(1)
    for method in ("taylor", "laco"):
        sentence = refusal(METHODS[method].propose, evidence, 2)
        assert method in sentence and "in memory: raise memory_gib" in sentence
    assert not passes, "refused before anything is read"
    assert all(p.is_meta for layer in decoder_layers(decoder.model) for p in layer.parameters())


@pytest.mark.parametrize("name", ["gemma3", "falcon", "mixtral"])
def test_no_method_leaves_a_trace_in_the_model(small, name):
    peer = small(name)
    assert {p.requires_grad for p in peer.model.parameters()} == {True}
    weights = {n: tensor.clone() for n, tensor in peer.model.state_dict().items()}
    logits, layers = logits_of(peer.model, peer.validation), [*map(id, decoder_layers(peer.model))]
    for method in LOOKS_AT:
        peer.proposed(method, 2)
    assert all(torch.equal(tensor, weights[n]) for n, tensor in peer.model.state_dict().items())
    assert [*map(id, decoder_layers(peer.model))] == layers and not peer.model.training
    assert all(p.requires_grad and p.grad is None for p in peer.model.parameters())
    assert torch.equal(logits_of(peer.model, peer.validation), logits)
