"""Algorithm 1 against a second implementation, on random score tables and on tables made to mislead it; the
list of all choices against brute force in fractions."""

from fractions import Fraction
from itertools import combinations, pairwise
from math import comb

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from simdiff_utils.criterion import alpha
from simdiff_utils.criterion.alpha import trace_path
from simdiff_utils.criterion.equations import choose_removed, fuse
from simdiff_utils.criterion.search import search_ternary


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
    monkeypatch.setattr(alpha, "fuse", lambda i_sim, i_diff, a: a)
    monkeypatch.setattr(alpha, "choose_removed", lambda importance, n_remove: frozenset([importance]))

    def search(curve, **limits):
        return search_ternary(None, None, 1, lambda removed: curve(*removed), **limits)

    return search


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


def brute_force_path(i_sim, i_diff):
    """Every row that `trace_path` should give, from sorting at every crossing and between any two neighbours
    of them: (n_remove, low, high, removed, degenerate, n_tied), low and high as fractions."""
    lines = [(Fraction(s), Fraction(d)) for s, d in zip(map(float, i_sim), map(float, i_diff), strict=True)]
    points = {Fraction(0), Fraction(1)}
    for (s, d), (t, e) in combinations(lines, 2):  # (1 - a) s + a d = (1 - a) t + a e
        if s - t != d - e:
            points.add((s - t) / ((s - t) - (d - e)))
    points = sorted(a for a in points if 0 <= a <= 1)
    between = [(low + high) / 2 for low, high in pairwise(points)]

    def rank(a):
        heights = [a * d + (1 - a) * s for s, d in lines]
        levels = sorted(set(heights))
        return [levels.index(height) for height in heights]  # small numbers: quick to compare

    ranks = {a: rank(a) for a in points + between}

    def choose(a, n):
        return tuple(sorted(sorted(range(len(lines)), key=lambda i: (ranks[a][i], i))[:n]))

    def count_tied(a, n):
        heights, n_tied = ranks[a], 0
        for chosen in combinations(range(len(lines)), n):
            highest = max(heights[i] for i in chosen)
            n_tied += all(heights[i] >= highest for i in range(len(lines)) if i not in chosen)
        return n_tied

    rows = []
    for n in range(1, len(lines)):
        pieces = []
        for (low, high), middle in zip(pairwise(points), between, strict=True):
            if pieces and pieces[-1][3] == choose(middle, n):
                assert pieces[-1][5] == count_tied(middle, n)  # or "on the whole interval" would say nothing
                pieces[-1] = (n, pieces[-1][1], high, *pieces[-1][3:])
            else:
                pieces.append((n, low, high, choose(middle, n), False, count_tied(middle, n)))
        for place, a in enumerate(points):
            beside = between[max(place - 1, 0) : place + 1]
            if choose(a, n) not in [choose(middle, n) for middle in beside]:
                pieces.append((n, a, a, choose(a, n), True, count_tied(a, n)))
        rows += sorted(pieces)
    return rows


def assert_path_is_right(i_sim, i_diff):
    path = trace_path(np.array(i_sim), np.array(i_diff))
    expected = [
        (n, float(low), float(high), *rest) for n, low, high, *rest in brute_force_path(i_sim, i_diff)
    ]
    assert [(*row[:3], tuple(row[3]), *row[4:]) for row in path.itertuples(index=False)] == expected
    for n_remove, rows in path[~path["degenerate"]].groupby("n_remove"):
        removed = [tuple(r) for r in rows["removed"]]
        assert len(set(removed)) == len(removed) and all(len(r) == n_remove for r in removed)
        assert rows["low"].tolist() == [0.0, *rows["high"][:-1]] and rows["high"].iloc[-1] == 1
    return path


def score_tables(values):
    return st.integers(2, 7).flatmap(lambda n: st.tuples(*[st.lists(values, min_size=n, max_size=n)] * 2))


many = settings(derandomize=True, deadline=None, max_examples=800, suppress_health_check=list(HealthCheck))


@many
@given(score_tables(st.integers(0, 8).map(lambda k: k / 8)))
def test_every_choice_is_listed_where_lines_meet_in_many_ways(table):
    """On a grid, ties, parallels, coincident lines and crossings of many lines at once are the rule."""
    assert_path_is_right(*table)


@many
@given(score_tables(st.sampled_from([0.0, 0.5, 1.0])))
def test_every_choice_is_listed_where_most_lines_tie(table):
    assert_path_is_right(*table)


@many
@given(score_tables(st.floats(0, 1)))
def test_every_choice_is_listed_for_any_floats(table):
    """Subnormal numbers and neighbouring floats too."""
    assert_path_is_right(*table)


def test_the_generated_tables_hold_what_they_are_for():
    """Degenerate rows inside (0, 1) and at both ends, ties on whole intervals, and many sets: else little is
    tested."""
    rng, inside, at_ends, tied, most = np.random.default_rng(0), 0, set(), 0, 0
    for _ in range(200):
        path = trace_path(*rng.integers(0, 9, (2, 7)) / 8)
        points = path.loc[path["degenerate"], "low"]
        inside += points.between(0, 1, inclusive="neither").any()
        at_ends |= set(points) & {0.0, 1.0}
        tied += (path.loc[~path["degenerate"], "n_tied"] > 1).any()
        most = max(most, path["n_remove"].value_counts().max())
    assert inside >= 10 and at_ends == {0.0, 1.0} and tied >= 10 and most >= 5


@pytest.mark.parametrize("n_layers", [5, 12, 30])
def test_a_float_alpha_inside_an_interval_chooses_its_set(n_layers):
    """What the path promises is what the published rule does with that alpha."""
    rng, n_seen = np.random.default_rng(n_layers), 0
    tables = [rng.random((2, n_layers)) for _ in range(5)] + [
        rng.integers(0, 9, (2, n_layers)) / 8 for _ in range(5)
    ]
    for i_sim, i_diff in tables:
        path = trace_path(i_sim, i_diff)
        for row in path[path["high"] - path["low"] > 1e-6].itertuples():
            for part in (0.01, 0.5, 0.99):
                a = row.low + part * (row.high - row.low)
                assert sorted(choose_removed(fuse(i_sim, i_diff, a), row.n_remove)) == row.removed
                n_seen += 1
        for row in path[path["degenerate"] & path["low"].isin([0, 1])].itertuples():
            assert sorted(choose_removed(fuse(i_sim, i_diff, row.low), row.n_remove)) == row.removed
    assert n_seen > 100


def test_the_search_probes_only_sets_of_the_path():
    rng = np.random.default_rng(3)
    i_sim, i_diff = rng.random((2, 20))
    path = trace_path(i_sim, i_diff)
    for n_remove in range(1, 20):
        listed = path.loc[path["n_remove"] == n_remove, "removed"].tolist()
        assert all(
            removed in listed for removed in search_ternary(i_sim, i_diff, n_remove, Table(0))["removed"]
        )


def test_where_all_is_saturated_cosine_decides_and_at_alpha_1_the_tie_break():
    """Method note 7b: with every I_diff exactly 1, there is no choice below alpha 1, and nothing but ties at
    it."""
    i_sim = np.array([0.5, 0.25, 0.4, 0.05, 0.3, 0.1])
    path = assert_path_is_right(i_sim, np.ones(6))
    for n_remove in range(1, 6):
        interval, end = path[path["n_remove"] == n_remove].itertuples(index=False)
        assert interval == (n_remove, 0.0, 1.0, sorted(choose_removed(i_sim, n_remove)), False, 1)
        assert end == (n_remove, 1.0, 1.0, list(range(n_remove)), True, comb(6, n_remove))


def test_layers_that_are_the_same_line_tie_on_the_whole_interval():
    path = assert_path_is_right([0.25, 0.5, 0.25, 0.25], [0.5, 0.75, 0.5, 0.5])
    assert path[["removed", "n_tied"]].values.tolist() == [[[0], 3], [[0, 2], 3], [[0, 2, 3], 1]]
    assert (path["low"] == 0).all() and (path["high"] == 1).all() and not path["degenerate"].any()


def test_three_lines_in_one_point_give_a_set_of_their_own():
    """At 1/2 all tie, so the first goes: a flat line, which is the lowest nowhere else."""
    path = assert_path_is_right([0.5, 0.0, 1.0], [0.5, 1.0, 0.0])
    assert path[path["n_remove"] == 1].values.tolist() == [
        [1, 0.0, 0.5, [1], False, 1],
        [1, 0.5, 0.5, [0], True, 3],
        [1, 0.5, 1.0, [2], False, 1],
    ]


def test_one_rounding_step_decides_which_sets_there_are():
    """Where three lines nearly meet, the flat one is the lowest on an interval of width 1e-16, or nowhere."""
    below, above = np.nextafter(0.5, [0, 1])
    path = assert_path_is_right([0.0, 1.0, below], [1.0, 0.0, below])
    assert path.loc[path["n_remove"] == 1, "removed"].tolist() == [[0], [2], [1]]
    assert not path["degenerate"].any()
    path = assert_path_is_right([0.0, 1.0, above], [1.0, 0.0, above])
    assert path.loc[path["n_remove"] == 1, "removed"].tolist() == [[0], [1]]
    assert path.loc[path["n_remove"] == 2, "removed"].tolist() == [[0, 2], [0, 1], [1, 2]]


def test_no_set_comes_from_rounding():
    """Two flat lines one rounding step apart: in floats they tie at some alphas, and the wrong one goes."""
    i_sim = i_diff = np.array([np.nextafter(0.1, 1), 0.1])
    by_floats = {choose_removed(fuse(i_sim, i_diff, a), 1) for a in np.linspace(0, 1, 1001)}
    assert by_floats == {frozenset({0}), frozenset({1})}
    path = assert_path_is_right(i_sim, i_diff)
    assert path.values.tolist() == [[1, 0.0, 1.0, [1], False, 1]]
