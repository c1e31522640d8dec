"""The lazy chain against plain greedy, the floating one against all sets, on losses that are made up."""

from dataclasses import replace
from itertools import combinations

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from simdiff_utils.criterion.candidates import Evidence
from simdiff_utils.criterion.floating import N_FINALISTS, Chain
from simdiff_utils.criterion.propose import N_BLOCKS, angular_sets, propose
from simdiff_utils.criterion.search import greedy
from tests.criterion.by_hand import blank_statistics

N = 9


class Table:
    """Stands for an evaluator: the mean loss of a set is what a function says, the same on every block."""

    n_blocks = 4

    def __init__(self, loss, n_layers=N):
        self.loss, self.n_layers, self.evaluated = loss, n_layers, []

    def losses(self, sets, which=None):
        new = [removed for removed in dict.fromkeys(sets) if removed not in self.evaluated]
        self.evaluated += new
        return np.array([[self.loss(removed)] * (4 if which is None else len(which)) for removed in sets])

    def first_slice(self):
        return np.arange(2)

    def race(self, groups, **_race):
        winners = {}
        for name, sets in groups.items():
            sets = list(sets)
            winners[name] = sets[int(self.losses(sets).mean(1).argmin())]
        return type("Race", (), {"winners": winners})


def growing(weights, pairs):
    """A loss whose increments grow as more is gone: a cost for each layer, and one for each pair."""

    def loss(removed):
        return sum(weights[i] for i in removed) + sum(
            pairs[i, j] for i, j in combinations(sorted(removed), 2)
        )

    return loss


@st.composite
def growing_losses(draw):
    whole = st.integers(0, 8)
    weights = draw(st.lists(whole, min_size=N, max_size=N))
    pairs = draw(st.lists(whole, min_size=N * N, max_size=N * N))
    return growing(weights, np.array(pairs).reshape(N, N))


@settings(max_examples=150, deadline=None)
@given(growing_losses(), st.integers(1, N - 1), st.integers(1, 4))
def test_where_increments_grow_lazy_is_plain_greedy_for_fewer_evaluations(loss, n_remove, batch):
    plain, lazy = Table(loss), Table(loss)
    order = greedy(plain, n_remove)
    found = Chain(lazy, n_remove, batch=batch)
    assert found.best == {k: frozenset(order[:k]) for k in range(n_remove + 1)}
    assert {*lazy.evaluated} == {*found.losses} and len(lazy.evaluated) == found.n_asked[-1]
    assert (
        len(lazy.evaluated) <= len(plain.evaluated) + 1
    )  # the dense model is the one that greedy does not ask


def test_the_evaluations_of_the_lazy_search_are_counted_by_hand():
    """Layers cost 1 to 9 each, whatever else is gone: the next estimate is right at once."""
    table = Table(lambda removed: sum(i + 1 for i in removed))
    found = Chain(table, 4, batch=2)
    assert found.best[4] == {0, 1, 2, 3}
    assert len(table.evaluated) == 1 + N + 3 * 2  # dense; each alone; then two a step
    assert found.estimates == {i: i + 1 for i in range(N)}
    assert found.n_asked == [1, 1 + N, 3 + N, 5 + N, 7 + N]


def test_where_an_increment_falls_the_lazy_search_may_pass_a_layer_over():
    """Without layer 0, layer 8 costs nothing, which nobody expects: two are measured, and it is not."""

    def loss(removed):
        return sum(i + 1 for i in removed) - 9 * ({0, 8} <= removed)

    assert greedy(Table(loss), 2) == [0, 8] and Chain(Table(loss), 2, batch=2).best[2] == {0, 1}


def test_the_search_looks_at_a_slice_or_where_asked_at_all_blocks():
    table = Table(lambda removed: len(removed))
    seen = []
    table.losses = lambda sets, which=None: seen.append(which) or np.ones((len(sets), 4))
    Chain(table, 2)
    assert all(which.tolist() == [0, 1] for which in seen)
    seen.clear()
    Chain(table, 2, exact=True)
    assert set(seen) == {None}


@st.composite
def any_losses(draw):
    rng = np.random.default_rng(draw(st.integers(0, 10**6)))
    table = {
        frozenset(s): v
        for k in range(N + 1)
        for s, v in zip(combinations(range(N), k), rng.random(2**N), strict=False)
    }
    return table.__getitem__


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(any_losses(), st.integers(2, N - 1), st.integers(0, N), st.data())
def test_the_chain_returns_no_set_worse_than_any_it_was_given_or_asked_for(loss, n_remove, n_back, data):
    every = [[frozenset(s) for s in combinations(range(N), k)] for k in range(N)]
    given_sets = [data.draw(st.lists(st.sampled_from(sets), max_size=3)) for sets in every]
    table = Table(loss)
    found = Chain(table, n_remove, n_back=n_back, others=given_sets.__getitem__)
    assert found.losses == {removed: loss(removed) for removed in table.evaluated}
    assert {s for sets in given_sets[1 : n_remove + 1] for s in sets} <= {*found.losses}
    for k in range(n_remove + 1):
        assert loss(found.best[k]) == min(loss(s) for s in found.losses if len(s) == k)
    for k in range(1, n_remove):  # from the best of each size one went on, and back to each
        larger = [s for s in found.losses if len(s) == k + 1 and s > found.best[k]]
        assert larger
        if n_back >= N and k > 1:
            assert {found.best[k] - {i} for i in found.best[k]} <= {*found.losses}


def test_floating_finds_a_pair_that_no_greedy_step_shows():
    """Layers 7 and 8 cost much each and little together; greedy starts with 0 and sees them once three are
    gone."""

    def loss(removed):
        return sum(1 + 0.1 * min(i, 3) for i in removed) - 2 * ({7, 8} <= removed)

    table = Table(loss)
    assert frozenset(greedy(table, 2)) == {0, 1} == Chain(table, 3).best[2]
    assert Chain(table, 3, n_back=1, batch=N).best[2] == {0, 1}  # the pair is not in a set of three yet
    assert Chain(table, 4, others=lambda k: [frozenset({6, 7, 8})] * (k == 3), n_back=1).best[2] == {7, 8}


@pytest.mark.parametrize("n_remove", [2, 3, 5])
def test_floating_keeps_a_pattern(n_remove):
    kinds = (0, 0, 1) * 3
    table = Table(growing(range(N), np.ones((N, N))))
    evidence = Evidence(blank_statistics(N), evaluator=lambda: table, exact=True, kinds=kinds)
    found = propose("floating", evidence, n_remove)
    assert all(evidence.cuts.allows(candidate.removed) for candidate in found)
    assert len(found) <= N_FINALISTS and found[0].n_models + len(found) == len(table.evaluated)
    allowed = [frozenset(s) for s in combinations(range(N), n_remove) if evidence.cuts.allows(frozenset(s))]
    assert table.loss(found[0].removed) == min(map(table.loss, allowed))


def test_the_floating_search_of_a_smaller_number_asks_for_hardly_a_set_that_a_larger_one_has_not():
    table = Table(growing(range(N), np.ones((N, N))))
    evidence = Evidence(blank_statistics(N), evaluator=lambda: table, exact=True)
    propose("floating", evidence, 6)
    n_asked = len(table.evaluated)
    for n_remove in (4, 3, 2):
        propose("floating", evidence, n_remove)
    assert len(table.evaluated) <= n_asked + 3 * N_BLOCKS


def test_on_a_model_floating_is_never_behind_the_lazy_chain_and_the_blocks(peer):
    evidence = replace(peer.evidence, exact=True)
    evaluator = evidence.evaluator()

    def mean(removed):
        return evaluator.losses([removed]).mean()

    for n_remove in (4, 2):
        found = propose("floating", evidence, n_remove)
        blocks = [candidate.removed for candidate in angular_sets(evidence, n_remove, N_BLOCKS)]
        chain = Chain(evaluator, n_remove, exact=True)
        assert {len(candidate.removed) for candidate in found} == {n_remove}
        assert mean(found[0].removed) <= min(map(mean, [chain.best[n_remove], *blocks])) + 1e-12
