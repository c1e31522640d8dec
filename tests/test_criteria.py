"""Eq. 2 to 9 on examples worked by hand, on generated inputs, and where floating point is at its end."""

import warnings

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from simdiff_utils.criteria import (
    choose_removed,
    count_saturated,
    fuse,
    measure_tokens,
    normalise_difference,
    normalise_similarity,
)
from simdiff_utils.settings import SimDiffError

settings.register_profile("simdiff", derandomize=True, deadline=None, max_examples=60)
settings.load_profile("simdiff")

states = hnp.arrays(np.float32, st.tuples(st.integers(1, 4), st.just(6)),
                    elements=st.floats(0.125, 64, width=32) | st.floats(-64, -0.125, width=32))
scores = hnp.arrays(np.float64, st.integers(2, 12), elements=st.floats(0, 2))
alphas = st.floats(0, 1)


def measure(h_in: list, h_out: list) -> list[float]:
    return measure_tokens(torch.tensor([h_in]), torch.tensor([h_out]))[:, 0].tolist()


@pytest.mark.parametrize("h_in, h_out, cosine_distance, mssd, masd", [
    ([3.0, 4.0], [3.0, 4.0], 0, 0, 0),          # identity
    ([3.0, 4.0], [6.0, 8.0], 0, 25, 3.5),       # longer, not turned
    ([3.0, 4.0], [-4.0, 3.0], 1, 50, 4),        # a right angle
    ([3.0, 4.0], [-3.0, -4.0], 2, 100, 7),      # turned back
    ([1.0, 0.0], [3.0, 4.0], 0.4, 20, 3),       # cosine 3/5; MSSD is a sum over d, MASD a mean
])
def test_measurements_worked_by_hand(h_in, h_out, cosine_distance, mssd, masd):
    assert measure(h_in, h_out) == pytest.approx([cosine_distance, mssd, masd], abs=1e-6)


@given(states, st.floats(0.25, 4), st.integers(0, 2**32 - 1))
def test_measurements_lie_in_range_and_scale_as_the_formulas_say(h_in, factor, seed):
    h_in = torch.from_numpy(h_in)
    h_out = h_in + torch.randn(h_in.shape, generator=torch.Generator().manual_seed(seed))
    cosine_distance, mssd, masd = measure_tokens(h_in, h_out)
    assert ((0 <= cosine_distance) & (cosine_distance <= 2 + 1e-6)).all()
    assert (h_in.shape[-1] * masd.square() <= mssd * (1 + 1e-5)).all()  # mean of |x| is at most the root mean square
    scaled = measure_tokens(h_in * factor, h_out * factor)
    torch.testing.assert_close(scaled[0], cosine_distance, rtol=1e-3, atol=1e-6)
    torch.testing.assert_close(scaled[1], mssd * factor**2, rtol=1e-3, atol=1e-6)
    torch.testing.assert_close(scaled[2], masd * factor, rtol=1e-3, atol=1e-6)
    turned_only = measure_tokens(h_in, h_out * factor)[0]  # the cosine does not see lengths
    torch.testing.assert_close(turned_only, cosine_distance, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("angle", [1e-2, 1e-3, 1e-4])
def test_nearly_parallel_states_keep_their_digits(angle):
    """1 - cos in float32 would lose everything here: cos differs from 1 by less than one rounding step."""
    generator = torch.Generator().manual_seed(0)
    h_in = torch.randn(200, 512, generator=generator, dtype=torch.float64) * 30
    aside = torch.randn(200, 512, generator=generator, dtype=torch.float64)
    aside *= h_in.norm(dim=-1, keepdim=True) / aside.norm(dim=-1, keepdim=True)
    h_in, h_out = h_in.float(), (h_in + angle * aside).float()
    exact = 1 - torch.nn.functional.cosine_similarity(h_in.double(), h_out.double(), dim=-1)
    measured = measure_tokens(h_in, h_out)[0]
    assert exact.mean().item() == pytest.approx(angle**2 / 2, rel=0.1)
    torch.testing.assert_close(measured.double().mean(), exact.mean(), rtol=1e-5, atol=0)
    torch.testing.assert_close(measured.double(), exact, rtol=2e-3, atol=0)
    if angle < 1e-3:
        cancelled = 1 - torch.nn.functional.cosine_similarity(h_in, h_out, dim=-1)
        assert (cancelled.double().mean() / exact.mean() - 1).abs() > 1e-2


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_identity_measures_exactly_zero_and_statistics_are_float32(dtype):
    h = torch.randn(2, 7, 48, generator=torch.Generator().manual_seed(0)).to(dtype)
    per_token = measure_tokens(h, h.clone())
    assert per_token.shape == (3, 2, 7)
    assert per_token.dtype == torch.float32
    assert not per_token.any()


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_what_is_not_finite_stays_visible(bad):
    h_in, h_out = torch.ones(2, 4), torch.ones(2, 4)
    h_out[1, 2] = bad
    assert torch.isfinite(measure_tokens(h_in, h_out)).all(0).tolist() == [True, False]


def test_states_of_different_shape_are_refused():
    with pytest.raises(SimDiffError, match=r"\(2, 4\) into \(2, 3\)"):
        measure_tokens(torch.zeros(2, 4), torch.zeros(2, 3))


def test_difference_is_normalised_by_a_sigmoid():
    np.testing.assert_allclose(normalise_difference([0, np.log(3), np.log(9)]), [0.5, 0.75, 0.9], rtol=1e-15)


def test_the_sigmoid_saturates_in_silence_and_is_counted():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert normalise_difference([36.0, 37.0, 1e6, np.inf]).tolist() == [pytest.approx(1), 1, 1, 1]
    assert normalise_difference(36.0) < 1
    assert count_saturated(np.array([0.0, 36.0, 37.0, 1e6])) == 2


@given(scores, alphas)
def test_importance_is_the_weighted_sum_of_both_parts(l_sim, alpha):
    l_diff = l_sim[::-1] * 5
    importance = fuse(l_sim, l_diff, alpha)
    expected = [alpha / (1 + np.exp(-d)) + (1 - alpha) * s / 2 for s, d in zip(l_sim, l_diff, strict=True)]
    np.testing.assert_allclose(importance, expected, rtol=1e-12)
    assert ((0 <= importance) & (importance <= 1)).all()


def test_the_ends_of_alpha_are_the_parts_alone():
    l_sim, l_diff = np.array([0.2, 0.4]), np.array([3.0, 1.0])
    np.testing.assert_array_equal(fuse(l_sim, l_diff, 0), [0.1, 0.2])
    np.testing.assert_array_equal(fuse(l_sim, l_diff, 0), normalise_similarity(l_sim))
    np.testing.assert_array_equal(fuse(l_sim, l_diff, 1), normalise_difference(l_diff))


@pytest.mark.parametrize("alpha", [-0.01, 1.01, float("nan")])
def test_alpha_outside_its_range_is_refused(alpha):
    with pytest.raises(SimDiffError, match=r"alpha must lie in \[0, 1\]"):
        fuse(np.zeros(2), np.zeros(2), alpha)


@given(scores, st.data())
def test_the_least_important_layers_are_chosen(importance, data):
    n_remove = data.draw(st.integers(1, len(importance) - 1))
    removed = choose_removed(importance, n_remove)
    kept = set(range(len(importance))) - removed
    assert len(removed) == n_remove and len(kept) == len(importance) - n_remove
    assert all((importance[r], r) < (importance[k], k) for r in removed for k in kept)  # ties: the earlier layer
    assert all(type(layer_idx) is int for layer_idx in removed)


@given(scores, st.data())
def test_removing_more_only_adds_layers(importance, data):
    n_remove = data.draw(st.integers(1, len(importance) - 1))
    assert choose_removed(importance, n_remove) < choose_removed(importance, n_remove + 1)


def test_first_and_last_layer_are_candidates_and_ties_go_to_the_earlier():
    assert choose_removed(np.array([0.1, 0.5, 0.4, 0.2]), 2) == {0, 3}
    assert choose_removed(np.array([0.5] * 30), 4) == {0, 1, 2, 3}  # long enough that an unstable sort shows
    assert choose_removed(np.array([0.3, 0.2, 0.3, 0.2, 0.3]), 3) == {0, 1, 3}


@given(st.lists(st.integers(1, 10**6), min_size=3, max_size=12, unique=True), st.floats(0, 0.99))
def test_saturated_mssd_ranks_by_cosine_alone(distances, alpha):
    """Method note 7b: with every I_diff exactly 1, SimDiff is ShortGPT for every alpha below 1 ..."""
    l_sim, l_diff = np.array(distances) / 1e6, np.linspace(1e3, 1e6, len(distances))
    for n_remove in range(1, len(distances)):
        assert choose_removed(fuse(l_sim, l_diff, alpha), n_remove) == choose_removed(l_sim, n_remove)
        assert choose_removed(fuse(l_sim, l_diff, 1), n_remove) == set(range(n_remove))  # ... and at 1 all tie
