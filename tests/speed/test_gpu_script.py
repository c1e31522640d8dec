"""The script for the day when a GPU is at hand, tried where we are, on tiny shapes."""

import pandas as pd
import pytest

from benchmarks import gpu
from simdiff_utils.speed.generate import Protocol


@pytest.fixture
def tiny_shapes(make_tiny):
    return lambda _shape, _dtype: make_tiny("llama")  # float32: not every CPU multiplies bfloat16


def test_every_part_gives_its_numbers(tiny_shapes, tiny_model, tmp_path):
    parts = ["speed", "capture", "agreement", "placement"]
    gpu.measure(
        tmp_path / "gpu.csv",
        parts,
        tiny_shapes,
        lambda: tiny_model,
        (1, 2),
        Protocol(2, 4, 16, n_timed_steps=2),
    )
    table = pd.read_csv(tmp_path / "gpu.csv")
    assert not table["name"].str.contains("failed|stopped").any(), table["name"].tolist()
    assert list(dict.fromkeys(table["part"])) == parts and table["value"].notna().all()
    assert table["machine"].notna().all()
    decode = table[table["name"].str.startswith("decode")]
    assert len(decode) == 4 and decode[["speedup", "speedup_low", "speedup_high"]].notna().all(axis=None)
    assert (table.loc[table["part"].isin(["agreement", "placement"]), "value"] == 0).all()  # one device


def test_a_part_that_fails_says_so_and_one_that_is_slow_stops(tiny_shapes, tmp_path, monkeypatch):
    def broken(_shape, _dtype):
        raise RuntimeError("out of memory\nin 300 lines")

    found = gpu.measure(tmp_path / "a.csv", ["agreement", "capture"], broken)
    assert found["name"].tolist() == ["failed: out of memory in 300 lines"] * 2
    monkeypatch.setitem(gpu.LIMITS, "agreement", 0)
    found = gpu.measure(tmp_path / "b.csv", ["agreement"], tiny_shapes)
    assert len(found) == 2 and found["name"].iloc[-1] == "stopped after 0 s"
