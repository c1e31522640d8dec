"""A grid that nothing happened to, made once, by the worker that first asks for it."""

import os
from pathlib import Path

import filelock
import pytest

from benchmarks.soak import Grid, make_inputs
from simdiff_utils.files import write_whole


@pytest.fixture(scope="session")
def shared(tmp_path_factory) -> Path:
    """A folder that all workers see."""
    own = tmp_path_factory.getbasetemp()
    return own.parent if "PYTEST_XDIST_WORKER" in os.environ else own


@pytest.fixture(scope="session")
def inputs(shared):
    """A model in a folder whose name every shell would stumble over, and a text."""
    folder = shared / 'it\'s $(touch one) `touch two` "x"; {wildcards}'
    with filelock.FileLock(shared / "inputs.lock"):
        if not folder.exists():
            with write_whole(folder) as partial:
                partial.mkdir()
                make_inputs(partial)
        return folder / "model", folder / "rows.txt"


@pytest.fixture(scope="session")
def undisturbed(inputs, shared):
    """Gives a finished grid that nothing happened to; its folder is no test's to change."""

    def finished() -> Grid:
        grid = Grid(shared / "undisturbed", *inputs)
        with filelock.FileLock(shared / "undisturbed.lock"):
            if not (shared / "undisturbed.done").exists():
                grid.finish()
                assert len(grid.results()) == 4 and not grid.half_done() and len(grid.tables()) > 8
                (shared / "undisturbed.done").touch()
        return grid

    return finished


@pytest.fixture
def grid(inputs, tmp_path):
    started = Grid(tmp_path / "runs", *inputs)
    yield started
    if started.process and started.process.poll() is None:
        started.kill("everything")
