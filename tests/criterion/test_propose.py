"""What the criteria of layer statistics propose, from made-up ones in which the right answer is known or
counted by hand; what every criterion costs. `test_every_criterion` has those that look at more."""

from dataclasses import replace

import numpy as np
import pytest

from simdiff_utils import SimDiffError, registry
from simdiff_utils.capture.statistics import LayerStatistics
from simdiff_utils.criterion import peers
from simdiff_utils.criterion.candidates import Candidate, Evidence
from simdiff_utils.criterion.laco import Merges
from simdiff_utils.criterion.propose import N_BLOCKS, count_passes, propose, summarise_paths
from simdiff_utils.registry import CRITERIA

LINES = registry.of_kind("line")
N_LAYERS, N_SAMPLES, SEQ_LEN = 8, 4, 10
NUMBERS = range(1, N_LAYERS)
SINGLE = ("cosine", "angular", "tail", "random")  # methods that have chosen
FROM_STATISTICS = (*SINGLE, *LINES, "portfolio", "window")  # methods that look at nothing else


def make_statistics(seed=0, n_layers=N_LAYERS):
    """Random statistics of a made-up model of 8 layers; MSSD and MASD small enough that no sigmoid is 1."""
    rng = np.random.default_rng(seed)
    tokens = rng.uniform(0.05, 1, (4, n_layers, 1, 1)) * rng.uniform(
        0.5, 1.5, (4, n_layers, N_SAMPLES, SEQ_LEN)
    )
    turned = rng.uniform(0.01, 0.9, (n_layers + 1, n_layers + 1))
    turned = np.triu(turned, 1)
    return LayerStatistics(tokens.mean(2), tokens.mean(3), rng.uniform(0, 1, n_layers), turned + turned.T)


def proposed(criterion, statistics, n_remove):
    return [candidate.removed for candidate in propose(criterion, Evidence(statistics), n_remove)]


def smallest(values, n):
    return frozenset(i for _, i in sorted((value, i) for i, value in enumerate(values))[:n])


@pytest.fixture(params=range(3))
def statistics(request):
    return make_statistics(request.param)


def test_every_criterion_has_a_label_of_its_own():
    assert all(criterion.label and criterion.source for criterion in CRITERIA.values())
    assert len({criterion.label for criterion in CRITERIA.values()}) == len(CRITERIA)


@pytest.mark.parametrize("criterion", FROM_STATISTICS)
def test_statistics_are_enough_for_sets_of_the_number_of_layers_asked_for(statistics, criterion):
    for n_remove in NUMBERS:
        sets = proposed(criterion, statistics, n_remove)
        assert sets and len(sets) == len(set(sets))
        assert len(sets) == 1 or criterion not in SINGLE
        for removed in sets:
            assert type(removed) is frozenset and {type(i) for i in removed} == {int}
            assert len(removed) == n_remove and removed <= set(range(N_LAYERS))


@pytest.mark.parametrize(
    "criterion", [criterion for criterion in CRITERIA if criterion not in FROM_STATISTICS]
)
def test_methods_that_look_at_more_than_the_statistics_say_so(statistics, criterion):
    with pytest.raises(
        SimDiffError,
        match="looks at more than the layer statistics: give Evidence the decoder, the "
        "calibration blocks and the evaluator as well",
    ) as error:
        proposed(criterion, statistics, 1)
    assert "\n" not in str(error.value)


def test_evidence_counts_the_layers_and_shows_nothing_costly(statistics):
    evidence = Evidence(statistics, decoder=lambda: pytest.fail("called"))
    assert evidence.n_layers == N_LAYERS and Evidence(make_statistics(n_layers=5)).n_layers == 5
    assert "lambda" not in repr(evidence)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_a_score_that_is_not_finite_is_refused_not_ranked(value):
    statistics = make_statistics()
    statistics.by_position[0, 3, 2] = value
    with pytest.raises(
        SimDiffError, match='cosine gives layer 3 a score that is not finite; run with dtype="float32"'
    ):
        proposed("cosine", statistics, 2)


def test_cosine_takes_the_smallest_distances(statistics):
    distance = statistics.by_position[0].mean(axis=1)
    for n_remove in NUMBERS:
        assert proposed("cosine", statistics, n_remove) == [smallest(distance, n_remove)]


def test_of_equal_distances_cosine_takes_the_earlier():
    statistics = make_statistics()
    statistics.by_position[0] = np.array([3, 1, 2, 1, 2, 1, 3, 2])[:, None] / 4
    for n_remove, expected in (
        (2, {1, 3}),
        (4, {1, 3, 5, 2}),
        (5, {1, 3, 5, 2, 4}),
        (7, {0, 1, 2, 3, 4, 5, 7}),
    ):
        assert proposed("cosine", statistics, n_remove) == [expected]


@pytest.mark.parametrize("form", LINES)
def test_every_forms_path_goes_from_cosines_set_to_that_of_the_difference(statistics, form):
    difference = statistics.by_position[{"mssd": 1, "log-mssd": 1, "masd": 2, "relative": 3}[form]].mean(
        axis=1
    )
    for n_remove in NUMBERS:
        candidates = propose(form, Evidence(statistics), n_remove)
        assert candidates[0].low == 0 and candidates[-1].high == 1
        assert [c.low for c in candidates[1:]] == [
            c.high for c in candidates[:-1]
        ]  # no gap: every alpha has its set
        assert {c.proposed_by for c in candidates} == {form} and {c.n_tied for c in candidates} == {1}
        assert [candidates[0].removed] == proposed("cosine", statistics, n_remove)
        assert candidates[-1].removed == smallest(difference, n_remove)


@pytest.mark.parametrize("form", LINES)
def test_a_forms_candidates_are_its_path(statistics, form):
    path = Evidence(statistics).alpha_path(form)
    for n_remove, rows in path.groupby("n_remove"):
        assert [sorted(removed) for removed in proposed(form, statistics, n_remove)] == list(rows["removed"])
    assert set(path["n_remove"]) == set(NUMBERS)


@pytest.mark.parametrize("n_remove", NUMBERS)
def test_angular_takes_the_block_over_which_the_state_turns_least(n_remove):
    for first in range(N_LAYERS - n_remove + 1):  # the last one: the block that ends with the last layer
        statistics = make_statistics()
        statistics.angular_distance[first, first + n_remove] = (
            0.001  # state before `first`, and before what follows
        )
        assert proposed("angular", statistics, n_remove) == [set(range(first, first + n_remove))]


@pytest.mark.parametrize("n_remove", NUMBERS)
def test_angular_looks_at_no_other_distance(statistics, n_remove):
    expected = proposed("angular", statistics, n_remove)
    other = np.abs(np.subtract.outer(range(N_LAYERS + 1), range(N_LAYERS + 1))) != n_remove
    statistics.angular_distance[other] = 0  # blocks shorter and longer by one layer among them
    assert proposed("angular", statistics, n_remove) == expected


def test_tail_takes_the_last_layers(statistics):
    assert proposed("tail", statistics, 1) == [{7}]
    assert proposed("tail", statistics, 3) == [{5, 6, 7}]
    assert proposed("tail", statistics, 7) == [set(range(1, 8))]


@pytest.mark.parametrize("n_remove", NUMBERS)
def test_the_portfolio_holds_what_forms_cosine_angular_blocks_and_tail_propose(statistics, n_remove):
    found = proposed("portfolio", statistics, n_remove)
    others = {
        removed
        for criterion in (*LINES, "cosine", "angular", "tail")
        for removed in proposed(criterion, statistics, n_remove)
    }
    turned = [statistics.angular_distance[i, i + n_remove] for i in range(N_LAYERS - n_remove + 1)]
    blocks = {frozenset(range(i, i + n_remove)) for i in smallest(turned, N_BLOCKS)}
    assert len(found) == len(set(found))
    assert set(found) == others | blocks


def test_a_set_in_the_portfolio_is_its_first_proposers(statistics):
    for n_remove in NUMBERS:
        cosine = proposed("cosine", statistics, n_remove)[0]
        first = {c.removed: c for c in propose("portfolio", Evidence(statistics), n_remove)}
        assert first[cosine].proposed_by == LINES[0]
        for candidate in propose(LINES[0], Evidence(statistics), n_remove):
            assert first[candidate.removed] == candidate


def test_a_form_is_called_shortgpt_only_where_it_chooses_nothing_else():
    statistics = make_statistics()
    grid = [2, 4]
    summary = summarise_paths(Evidence(statistics), grid).set_index("criterion")
    assert list(summary.index) == list(LINES) and not summary["saturated"].any()
    for form in LINES:
        sets = [proposed(form, statistics, n_remove) for n_remove in grid]
        assert [summary.loc[form, f"sets, K={k}"] for k in grid] == [len(found) for found in sets]
        assert summary.loc[form, "shortgpt"] == all(len(found) == 1 for found in sets)
    statistics.by_position[1] += (
        40  # every sigmoid of MSSD is 1; log MSSD and the others still tell layers apart
    )
    summary = summarise_paths(Evidence(statistics), grid).set_index("criterion")
    assert summary.loc["mssd", "saturated"] == N_LAYERS and summary.loc["mssd", "shortgpt"]
    assert not summary.loc["log-mssd", "shortgpt"] and summary.loc["log-mssd", "saturated"] == 0


# ---- what every criterion costs


def test_the_published_counts_of_passes_come_out():
    """32 layers, 8 of them removed, and SLEB's other row: 30 and 6. By hand, and as the papers' tables have
    it."""
    reference = {
        "cosine": 1,
        "angular": 1,
        "entrodrop": 1,
        "random": 0,
        "tail": 0,
        "magnitude": 0,
        "taylor": 3,
        "one-shot": 32,
        "sleb": 212,
    }
    for criterion, expected in reference.items():
        assert count_passes(criterion, [Candidate(frozenset(range(8)), criterion)], 32, 8) == expected
    assert count_passes("sleb", [Candidate(frozenset(range(1, 7)), "sleb")], 30, 6) == 153
    windows = propose("window", Evidence(make_statistics(n_layers=32)), 8)
    assert len(windows) == 25 == count_passes("window", windows, 32, 8)
    merged = Candidate(frozenset({3, 4}), "laco", edit=Merges(((2, (3, 4)),)), n_models=17)
    assert count_passes("laco", [merged], 32, 2) == 17
    assert set(reference) | {"window", "laco", "portfolio", "floating", *LINES} == set(CRITERIA)


@pytest.mark.parametrize("criterion", [*LINES, "portfolio"])
def test_a_set_alone_has_won_and_several_cost_a_pass_each(statistics, criterion):
    for n_remove in NUMBERS:
        candidates = propose(criterion, Evidence(statistics), n_remove)
        n_sets = len({candidate.removed for candidate in candidates})
        assert count_passes(criterion, candidates, N_LAYERS, n_remove) == 1 + (n_sets if n_sets > 1 else 0)
        twice = [*candidates[:1], *candidates[:1]]
        assert count_passes(criterion, twice, N_LAYERS, n_remove) == 1


def test_sleb_looks_at_every_layer_left_but_the_two_ends():
    for n_layers in range(3, 12):
        for n_remove in range(1, n_layers - 1):
            looked_at = sum(len(range(1, n_layers - 1)[step:]) for step in range(n_remove))
            assert CRITERIA["sleb"].passes(n_layers, n_remove) == looked_at


def test_only_taylor_takes_gradients():
    assert {name for name, row in CRITERIA.items() if "gradients" in row.sees} == {"taylor"}


@pytest.mark.parametrize(
    ("criterion", "n_layers", "expected"),
    [
        ("magnitude", 32, {0, 1, 2, 3, 30, 31}),
        ("taylor", 32, {0, 1, 2, 3, 30, 31}),
        ("sleb", 32, {0, 31}),
        ("magnitude", 7, {0, 1, 2, 3, 5, 6}),
        ("magnitude", 5, {0, 1, 2, 3, 4}),
        ("taylor", 3, {0, 1, 2}),
        ("magnitude", 1, {0}),
        ("sleb", 2, {0, 1}),
        ("sleb", 1, {0}),
    ],
)
def test_what_is_protected_are_layers_of_the_model(criterion, n_layers, expected):
    assert CRITERIA[criterion].protected(n_layers) == expected


def test_no_other_method_protects_a_layer():
    protecting = {name for name, criterion in CRITERIA.items() if criterion.protected(32)}
    assert protecting == {"magnitude", "taylor", "one-shot", "entrodrop", "sleb"}


def test_layers_are_scored_once_for_all_numbers_of_layers(small, monkeypatch):
    llama, asked = small("llama"), []
    score = peers.entropy_increases
    monkeypatch.setattr(peers, "entropy_increases", lambda *given: asked.append(1) or score(*given))
    evidence = replace(llama.evidence)
    sets = [propose("entrodrop", evidence, k)[0].removed for k in (1, 2, 3)]
    assert len(asked) == 1 and sets[0] < sets[1] < sets[2]
