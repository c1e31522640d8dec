"""Slurm for real: a cluster of one node on loopback, the committed profile, the tables of the local
executor."""

import subprocess
from contextlib import ExitStack
from pathlib import Path

import pytest

from benchmarks.slurm import SLURM
from benchmarks.slurm_cluster import start_cluster, why_not
from benchmarks.soak import OF_RECOVERY, Grid

pytestmark = [pytest.mark.long, pytest.mark.skipif(bool(why_not()), reason=str(why_not()))]


@pytest.fixture(scope="module")
def cluster(tmp_path_factory):
    with ExitStack() as stack:
        try:
            stack.enter_context(start_cluster(tmp_path_factory.mktemp("cluster")))
        # a container may forbid what daemons want
        except (OSError, RuntimeError, subprocess.CalledProcessError) as error:
            pytest.skip(f"the cluster does not start here: {error}")
        yield


def queue(columns: str) -> list[list[str]]:
    """All jobs there were: sorted by number, the columns asked for (see squeue's --format)."""
    command = ["squeue", "-h", "-t", "all", "-S", "i", "-o", columns]
    said = subprocess.run(command, capture_output=True, text=True, check=True)
    return [line.split() for line in said.stdout.splitlines()]


def test_a_job_that_is_cancelled_is_a_sentence_and_a_rerun_goes_on_as_locally(
    cluster, inputs, undisturbed, tmp_path
):
    """The model's folder has a name that every shell would stumble over."""
    grid = Grid(tmp_path / "slurm", *inputs, speed="true", n_pairs=1, n_new_tokens=2, prompt_len=8)
    for name in OF_RECOVERY:
        del grid.settings[name]
    grid.start(*SLURM)
    assert grid.wait_for("capture", 0)
    (job,) = queue("%i")
    subprocess.run(["scancel", *job], check=True)
    said, _ = grid.process.communicate(timeout=300)
    assert grid.process.returncode != 0 and "The run stopped." in said, said
    assert not grid.half_done() and not grid.results()
    grid.finish(*SLURM)
    tables, local = grid.tables(), undisturbed().tables()
    assert len(grid.results()) == 4 and len(tables) > 5
    assert all(tables[name].equals(local[name]) for name in tables)
    names, limits = zip(*(row for row in queue("%k %m|%l|%h") if len(row) == 2), strict=True)
    timed = [limit.split("|") for name, limit in zip(names, limits, strict=True) if "speedup" in name]
    others = [limit.split("|") for name, limit in zip(names, limits, strict=True) if "speedup" not in name]
    assert len(timed) == 1 and {row[2] for row in timed} == {"NO"}  # shares its node with nobody
    assert {row[2] for row in others} == {"OK"}
    assert all(memory.endswith("M") and int(memory[:-1]) > 4096 for memory, *_ in timed + others)
    assert {time for _, time, _ in timed + others} == {"12:00:00"}  # the profile's
    assert not [*Path.cwd().glob("one"), *Path.cwd().glob("two")]  # what the name would have touched
