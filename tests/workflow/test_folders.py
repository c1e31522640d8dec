"""Folders for results that a grid cannot use: one sentence, before anything is started."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize(
    ("name", "sentence"),
    [
        ("runs {x} {0}", "has a brace in it, and Snakemake takes braces for wildcards"),
        ("a file", "cannot make the folder"),
    ],
)
def test_a_folder_that_cannot_be_used_is_said_in_a_sentence(name, sentence, tiny_model, tiny_text, tmp_path):
    (tmp_path / "a file").touch()
    small = "n_samples=4 seq_len=16 n_validation=2 n_test=2 n_remove=2 prompt=w5".split()
    config = [f"model={tiny_model}", f"text={tiny_text}", "n_remove_grid=[2]", *small]
    done = subprocess.run(
        [sys.executable, "-m", "snakemake", "--cores", "1", "--quiet", "all", "--config", *config],
        cwd=ROOT,
        env=os.environ | {"SIMDIFF_RUNS": str(tmp_path / name)},
        capture_output=True,
        text=True,
    )
    said = done.stderr.strip().splitlines()[-1]
    assert done.returncode == 1 and said.startswith("simdiff: ") and sentence in said and said.endswith(".")
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith("runs")] == []
