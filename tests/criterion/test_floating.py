"""The lazy search against plain greedy, the floating one against all sets, on losses that are made up."""

from dataclasses import replace
from itertools import combinations

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from simdiff_utils.criterion import floating
from simdiff_utils.criterion.candidates import Evidence
from simdiff_utils.criterion.cuts import Cuts
from simdiff_utils.criterion.floating import Floating, LazyGreedy
from simdiff_utils.criterion.propose import propose
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
    expected = greedy(plain, n_remove)
    found = LazyGreedy(lazy, n_remove, batch=batch)
    assert found.order == expected
    assert {*lazy.evaluated} == found.asked and len(lazy.evaluated) == len(found.asked)
    assert (
        len(lazy.evaluated) <= len(plain.evaluated) + 1
    )  # the dense model is the one that greedy does not ask


def test_the_evaluations_of_the_lazy_search_are_counted_by_hand():
    """Layers cost 1 to 9 each, whatever else is gone: the next estimate is right at once."""
    table = Table(lambda removed: sum(i + 1 for i in removed))
    found = LazyGreedy(table, 4, batch=2)
    assert found.order == [0, 1, 2, 3]
    assert len(table.evaluated) == 1 + N + 3 * 2  # dense; each alone; then two a step
    assert found.estimates == {i: i + 1 for i in range(4, N)}
    assert found.n_asked == [1 + N, 3 + N, 5 + N, 7 + N]


def test_where_an_increment_falls_the_lazy_search_may_pass_a_layer_over():
    """Without layer 0, layer 8 costs nothing, which nobody expects: two are measured, and it is not."""

    def loss(removed):
        return sum(i + 1 for i in removed) - 9 * ({0, 8} <= removed)

    assert greedy(Table(loss), 2) == [0, 8] and LazyGreedy(Table(loss), 2).order == [0, 1]


@st.composite
def any_losses(draw):
    rng = np.random.default_rng(draw(st.integers(0, 10**6)))
    table = {
        frozenset(s): v
        for k in range(N + 1)
        for s, v in zip(combinations(range(N), k), rng.random(2**N), strict=False)
    }
    return table.__getitem__


def floated(loss, n_remove, known, kinds=(0,) * N):
    table = Table(loss)
    evidence = Evidence(blank_statistics(N), evaluator=lambda: table, exact=True, kinds=kinds)
    lazy = LazyGreedy(table, n_remove, Cuts(kinds), exact=True)
    return Floating(evidence, known, lazy.estimates), table


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(any_losses(), st.integers(1, N - 1), st.data())
def test_floating_returns_no_set_worse_than_any_it_was_given_and_none_that_a_swap_betters(
    loss, n_remove, data
):
    every = st.sampled_from([frozenset(s) for s in combinations(range(N), n_remove)])
    known = data.draw(st.lists(every, min_size=1, max_size=4))
    found, table = floated(loss, n_remove, known)
    assert len(found.best) == n_remove
    assert loss(found.best) <= min(map(loss, known))
    assert loss(found.best) == min(loss(s) for s in found.asked if len(s) == n_remove)
    assert found.asked <= {*table.evaluated}


def test_floating_finds_a_pair_that_no_greedy_step_shows():
    """Layers 7 and 8 cost much each and little together; greedy starts with 0 and never sees them."""

    def loss(removed):
        return sum(1 + 0.1 * min(i, 3) for i in removed) - 2 * ({7, 8} <= removed)

    assert frozenset(greedy(Table(loss), 2)) == {0, 1}
    found, _ = floated(loss, 2, [frozenset({6, 7})])
    assert found.best == {7, 8}


@pytest.mark.parametrize("n_remove", [2, 3, 5])
def test_floating_keeps_a_pattern(n_remove):
    kinds = (0, 0, 1) * 3
    table = Table(growing(range(N), np.ones((N, N))))
    evidence = Evidence(blank_statistics(N), evaluator=lambda: table, exact=True, kinds=kinds)
    (found,) = propose("floating", evidence, n_remove)
    assert evidence.cuts.allows(found.removed) and found.n_models == len(table.evaluated)
    allowed = [frozenset(s) for s in combinations(range(N), n_remove) if evidence.cuts.allows(frozenset(s))]
    assert table.loss(found.removed) == min(map(table.loss, allowed))


def test_on_a_model_floating_is_never_behind_greedy_and_the_portfolio(peer):
    exact = replace(peer.evidence, exact=True)
    evaluator = exact.evaluator()

    def mean(removed):
        return evaluator.losses([removed]).mean()

    for n_remove in (2, 4):
        (found,) = propose("floating", exact, n_remove)
        lazy = LazyGreedy(evaluator, n_remove, exact=True)
        sets = [frozenset(lazy.order), *(c.removed for c in peer.proposed("portfolio", n_remove))]
        assert len(found.removed) == n_remove and found.proposed_by == "floating"
        assert mean(found.removed) <= min(map(mean, sets)) + 1e-12
        assert floating.N_AWAY > 0 and found.n_models > len(sets)
