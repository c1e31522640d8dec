"""Searches that evaluate sets: one layer at a time, greedily, and Algorithm 1, each against one by hand."""

from dataclasses import replace

import numpy as np
import pytest

from simdiff_utils import SimDiffError
from simdiff_utils.criterion import search
from simdiff_utils.criterion.alpha import trace_path
from simdiff_utils.criterion.propose import propose
from simdiff_utils.criterion.race import Evaluator
from simdiff_utils.criterion.search import greedy, leave_one_out, one_shot_scores, search_ternary
from simdiff_utils.engine.decoder import Decoder
from simdiff_utils.engine.perplexity import block_losses
from simdiff_utils.registry import CRITERIA
from tests.criterion.by_hand import N_LAYERS, lowest

# ---- one layer at a time, and greedily


def test_one_shot_ranks_the_losses_without_each_single_layer(peer):
    losses = [peer.oracle.loss(peer.validation, {i}) for i in range(N_LAYERS)]
    np.testing.assert_allclose(one_shot_scores(peer.evidence.evaluator()), losses, rtol=1e-4)
    for k in (1, 2, 3):
        assert peer.chosen("one-shot", k) == lowest(losses, k, without={0, 1, 2, 3, 7, 8})


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
        assert CRITERIA["sleb"].passes(N_LAYERS, k) == n_looked_at


def test_sleb_races_with_the_confidence_it_is_given(small):
    llama = small("llama")
    raced = replace(llama.evidence, exact=False, confidence=0.999)
    assert propose("sleb", raced, 3)[0].removed == llama.chosen("sleb", 3)
    with pytest.raises(SimDiffError, match="confidence must lie between 0 and 1, got 7"):
        propose("sleb", replace(raced, confidence=7), 1)


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
    assert one_shot_scores(evidence.evaluator()).argmin() == planted
    evidence = made_up(lambda removed: 5 - (planted in removed) - (planted + 1 in removed))
    if planted + 1 < N_LAYERS:
        sets = [candidate.removed for candidate in propose("window", evidence, 2)]
        assert evidence.evaluator().race({0: sets}).winners[0] == {planted, planted + 1}


@pytest.mark.parametrize("n_remove", range(1, N_LAYERS - 1))
def test_sleb_takes_neither_the_first_nor_the_last_layer_however_good(made_up, n_remove):
    order = [0, 8, 4, 2, 6, 1, 7, 3, 5]  # from the layer that is missed least
    evidence = made_up(lambda removed: 5 + 0.1 * sum(order.index(i) for i in removed))
    assert propose("sleb", evidence, n_remove)[0].removed == set(order[2 : 2 + n_remove])


def greedy_by_hand(decoder, blocks, n_remove, protected=()):
    chosen = []
    for _ in range(n_remove):
        losses = {
            i: block_losses(decoder, blocks, (frozenset([*chosen, i]),)).mean()
            for i in range(decoder.n_layers)
            if i not in chosen and i not in protected
        }
        chosen.append(min(losses, key=losses.get))
    return chosen


@pytest.mark.parametrize("protected", [frozenset(), frozenset({0, 5}), frozenset({1, 2})])
def test_greedy_is_a_search_by_hand(llama, blocks, protected):
    decoder = Decoder(llama)
    expected = greedy_by_hand(decoder, blocks, 3, protected)
    assert greedy(Evaluator(decoder, blocks), 3, protected, exact=True) == expected
    assert greedy(Evaluator(decoder, blocks), 3, protected, confidence=0.999) == expected
    assert not protected & set(expected)
    for n_remove in (0, 1, 2):
        assert greedy(Evaluator(decoder, blocks), n_remove, protected, exact=True) == expected[:n_remove]


def test_greedy_finds_nothing_twice(llama, blocks):
    evaluator = Evaluator(Decoder(llama), blocks)
    greedy(evaluator, 3, exact=True)
    spent = evaluator.cost.head_tokens
    assert spent == (6 + 5 + 4) * 5 * 19
    greedy(evaluator, 3)
    leave_one_out(evaluator)
    assert evaluator.cost.head_tokens == spent


def test_greedy_never_takes_a_protected_layer(llama, blocks):
    assert sorted(greedy(Evaluator(Decoder(llama), blocks), 4, frozenset({0, 5}))) == [1, 2, 3, 4]


@pytest.mark.parametrize(("n_remove", "protected"), [(5, {0, 5}), (7, {}), (1, set(range(6)))])
def test_greedy_refuses_more_layers_than_there_are(llama, blocks, computed, n_remove, protected):
    with pytest.raises(
        SimDiffError, match=f"remove {n_remove} of 6 layers while {len(protected)} are protected"
    ):
        greedy(Evaluator(Decoder(llama), blocks), n_remove, frozenset(protected))
    assert not computed


# ---- Algorithm 1


def smallest(i_sim, i_diff, a, n_remove):
    """Eq. 7 to 9 for plain numbers: indices of the smallest importances, the earlier first where they are
    equal."""
    fused = [(a * d + (1 - a) * s, i) for i, (s, d) in enumerate(zip(i_sim, i_diff, strict=True))]
    return frozenset(i for _, i in sorted(fused)[:n_remove])


def algorithm_1(i_sim, i_diff, n_remove, evaluate, eps, max_iterations):
    """As method.md section 4 states it; evaluates every probe anew. Returns probes and the best (alpha,
    set)."""

    def step(left, right, n_left):
        if right - left <= eps or n_left == 0:
            return []
        third = (right - left) / 3
        pair = [(evaluate(smallest(i_sim, i_diff, m, n_remove)), m) for m in (left + third, right - third)]
        narrowed = (pair[0][1], right) if pair[0][0] > pair[1][0] else (left, pair[1][1])
        return pair + step(*narrowed, n_left - 1)

    probes = step(0.0, 1.0, max_iterations)
    best_alpha = min(probes, key=lambda probe: probe[0])[1]
    return probes, best_alpha, smallest(i_sim, i_diff, best_alpha, n_remove)


def answer(probes):
    """The search's answer: the first probe of lowest perplexity."""
    return probes.loc[probes["perplexity"].idxmin()]


class Table:
    """A random perplexity for every set, the same when asked again; remembers what it was asked."""

    def __init__(self, seed: int) -> None:
        self.seed, self.asked = seed, []

    def __call__(self, removed: frozenset[int]) -> float:
        self.asked.append(removed)
        return self.look_up(removed)

    def look_up(self, removed: frozenset[int]) -> float:
        return 10 + 90 * float(np.random.default_rng([self.seed, *sorted(removed)]).random())


@pytest.mark.parametrize("seed", range(12))
@pytest.mark.parametrize("eps, max_iterations", [(0.01, 50), (0.2, 50), (1e-4, 7), (1e-9, 50)])
def test_search_equals_a_second_implementation(seed, eps, max_iterations):
    rng = np.random.default_rng(seed)
    n_layers = int(rng.integers(4, 16))
    n_remove = int(rng.integers(1, n_layers))
    i_sim, i_diff, table = rng.random(n_layers), rng.random(n_layers), Table(seed)
    found = search_ternary(i_sim, i_diff, n_remove, table, eps, max_iterations)
    probes, best_alpha, best_set = algorithm_1(i_sim, i_diff, n_remove, table.look_up, eps, max_iterations)
    assert found["alpha"].tolist() == pytest.approx([a for _, a in probes], rel=1e-12)
    assert found["perplexity"].tolist() == [perplexity for perplexity, _ in probes]
    assert found["removed"].tolist() == [sorted(smallest(i_sim, i_diff, a, n_remove)) for a in found["alpha"]]
    best = answer(found)
    assert best["alpha"] == pytest.approx(best_alpha, rel=1e-12)
    assert frozenset(best["removed"]) == best_set and len(best_set) == n_remove
    assert best["perplexity"] == table.look_up(best_set)
    # each distinct set once, and the repeats are told from the first times
    assert len(table.asked) == len(set(table.asked)) == (~found["repeated"]).sum()
    assert table.asked == [frozenset(r) for r in found.loc[~found["repeated"], "removed"]]


def test_without_memory_every_probe_is_evaluated_and_the_same_found():
    """As published: what the search costs is 24 evaluations at eps 0.01, though most of its sets were seen
    before."""
    rng = np.random.default_rng(0)
    i_sim, i_diff = rng.random(12), rng.random(12)
    remembering, forgetting = Table(0), Table(0)
    found = search_ternary(i_sim, i_diff, 5, remembering, eps=0.01)
    again = search_ternary(i_sim, i_diff, 5, forgetting, eps=0.01, remember=False)
    assert len(forgetting.asked) == 24 > len(remembering.asked) > 1
    assert [sorted(removed) for removed in forgetting.asked] == again["removed"].tolist()
    assert again.equals(found)  # the repeats are told all the same


def test_without_memory_a_new_evaluation_counts():
    values = iter(range(100, 0, -1))
    found = search_ternary(
        np.zeros(3), np.zeros(3), 1, lambda removed: float(next(values)), eps=0.5, remember=False
    )
    assert found["perplexity"].tolist() == [100, 99, 98, 97]
    assert found["repeated"].tolist() == [False, True, True, True]


def test_the_random_tables_hold_more_than_one_set():
    """Otherwise the test above would compare nothing."""
    n_sets = []
    for seed in range(12):
        rng, table = np.random.default_rng(seed), Table(seed)
        search_ternary(rng.random(12), rng.random(12), 5, table)
        n_sets.append(len(table.asked))
    assert max(n_sets) >= 4 and sum(n > 1 for n in n_sets) >= 6


def test_the_set_changes_where_two_lines_cross():
    """Two layers whose lines cross at alpha = 0.2: below it layer 0 goes, above it layer 1."""
    i_sim, i_diff = np.array([0.05, 0.0625]), np.array([0.6, 0.55])  # cross where a / (1 - a) = 1/4
    found = search_ternary(i_sim, i_diff, 1, lambda removed: 1.0 if removed == {0} else 2.0)
    assert {tuple(r) for r in found["removed"]} == {(0,), (1,)}
    assert all((row.removed == [0]) == (row.alpha < 0.2) for row in found.itertuples())
    best = answer(found)
    assert best["removed"] == [0] and best["perplexity"] == 1.0 and best["alpha"] < 0.2


@pytest.fixture
def search_curve(monkeypatch):
    """Function: perplexity as a function of alpha -> the search on it, every alpha standing for a set of its
    own."""
    monkeypatch.setattr(search, "fuse", lambda i_sim, i_diff, a: a)

    def on_curve(curve, **limits):
        def choose(importance, n_remove):
            return frozenset([importance])

        return search_ternary(None, None, 1, lambda removed: curve(*removed), choose=choose, **limits)

    return on_curve


@pytest.mark.parametrize("bottom", [0.0, 0.123, 0.7, 1.0])
def test_the_search_ends_at_the_bottom_of_a_bowl(search_curve, bottom):
    found = search_curve(lambda a: (a - bottom) ** 2, eps=1e-3)
    assert answer(found)["alpha"] == pytest.approx(bottom, abs=1e-3)


def test_the_best_alpha_seen_is_kept_when_the_search_walks_away_from_it(search_curve):
    """No bowl: a narrow dip at the first probe, 1/3, in a slope that leads the search up to 2/3."""
    found = search_curve(lambda a: 1.0 if abs(a - 1 / 3) < 0.01 else 10 - a)
    assert answer(found)["alpha"] == pytest.approx(1 / 3) and answer(found)["perplexity"] == 1.0
    assert found["alpha"].iloc[-1] > 0.6


def test_the_first_of_equals_is_the_best_and_a_tie_goes_left(search_curve):
    found = search_curve(lambda a: 4.0)
    assert answer(found)["alpha"] == pytest.approx(1 / 3)
    assert found["alpha"].iloc[-1] < 0.01


def test_published_count_of_evaluations_and_both_limits(search_curve):
    def count_probes(**limits):
        return len(search_curve(lambda a: a, **limits))

    assert (
        count_probes(eps=0.01) == 24
    )  # method.md, 7a: the interval shrinks to 2/3, so 12 rounds of two probes
    assert count_probes(eps=0.5) == 2 * 2
    assert count_probes(eps=0.67) == 2
    assert count_probes(eps=1e-9, max_iterations=3) == 2 * 3


def test_the_search_probes_only_sets_of_the_path():
    rng = np.random.default_rng(3)
    i_sim, i_diff = rng.random((2, 20))
    path = trace_path(i_sim, i_diff)
    for n_remove in range(1, 20):
        listed = path.loc[path["n_remove"] == n_remove, "removed"].tolist()
        assert all(
            removed in listed for removed in search_ternary(i_sim, i_diff, n_remove, Table(0))["removed"]
        )
