"""Algorithm 1 against a second implementation, on random score tables and on tables made to mislead it."""

import math

import numpy as np
import pytest

from simdiff_utils import alpha
from simdiff_utils.alpha import search_ternary


def smallest(l_sim, l_diff, a, n_remove):
    """Eq. 5 to 9 for plain floats: indices of the smallest importances, the earlier first where they are equal."""
    fused = [(a * (1 / (1 + math.exp(-d))) + (1 - a) * (s / 2), i)
             for i, (s, d) in enumerate(zip(l_sim, l_diff, strict=True))]
    return frozenset(i for _, i in sorted(fused)[:n_remove])


def algorithm_1(l_sim, l_diff, n_remove, evaluate, eps, max_iterations):
    """As method.md section 4 states it; evaluates every probe anew. Returns probes and the best (alpha, set)."""
    def step(left, right, n_left):
        if right - left <= eps or n_left == 0:
            return []
        third = (right - left) / 3
        pair = [(evaluate(smallest(l_sim, l_diff, m, n_remove)), m) for m in (left + third, right - third)]
        narrowed = (pair[0][1], right) if pair[0][0] > pair[1][0] else (left, pair[1][1])
        return pair + step(*narrowed, n_left - 1)

    probes = step(0.0, 1.0, max_iterations)
    best_alpha = min(probes, key=lambda probe: probe[0])[1]
    return probes, best_alpha, smallest(l_sim, l_diff, best_alpha, n_remove)


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
    l_sim, l_diff, table = rng.random(n_layers), rng.random(n_layers) * 3, Table(seed)
    found = search_ternary(l_sim, l_diff, n_remove, table, eps, max_iterations)
    probes, best_alpha, best_set = algorithm_1(l_sim, l_diff, n_remove, table.look_up, eps, max_iterations)
    assert found.probes["alpha"].tolist() == pytest.approx([a for _, a in probes], rel=1e-12)
    assert found.probes["perplexity"].tolist() == [perplexity for perplexity, _ in probes]
    assert found.alpha == pytest.approx(best_alpha, rel=1e-12)
    assert found.removed == best_set and len(best_set) == n_remove
    assert found.perplexity == table.look_up(best_set) == found.probes["perplexity"].min()
    # each distinct set once, and the repeats are told from the first times
    assert len(table.asked) == len(set(table.asked)) == (~found.probes["repeated"]).sum()
    assert table.asked == [frozenset(r) for r in found.probes.loc[~found.probes["repeated"], "removed"]]


def test_the_random_tables_hold_more_than_one_set():
    """Otherwise the test above would compare nothing."""
    n_sets = []
    for seed in range(12):
        rng, table = np.random.default_rng(seed), Table(seed)
        search_ternary(rng.random(12), rng.random(12) * 3, 5, table)
        n_sets.append(len(table.asked))
    assert max(n_sets) >= 4 and sum(n > 1 for n in n_sets) >= 6


def crossing_lines():
    """Two layers whose lines cross at alpha = 0.2: below it layer 0 goes, above it layer 1."""
    difference = (math.log(0.6 / 0.4), math.log(0.55 / 0.45))  # I_diff 0.6 and 0.55
    return np.array([0.1, 0.125]), np.array(difference)  # I_sim 0.05 and 0.0625: cross where a/(1-a) = 1/4


def test_the_set_changes_where_two_lines_cross():
    l_sim, l_diff = crossing_lines()
    found = search_ternary(l_sim, l_diff, 1, lambda removed: 1.0 if removed == {0} else 2.0)
    assert {tuple(r) for r in found.probes["removed"]} == {(0,), (1,)}
    assert all((row.removed == [0]) == (row.alpha < 0.2) for row in found.probes.itertuples())
    assert found.removed == {0} and found.perplexity == 1.0 and found.alpha < 0.2


@pytest.fixture
def search_curve(monkeypatch):
    """Function: perplexity as a function of alpha -> the search on it, every alpha standing for a set of its own."""
    monkeypatch.setattr(alpha, "fuse", lambda l_sim, l_diff, a: a)
    monkeypatch.setattr(alpha, "choose_removed", lambda importance, n_remove: frozenset([importance]))

    def search(curve, **limits):
        return search_ternary(None, None, 1, lambda removed: curve(*removed), **limits)
    return search


@pytest.mark.parametrize("bottom", [0.0, 0.123, 0.7, 1.0])
def test_the_search_ends_at_the_bottom_of_a_bowl(search_curve, bottom):
    found = search_curve(lambda a: (a - bottom) ** 2, eps=1e-3)
    assert found.alpha == pytest.approx(bottom, abs=1e-3)


def test_the_best_alpha_seen_is_kept_when_the_search_walks_away_from_it(search_curve):
    """No bowl: a narrow dip at the first probe, 1/3, in a slope that leads the search up to 2/3."""
    found = search_curve(lambda a: 1.0 if abs(a - 1 / 3) < 0.01 else 10 - a)
    assert found.alpha == pytest.approx(1 / 3) and found.perplexity == 1.0
    assert found.probes["alpha"].iloc[-1] > 0.6


def test_the_first_of_equals_is_the_best_and_a_tie_goes_left(search_curve):
    found = search_curve(lambda a: 4.0)
    assert found.alpha == pytest.approx(1 / 3)
    assert found.probes["alpha"].iloc[-1] < 0.01


def test_published_count_of_evaluations_and_both_limits(search_curve):
    def count_probes(**limits):
        return len(search_curve(lambda a: a, **limits).probes)

    assert count_probes(eps=0.01) == 24  # method.md, 7a: the interval shrinks to 2/3, so 12 rounds of two probes
    assert count_probes(eps=0.5) == 2 * 2
    assert count_probes(eps=0.67) == 2
    assert count_probes(eps=1e-9, max_iterations=3) == 2 * 3
