"""Agreement of rankings: counted by hand, and its bootstrap from made-up samples."""

import numpy as np
import pytest

from simdiff_utils.capture.statistics import LayerStatistics
from simdiff_utils.criterion.stability import agree, measure_stability, rank_scores

N_LAYERS, N_SAMPLES, SEQ_LEN = 10, 64, 8


def make_statistics(noise):
    """Layers whose measurements grow from 0.1 to 1; every sample is off by noise, of its own for each
    statistic."""
    rng = np.random.default_rng(0)
    means = np.linspace(0.1, 1, N_LAYERS)
    tokens = means[:, None, None] * np.exp(rng.normal(0, noise, (4, N_LAYERS, N_SAMPLES, 1)))
    tokens = np.broadcast_to(tokens, (4, N_LAYERS, N_SAMPLES, SEQ_LEN))
    return LayerStatistics(tokens.mean(2), tokens.mean(3), np.zeros(N_LAYERS), np.zeros((N_LAYERS + 1,) * 2))


def tau_by_hand(one, other):
    """Pairs in the same order less pairs in the opposite order, over all (no ties)."""
    signs = [
        np.sign(one[i] - one[j]) * np.sign(other[i] - other[j]) for i in range(len(one)) for j in range(i)
    ]
    return np.mean(signs)


@pytest.mark.parametrize("seed", range(3))
def test_agreement_is_that_counted_by_hand(seed):
    one, other = np.random.default_rng(seed).normal(size=(2, 9))
    tau, overlap = agree(one, other, 4)
    assert tau == pytest.approx(tau_by_hand(one, other))
    assert overlap == len(set(np.argsort(one)[:4]) & set(np.argsort(other)[:4])) / 4
    assert agree(one, one, 4) == (pytest.approx(1), 1) and agree(one, -one, 4)[0] == pytest.approx(-1)


def test_cosine_ranks_by_distance_alone_and_forms_by_both():
    table = {"cosine_distance": np.array([0.2, 0.4]), "masd": np.array([3.0, 0.0])}
    assert rank_scores(table, "cosine", 0.7).tolist() == [0.2, 0.4]
    np.testing.assert_allclose(rank_scores(table, "masd", 0.7), [0.7 / (1 + np.exp(-3)) + 0.03, 0.35 + 0.06])


def test_larger_draws_agree_better_and_equal_samples_agree_wholly():
    alphas = {"cosine": float("nan"), "log-mssd": 0.5}
    noisy = measure_stability(make_statistics(0.5), alphas, 3, [4, 64])
    assert list(noisy.columns) == ["criterion", "n_samples", "quantity", "median", "low", "high"]
    assert len(noisy) == 2 * 2 * 2 and set(noisy["criterion"]) == set(alphas)
    assert (noisy["low"] <= noisy["median"]).all() and (noisy["median"] <= noisy["high"]).all()
    wide = noisy.pivot(index=["criterion", "quantity"], columns="n_samples", values="median")
    tau = wide.xs("kendall_tau", level="quantity")
    assert (tau[64] > tau[4]).all() and (tau[4] < 1).all() and (wide[64] >= wide[4]).all()
    equal = measure_stability(make_statistics(0), alphas, 3, [4])
    np.testing.assert_allclose(equal[["median", "low", "high"]], 1)


def test_the_same_seed_draws_the_same():
    one, other = (
        measure_stability(make_statistics(0.5), {"masd": 0.1}, 3, [8], n_draws=20, seed=1) for _ in range(2)
    )
    assert one.equals(other)
    assert not one.equals(measure_stability(make_statistics(0.5), {"masd": 0.1}, 3, [8], n_draws=20, seed=2))
