"""Speed in the words of serving, and in llama-bench's columns: held to sums by hand."""

import numpy as np
import pandas as pd
import pytest

from simdiff_utils.speed.tables import (
    as_llama_bench,
    describe_serving,
    describe_speed,
    ideal_steps,
    over_depth,
)
from simdiff_utils.speed.timing import summarise_speed

RATES = {"bandwidth": 1000.0, "matrix_rate": 500.0, "device": "CPU", "n_threads": 2}
BOUNDS = pd.DataFrame(
    [
        {"phase": phase, "batch_size": 2, "n_remove": n, "n_passes": passes, "operations": operations}
        | {"weight_bytes": 100, "kv_bytes": 20, "ideal_seconds": passes / (10 + 10 * n)}
        for phase, passes, operations in (("prefill", 1, 50), ("decode", 4, 7))
        for n in (0, 3)
    ]
)


def samples(phases=("prefill", "decode")):
    """The dense model: 0.2 s, then 4 steps in 2 and 4 s (a run each); the pruned one in half the time."""
    rows = [
        {"model": name, "n_remove": n, "pair": pair, "phase": phase, "way": "eager", "batch_size": 2}
        | {"seconds": seconds * share, "tokens": tokens, "tokens_per_s": tokens / (seconds * share)}
        | {"median_step": step * share, "p99_step": 3 * step * share}
        for name, n, share in (("dense", 0, 1.0), ("pruned", 3, 0.5))
        for pair in (0, 1)
        for phase, seconds, tokens, step in (
            ("prefill", 0.2, 2 * 16, np.nan),
            ("decode", 2.0 + 2 * pair, 2 * 4, 0.4 + 0.2 * pair),
        )
        if phase in phases
    ]
    return pd.DataFrame(rows)


def test_serving_words_are_sums_by_hand():
    table = describe_serving(summarise_speed(samples()), BOUNDS, RATES).set_index("model")
    dense, pruned = table.loc["dense"], table.loc["pruned"]
    assert dense["ttft_ms"] == pytest.approx(200) and pruned["ttft_ms"] == pytest.approx(100)
    assert dense["tpot_ms"] == pytest.approx(500) and dense["tpot_p99_ms"] == pytest.approx(1500)
    assert dense["end_to_end_s"] == pytest.approx(0.2 + 3.0)
    assert dense["tokens_per_s"] == pytest.approx((8 / 2 + 8 / 4) / 2)
    assert dense["mbu"] == pytest.approx(120 / (3.0 / 4) / 1000) and pruned["mbu"] == 2 * dense["mbu"]
    assert dense["mfu"] == pytest.approx(50 / 0.2 / 500)


def test_measured_beside_possible():
    table = describe_speed(samples(), BOUNDS).set_index(["model", "phase"])
    assert len(table) == 4 and (table.loc["dense", "ideal_speedup"] == 1).all()
    assert table.loc["pruned", "ideal_speedup"].to_numpy() == pytest.approx(40 / 10)
    assert table.loc[("dense", "prefill"), "share_of_bound"] == pytest.approx(0.1 / 0.2)
    assert table.loc[("pruned", "decode"), "share_of_bound"] == pytest.approx(0.1 / 1.5)
    assert ideal_steps(BOUNDS, 3) == {"dense": pytest.approx(0.1), "pruned": pytest.approx(0.025)}
    assert ideal_steps(BOUNDS[BOUNDS["phase"] == "prefill"], 3) == {}


def test_a_runs_points_stand_beside_the_stored_curves():
    mine = describe_speed(samples(), BOUNDS)
    kept = {"prefill": "prefill", "decode": "interactive"}
    stored = pd.concat(
        mine.assign(label=label, n_layers=30, protocol=protocol)
        for label in ("smollm2", "another")
        for protocol in ("prefill", "interactive")
    )
    table = over_depth(stored, mine, n_layers=8)
    assert set(table["model"]) == {"pruned"} and len(table) == 2 * 3
    beside = table.dropna(subset=["protocol"])
    assert (beside["protocol"] == beside["phase"].map(kept)).all()
    assert table.groupby("label")["n_layers"].unique().map(list).to_dict() == {
        "smollm2": [30],
        "another": [30],
        "this run, batch 2": [8],
    }


def test_where_nothing_is_decoded_there_is_no_time_a_token():
    found = describe_serving(summarise_speed(samples(["prefill"])), BOUNDS, RATES)
    assert found[["tpot_ms", "tpot_p99_ms", "tokens_per_s", "mbu"]].isna().all(axis=None)
    assert (found["end_to_end_s"] == found["ttft_ms"] / 1000).all()


def test_llama_benchs_columns():
    rows = as_llama_bench(samples(), {"model_type": "llama", "n_threads": 2}, prompt_len=16)
    assert list(rows["n_prompt"]) == [16, 0, 16, 0] and list(rows["n_gen"]) == [0, 4, 0, 4]
    assert list(rows["n_depth"]) == [0, 16, 0, 16] and set(rows["n_batch"]) == {2}
    decode = rows[(rows["n_gen"] == 4)].iloc[0]
    assert decode["model_filename"] == "dense, 0 layers removed, eager" and decode["model_type"] == "llama"
    assert decode["avg_ns"] == 3e9 and decode["stddev_ns"] == pytest.approx(
        np.std([2e9, 4e9], ddof=1), rel=1e-6
    )
    assert decode["avg_ts"] == 3 and decode["stddev_ts"] == pytest.approx(2**0.5)
