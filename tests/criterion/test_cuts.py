"""Sets that keep the pattern of layers, held to a list of all sets; every criterion asked for such cuts."""

from dataclasses import replace
from fractions import Fraction
from itertools import combinations, pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from simdiff_utils import SimDiffError
from simdiff_utils.criterion.alpha import trace_path
from simdiff_utils.criterion.cuts import Cuts
from simdiff_utils.criterion.propose import propose
from simdiff_utils.engine.surgery import layer_kinds
from simdiff_utils.registry import CRITERIA
from tests.criterion.by_hand import N_LAYERS
from tests.helpers import MIXED

KINDS = st.lists(st.integers(0, 2), min_size=2, max_size=8).map(tuple)
HEIGHT = st.integers(0, 12)


def all_sets(kinds, n_remove, protected=frozenset()):
    """Every set of n_remove layers without which the others repeat the first kinds, by trying all."""
    n_layers = len(kinds)
    for removed in combinations([i for i in range(n_layers) if i not in protected], n_remove):
        kept = [i for i in range(n_layers) if i not in removed]
        if all(kinds[i] == kinds[place] for place, i in enumerate(kept)):
            yield frozenset(removed)


@settings(max_examples=200)
@given(KINDS, st.data())
def test_the_lowest_set_is_the_lowest_of_all_and_ties_go_to_the_earlier_layer(kinds, data):
    scores = data.draw(st.lists(HEIGHT, min_size=len(kinds), max_size=len(kinds)))
    n_remove = data.draw(st.integers(1, len(kinds) - 1))
    sets = list(all_sets(kinds, n_remove))
    expected = min(sets, key=lambda s: (sum(scores[i] for i in s), sorted(s)))
    found = Cuts(kinds).lowest(np.array(scores, dtype=float), n_remove)
    assert found == expected and {type(i) for i in found} == {int}
    every = map(frozenset, combinations(range(len(kinds)), n_remove))
    assert [s for s in every if Cuts(kinds).allows(s)] == sets


@settings(max_examples=200)
@given(KINDS, st.data())
def test_no_protected_layer_goes_and_where_none_else_may_that_is_said(kinds, data):
    layer = st.integers(0, len(kinds) - 1)
    cuts = Cuts(kinds, data.draw(st.frozensets(layer, min_size=1, max_size=len(kinds) - 1)))
    scores = np.array(data.draw(st.lists(HEIGHT, min_size=len(kinds), max_size=len(kinds))), dtype=float)
    n_remove = data.draw(st.integers(1, len(kinds) - 1))
    sets = list(all_sets(kinds, n_remove, cuts.protected))
    every = map(frozenset, combinations(range(len(kinds)), n_remove))
    assert [s for s in every if cuts.allows(s)] == sets
    path = cuts.trace_path(scores, scores[::-1])
    of_this = path[path["n_remove"] == n_remove]
    assert all(frozenset(removed) in sets for removed in of_this["removed"])
    if not sets:
        with pytest.raises(SimDiffError, match=r"while layers \[.*\] are protected.*protect fewer"):
            cuts.lowest(scores, n_remove)
        assert of_this.empty
        return
    assert cuts.lowest(scores, n_remove) == min(sets, key=lambda s: (sum(scores[i] for i in s), sorted(s)))
    assert frozenset(of_this["removed"].iloc[0]) == cuts.lowest(scores, n_remove)


@settings(max_examples=200)
@given(KINDS, st.data())
def test_what_can_be_completed_is_told_from_what_cannot(kinds, data):
    n_remove = data.draw(st.integers(1, len(kinds) - 1))
    layer = st.integers(0, len(kinds) - 1)
    removed = data.draw(st.frozensets(layer, max_size=n_remove))
    protected = data.draw(st.frozensets(layer, max_size=2)) - removed
    possible = any(removed <= s and not protected & s for s in all_sets(kinds, n_remove))
    assert Cuts(kinds).completes(removed, n_remove, protected) == possible


@settings(max_examples=150, deadline=None)
@given(KINDS, st.data())
def test_the_alpha_path_holds_the_lowest_set_at_every_alpha(kinds, data):
    ends = st.lists(HEIGHT, min_size=len(kinds), max_size=len(kinds))
    i_sim, i_diff = (np.array(data.draw(ends)) / 8 for _ in range(2))
    path = Cuts(kinds).trace_path(i_sim, i_diff)
    assert set(path.columns) == set(trace_path(i_sim, i_diff).columns)
    for n_remove, rows in path.groupby("n_remove"):
        sets = list(all_sets(kinds, n_remove))

        def height(removed, alpha):
            return sum(Fraction(i_sim[i]) * (1 - alpha) + Fraction(i_diff[i]) * alpha for i in removed)

        ends = [Fraction(0)]
        for row, following in pairwise([*rows.itertuples(), None]):
            high = Fraction(row.high).limit_denominator(10**6)
            alphas = {ends[-1], (ends[-1] + high) / 2, high}
            for alpha in alphas:
                assert height(row.removed, alpha) == min(height(s, alpha) for s in sets)
            middle = (ends[-1] + high) / 2
            lowest = height(row.removed, middle)
            assert row.n_tied == sum(height(s, middle) == lowest for s in sets)
            assert row.degenerate == (row.low == row.high)
            assert following is None or following.low == row.high
            ends.append(high)
        assert rows["low"].iloc[0] == 0 and rows["high"].iloc[-1] == 1


def test_without_a_pattern_the_path_is_the_plain_one():
    i_sim, i_diff = np.random.default_rng(0).random((2, 9))
    for kinds in ((0,) * 9, (4,) * 9):
        assert Cuts(kinds).trace_path(i_sim, i_diff).equals(trace_path(i_sim, i_diff))


def test_the_kinds_of_layers_are_those_of_the_config(make_tiny):
    assert layer_kinds(make_tiny("llama").config) == (0,) * 6
    gemma = make_tiny(
        "gemma3", num_hidden_layers=18, layer_types=(["sliding_attention"] * 5 + ["full_attention"]) * 3
    )
    kinds = layer_kinds(gemma.config)
    assert kinds == (0, 0, 0, 0, 0, 5) * 3
    assert {tuple(sorted(s)) for s in all_sets(kinds, 2)} == {(i, 17) for i in (12, 13, 14, 15, 16)}
    assert len(list(all_sets(kinds, 4))) == 10


# ---- every criterion


@pytest.mark.parametrize("criterion", CRITERIA)
def test_every_criterion_keeps_the_pattern_where_it_is_asked_to_or_says_so(small, criterion):
    gemma = small("gemma3")
    kinds = layer_kinds(gemma.model.config)
    evidence = replace(gemma.evidence, kinds=kinds)
    protected, n_found = CRITERIA[criterion].protected(N_LAYERS), 0
    for n_remove in (1, 2, 3, 4):
        allowed = set(all_sets(kinds, n_remove))
        free = {s for s in allowed if not s & protected}
        try:
            sets = {c.removed for c in propose(criterion, evidence, n_remove)}
        except SimDiffError as error:
            assert "pattern" in str(error) or "protects" in str(error)
            assert criterion == "laco" or not free  # laco merges as it does; the others look for what may go
        else:
            assert sets and sets <= free
            n_found += 1
    assert n_found or criterion in ("laco", "magnitude", "taylor")


def test_scores_lines_and_blocks_are_the_best_of_those_that_keep_the_pattern(small):
    gemma = small("gemma3")
    kinds = layer_kinds(gemma.model.config)
    assert kinds == tuple(("sliding", "full").index(k.partition("_")[0]) * 2 for k in (MIXED * 2)[:N_LAYERS])
    evidence = replace(gemma.evidence, kinds=kinds)
    statistics, evaluator = evidence.statistics.table(), evidence.evaluator()
    for n_remove in (2, 3, 4):
        sets = list(all_sets(kinds, n_remove))
        distance = statistics["cosine_distance"]
        expected = min(sets, key=lambda s: sum(distance[i] for i in s))
        assert [c.removed for c in propose("cosine", evidence, n_remove)] == [expected]
        blocks = {s for s in sets if max(s) - min(s) == n_remove - 1}
        assert {c.removed for c in propose("window", evidence, n_remove)} == blocks
        chosen = [c.removed for c in propose("masd", replace(evidence, alpha=0.5), n_remove)]
        ternary = [c.removed for c in propose("masd", replace(evidence, search="ternary"), n_remove)]
        path = {c.removed for c in propose("masd", evidence, n_remove)}
        assert len(chosen) == 1 and {*chosen, *ternary} <= path <= set(sets)
        for name in ("relative", "log-mssd"):
            assert path and {c.removed for c in propose(name, evidence, n_remove)} <= {
                c.removed for c in propose("portfolio", evidence, n_remove)
            }
        assert np.isfinite(evaluator.losses(path)).all()


@pytest.mark.parametrize("criterion", CRITERIA)
def test_no_criterion_removes_a_protected_layer(small, criterion):
    llama = small("llama")
    evidence = replace(llama.evidence, protected=[0, 5])
    for n_remove in (1, 3):
        try:
            sets = {c.removed for c in propose(criterion, evidence, n_remove)}
        except SimDiffError as error:
            assert criterion == "laco" or f"{criterion} protects layers" in str(error)
        else:
            assert sets and all(len(s) == n_remove and not s & {0, 5} for s in sets)
    with pytest.raises(SimDiffError, match="layers .* are protected|protects"):
        propose(criterion, evidence, N_LAYERS - 1)
