"""Algorithm 1 against a second implementation, on random score tables and on tables made to mislead it; the
list of all choices against brute force in fractions."""

import functools
from fractions import Fraction
from itertools import combinations, pairwise
from math import comb

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from simdiff_utils.criterion.alpha import trace_path
from simdiff_utils.criterion.equations import choose_removed, fuse


def is_lowest(heights, chosen):
    """Whether nothing lies lower than what is chosen."""
    others = [height for i, height in enumerate(heights) if i not in chosen]
    return max(heights[i] for i in chosen) <= min(others)


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

    @functools.cache
    def count_tied(a, n):
        return sum(is_lowest(ranks[a], chosen) for chosen in combinations(range(len(lines)), n))

    return [
        row
        for n in range(1, len(lines))
        for row in rows_of(n, points, between, lambda a, n=n: choose(a, n), lambda a, n=n: count_tied(a, n))
    ]


def rows_of(n, points, between, choose, count_tied):
    """The rows for n layers: intervals of one set each, and points that choose another than both sides."""
    pieces = []
    for (low, high), middle in zip(pairwise(points), between, strict=True):
        if pieces and pieces[-1][3] == choose(middle):
            assert pieces[-1][5] == count_tied(middle)  # or "on the whole interval" would say nothing
            pieces[-1] = (n, pieces[-1][1], high, *pieces[-1][3:])
        else:
            pieces.append((n, low, high, choose(middle), False, count_tied(middle)))
    for place, a in enumerate(points):
        beside = between[max(place - 1, 0) : place + 1]
        if choose(a) not in map(choose, beside):
            pieces.append((n, a, a, choose(a), True, count_tied(a)))
    return sorted(pieces)


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


many = settings(derandomize=True, deadline=None, max_examples=300, suppress_health_check=list(HealthCheck))


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


def structured_table(seed):
    """More layers than the tables above, on lines made to meet: (i_sim, i_diff)."""
    rng = np.random.default_rng(seed)
    n_layers = int(rng.integers(8, 12))
    start, slope, kind = rng.integers(0, 9, n_layers) / 8, rng.integers(-4, 5, n_layers) / 4, seed % 6
    if kind == 0:  # all lines, or all but a few, through one point
        height = rng.integers(1, 8) / 8 + rng.choice([0, 0, 0, 1 / 8], n_layers)
        start = height - slope * rng.integers(0, 9) / 8
    elif kind == 1:  # I_diff saturated: all meet at 1
        slope = 1 - start
    elif kind == 2:  # I_sim all the same: all meet at 0
        start[:] = 0.5
    elif kind == 3:  # few different lines, each several times
        which = rng.integers(0, 4, n_layers)
        start, slope = start[which], slope[which]
    elif kind == 4:  # every score within a few rounding steps of 1/2
        start, slope = 0.5 + (start - 0.5) * 2.0**-51, slope * 2.0**-51
    return start, start + slope


@pytest.mark.parametrize("kind", range(6))
def test_every_choice_is_listed_for_more_layers_made_to_meet(kind):
    for seed in range(kind, 90, 6):
        assert_path_is_right(*structured_table(seed))


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
