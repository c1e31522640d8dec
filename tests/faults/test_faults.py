"""Faults on the real engine: Snakemake, papermill, kernels that are killed, a full disk, damaged files, two
runs at once.

After each fault nothing half done looks done, and a rerun gives the tables of an undisturbed run and redoes
nothing.
"""

import os
import shutil
import signal
import subprocess
import time

import pandas as pd
import pytest

from benchmarks.soak import PHASES, SECRET, VICTIMS, Grid, soak, tally

pytestmark = pytest.mark.long


def test_a_short_soak_loses_nothing(undisturbed, tmp_path):  # the longest, so it comes first
    log = soak(3, 1, 1, undisturbed(), tmp_path, tmp_path / "soak.csv")
    table = tally(log)
    assert len(log) >= 3 and len(pd.read_csv(tmp_path / "soak.csv")) == len(log)
    assert set(table["phase"]) >= set(PHASES) and set(table["victim"]) == set(VICTIMS)
    assert not table["lost"].any(), log.to_string()


def test_no_secret_of_the_environment_is_in_any_file(undisturbed):
    files = [path for path in undisturbed().folder.rglob("*") if path.is_file()]
    assert len(files) > 50
    assert not [path for path in files if SECRET.encode() in path.read_bytes()]


def test_a_models_name_is_never_a_command(inputs, tmp_path):
    evil = (
        f'it\'s "a" model; touch {tmp_path}/one $(touch {tmp_path}/two) `touch {tmp_path}/three` '
        "{wildcards} ../.."
    )
    grid = Grid(tmp_path / "runs", evil, inputs[1])
    said, _ = grid.start().communicate()
    assert grid.process.returncode != 0
    assert "neither a local folder" in said and "Traceback" not in said, said
    assert not list(tmp_path.iterdir())


def goes_on(grid, undisturbed, before) -> None:
    grid.finish()
    assert not grid.half_done()
    assert grid.equals(undisturbed())
    (report,) = grid.folder.glob("batch/report-*.html")
    assert "4 of 4 notebook runs are done" in report.read_text(encoding="utf-8")
    after = grid.results()
    assert len(after) == 4
    assert all(after[name] == written for name, written in before.items()), "something was redone"


def test_one_grid_gets_through_a_second_run_a_killed_kernel_ctrl_c_and_a_machine_that_goes_down(
    grid, undisturbed
):
    """Each in another phase of the same grid; the soak has more victims and phases."""
    first = grid.start()
    assert grid.wait_for("capture", 0)
    a_second_run_is_refused_in_one_sentence(grid)
    assert grid.wait_for("training", 0), "the first run stopped"
    before = grid.results()
    assert len(before) == 3
    assert grid.kill("kernel")  # in mid cell: its notebook is started once more
    assert grid.wait_for("checkpoint", 0)
    pressed = time.monotonic()
    os.killpg(first.pid, signal.SIGINT)
    said, _ = first.communicate(timeout=60)
    assert first.returncode != 0 and time.monotonic() - pressed < 60
    assert "once more" in said and "Traceback" not in said and not grid.half_done(), said
    grid.start()
    assert grid.wait_for("checkpoint", 0)
    assert grid.kill("everything")
    assert not grid.half_done()
    goes_on(grid, undisturbed, before)


def a_second_run_is_refused_in_one_sentence(grid) -> None:
    second = Grid(grid.folder, grid.settings["model"], grid.settings["text"])
    said, _ = second.start().communicate()
    assert second.process.returncode != 0
    (sentence,) = [line for line in said.splitlines() if line.startswith("simdiff: ")]
    assert "another run is writing to" in sentence and "SIMDIFF_RUNS" in sentence
    dry, _ = second.start("-n").communicate()  # looking is always allowed
    assert second.process.returncode == 0, dry


def test_a_damaged_result_file_is_made_again(grid, undisturbed):
    shutil.copytree(undisturbed().folder, grid.folder)
    (result,) = grid.folder.glob("batch/*/02-*.json")
    result.write_bytes(result.read_bytes()[:-20])
    (statistics,) = grid.folder.glob("*/capture-*/statistics.safetensors")
    content = statistics.read_bytes()
    statistics.write_bytes(content[:-8])
    assert len(grid.half_done()) == 2
    before = {name: written for name, written in grid.results().items() if "/02-" not in name}
    goes_on(grid, undisturbed, before)
    assert statistics.read_bytes() == content


def test_a_disk_that_fills_up_is_a_sentence_and_a_rerun_goes_on(inputs, undisturbed, tmp_path):
    folder = tmp_path / "small"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=5m", "tmpfs", folder]
    if os.name != "posix" or os.geteuid() or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("a small disk is a tmpfs, and mounting one needs root")
    try:
        grid = Grid(folder, *inputs)
        said, _ = grid.start().communicate()
        assert grid.process.returncode != 0 and not list(folder.iterdir()), said
        assert "what this grid writes takes" in said and "make room there" in said, said
        subprocess.run(["mount", "-o", "remount,size=100m", folder], check=True)
        grid.start()
        assert grid.wait_for("capture", 0)
        filler = folder / "batch" / "filler"
        filler.write_bytes(bytes(shutil.disk_usage(folder).free - 3 * 2**20))
        said, _ = grid.process.communicate()
        assert grid.process.returncode != 0
        assert "make room there" in said and "Traceback" not in said, said
        assert not grid.half_done() and not list(folder.glob("*/prune-*"))
        before = grid.results()
        filler.unlink()
        goes_on(grid, undisturbed, before)
    finally:
        subprocess.run(["umount", folder], check=True)
