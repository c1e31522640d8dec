"""Eq. 2 to 9 and our own forms: examples worked by hand, generated inputs, and where floating point is at its
end."""

import warnings
from itertools import pairwise

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from simdiff_utils import SimDiffError, registry
from simdiff_utils.capture.equations import measure_tokens
from simdiff_utils.criterion.equations import (
    choose_removed,
    count_saturated,
    fuse,
    normalise,
    normalise_difference,
    normalise_similarity,
)

LINES = registry.of_kind("line")
settings.register_profile("simdiff", derandomize=True, deadline=None, max_examples=60)
settings.load_profile("simdiff")

states = hnp.arrays(
    np.float32,
    st.tuples(st.integers(1, 4), st.just(6)),
    elements=st.floats(0.125, 64, width=32) | st.floats(-64, -0.125, width=32),
)
scores = hnp.arrays(np.float64, st.integers(2, 12), elements=st.floats(0, 2))
alphas = st.floats(0, 1)


def measure(h_in: list, h_out: list) -> list[float]:
    return measure_tokens(torch.tensor([h_in]), torch.tensor([h_out]))[:, 0].tolist()


@pytest.mark.parametrize(
    "h_in, h_out, cosine_distance, mssd, masd, relative",
    [
        ([3.0, 4.0], [3.0, 4.0], 0, 0, 0, 0),  # identity
        ([3.0, 4.0], [6.0, 8.0], 0, 25, 3.5, 1),  # longer, not turned
        ([3.0, 4.0], [-4.0, 3.0], 1, 50, 4, 2**0.5),  # a right angle
        ([3.0, 4.0], [-3.0, -4.0], 2, 100, 7, 2),  # turned back
        ([1.0, 0.0], [3.0, 4.0], 0.4, 20, 3, 20**0.5),  # cosine 3/5; MSSD is a sum over d, MASD a mean
    ],
)
def test_measurements_worked_by_hand(h_in, h_out, cosine_distance, mssd, masd, relative):
    assert measure(h_in, h_out) == pytest.approx([cosine_distance, mssd, masd, relative], abs=1e-6)


@given(states, st.sampled_from([1e-4, 1e-2, 1, 100]), st.integers(0, 2**32 - 1))
def test_measurements_equal_the_formulas_in_float64(h_in, size, seed):
    h_out = (h_in + size * np.random.default_rng(seed).standard_normal(h_in.shape)).astype(np.float32)
    _, mssd, masd, relative = measure_tokens(torch.from_numpy(h_in), torch.from_numpy(h_out)).double().numpy()
    before, update = h_in.astype(np.float64), h_out.astype(np.float64) - h_in
    np.testing.assert_allclose(mssd, (update**2).sum(-1), rtol=1e-5)
    np.testing.assert_allclose(masd, np.abs(update).mean(-1), rtol=1e-5)
    np.testing.assert_allclose(
        relative, np.linalg.norm(update, axis=-1) / np.linalg.norm(before, axis=-1), rtol=1e-5
    )


@given(states, st.floats(0.25, 4), st.integers(0, 2**32 - 1))
def test_measurements_lie_in_range_and_scale_as_the_formulas_say(h_in, factor, seed):
    h_in = torch.from_numpy(h_in)
    h_out = h_in + torch.randn(h_in.shape, generator=torch.Generator().manual_seed(seed))
    cosine_distance, mssd, masd, relative = measure_tokens(h_in, h_out)
    assert ((0 <= cosine_distance) & (cosine_distance <= 2 + 1e-6)).all()
    assert (
        h_in.shape[-1] * masd.square() <= mssd * (1 + 1e-5)
    ).all()  # mean of |x| is at most the root mean square
    scaled = measure_tokens(h_in * factor, h_out * factor)
    torch.testing.assert_close(scaled[0], cosine_distance, rtol=1e-3, atol=1e-6)
    torch.testing.assert_close(scaled[1], mssd * factor**2, rtol=1e-3, atol=1e-6)
    torch.testing.assert_close(scaled[2], masd * factor, rtol=1e-3, atol=1e-6)
    torch.testing.assert_close(scaled[3], relative, rtol=1e-3, atol=1e-6)
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
    assert per_token.shape == (4, 2, 7)
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


@pytest.mark.parametrize(
    ("dtype", "below", "above"),
    [
        (torch.float64, 36.7, 36.8),
        (torch.float32, 16.6, 16.7),
        (torch.bfloat16, 6.1, 6.3),
        (torch.float16, 8.2, 8.4),
    ],
)
def test_saturation_begins_earlier_in_a_shorter_dtype(dtype, below, above):
    assert count_saturated(np.array([below, above]), dtype) == 1


@given(scores, alphas)
def test_importance_is_the_weighted_sum_of_both_parts(i_sim, alpha):
    i_diff = i_sim[::-1] * 5
    expected = [alpha * d + (1 - alpha) * s for s, d in zip(i_sim.tolist(), i_diff.tolist(), strict=True)]
    np.testing.assert_array_equal(fuse(i_sim, i_diff, alpha), expected)


@given(scores, alphas)
def test_importance_in_published_form_lies_in_range(l_sim, alpha):
    l_diff = l_sim[::-1] * 5
    importance = fuse(normalise_similarity(l_sim), normalise_difference(l_diff), alpha)
    expected = [alpha / (1 + np.exp(-d)) + (1 - alpha) * s / 2 for s, d in zip(l_sim, l_diff, strict=True)]
    np.testing.assert_allclose(importance, expected, rtol=1e-12)
    assert ((0 <= importance) & (importance <= 1)).all()


def test_the_ends_of_alpha_are_the_parts_alone():
    i_sim, i_diff = np.array([0.2, 0.4], dtype=np.float32), [3, 1]
    assert fuse(i_sim, i_diff, 0).tolist() == i_sim.astype(np.float64).tolist()
    assert fuse(i_sim, i_diff, 1).tolist() == [3, 1]
    assert fuse(i_sim, i_diff, 0.5).dtype == np.float64


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
    assert all(
        (importance[r], r) < (importance[k], k) for r in removed for k in kept
    )  # ties: the earlier layer
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
    l_sim = np.array(distances) / 1e6
    parts = normalise({"cosine_distance": l_sim, "mssd": np.linspace(1e3, 1e6, len(distances))}, "mssd")
    for n_remove in range(1, len(distances)):
        assert choose_removed(fuse(*parts, alpha), n_remove) == choose_removed(l_sim, n_remove)
        assert choose_removed(fuse(*parts, 1), n_remove) == set(range(n_remove))  # ... and at 1 all tie


def by_hand() -> dict[str, np.ndarray]:
    return {
        "cosine_distance": np.array([0.2, 1.0, 0.4]),
        "mssd": np.array([1.0, 100.0, 10.0]),
        "masd": np.log([1.0, 3.0, 9.0]),
        "relative_update": np.array([3.0, 2.0, 6.0]),
    }


@pytest.mark.parametrize(
    "form, i_sim, i_diff",
    [
        ("mssd", [0.1, 0.5, 0.2], [1 / (1 + np.exp(-1)), 1, 1 / (1 + np.exp(-10))]),
        ("masd", [0.1, 0.5, 0.2], [0.5, 0.75, 0.9]),
        ("log-mssd", [0, 1, 0.25], [0, 1, 0.5]),
        ("relative", [0, 1, 0.25], [0.25, 0, 1]),
    ],
)
def test_forms_worked_by_hand(form, i_sim, i_diff):
    parts = normalise(by_hand(), form)
    np.testing.assert_allclose(parts, [i_sim, i_diff], rtol=1e-12, atol=1e-15)
    assert all(part.dtype == np.float64 for part in parts)
    assert {"mssd", "masd", "log-mssd", "relative"} == set(LINES)  # one of each above


@pytest.mark.parametrize("form", LINES)
def test_a_form_reads_a_data_frame_as_it_reads_a_dictionary_and_changes_neither(form):
    table = by_hand()
    frame = pd.DataFrame(table)
    np.testing.assert_array_equal(normalise(frame, form), normalise(table, form))
    assert all(
        (table[name] == by_hand()[name]).all() and (frame[name] == by_hand()[name]).all() for name in table
    )


@pytest.mark.parametrize("form", ["", "MSSD", "cosine", "log_mssd"])
def test_an_unknown_form_is_refused_with_all_known_ones(form):
    known = (
        "cosine fuses no two measurements by alpha; it must be one of"
        if form == "cosine"
        else "one of cosine,"
    )
    with pytest.raises(SimDiffError, match=f"{known} mssd, masd, log-mssd, relative"):
        normalise(by_hand(), form)


@pytest.mark.parametrize("form", ["log-mssd", "relative"])
@pytest.mark.parametrize("value", [0.0, 0.1, 1e300])
def test_columns_in_which_layers_do_not_differ_say_nothing(form, value):
    table = {name: np.full(4, value) for name in by_hand()}
    assert np.array(normalise(table, form)).tolist() == [[0.0] * 4] * 2


def test_a_layer_that_changes_nothing_has_a_finite_logarithm():
    """An identity layer has MSSD 0: it is the least important, and the others keep their order."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        _, i_diff = normalise(by_hand() | {"mssd": np.array([5.0, 0.0, 50.0])}, "log-mssd")
    assert i_diff[1] == 0 and i_diff[2] == 1 and 0.9 < i_diff[0] < 1


@given(hnp.arrays(np.float64, st.tuples(st.just(4), st.integers(2, 12)), elements=st.floats(0, 1e6)))
def test_every_form_lies_between_0_and_1(columns):
    table = dict(zip(by_hand(), columns, strict=True)) | {"cosine_distance": columns[0] / 5e5}
    for form in LINES:
        parts = np.array(normalise(table, form))
        assert ((0 <= parts) & (parts <= 1)).all()


@pytest.mark.parametrize("factor", [0.01, 3.0, 1000.0])
def test_our_forms_do_not_see_the_scale_of_a_model(factor):
    """What they are for: states ten times as large saturate the published difference, and change nothing
    here."""
    generator = torch.Generator().manual_seed(0)
    states = torch.randn(7, 50, 16, generator=generator) * torch.arange(1, 8)[:, None, None]

    def measure_layers(states):
        values = torch.stack([measure_tokens(*pair) for pair in pairwise(states)], dim=1)
        return dict(zip(by_hand(), values.double().mean(2).numpy(), strict=True))

    table, scaled = measure_layers(states), measure_layers(states * factor)
    np.testing.assert_allclose(scaled["mssd"], table["mssd"] * factor**2, rtol=1e-4)
    for form in ("log-mssd", "relative"):
        np.testing.assert_allclose(normalise(scaled, form), normalise(table, form), atol=1e-5)
        assert len(set(normalise(table, form)[1])) == 6  # all layers differ
    assert np.abs(normalise(scaled, "masd")[1] - normalise(table, "masd")[1]).max() > 0.05
    only_mssd = table | {"mssd": table["mssd"] * factor}
    np.testing.assert_allclose(normalise(only_mssd, "log-mssd"), normalise(table, "log-mssd"), atol=1e-12)
